// The second pass of a product whose K was split without clusters: y = sum of the f32 partial sums,
// in the order of the splits, plus bias.
#pragma once

#include "output.cuh"

namespace jax_gptq::cuda {

constexpr int kReduceThreads = 256;

inline int reduce_blocks(const Problem& p) { return ceil_div(p.n, kReduceThreads) * p.m; }

template <class T>
__device__ __forceinline__ void reduce_block(const Problem& p, int splits, const float* partial) {
  const int blocks_per_row = ceil_div(p.n, kReduceThreads);
  const int m = blockIdx.x / blocks_per_row;
  const int n = blockIdx.x % blocks_per_row * kReduceThreads + threadIdx.x;
  if (n >= p.n) return;
  const int padded_n = tiles_n(p.n) * kTileN;
  const float* from = partial + static_cast<int64_t>(m) * padded_n + n;
  const int64_t stride = static_cast<int64_t>(p.m) * padded_n;
  float sum = ld_global<float>(from);
  for (int split = 1; split < splits; ++split) sum += ld_global<float>(from + split * stride);
  write_output<T>(p, m, n, sum);
}

}  // namespace jax_gptq::cuda
