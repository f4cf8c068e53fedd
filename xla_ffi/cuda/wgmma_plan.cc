#include <limits>

#include "wgmma.h"

namespace jax_gptq::cuda {

bool wgmma_supported(const Problem& problem) {
  // A row of x starts at a multiple of 16 bytes, as its tensor map demands.
  return problem.k % 8 == 0 && (problem.groups == 1 || problem.group_size % 16 == 0) &&
         (problem.m > kUnroundedRows || wgmma_mode(problem, 256, 16) == WgmmaMode::kOnSums);
}

WgmmaMode wgmma_mode(const Problem& problem, int block_n, int block_m) {
  if (problem.groups > 1 && problem.group_size % kStepK != 0) return WgmmaMode::kFine;
  if (problem.bits != 4) return WgmmaMode::kGeneral;
  const bool exact = problem.scale_type == problem.type;
  const bool whole_stages = problem.groups == 1 || problem.group_size % (2 * kStepK) == 0;
  if (whole_stages && wgmma_on_sums(block_n, block_m) && (!exact || problem.m <= kUnroundedRows)) {
    return WgmmaMode::kOnSums;
  }
  if (exact) return WgmmaMode::kExact;
  return problem.type == Dtype::kBf16 && problem.scale_type == Dtype::kF16 ? WgmmaMode::kSplit
                                                                           : WgmmaMode::kGeneral;
}

namespace {

// Microseconds of one step of 64 along K of a block, by mode; what was not measured counts as
// kExact.
struct Tile {
  int block_n, block_m;
  double exact, split;
  double on_sums = std::numeric_limits<double>::infinity();  // there is none
};
constexpr Tile kTiles[] = {{256, 16, 0.33, 0.40, 0.34}, {256, 32, 0.365, 0.43, 0.39},
                           {256, 64, 0.45, 0.53},       {128, 32, 0.22, 0.265},
                           {128, 64, 0.24, 0.29, 0.27}, {128, 128, 0.335, 0.42, 0.35},
                           {128, 256, 0.63, 0.64}};

double step_time(const Tile& tile, WgmmaMode mode) {
  if (mode == WgmmaMode::kOnSums) return tile.on_sums;
  return mode == WgmmaMode::kSplit ? tile.split : tile.exact;
}

// Microseconds beyond a start that all plans have alike; fitted to measurements, the steps on an
// H200, the rest on an H100: docs/h200_notes.md (2026-11-26, fourth and seventh). m counts in whole
// blocks only, so that K is cut in the same way for all m with the same number of blocks.
double estimate(const Problem& problem, const WgmmaPlan& plan, double step, int processors) {
  constexpr double kWave = 2.0, kSplit = 0.2, kPerSplit = 0.2, kPerKilobyte = 0.04;
  const double product = ceil_div(ceil_div(steps_k(problem.k), 2), plan.splits) * 2 * step;
  if (plan.splits > 1) {
    const double sent = 4e-3 * plan.block_m * plan.block_n * (plan.splits - 1) / plan.splits;
    return product + kSplit + kPerSplit * plan.splits + kPerKilobyte * sent;
  }
  const int waves =
      ceil_div(wgmma_works(problem, plan), wgmma_resident_clusters(plan.columns, processors));
  return waves * product + (waves - 1) * kWave;
}

}  // namespace

WgmmaPlan wgmma_plan(const Problem& problem, const Device& device) {
  const int processors = device.processors;
  WgmmaPlan best;
  best.estimate = std::numeric_limits<double>::infinity();
  for (const Tile& tile : kTiles) {
    // Not half empty, and of 16 or 32 rows only one: it reads the weight again for the next.
    if (tile.block_m > 32 ? tile.block_m >= 2 * problem.m : problem.m > tile.block_m) continue;
    const WgmmaMode mode = wgmma_mode(problem, tile.block_n, tile.block_m);
    if (problem.m <= kUnroundedRows && mode != WgmmaMode::kOnSums) continue;
    // Of the largest tile's sums those of three parts fit into shared memory; two are enough.
    const double step = step_time(tile, mode);
    const int most = tile.block_m == 256 ? 2 : kMaxClusterSplits;
    for (int splits = 1; splits <= most; ++splits) {
      WgmmaPlan plan{tile.block_n, tile.block_m, 1, splits, 0};
      if (tile.block_m == 256 && splits == 1 && problem.m > 256) plan.columns = 2;
      // A split is for multiprocessors that would idle, and leaves a block four steps.
      if (splits > 1 &&
          (4 * splits > steps_k(problem.k) ||
           wgmma_works(problem, plan) > wgmma_resident_clusters(splits, processors))) {
        break;
      }
      plan.estimate = estimate(problem, plan, step, processors);
      if (plan.estimate < best.estimate) best = plan;
    }
  }
  best.clusters = wgmma_clusters(problem, best, processors);
  return best;
}

}  // namespace jax_gptq::cuda
