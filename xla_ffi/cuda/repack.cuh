// Kernel D: the checkpoint's bit stream to the tile layout and back, exactly. Run once, at load:
// one thread per 32-bit word of the result.
#pragma once

#include "layout.h"
#include "primitives.h"
#include "repack.h"

namespace jax_gptq::cuda {

// Code of row k and column n of the bit stream.
__device__ __forceinline__ uint32_t stream_code(const uint32_t* qweight, int bits, int k, int n,
                                                int columns) {
  const int64_t bit = static_cast<int64_t>(k) * bits;
  const uint32_t* word = qweight + bit / 32 * columns + n;
  const int shift = bit % 32;
  uint32_t code = ld_global_nc<uint32_t>(word) >> shift;
  if (shift + bits > 32) code |= ld_global_nc<uint32_t>(word + columns) << (32 - shift);
  return code & ((1u << bits) - 1);
}

template <int kHeld>
__device__ __forceinline__ void pack_block(const RepackProblem& p, const uint32_t* qweight,
                                           uint32_t* codes) {
  constexpr int kCodes = 32 / kHeld;  // per word
  const int steps = steps_k(p.k);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kRepackThreads + threadIdx.x;
  if (index >= pack_words(p)) return;
  // The inverse of code_position.
  const int word = index % 4;
  const int lane = index / 4 % 32;
  const int fragment = index / 128 % 4;
  const int64_t tile = index / 512;
  const int step = kHeld == 4 ? tile % steps : tile / 2 % steps;
  const int n0 = tile / (steps * (kHeld / 4)) * kTileN + fragment * kFragmentN + lane / 4;
  const int part = kHeld == 4 ? word : tile % 2 * 2 + word / 2;
  const int k0 = step * kStepK + part * kFragmentK + lane % 4 * 2;
  uint32_t value = 0;
#pragma unroll
  for (int i = 0; i < kCodes; ++i) {
    // Nibble i: register i % 4, half i / 4. Byte i: register 2 (word % 2) + i % 2, half i / 2.
    const int reg = kHeld == 4 ? i % 4 : word % 2 * 2 + i % 2;
    const int high = kHeld == 4 ? i / 4 : i / 2;
    const int n = n0 + reg % 2 * 8;
    const int k = k0 + reg / 2 * 8 + high;
    uint32_t code = 0;
    if (n < p.n && k < p.k) {
      const int row = p.perm != nullptr ? ld_global_nc<int32_t>(p.perm + k) : k;
      code = stream_code(qweight, p.bits, row, n, p.n);
    } else if (n < p.n) {
      code = ld_global_nc<uint8_t>(p.zeros + parameter_index(p.groups, p.groups - 1, n));
    }
    value |= code << (kHeld * i);
  }
  st_global(codes + index, value);
}

template <int kHeld>
__device__ __forceinline__ void unpack_block(const RepackProblem& p, const uint8_t* codes,
                                             uint32_t* qweight) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kRepackThreads + threadIdx.x;
  if (index >= unpack_words(p)) return;
  const int n = index % p.n;
  const int64_t bit = index / p.n * 32;
  uint32_t value = 0;
  for (int k = bit / p.bits; k < p.k && static_cast<int64_t>(k) * p.bits < bit + 32; ++k) {
    const int row = p.perm != nullptr ? ld_global_nc<int32_t>(p.perm + k) : k;
    const CodePosition at = code_position(kHeld, steps_k(p.k), n, row);
    const uint32_t code = ld_global_nc<uint8_t>(codes + at.byte) >> at.shift & ((1u << p.bits) - 1);
    const int shift = static_cast<int>(static_cast<int64_t>(k) * p.bits - bit);
    value |= shift >= 0 ? code << shift : code >> -shift;
  }
  st_global(qweight + index, value);
}

}  // namespace jax_gptq::cuda
