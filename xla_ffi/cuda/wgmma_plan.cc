#include "wgmma.h"

namespace jax_gptq::cuda {

bool wgmma_supported(const Problem& problem) {
  // A row of x starts at a multiple of 16 bytes, as its tensor map demands.
  return problem.k % 8 == 0 && (problem.groups == 1 || problem.group_size % 16 == 0);
}

// From the measurements in docs/h200_notes.md and h100_notes.md.
WgmmaPlan wgmma_plan(const Problem& problem, const Device& device) {
  WgmmaPlan plan;
  const auto tiles = [&](int block_n, int block_m) {
    return ceil_div(problem.n, block_n) * ceil_div(problem.m, block_m);
  };
  const int half = wgmma_resident_clusters(2, device.processors);
  const bool long_k = problem.k >= 8192;  // the sums of a split cost little beside its products
  plan.block_n = 128;
  if (problem.m <= 64) {
    plan.block_m = problem.m <= 32 ? 32 : 64;
    const int wide = ceil_div(problem.n, 256);
    if (problem.m <= 32 || wide * 2 > half || (long_k && wide * 4 <= half)) plan.block_n = 256;
  } else if (!long_k && tiles(128, 64) <= half) {
    plan.block_m = 64;
  } else if (problem.m <= 128 || (tiles(128, 256) <= half && !(long_k && tiles(128, 128) > half))) {
    plan.block_m = 128;
  } else if (tiles(128, 256) <= half) {
    plan.block_m = 256;  // and two splits
  } else {
    plan.block_m = 256;
    plan.columns = 2;
  }
  // As many splits of K as keep every tile's cluster resident. Fewer than 4 steps of K or more than
  // 6 splits cost more in sums sent around than they save.
  const int count = tiles(plan.block_n, plan.block_m);
  const int most = ceil_div(steps_k(problem.k), 4) < 6 ? ceil_div(steps_k(problem.k), 4) : 6;
  while (plan.columns == 1 && plan.splits < most &&
         count <= wgmma_resident_clusters(plan.splits + 1, device.processors)) {
    ++plan.splits;
  }
  plan.clusters = wgmma_clusters(problem, plan, device.processors);
  return plan;
}

}  // namespace jax_gptq::cuda
