// A multiprocessor that runs one cluster at a time, every thread a fiber, as badly as it may.
//
// The order of blocks (unless they may wait for one another) and of ready warps is shuffled by a
// seed; a lane runs until it must wait, so lanes of a warp drift apart as far as the program lets
// them; asynchronous copies arrive only at their wait. Only barriers order memory: shuffles and
// matrix products wait for all lanes of the warp but say nothing about what these wrote.
//
// Not covered: time, caches, bank conflicts, register pressure, and that `.aligned` barriers want
// the lanes of a warp to have converged.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cuda/tensor_map.h"
#include "fiber.h"
#include "memory.h"
#include "wgmma.h"

namespace jax_gptq::emulator {

// Something a kernel must not do; the message names kernel, block, thread and address.
struct KernelError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Addresses of shared memory start here; those of another block of the cluster name it above.
constexpr uint32_t kSharedBase = 1024;
constexpr int kRankShift = 24;

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

struct Architecture {
  int arch = 80;         // 10 * major + minor
  int processors = 108;  // streaming multiprocessors
};

// Shared memory that one block of an architecture may have.
int max_shared_bytes(int arch);

// What a raised flag in global memory holds.
constexpr uint64_t kRaised = 1;

// The most mbarriers that a block may initialise.
constexpr int kMaxMbarriers = 32;

struct Launch {
  dim3 grid;
  int threads;
  int cluster;  // consecutive blocks along x
  int shared_bytes;
  bool in_order;  // blocks may wait for blocks of lower index, so they run in order

  int blocks() const { return grid.x * grid.y * grid.z; }
};

// What has been released to a barrier: what its threads know, and what they have done.
class Released {
 public:
  void add(const Observer& thread, bool relaxed = false);
  void add_clock(uint32_t agent, uint32_t clock) { clocks_.push_back({agent, clock, false}); }
  // Everything released since the last take().
  View take(uint32_t agents);

 private:
  struct Clock {
    uint32_t agent, clock;
    bool relaxed;
  };
  struct Known {
    View view;
    bool relaxed;
  };
  std::vector<Known> known_;
  std::vector<Clock> clocks_;
};

// The union of views; remembers the latest, since lanes of a warp tend to need the same.
class Union {
 public:
  const View& of(const View& left, const View& right);

 private:
  View left_, right_, both_;
};

struct Thread {
  Fiber* fiber;
  int index;          // in its block
  int block;          // rank of its block in the cluster
  Observer observer;  // its agent is its index in the cluster
  bool finished = false;
  const char* waits_for = nullptr;
  uint32_t cluster_phase = 0;
  bool arrived_at_cluster = false;

  struct Copy {
    size_t shared;  // offset
    const void* global;
    size_t copied, bytes;
  };
  struct BoxStore {
    cuda::MapDescription map;
    size_t shared;  // offset
    int x, y;
  };
  std::vector<Copy> open_copies;              // not committed yet
  std::deque<std::vector<Copy>> copy_groups;  // committed
  std::vector<BoxStore> open_stores, stores;  // not committed, committed
};

struct Warp {
  uint32_t ready = 0;  // lanes that can run
  // A collective operation under way: who is there, with what.
  const char* operation = nullptr;
  uint32_t arrived = 0;
  std::array<void*, kWarp> operands;
  AsyncProducts products;
};

// A named barrier (0 is the whole block's).
struct Barrier {
  int expected = 0;
  int arrived = 0;
  Released released;
  std::vector<Thread*> waiting;
};

struct Mbarrier {
  uint32_t agent;      // the copy engine behind it
  uint32_t clock = 0;  // copies that arrived
  int expected = 0;
  int pending = 0;    // arrivals to come in this phase
  int64_t bytes = 0;  // expected minus arrived in this phase
  uint32_t phase = 0;
  bool fenced = false;  // its initialisation is visible to engines and other blocks
  Released released;    // by those who arrived in this phase
  View completed;       // by those who completed the last
  std::vector<Thread*> waiting;
};

struct Block {
  int index;  // in the grid
  SharedMemory shared;
  std::map<size_t, Mbarrier> mbarriers;  // by offset in shared memory
  std::array<Barrier, 16> barriers;
};

class Machine {
 public:
  Machine(GlobalMemory& memory, const Architecture& architecture, uint64_t seed);

  // Runs `body` in every thread of the grid. Throws KernelError.
  void launch(const char* kernel, const Launch& launch, const std::function<void()>& body);

  // Every kernel launched so far.
  const std::vector<std::string>& launched_kernels() const { return launched_kernels_; }

  // ---- For the primitives: called by the running thread -------------------------------------

  Thread& thread() { return *running_; }
  Block& block() { return *blocks_[running_->block]; }
  dim3 block_index() const;
  const Launch& launched() const { return launch_; }
  int lane() const { return running_->index % kWarp; }

  // Checked addresses of `bytes` bytes, aligned to `alignment`.
  const void* shared_read(uint32_t address, size_t bytes, size_t alignment);
  void* shared_write(uint32_t address, size_t bytes, size_t alignment);
  const void* cluster_read(uint32_t mapped, size_t bytes, size_t alignment);
  uint32_t cluster_map(uint32_t address, int rank);
  const void* global_read(const void* pointer, size_t bytes, size_t alignment);
  void* global_write(void* pointer, size_t bytes, size_t alignment);

