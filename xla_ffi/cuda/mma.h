// Host side of the mma.sync kernel (mma.cuh): its shared memory and its arguments.
#pragma once

#include "plan.h"

namespace jax_gptq::cuda {

constexpr int kMmaThreads = 256;
constexpr int kMmaBlockN = 128;  // output features of a block: two tiles

// Stages of the pipeline: what fits into the 99 KB of shared memory of sm_86, 89 and 120.
constexpr int mma_stages(int bits, int block_m) {
  if (bits == 4) return block_m <= 32 ? 8 : block_m == 64 ? 6 : 4;
  return block_m <= 32 ? 6 : block_m == 64 ? 5 : 3;
}

// Bytes between rows of x in shared memory: 16 modulo 128, so that ldmatrix reads without
// conflicts.
constexpr int kMmaPitchX = kStepK * 2 + 16;

// Words between rows of the sums in shared memory: 4 modulo 32.
constexpr int kMmaPitchSums = kMmaBlockN + 4;

// Bytes, for one tile and one group, of the scales and zero points.
constexpr int mma_parameter_bytes(const Problem& p) {
  return kTileN * (dtype_bytes(p.scale_type) + 1);
}

// One stage: the codes of two tiles, their parameters [tile][group], and x.
struct MmaStage {
  int parameters, x, size;

  constexpr MmaStage(const Problem& p, int block_m)
      : parameters(2 * step_bytes(p.bits)),
        x(parameters + 2 * groups_per_step(p) * mma_parameter_bytes(p)),
        size(x + block_m * kMmaPitchX) {}
};

// The pipeline, and in the same place afterwards the sums of the block.
constexpr int mma_shared_bytes(const Problem& p, int block_m) {
  const int pipeline = mma_stages(p.bits, block_m) * MmaStage(p, block_m).size;
  const int sums = block_m * kMmaPitchSums * 4;
  return pipeline > sums ? pipeline : sums;
}

struct MmaArguments {
  Problem problem;
  int n_blocks, m_blocks, splits;
  Divisor group;   // steps of 64 per group, or with fine groups steps of 16
  float* partial;  // [splits][m][64 tiles_n(n)] where K is split, else null
};

inline MmaArguments mma_arguments(const Problem& problem, const Plan& plan, void* workspace) {
  MmaArguments args = {};
  args.problem = problem;
  args.n_blocks = ceil_div(problem.n, kMmaBlockN);
  args.m_blocks = ceil_div(problem.m, plan.block_m);
  args.splits = plan.splits;
  const int group =
      problem.group_size < problem.k ? problem.group_size : kStepK * steps_k(problem.k);
  args.group = Divisor(group / (fine_groups(problem) ? kFragmentK : kStepK));
  if (plan.reduction == Reduction::kWorkspace) args.partial = static_cast<float*>(workspace);
  return args;
}

}  // namespace jax_gptq::cuda
