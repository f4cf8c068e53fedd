#include "plan.h"

#include <algorithm>

#include "decode.h"
#include "gemv.h"
#include "mma.h"
#include "wgmma.h"

namespace jax_gptq::cuda {
namespace {

// The estimates below only rank plans; fitted to times on an H200. Bytes per nanosecond that the
// device reads from memory, that one multiprocessor can take in, and that it reads from the L2
// cache; nanoseconds of adding up a column's sums, of a cluster and of a second kernel.
constexpr double kMemoryRate = 4000.0;
constexpr double kBlockRate = 40.0;
constexpr double kCacheRate = 48.0;
constexpr double kSumsTime = 1000.0;
constexpr double kClusterTime = 600.0;
constexpr double kKernelTime = 2000.0;

constexpr double kLongStream = 512 * 1024;  // bytes of a block from which deep rings pay

constexpr int kMaxWorkspaceSplits = 16;

// Groups of `size` blocks (1, 2, 4 or 8), one block per multiprocessor, that are resident at once.
// A cluster lies within a processing cluster, whose numbers of multiprocessors are uneven: an H200
// (132) holds 66, 30 and 15 clusters of 2, 4 and 8.
int resident_groups(int processors, int size, bool clusters) {
  if (clusters && size > 2) processors = processors * 10 / 11;
  return std::max(1, processors / size);
}

double block_rate(int blocks) { return std::min(kBlockRate, kMemoryRate / blocks); }

bool partial_sums_fit(const Problem& p, int splits) {
  return int64_t{splits} * p.m * tiles_n(p.n) * kTileN * 4 <= kWorkspaceBytes;
}

// No plan (kernel kNone) where rows of x are not aligned to pairs, or their digits do not fit into
// shared memory.
Plan plan_gemv(const Problem& p, const Device& device) {
  if (p.k % 2 != 0) return {};
  const int strips = ceil_div(p.n, kFragmentN);
  Plan plan;
  plan.grid = std::min(strips, device.processors);
  plan.shared_bytes = GemvShared(p, ceil_div(strips, plan.grid)).size;
  if (plan.shared_bytes > device.shared_bytes) return {};
  plan.device = device;
  plan.kernel = Kernel::kGemv;
  return plan;
}

// No plan where x does not fit into shared memory.
Plan plan_decode(const Problem& problem, const Device& device) {
  Problem p = problem;
  p.m = p.m == 1 ? 1 : p.m <= 8 ? 8 : kDecodeRows;
  const bool clusters = device.arch >= 90;
  const int steps = steps_k(p.k);
  Plan best;
  double best_time = 0;
  for (int strips = 1; strips <= 8; strips *= 2) {
    const int columns = decode_columns(p, strips);
    for (int splits = 1; splits <= (clusters ? kMaxClusterSplits : kMaxWorkspaceSplits);
         splits *= 2) {
      if (splits > steps || (!clusters && splits > 1 && !partial_sums_fit(p, splits))) continue;
      const int split_steps = ceil_div(steps, splits);
      const int launched = std::min(columns, resident_groups(device.processors, splits, clusters));
      // Bytes of the weight that a block reads per column; rounds over the columns, the last of
      // which may leave multiprocessors idle and memory to the others.
      const double bytes = ceil_div(split_steps, kDecodeWarps / strips) *
                           static_cast<double>(kDecodeWarps * step_bytes(p.bits) / 2);
      const int full = columns / launched, rest = columns % launched;
      const int rounds = full + (rest > 0);
      // Few stages start faster; many stream faster.
      int stages = rounds * bytes < kLongStream ? kShallowStages : deep_stages(p.bits);
      if (DecodeShared(p, strips, splits, stages).size > device.shared_bytes) {
        stages = kShallowStages;
      }
      if (DecodeShared(p, strips, splits, stages).size > device.shared_bytes) continue;

      double time = rounds * kSumsTime + full * bytes / block_rate(launched * splits);
      if (rest > 0) time += bytes / block_rate(rest * splits);
      time += p.m * split_steps * kStepK * 2 / kCacheRate;
      if (splits > 1) time += clusters ? kClusterTime : kKernelTime;
      if (best.kernel != Kernel::kNone && time >= best_time) continue;
      best_time = time;
      best.device = device;
      best.kernel = Kernel::kDecode;
      best.reduction = splits == 1 ? Reduction::kNone
                       : clusters  ? Reduction::kCluster
                                   : Reduction::kWorkspace;
      best.splits = splits;
      best.grid = launched * splits;
      best.strips = strips;
      best.stages = stages;
      best.shared_bytes = DecodeShared(problem, strips, splits, stages).size;
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
  if (p.m <= kGemvRows) {
    const Plan plan = plan_gemv(p, device);
    if (plan.kernel != Kernel::kNone) return plan;
  }
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
