#include "wgmma.h"

namespace jax_gptq::cuda {

bool wgmma_supported(const Problem& problem) {
  // A row of x starts at a multiple of 16 bytes, as its tensor map demands.
  return problem.k % 8 == 0 && (problem.groups == 1 || problem.group_size % 16 == 0);
}

WgmmaPlan wgmma_plan(const Problem& problem, const Device& device) {
  WgmmaPlan plan;
  plan.block_m = problem.m <= 32 ? 32 : problem.m <= 64 ? 64 : problem.m <= 128 ? 128 : 256;
  plan.block_n = plan.block_m == 256 ? 128 : 256;
  const int tiles = ceil_div(problem.n, plan.block_n) * ceil_div(problem.m, plan.block_m);
  while (plan.splits < 8 && tiles * plan.splits * 2 <= device.processors) plan.splits *= 2;
  plan.clusters = wgmma_clusters(problem, plan, device.processors);
  return plan;
}

}  // namespace jax_gptq::cuda
