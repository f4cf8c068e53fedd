// From packed codes to fragments of the tensor cores' A operand.
//
// A code becomes a 16-bit float by OR-ing it into the mantissa of a number whose unit in the last
// place is 1 (f16: 1024, bf16: 128); subtracting that number plus the zero point gives q - z, an
// integer of 8 bits and a sign at most and therefore exact in both types. The scale is applied
// afterwards: folding the number into an FMA with the scale would cost half a step of precision.
// After: Kim et al., "Who Says Elephants Can't Run" (2022); Frantar et al., "Marlin" (2024).
#pragma once

#include <type_traits>

#include "layout.h"
#include "primitives.h"

namespace jax_gptq::cuda {

constexpr int kAndOr = (0xf0 & 0xcc) | 0xaa;  // lop3 table of (a & b) | c

// The number, in both halves of a pair.
template <class T>
constexpr uint32_t kNumber = std::is_same<T, F16>::value ? 0x64006400u : 0x43004300u;

// The same in f32: 2^23.
constexpr uint32_t kNumberF32 = 0x4b000000u;

// bf16 holds 8 bits of mantissa, too few for the number and an 8-bit code: those go through f32.
template <class T, int kBits>
constexpr bool kThroughFloat = kBits == 8 && std::is_same<T, Bf16>::value;

// A zero point as exact_fragment subtracts it: the number added, as a pair or as f32 bits.
template <class T, int kBits>
__device__ __forceinline__ uint32_t prepare_zero(uint32_t zero) {
  if constexpr (kThroughFloat<T, kBits>) {
    return zero | kNumberF32;
  } else {
    return zero * 0x00010001u + kNumber<T>;
  }
}

// Register i of exact_fragment.
template <class T, int kBits>
__device__ __forceinline__ uint32_t exact_pair(int i, const uint32_t* words, const uint32_t* zero) {
  if constexpr (kBits == 4) {
    return sub2<T>(lop3<kAndOr>(words[0] >> (4 * i), 0x000f000fu, kNumber<T>), zero[i % 2]);
  } else if constexpr (!kThroughFloat<T, kBits>) {
    const uint32_t codes = words[i / 2] >> (8 * (i % 2));
    return sub2<T>(lop3<kAndOr>(codes, 0x00ff00ffu, kNumber<T>), zero[i % 2]);
  } else {
    const float number = bits_float(zero[i % 2]);
    const float low = bits_float(prmt(words[i / 2], kNumberF32, 0x7650 + i % 2)) - number;
    const float high = bits_float(prmt(words[i / 2], kNumberF32, 0x7652 + i % 2)) - number;
    // Integers of 8 bits: the upper halves of their f32 are their bf16, exactly.
    return prmt(float_bits(low), float_bits(high), 0x7632);
  }
}

// The fragment of q - z for one step of 16 along k, from one word at 4 bits, two at 8. zero[0] is
// for the row of registers 0 and 2, zero[1] for that of registers 1 and 3.
template <class T, int kBits>
__device__ __forceinline__ void exact_fragment(uint32_t (&a)[4], const uint32_t* words,
                                               const uint32_t* zero) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = exact_pair<T, kBits>(i, words, zero);
}

// Scale `index` of those of `type` at `base` in shared memory, exactly.
__device__ __forceinline__ float load_scale(uint32_t base, int index, Dtype type) {
  if (type == Dtype::kF32) return ld_shared<float>(base + 4 * index);
  const uint16_t bits = ld_shared<uint16_t>(base + 2 * index);
  return type == Dtype::kF16 ? to_float<F16>(bits) : to_float<Bf16>(bits);
}

// The same from global memory.
__device__ __forceinline__ float load_scale_global(const void* scales, int64_t index, Dtype type) {
  if (type == Dtype::kF32) return ld_global_nc<float>(static_cast<const float*>(scales) + index);
  const uint16_t bits = ld_global_nc<uint16_t>(static_cast<const uint16_t*>(scales) + index);
  return type == Dtype::kF16 ? to_float<F16>(bits) : to_float<Bf16>(bits);
}

}  // namespace jax_gptq::cuda
