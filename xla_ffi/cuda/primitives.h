// The device primitives that the kernels are written in.
//
// On the device each is one instruction (inline PTX) or an intrinsic. For the emulator the same
// names have their meaning in plain C++ (emulator/primitives_host.h), so that one kernel source
// compiles for both. Pairs of 16-bit floats are uint32_t, the first value in the low half.
//
// Pointers to shared memory are generic pointers into `shared_memory()`. Kernels touch memory only
// through the functions below, which is what lets the emulator check every access.
#pragma once

#include <cstdint>

#include "layout.h"

namespace jax_gptq::cuda {

// 16 bytes, moved as one.
struct alignas(16) Words4 {
  uint32_t word[4];
};

}  // namespace jax_gptq::cuda

#ifndef __CUDACC__

#include "../emulator/primitives_host.h"

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define JAX_GPTQ_DEVICE __device__ __forceinline__

namespace jax_gptq::cuda {

// ---- Where this thread is --------------------------------------------------------------------

JAX_GPTQ_DEVICE int thread_index() { return threadIdx.x; }
JAX_GPTQ_DEVICE int block_index() { return blockIdx.x; }
JAX_GPTQ_DEVICE int block_count() { return gridDim.x; }

// ---- Barriers and shuffles -------------------------------------------------------------------

JAX_GPTQ_DEVICE void block_barrier() { __syncthreads(); }
JAX_GPTQ_DEVICE void warp_barrier() { __syncwarp(); }

// Waits for `threads` threads (whole warps) that name the same barrier, 1 to 15.
JAX_GPTQ_DEVICE void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <typename T>
JAX_GPTQ_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// ---- Memory ----------------------------------------------------------------------------------

// The block's dynamic shared memory, aligned to 128 bytes.
JAX_GPTQ_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

JAX_GPTQ_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

template <typename T>
JAX_GPTQ_DEVICE T load_shared(const void* shared) {
  static_assert(sizeof(T) <= 16);
  if constexpr (sizeof(T) == 16) {
    const uint4 v = *static_cast<const uint4*>(shared);
    return T{v.x, v.y, v.z, v.w};
  } else {
    return *static_cast<const T*>(shared);
  }
}

template <typename T>
JAX_GPTQ_DEVICE void store_shared(void* shared, T value) {
  *static_cast<T*>(shared) = value;
}

// From memory that nobody writes while the kernel runs.
template <typename T>
JAX_GPTQ_DEVICE T load_global(const void* global) {
  if constexpr (sizeof(T) == 16) {
    const uint4 v = __ldg(static_cast<const uint4*>(global));
    return T{v.x, v.y, v.z, v.w};
  } else {
    return __ldg(static_cast<const T*>(global));
  }
}

// As load_global, for data read once: leaves the L1 cache alone.
JAX_GPTQ_DEVICE Words4 load_global_streaming(const void* global) {
  Words4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(global));
  return v;
}

template <typename T>
JAX_GPTQ_DEVICE void store_global(void* global, T value) {
  if constexpr (sizeof(T) == 16) {
    *static_cast<uint4*>(global) =
        make_uint4(value.word[0], value.word[1], value.word[2], value.word[3]);
  } else {
    *static_cast<T*>(global) = value;
  }
}

// ---- Asynchronous copies ---------------------------------------------------------------------

// 16 bytes from global to shared memory, both aligned to 16; visible to this thread once
// copy_async_wait has returned, and to others after a barrier that follows it.
JAX_GPTQ_DEVICE void copy_async16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
               "l"(global)
               : "memory");
}

// As copy_async16, but only the first `bytes` (0 to 16) are read; the rest is filled with zeros.
JAX_GPTQ_DEVICE void copy_async16_zero_fill(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
}

