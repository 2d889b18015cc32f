// Threads that share parallel loops with the calling thread.
//
// A forward pass has hundreds of short loops; waking threads for each would cost more than the work. Between begin()
// and end() the workers poll for loops instead. A loop is over when its items are done, not when every thread has
// been there: on a shared machine a worker may lose its core for milliseconds, and then the others do its share.
#pragma once
#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace slip {

class Team {
 public:
  explicit Team(int size);
  ~Team();

  int size() const { return size_; }
  // Brackets a pass: workers poll in between. One pass at a time; others wait.
  void begin();
  void end();

  // Calls f(0) … f(count - 1), in any order and on any thread, and returns when all are done.
  template <class F>
  void parallel(int count, F&& f) {
    if (size_ == 1 || count <= 1) {
      for (int i = 0; i < count; ++i) f(i);
      return;
    }
    share(count, [](void* context, int item) { (*static_cast<std::remove_reference_t<F>*>(context))(item); }, &f);
  }

  // Threads without an item ask for this memory meanwhile, from its beginning on: some loops are short or of one item, and
  // then nobody reads weights. Replaces what was named before.
  void read_ahead(const void* memory, size_t bytes) {
    ahead_end_.store(0, std::memory_order_relaxed);
    ahead_.store(reinterpret_cast<uintptr_t>(memory), std::memory_order_relaxed);
    ahead_end_.store(reinterpret_cast<uintptr_t>(memory) + bytes, std::memory_order_relaxed);
  }

 private:
  using Call = void (*)(void*, int);
  struct Loop {
    Call call;
    void* context;
  };
  // The state of the current loop in one word, so that a ticket is drawn for exactly the loop it was read from:
  // loop number, item count, next item.
  struct Ticket {
    uint64_t word;
    static constexpr int kBits = 24;
    static constexpr uint64_t kMask = (1u << kBits) - 1;
    static Ticket make(uint64_t loop, uint64_t count) { return {loop << (2 * kBits) | count << kBits}; }
    int next() const { return static_cast<int>(word & kMask); }
    int count() const { return static_cast<int>(word >> kBits & kMask); }
    uint64_t loop() const { return word >> (2 * kBits); }
    bool open() const { return next() < count(); }
  };
  static constexpr int kLoops = 4;

  void share(int count, Call call, void* context);
  bool work_once();
  void idle();
  void worker();

  const int size_;
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int> done_{0};
  alignas(64) std::atomic<bool> active_{false};
  alignas(64) std::atomic<uint32_t> passes_{0};
  // Asking for memory that is not there, in the moment in which these change, does no harm.
  alignas(64) std::atomic<uintptr_t> ahead_{0};
  std::atomic<uintptr_t> ahead_end_{0};
  Loop loops_[kLoops] = {};
  uint64_t loop_ = 0;
  std::atomic<bool> stop_{false};
  std::mutex turn_;
  std::vector<std::thread> threads_;
};

// begin() and end() as a scope.
class Pass {
 public:
  explicit Pass(Team& team) : team_(team) { team_.begin(); }
  ~Pass() { team_.end(); }
  Pass(const Pass&) = delete;
  Pass& operator=(const Pass&) = delete;

 private:
  Team& team_;
};

}  // namespace slip
