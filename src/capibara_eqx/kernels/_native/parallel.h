// A loop over independent tasks on a pool of threads that others use too.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>

namespace capibara {

// Tasks are claimed one by one. The caller works as well and waits only for tasks that
// a thread has claimed, so it never waits for the pool: if all its threads are taken,
// the caller does everything, and a helper that comes late finds nothing to do.
class TaskLoop {
 public:
  TaskLoop(int64_t count, std::function<void(int64_t)> body)
      : count_(count), body_(std::move(body)) {}

  // Claim and run tasks until none is left.
  void work() {
    int64_t done = 0;
    for (int64_t task; (task = next_.fetch_add(1)) < count_; ++done) body_(task);
    if (done == 0) return;
    std::lock_guard<std::mutex> lock(mutex_);
    finished_ += done;
    if (finished_ == count_) all_done_.notify_all();
  }

  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    all_done_.wait(lock, [this] { return finished_ == count_; });
  }

 private:
  const int64_t count_;
  const std::function<void(int64_t)> body_;
  std::atomic<int64_t> next_{0};
  std::mutex mutex_;
  std::condition_variable all_done_;
  int64_t finished_ = 0;
};

// Run `body(task)` for every task. `schedule(job)` hands a job to the pool.
template <typename Schedule>
void parallel_for(int64_t tasks, int64_t threads, Schedule schedule,
                  std::function<void(int64_t)> body) {
  if (tasks <= 0) return;
  // Shared, since a helper may begin after the last task was done.
  auto loop = std::make_shared<TaskLoop>(tasks, std::move(body));
  const int64_t helpers = (threads < tasks ? threads : tasks) - 1;
  for (int64_t i = 0; i < helpers; ++i) schedule([loop] { loop->work(); });
  loop->work();
  loop->wait();
}

}  // namespace capibara
