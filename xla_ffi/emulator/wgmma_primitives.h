// What the primitives of cuda/wgmma_primitives.cuh mean on the host. See wgmma.h for what the
// emulation of warpgroup products does not cover.
#pragma once

#include <cstdint>

#include "../cuda/tensor_map.h"
#include "machine.h"

namespace jax_gptq::cuda {

using TensorMap = MapDescription;

inline bool elect_one() { return machine->elect_one(); }

// ---- Tensor-map copies -----------------------------------------------------------------------

// Refuses what the driver refuses: CUDA driver API, cuTensorMapEncodeTiled.
inline bool encode_tensor_map(TensorMap* map, const MapDescription& description) {
  const MapDescription& d = description;
  const int64_t row_bytes = int64_t{d.box[0]} * d.element_bytes;
  bool valid = reinterpret_cast<uintptr_t>(d.base) % 16 == 0 && row_bytes % 16 == 0 &&
               (!d.swizzle || row_bytes <= 128);
  for (int i = 0; i < d.rank; ++i) {
    valid = valid && d.sizes[i] >= 1 && d.sizes[i] <= int64_t{1} << 32;
    valid = valid && d.box[i] >= 1 && d.box[i] <= 256;
    if (i > 0) {
      valid = valid && d.strides[i - 1] % 16 == 0 && d.strides[i - 1] < int64_t{1} << 40;
    }
  }
  *map = description;
  return valid;
}

inline void prefetch_map(const TensorMap*) {}
inline void prefetch_l2(const void* from, uint32_t bytes) { machine->global_read(from, bytes, 16); }

inline void copy_box(uint32_t destination, const TensorMap* map, uint32_t barrier, int x, int y) {
  machine->copy_box(destination, *map, barrier, {x, y, 0}, {machine->own_rank()});
}
inline void copy_box(uint32_t destination, const TensorMap* map, uint32_t barrier, int x, int y,
                     int z, uint64_t /*policy*/) {
  machine->copy_box(destination, *map, barrier, {x, y, z}, {machine->own_rank()});
}
inline void copy_box_multicast(uint32_t destination, const TensorMap* map, uint32_t barrier, int x,
                               int y, uint16_t blocks) {
  machine->copy_box(destination, *map, barrier, {x, y, 0}, emulator::ranks_of(blocks));
}
inline void store_box(const TensorMap* map, uint32_t source, int x, int y) {
  machine->store_box(*map, source, x, y);
}
inline void store_commit() { machine->store_commit(); }
inline void store_wait_read() { machine->store_wait_read(); }
inline void fence_async_proxy() { machine->fence_async_proxy(); }

// ---- Warpgroups ------------------------------------------------------------------------------

template <int kRegisters>
void registers_raise() {}
template <int kRegisters>
void registers_lower() {}

inline void named_barrier(int id, int threads) { machine->barrier(id, threads); }

inline void stmatrix_x4_trans(uint32_t address, uint32_t m0, uint32_t m1, uint32_t m2,
                              uint32_t m3) {
  struct Operands {
    uint32_t m[4];
    uint16_t* to;
  } mine{{m0, m1, m2, m3}, static_cast<uint16_t*>(machine->shared_write(address, 16, 16))};
  machine->collective<Operands>("stmatrix", mine, [](const auto& lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int j = 0; j < 4; ++j) {
        for (int high = 0; high < 2; ++high) {
          const int row = lane / 4, column = lane % 4 * 2 + high;
          lanes[8 * j + column]->to[row] = static_cast<uint16_t>(lanes[lane]->m[j] >> 16 * high);
        }
      }
    }
  });
}

inline void wgmma_fence() { machine->wgmma_fence(); }
inline void wgmma_commit() { machine->wgmma_commit(); }
template <int kPending>
void wgmma_wait() {
  machine->wgmma_wait(kPending);
}

// The 64-bit descriptor of the device, PTX ISA, "Matrix descriptor": 128-byte swizzle, 1024 bytes
// from 8 rows to the next 8.
inline uint64_t swizzled_descriptor(uint32_t address) {
  return uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 16 |
         (address & 0x3ffff) >> 4;
}

template <class T, int kN>
struct Wgmma {
  static void add(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b) {
    machine->wgmma(d, a, b, kN, std::is_same_v<T, Bf16>, true);
  }
  static void start(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b) {
    machine->wgmma(d, a, b, kN, std::is_same_v<T, Bf16>, false);
  }
  static void settle(float (&)[kN / 2]) {}
};

}  // namespace jax_gptq::cuda
