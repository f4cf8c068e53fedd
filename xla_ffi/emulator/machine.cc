#include "machine.h"

#include <algorithm>
#include <numeric>

namespace jax_gptq::emulator {

Machine* machine = nullptr;

std::string agent_name(uint32_t agent) { return machine->name_of(agent); }

int max_shared_bytes(int arch) {
  switch (arch) {
    case 80:
    case 87:
      return 163 * 1024;
    case 86:
    case 89:
    case 120:
      return 99 * 1024;
    case 90:
    case 100:
      return 227 * 1024;
    default:
      return 48 * 1024;
  }
}

Machine::Machine(GlobalMemory& memory, const Architecture& architecture, uint64_t seed)
    : memory_(memory), architecture_(architecture), random_(seed) {}

std::string Machine::name_of(uint32_t agent) const {
  if (agent < threads_.size()) {
    return "thread " + std::to_string(threads_[agent].index) + " of block " +
           std::to_string(blocks_[threads_[agent].block]->index);
  }
  return "a bulk copy";
}

void Machine::fail(const std::string& problem) const {
  std::string where = std::string("kernel ") + kernel_;
  if (running_ != nullptr) where += ", " + name_of(running_->observer.agent);
  throw KernelError(where + ": " + problem);
}

void Machine::require_arch(int arch, const char* what) {
  if (architecture_.arch < arch) {
    fail(std::string(what) + " needs sm_" + std::to_string(arch) + ", found sm_" +
         std::to_string(architecture_.arch));
  }
}

// ---- Running ---------------------------------------------------------------------------------

void Machine::launch(const char* kernel, const Launch& launch, const std::function<void()>& body) {
  kernel_ = kernel;
  launched_kernels_.push_back(kernel);
  launch_ = launch;
  body_ = &body;
  running_ = nullptr;
  const int blocks = launch.blocks(), threads = launch.threads;
  if (blocks < 1 || threads < 1 || threads > 1024 || threads % kWarp != 0) {
    fail("launch of " + std::to_string(blocks) + " blocks of " + std::to_string(threads) +
         " threads");
  }
  if (launch.cluster < 1 || launch.cluster > 8 || launch.grid.x % launch.cluster != 0) {
    fail("launch of clusters of " + std::to_string(launch.cluster) + " in " +
         std::to_string(launch.grid.x) + " blocks along x");
  }
  if (launch.cluster > 1) require_arch(90, "a cluster");
  if (launch.shared_bytes > max_shared_bytes(architecture_.arch)) {
    fail(std::to_string(launch.shared_bytes) + " bytes of shared memory; sm_" +
         std::to_string(architecture_.arch) + " has " +
         std::to_string(max_shared_bytes(architecture_.arch)));
  }
  memory_.start_launch();
  std::vector<int> order(blocks / launch.cluster);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random_);
  for (int cluster : order) run_cluster(cluster);
}

void Machine::run_cluster(int cluster) {
  const int count = launch_.cluster * launch_.threads;
  cluster_index_ = cluster;
  agents_ = count + (architecture_.arch >= 90 ? launch_.cluster * kMaxMbarriers : 0);
  if (agents_ > kMaxAgents) fail("more threads and mbarriers than the emulator has clocks for");
  while (static_cast<int>(fibers_.size()) < count) fibers_.push_back(std::make_unique<Fiber>());
  while (static_cast<int>(blocks_.size()) < launch_.cluster) {
    blocks_.push_back(std::make_unique<Block>());
  }
  for (int rank = 0; rank < launch_.cluster; ++rank) {
    Block& block = *blocks_[rank];
    block.index = cluster * launch_.cluster + rank;
    block.shared.reset(launch_.shared_bytes);
    block.mbarriers.clear();
    block.barriers.fill({});
  }
  const Seen nothing = std::make_shared<const Vector>(agents_, 0);
  threads_.assign(count, {});
  warps_.assign(count / kWarp, {});
  for (int i = 0; i < count; ++i) {
    Thread& thread = threads_[i];
    thread.fiber = fibers_[i].get();
    thread.index = i % launch_.threads;
    thread.block = i / launch_.threads;
    thread.observer.agent = i;
    thread.observer.seen = nothing;
    thread.fiber->start(&Machine::thread_main);
  }
  for (Warp& warp : warps_) warp.ready = kAllLanes;
  bulk_copies_.clear();
  cluster_arrivals_ = 0;
  cluster_phase_ = 0;
  cluster_released_ = {};
  cluster_completed_ = nothing;
  cluster_waiting_.clear();
  error_.clear();
  alive_ = count;

  std::vector<int> ready;
  int warp = 0;
  while (alive_ > 0) {
    // Half of the time the same warp goes on, so that warps also run far ahead of others.
    if (warps_[warp].ready == 0 || random_() % 2 == 0) {
      ready.clear();
      for (size_t w = 0; w < warps_.size(); ++w) {
        if (warps_[w].ready != 0) ready.push_back(w);
      }
      if (ready.empty() || random_() % 8 == 0) {
        const bool landed = land_a_copy();
        if (ready.empty() && !landed) deadlock();
        if (ready.empty()) continue;
      }
      warp = ready[random_() % ready.size()];
    }
    const uint64_t choice = random_();
    const int first = choice % kWarp, step = choice / kWarp % kWarp | 1;
    for (int i = 0; i < kWarp; ++i) {
      const int lane = (first + i * step) % kWarp;
      if (warps_[warp].ready >> lane & 1) run_thread(threads_[warp * kWarp + lane]);
    }
  }
  end_cluster();
}

