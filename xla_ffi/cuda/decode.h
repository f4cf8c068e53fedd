// Host side of the decode kernel (decode.cuh): its shared memory and its arguments.
#pragma once

#include <algorithm>

#include "plan.h"

namespace jax_gptq::cuda {

constexpr int kDecodeWarps = 16;
constexpr int kDecodeThreads = 32 * kDecodeWarps;
constexpr int kUnitK = 2 * kStepK;     // input features of a stage
constexpr int kSumsBytes = 24 * 1024;  // for the sums of each warp, if one strip's do not need more
constexpr int kParameterBytes = 4 + 1;  // that a stage has for a scale and a zero point

// Output features of a strip, which a warp holds at once: one or two fragments of 16.
constexpr int strip_n(int fragments) { return fragments * kFragmentN; }

// Bytes of a strip's codes in a stage.
constexpr int unit_code_bytes(int bits, int fragments) {
  return strip_n(fragments) * kUnitK * bits / 8;
}

// The forms of the kernel: fragments of a strip and stages of a ring. The first have 64 KB of codes
// under way per multiprocessor, the last, for 4 bits and where shared memory is scarce, 32 KB.
struct DecodeForm {
  int fragments, stages;
};
constexpr DecodeForm kDecodeForms4[] = {{1, 4}, {2, 2}, {1, 2}};
constexpr DecodeForm kDecodeForms8[] = {{1, 2}};
// Those that there are for `p`: up to 8 rows all, up to 16 all but the first of 4 bits.
constexpr const DecodeForm* decode_forms_begin(const Problem& p) {
  return p.bits == 8 ? kDecodeForms8 : kDecodeForms4 + (p.m > 8);
}
constexpr const DecodeForm* decode_forms_end(const Problem& p) {
  return p.bits == 8 ? kDecodeForms8 + 1 : kDecodeForms4 + 3;
}

// Parts of a unit that have scales of their own: as many as the group size asks for.
constexpr int parameter_sets(const Problem& p) {
  if (p.group_size >= p.k || p.group_size % kUnitK == 0) return 1;
  return p.group_size % 64 == 0 ? 2 : p.group_size % 32 == 0 ? 4 : 8;
}
constexpr int stage_bytes(int bits, int fragments, int sets) {
  return unit_code_bytes(bits, fragments) + sets * strip_n(fragments) * kParameterBytes;
}

// Words between rows of sums: 4 modulo 16, so that a warp writes without conflicts.
constexpr int sums_pitch(int fragments) { return strip_n(fragments) + 4; }

// Bytes between rows of x in shared memory: 16 modulo 128, so that ldmatrix reads without
// conflicts.
constexpr int decode_x_pitch(int units) { return units * kUnitK * 2 + 16; }

// Shared memory: the rings, x for the longest split, the sums of every warp for `slots` strips, and
// with clusters those of the block.
struct DecodeShared {
  int x, parts, slots, sums, size;

  constexpr DecodeShared(const Problem& p, const DecodeForm& form, int splits, int rounds,
                         bool cluster)
      : x(kDecodeWarps * form.stages * stage_bytes(p.bits, form.fragments, parameter_sets(p))),
        parts(x + p.m * decode_x_pitch(ceil_div(ceil_div(p.k, kUnitK), splits))),
        slots(std::max(1, std::min(rounds, kSumsBytes / slot_bytes(p, form.fragments)))),
        sums(parts + slots * slot_bytes(p, form.fragments)),
        size(sums + (cluster ? slots * p.m * strip_n(form.fragments) * 4 : 0)) {}

 private:
  static constexpr int slot_bytes(const Problem& p, int fragments) {
    return kDecodeWarps * p.m * sums_pitch(fragments) * 4;
  }
};

struct DecodeArguments {
  Problem problem;
  Reduction reduction;
  int splits_log2;  // splits of K are a power of two
  int strips;       // ceil(n / strip_n)
  int units;        // ceil(k / 128)
  int x_pitch;      // bytes between rows of x in shared memory
  Divisor rows;     // m
  Divisor sets_per_group;
  int x, parts, slots, sums;  // DecodeShared
  float* partial;             // [splits][m][64 tiles_n(n)], with Reduction::kWorkspace
};

constexpr int log2_of(int power) {
  int log2 = 0;
  while (1 << log2 < power) ++log2;
  return log2;
}

constexpr int decode_strips(const Problem& p, int fragments) {
  return ceil_div(p.n, strip_n(fragments));
}

inline DecodeArguments decode_arguments(const Problem& problem, const Plan& plan, void* workspace) {
  DecodeArguments args = {};
  args.problem = problem;
  args.reduction = plan.reduction;
  args.splits_log2 = log2_of(plan.splits);
  args.strips = decode_strips(problem, plan.fragments);
  args.units = ceil_div(problem.k, kUnitK);
  args.x_pitch = decode_x_pitch(ceil_div(args.units, plan.splits));
  args.rows = Divisor(problem.m);
  const int sets = parameter_sets(problem);
  args.sets_per_group =
      Divisor(problem.group_size < problem.k ? problem.group_size / (kUnitK / sets) : args.units);
  const DecodeShared shared(problem, {plan.fragments, plan.stages}, plan.splits,
                            ceil_div(args.strips, plan.grid / plan.splits),
                            plan.reduction == Reduction::kCluster);
  args.x = shared.x;
  args.parts = shared.parts;
  args.slots = shared.slots;
  args.sums = shared.sums;
  args.partial = static_cast<float*>(workspace);
  return args;
}

}  // namespace jax_gptq::cuda
