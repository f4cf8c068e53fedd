// Logits of a few rows against a 16-bit table: y = x W^T, where W is stored row by row.
//
// XLA widens a whole 16-bit operand to float32 in memory before its dot; an output head is read
// once per token, so this reads it as it lies and is bound by memory.
//
// `static`, for the reason that float_types.h gives.
#pragma once

#include <cstdint>

#include "float_types.h"
#include "prefetch.h"
#include "problem.h"

namespace jax_gptq::cpu {

// Independent sums, added up in order at the end: enough to hide the latency of an addition.
constexpr int kTableLanes = 64;

// Adds x * w to the lanes of each row; rows of x are k apart.
template <int kRows>
static inline __attribute__((always_inline)) void AddLanes(const float* x, const float* w,
                                                           int64_t k, int lanes,
                                                           float (*sums)[kTableLanes]) {
  for (int row = 0; row < kRows; ++row) {
    for (int lane = 0; lane < lanes; ++lane) sums[row][lane] += x[row * k + lane] * w[lane];
  }
}

// kRows rows of x with one row of the table.
template <int kRows, Float kType>
static inline __attribute__((always_inline)) void TableDot(const TableProblem& p, int64_t row,
                                                           int64_t column) {
  const float* x = p.x + row * p.k;
  float sums[kRows][kTableLanes] = {};
  float w[kTableLanes];
  int64_t i = 0;
  for (; i + kTableLanes <= p.k; i += kTableLanes) {
    const char* bytes = static_cast<const char*>(p.table) + 2 * (column * p.k + i);
    Prefetch(bytes);
    Prefetch(bytes + 64);
    LoadFloats(p.table, kType, column * p.k + i, kTableLanes, w);
    AddLanes<kRows>(x + i, w, p.k, kTableLanes, sums);
  }
  const int left = static_cast<int>(p.k - i);
  LoadFloats(p.table, kType, column * p.k + i, left, w);
  AddLanes<kRows>(x + i, w, p.k, left, sums);
  for (int r = 0; r < kRows; ++r) {
    for (int width = kTableLanes / 2; width > 0; width /= 2) {
      for (int lane = 0; lane < width; ++lane) sums[r][lane] += sums[r][lane + width];
    }
    p.y[(row + r) * p.columns + column] = sums[r][0];
  }
}

template <Float kType>
static void TableLogitsOf(const TableProblem& p, int64_t begin, int64_t end) {
  for (int64_t column = begin; column < end; ++column) {
    int64_t row = 0;
    for (; row + 4 <= p.rows; row += 4) TableDot<4, kType>(p, row, column);
    for (; row < p.rows; ++row) TableDot<1, kType>(p, row, column);
  }
}

// Computes y[:, begin:end]. An output depends on its own row of x and of the table only.
static void TableLogits(const TableProblem& problem, int64_t begin, int64_t end) {
  if (problem.table_type == Float::kBF16) {
    TableLogitsOf<Float::kBF16>(problem, begin, end);
  } else {
    TableLogitsOf<Float::kF16>(problem, begin, end);
  }
}

}  // namespace jax_gptq::cpu
