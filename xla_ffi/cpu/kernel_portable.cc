// Plain C++: any CPU, vectorized as far as the compiler can.
#include "kernels.h"
#include "table.h"
#include "tile.h"
#include "vectors.h"

namespace jax_gptq::cpu {
namespace {

struct Portable : Vectors<8> {
  static constexpr int kVectors = 1;
  static constexpr int kRows = 1;

  // By way of 16 bits, which hold a product (255 * -128) and which every CPU multiplies fast.
  template <bool kWide>
  static I Dot(I acc, I a, I b) {
    acc += PairSums((Shorts)a & 255, (Shorts)b << 8 >> 8);
    return acc + PairSums((Shorts)(a >> 8) & 255, (Shorts)b >> 8);
  }

  static I PairSums(Shorts a, Shorts b) {
    const I products = (I)(a * b);
    return (I)((Signed)products >> 16) + (I)((Signed)(products << 16) >> 16);
  }
};

}  // namespace

const Kernel kPortable = {"portable", 2, Quantize, Matmul<Portable>, TableLogits};

}  // namespace jax_gptq::cpu
