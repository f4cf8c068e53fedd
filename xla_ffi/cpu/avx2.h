// AVX2 with FMA and F16C: what the two kernels of 8 lanes share.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace jax_gptq::cpu {
namespace {

struct Avx2Base {
  using I = __m256i;
  using F = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kVectors = 2;
  static constexpr int kRows = 2;

  static I Load(const uint32_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
  static I LoadI(const int32_t* p) { return _mm256_load_si256((const __m256i*)p); }
  static void StoreI(void* p, I a) { _mm256_store_si256((__m256i*)p, a); }
  static F LoadF(const float* p) { return _mm256_load_ps(p); }
  static void StoreF(float* p, F a) { _mm256_store_ps(p, a); }
  static I Broadcast(const int8_t* p) {
    int32_t word;
    std::memcpy(&word, p, 4);
    return _mm256_set1_epi32(word);
  }
  static I Set(int32_t a) { return _mm256_set1_epi32(a); }
  static F SetF(float a) { return _mm256_set1_ps(a); }

  static I And(I a, I b) { return _mm256_and_si256(a, b); }
  static I Or(I a, I b) { return _mm256_or_si256(a, b); }
  static I ShiftLeft(I a, int n) { return (I)((__v8su)a << n); }
  static I ShiftRight(I a, int n) { return (I)((__v8su)a >> n); }
  static I Add(I a, I b) { return _mm256_add_epi32(a, b); }
  static I Sub(I a, I b) { return _mm256_sub_epi32(a, b); }
  static I SubBytes(I a, I b) { return _mm256_sub_epi8(a, b); }
  static I Mul(I a, I b) { return _mm256_mullo_epi32(a, b); }

  static F Convert(I a) { return _mm256_cvtepi32_ps(a); }
  static F AddF(F a, F b) { return _mm256_add_ps(a, b); }
  static F SubF(F a, F b) { return _mm256_sub_ps(a, b); }
  static F MulF(F a, F b) { return _mm256_mul_ps(a, b); }
  static F Fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F FusedMulSub(F a, F b, F c) { return _mm256_fmsub_ps(a, b, c); }
};

}  // namespace
}  // namespace jax_gptq::cpu
