// x as fixed point: one row at a time, one power-of-two scale per block, balanced base-256 digits.
//
// `static`, and plain loops that the compiler vectorizes for each instruction set.
#pragma once

#include <cmath>
#include <cstdint>

#include "float_types.h"
#include "problem.h"

namespace jax_gptq::cpu {

// One element this much larger than the root mean square of its block's others makes its row leave
// fixed point, in which the others would keep too few bits.
constexpr float kOutlier = 32.0f;
// Exponents of a block's largest element outside of which scales could underflow or overflow.
constexpr int kMinExponent = -64;
constexpr int kMaxExponent = 64;

// The part of row `row` of x that meets `block`, zero-padded to whole chunks.
static inline void LoadBlock(const Problem& problem, const Block& block, int64_t row, float* to) {
  int64_t begin = row * problem.k;
  if (problem.perm == nullptr) {
    LoadFloats(problem.x, problem.x_type, begin + block.row, block.rows, to);
  } else {
    const int32_t* perm = problem.perm + block.row;
    for (int i = 0; i < block.rows; ++i) {
      to[i] = LoadFloat(problem.x, problem.x_type, begin + perm[i]);
    }
  }
  for (int i = block.rows; i < block.chunks * kChunkRows; ++i) to[i] = 0.0f;
}

// The digits of one row's part of a block.
static inline int8_t* Digits(const Problem& problem, const Block& block, int64_t row) {
  const int64_t bytes_per_chunk = problem.digits * kChunkRows;
  return problem.x_digits + (block.chunk * problem.rows + row * block.chunks) * bytes_per_chunk;
}

// Sixteen lanes in GCC's and Clang's vector extension, whatever the instruction set has: the same
// operations in the same order everywhere.
using Ints = int32_t __attribute__((vector_size(64)));
using Floats = float __attribute__((vector_size(64)));
using Bytes = int8_t __attribute__((vector_size(16)));
constexpr int kLanes = 16;

template <class To, class From>
static inline To Cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class V, class T>
static inline V LoadLanes(const T* from) {
  V to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}

template <class T, class V>
static inline T SumLanes(V lanes) {
  T parts[kLanes];
  std::memcpy(parts, &lanes, sizeof(parts));
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
  }
  return parts[0];
}

// Nearest integers, ties to even, of magnitudes below 2^23.
static inline Ints Round(Floats values) {
  const Ints bits = Cast<Ints>(values);
  const Ints negative = bits >> 31;
  const Floats magnitude = Cast<Floats>(bits & 0x7fffffff);
  const Ints rounded = __builtin_convertvector(magnitude + 0x1p23f - 0x1p23f, Ints);
  return (rounded ^ negative) - negative;
}

// Whether one of the values, whose largest magnitude is `max`, dwarfs the others.
static inline bool HasOutlier(const float* values, int padded, int rows, float multiplier,
                              float max) {
  Floats squares = {};
  Ints zeros = {};
  for (int i = 0; i < padded; i += kLanes) {
    const Floats value = LoadLanes<Floats>(values + i);
    const Floats scaled = value * multiplier;
    squares += scaled * scaled;
    zeros += value == 0.0f;  // minus one where it is
  }
  const float largest = max * multiplier * (max * multiplier);
  const float others = SumLanes<float>(squares) - largest;
  const int nonzero = padded + SumLanes<int32_t>(zeros);
  return nonzero > 1 && largest * static_cast<float>(rows - 1) > kOutlier * kOutlier * others;
}

