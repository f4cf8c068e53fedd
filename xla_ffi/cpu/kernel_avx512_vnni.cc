// AVX-512 with VNNI: vpdpbusd on 16 lanes.
#include <immintrin.h>

#include "kernels.h"
#include "tile.h"

namespace jax_gptq::cpu {
namespace {

struct Avx512Vnni {
  using I = __m512i;
  using F = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kVectors = 2;
  static constexpr int kRows = 4;

  static I Load(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static I LoadI(const int32_t* p) { return _mm512_load_si512(p); }
  static void StoreI(void* p, I a) { _mm512_store_si512(p, a); }
  static F LoadF(const float* p) { return _mm512_load_ps(p); }
  static void StoreF(float* p, F a) { _mm512_store_ps(p, a); }
  static I Broadcast(const int8_t* p) {
    int32_t word;
    std::memcpy(&word, p, 4);
    return _mm512_set1_epi32(word);
  }
  static I Set(int32_t a) { return _mm512_set1_epi32(a); }
  static F SetF(float a) { return _mm512_set1_ps(a); }

  static I And(I a, I b) { return _mm512_and_si512(a, b); }
  static I Or(I a, I b) { return _mm512_or_si512(a, b); }
  static I ShiftLeft(I a, int n) { return (I)((__v16su)a << n); }
  static I ShiftRight(I a, int n) { return (I)((__v16su)a >> n); }
  static I Add(I a, I b) { return _mm512_add_epi32(a, b); }
  static I Sub(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I SubBytes(I a, I b) { return _mm512_sub_epi8(a, b); }
  static I Mul(I a, I b) { return _mm512_mullo_epi32(a, b); }
  // Not the intrinsic: GCC 12 would move and spill accumulators around it, and reorder the loads
  // that tile.h has placed.
  template <bool kWide>
  static I Dot(I acc, I a, I b) {
    asm volatile("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
    return acc;
  }

  static F Convert(I a) { return _mm512_cvtepi32_ps(a); }
  static F AddF(F a, F b) { return _mm512_add_ps(a, b); }
  static F SubF(F a, F b) { return _mm512_sub_ps(a, b); }
  static F MulF(F a, F b) { return _mm512_mul_ps(a, b); }
  static F Fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F FusedMulSub(F a, F b, F c) { return _mm512_fmsub_ps(a, b, c); }
};

}  // namespace

const Kernel kAvx512Vnni = {"avx512_vnni", 8, Quantize, Matmul<Avx512Vnni>};

}  // namespace jax_gptq::cpu
