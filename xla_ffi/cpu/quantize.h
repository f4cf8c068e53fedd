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

// Whether one of the scaled values dwarfs the others.
static inline bool HasOutlier(const float* values, int padded, int rows, float multiplier) {
  float squares[16] = {}, largest[16] = {};
  int32_t nonzero[16] = {};
  for (int i = 0; i < padded; i += 16) {
    for (int j = 0; j < 16; ++j) {
      float value = values[i + j] * multiplier;
      float square = value * value;
      squares[j] += square;
      largest[j] = square > largest[j] ? square : largest[j];
      nonzero[j] += values[i + j] != 0.0f;
    }
  }
  float sum = 0.0f, max = 0.0f;
  int32_t count = 0;
  for (int j = 0; j < 16; ++j) {
    sum += squares[j];
    max = largest[j] > max ? largest[j] : max;
    count += nonzero[j];
  }
  return count > 1 && max * static_cast<float>(rows - 1) > kOutlier * kOutlier * (sum - max);
}

template <int kDigits>
static void QuantizeRow(const Problem& problem, int64_t row) {
  // The offset makes every digit of the sum unsigned: digit + 128.
  constexpr int32_t kOffset = kDigits == 3 ? 0x808080 : kDigits == 2 ? 0x8080 : 0x80;
  constexpr int kTopExponent = 8 * kDigits - 2;  // largest element in [2^kTopExponent, 2^(.. + 1))
  constexpr float kLimit = static_cast<float>((1 << (8 * kDigits)) - 1 - kOffset);

  int8_t* digits = problem.x_digits + row * problem.chunks * kDigits * kChunkRows;
  float* scales = problem.x_scales + row * problem.block_count;
  int32_t* sums = problem.x_sums + row * problem.block_count * 2;
  bool in_f32 = false;

  for (int64_t b = 0; b < problem.block_count; ++b) {
    const Block& block = problem.blocks[b];
    const int padded = block.chunks * kChunkRows;
    float values[kMaxBlockRows];
    LoadBlock(problem, block, row, values);

    int32_t largest = 0;  // As bits, magnitudes compare like integers, NaN above all.
    for (int i = 0; i < padded; ++i) {
      int32_t bits = static_cast<int32_t>(ToBits(values[i]) & 0x7fffffff);
      largest = bits > largest ? bits : largest;
    }
    const int exponent = (largest >> 23) - 127;
    float multiplier = 0.0f;
    scales[b] = 0.0f;
    if (largest != 0 && (exponent < kMinExponent || exponent > kMaxExponent)) {
      in_f32 = true;
    } else if (largest != 0) {
      const float max = FromBits(static_cast<uint32_t>(largest));
      if (kDigits == 1) {
        multiplier = 127.0f / max;
        scales[b] = max / 127.0f;
      } else {
        int shift = kTopExponent - exponent;
        if (std::rint(max * FromBits(static_cast<uint32_t>(127 + shift) << 23)) > kLimit) --shift;
        multiplier = FromBits(static_cast<uint32_t>(127 + shift) << 23);
        scales[b] = FromBits(static_cast<uint32_t>(127 - shift) << 23);
        in_f32 |= HasOutlier(values, padded, block.rows, multiplier);
      }
    }
    if (in_f32) break;

    int32_t total = 0, low = 0;
    for (int chunk = 0; chunk < block.chunks; ++chunk) {
      int8_t* to = digits + (block.chunk + chunk) * kDigits * kChunkRows;
      for (int i = 0; i < kChunkRows; ++i) {
        const float value = std::rint(values[chunk * kChunkRows + i] * multiplier);
        const int32_t integer = static_cast<int32_t>(value);
        const uint32_t shifted = static_cast<uint32_t>(integer + kOffset);
        total += integer;
        low += static_cast<int32_t>(shifted & 255) - 128;
        for (int d = 0; d < kDigits; ++d) {
          const uint32_t digit = shifted >> (8 * (kDigits - 1 - d));
          to[d * kChunkRows + i] = static_cast<int8_t>((digit & 255) ^ 128);
        }
      }
    }
    sums[2 * b] = kDigits == 3 ? (total - low) / 256 : total;
    sums[2 * b + 1] = low;
  }

  problem.x_in_f32[row] = in_f32;
  if (in_f32) {  // Whatever the fixed-point pass makes of this row is replaced: give it zeros.
    std::memset(digits, 0, problem.chunks * kDigits * kChunkRows);
    std::memset(scales, 0, problem.block_count * sizeof(float));
    std::memset(sums, 0, problem.block_count * 2 * sizeof(int32_t));
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