// Closes this thread's group of copies.
JAX_GPTQ_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's latest groups are still under way.
template <int kPending>
JAX_GPTQ_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- Tensor cores ----------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit values: lane 8 j + i gives the address of row i of matrix j
// (16 bytes, aligned), and receives row lane / 4, columns 2 (lane % 4) and + 1 of each.
JAX_GPTQ_DEVICE void load_matrices(uint32_t (&matrix)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

// sum[16 x 8] += a[16 x 16] b[16 x 8], 16-bit factors, f32 sums. With g = lane / 4, t = lane % 4:
// a as in layout.h; b0 holds k = 2t, 2t + 1 and b1 k = 2t + 8, 2t + 9 of column g; sum[0..1] are
// row g, columns 2t and 2t + 1, sum[2..3] the same of row g + 8.
template <Dtype kType>
JAX_GPTQ_DEVICE void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                  uint32_t b1) {
  static_assert(kType != Dtype::kF32);
  if constexpr (kType == Dtype::kF16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// ---- Bits and 16-bit floats ------------------------------------------------------------------

// Any function of three bits, bit by bit: kTable is the function's value at a = 0xf0, b = 0xcc,
// c = 0xaa.
template <int kTable>
JAX_GPTQ_DEVICE uint32_t logic3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return d;
}

// Byte i of the result is byte (selector >> 4 i) & 7 of the eight bytes {a, b}, a lowest.
JAX_GPTQ_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}

JAX_GPTQ_DEVICE uint32_t float_bits(float value) { return __float_as_uint(value); }
JAX_GPTQ_DEVICE float bits_float(uint32_t bits) { return __uint_as_float(bits); }

// a b + c, rounded once.
JAX_GPTQ_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

// a - b and a b of two pairs, each rounded to the 16-bit type.
template <Dtype kType>
JAX_GPTQ_DEVICE uint32_t subtract_pair(uint32_t a, uint32_t b) {
  uint32_t d;
  if constexpr (kType == Dtype::kF16) {
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  } else {
    const __nv_bfloat162 v =
        __hsub2(reinterpret_cast<__nv_bfloat162&>(a), reinterpret_cast<__nv_bfloat162&>(b));
    d = reinterpret_cast<const uint32_t&>(v);
  }
  return d;
}

template <Dtype kType>
JAX_GPTQ_DEVICE uint32_t multiply_pair(uint32_t a, uint32_t b) {
  uint32_t d;
  if constexpr (kType == Dtype::kF16) {
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  } else {
    const __nv_bfloat162 v =
        __hmul2(reinterpret_cast<__nv_bfloat162&>(a), reinterpret_cast<__nv_bfloat162&>(b));
    d = reinterpret_cast<const uint32_t&>(v);
  }
  return d;
}

// Two floats rounded to nearest even, `low` in the low half.
template <Dtype kType>
JAX_GPTQ_DEVICE uint32_t round_pair(float low, float high) {
  uint32_t d;
  if constexpr (kType == Dtype::kF16) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  }
  return d;
}

// One float rounded to nearest even.
template <Dtype kType>
JAX_GPTQ_DEVICE uint16_t round_to(float value) {
  return static_cast<uint16_t>(round_pair<kType>(value, 0.0f));
}

// A stored 16-bit float, exactly.
template <Dtype kType>
JAX_GPTQ_DEVICE float to_float(uint16_t bits) {
  if constexpr (kType == Dtype::kF16) {
    return __half2float(__ushort_as_half(bits));
  } else {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  }
}

// ---- Clusters (sm_90 and newer; one-dimensional) ---------------------------------------------

JAX_GPTQ_DEVICE int cluster_rank() {
  uint32_t rank = 0;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

// Every thread of every block of the cluster arrives, then waits. What was written to shared
// memory before the arrival can be read by the others after the wait.
JAX_GPTQ_DEVICE void cluster_arrive() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#else
  __trap();
#endif
}

JAX_GPTQ_DEVICE void cluster_wait() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __trap();
#endif
}

// The float at the address, in block `rank` of the cluster, that `shared` has in this block.
JAX_GPTQ_DEVICE float load_cluster(const void* shared, int rank) {
  float value = 0.0f;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n\t.reg .b32 remote;\n\t"
      "mapa.shared::cluster.u32 remote, %1, %2;\n\t"
      "ld.shared::cluster.f32 %0, [remote];\n\t}"
      : "=f"(value)
      : "r"(shared_address(shared)), "r"(rank)
      : "memory");
#else
  __trap();
#endif
  return value;
}

}  // namespace jax_gptq::cuda

#endif  // __CUDACC__
