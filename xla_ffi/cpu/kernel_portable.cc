// Plain C++: any CPU, vectorized as far as the compiler can.
#include <cmath>

#include "kernels.h"
#include "tile.h"

namespace jax_gptq::cpu {
namespace {

struct Portable {
  static constexpr int kLanes = 8;
  static constexpr int kVectors = 1;
  static constexpr int kRows = 1;
  struct I {
    uint32_t lane[kLanes];  // unsigned: wraps on overflow
  };
  struct F {
    float lane[kLanes];
  };

  template <class V, class T>
  static V Read(const T* p) {
    V a;
    std::memcpy(a.lane, p, sizeof(a.lane));
    return a;
  }
  template <class V, class Op>
  static V Each(Op op) {
    V a;
    for (int i = 0; i < kLanes; ++i) a.lane[i] = op(i);
    return a;
  }

  static I Load(const uint32_t* p) { return Read<I>(p); }
  static I LoadI(const int32_t* p) { return Read<I>(p); }
  static void StoreI(void* p, I a) { std::memcpy(p, a.lane, sizeof(a.lane)); }
  static F LoadF(const float* p) { return Read<F>(p); }
  static void StoreF(float* p, F a) { std::memcpy(p, a.lane, sizeof(a.lane)); }
  static I Broadcast(const int8_t* p) {
    uint32_t word;
    std::memcpy(&word, p, 4);
    return Each<I>([&](int) { return word; });
  }
  static I Set(int32_t a) {
    return Each<I>([&](int) { return static_cast<uint32_t>(a); });
  }
  static F SetF(float a) {
    return Each<F>([&](int) { return a; });
  }

  static I And(I a, I b) {
    return Each<I>([&](int i) { return a.lane[i] & b.lane[i]; });
  }
  static I Or(I a, I b) {
    return Each<I>([&](int i) { return a.lane[i] | b.lane[i]; });
  }
  static I ShiftLeft(I a, int n) {
    return Each<I>([&](int i) { return a.lane[i] << n; });
  }
  static I ShiftRight(I a, int n) {
    return Each<I>([&](int i) { return a.lane[i] >> n; });
  }
  static I Add(I a, I b) {
    return Each<I>([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static I Sub(I a, I b) {
    return Each<I>([&](int i) { return a.lane[i] - b.lane[i]; });
  }
  static I SubBytes(I a, I b) {
    return Each<I>([&](int i) {
      uint32_t difference = 0;
      for (int shift = 0; shift < 32; shift += 8) {
        difference |= (((a.lane[i] >> shift) - (b.lane[i] >> shift)) & 255) << shift;
      }
      return difference;
    });
  }
  static I Mul(I a, I b) {
    return Each<I>([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  template <bool kWide>
  static I Dot(I acc, I a, I b) {
    for (int byte = 0; byte < 4; ++byte) {
      for (int i = 0; i < kLanes; ++i) {
        const int32_t unsigned_byte = static_cast<int32_t>(a.lane[i] >> (8 * byte) & 255);
        const int32_t signed_byte = static_cast<int8_t>(b.lane[i] >> (8 * byte) & 255);
        acc.lane[i] += static_cast<uint32_t>(unsigned_byte * signed_byte);
      }
    }
    return acc;
  }

  static F Convert(I a) {
    return Each<F>([&](int i) { return static_cast<float>(static_cast<int32_t>(a.lane[i])); });
  }
  static F AddF(F a, F b) {
    return Each<F>([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static F SubF(F a, F b) {
    return Each<F>([&](int i) { return a.lane[i] - b.lane[i]; });
  }
  static F MulF(F a, F b) {
    return Each<F>([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  static F Fma(F a, F b, F c) {
    return Each<F>([&](int i) { return std::fma(a.lane[i], b.lane[i], c.lane[i]); });
  }
  static F FusedMulSub(F a, F b, F c) {
    return Each<F>([&](int i) { return std::fma(a.lane[i], b.lane[i], -c.lane[i]); });
  }
};

}  // namespace

const Kernel kPortable = {"portable", 2, Quantize, Matmul<Portable>};

}  // namespace jax_gptq::cpu
