// A parallel loop on somebody else's thread pool that never waits for the pool.
//
// The calling thread works too, and indices are claimed from a counter, so the loop finishes even
// if no pool thread ever comes: the caller waits only for indices that a running thread has
// claimed. A task that the pool starts after the loop has ended finds the counter used up; it
// shares ownership of the counter and touches nothing else.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

namespace jax_gptq::cpu {

// Calls body(i) for 0 <= i < count. `schedule` runs a copyable callable on the pool, some time.
template <class Schedule, class Body>
void ParallelFor(int64_t pool_threads, const Schedule& schedule, int64_t count, const Body& body) {
  struct Shared {
    const Body* body;
    int64_t count;
    std::atomic<int64_t> claimed{0};
    std::atomic<int64_t> finished{0};

    void Work() {
      for (;;) {
        const int64_t i = claimed.fetch_add(1, std::memory_order_relaxed);
        if (i >= count) return;
        (*body)(i);
        finished.fetch_add(1, std::memory_order_release);
      }
    }
  };
  auto shared = std::make_shared<Shared>();
  shared->body = &body;
  shared->count = count;
  const int64_t helpers = std::min(pool_threads, count) - 1;
  for (int64_t i = 0; i < helpers; ++i) schedule([shared] { shared->Work(); });
  shared->Work();
  for (int spins = 0; shared->finished.load(std::memory_order_acquire) < count; ++spins) {
    if (spins > 4096) std::this_thread::yield();
  }
}

}  // namespace jax_gptq::cpu
