// Host side of the repacking kernels (repack.cuh).
#pragma once

#include <cstdint>

#include "layout.h"

namespace jax_gptq::cuda {

struct RepackProblem {
  int n, k;
  int bits;  // of the bit stream: 2, 3, 4 or 8 (5, 6, 7 too)
  int groups;
  // int32 [k] or null. Packing: row i of the tiles is row perm[i] of the stream. Unpacking, the
  // inverse permutation: row i of the stream is row perm[i] of the tiles.
  const int32_t* perm;
  const uint8_t* zeros;  // [tiles_n(n)][groups][64], for the padding of k; packing only
};

constexpr int kRepackThreads = 256;

// 32-bit words of the tile layout and of the bit stream.
constexpr int64_t pack_words(const RepackProblem& p) {
  return int64_t{tiles_n(p.n)} * steps_k(p.k) * step_bytes(held_bits(p.bits)) / 4;
}
constexpr int64_t unpack_words(const RepackProblem& p) {
  return (int64_t{p.k} * p.bits + 31) / 32 * p.n;
}

}  // namespace jax_gptq::cuda
