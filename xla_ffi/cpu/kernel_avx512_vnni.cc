// AVX-512 with VNNI: vpdpbusd on 16 lanes.
#include <immintrin.h>

#include "kernels.h"
#include "table.h"
#include "tile.h"
#include "vectors.h"

namespace jax_gptq::cpu {
namespace {

struct Avx512Vnni : Vectors<16> {
  static constexpr int kVectors = 2;
  static constexpr int kRows = 4;

  static F Fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F FusedMulSub(F a, F b, F c) { return _mm512_fmsub_ps(a, b, c); }
  // Not the intrinsic: GCC 12 would move and spill accumulators around it, and reorder the loads
  // that tile.h has placed.
  template <bool kWide>
  static I Dot(I acc, I a, I b) {
    asm volatile("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
    return acc;
  }
};

}  // namespace

const Kernel kAvx512Vnni = {"avx512_vnni", 24, Quantize, Matmul<Avx512Vnni>, TableLogits};

}  // namespace jax_gptq::cpu
