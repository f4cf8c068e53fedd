// Kernel C, first half: the weight written out as [n, k] in the type of the activations, each value
// rounded once; XLA multiplies. Limited by writing 2 bytes per value.
//
// A block takes one tile of 64 output features and kDequantizeSteps steps of 64 along K; a warp
// takes a fragment of 16 output features at every second step. Fragments pass through shared
// memory, private to the warp, so that whole rows of 128 bytes are written.
#pragma once

#include "fragment.cuh"
#include "plan.h"

namespace jax_gptq::cuda {

constexpr int kDequantizeWarps = 8;
constexpr int kDequantizeThreads = 32 * kDequantizeWarps;
constexpr int kDequantizeSteps = 2;
// Bytes between rows in shared memory: 16 modulo 128, against bank conflicts.
constexpr int kDequantizePitch = kStepK * 2 + 16;
constexpr int kDequantizeShared = kDequantizeWarps * kFragmentN * kDequantizePitch;

inline int dequantize_blocks(const Problem& p) {
  return tiles_n(p.n) * ceil_div(steps_k(p.k), kDequantizeSteps);
}

template <class T, int kBits>
__device__ __forceinline__ void dequantize_block(const Problem& p, uint16_t* weight) {
  constexpr int kStepsPerWarp = kDequantizeSteps / 2;
  constexpr int kLoads = kBits / 4;  // 16-byte loads of a lane per step
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int fragment = warp % 4;
  const int steps = steps_k(p.k);
  const int blocks_along_k = ceil_div(steps, kDequantizeSteps);
  const int tile = blockIdx.x / blocks_along_k;
  const int first_step = blockIdx.x % blocks_along_k * kDequantizeSteps + warp / 4;
  const uint32_t rows = shared_base() + warp * kFragmentN * kDequantizePitch;

  const int n0 = tile * kTileN + fragment * kFragmentN;
  const auto group_of = [&](int k) { return min(k / p.group_size, p.groups - 1); };
  float scale[kStepsPerWarp][2];
  uint32_t zero[kStepsPerWarp][2];
  const auto load_group = [&](int i, int group) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t at = parameter_index(p.groups, group, n0 + lane / 4 + 8 * r);
      scale[i][r] = load_scale_global(p.scales, at, p.scale_type);
      zero[i][r] = ld_global_nc<uint8_t>(static_cast<const uint8_t*>(p.zeros) + at);
    }
  };

  // Everything is asked for before anything is waited for.
  uint32_t words[kStepsPerWarp][4 * kLoads];
#pragma unroll
  for (int i = 0; i < kStepsPerWarp; ++i) {
    const int step = min(first_step + 2 * i, steps - 1);
#pragma unroll
    for (int half = 0; half < kLoads; ++half) {
      const uint4 v =
          ld_global_nc<uint4>(static_cast<const char*>(p.codes) +
                              lane_offset(kBits, steps, tile, step, half, fragment, lane));
      words[i][4 * half] = v.x;
      words[i][4 * half + 1] = v.y;
      words[i][4 * half + 2] = v.z;
      words[i][4 * half + 3] = v.w;
    }
    load_group(i, group_of(step * kStepK));
  }

#pragma unroll
  for (int i = 0; i < kStepsPerWarp; ++i) {
    const int step = first_step + 2 * i;
    if (step >= steps) break;
    int group = group_of(step * kStepK);
#pragma unroll
    for (int j = 0; j < kStepK / kFragmentK; ++j) {
      if (fine_groups(p)) {
        const int next = group_of(step * kStepK + j * kFragmentK);
        if (next != group) load_group(i, group = next);
      }
      const uint32_t zeros[2] = {prepare_zero<T, kBits>(zero[i][0]),
                                 prepare_zero<T, kBits>(zero[i][1])};
      uint32_t a[4];
      exact_fragment<T, kBits>(a, &words[i][j * kBits / 4], zeros);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float2 exact = unpack2<T>(a[r]);
        const int row = lane / 4 + r % 2 * 8;
        st_shared(rows + row * kDequantizePitch + j * 32 + r / 2 * 16 + lane % 4 * 4,
                  pack2<T>(exact.x * scale[i][r % 2], exact.y * scale[i][r % 2]));
      }
    }
    warp_sync();
    const int k = step * kStepK + lane % 8 * 8;
#pragma unroll
    for (int pass = 0; pass < 4; ++pass) {
      const int row = pass * 4 + lane / 8;
      const uint32_t from = rows + row * kDequantizePitch + lane % 8 * 16;
      if (n0 + row >= p.n) continue;
      uint16_t* to = weight + static_cast<int64_t>(n0 + row) * p.k + k;
      if (p.k % 8 == 0) {
        if (k < p.k) st_global(to, ld_shared<uint4>(from));
      } else {
        for (int e = 0; e < 8 && k + e < p.k; ++e) {
          st_global(to + e, ld_shared<uint16_t>(from + 2 * e));
        }
      }
    }
    warp_sync();
  }
}

}  // namespace jax_gptq::cuda
