// Class B on sm_90a: what it can take, and how a product is cut into blocks.
#pragma once

#include <algorithm>

#include "plan.h"

namespace jax_gptq::cuda {

// Output features and rows of x of a block, and who computes which part of the product.
struct WgmmaPlan {
  int block_n = 0;  // 256 with block_m 16, 32 or 64; 128 with block_m 32, 64, 128 or 256
  int block_m = 0;
  int columns = 1;      // blocks of a cluster that share rows of x by multicast: 1 or 2
  int shares = 0;       // wanted of all tiles' stages, of equal size; 0: whole tiles in turn
  int clusters = 0;     // launched: those shares that there are, or what is resident
  double estimate = 0;  // microseconds, without a start that all plans have alike
};

// Flags of 8 bytes, one for a block, at the start of the workspace; sums follow.
constexpr int kWgmmaFlags = 1024;

// Where and how the scales apply.
enum class WgmmaMode {
  kExact,    // four bits, scales in the type of x, groups that end between steps of 64
  kSplit,    // the same, but scales in f16 under x in bf16: as sums of two bf16
  kOnSums,   // four bits as q - z; the scales are applied to the sums of a stage, of one group
  kGeneral,  // scales applied in f32, groups that end between steps
  kFine,     // the same, with groups that end inside a step
};

// Clusters of one or two blocks, one block per multiprocessor, that are resident at once.
constexpr int wgmma_resident_clusters(int blocks, int processors) {
  return processors >= blocks ? processors / blocks : 1;
}

// Steps of 64 along K in a stage. Two, where they fit, halve the cost of the barriers.
constexpr int wgmma_stage_steps(int block_m) { return block_m == 256 ? 1 : 2; }

// Output tiles, `columns` neighbours together.
constexpr int wgmma_works(const Problem& problem, const WgmmaPlan& plan) {
  return ceil_div(problem.m, plan.block_m) *
         ceil_div(ceil_div(problem.n, plan.block_n), plan.columns);
}

// Stages along K.
constexpr int wgmma_stages(const Problem& problem, const WgmmaPlan& plan) {
  return ceil_div(problem.k, wgmma_stage_steps(plan.block_m) * kStepK);
}

// Clusters to launch for `plan`, never more than are resident at once; no share is empty.
constexpr int wgmma_clusters(const Problem& problem, const WgmmaPlan& plan, int processors) {
  const int works = wgmma_works(problem, plan);
  const int resident = wgmma_resident_clusters(plan.columns, processors);
  if (plan.shares == 0) return std::min(works, resident);
  const int64_t stages = int64_t{works} * wgmma_stages(problem, plan);
  return static_cast<int>(std::min<int64_t>(std::min(plan.shares, resident), stages));
}

// Whether flags and the sums of every share have room in the workspace.
constexpr bool wgmma_fits(const WgmmaPlan& plan) {
  const int blocks = plan.clusters * plan.columns;
  return plan.shares == 0 ||
         (blocks <= kWgmmaFlags &&
          8 * kWgmmaFlags + int64_t{blocks} * plan.block_n * plan.block_m * 4 <= kWorkspaceBytes);
}

// Whether the kernel can take the problem, up to kUnroundedRows rows without rounding weights.
// Looks at shapes and types alone; the plan is for what is supported.
bool wgmma_supported(const Problem& problem);

// Blocks in which a stage is 128 along K of one warpgroup and there are registers for its products
// beside the sums, as kOnSums needs.
constexpr bool wgmma_on_sums(int block_n, int block_m) {
  return block_n == 256 ? block_m <= 32 : block_m == 64 || block_m == 128;
}

// The mode for a problem in blocks of that size.
WgmmaMode wgmma_mode(const Problem& problem, int block_n, int block_m);

WgmmaPlan wgmma_plan(const Problem& problem, const Device& device);

}  // namespace jax_gptq::cuda
