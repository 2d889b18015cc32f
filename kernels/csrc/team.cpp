#include "team.h"

#include <sched.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace slip {

namespace {

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Spins briefly, then lets others have the core: the thread waited for may itself be waiting for this core.
template <class Done>
void spin_until(Done done, int spins) {
  for (int i = 0; i < spins; ++i) {
    if (done()) return;
    relax();
  }
  while (!done()) sched_yield();
}

constexpr int kBarrierSpins = 4000;
constexpr int kIdleSpins = 4000;

}  // namespace

Team::Team(int size) : size_(size < 1 ? 1 : size) {
  for (int thread = 1; thread < size_; ++thread) threads_.emplace_back([this, thread] { worker(thread); });
}

Team::~Team() {
  stop_.store(true);
  job_.fetch_add(1);
  job_.notify_all();
  for (auto& thread : threads_) thread.join();
}

void Team::run(const std::function<void(int)>& body) {
  std::lock_guard<std::mutex> lock(turn_);
  counter_.store(0, std::memory_order_relaxed);
  if (size_ == 1) {
    body(0);
    return;
  }
  body_ = &body;
  running_.store(size_ - 1, std::memory_order_relaxed);
  job_.fetch_add(1, std::memory_order_release);
  job_.notify_all();
  body(0);
  spin_until([this] { return running_.load(std::memory_order_acquire) == 0; }, kBarrierSpins);
}

void Team::barrier() {
  if (size_ == 1) {
    counter_.store(0, std::memory_order_relaxed);
    return;
  }
  const uint32_t phase = phase_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    counter_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
  } else {
    spin_until([this, phase] { return phase_.load(std::memory_order_acquire) != phase; }, kBarrierSpins);
  }
}

void Team::worker(int thread) {
  uint32_t seen = 0;
  for (;;) {
    for (int i = 0; i < kIdleSpins && job_.load(std::memory_order_acquire) == seen; ++i) relax();
    job_.wait(seen, std::memory_order_acquire);
    seen = job_.load(std::memory_order_acquire);
    if (stop_.load()) return;
    (*body_)(thread);
    running_.fetch_sub(1, std::memory_order_acq_rel);
  }
}

}  // namespace slip