template <int kDigits>
static void QuantizeRow(const Problem& problem, int64_t row) {
  // The offset makes every digit of the sum unsigned: digit + 128.
  constexpr int32_t kOffset = kDigits == 3 ? 0x808080 : kDigits == 2 ? 0x8080 : 0x80;
  constexpr int kTopExponent = 8 * kDigits - 2;  // largest element in [2^kTopExponent, 2^(.. + 1))
  constexpr int32_t kLimit = (1 << (8 * kDigits)) - 1 - kOffset;
  const int32_t to_signed = problem.offset_digits ? 0 : kOffset;
  bool in_f32 = false;

  for (int64_t b = 0; b < problem.block_count; ++b) {
    const Block& block = problem.blocks[b];
    const int padded = block.chunks * kChunkRows;
    float values[kMaxBlockRows];
    LoadBlock(problem, block, row, values);

    Ints most = {};  // As bits, magnitudes compare like integers, NaN above all.
    for (int i = 0; i < padded; i += kLanes) {
      const Ints bits = LoadLanes<Ints>(values + i) & 0x7fffffff;
      most = bits > most ? bits : most;
    }
    int32_t max_bits = 0;
    for (int i = 0; i < kLanes; ++i) max_bits = most[i] > max_bits ? most[i] : max_bits;

    const int exponent = (max_bits >> 23) - 127;
    const float max = FromBits(static_cast<uint32_t>(max_bits));
    float multiplier = 0.0f, scale = 0.0f;
    if (max_bits != 0 && (exponent < kMinExponent || exponent > kMaxExponent)) {
      in_f32 = true;
    } else if (max_bits != 0 && kDigits == 1) {
      multiplier = 127.0f / max;
      scale = max / 127.0f;
    } else if (max_bits != 0) {
      int shift = kTopExponent - exponent;
      multiplier = FromBits(static_cast<uint32_t>(127 + shift) << 23);
      if (max * multiplier > static_cast<float>(kLimit)) {  // It might round to more than fits.
        --shift;
        multiplier *= 0.5f;
      }
      scale = FromBits(static_cast<uint32_t>(127 - shift) << 23);
      in_f32 = HasOutlier(values, padded, block.rows, multiplier, max);
    }

    if (in_f32) break;

    Ints total = {}, low = {};
    int8_t* to = Digits(problem, block, row);
    for (int i = 0; i < padded; i += kLanes) {
      const Ints integers = Round(LoadLanes<Floats>(values + i) * multiplier);
      const Ints shifted = integers + kOffset;
      total += integers;
      low += (shifted & 255) - 128;
      int8_t* chunk = to + i / kChunkRows * kDigits * kChunkRows + i % kChunkRows;
      for (int d = 0; d < kDigits; ++d) {
        const Ints digit = (shifted ^ to_signed) >> (8 * (kDigits - 1 - d));
        const Bytes bytes = __builtin_convertvector(digit, Bytes);
        std::memcpy(chunk + d * kChunkRows, &bytes, sizeof(bytes));
      }
    }
    const int64_t at = b * problem.rows + row;
    const int32_t low_sum = SumLanes<int32_t>(low), sum = SumLanes<int32_t>(total);
    problem.x_scales[at] = scale;
    problem.x_sums[2 * at] = kDigits == 3 ? (sum - low_sum) / 256 : sum;
    problem.x_sums[2 * at + 1] = low_sum;
  }

  problem.x_in_f32[row] = in_f32;
  if (in_f32) {  // Whatever the fixed-point pass makes of this row is replaced: scales of zero.
    for (int64_t b = 0; b < problem.block_count; ++b) {
      const Block& block = problem.blocks[b];
      const int64_t at = b * problem.rows + row;
      std::memset(Digits(problem, block, row), 0, block.chunks * kDigits * kChunkRows);
      problem.x_scales[at] = 0.0f;
      problem.x_sums[2 * at] = problem.x_sums[2 * at + 1] = 0;
    }
  }
}

static void Quantize(const Problem& problem, int64_t row) {
  switch (problem.digits) {
    case 1:
      return QuantizeRow<1>(problem, row);
    case 2:
      return QuantizeRow<2>(problem, row);
    default:
      return QuantizeRow<3>(problem, row);
  }
}

}  // namespace jax_gptq::cpu
