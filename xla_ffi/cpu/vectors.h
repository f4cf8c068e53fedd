// Vectors of kLanes 32-bit numbers in GCC's and Clang's vector extension: what all kernels share.
//
// In an unnamed namespace: it is compiled once per instruction set, and the linker must not merge
// those copies.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace jax_gptq::cpu {
namespace {

// Spelled out, because GCC 12 drops the attribute where the size depends on a template parameter.
template <int kLanes>
struct VectorTypes;

template <>
struct VectorTypes<8> {
  typedef uint32_t I __attribute__((vector_size(32)));  // unsigned: wraps on overflow
  typedef int32_t Signed __attribute__((vector_size(32)));
  typedef int16_t Shorts __attribute__((vector_size(32)));
  typedef uint8_t Bytes __attribute__((vector_size(32)));
  typedef float F __attribute__((vector_size(32)));
};

template <>
struct VectorTypes<16> {
  typedef uint32_t I __attribute__((vector_size(64)));
  typedef int32_t Signed __attribute__((vector_size(64)));
  typedef int16_t Shorts __attribute__((vector_size(64)));
  typedef uint8_t Bytes __attribute__((vector_size(64)));
  typedef float F __attribute__((vector_size(64)));
};

template <int kLaneCount>
struct Vectors {
  static constexpr int kLanes = kLaneCount;
  using I = typename VectorTypes<kLanes>::I;
  using Signed = typename VectorTypes<kLanes>::Signed;
  using Shorts = typename VectorTypes<kLanes>::Shorts;
  using Bytes = typename VectorTypes<kLanes>::Bytes;
  using F = typename VectorTypes<kLanes>::F;

  template <class V>
  static V Read(const void* p) {
    V a;
    std::memcpy(&a, p, sizeof(a));
    return a;
  }

  static I Load(const uint32_t* p) { return Read<I>(p); }
  static I LoadI(const int32_t* p) { return Read<I>(p); }
  static F LoadF(const float* p) { return Read<F>(p); }
  static void StoreI(void* p, I a) { std::memcpy(p, &a, sizeof(a)); }
  static void StoreF(float* p, F a) { std::memcpy(p, &a, sizeof(a)); }
  static I Broadcast(const int8_t* p) { return Read<uint32_t>(p) - I{}; }
  static I Set(int32_t a) { return static_cast<uint32_t>(a) - I{}; }
  static F SetF(float a) { return a - F{}; }

  static I And(I a, I b) { return a & b; }
  static I Or(I a, I b) { return a | b; }
  static I ShiftLeft(I a, int n) { return a << n; }
  static I ShiftRight(I a, int n) { return a >> n; }
  static I Add(I a, I b) { return a + b; }
  static I Sub(I a, I b) { return a - b; }
  static I SubBytes(I a, I b) { return (I)((Bytes)a - (Bytes)b); }
  static I Mul(I a, I b) { return a * b; }

  static F Convert(I a) { return __builtin_convertvector((Signed)a, F); }
  static F AddF(F a, F b) { return a + b; }
  static F SubF(F a, F b) { return a - b; }
  static F MulF(F a, F b) { return a * b; }
  static F Fma(F a, F b, F c) {
    for (int i = 0; i < kLanes; ++i) a[i] = std::fma(a[i], b[i], c[i]);
    return a;
  }
  static F FusedMulSub(F a, F b, F c) { return Fma(a, b, -c); }
};

}  // namespace
}  // namespace jax_gptq::cpu