void Machine::run_thread(Thread& thread) {
  running_ = &thread;
  thread.fiber->resume();
  running_ = nullptr;
  if (!error_.empty()) throw KernelError(error_);
}

void Machine::thread_main() {
  Thread& thread = *machine->running_;
  try {
    (*machine->body_)();
    if (!thread.open_copies.empty() || !thread.copy_groups.empty()) {
      machine->fail("ends with asynchronous copies in flight");
    }
  } catch (const std::exception& error) {
    machine->error_ = error.what();
  }
  thread.finished = true;
  --machine->alive_;
  machine->warp_of(thread).ready &= ~(1u << thread.index % kWarp);
  thread.fiber->suspend();
}

void Machine::end_cluster() {
  if (!bulk_copies_.empty()) fail("a block ends with bulk copies in flight");
}

void Machine::deadlock() {
  std::map<std::string, std::pair<int, uint32_t>> waits;  // what -> how many, the first
  for (const Thread& thread : threads_) {
    if (thread.finished) continue;
    auto& [count, first] = waits[thread.waits_for];
    if (count++ == 0) first = thread.observer.agent;
  }
  std::string list;
  for (const auto& [what, who] : waits) {
    list += (list.empty() ? "" : "; ") + std::to_string(who.first) + " threads at " + what +
            " (the first is " + name_of(who.second) + ")";
  }
  const int finished = threads_.size() - alive_;
  fail("deadlock: " + list + "; " + std::to_string(finished) + " have ended");
}

Warp& Machine::warp_of(const Thread& thread) { return warps_[thread.observer.agent / kWarp]; }

void Machine::sleep(const char* reason) {
  Thread& thread = *running_;
  thread.waits_for = reason;
  warp_of(thread).ready &= ~(1u << thread.index % kWarp);
  thread.fiber->suspend();
}

void Machine::wake(Thread& thread) { warp_of(thread).ready |= 1u << thread.index % kWarp; }

dim3 Machine::block_index() const {
  const unsigned index = blocks_[running_->block]->index;
  const dim3& grid = launch_.grid;
  return dim3(index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y);
}

// ---- Clocks ----------------------------------------------------------------------------------

void Released::add(const Observer& thread) {
  if (seen_.empty() || seen_.back() != thread.seen) seen_.push_back(thread.seen);
  clocks_.push_back({thread.agent, thread.clock});
}

Seen Released::take(uint32_t agents) {
  auto all = std::make_shared<Vector>(agents, 0);
  std::sort(seen_.begin(), seen_.end());
  seen_.erase(std::unique(seen_.begin(), seen_.end()), seen_.end());
  for (const Seen& seen : seen_) {
    for (uint32_t i = 0; i < agents; ++i) (*all)[i] = std::max((*all)[i], (*seen)[i]);
  }
  for (const auto& [agent, clock] : clocks_) (*all)[agent] = std::max((*all)[agent], clock);
  seen_.clear();
  clocks_.clear();
  return all;
}

void Machine::tick(Thread& thread) {
  if (++thread.observer.clock >= kMaxClock) fail("more barriers than the emulator can count");
}

// The running thread publishes what it has seen and done.
void Machine::release_into(Released& released) {
  released.add(running_->observer);
  tick(*running_);
}