  // Flags in global memory between clusters of a launch.
  void raise_flag(uint64_t* flag);
  bool flag_raised(const uint64_t* flag);

  void barrier(int id, int threads);
  void warp_barrier();
  void cluster_arrive(bool relaxed);
  void cluster_wait();

  void copy_async(uint32_t shared, const void* global, size_t copied, size_t bytes);
  void copy_async_commit();
  void copy_async_wait(size_t pending);

  void mbarrier_init(uint32_t shared, int arrivals);
  void mbarrier_arrive(uint32_t shared, int rank, int64_t expected_bytes);
  void mbarrier_arrive_mapped(uint32_t mapped);
  void mbarrier_wait(uint32_t shared, uint32_t parity);
  void mbarrier_init_fence();

  // Copies by the engine behind the mbarrier at `mbarrier`'s offset in each of `ranks`, to the
  // offset of `shared` there.
  void copy_box(uint32_t shared, const cuda::MapDescription& map, uint32_t mbarrier,
                std::array<int, 3> at, const std::vector<int>& ranks);
  void copy_multicast(uint32_t shared, const void* from, size_t bytes, uint32_t mbarrier,
                      const std::vector<int>& ranks);
  void store_box(const cuda::MapDescription& map, uint32_t shared, int x, int y);
  void store_commit();
  void store_wait_read();
  void fence_async_proxy();

  // One lane of the warp, whichever comes last.
  bool elect_one();

  // wgmma, by warps: d += a b or d = a b, of which the warp has 16 of the 64 rows.
  void wgmma_fence();
  void wgmma(float* d, const uint32_t* a, uint64_t b, int n, bool bf16, bool accumulate);
  void wgmma_commit();
  void wgmma_wait(int pending);

  // Waits until all 32 lanes have called `operation`, then runs `all` once on their operands.
  template <typename Operands>
  void collective(const char* operation, Operands& mine,
                  void (*all)(const std::array<Operands*, kWarp>&));

  // The rank's block of the running cluster.
  Block& peer(int rank);
  int own_rank() const { return running_->block; }
  void require_arch(int arch, const char* what);

  [[noreturn]] void fail(const std::string& problem) const;
  std::string name_of(uint32_t agent) const;

 private:
  struct BulkCopy {
    int rank;
    size_t offset, mbarrier, bytes;
    std::function<void(unsigned char*)> fill;
  };

  void run_cluster(int cluster);
  void run_thread(Thread& thread);
  static void thread_main();
  bool land_a_copy();
  void end_cluster();
  [[noreturn]] void deadlock();

  void sleep(const char* reason);
  void wake(Thread& thread);
  Warp& warp_of(const Thread& thread);
  void release_into(Released& released, bool relaxed = false);
  void acquire(const View& view);
  void tick(Thread& thread);
  size_t shared_offset(uint32_t address, size_t bytes, size_t alignment, const char* what);
  Block& mapped_block(uint32_t mapped);
  void copy_bulk(int rank, size_t offset, size_t mbarrier, size_t bytes,
                 std::function<void(unsigned char*)> fill);
  Mbarrier& mbarrier_at(Block& block, size_t offset);
  void complete_if_due(Mbarrier& barrier);

  GlobalMemory& memory_;
  Architecture architecture_;
  std::mt19937_64 random_;

  std::vector<std::string> launched_kernels_;
  std::map<const uint64_t*, View> flags_;  // raised in this launch: what they let others see
  const char* kernel_ = "";
  Launch launch_{};
  const std::function<void()>* body_ = nullptr;
  uint32_t cluster_index_ = 0;
  uint32_t agents_ = 0;
  View nothing_;  // of the running cluster's agents
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<BulkCopy> bulk_copies_;
  Vector fenced_;  // per agent, its clock at its latest fence_async_proxy
  int cluster_arrivals_ = 0;
  uint32_t cluster_phase_ = 0;
  Released cluster_released_;
  View cluster_completed_;
  Union union_;
  std::vector<Thread*> cluster_waiting_;
  int alive_ = 0;
  Thread* running_ = nullptr;
  std::string error_;
};

// The machine that is running; one at a time in a process.
extern Machine* machine;

template <typename Operands>
void Machine::collective(const char* operation, Operands& mine,
                         void (*all)(const std::array<Operands*, kWarp>&)) {
  Warp& warp = warp_of(*running_);
  if (warp.arrived == 0) {
    warp.operation = operation;
  } else if (std::strcmp(warp.operation, operation) != 0) {
    fail(std::string("is at ") + operation + " while other lanes of its warp are at " +
         warp.operation);
  }
  warp.operands[lane()] = &mine;
  warp.arrived |= 1u << lane();
  if (warp.arrived != kAllLanes) {
    sleep(operation);
    return;
  }
  std::array<Operands*, kWarp> operands;
  for (int i = 0; i < kWarp; ++i) operands[i] = static_cast<Operands*>(warp.operands[i]);
  warp.arrived = 0;
  warp.ready = kAllLanes;
  all(operands);
}

}  // namespace jax_gptq::emulator
