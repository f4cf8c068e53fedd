// What the device primitives of cuda/primitives.h mean on the host: the same names and signatures,
// every access checked by the machine. Fragments are laid out as in the PTX ISA (Warp-level matrix
// instructions: mma.m16n8k16, ldmatrix); products are summed in f32, in order of k.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "floats.h"
#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __grid_constant__
#define __launch_bounds__(...)
#define threadIdx (::jax_gptq::emulator::thread_index())
#define blockIdx (::jax_gptq::emulator::machine->block_index())
#define blockDim (dim3(::jax_gptq::emulator::machine->launched().threads))
#define gridDim (::jax_gptq::emulator::machine->launched().grid)

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace jax_gptq::emulator {

// The set bits.
inline std::vector<int> ranks_of(uint16_t blocks) {
  std::vector<int> ranks;
  for (int rank = 0; rank < 16; ++rank) {
    if (blocks >> rank & 1) ranks.push_back(rank);
  }
  return ranks;
}

inline dim3 thread_index() { return dim3(machine->thread().index, 0, 0); }

}  // namespace jax_gptq::emulator

namespace jax_gptq::cuda {

using emulator::machine;
using std::max;
using std::min;

struct F16 {};
struct Bf16 {};

// ---- Launch ----------------------------------------------------------------------------------

struct Grid {
  dim3 grid;
  int threads;
  int cluster = 1;
  int shared_bytes = 0;
  bool in_order = false;
};

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), const char* name, const Grid& grid, cudaStream_t /*s*/,
                   A... args) {
  machine->launch(name, {grid.grid, grid.threads, grid.cluster, grid.shared_bytes, grid.in_order},
                  [&] { kernel(P(args)...); });
  return cudaSuccess;
}

// ---- Shared memory ---------------------------------------------------------------------------

inline uint32_t shared_base() { return emulator::kSharedBase; }

template <class T>
T ld_shared(uint32_t address) {
  T value;
  std::memcpy(&value, machine->shared_read(address, sizeof(T), sizeof(T)), sizeof(T));
  return value;
}

template <class T>
void st_shared(uint32_t address, T value) {
  static_assert(sizeof(T) >= 2, "the history of shared memory is kept per two bytes");
  std::memcpy(machine->shared_write(address, sizeof(T), sizeof(T)), &value, sizeof(T));
}

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) {
  struct Operands {
    uint32_t* r;
    const void* row;  // read, and checked, by the lane that names it
  } mine{r, machine->shared_read(row, 16, 16)};
  machine->collective<Operands>("ldmatrix", mine, [](const auto& lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int j = 0; j < 4; ++j) {
        const auto* from = static_cast<const uint32_t*>(lanes[8 * j + lane / 4]->row);
        lanes[lane]->r[j] = from[lane % 4];
      }
    }
  });
}

// ---- Global memory ---------------------------------------------------------------------------

template <class T>
T ld_global(const void* p) {
  T value;
  std::memcpy(&value, machine->global_read(p, sizeof(T), sizeof(T)), sizeof(T));
  return value;
}

template <class T>
T ld_global_nc(const void* p) {
  return ld_global<T>(p);
}

template <class T>
void st_global(void* p, T value) {
  std::memcpy(machine->global_write(p, sizeof(T), sizeof(T)), &value, sizeof(T));
}

inline void raise_flag(uint64_t* flag) { machine->raise_flag(flag); }
inline void lower_flag(uint64_t* flag) { st_global(flag, uint64_t{0}); }
inline bool flag_raised(const uint64_t* flag) { return machine->flag_raised(flag); }

// ---- Asynchronous copies ---------------------------------------------------------------------

inline void cp_async_16(uint32_t destination, const void* source, bool valid = true) {
  machine->copy_async(destination, source, valid ? 16 : 0, 16);
}

inline uint64_t cache_policy(bool) { return 0; }

inline void cp_async_16(uint32_t destination, const void* source, bool valid, uint64_t /*policy*/) {
  cp_async_16(destination, source, valid);
}

