// What the handlers of all operations share: buffers as pointers, and XLA's threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace capibara {

using Buffer = xla::ffi::AnyBuffer;
using Result = xla::ffi::Result<xla::ffi::AnyBuffer>;

// An operand or a result without elements is an absent one, and null.
template <typename T>
const T* values(const Buffer& buffer) {
  if (buffer.element_count() == 0) return nullptr;
  return static_cast<const T*>(buffer.untyped_data());
}

template <typename T>
T* values(Result& buffer) {
  return buffer->element_count() == 0 ? nullptr : static_cast<T*>(buffer->untyped_data());
}

// Run the tasks on XLA's threads, on no more than pays: below `kWorthAThread` units of
// `work` one thread is done before another has begun.
constexpr int64_t kWorthAThread = 1 << 16;

inline void run_tasks(xla::ffi::ThreadPool& pool, int64_t tasks, int64_t work,
                      std::function<void(int64_t)> body) {
  const int64_t threads = std::min(pool.num_threads(), 1 + work / kWorthAThread);
  parallel_for(
      tasks, threads, [&](auto job) { pool.Schedule(std::move(job)); }, std::move(body));
}

}  // namespace capibara
