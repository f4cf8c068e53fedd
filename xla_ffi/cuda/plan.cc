#include "plan.h"

#include <algorithm>

#include "decode.h"
#include "mma.h"
#include "wgmma.h"

namespace jax_gptq::cuda {
namespace {

constexpr int kMaxWorkspaceSplits = 16;
// Of the workspace, for partial sums that a second kernel adds.
constexpr int64_t kPartialSumBytes = 8 << 20;

// Groups of `size` blocks (1, 2, 4 or 8), one block per multiprocessor, that are resident at once.
// A cluster lies within a processing cluster, whose numbers of multiprocessors are uneven: an H200
// (132) holds 66, 30 and 15 clusters of 2, 4 and 8.
int resident_groups(int processors, int size, bool clusters) {
  if (clusters && size > 2) processors = processors * 10 / 11;
  return std::max(1, processors / size);
}

// Microseconds of 5 to 16 rows without a split of K, on sm_90a, less the start that WgmmaPlan's
// estimate leaves out; fitted to measurements at 4 bits on an H200, see docs/h200_notes.md
// (2026-11-26, eighth). Most of it is the strips of a block, times the units of a warp in each.
double decode_estimate(const Problem& p, const Plan& plan) {
  constexpr double kStart = -0.3, kCopy = 0.27 / 1024;
  const double unit = p.m <= 8 ? 0.75 : 1.06;
  const int strips = ceil_div(decode_strips(p), plan.grid);
  const int units = ceil_div(ceil_div(p.k, kUnitK), kDecodeWarps);
  return kStart + kCopy * p.k + unit * strips * units;
}

bool partial_sums_fit(const Problem& p, int splits) {
  return int64_t{splits} * p.m * tiles_n(p.n) * kTileN * 4 <= kPartialSumBytes;
}

// As few splits of K as let x fit into shared memory: on an H100 no more are ever faster. No plan
// (kernel kNone) where none do.
Plan plan_decode(const Problem& problem, const Device& device) {
  Problem p = problem;
  p.m = decode_rows(p.m);
  const bool clusters = device.arch >= 90;
  const int most = clusters ? kMaxClusterSplits : kMaxWorkspaceSplits;
  for (int splits = 1; splits <= most && splits <= ceil_div(p.k, kUnitK); splits *= 2) {
    if (!clusters && splits > 1 && !partial_sums_fit(p, splits)) break;
    const int strips = decode_strips(p);
    const int groups =
        decode_groups(p, device, splits, resident_groups(device.processors, splits, clusters));
    const bool cluster = clusters && splits > 1;
    const auto shared = [&](const Problem& q) {
      return DecodeShared(q, splits, ceil_div(strips, groups), cluster, device.shared_bytes);
    };
    if (shared(p).slots == 0) continue;
    Plan plan;
    plan.device = device;
    plan.kernel = Kernel::kDecode;
    plan.reduction = splits == 1 ? Reduction::kNone
                     : clusters  ? Reduction::kCluster
                                 : Reduction::kWorkspace;
    plan.splits = splits;
    plan.grid = groups * splits;
    plan.shared_bytes = shared(problem).size;
    return plan;
  }
  return {};
}

Plan plan_mma(const Problem& p, const Device& device) {
  Plan plan;
  plan.device = device;
  plan.block_m = p.m <= 16 ? 16 : p.m <= 32 ? 32 : p.m <= 64 ? 64 : 128;
  plan.shared_bytes = mma_shared_bytes(p, plan.block_m);
  if (plan.shared_bytes > device.shared_bytes) return {};
  plan.kernel = Kernel::kMma;
  // K is split while that fills multiprocessors that would idle, and leaves a block 4 steps; in the
  // same way for all m with the same number of blocks.
  Problem whole = p;
  whole.m = ceil_div(p.m, plan.block_m) * plan.block_m;
  const int blocks = ceil_div(p.n, kMmaBlockN) * ceil_div(p.m, plan.block_m);
  const int resident = device.processors * (plan.block_m <= 32 ? 2 : 1);
  const int most = std::min(kMaxWorkspaceSplits, steps_k(p.k) / 4);
  while (plan.splits + 1 <= most && blocks * (plan.splits + 1) <= resident &&
         partial_sums_fit(whole, plan.splits + 1)) {
    ++plan.splits;
  }
  if (plan.splits > 1) plan.reduction = Reduction::kWorkspace;
  plan.grid = blocks * plan.splits;
  return plan;
}

}  // namespace

Plan make_plan(const Problem& p, const Device& device) {
  if (p.m == 0 || !supported(device)) return {};
  // Up to four rows class A is faster, also where it splits K.
  const bool wgmma = p.m > 4 && device.arch == 90 && wgmma_supported(p);
  if (p.m <= kDecodeRows) {
    const Plan plan = plan_decode(p, device);
    if (plan.kernel != Kernel::kNone &&
        (!wgmma ||
         (plan.splits == 1 && decode_estimate(p, plan) < wgmma_plan(p, device).estimate))) {
      return plan;
    }
  }
  if (!wgmma) return plan_mma(p, device);
  Plan plan;
  plan.device = device;
  plan.kernel = Kernel::kWgmma;
  return plan;
}

}  // namespace jax_gptq::cuda