// The running thread sees what others have published.
void Machine::acquire(const Seen& seen) {
  Seen& own = running_->observer.seen;
  if (own == seen) return;
  if (left_ != own || right_ != seen) {
    auto both = std::make_shared<Vector>(*own);
    for (uint32_t i = 0; i < agents_; ++i) (*both)[i] = std::max((*both)[i], (*seen)[i]);
    left_ = own;
    right_ = seen;
    union_ = both;
  }
  own = union_;
}

// ---- Checked memory --------------------------------------------------------------------------

// Every block of a launch has the same amount of shared memory.
size_t Machine::shared_offset(uint32_t address, size_t bytes, size_t alignment, const char* what) {
  const size_t size = launch_.shared_bytes;
  const int64_t offset = static_cast<int64_t>(address) - kSharedBase;
  if (offset < 0 || offset + bytes > size) {
    fail(std::string(what) + " of " + std::to_string(bytes) + " bytes at shared byte " +
         std::to_string(offset) + ", out of " + std::to_string(size));
  }
  if (offset % alignment != 0) {
    fail(std::string(what) + " of shared byte " + std::to_string(offset) + " is not aligned to " +
         std::to_string(alignment));
  }
  return offset;
}

const void* Machine::shared_read(uint32_t address, size_t bytes, size_t alignment) {
  SharedMemory& shared = block().shared;
  const size_t offset = shared_offset(address, bytes, alignment, "read");
  const std::string problem = shared.read(offset, bytes, running_->observer);
  if (!problem.empty()) fail(problem);
  return shared.data() + offset;
}

void* Machine::shared_write(uint32_t address, size_t bytes, size_t alignment) {
  SharedMemory& shared = block().shared;
  const size_t offset = shared_offset(address, bytes, alignment, "write");
  const std::string problem = shared.write(offset, bytes, running_->observer);
  if (!problem.empty()) fail(problem);
  return shared.data() + offset;
}

uint32_t Machine::cluster_map(uint32_t address, int rank) {
  peer(rank);
  shared_offset(address, 1, 1, "cluster address");
  return address | static_cast<uint32_t>(rank + 1) << kRankShift;
}

Block& Machine::mapped_block(uint32_t mapped) {
  const int rank = static_cast<int>(mapped >> kRankShift) - 1;
  Block& other = peer(rank);
  const auto first = threads_.begin() + rank * launch_.threads;
  if (std::all_of(first, first + launch_.threads, [](const Thread& t) { return t.finished; })) {
    fail("touches shared memory of block " + std::to_string(other.index) + ", which has ended");
  }
  return other;
}

const void* Machine::cluster_read(uint32_t mapped, size_t bytes, size_t alignment) {
  Block& other = mapped_block(mapped);
  const size_t offset =
      shared_offset(mapped & ((1u << kRankShift) - 1), bytes, alignment, "read in the cluster");
  const std::string problem = other.shared.read(offset, bytes, running_->observer);
  if (!problem.empty()) fail(problem + " (in block " + std::to_string(other.index) + ")");
  return other.shared.data() + offset;
}

void* Machine::cluster_write(uint32_t mapped, size_t bytes, size_t alignment) {
  Block& other = mapped_block(mapped);
  const size_t offset =
      shared_offset(mapped & ((1u << kRankShift) - 1), bytes, alignment, "write in the cluster");
  const std::string problem = other.shared.write(offset, bytes, running_->observer);
  if (!problem.empty()) fail(problem + " (in block " + std::to_string(other.index) + ")");
  return other.shared.data() + offset;
}

const void* Machine::global_read(const void* pointer, size_t bytes, size_t alignment) {
  const Buffer* buffer = memory_.find(pointer, bytes);
  if (buffer == nullptr) {
    fail("read of " + std::to_string(bytes) + " bytes at " + memory_.describe(pointer));
  }
  if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0) {
    fail("read of " + memory_.describe(pointer) + " is not aligned to " +
         std::to_string(alignment));
  }
  const std::string problem =
      memory_.read(*buffer, pointer, bytes, cluster_index_, running_->observer);
  if (!problem.empty()) fail(problem);
  return pointer;
}

