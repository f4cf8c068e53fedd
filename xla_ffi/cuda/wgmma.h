// Class B on sm_90a: what it can take, how a product is cut into blocks, its launch.
#pragma once

#include "plan.h"

namespace jax_gptq::cuda {

// Output features and rows of x of a block, and the cluster it works in.
struct WgmmaPlan {
  int block_n = 0;   // 128 or 256
  int block_m = 0;   // 32, 64, 128 (block_n 256) or 256 (block_n 128)
  int columns = 1;   // blocks of a cluster that share rows of x by multicast: 1, 2 or 4
  int splits = 1;    // blocks of a cluster that share an output tile, each with a part of k
  int clusters = 0;  // clusters launched; each walks over output tiles if splits is 1
};

// Clusters to launch for `plan`: one per output tile (of `columns` blocks) if K is split, else no
// more than are resident at once.
constexpr int wgmma_clusters(const Problem& problem, const WgmmaPlan& plan, int processors) {
  const int tiles =
      ceil_div(problem.m, plan.block_m) * ceil_div(ceil_div(problem.n, plan.block_n), plan.columns);
  const int resident = processors / plan.columns;
  return plan.splits > 1 || tiles < resident ? tiles : resident;
}

// Whether the kernel can take the problem. Looks at shapes and types alone.
bool wgmma_supported(const Problem& problem);

WgmmaPlan wgmma_plan(const Problem& problem, const Device& device);

}  // namespace jax_gptq::cuda
