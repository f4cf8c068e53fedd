// Reading memory once, in order, as fast as it delivers.
#pragma once

namespace jax_gptq::cpu {

// The memory delivers a stream faster when asked well ahead: into the second-level cache at a
// distance that covers its latency, and from there into the first.
constexpr int kFarBytes = 12288;
constexpr int kNearBytes = 4096;

// To be called for each cache line of the stream.
static inline void Prefetch(const void* line) {
  const char* bytes = static_cast<const char*>(line);
  __builtin_prefetch(bytes + kFarBytes, 0, 2);
  __builtin_prefetch(bytes + kNearBytes, 0, 3);
}

}  // namespace jax_gptq::cpu
