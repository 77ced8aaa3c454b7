// Memory for what a thread is computing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace capibara {

// Memory of one thread that lives as long as the thread, since fresh pages cost more
// than a small scan.
class Scratch {
 public:
  static Scratch& of_this_thread() {
    thread_local Scratch scratch;
    return scratch;
  }

  // Room for `bytes`; what was taken before is gone.
  void reserve(size_t bytes) {
    used_ = 0;
    if (bytes + kAlignment > size_) {
      size_ = bytes + kAlignment;
      memory_.reset(new char[size_]);
    }
  }

  template <typename V>
  V* take(size_t count) {
    const auto start = reinterpret_cast<uintptr_t>(memory_.get());
    const uintptr_t aligned = (start + kAlignment - 1) / kAlignment * kAlignment;
    V* taken = reinterpret_cast<V*>(aligned + used_);
    used_ += count * sizeof(V);
    return taken;
  }

 private:
  static constexpr size_t kAlignment = 64;
  std::unique_ptr<char[]> memory_;
  size_t size_ = 0, used_ = 0;
};

}  // namespace capibara
