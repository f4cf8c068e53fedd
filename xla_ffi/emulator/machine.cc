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
  if (!launch.in_order) std::shuffle(order.begin(), order.end(), random_);
  flags_.clear();
  for (int cluster : order) run_cluster(cluster);
  for (const auto& [flag, view] : flags_) {
    if (*flag == kRaised) fail("leaves a flag raised at " + memory_.describe(flag));
  }
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
  const Clocks never = std::make_shared<const Vector>(agents_, 0);
  nothing_ = {never, never};
  threads_.assign(count, {});
  warps_.assign(count / kWarp, {});
  for (int i = 0; i < count; ++i) {
    Thread& thread = threads_[i];
    thread.fiber = fibers_[i].get();
    thread.index = i % launch_.threads;
    thread.block = i / launch_.threads;
    thread.observer.agent = i;
    thread.observer.view = nothing_;
    thread.fiber->start(&Machine::thread_main);
  }
  for (Warp& warp : warps_) warp.ready = kAllLanes;
  bulk_copies_.clear();
  // What the copy engines write needs no fence.
  fenced_.assign(agents_, kMaxClock);
  std::fill_n(fenced_.begin(), count, 0);
  cluster_arrivals_ = 0;
  cluster_phase_ = 0;
  cluster_released_ = {};
  cluster_completed_ = nothing_;
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
    if (!thread.open_stores.empty() || !thread.stores.empty()) {
      machine->fail("ends with stores in flight from its block's shared memory");
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

namespace {

void join(Vector& all, const Vector& other) {
  for (size_t i = 0; i < all.size(); ++i) all[i] = std::max(all[i], other[i]);
}

Foreign join(const Foreign& left, const Foreign& right) {
  if (!right || left == right) return left;
  if (!left) return right;
  auto both = std::make_shared<std::map<uint32_t, Clocks>>(*left);
  for (const auto& [cluster, clocks] : *right) {
    auto& known = (*both)[cluster];
    if (!known || known == clocks) {
      known = clocks;
    } else {
      auto joined = std::make_shared<Vector>(*known);
      join(*joined, *clocks);
      known = joined;
    }
  }
  return both;
}

View join(const View& left, const View& right) {
  const Foreign foreign = join(left.foreign, right.foreign);
  auto visible = std::make_shared<Vector>(*left.visible);
  join(*visible, *right.visible);
  if (left.visible == left.over && right.visible == right.over) return {visible, visible, foreign};
  auto over = std::make_shared<Vector>(*left.over);
  join(*over, *right.over);
  return {visible, over, foreign};
}

}  // namespace

void Released::add(const Observer& thread, bool relaxed) {
  const auto same = [&](const Known& known) {
    return known.view == thread.view && known.relaxed == relaxed;
  };
  if (std::none_of(known_.begin(), known_.end(), same)) known_.push_back({thread.view, relaxed});
  clocks_.push_back({thread.agent, thread.clock, relaxed});
}

View Released::take(uint32_t agents) {
  auto visible = std::make_shared<Vector>(agents, 0);
  auto over = visible;
  const auto differs = [](const Known& known) {
    return known.relaxed || known.view.visible != known.view.over;
  };
  if (std::any_of(known_.begin(), known_.end(), differs)) {
    over = std::make_shared<Vector>(agents, 0);
  }
  Foreign foreign;
  for (const Known& known : known_) {
    if (!known.relaxed) {
      join(*visible, *known.view.visible);
      foreign = join(foreign, known.view.foreign);
    }
    if (over != visible) join(*over, *known.view.over);
  }
  for (const Clock& clock : clocks_) {
    uint32_t& read = (*over)[clock.agent];
    read = std::max(read, clock.clock);
    uint32_t& write = (*visible)[clock.agent];
    if (!clock.relaxed) write = std::max(write, clock.clock);
  }
  known_.clear();
  clocks_.clear();
  return {visible, over, foreign};
}

const View& Union::of(const View& left, const View& right) {
  if (left_ != left || right_ != right) {
    both_ = join(left, right);
    left_ = left;
    right_ = right;
  }
  return both_;
}

void Machine::tick(Thread& thread) {
  if (++thread.observer.clock >= kMaxClock) fail("more barriers than the emulator can count");
}

// The running thread publishes what it knows and has done.
void Machine::release_into(Released& released, bool relaxed) {
  released.add(running_->observer, relaxed);
  tick(*running_);
}

// The running thread sees what others have published.
void Machine::acquire(const View& view) {
  View& own = running_->observer.view;
  if (own != view) own = union_.of(own, view);
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

void Machine::raise_flag(uint64_t* flag) {
  *static_cast<uint64_t*>(global_write(flag, sizeof(*flag), sizeof(*flag))) = kRaised;
  Released released;
  release_into(released);
  const View view = released.take(agents_);
  auto foreign = std::make_shared<std::map<uint32_t, Clocks>>();
  if (view.foreign) *foreign = *view.foreign;
  (*foreign)[cluster_index_] = view.visible;
  flags_[flag] = {nothing_.visible, nothing_.over, foreign};
}

// Clusters run one after another, so that a flag is raised by now or never.
bool Machine::flag_raised(const uint64_t* flag) {
  const auto raised = flags_.find(flag);
  if (raised != flags_.end()) {
    acquire(raised->second);
    if (*static_cast<const uint64_t*>(global_read(flag, sizeof(*flag), sizeof(*flag))) == kRaised) {
      return true;
    }
  }
  fail("waits for a flag at " + memory_.describe(flag) + " that no block before it has raised");
}

// ---- Barriers --------------------------------------------------------------------------------

void Machine::barrier(int id, int threads) {
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
  barrier.waiting.push_back(running_);
  if (++barrier.arrived < barrier.expected) {
    sleep(id == 0 ? "the block's barrier" : "a named barrier");
    return;
  }
  barrier.arrived = 0;
  const View all = barrier.released.take(agents_);
  for (Thread* thread : barrier.waiting) {
    thread->observer.view = all;  // it was among those who released
    wake(*thread);
  }
  barrier.waiting.clear();
}

void Machine::warp_barrier() {
  collective<Thread>("warp barrier", *running_, [](const std::array<Thread*, kWarp>& lanes) {
    Released released;
    for (const Thread* lane : lanes) released.add(lane->observer);
    const View all = released.take(machine->agents_);
    for (Thread* lane : lanes) {
      lane->observer.view = all;
      machine->tick(*lane);
    }
  });
}

void Machine::cluster_arrive(bool relaxed) {
  require_arch(90, "a cluster barrier");
  if (running_->arrived_at_cluster) fail("arrives twice at the cluster's barrier");
  running_->arrived_at_cluster = true;
  running_->cluster_phase = cluster_phase_;
  release_into(cluster_released_, relaxed);
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
  // The init fence publishes the initialisation through any barrier, a relaxed one too.
  const Observer& self = running_->observer;
  const bool visible = found->second.fenced ? block.shared.initialised(offset, self)
                                            : block.shared.read(offset, 8, self).empty();
  if (!visible) fail("the mbarrier's initialisation is not ordered before its use");
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
  const Clocks never = std::make_shared<const Vector>(agents_, 0);
  barrier.completed = {never, never};
}

void Machine::mbarrier_arrive(uint32_t shared, int rank, int64_t expected_bytes) {
  const size_t offset = shared_offset(shared, 8, 8, "mbarrier");
  Mbarrier& barrier = mbarrier_at(peer(rank), offset);
  release_into(barrier.released);
  barrier.bytes += expected_bytes;
  if (--barrier.pending < 0) fail("arrives at an mbarrier more often than it expects");
  complete_if_due(barrier);
}

void Machine::mbarrier_arrive_mapped(uint32_t mapped) {
  mbarrier_arrive(mapped & ((1u << kRankShift) - 1), static_cast<int>(mapped >> kRankShift) - 1, 0);
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

void Machine::mbarrier_init_fence() {
  for (auto& [offset, barrier] : block().mbarriers) barrier.fenced = true;
}

void Machine::copy_bulk(int rank, size_t offset, size_t mbarrier, size_t bytes,
                        std::function<void(unsigned char*)> fill) {
  require_arch(90, "a bulk copy");
  Block& target = peer(rank);
  if (!mbarrier_at(target, mbarrier).fenced) fail("a copy to an mbarrier without an init fence");
  const std::string problem = target.shared.take_off(offset, bytes, running_->observer);
  if (!problem.empty()) fail("bulk copy: " + problem);
  bulk_copies_.push_back({rank, offset, mbarrier, bytes, std::move(fill)});
}

namespace {

// The rows of a box: for each, its place in the box and, where it lies in the tensor, its first
// byte and the bytes that are inside.
struct BoxRow {
  size_t at;
  unsigned char* data;  // null: outside
  size_t inside;
};

std::vector<BoxRow> box_rows(const cuda::MapDescription& map, std::array<int, 3> at) {
  const int depth = map.rank == 3 ? map.box[2] : 1;
  const size_t row_bytes = static_cast<size_t>(map.box[0]) * map.element_bytes;
  std::vector<BoxRow> rows;
  for (int z = 0; z < depth; ++z) {
    for (int y = 0; y < map.box[1]; ++y) {
      BoxRow row{rows.size() * row_bytes, nullptr, 0};
      const int64_t row_y = at[1] + y, row_z = at[2] + z;
      const int64_t left = map.sizes[0] - at[0];
      if (row_y < map.sizes[1] && (map.rank < 3 || row_z < map.sizes[2]) && left > 0) {
        const int64_t offset = static_cast<int64_t>(at[0]) * map.element_bytes +
                               row_y * map.strides[0] +
                               (map.rank == 3 ? row_z * map.strides[1] : 0);
        row.data = static_cast<unsigned char*>(const_cast<void*>(map.base)) + offset;
        row.inside = std::min<int64_t>(left, map.box[0]) * map.element_bytes;
      }
      rows.push_back(row);
    }
  }
  return rows;
}

// Where byte `at` of a box lies in shared memory, from its start at `offset`.
size_t box_place(const cuda::MapDescription& map, size_t offset, size_t at) {
  const size_t place = offset + at;
  return map.swizzle ? place ^ ((place >> 7 & 7) << 4) : place;
}

}  // namespace

void Machine::copy_box(uint32_t shared, const cuda::MapDescription& map, uint32_t mbarrier,
                       std::array<int, 3> at, const std::vector<int>& ranks) {
  const std::vector<BoxRow> rows = box_rows(map, at);
  const size_t row_bytes = static_cast<size_t>(map.box[0]) * map.element_bytes;
  const size_t bytes = rows.size() * row_bytes;
  const size_t offset = shared_offset(shared, bytes, map.swizzle ? 1024 : 128, "copy of a box");
  const size_t barrier = shared_offset(mbarrier, 8, 8, "mbarrier");
  if (at[0] < 0 || at[1] < 0 || at[2] < 0) fail("a box that starts before the tensor");
  for (const BoxRow& row : rows) {
    if (row.data != nullptr) global_read(row.data, row.inside, 1);
  }
  const auto fill = [=](unsigned char* to) {
    std::fill_n(to, bytes, 0);
    for (const BoxRow& row : rows) {
      for (size_t i = 0; i < row.inside; ++i) {
        to[box_place(map, offset, row.at + i) - offset] = row.data[i];
      }
    }
  };
  for (int rank : ranks) copy_bulk(rank, offset, barrier, bytes, fill);
}

void Machine::copy_multicast(uint32_t shared, const void* from, size_t bytes, uint32_t mbarrier,
                             const std::vector<int>& ranks) {
  const auto* data = static_cast<const unsigned char*>(global_read(from, bytes, 16));
  const size_t offset = shared_offset(shared, bytes, 16, "bulk copy");
  const size_t barrier = shared_offset(mbarrier, 8, 8, "mbarrier");
  if (bytes == 0 || bytes % 16 != 0) fail("a bulk copy of " + std::to_string(bytes) + " bytes");
  for (int rank : ranks) {
    copy_bulk(rank, offset, barrier, bytes,
              [=](unsigned char* to) { std::copy_n(data, bytes, to); });
  }
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
  ++barrier.clock;
  std::vector<unsigned char> data(copy.bytes);
  copy.fill(data.data());
  target.shared.land(copy.offset, data.data(), copy.bytes, copy.bytes,
                     make_stamp(barrier.agent, barrier.clock));
  barrier.released.add_clock(barrier.agent, barrier.clock);
  barrier.bytes -= copy.bytes;
  complete_if_due(barrier);
  return true;
}

void Machine::fence_async_proxy() {
  fenced_[running_->observer.agent] = running_->observer.clock;
  tick(*running_);
}

void Machine::store_box(const cuda::MapDescription& map, uint32_t shared, int x, int y) {
  require_arch(90, "a bulk store");
  const size_t bytes = static_cast<size_t>(map.box[0]) * map.element_bytes * map.box[1];
  const size_t offset = shared_offset(shared, bytes, map.swizzle ? 1024 : 128, "store of a box");
  const std::string problem = block().shared.read_async(offset, bytes, running_->observer, fenced_);
  if (!problem.empty()) fail("store of a box: " + problem);
  running_->open_stores.push_back({map, offset, x, y});
}

void Machine::store_commit() {
  std::vector<Thread::BoxStore>& open = running_->open_stores;
  running_->stores.insert(running_->stores.end(), open.begin(), open.end());
  open.clear();
}

void Machine::store_wait_read() {
  for (const Thread::BoxStore& store : running_->stores) {
    SharedMemory& shared = block().shared;
    for (const BoxRow& row : box_rows(store.map, {store.x, store.y, 0})) {
      if (row.data == nullptr) continue;
      const size_t row_bytes = static_cast<size_t>(store.map.box[0]) * store.map.element_bytes;
      const std::string problem = shared.read_async(store.shared + row.at / row_bytes * row_bytes,
                                                    row_bytes, running_->observer, fenced_);
      if (!problem.empty()) fail("store of a box: " + problem);
      auto* to = static_cast<unsigned char*>(global_write(row.data, row.inside, 1));
      for (size_t i = 0; i < row.inside; ++i) {
        to[i] = shared.data()[box_place(store.map, store.shared, row.at + i)];
      }
    }
  }
  running_->stores.clear();
}

// ---- Warpgroup products ----------------------------------------------------------------------

bool Machine::elect_one() {
  struct Elected {
    bool chosen = false;
  } mine;
  collective<Elected>("elect", mine,
                      [](const auto& lanes) { lanes[machine->lane()]->chosen = true; });
  return mine.chosen;
}

void Machine::wgmma_fence() {
  require_arch(90, "wgmma");
  collective<Thread>("wgmma.fence", *running_,
                     [](const auto& lanes) { machine->warp_of(*lanes[0]).products.fence(); });
}

void Machine::wgmma(float* d, const uint32_t* a, uint64_t b, int n, bool bf16, bool accumulate) {
  struct Operands {
    float* d;
    const uint32_t* a;
    uint64_t b;
    int n;
    bool bf16, accumulate;
  } mine{d, a, b, n, bf16, accumulate};
  collective<Operands>("wgmma", mine, [](const auto& lanes) {
    AsyncProduct product{lanes[0]->n, lanes[0]->bf16, lanes[0]->accumulate, lanes[0]->b, {}, {}};
    for (int lane = 0; lane < kWarp; ++lane) {
      if (lanes[lane]->b != product.b) machine->fail("lanes disagree on a wgmma descriptor");
      product.a[lane] = lanes[lane]->a;
      product.d[lane] = lanes[lane]->d;
    }
    const std::string problem = machine->warp_of(machine->thread()).products.issue(product);
    if (!problem.empty()) machine->fail(problem);
  });
}

void Machine::wgmma_commit() {
  collective<Thread>("wgmma.commit_group", *running_,
                     [](const auto& lanes) { machine->warp_of(*lanes[0]).products.commit(); });
}

void Machine::wgmma_wait(int pending) {
  struct Operands {
    Thread* thread;
    int pending;
  } mine{running_, pending};
  collective<Operands>("wgmma.wait_group", mine, [](const auto& lanes) {
    // Row r of the right operand is read in the name of lane r % 32.
    const auto read = [&](int row, uint32_t address) {
      const size_t offset = machine->shared_offset(address, 16, 16, "wgmma");
      SharedMemory& shared = machine->block().shared;
      const std::string problem =
          shared.read_async(offset, 16, lanes[row % kWarp]->thread->observer, machine->fenced_);
      if (!problem.empty()) machine->fail("wgmma: " + problem);
      return reinterpret_cast<const uint16_t*>(shared.data() + offset);
    };
    const std::string problem =
        machine->warp_of(machine->thread()).products.wait(lanes[0]->pending, read);
    if (!problem.empty()) machine->fail(problem);
  });
}

}  // namespace jax_gptq::emulator
