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
#elif defined(__aarch64__)
  asm volatile("isb");  // waits for some tens of cycles, where "yield" waits for none
#endif
}

constexpr int kSpins = 2000;  // some tens of microseconds
constexpr int kLines = 4;     // of 64 bytes, asked for between two looks for work

}  // namespace

Team::Team(int size) : size_(size < 1 ? 1 : size) {
  for (int thread = 1; thread < size_; ++thread) threads_.emplace_back([this] { worker(); });
}

Team::~Team() {
  stop_.store(true);
  passes_.fetch_add(1);
  passes_.notify_all();
  for (auto& thread : threads_) thread.join();
}

void Team::begin() {
  turn_.lock();
  if (size_ == 1) return;
  active_.store(true, std::memory_order_release);
  passes_.fetch_add(1, std::memory_order_release);
  passes_.notify_all();
}

void Team::end() {
  active_.store(false, std::memory_order_release);
  turn_.unlock();
}

void Team::share(int count, Call call, void* context) {
  ++loop_;
  // A worker reads its loop's entry only while it holds one of its items, and the loop cannot end before that.
  loops_[loop_ % kLoops] = {call, context};
  done_.store(0, std::memory_order_relaxed);
  ticket_.store(Ticket::make(loop_, count).word, std::memory_order_release);
  while (work_once()) {
  }
  for (int spins = 0; done_.load(std::memory_order_acquire) != count; ++spins) {
    if (spins < kSpins) idle();
    else sched_yield();  // the worker that holds the last item may be waiting for this core
  }
}

bool Team::work_once() {
  Ticket ticket{ticket_.load(std::memory_order_acquire)};
  if (!ticket.open()) return false;
  ticket.word = ticket_.fetch_add(1, std::memory_order_acq_rel);
  if (!ticket.open()) return false;
  const Loop& loop = loops_[ticket.loop() % kLoops];
  loop.call(loop.context, ticket.next());
  done_.fetch_add(1, std::memory_order_acq_rel);
  return true;
}

// A moment in which there is nothing to do.
void Team::idle() {
  if (ahead_.load(std::memory_order_relaxed) >= ahead_end_.load(std::memory_order_relaxed)) return relax();
  const uintptr_t from = ahead_.fetch_add(64 * kLines, std::memory_order_relaxed);
  for (int line = 0; line < kLines; ++line) __builtin_prefetch(reinterpret_cast<const char*>(from) + 64 * line, 0, 2);
}

void Team::worker() {
  uint32_t seen = 0;
  while (!stop_.load()) {
    int spins = 0;
    while (active_.load(std::memory_order_acquire) || spins < kSpins) {
      if (work_once()) {
        spins = 0;
      } else if (spins < kSpins) {
        idle();
        ++spins;
      } else {
        sched_yield();
      }
    }
    passes_.wait(seen, std::memory_order_acquire);
    seen = passes_.load(std::memory_order_acquire);
  }
}

}  // namespace slip
