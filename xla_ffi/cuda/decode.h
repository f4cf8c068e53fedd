// Host side of the decode kernel (decode.cuh): its shared memory and its arguments.
#pragma once

#include <algorithm>

#include "plan.h"

namespace jax_gptq::cuda {

constexpr int kDecodeWarps = 16;
constexpr int kDecodeThreads = 32 * kDecodeWarps;
constexpr int kUnitK = 2 * kStepK;                // input features of a stage
constexpr int kUnitBlocks = kUnitK / kFragmentK;  // of 16 along K in a unit
constexpr int kTileStrips = kTileN / kFragmentN;  // of 16 output features in a tile
constexpr int kDecodeStages = 2;                  // of a warp's ring
constexpr int kParameterBytes = 4 + 1;            // that a stage has for a scale and a zero point

// Bytes of a strip's codes in a stage. At 4 bits 32 KB are under way per multiprocessor: the 26 KB
// that Little's law asks for at 0.8 us of latency and little more, since memory serves in turn what
// is asked for.
constexpr int unit_code_bytes(int bits) { return kFragmentN * kUnitK * bits / 8; }

// Parts of a unit that have scales of their own: as many as the group size asks for.
constexpr int parameter_sets(const Problem& p) {
  if (p.group_size >= p.k || p.group_size % kUnitK == 0) return 1;
  return p.group_size % 64 == 0 ? 2 : p.group_size % 32 == 0 ? 4 : 8;
}
constexpr int kSetBytes = kFragmentN * kParameterBytes;
constexpr int stage_bytes(int bits, int sets) { return unit_code_bytes(bits) + sets * kSetBytes; }

// The rows that a product of m rows is planned and multiplied as. Where that is the same, a row of
// y has the same bits.
constexpr int decode_rows(int m) { return m <= 2 ? m : m <= 4 ? 4 : m <= 8 ? 8 : kDecodeRows; }

// Words between rows of sums: 4 modulo 16, so that a warp writes without conflicts.
constexpr int kSumsPitch = kFragmentN + 4;

// Bytes of the rings, and of the sums of all warps for one strip of m rows.
constexpr int decode_ring_bytes(const Problem& p) {
  return kDecodeWarps * kDecodeStages * stage_bytes(p.bits, parameter_sets(p));
}
constexpr int decode_strip_bytes(int m) { return m * kDecodeWarps * kSumsPitch * 4; }

// One or two rows of x become digits (digits.cuh). More stay floats, and two blocks copy them for
// each other, where nothing else makes clusters of the blocks, rows begin at whole pieces and the
// architecture has multicast (12.x only imitates it).
constexpr int kDigits = 4;
constexpr int kDigitBytes = kUnitK * kDigits;  // of a unit and row
constexpr bool as_digits(const Problem& p) { return p.m <= 2; }
constexpr bool shares_x(const Problem& p, const Device& device, int splits) {
  return device.arch >= 90 && device.arch < 120 && device.processors > 1 && splits == 1 &&
         !as_digits(p) && p.k % 8 == 0;
}

// Bytes between units of a row of x in shared memory, and between rows: of floats 16 modulo 128, so
// that ldmatrix reads without conflicts.
constexpr int decode_x_unit(bool digits) { return digits ? kDigitBytes : kUnitK * 2; }
constexpr int decode_x_pitch(bool digits, int units) {
  return units * decode_x_unit(digits) + (digits ? 0 : 16);
}

// The part of K that a warp works on, the same in every strip.
struct Run {
  int first, units;
  uint32_t x;  // where its part of the first row of x is in shared memory
};

constexpr int decode_strips(const Problem& p) { return ceil_div(p.n, kFragmentN); }

// Groups of blocks, each with all of K, where `resident` would run at once. An even number of
// blocks where two share x: the last may then have no strip.
constexpr int decode_groups(const Problem& p, const Device& device, int splits, int resident) {
  const int groups = std::min(decode_strips(p), resident);
  return shares_x(p, device, splits) ? std::min(groups + groups % 2, resident / 2 * 2) : groups;
}

// Shared memory: the rings, a barrier for every warp that may share x, x for the longest split, the
// sums of every warp for `slots` strips (as many as a block takes, or as fit: none if there is no
// room for one), and where splits are added through the cluster those of the block.
struct DecodeShared {
  int barriers, x, parts, slots, sums, size;

  constexpr DecodeShared(const Problem& p, int splits, int rounds, bool cluster, int limit)
      : barriers(decode_ring_bytes(p)),
        x(barriers + (as_digits(p) ? 0 : 8 * kDecodeWarps)),
        parts(x + p.m * decode_x_pitch(as_digits(p), ceil_div(ceil_div(p.k, kUnitK), splits))),
        slots(std::max(0, std::min(rounds, (limit - parts) / slot_bytes(p, cluster)))),
        sums(parts + slots * slot_bytes(p, false)),
        size(parts + slots * slot_bytes(p, cluster)) {}

 private:
  static constexpr int slot_bytes(const Problem& p, bool cluster) {
    return decode_strip_bytes(p.m) + (cluster ? p.m * kFragmentN * 4 : 0);
  }
};

struct DecodeArguments {
  Problem problem;
  Reduction reduction;
  int splits_log2;  // splits of K are a power of two
  int strips;       // ceil(n / 16)
  int units;        // ceil(k / 128)
  int x_pitch;      // bytes between rows of x in shared memory
  int x_unit;       // and between units
  bool shares_x;
  Divisor rows;  // m
  Divisor sets_per_group;
  int barriers, x, parts, slots, sums;  // DecodeShared
  float* partial;                       // [splits][m][64 tiles_n(n)], with Reduction::kWorkspace
};

constexpr int log2_of(int power) {
  int log2 = 0;
  while (1 << log2 < power) ++log2;
  return log2;
}

inline DecodeArguments decode_arguments(const Problem& problem, const Plan& plan, void* workspace) {
  DecodeArguments args = {};
  args.problem = problem;
  args.reduction = plan.reduction;
  args.splits_log2 = log2_of(plan.splits);
  args.strips = decode_strips(problem);
  args.units = ceil_div(problem.k, kUnitK);
  const bool digits = as_digits(problem);
  args.x_pitch = decode_x_pitch(digits, ceil_div(args.units, plan.splits));
  args.x_unit = decode_x_unit(digits);
  args.shares_x = shares_x(problem, plan.device, plan.splits);
  args.rows = Divisor(problem.m);
  const int sets = parameter_sets(problem);
  args.sets_per_group =
      Divisor(problem.group_size < problem.k ? problem.group_size / (kUnitK / sets) : args.units);
  const DecodeShared shared(problem, plan.splits, ceil_div(args.strips, plan.grid / plan.splits),
                            plan.reduction == Reduction::kCluster, plan.device.shared_bytes);
  args.barriers = shared.barriers;
  args.x = shared.x;
  args.parts = shared.parts;
  args.slots = shared.slots;
  args.sums = shared.sums;
  args.partial = static_cast<float*>(workspace);
  return args;
}

}  // namespace jax_gptq::cuda
