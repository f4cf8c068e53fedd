// 16-bit floats as bits, rounded to nearest even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace jax_gptq::emulator {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float bf16_to_float(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  if (std::isnan(value)) return 0x7fff;  // the one NaN that the device produces
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline float f16_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t magnitude = bits & 0x7fff;
  // As a float, magnitude << 13 has an exponent that is 112 too small, subnormals too.
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  return float_of(bits_of(float_of(magnitude << 13) * 0x1p112f) | sign);
}

inline uint16_t float_to_f16(float value) {
  if (std::isnan(value)) return 0x7fff;
  const uint16_t sign = bits_of(value) >> 16 & 0x8000;
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return sign | 0x7c00;  // rounds up past the largest, 65504
  if (magnitude < 0x1p-14f) {
    // Subnormal: a multiple of 2^-24; the float just has to be rounded to an integer.
    return sign | static_cast<uint16_t>(std::nearbyint(magnitude * 0x1p24f));
  }
  const uint32_t bits = bits_of(magnitude);
  return sign | static_cast<uint16_t>((bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13);
}

}  // namespace jax_gptq::emulator