inline void cp_async_commit() { machine->copy_async_commit(); }

template <int kPending>
void cp_async_wait() {
  machine->copy_async_wait(kPending);
}

// ---- Barriers and shuffles -------------------------------------------------------------------

inline void block_sync() { machine->barrier(0, machine->launched().threads); }
inline void warp_sync() { machine->warp_barrier(); }

template <class T>
T shuffle(T value, int lane) {
  struct Operands {
    T value;
    int lane;
    T received;
  } mine{value, lane, value};
  machine->collective<Operands>("shuffle", mine, [](const auto& lanes) {
    for (auto* to : lanes) to->received = lanes[to->lane & 31]->value;
  });
  return mine.received;
}

// ---- Tensor cores ----------------------------------------------------------------------------

template <class T>
float to_float(uint16_t bits) {
  if constexpr (std::is_same_v<T, F16>) {
    return emulator::f16_to_float(bits);
  } else {
    return emulator::bf16_to_float(bits);
  }
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Operands {
    float* d;
    const uint32_t* a;
    const uint32_t* b;
  } mine{d, a, b};
  machine->collective<Operands>("mma.m16n8k16", mine, [](const auto& lanes) {
    const auto half = [](uint32_t pair, int high) {
      return to_float<T>(static_cast<uint16_t>(pair >> 16 * high));
    };
    float left[16][16], right[16][8], sum[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int high = 0; high < 2; ++high) {
        for (int i = 0; i < 4; ++i) {
          left[g + i % 2 * 8][2 * t + i / 2 * 8 + high] = half(lanes[lane]->a[i], high);
        }
        for (int i = 0; i < 2; ++i) {
          right[2 * t + i * 8 + high][g] = half(lanes[lane]->b[i], high);
        }
      }
      for (int i = 0; i < 4; ++i) sum[g + i / 2 * 8][2 * t + i % 2] = lanes[lane]->d[i];
    }
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < 16; ++k) {
        for (int column = 0; column < 8; ++column) {
          sum[row][column] += left[row][k] * right[k][column];
        }
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) lanes[lane]->d[i] = sum[g + i / 2 * 8][2 * t + i % 2];
    }
  });
}

inline uint32_t warp_max(uint32_t value) {
  struct Operands {
    uint32_t value;
  } mine{value};
  machine->collective<Operands>("redux.max", mine, [](const auto& lanes) {
    uint32_t most = 0;
    for (auto* from : lanes) most = max(most, from->value);
    for (auto* to : lanes) to->value = most;
  });
  return mine.value;
}
inline uint32_t warp_min(uint32_t value) { return ~warp_max(~value); }
inline bool warp_all(bool value) { return warp_min(value) == 1; }

// Both products of bytes; kHalves of 16 along k.
template <int kHalves>
void multiply_bytes(int (&d)[4], const uint32_t* a, const uint32_t* b) {
  struct Operands {
    int* d;
    const uint32_t* a;
    const uint32_t* b;
  } mine{d, a, b};
  machine->collective<Operands>("mma of bytes", mine, [](const auto& lanes) {
    int left[16][16 * kHalves], right[16 * kHalves][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int half = 0; half < kHalves; ++half) {
        for (int i = 0; i < 4; ++i) {
          const int k = half * 16 + 4 * t + i;
          left[g][k] = lanes[lane]->a[2 * half] >> 8 * i & 0xff;
          left[g + 8][k] = lanes[lane]->a[2 * half + 1] >> 8 * i & 0xff;
          right[k][g] = static_cast<int8_t>(lanes[lane]->b[half] >> 8 * i);
        }
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        for (int k = 0; k < 16 * kHalves; ++k) {
          lanes[lane]->d[i] += left[lane / 4 + i / 2 * 8][k] * right[k][lane % 4 * 2 + i % 2];
        }
      }
    }
  });
}

