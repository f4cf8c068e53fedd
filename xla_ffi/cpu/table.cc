#include "table.h"

#include <cstring>

namespace jax_gptq::cpu {
namespace {

// Independent sums, added up in order at the end: enough to hide the latency of an addition.
constexpr int kLanes = 64;

inline __attribute__((always_inline)) float FromBF16(uint16_t half) {
  const uint32_t bits = uint32_t{half} << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Adds x * w to the lanes of each row.
template <int kRows>
inline __attribute__((always_inline)) void Add(const float* x, const uint16_t* w, int64_t k,
                                               int lanes, float (*sums)[kLanes]) {
  for (int row = 0; row < kRows; ++row) {
    for (int lane = 0; lane < lanes; ++lane) {
      sums[row][lane] += x[row * k + lane] * FromBF16(w[lane]);
    }
  }
}

// kRows rows of x, k apart, with one row of the table; results `stride` apart.
template <int kRows>
inline __attribute__((always_inline)) void Dot(const float* x, const uint16_t* w, int64_t k,
                                               int64_t stride, float* y) {
  float sums[kRows][kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) Add<kRows>(x + i, w + i, k, kLanes, sums);
  Add<kRows>(x + i, w + i, k, static_cast<int>(k - i), sums);
  for (int row = 0; row < kRows; ++row) {
    for (int width = kLanes / 2; width > 0; width /= 2) {
      for (int lane = 0; lane < width; ++lane) sums[row][lane] += sums[row][lane + width];
    }
    y[row * stride] = sums[row][0];
  }
}

inline __attribute__((always_inline)) void Rows(const TableProblem& p, int64_t begin, int64_t end) {
  for (int64_t column = begin; column < end; ++column) {
    const uint16_t* w = p.table + column * p.k;
    int64_t row = 0;
    for (; row + 4 <= p.rows; row += 4) {
      Dot<4>(p.x + row * p.k, w, p.k, p.columns, p.y + row * p.columns + column);
    }
    for (; row < p.rows; ++row) {
      Dot<1>(p.x + row * p.k, w, p.k, p.columns, p.y + row * p.columns + column);
    }
  }
}

// The same source for each instruction set; without contraction all of them round alike.
#ifdef JAX_GPTQ_X86
__attribute__((target("avx512f,avx512bw,avx512vl,prefer-vector-width=512"))) void RowsAvx512(
    const TableProblem& p, int64_t begin, int64_t end) {
  Rows(p, begin, end);
}

__attribute__((target("avx2"))) void RowsAvx2(const TableProblem& p, int64_t begin, int64_t end) {
  Rows(p, begin, end);
}
#endif

}  // namespace

void TableLogits(const TableProblem& problem, int64_t begin, int64_t end) {
#ifdef JAX_GPTQ_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl")) {
    return RowsAvx512(problem, begin, end);
  }
  if (__builtin_cpu_supports("avx2")) return RowsAvx2(problem, begin, end);
#endif
  Rows(problem, begin, end);
}

}  // namespace jax_gptq::cpu