void* Machine::global_write(void* pointer, size_t bytes, size_t alignment) {
  const Buffer* buffer = memory_.find(pointer, bytes);
  if (buffer == nullptr || !buffer->writable) {
    fail("write of " + std::to_string(bytes) + " bytes at " + memory_.describe(pointer) +
         (buffer == nullptr ? "" : ", an operand"));
  }
  if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0) {
    fail("write of " + memory_.describe(pointer) + " is not aligned to " +
         std::to_string(alignment));
  }
  const std::string problem =
      memory_.write(*buffer, pointer, bytes, cluster_index_, running_->observer);
  if (!problem.empty()) fail(problem);
  return pointer;
}

// ---- Barriers --------------------------------------------------------------------------------

void Machine::barrier(int id, int threads) { join_barrier(id, threads, true); }

void Machine::barrier_arrive(int id, int threads) { join_barrier(id, threads, false); }

void Machine::join_barrier(int id, int threads, bool wait) {
  if (id < 0 || id > 15 || threads % kWarp != 0 || threads > launch_.threads) {
    fail("barrier " + std::to_string(id) + " of " + std::to_string(threads) + " threads");
  }
  Barrier& barrier = block().barriers[id];
  if (barrier.arrived == 0) {
    barrier.expected = threads;
  } else if (barrier.expected != threads) {
    fail("names barrier " + std::to_string(id) + " with " + std::to_string(threads) +
         " threads, others with " + std::to_string(barrier.expected));
  }
  release_into(barrier.released);
  if (wait) barrier.waiting.push_back(running_);
  if (++barrier.arrived < barrier.expected) {
    if (wait) sleep(id == 0 ? "the block's barrier" : "a named barrier");
    return;
  }
  barrier.arrived = 0;
  const Seen all = barrier.released.take(agents_);
  for (Thread* thread : barrier.waiting) {
    thread->observer.seen = all;  // it was among those who released
    wake(*thread);
  }
  barrier.waiting.clear();
}

void Machine::warp_barrier() {
  collective<Thread>("warp barrier", *running_, [](const std::array<Thread*, kWarp>& lanes) {
    Released released;
    for (const Thread* lane : lanes) released.add(lane->observer);
    const Seen all = released.take(machine->agents_);
    for (Thread* lane : lanes) {
      lane->observer.seen = all;
      machine->tick(*lane);
    }
  });
}

void Machine::cluster_arrive() {
  require_arch(90, "a cluster barrier");
  if (running_->arrived_at_cluster) fail("arrives twice at the cluster's barrier");
  running_->arrived_at_cluster = true;
  running_->cluster_phase = cluster_phase_;
  release_into(cluster_released_);
  if (++cluster_arrivals_ < static_cast<int>(threads_.size())) return;
  cluster_arrivals_ = 0;
  ++cluster_phase_;
  cluster_completed_ = cluster_released_.take(agents_);
  for (Thread* thread : cluster_waiting_) wake(*thread);
  cluster_waiting_.clear();
}

void Machine::cluster_wait() {
  if (!running_->arrived_at_cluster) fail("waits for the cluster without having arrived");
  running_->arrived_at_cluster = false;
  if (running_->cluster_phase == cluster_phase_) {
    cluster_waiting_.push_back(running_);
    sleep("the cluster's barrier");
  }
  acquire(cluster_completed_);
}

Block& Machine::peer(int rank) {
  if (rank < 0 || rank >= launch_.cluster) {
    fail("names block " + std::to_string(rank) + " of a cluster of " +
         std::to_string(launch_.cluster));
  }
  return *blocks_[rank];
}

// ---- Asynchronous copies ---------------------------------------------------------------------

void Machine::copy_async(uint32_t shared, const void* global, size_t copied, size_t bytes) {
  if (copied > bytes) fail("copies more bytes than it fills");
  const size_t offset = shared_offset(shared, bytes, bytes, "asynchronous copy");
  if (reinterpret_cast<uintptr_t>(global) % bytes != 0) {
    fail("asynchronous copy from " + memory_.describe(global) + " is not aligned to " +
         std::to_string(bytes));
  }
  if (copied > 0) global_read(global, copied, 1);
  const std::string problem = block().shared.take_off(offset, bytes, running_->observer);
  if (!problem.empty()) fail(problem);
  running_->open_copies.push_back({offset, global, copied, bytes});
}

void Machine::copy_async_commit() {
  running_->copy_groups.push_back(std::move(running_->open_copies));
  running_->open_copies.clear();
}

