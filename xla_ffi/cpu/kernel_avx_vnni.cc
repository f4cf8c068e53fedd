// AVX2 with AVX-VNNI: vpdpbusd on 8 lanes.
#include "avx2.h"
#include "kernels.h"
#include "tile.h"

namespace jax_gptq::cpu {
namespace {

struct AvxVnni : Avx2Base {
  template <bool kWide>
  static I Dot(I acc, I a, I b) {
#ifdef __AVXVNNI__
    return _mm256_dpbusd_avx_epi32(acc, a, b);
#else  // The same instruction in its AVX-512 encoding: how the C++ tests run this file.
    return _mm256_dpbusd_epi32(acc, a, b);
#endif
  }
};

}  // namespace

const Kernel kAvxVnni = {"avx_vnni", 8, Quantize, Matmul<AvxVnni>};

}  // namespace jax_gptq::cpu