inline void mma_m16n8k32(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply_bytes<2>(d, a, b);
}
inline void mma_m16n8k16(int (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  multiply_bytes<1>(d, a, &b);
}

template <class T>
void keep(T&) {}

inline uint32_t max_u16x2(uint32_t a, uint32_t b) {
  return max(a & 0xffffu, b & 0xffffu) | max(a >> 16, b >> 16) << 16;
}

inline int to_int(float value) { return static_cast<int>(std::nearbyint(value)); }

// ---- Bits and 16-bit floats ------------------------------------------------------------------

template <int kTable>
uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d = 0;
  for (int i = 0; i < 8; ++i) {
    if (kTable >> i & 1) d |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return d;
}

inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t choice = selector >> 4 * i & 15;
    uint32_t byte = bytes >> 8 * (choice & 7) & 0xff;
    if (choice & 8) byte = byte & 0x80 ? 0xff : 0;  // replicates the sign
    d |= byte << 8 * i;
  }
  return d;
}

inline uint32_t float_bits(float value) { return emulator::bits_of(value); }
inline float bits_float(uint32_t bits) { return emulator::float_of(bits); }

template <class T>
uint16_t from_float(float value) {
  if constexpr (std::is_same_v<T, F16>) {
    return emulator::float_to_f16(value);
  } else {
    return emulator::float_to_bf16(value);
  }
}

template <class T>
uint32_t pack2(float low, float high) {
  return from_float<T>(low) | static_cast<uint32_t>(from_float<T>(high)) << 16;
}

template <class T>
float2 unpack2(uint32_t pair) {
  return {to_float<T>(static_cast<uint16_t>(pair)), to_float<T>(static_cast<uint16_t>(pair >> 16))};
}

// A float has more than twice the digits of either type, so rounding to it first changes nothing.
template <class T>
uint32_t sub2(uint32_t a, uint32_t b) {
  const float2 x = unpack2<T>(a), y = unpack2<T>(b);
  return pack2<T>(x.x - y.x, x.y - y.y);
}

template <class T>
uint32_t mul2(uint32_t a, uint32_t b) {
  const float2 x = unpack2<T>(a), y = unpack2<T>(b);
  return pack2<T>(x.x * y.x, x.y * y.y);
}

// Sums of products that a float holds exactly.
template <class T>
uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
  const float2 x = unpack2<T>(a), y = unpack2<T>(b), z = unpack2<T>(c);
  return pack2<T>(std::fma(x.x, y.x, z.x), std::fma(x.y, y.y, z.y));
}

// ---- Clusters --------------------------------------------------------------------------------

inline int cluster_rank() { return machine->own_rank(); }
inline int cluster_index() {
  return static_cast<int>(machine->block_index().x) / machine->launched().cluster;
}
inline void cluster_arrive() { machine->cluster_arrive(false); }
inline void cluster_arrive_relaxed() { machine->cluster_arrive(true); }
inline void cluster_wait() { machine->cluster_wait(); }

inline uint32_t cluster_map(uint32_t address, uint32_t rank) {
  return machine->cluster_map(address, rank);
}

template <class T>
T ld_cluster(uint32_t mapped) {
  T value;
  std::memcpy(&value, machine->cluster_read(mapped, sizeof(T), sizeof(T)), sizeof(T));
  return value;
}

// ---- mbarrier --------------------------------------------------------------------------------

inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  machine->mbarrier_init(barrier, arrivals);
}
inline void barrier_init_fence() { machine->mbarrier_init_fence(); }
inline void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  machine->mbarrier_arrive(barrier, machine->own_rank(), bytes);
}
inline void barrier_arrive_cluster(uint32_t mapped) { machine->mbarrier_arrive_mapped(mapped); }
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  machine->mbarrier_wait(barrier, parity);
}

inline void copy_multicast(uint32_t destination, const void* from, uint32_t bytes, uint32_t barrier,
                           uint16_t blocks) {
  machine->copy_multicast(destination, from, bytes, barrier, emulator::ranks_of(blocks));
}

}  // namespace jax_gptq::cuda

#include "wgmma_primitives.h"
