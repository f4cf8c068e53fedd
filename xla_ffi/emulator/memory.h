// Memory as the emulator sees it: who wrote each byte when, and who may see it.
//
// Order between threads is kept by vector clocks (Mattern 1989; per-word epochs as in FastTrack,
// Flanagan and Freund 2009). Every thread of a cluster is an agent with a clock; so is the copy
// engine behind each mbarrier. An access is stamped with its agent and that agent's clock, and an
// earlier access is ordered before a thread's next one if the thread's vector has reached its
// stamp.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace jax_gptq::emulator {

// Agent in the upper 13 bits, its clock in the lower 19; clocks start at 1, so 0 is "never".
using Stamp = uint32_t;
constexpr int kClockBits = 19;
constexpr uint32_t kMaxClock = (1u << kClockBits) - 1;
constexpr uint32_t kMaxAgents = 1u << (32 - kClockBits);

inline Stamp make_stamp(uint32_t agent, uint32_t clock) { return agent << kClockBits | clock; }
inline uint32_t stamp_agent(Stamp stamp) { return stamp >> kClockBits; }
inline uint32_t stamp_clock(Stamp stamp) { return stamp & kMaxClock; }

using Vector = std::vector<uint32_t>;  // a clock of every agent
using Clocks = std::shared_ptr<const Vector>;

// What an agent knows of other clusters of its launch, by flags in global memory: which of their
// accesses are visible to it.
using Foreign = std::shared_ptr<const std::map<uint32_t, Clocks>>;

// What an agent knows of the others: which of their accesses are visible to it, and which are at
// least over. A relaxed barrier tells only the latter: memory may then be written again, but not
// read. Threads that leave a barrier together know the same and share it.
struct View {
  Clocks visible, over;
  Foreign foreign = nullptr;

  bool operator==(const View& other) const {
    return visible == other.visible && over == other.over && foreign == other.foreign;
  }
  bool operator!=(const View& other) const { return !(*this == other); }
};

// Where a thread stands.
struct Observer {
  uint32_t agent;
  uint32_t clock = 1;
  View view;

  Stamp stamp() const { return make_stamp(agent, clock); }
  bool sees(Stamp stamp) const { return after(stamp, *view.visible); }
  bool sees(uint32_t cluster, Stamp stamp) const {
    if (!view.foreign) return false;
    const auto known = view.foreign->find(cluster);
    return known != view.foreign->end() &&
           stamp_clock(stamp) <= (*known->second)[stamp_agent(stamp)];
  }
  bool knows_over(Stamp stamp) const { return after(stamp, *view.over); }

 private:
  bool after(Stamp stamp, const Vector& clocks) const {
    return stamp_agent(stamp) == agent || stamp_clock(stamp) <= clocks[stamp_agent(stamp)];
  }
};

// "thread 5 of block 2", for messages; machine.cc knows who is who.
std::string agent_name(uint32_t agent);

// The byte pattern of memory that nobody has written: a NaN in every float type, 15 and 255 as
// codes, -1 as an index.
constexpr unsigned char kPoison = 0xff;

// Shared memory of one block, with the history of each pair of bytes.
class SharedMemory {
 public:
  static constexpr size_t kGrain = 2;

  // Starts a block: `bytes` of poison.
  void reset(size_t bytes);

  unsigned char* data() { return memory_.data() + offset_; }

  // What is wrong with `self` reading or writing `bytes` at `offset`; empty if nothing. An access
  // that is right is recorded.
  std::string read(size_t offset, size_t bytes, const Observer& self);
  std::string write(size_t offset, size_t bytes, const Observer& self);

  // As read, by the copy engine or the tensor cores: what a thread wrote they see only if the
  // thread has fenced since (`fenced`: per agent, its clock at its latest fence).
  std::string read_async(size_t offset, size_t bytes, const Observer& self, const Vector& fenced);

  // An asynchronous copy into these bytes was issued: poison until land().
  std::string take_off(size_t offset, size_t bytes, const Observer& self);
  // Whether the word at `offset` was written before, by a thread that has fenced and met `self`.
  bool initialised(size_t offset, const Observer& self) const {
    return grains_[offset / kGrain].write != 0 && self.knows_over(grains_[offset / kGrain].write);
  }

  // The copy has arrived; from now on these bytes were written at `stamp`. Null: zeros.
  void land(size_t offset, const void* source, size_t copied, size_t bytes, Stamp stamp);

 private:
  static constexpr int kInlineReads = 3;
  struct Grain {
    Stamp write;
    Stamp reads[kInlineReads];  // of different agents, none ordered before the last write
    int32_t more_reads;         // index into more_reads_, or -1
    bool in_flight;
  };

  Stamp unordered_read(const Grain& grain, const Observer& self) const;
  void note_read(Grain& grain, const Observer& self);

  std::vector<unsigned char> memory_;
  size_t offset_ = 0;  // of the aligned start
  std::vector<Grain> grains_;
  std::vector<std::vector<Stamp>> more_reads_;
};

// An array in global memory that a kernel may touch.
struct Buffer {
  std::string name;
  unsigned char* data;
  size_t bytes;
  bool writable;
};

// Every array that the kernels of one call may touch, and who wrote the writable ones.
class GlobalMemory {
 public:
  // Poisons the writable buffers.
  explicit GlobalMemory(std::vector<Buffer> buffers);

  // A new launch: what earlier ones wrote is visible to all.
  void start_launch() { ++launch_; }

  // The buffer that holds all of these bytes, or null.
  const Buffer* find(const void* pointer, size_t bytes);
  // Where the nearest buffer is, for an error message.
  std::string describe(const void* pointer) const;

  // As for shared memory; `cluster` is the index of the running cluster in the grid. Reads are
  // not recorded: a kernel that overwrites what another thread still reads is not caught here.
  std::string read(const Buffer& buffer, const void* pointer, size_t bytes, uint32_t cluster,
                   const Observer& self);
  std::string write(const Buffer& buffer, const void* pointer, size_t bytes, uint32_t cluster,
                    const Observer& self);

  // "byte 12 of y", the first that no launch has written; empty if there is none.
  std::string unwritten(const std::string& name) const;

 private:
  struct Write {
    uint32_t launch = 0;  // 0: never written
    uint32_t cluster = 0;
    Stamp stamp = 0;
  };
  static constexpr size_t kPage = 4096;
  using Page = std::array<Write, kPage>;

  Write& history(const Buffer& buffer, size_t offset);

  std::vector<Buffer> buffers_;
  std::vector<std::unordered_map<size_t, std::unique_ptr<Page>>> pages_;
  size_t last_found_ = 0;
  uint32_t launch_ = 0;
};

}  // namespace jax_gptq::emulator
