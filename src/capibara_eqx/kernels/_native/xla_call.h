// What the handlers of all operations share: buffers as pointers, and XLA's threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

#if defined(__linux__)
#include <sys/mman.h>
#endif

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

// Ask for large pages where a result is large. The system hands out the memory of such a
// result anew at every call, page by page as it is first written to, and with small pages
// that took longer than to compute what is written (32768 tokens of 256 channels forward:
// 37 ms, with large ones 23). No more than a hint: where there are none, small ones serve.
inline void expect_many_writes(Result& buffer) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLargePage = uintptr_t{1} << 21;
  const auto start = reinterpret_cast<uintptr_t>(buffer->untyped_data());
  const uintptr_t first = (start + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t end = (start + buffer->size_bytes()) / kLargePage * kLargePage;
  if (end > first + kLargePage) {
    madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
  }
#endif
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
