#include "memory.h"

#include <algorithm>
#include <cstring>

namespace jax_gptq::emulator {
namespace {

constexpr size_t kAlignment = 1024;  // of shared memory

constexpr char kInFlight[] = " while an asynchronous copy into it is in flight";
constexpr char kNoBarrier[] = ": a barrier is missing";

std::string by(Stamp stamp) { return " by " + agent_name(stamp_agent(stamp)); }

}  // namespace

// ---- Shared memory ---------------------------------------------------------------------------

void SharedMemory::reset(size_t bytes) {
  memory_.resize(bytes + kAlignment);
  offset_ = -reinterpret_cast<uintptr_t>(memory_.data()) % kAlignment;
  std::memset(data(), kPoison, bytes);
  grains_.assign((bytes + kGrain - 1) / kGrain, Grain{0, {0, 0, 0}, -1, false});
  more_reads_.clear();
}

// The first read of the grain that is not ordered before `vector`; 0 if there is none.
Stamp SharedMemory::unordered_read(const Grain& grain, const Observer& self) const {
  for (Stamp read : grain.reads) {
    if (read != 0 && !self.knows_over(read)) return read;
  }
  if (grain.more_reads >= 0) {
    for (Stamp read : more_reads_[grain.more_reads]) {
      if (!self.knows_over(read)) return read;
    }
  }
  return 0;
}

void SharedMemory::note_read(Grain& grain, const Observer& self) {
  // A read that this thread has already seen the end of adds nothing: whoever is ordered after
  // this read is ordered after that one.
  for (Stamp& read : grain.reads) {
    if (read == 0 || self.knows_over(read)) {
      read = self.stamp();
      return;
    }
  }
  if (grain.more_reads < 0) {
    grain.more_reads = more_reads_.size();
    more_reads_.emplace_back();
  }
  std::vector<Stamp>& more = more_reads_[grain.more_reads];
  for (Stamp& read : more) {
    if (self.knows_over(read)) {
      read = self.stamp();
      return;
    }
  }
  more.push_back(self.stamp());
}

std::string SharedMemory::read(size_t offset, size_t bytes, const Observer& self) {
  for (size_t i = offset / kGrain; i <= (offset + bytes - 1) / kGrain; ++i) {
    Grain& grain = grains_[i];
    if (grain.in_flight || grain.write == 0 || !self.sees(grain.write)) {
      const std::string where = "read of shared byte " + std::to_string(i * kGrain);
      if (grain.in_flight) return where + kInFlight;
      if (grain.write == 0) return where + ", which nobody has written";
      return where + " is not ordered after a write" + by(grain.write) + kNoBarrier;
    }
    note_read(grain, self);
  }
  return "";
}

std::string SharedMemory::read_async(size_t offset, size_t bytes, const Observer& self,
                                     const Vector& fenced) {
  for (size_t i = offset / kGrain; i <= (offset + bytes - 1) / kGrain; ++i) {
    Grain& grain = grains_[i];
    const bool seen = grain.write != 0 && self.sees(grain.write);
    const bool is_fenced = stamp_clock(grain.write) <= fenced[stamp_agent(grain.write)];
    if (grain.in_flight || !seen || !is_fenced) {
      const std::string where = "asynchronous read of shared byte " + std::to_string(i * kGrain);
      if (grain.in_flight) return where + kInFlight;
      if (grain.write == 0) return where + ", which nobody has written";
      if (seen) return where + " written" + by(grain.write) + " without fence_async_proxy";
      return where + " is not ordered after a write" + by(grain.write) + kNoBarrier;
    }
    note_read(grain, self);
  }
  return "";
}

std::string SharedMemory::write(size_t offset, size_t bytes, const Observer& self) {
  for (size_t i = offset / kGrain; i <= (offset + bytes - 1) / kGrain; ++i) {
    Grain& grain = grains_[i];
    const Stamp read = unordered_read(grain, self);
    if (grain.in_flight || !self.knows_over(grain.write) || read != 0) {
      const std::string where = "write of shared byte " + std::to_string(i * kGrain);
      if (grain.in_flight) return where + kInFlight;
      if (read != 0) return where + " is not ordered after a read" + by(read) + kNoBarrier;
      return where + " is not ordered after a write" + by(grain.write) + kNoBarrier;
    }
    grain = {self.stamp(), {0, 0, 0}, -1, false};
  }
  return "";
}

std::string SharedMemory::take_off(size_t offset, size_t bytes, const Observer& self) {
  const std::string problem = write(offset, bytes, self);
  if (!problem.empty()) return problem;
  for (size_t i = offset / kGrain; i <= (offset + bytes - 1) / kGrain; ++i) {
    grains_[i].in_flight = true;
  }
  std::memset(data() + offset, kPoison, bytes);
  return "";
}

void SharedMemory::land(size_t offset, const void* source, size_t copied, size_t bytes,
                        Stamp stamp) {
  if (copied > 0) std::memcpy(data() + offset, source, copied);
  std::memset(data() + offset + copied, 0, bytes - copied);
  for (size_t i = offset / kGrain; i <= (offset + bytes - 1) / kGrain; ++i) {
    grains_[i].write = stamp;
    grains_[i].in_flight = false;
  }
}

// ---- Global memory ---------------------------------------------------------------------------

GlobalMemory::GlobalMemory(std::vector<Buffer> buffers)
    : buffers_(std::move(buffers)), pages_(buffers_.size()) {
  for (const Buffer& buffer : buffers_) {
    if (buffer.writable) std::memset(buffer.data, kPoison, buffer.bytes);
  }
}

const Buffer* GlobalMemory::find(const void* pointer, size_t bytes) {
  const auto holds = [&](const Buffer& buffer) {
    const size_t offset = static_cast<const unsigned char*>(pointer) - buffer.data;
    return offset < buffer.bytes && bytes <= buffer.bytes - offset;
  };
  if (last_found_ < buffers_.size() && holds(buffers_[last_found_])) return &buffers_[last_found_];
  for (size_t i = 0; i < buffers_.size(); ++i) {
    if (holds(buffers_[i])) {
      last_found_ = i;
      return &buffers_[i];
    }
  }
  return nullptr;
}

std::string GlobalMemory::describe(const void* pointer) const {
  std::string nearest = "no buffer";
  int64_t best = INT64_MAX;
  for (const Buffer& buffer : buffers_) {
    const int64_t offset = static_cast<const unsigned char*>(pointer) - buffer.data;
    const int64_t size = buffer.bytes;
    const int64_t distance = offset < 0 ? -offset : std::max<int64_t>(0, offset - size + 1);
    if (distance < best) {
      best = distance;
      nearest = "byte " + std::to_string(offset) + " of " + buffer.name + " (" +
                std::to_string(size) + " bytes)";
    }
  }
  return nearest;
}

GlobalMemory::Write& GlobalMemory::history(const Buffer& buffer, size_t offset) {
  auto& page = pages_[&buffer - buffers_.data()][offset / kPage];
  if (!page) page = std::make_unique<Page>();
  return (*page)[offset % kPage];
}

std::string GlobalMemory::read(const Buffer& buffer, const void* pointer, size_t bytes,
                               uint32_t cluster, const Observer& self) {
  if (!buffer.writable) return "";
  const size_t offset = static_cast<const unsigned char*>(pointer) - buffer.data;
  for (size_t i = offset; i < offset + bytes; ++i) {
    const Write& last = history(buffer, i);
    const std::string where = "read of byte " + std::to_string(i) + " of " + buffer.name;
    if (last.launch == 0) return where + ", which nobody has written";
    if (last.launch != launch_) continue;
    if (last.cluster != cluster) {
      if (self.sees(last.cluster, last.stamp)) continue;
      return where + ", written by another block of the same launch";
    }
    if (!self.sees(last.stamp)) {
      return where + " is not ordered after a write" + by(last.stamp) + kNoBarrier;
    }
  }
  return "";
}

std::string GlobalMemory::write(const Buffer& buffer, const void* pointer, size_t bytes,
                                uint32_t cluster, const Observer& self) {
  const size_t offset = static_cast<const unsigned char*>(pointer) - buffer.data;
  for (size_t i = offset; i < offset + bytes; ++i) {
    Write& last = history(buffer, i);
    if (last.launch == launch_) {
      const std::string where = "write of byte " + std::to_string(i) + " of " + buffer.name;
      if (last.cluster != cluster) {
        if (!self.sees(last.cluster, last.stamp)) {
          return where + ", written by another block of the same launch";
        }
      } else if (!self.sees(last.stamp)) {
        return where + " is not ordered after a write" + by(last.stamp);
      }
    }
    last = {launch_, cluster, self.stamp()};
  }
  return "";
}

std::string GlobalMemory::unwritten(const std::string& name) const {
  for (size_t b = 0; b < buffers_.size(); ++b) {
    if (buffers_[b].name != name) continue;
    for (size_t i = 0; i < buffers_[b].bytes; ++i) {
      const auto page = pages_[b].find(i / kPage);
      if (page == pages_[b].end() || (*page->second)[i % kPage].launch == 0) {
        return "byte " + std::to_string(i) + " of " + name;
      }
    }
  }
  return "";
}

}  // namespace jax_gptq::emulator
