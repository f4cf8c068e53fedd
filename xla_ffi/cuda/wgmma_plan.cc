#include <algorithm>
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
constexpr Tile kTiles[] = {{256, 16, 0.345, 0.40, 0.355}, {256, 32, 0.375, 0.43, 0.39},
                           {256, 64, 0.45, 0.515},        {128, 32, 0.225, 0.27},
                           {128, 64, 0.25, 0.29, 0.27},   {128, 128, 0.36, 0.42, 0.38},
                           {128, 256, 0.67, 0.67}};

double step_time(const Tile& tile, WgmmaMode mode) {
  if (mode == WgmmaMode::kOnSums) return tile.on_sums;
  return mode == WgmmaMode::kSplit ? tile.split : tile.exact;
}

// Microseconds beyond a start that all plans have alike; fitted to measurements on an H200:
// docs/h200_notes.md (2026-11-26, eighth). m counts in whole blocks only, so that K is cut in the
// same way for all m with the same number of blocks.
double estimate(const Problem& problem, const WgmmaPlan& plan, double step) {
  // Sharing at all, for each part of a tile, where a share has parts of two, for handing sums over.
  constexpr double kShares = 0.2, kPart = 0.28, kSecondTile = 0.45, kPer4096Sums = 0.78;
  const int works = wgmma_works(problem, plan), stages = wgmma_stages(problem, plan);
  const double stage = wgmma_stage_steps(plan.block_m) * step;
  if (plan.shares == 0) return ceil_div(works, plan.clusters) * stages * stage;
  const int share = ceil_div(works * stages, plan.clusters);
  const bool within_tiles =
      works == 1 || (plan.clusters % works == 0 && stages % (plan.clusters / works) == 0);
  return share * stage + kShares + kPart * ceil_div(stages, share) +
         (within_tiles ? 0.0 : kSecondTile) + kPer4096Sums * plan.block_n * plan.block_m / 4096;
}

// Of x, so that it stays in the L2 cache beside the weights that come through it.
constexpr int64_t kCachedElements = 8 << 20;

// The stages of all tiles times those of one, so that Divisor is exact.
constexpr int64_t kDividend = UINT32_MAX;

}  // namespace

WgmmaPlan wgmma_plan(const Problem& problem, const Device& device) {
  const int processors = device.processors;
  WgmmaPlan best;
  best.estimate = std::numeric_limits<double>::infinity();
  for (const Tile& tile : kTiles) {
    // Not half empty, and of 16 or 32 rows two at most.
    if (tile.block_m > 32 ? tile.block_m >= 2 * problem.m : problem.m > 2 * tile.block_m) continue;
    const WgmmaMode mode = wgmma_mode(problem, tile.block_n, tile.block_m);
    if (problem.m <= kUnroundedRows && mode != WgmmaMode::kOnSums) continue;
    const double step = step_time(tile, mode);
    WgmmaPlan plan{tile.block_n, tile.block_m};
    if (tile.block_m >= 128 && wgmma_works(problem, plan) > processors) plan.columns = 2;
    const int resident = wgmma_resident_clusters(plan.columns, processors);
    const int works = wgmma_works(problem, plan);
    const int64_t stages = int64_t{works} * wgmma_stages(problem, plan);
    const auto consider = [&](int shares) {
      plan.shares = shares;
      plan.clusters = wgmma_clusters(problem, plan, processors);
      if (!wgmma_fits(plan)) return;
      plan.estimate = estimate(problem, plan, step);
      if (plan.estimate < best.estimate) best = plan;
    };
    consider(0);  // whole tiles in turn
    // Or as many shares as are resident, of two stages or more, or so many that they may end where
    // tiles do. These walk along K at different places, so x must stay in the L2 cache.
    if (int64_t{ceil_div(problem.m, 64)} * 64 * problem.k <= kCachedElements &&
        stages * wgmma_stages(problem, plan) <= kDividend) {
      consider(static_cast<int>(std::min<int64_t>(resident, std::max<int64_t>(1, stages / 2))));
      for (int parts = 2; parts <= 8 && parts * works <= resident; ++parts) {
        consider(parts * works);
      }
    }
  }
  return best;
}

}  // namespace jax_gptq::cuda
