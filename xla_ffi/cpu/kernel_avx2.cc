// AVX2 without a dot-product instruction: pairs of byte products are summed in 16 bits.
#include "avx2.h"
#include "kernels.h"
#include "tile.h"

namespace jax_gptq::cpu {
namespace {

struct Avx2 : Avx2Base {
  // vpmaddubsw saturates at 2^15. Codes below 16 stay far from it (2 * 15 * 128); wider ones are
  // taken by nibbles.
  template <bool kWide>
  static I Dot(I acc, I a, I b) {
    const I nibble = Set(0x0f0f0f0f);
    const I ones = _mm256_set1_epi16(1);
    const I low = kWide ? And(a, nibble) : a;
    acc = Add(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(low, b), ones));
    if constexpr (kWide) {
      const I high = And(ShiftRight(a, 4), nibble);
      const I sixteens = _mm256_set1_epi16(16);
      acc = Add(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(high, b), sixteens));
    }
    return acc;
  }
};

}  // namespace

const Kernel kAvx2 = {"avx2", 8, Quantize, Matmul<Avx2>};

}  // namespace jax_gptq::cpu
