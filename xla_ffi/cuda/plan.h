// Which kernel computes a product, with which grid: pure functions of shapes and device, used by
// the FFI handler, the launches, the emulator and the tests alike.
#pragma once

#include <cstdint>

#include "layout.h"

namespace jax_gptq::cuda {

// The most rows of x that the decode kernel takes.
constexpr int kDecodeRows = 16;

// The most rows for which weights are not rounded, unless K is so long that one of the others'
// blocks has no room for x: kMma is left then.
constexpr int kUnroundedRows = 8;

// The most parts of K that a cluster of kDecode adds up: the portable size of a cluster.
constexpr int kMaxClusterSplits = 8;

// Bytes of the workspace that every matmul call passes, for every shape and architecture: a plan
// splits K only so far that the partial sums fit. Most is for 132 output tiles of 128 x 256 in f32.
constexpr int64_t kWorkspaceBytes = 17 << 20;

// y [m, n] = x [m, k] W [k, n] + bias [n].
struct Problem {
  int m, n, k;
  int bits;        // in which codes are held: 4 or 8
  int group_size;  // a multiple of 16, or >= k
  int groups;      // ceil(k / group_size)
  Dtype type;      // of x and y: f16 or bf16
  Dtype scale_type;
  const void* x;       // [m, k]
  const void* codes;   // layout.h
  const void* scales;  // [tiles_n(n)][groups][64]
  const void* zeros;   // uint8, as scales
  const float* bias;   // [n], or null
  void* y;             // [m, n]
  bool y_f32;          // whether y is f32, not rounded to `type`
};

// Whether groups end inside a step of 64 along K, and the most groups that one step can touch.
constexpr bool fine_groups(const Problem& p) {
  return p.group_size < p.k && p.group_size % kStepK != 0;
}
constexpr int groups_per_step(const Problem& p) {
  return !fine_groups(p) ? 1 : p.group_size == kFragmentK ? kStepK / kFragmentK : 2;
}

struct Device {
  int arch;          // 10 * major + minor
  int processors;    // streaming multiprocessors
  int shared_bytes;  // shared memory that one block may opt in to
};

enum class Kernel : int {
  kNone,    // no rows: nothing to launch
  kDecode,  // m <= 16, scales on f32 accumulators; where kWgmma is possible too, 5 to 16 rows only
            // if K is not split and an estimate says so
  kMma,     // larger m, mma.sync, weights rounded once
  kWgmma,   // m > 4, sm_90a, weights rounded once or not at all
};

// How kDecode and kMma add parts of K up. Always in order, so that equal inputs give equal bits.
enum class Reduction : int {
  kNone,       // K is not split
  kCluster,    // the splits of a tile are one cluster and read each other's shared memory
  kWorkspace,  // f32 partial sums [split][m][64 tiles_n(n)], added by a second kernel
};

struct Plan {
  Device device = {};  // the one that the plan is for
  Kernel kernel = Kernel::kNone;
  Reduction reduction = Reduction::kNone;
  int splits = 1;  // parts of K, of kDecode and kMma
  int grid = 0;    // blocks
  int shared_bytes = 0;
  // kMma: rows of x per block (16, 32, 64 or 128).
  int block_m = 0;
};

// Whether an architecture has the kernels at all.
constexpr bool supported(const Device& device) { return device.arch >= 80; }

// The plan for `problem` (its pointers are not looked at). kNone where m > 0 means that no kernel
// can take the problem on this device. K is cut in the same way for m = 3 and 4, for all m from 5
// to 8, 9 to 16, 17 to 32, 33 to 64 and 65 to 128, and beyond for all with the same ceil(m / 64);
// there a row of y does not depend on the rows beside it. Beyond one tile of rows (16 to 256) equal
// rows at different places may differ in their last bits.
Plan make_plan(const Problem& problem, const Device& device);

}  // namespace jax_gptq::cuda
