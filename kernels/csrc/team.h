// A team of threads that run one function together (SPMD) with cheap barriers and self-scheduled loops.
//
// A forward pass has hundreds of short parallel phases; waking threads for each would cost more than the work, so
// threads are woken once per pass and meet at spinning barriers. Loops hand out work dynamically: on a shared
// machine a thread may lose its core for a while and the others then take its share.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace slip {

class Team {
 public:
  explicit Team(int size);
  ~Team();

  int size() const { return size_; }
  // Runs body(thread) on every thread, the caller being thread 0; returns when all are done. Callers take turns.
  void run(const std::function<void(int)>& body);

  // The next piece of `grain` items of the current loop; the loop ends with barrier(), which resets the counter.
  int take(int grain) { return size_ == 1 ? solo_take(grain) : counter_.fetch_add(grain, std::memory_order_relaxed); }
  void barrier();

 private:
  int solo_take(int grain) {
    int value = counter_.load(std::memory_order_relaxed);
    counter_.store(value + grain, std::memory_order_relaxed);
    return value;
  }
  void worker(int thread);

  const int size_;
  alignas(64) std::atomic<int> counter_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  alignas(64) std::atomic<uint32_t> job_{0};
  alignas(64) std::atomic<int> running_{0};
  const std::function<void(int)>* body_ = nullptr;
  std::atomic<bool> stop_{false};
  std::mutex turn_;
  std::vector<std::thread> threads_;
};

}  // namespace slip
