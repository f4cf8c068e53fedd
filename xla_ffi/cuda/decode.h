// Host side of the decode kernel (decode.cuh): its shared memory and its arguments.
#pragma once

#include "plan.h"

namespace jax_gptq::cuda {

constexpr int kDecodeWarpsLog2 = 4;
constexpr int kDecodeWarps = 1 << kDecodeWarpsLog2;
constexpr int kDecodeThreads = 32 * kDecodeWarps;
constexpr int kStripLog2 = 5;
constexpr int kStripN = 1 << kStripLog2;  // output features of a warp: half a tile

// Stages of a warp's ring: 64 KB under way per multiprocessor, or (of 4 bits) 32 KB, which starts
// faster and suffices for short streams.
constexpr int kShallowStages = 2;
constexpr int deep_stages(int bits) { return bits == 4 ? 4 : 2; }

// Words between rows of the blocks of sums: 4 modulo 32, so that a warp writes without conflicts.
constexpr int sum_pitch(int strips) { return strips * kStripN + 4; }

// Bytes between rows of x in shared memory: 16 modulo 128, so that ldmatrix reads without
// conflicts.
constexpr int decode_x_pitch(int x_steps) { return x_steps * kStepK * 2 + 16; }

// Shared memory: the rings, the sums of each part of the warps' K, the sums of the block (twice:
// one is read by the cluster while the next is written), and x for the longest split.
struct DecodeShared {
  int parts, sums, x, size;

  constexpr DecodeShared(const Problem& p, int strips, int splits, int stages)
      : parts(kDecodeWarps * stages * step_bytes(p.bits) / 2),
        sums(parts + kDecodeWarps / strips * p.m * sum_pitch(strips) * 4),
        x(sums + 2 * p.m * sum_pitch(strips) * 4),
        size(x + p.m * decode_x_pitch(ceil_div(steps_k(p.k), splits))) {}
};

// Strips per block and splits of K are powers of two.
struct DecodeArguments {
  Problem problem;
  Reduction reduction;
  int strips_log2;  // strips of 32 output features per block
  int splits_log2;
  int columns;         // ceil(ceil(n / 32) / strips): what a block walks over
  int x_pitch;         // bytes between rows of x in shared memory
  Divisor x_pieces;    // pieces of 16 bytes in such a row
  Divisor group;       // steps of 64 per group, or with fine groups steps of 16
  int parts, sums, x;  // DecodeShared
  float* partial;      // [splits][m][64 tiles_n(n)], with Reduction::kWorkspace
};

constexpr int log2_of(int power) {
  int log2 = 0;
  while (1 << log2 < power) ++log2;
  return log2;
}

constexpr int decode_columns(const Problem& p, int strips) {
  return ceil_div(p.n, strips * kStripN);
}

inline DecodeArguments decode_arguments(const Problem& problem, const Plan& plan, void* workspace) {
  const DecodeShared shared(problem, plan.strips, plan.splits, plan.stages);
  const int group =
      problem.group_size < problem.k ? problem.group_size : kStepK * steps_k(problem.k);
  DecodeArguments args = {};
  args.problem = problem;
  args.reduction = plan.reduction;
  args.strips_log2 = log2_of(plan.strips);
  args.splits_log2 = log2_of(plan.splits);
  args.columns = decode_columns(problem, plan.strips);
  const int x_steps = ceil_div(steps_k(problem.k), plan.splits);
  args.x_pitch = decode_x_pitch(x_steps);
  args.x_pieces = Divisor(x_steps * (kStepK / 8));
  args.group = Divisor(group / (fine_groups(problem) ? kFragmentK : kStepK));
  args.parts = shared.parts;
  args.sums = shared.sums;
  args.x = shared.x;
  args.partial = static_cast<float*>(workspace);
  return args;
}

}  // namespace jax_gptq::cuda
