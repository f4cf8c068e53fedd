// AVX2 with FMA and F16C: what the two kernels of 8 lanes share.
#pragma once

#include <immintrin.h>

#include "vectors.h"

namespace jax_gptq::cpu {
namespace {

struct Avx2Base : Vectors<8> {
  static constexpr int kVectors = 2;
  static constexpr int kRows = 2;

  static F Fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F FusedMulSub(F a, F b, F c) { return _mm256_fmsub_ps(a, b, c); }
};

}  // namespace
}  // namespace jax_gptq::cpu
