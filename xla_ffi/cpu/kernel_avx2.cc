// AVX2 without a dot-product instruction: pairs of byte products are summed in 16 bits.
#include "avx2.h"
#include "kernels.h"
#include "table.h"
#include "tile.h"

namespace jax_gptq::cpu {
namespace {

struct Avx2 : Avx2Base {
  // vpmaddubsw saturates at 2^15. Codes below 16 stay far from it (2 * 15 * 128); wider ones are
  // taken by nibbles.
  template <bool kWide>
  static I Dot(I acc, I a, I b) {
    const I nibble = Set(0x0f0f0f0f);
    acc += PairSums(kWide ? a & nibble : a, b, 1);
    if constexpr (kWide) acc += PairSums(a >> 4 & nibble, b, 16);
    return acc;
  }

  // The sums of four byte products, times `factor`.
  static I PairSums(I a, I b, int16_t factor) {
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)a, (__m256i)b);
    return (I)_mm256_madd_epi16(pairs, _mm256_set1_epi16(factor));
  }
};

}  // namespace

const Kernel kAvx2 = {"avx2", 8, Quantize, Matmul<Avx2>, TableLogits};

}  // namespace jax_gptq::cpu
