// A pool of threads that run the iterations of one loop at a time, the caller among them.
#pragma once
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace ep {

class Pool {
 public:
  // Runs body(i) for every i < n on at most `threads` threads. A second caller while the pool is busy works alone rather
  // than wait; a process that cannot start threads does so too. An exception of the body ends the loop and is thrown
  // again here, once no thread is at work any more.
  static void run(size_t n, int threads, const std::function<void(size_t)>& body) {
    Pool& pool = instance();
    std::unique_lock<std::mutex> turn(pool.turn_, std::try_to_lock);
    if (n < 2 || threads < 2 || !turn.owns_lock()) {
      for (size_t i = 0; i < n; i++) body(i);
      return;
    }
    pool.grow(std::min<size_t>(threads, n) - 1);
    {
      std::lock_guard<std::mutex> lock(pool.mutex_);
      pool.body_ = &body, pool.n_ = n, pool.next_ = 0, pool.thrown_ = nullptr;
      pool.wanted_ = std::min<size_t>(std::min<size_t>(threads, n) - 1, pool.workers_);
      pool.generation_++;
    }
    pool.wake_.notify_all();
    pool.work(body, n);
    std::unique_lock<std::mutex> lock(pool.mutex_);
    pool.wanted_ = 0;  // whoever has not joined by now finds nothing left
    pool.idle_.wait(lock, [&] { return pool.active_ == 0; });
    if (pool.thrown_) std::rethrow_exception(pool.thrown_);
  }

 private:
  // A forked child inherits the object but none of its threads, so it gets a new one; the old one is left alone since its
  // locks may be held for ever. Never destroyed: workers may outlive static destructors.
  static Pool& instance() {
    static std::atomic<Pool*> current{nullptr};
    Pool* pool = current.load();
    if (!pool || pool->pid_ != getpid()) {
      Pool* fresh = new Pool;
      if (current.compare_exchange_strong(pool, fresh)) return *fresh;
      delete fresh;
      pool = current.load();
    }
    return *pool;
  }

  void grow(size_t workers) {
    while (workers_ < workers) try {
        std::thread([this] { loop(); }).detach();
        workers_++;
      } catch (const std::system_error&) {
        return;
      }
  }

  void loop() {
    size_t seen = 0;
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (!wanted_) continue;
      wanted_--, active_++;
      const auto* body = body_;
      const size_t n = n_;
      lock.unlock();
      work(*body, n);
      lock.lock();
      if (--active_ == 0) idle_.notify_one();
    }
  }

  void work(const std::function<void(size_t)>& body, size_t n) {
    try {
      for (size_t i; (i = next_.fetch_add(1)) < n;) body(i);
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!thrown_) thrown_ = std::current_exception();
      next_ = n;
    }
  }

  const pid_t pid_ = getpid();
  std::mutex turn_, mutex_;
  std::condition_variable wake_, idle_;
  const std::function<void(size_t)>* body_ = nullptr;
  std::exception_ptr thrown_;
  std::atomic<size_t> next_{0};
  size_t n_ = 0, workers_ = 0, wanted_ = 0, active_ = 0, generation_ = 0;
};
}  // namespace ep
