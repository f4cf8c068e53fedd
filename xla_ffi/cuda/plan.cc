#include "plan.h"

#include <algorithm>

#include "decode.h"
#include "mma.h"
#include "wgmma.h"

namespace jax_gptq::cuda {
namespace {

// The estimates below only rank plans; fitted to times on an H100. Bytes per nanosecond that the
// device reads from memory, that one multiprocessor can take in, and that it reads from the L2
// cache; how much longer 32 KB under way take than 64; nanoseconds of adding up a cluster's sums,
// and of a second kernel.
constexpr double kMemoryRate = 3000.0;
constexpr double kBlockRate = 40.0;
constexpr double kCacheRate = 48.0;
constexpr double kShallowFactor = 1.1;
constexpr double kClusterTime = 1000.0;
constexpr double kKernelTime = 2000.0;

constexpr int kMaxWorkspaceSplits = 16;

// Groups of `size` blocks (1, 2, 4 or 8), one block per multiprocessor, that are resident at once.
// A cluster lies within a processing cluster, whose numbers of multiprocessors are uneven: an H200
// (132) holds 66, 30 and 15 clusters of 2, 4 and 8.
int resident_groups(int processors, int size, bool clusters) {
  if (clusters && size > 2) processors = processors * 10 / 11;
  return std::max(1, processors / size);
}

bool partial_sums_fit(const Problem& p, int splits) {
  return int64_t{splits} * p.m * tiles_n(p.n) * kTileN * 4 <= kWorkspaceBytes;
}

// No plan (kernel kNone) where x does not fit into shared memory.
Plan plan_decode(const Problem& problem, const Device& device) {
  Problem p = problem;
  p.m = p.m <= 8 ? 8 : kDecodeRows;
  const bool clusters = device.arch >= 90;
  const int units = ceil_div(p.k, kUnitK);
  Plan best;
  double best_time = 0;
  for (const DecodeForm* form = decode_forms_begin(p); form < decode_forms_end(p); ++form) {
    const int strips = decode_strips(p, form->fragments);
    for (int splits = 1; splits <= (clusters ? kMaxClusterSplits : kMaxWorkspaceSplits);
         splits *= 2) {
      if (splits > units || (!clusters && splits > 1 && !partial_sums_fit(p, splits))) continue;
      const bool cluster = clusters && splits > 1;
      const int groups = std::min(strips, resident_groups(device.processors, splits, clusters));
      const int rounds = ceil_div(strips, groups);
      const int split_units = ceil_div(units, splits);
      if (DecodeShared(p, *form, splits, rounds, cluster).size > device.shared_bytes) continue;

      // What the busiest block reads, its warps in step.
      const double bytes = static_cast<double>(rounds) * ceil_div(split_units, kDecodeWarps) *
                           kDecodeWarps * unit_code_bytes(p.bits, form->fragments);
      const bool shallow = form->stages * unit_code_bytes(p.bits, form->fragments) < 4096;
      double time = (shallow ? kShallowFactor : 1.0) * bytes /
                    std::min(kBlockRate, kMemoryRate / (groups * splits));
      time += p.m * split_units * kUnitK * 2 / kCacheRate;
      if (splits > 1) time += clusters ? kClusterTime : kKernelTime;
      if (best.kernel != Kernel::kNone && time >= best_time) continue;
      best_time = time;
      best.device = device;
      best.kernel = Kernel::kDecode;
      best.reduction = splits == 1 ? Reduction::kNone
                       : clusters  ? Reduction::kCluster
                                   : Reduction::kWorkspace;
      best.splits = splits;
      best.grid = groups * splits;
      best.fragments = form->fragments;
      best.stages = form->stages;
      best.shared_bytes = DecodeShared(problem, *form, splits, rounds, cluster).size;
    }
  }
  return best;
}

Plan plan_mma(const Problem& p, const Device& device) {
  Plan plan;
  plan.device = device;
  plan.block_m = p.m <= 16 ? 16 : p.m <= 32 ? 32 : p.m <= 64 ? 64 : 128;
  plan.shared_bytes = mma_shared_bytes(p, plan.block_m);
  if (plan.shared_bytes > device.shared_bytes) return {};
  plan.kernel = Kernel::kMma;
  // K is split while that fills multiprocessors that would idle, and leaves a block 4 steps.
  const int blocks = ceil_div(p.n, kMmaBlockN) * ceil_div(p.m, plan.block_m);
  const int resident = device.processors * (plan.block_m <= 32 ? 2 : 1);
  const int most = std::min(kMaxWorkspaceSplits, steps_k(p.k) / 4);
  while (plan.splits + 1 <= most && blocks * (plan.splits + 1) <= resident &&
         partial_sums_fit(p, plan.splits + 1)) {
    ++plan.splits;
  }
  if (plan.splits > 1) plan.reduction = Reduction::kWorkspace;
  plan.grid = blocks * plan.splits;
  return plan;
}

}  // namespace

Plan make_plan(const Problem& p, const Device& device) {
  if (p.m == 0 || !supported(device)) return {};
  if (p.m <= kDecodeRows) {
    const Plan plan = plan_decode(p, device);
    if (plan.kernel != Kernel::kNone) return plan;
  } else if (device.arch == 90 && wgmma_supported(p)) {
    Plan plan;
    plan.device = device;
    plan.kernel = Kernel::kWgmma;
    return plan;
  }
  return plan_mma(p, device);
}

}  // namespace jax_gptq::cuda
