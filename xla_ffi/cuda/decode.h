// Host side of the decode kernel (decode.cuh): its shared memory and its arguments.
#pragma once

#include "plan.h"

namespace jax_gptq::cuda {

constexpr int kDecodeWarpsLog2 = 4;
constexpr int kDecodeWarps = 1 << kDecodeWarpsLog2;
constexpr int kDecodeThreads = 32 * kDecodeWarps;

// Bytes, for one group, of the scales and zero points of the 32 output features of a warp.
constexpr int decode_parameter_bytes(const Problem& p) {
  return 32 * (dtype_bytes(p.scale_type) + 1);
}

// Bytes of one stage of one warp: the codes of 32 output features and 64 input features, then the
// scales and zero points of the groups.
constexpr int decode_stage_bytes(const Problem& p) {
  return step_bytes(p.bits) / 2 + groups_per_step(p) * decode_parameter_bytes(p);
}

constexpr int decode_stages(int bits, bool deep) { return !deep ? 2 : bits == 4 ? 4 : 3; }

// Words between rows of the blocks of sums: 4 modulo 32, so that a warp writes without conflicts.
constexpr int sum_pitch(int tiles) { return tiles * kTileN + 4; }

// Bytes between rows of x in shared memory: 16 modulo 128, so that ldmatrix reads without
// conflicts.
constexpr int decode_x_pitch(int x_steps) { return x_steps * kStepK * 2 + 16; }

// Shared memory: the rings, the sums of the block (twice: one is read by the cluster while the next
// is written), the sums of the warps with later parts of K, and x.
struct DecodeShared {
  int sums, later, x, size;

  constexpr DecodeShared(const Problem& p, int tiles, int x_steps, bool deep)
      : sums(kDecodeWarps * decode_stages(p.bits, deep) * decode_stage_bytes(p)),
        later(sums + 2 * p.m * sum_pitch(tiles) * 4),
        x(later + (kDecodeWarps / (2 * tiles) - 1) * p.m * sum_pitch(tiles) * 4),
        size(x + p.m * decode_x_pitch(x_steps)) {}
};

// Tiles per block and splits of K are powers of two.
struct DecodeArguments {
  Problem problem;
  Reduction reduction;
  int tiles_log2;  // of 64 output features per block
  int splits_log2;
  int column_tiles;    // ceil(tiles_n(n) / tiles)
  int x_steps;         // steps of x in shared memory at once
  Divisor x_pieces;    // pieces of 16 bytes in a row of these
  Divisor group;       // steps of 64 per group, or with fine groups steps of 16
  int sums, later, x;  // DecodeShared
  float* partial;      // [splits][m][64 tiles_n(n)], with Reduction::kWorkspace
};

constexpr int log2_of(int power) {
  int log2 = 0;
  while (1 << log2 < power) ++log2;
  return log2;
}

inline DecodeArguments decode_arguments(const Problem& problem, const Plan& plan, void* workspace) {
  const DecodeShared shared(problem, plan.tiles, plan.x_steps, plan.deep);
  const int group =
      problem.group_size < problem.k ? problem.group_size : kStepK * steps_k(problem.k);
  DecodeArguments args = {};
  args.problem = problem;
  args.reduction = plan.reduction;
  args.tiles_log2 = log2_of(plan.tiles);
  args.splits_log2 = log2_of(plan.splits);
  args.column_tiles = ceil_div(tiles_n(problem.n), plan.tiles);
  args.x_steps = plan.x_steps;
  args.x_pieces = Divisor(plan.x_steps * (kStepK / 8));
  args.group = Divisor(group / (fine_groups(problem) ? kFragmentK : kStepK));
  args.sums = shared.sums;
  args.later = shared.later;
  args.x = shared.x;
  args.partial = static_cast<float*>(workspace);
  return args;
}

}  // namespace jax_gptq::cuda
