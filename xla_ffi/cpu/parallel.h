// A parallel loop on somebody else's thread pool that never waits for the pool.
//
// The calling thread works too, and indices are claimed from a counter, so the loop finishes even
// if no pool thread ever comes: the caller waits only for indices that a running thread has
// claimed. A task that the pool starts after the loop has ended finds the counter used up; it
// shares ownership of the counter and touches nothing else.
//
// A claim is a run of neighbouring indices, long at first and one in the end, so that threads read
// their parts of a weight in long stretches and yet finish together.
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
    int64_t threads;
    std::atomic<int64_t> claimed{0};
    std::atomic<int64_t> finished{0};

    void Work() {
      int64_t begin = claimed.load(std::memory_order_relaxed);
      while (begin < count) {
        const int64_t end = begin + std::max<int64_t>(1, (count - begin) / (2 * threads));
        if (!claimed.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
        for (int64_t i = begin; i < end; ++i) (*body)(i);
        finished.fetch_add(end - begin, std::memory_order_release);
        begin = claimed.load(std::memory_order_relaxed);
      }
    }
  };
  auto shared = std::make_shared<Shared>();
  shared->body = &body;
  shared->count = count;
  shared->threads = std::max<int64_t>(1, std::min(pool_threads, count));
  const int64_t helpers = shared->threads - 1;
  for (int64_t i = 0; i < helpers; ++i) schedule([shared] { shared->Work(); });
  shared->Work();
  for (int spins = 0; shared->finished.load(std::memory_order_acquire) < count; ++spins) {
    if (spins > 4096) std::this_thread::yield();
  }
}

}  // namespace jax_gptq::cpu
