// Host side of the gemv kernel (gemv.cuh): its shared memory and its arguments.
#pragma once

#include <algorithm>

#include "plan.h"

namespace jax_gptq::cuda {

constexpr int kGemvWarps = 16;
constexpr int kGemvThreads = 32 * kGemvWarps;
constexpr int kUnitK = 2 * kStepK;          // input features of a stage
constexpr int kDigits = 4;                  // of an activation, one byte each
constexpr int kScaleSlot = kFragmentN * 4;  // bytes that a stage has for the scales of a group
constexpr int kParameterSlot = kScaleSlot + kFragmentN;
constexpr int kMaxRounds = 16;  // strips of a block whose sums wait to be added

// Bytes of a strip's codes in a stage.
constexpr int unit_code_bytes(int bits) { return kFragmentN * kUnitK * bits / 8; }

// Parts of a unit that have scales of their own: as many as the group size asks for.
constexpr int parameter_sets(const Problem& p) {
  if (p.group_size >= p.k || p.group_size % kUnitK == 0) return 1;
  return p.group_size % 64 == 0 ? 2 : p.group_size % 32 == 0 ? 4 : 8;
}

// Stages of a warp's ring: 64 KB of codes under way per multiprocessor.
constexpr int gemv_stages(int bits) { return bits == 4 ? 4 : 2; }

// Shared memory: the rings, the digits of x, and the sums of each warp.
struct GemvShared {
  int stage, digits, sums, size;

  constexpr GemvShared(const Problem& p, int rounds)
      : stage(unit_code_bytes(p.bits) + parameter_sets(p) * kParameterSlot),
        digits(kGemvWarps * gemv_stages(p.bits) * stage),
        sums(digits + p.m * ceil_div(p.k, kUnitK) * kUnitK * kDigits),
        size(sums + std::min(rounds, kMaxRounds) * kGemvWarps * p.m * kFragmentN * 4) {}
};

struct GemvArguments {
  Problem problem;
  Divisor sets_per_group;
  int strips;        // ceil(n / 16)
  int units;         // ceil(k / 128)
  int digits, sums;  // GemvShared
};

inline GemvArguments gemv_arguments(const Problem& problem, const Plan& plan) {
  const int strips = ceil_div(problem.n, kFragmentN);
  const GemvShared shared(problem, ceil_div(strips, plan.grid));
  GemvArguments args = {};
  args.problem = problem;
  args.strips = strips;
  args.units = ceil_div(problem.k, kUnitK);
  const int sets = parameter_sets(problem);
  args.sets_per_group =
      Divisor(problem.group_size < problem.k ? problem.group_size / (kUnitK / sets) : args.units);
  args.digits = shared.digits;
  args.sums = shared.sums;
  return args;
}

}  // namespace jax_gptq::cuda
