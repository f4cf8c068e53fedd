// AVX2 with AVX-VNNI: vpdpbusd on 8 lanes.
#include "avx2.h"
#include "kernels.h"
#include "table.h"
#include "tile.h"

namespace jax_gptq::cpu {
namespace {

struct AvxVnni : Avx2Base {
  template <bool kWide>
  static I Dot(I acc, I a, I b) {
#ifdef __AVXVNNI__
    return (I)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)a, (__m256i)b);
#else  // The same instruction in its AVX-512 encoding: how the C++ tests run this file.
    return (I)_mm256_dpbusd_epi32((__m256i)acc, (__m256i)a, (__m256i)b);
#endif
  }
};

}  // namespace

const Kernel kAvxVnni = {"avx_vnni", 8, Quantize, Matmul<AvxVnni>, TableLogits};

}  // namespace jax_gptq::cpu