void Machine::copy_async_wait(size_t pending) {
  while (running_->copy_groups.size() > pending) {
    for (const Thread::Copy& copy : running_->copy_groups.front()) {
      block().shared.land(copy.shared, copy.global, copy.copied, copy.bytes,
                          running_->observer.stamp());
    }
    running_->copy_groups.pop_front();
  }
}

Mbarrier& Machine::mbarrier_at(Block& block, size_t offset) {
  const auto found = block.mbarriers.find(offset);
  if (found == block.mbarriers.end()) {
    fail("no mbarrier was initialised at shared byte " + std::to_string(offset));
  }
  const std::string problem = block.shared.read(offset, 8, running_->observer);
  if (!problem.empty()) fail("mbarrier: " + problem);
  return found->second;
}

void Machine::mbarrier_init(uint32_t shared, int arrivals) {
  require_arch(90, "an mbarrier");
  const size_t offset = shared_offset(shared, 8, 8, "mbarrier");
  const std::string problem = block().shared.write(offset, 8, running_->observer);
  if (!problem.empty()) fail(problem);
  const int index = block().mbarriers.size();
  if (index >= kMaxMbarriers) fail("more mbarriers than the emulator has clocks for");
  Mbarrier& barrier = block().mbarriers[offset];
  barrier.agent = threads_.size() + running_->block * kMaxMbarriers + index;
  barrier.expected = barrier.pending = arrivals;
  barrier.completed = std::make_shared<const Vector>(agents_, 0);
}

void Machine::mbarrier_arrive(uint32_t shared, int rank, int64_t expected_bytes) {
  const size_t offset = shared_offset(shared, 8, 8, "mbarrier");
  Mbarrier& barrier = mbarrier_at(peer(rank), offset);
  release_into(barrier.released);
  barrier.bytes += expected_bytes;
  if (--barrier.pending < 0) fail("arrives at an mbarrier more often than it expects");
  complete_if_due(barrier);
}

void Machine::complete_if_due(Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.expected;
  ++barrier.phase;
  barrier.completed = barrier.released.take(agents_);
  for (Thread* thread : barrier.waiting) wake(*thread);
  barrier.waiting.clear();
}

void Machine::mbarrier_wait(uint32_t shared, uint32_t parity) {
  const size_t offset = shared_offset(shared, 8, 8, "mbarrier");
  Mbarrier& barrier = mbarrier_at(block(), offset);
  while ((barrier.phase & 1) == parity) {
    barrier.waiting.push_back(running_);
    sleep("an mbarrier");
  }
  acquire(barrier.completed);
}

void Machine::copy_bulk(uint32_t shared, uint32_t mbarrier, int rank, size_t bytes,
                        std::function<void(unsigned char*)> fill) {
  require_arch(90, "a bulk copy");
  const size_t offset = shared_offset(shared, bytes, 16, "bulk copy");
  const size_t barrier = shared_offset(mbarrier, 8, 8, "mbarrier");
  Block& target = peer(rank);
  mbarrier_at(target, barrier);
  const std::string problem = target.shared.take_off(offset, bytes, running_->observer);
  if (!problem.empty()) fail("bulk copy: " + problem);
  bulk_copies_.push_back({rank, offset, barrier, bytes, std::move(fill)});
}

// One bulk copy that somebody waits for arrives; false if there is none.
bool Machine::land_a_copy() {
  std::vector<size_t> awaited;
  for (size_t i = 0; i < bulk_copies_.size(); ++i) {
    const BulkCopy& copy = bulk_copies_[i];
    if (!blocks_[copy.rank]->mbarriers.at(copy.mbarrier).waiting.empty()) awaited.push_back(i);
  }
  if (awaited.empty()) return false;
  const size_t chosen = awaited[random_() % awaited.size()];
  const BulkCopy copy = std::move(bulk_copies_[chosen]);
  bulk_copies_.erase(bulk_copies_.begin() + chosen);
  Block& target = *blocks_[copy.rank];
  Mbarrier& barrier = target.mbarriers.at(copy.mbarrier);
  std::vector<unsigned char> data(copy.bytes);
  copy.fill(data.data());
  target.shared.land(copy.offset, data.data(), copy.bytes, copy.bytes,
                     make_stamp(barrier.agent, ++barrier.clock));
  barrier.released.add_clock(barrier.agent, barrier.clock);
  barrier.bytes -= copy.bytes;
  complete_if_due(barrier);
  return true;
}

}  // namespace jax_gptq::emulator
