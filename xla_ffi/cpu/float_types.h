// bfloat16 and float16 in terms of float32, round to nearest even.
//
// Everything here is `static`: it is compiled once per instruction set, and the linker must not
// merge those copies.
#pragma once

#include <cstdint>
#include <cstring>
#ifdef __F16C__
#include <immintrin.h>
#endif

#include "problem.h"

namespace jax_gptq::cpu {

static inline float FromBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

static inline uint32_t ToBits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

static inline float FromBF16(uint16_t half) { return FromBits(uint32_t{half} << 16); }

static inline uint16_t ToBF16(float value) {
  uint32_t bits = ToBits(value);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  bool nan = (bits & 0x7fffffff) > 0x7f800000;
  return static_cast<uint16_t>(nan ? (bits >> 16) | 0x40 : rounded);
}

#ifdef __F16C__
static inline float FromF16(uint16_t half) { return _cvtsh_ss(half); }
static inline uint16_t ToF16(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }
#else
static inline float FromF16(uint16_t half) {
  uint32_t sign = uint32_t{half} >> 15 << 31, exponent = (half >> 10) & 31, mantissa = half & 1023;
  if (exponent == 31) return FromBits(sign | 0x7f800000 | mantissa << 13);
  if (exponent != 0) return FromBits(sign | (exponent + 112) << 23 | mantissa << 13);
  float value = static_cast<float>(mantissa) * 0x1p-24f;
  return sign ? -value : value;
}

static inline uint16_t ToF16(float value) {
  uint32_t bits = ToBits(value), sign = bits >> 31 << 15, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and up
  if (magnitude < 0x38800000) {  // subnormal: let an addition of 2^-1 do the rounding
    float sum = FromBits(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (ToBits(sum) - 0x3f000000));
  }
  uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13));
}
#endif

static inline float LoadFloat(const void* base, Float type, int64_t i) {
  switch (type) {
    case Float::kF32:
      return static_cast<const float*>(base)[i];
    case Float::kBF16:
      return FromBF16(static_cast<const uint16_t*>(base)[i]);
    default:
      return FromF16(static_cast<const uint16_t*>(base)[i]);
  }
}

// to[i] = from[begin + i] for i < count.
static inline void LoadFloats(const void* from, Float type, int64_t begin, int count, float* to) {
  if (type == Float::kF32) {
    std::memcpy(to, static_cast<const float*>(from) + begin, count * sizeof(float));
  } else if (type == Float::kBF16) {
    const uint16_t* source = static_cast<const uint16_t*>(from) + begin;
    for (int i = 0; i < count; ++i) to[i] = FromBF16(source[i]);
  } else {
    const uint16_t* source = static_cast<const uint16_t*>(from) + begin;
    int i = 0;
#ifdef __AVX512F__
    for (; i + 16 <= count; i += 16) {
      const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i));
      _mm512_storeu_ps(to + i, _mm512_cvtph_ps(halves));
    }
#endif
#ifdef __F16C__
    for (; i + 8 <= count; i += 8) {
      const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i));
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(halves));
    }
#endif
    for (; i < count; ++i) to[i] = FromF16(source[i]);
  }
}

static inline void StoreFloats(const float* from, int count, void* to, Float type, int64_t begin) {
  if (type == Float::kF32) {
    std::memcpy(static_cast<float*>(to) + begin, from, count * sizeof(float));
  } else if (type == Float::kBF16) {
    uint16_t* target = static_cast<uint16_t*>(to) + begin;
    for (int i = 0; i < count; ++i) target[i] = ToBF16(from[i]);
  } else {
    uint16_t* target = static_cast<uint16_t*>(to) + begin;
    for (int i = 0; i < count; ++i) target[i] = ToF16(from[i]);
  }
}

}  // namespace jax_gptq::cpu
