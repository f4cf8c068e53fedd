// Class B on sm_90a: what it can take, and how a product is cut into blocks.
#pragma once

#include "plan.h"

namespace jax_gptq::cuda {

// Output features and rows of x of a block, and the cluster it works in.
struct WgmmaPlan {
  int block_n = 0;  // 256 with block_m 16, 32 or 64; 128 with block_m 32, 64, 128 or 256
  int block_m = 0;
  int columns = 1;      // blocks of a cluster that share rows of x by multicast: 1 or 2
  int splits = 1;       // blocks of a cluster that share an output tile, each with a part of k
  int clusters = 0;     // clusters launched; each walks over output tiles if splits is 1
  double estimate = 0;  // microseconds, without a start that all plans have alike
};

// Where and how the scales apply.
enum class WgmmaMode {
  kExact,    // four bits, scales in the type of x, groups that end between steps of 64
  kSplit,    // the same, but scales in f16 under x in bf16: as sums of two bf16
  kOnSums,   // four bits as q - z; the scales are applied to the sums of a stage, of one group
  kGeneral,  // scales applied in f32, groups that end between steps
  kFine,     // the same, with groups that end inside a step
};

// Clusters of `blocks` blocks, one block per multiprocessor, that are resident at once: what
// cudaOccupancyMaxActiveClusters says on an H200, whose processing clusters are of unequal size.
constexpr int wgmma_resident_clusters(int blocks, int processors) {
  constexpr int kOn132[] = {132, 66, 39, 30, 22, 17, 15, 15};
  const int count = kOn132[blocks - 1] * processors / 132;
  return count > 0 ? count : 1;
}

// Output tiles, `columns` neighbours together.
constexpr int wgmma_works(const Problem& problem, const WgmmaPlan& plan) {
  return ceil_div(problem.m, plan.block_m) *
         ceil_div(ceil_div(problem.n, plan.block_n), plan.columns);
}

// Clusters to launch for `plan`: one for each of those if K is split, else no more than are
// resident at once.
constexpr int wgmma_clusters(const Problem& problem, const WgmmaPlan& plan, int processors) {
  const int works = wgmma_works(problem, plan);
  const int resident = wgmma_resident_clusters(plan.columns * plan.splits, processors);
  return plan.splits > 1 || works < resident ? works : resident;
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
