// The device primitives that the kernels are written in.
//
// On the device each is one instruction (inline PTX), one short wait loop, or an intrinsic. For the
// emulator the same names have their meaning in plain C++ (emulator/primitives.h), so that one
// kernel source compiles for both. Conventions:
//   - shared memory is addressed by uint32_t, from shared_base(); there are no pointers into it;
//   - a pair of 16-bit floats is a uint32_t, the first value in the low half; a single one is a
//     uint16_t; which type they are is said by a tag, F16 or Bf16;
//   - all lanes of a warp call a collective (ldmatrix, mma, shuffle, barrier) together.
#pragma once

#ifdef JAX_GPTQ_EMULATED

#include "../emulator/primitives.h"

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace jax_gptq::cuda {

struct F16 {};
struct Bf16 {};

// ---- Launch ----------------------------------------------------------------------------------

struct Grid {
  dim3 grid;
  int threads;
  int cluster = 1;  // consecutive blocks along x that form a cluster (sm_90 and newer)
  int shared_bytes = 0;
  // Blocks wait for blocks of lower index, which devices start first. For the emulator.
  bool in_order = false;
};

// Enqueues kernel(args...). `name` is for the emulator's messages.
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), const char* /*name*/, const Grid& grid,
                   cudaStream_t stream, A... args) {
  if (grid.shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid.grid;
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute cluster;
  if (grid.cluster > 1) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = grid.cluster;
    cluster.val.clusterDim.y = 1;
    cluster.val.clusterDim.z = 1;
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, P(args)...);
}

// ---- Shared memory ---------------------------------------------------------------------------

// The block's dynamic shared memory.
__device__ __forceinline__ uint32_t shared_base() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(memory));
}

template <class T>
__device__ __forceinline__ T ld_shared(uint32_t address) {
  return *static_cast<const T*>(__cvta_shared_to_generic(address));
}

template <class T>
__device__ __forceinline__ void st_shared(uint32_t address, T value) {
  *static_cast<T*>(__cvta_shared_to_generic(address)) = value;
}

// Four 8x8 matrices of 16-bit values: lane 8 j + i gives the address of row i of matrix j
// (16 bytes, aligned), and receives row lane / 4, columns 2 (lane % 4) and + 1 of each.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// ---- Global memory ---------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ T ld_global(const void* p) {
  return *static_cast<const T*>(p);
}

// From memory that nobody writes while the kernel runs.
template <class T>
__device__ __forceinline__ T ld_global_nc(const void* p) {
  return __ldg(static_cast<const T*>(p));
}

template <class T>
__device__ __forceinline__ void st_global(void* p, T value) {
  *static_cast<T*>(p) = value;
}

// A flag in global memory by which a thread lets threads of other blocks read what it, or its warp
// before a warp_sync, has written. It may hold anything before: 64 bits that nobody wrote on
// purpose are taken for this number once in 2^64 times. Whoever found it raised lowers it again,
// for the next launch.
constexpr uint64_t kRaised = 0x9e6c63d0676a9a99u;

__device__ __forceinline__ void raise_flag(uint64_t* flag) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"(kRaised) : "memory");
}

__device__ __forceinline__ bool flag_raised(const uint64_t* flag) {
  uint64_t value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(flag) : "memory");
  return value == kRaised;
}

__device__ __forceinline__ void lower_flag(uint64_t* flag) { *flag = 0; }

// ---- Asynchronous copies ---------------------------------------------------------------------

// How a copy leaves what it reads in the L2 cache: the first to make room if it is read but once.
__device__ __forceinline__ uint64_t cache_policy(bool read_once) {
  uint64_t policy;
  if (read_once) {
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  } else {
    asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  }
  return policy;
}

// 16 bytes from global to shared memory, both aligned to 16; the copying thread sees them once
// cp_async_wait has returned, others after a barrier that follows it. Not `valid`: 16 zeros are
// written and `source` is not touched.
__device__ __forceinline__ void cp_async_16(uint32_t destination, const void* source,
                                            bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void cp_async_16(uint32_t destination, const void* source, bool valid,
                                            uint64_t policy) {
  asm volatile(
      "cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(destination),
      "l"(source), "r"(valid ? 16 : 0), "l"(policy)
      : "memory");
}

// Closes this thread's group of copies.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's latest groups are still under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- Barriers and shuffles -------------------------------------------------------------------

__device__ __forceinline__ void block_sync() { __syncthreads(); }
__device__ __forceinline__ void warp_sync() { __syncwarp(); }

// The value of `lane`, to all lanes of the warp.
template <class T>
__device__ __forceinline__ T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

// Whether it is true for all lanes of the warp.
__device__ __forceinline__ bool warp_all(bool value) { return __all_sync(0xffffffffu, value); }

// The largest and the least value of the warp, to all its lanes.
__device__ __forceinline__ uint32_t warp_max(uint32_t value) {
  return __reduce_max_sync(0xffffffffu, value);
}
__device__ __forceinline__ uint32_t warp_min(uint32_t value) {
  return __reduce_min_sync(0xffffffffu, value);
}

// ---- Tensor cores ----------------------------------------------------------------------------

// d[16 x 8] += a[16 x 16] b[16 x 8], 16-bit factors, f32 sums. With g = lane / 4, t = lane % 4: a
// as drawn in layout.h; b[0] holds rows (k) 2t, 2t + 1 and b[1] rows 2t + 8, 2t + 9 of column g;
// d[0..1] are row g, columns 2t and 2t + 1, d[2..3] the same of row g + 8.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma_m16n8k16<F16>(float (&d)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<Bf16>(float (&d)[4], const uint32_t (&a)[4],
                                                   const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d[16 x 8] += a[16 x 32] b[32 x 8] of unsigned and signed bytes. a[0] holds k 4t .. 4t + 3 of row
// g, a[1] of row g + 8, a[2] and a[3] the same of k + 16; b[0] k 4t .. 4t + 3 of column g, b[1] of
// k + 16; d as above.
__device__ __forceinline__ void mma_m16n8k32(int (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same for 16 along k.
__device__ __forceinline__ void mma_m16n8k16(int (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
}

// Makes the compiler keep a value in its register, instead of computing it anew in a loop.
__device__ __forceinline__ void keep(uint32_t& value) { asm("" : "+r"(value)); }
__device__ __forceinline__ void keep(int& value) { asm("" : "+r"(value)); }

// ---- Bits and 16-bit floats ------------------------------------------------------------------

// Any function of three bits, bit by bit; kTable is its value at a = 0xf0, b = 0xcc, c = 0xaa.
template <int kTable>
__device__ __forceinline__ uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return d;
}

// Byte i of the result is byte (selector >> 4 i) & 7 of the eight bytes {a, b}, a lowest.
__device__ __forceinline__ uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}

__device__ __forceinline__ uint32_t float_bits(float value) { return __float_as_uint(value); }
__device__ __forceinline__ float bits_float(uint32_t bits) { return __uint_as_float(bits); }

// The larger of each of two pairs of unsigned 16-bit integers.
__device__ __forceinline__ uint32_t max_u16x2(uint32_t a, uint32_t b) { return __vmaxu2(a, b); }

// To the nearest integer, ties to even.
__device__ __forceinline__ int to_int(float value) { return __float2int_rn(value); }

// a - b and a b of two pairs, each value rounded to the 16-bit type.
template <class T>
__device__ __forceinline__ uint32_t sub2(uint32_t a, uint32_t b);
template <class T>
__device__ __forceinline__ uint32_t mul2(uint32_t a, uint32_t b);

template <>
__device__ __forceinline__ uint32_t sub2<F16>(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
template <>
__device__ __forceinline__ uint32_t mul2<F16>(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
template <>
__device__ __forceinline__ uint32_t sub2<Bf16>(uint32_t a, uint32_t b) {
  const __nv_bfloat162 d =
      __hsub2(reinterpret_cast<__nv_bfloat162&>(a), reinterpret_cast<__nv_bfloat162&>(b));
  return reinterpret_cast<const uint32_t&>(d);
}
template <>
__device__ __forceinline__ uint32_t mul2<Bf16>(uint32_t a, uint32_t b) {
  const __nv_bfloat162 d =
      __hmul2(reinterpret_cast<__nv_bfloat162&>(a), reinterpret_cast<__nv_bfloat162&>(b));
  return reinterpret_cast<const uint32_t&>(d);
}

// a b + c of pairs, each value rounded once.
template <class T>
__device__ __forceinline__ uint32_t fma2(uint32_t a, uint32_t b, uint32_t c);
template <>
__device__ __forceinline__ uint32_t fma2<Bf16>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// Two floats rounded to nearest even, `low` in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack2<F16>(float low, float high) {
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
template <>
__device__ __forceinline__ uint32_t pack2<Bf16>(float low, float high) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

// One float rounded to nearest even.
template <class T>
__device__ __forceinline__ uint16_t from_float(float value) {
  return static_cast<uint16_t>(pack2<T>(value, 0.0f));
}

// A 16-bit float, exactly.
template <class T>
__device__ __forceinline__ float to_float(uint16_t bits);
template <>
__device__ __forceinline__ float to_float<F16>(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}
template <>
__device__ __forceinline__ float to_float<Bf16>(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

// Both halves of a pair, exactly.
template <class T>
__device__ __forceinline__ float2 unpack2(uint32_t pair) {
  return make_float2(to_float<T>(static_cast<uint16_t>(pair)),
                     to_float<T>(static_cast<uint16_t>(pair >> 16)));
}

// ---- Clusters (sm_90 and newer; one-dimensional) ---------------------------------------------

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define JAX_GPTQ_CLUSTER_ASM(...) asm volatile(__VA_ARGS__)
#else  // A plan never uses clusters there.
#define JAX_GPTQ_CLUSTER_ASM(...) __trap()
#endif

__device__ __forceinline__ int cluster_rank() {
  uint32_t rank = 0;
  JAX_GPTQ_CLUSTER_ASM("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// The cluster's number in the grid.
__device__ __forceinline__ int cluster_index() {
  uint32_t index = 0;
  JAX_GPTQ_CLUSTER_ASM("mov.u32 %0, %%clusterid.x;" : "=r"(index));
  return index;
}

// What was written to shared memory before the arrival can be read by the other blocks after the
// wait. All threads of all blocks of the cluster arrive, then wait.
__device__ __forceinline__ void cluster_arrive() {
  JAX_GPTQ_CLUSTER_ASM("barrier.cluster.arrive.release.aligned;" :: : "memory");
}

// As cluster_arrive, but orders no memory: for barriers after which nothing that this thread wrote
// is read by others, but for mbarriers that barrier_init_fence was called for.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  JAX_GPTQ_CLUSTER_ASM("barrier.cluster.arrive.relaxed.aligned;" :: : "memory");
}

__device__ __forceinline__ void cluster_wait() {
  JAX_GPTQ_CLUSTER_ASM("barrier.cluster.wait.acquire.aligned;" :: : "memory");
}

// The address that `address` of this block has in block `rank` of the cluster.
__device__ __forceinline__ uint32_t cluster_map(uint32_t address, uint32_t rank) {
  uint32_t mapped = 0;
  JAX_GPTQ_CLUSTER_ASM("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address),
                       "r"(rank));
  return mapped;
}

template <class T>
__device__ __forceinline__ T ld_cluster(uint32_t mapped);
template <>
__device__ __forceinline__ float ld_cluster<float>(uint32_t mapped) {
  float value = 0.0f;
  JAX_GPTQ_CLUSTER_ASM("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(mapped) : "memory");
  return value;
}

// ---- mbarrier and bulk copies (sm_90 and newer) ----------------------------------------------
//
// PTX ISA 8.0+, sections "Parallel Synchronization: mbarrier" and "Data Movement: cp.async.bulk".

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  JAX_GPTQ_CLUSTER_ASM("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Makes barrier_init visible to the copy engine and to the other blocks of the cluster.
__device__ __forceinline__ void barrier_init_fence() {
  JAX_GPTQ_CLUSTER_ASM("fence.mbarrier_init.release.cluster;" :: : "memory");
}

__device__ __forceinline__ void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  JAX_GPTQ_CLUSTER_ASM("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                       "r"(bytes) : "memory");
}

// Arrives on a barrier of a block of the cluster, named by its cluster_map'ed address.
__device__ __forceinline__ void barrier_arrive_cluster(uint32_t mapped) {
  JAX_GPTQ_CLUSTER_ASM("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(mapped) : "memory");
}

// Returns once the phase of parity `parity` has completed.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  JAX_GPTQ_CLUSTER_ASM(
      "{\n\t.reg .pred done;\n\t"
      "again:\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
      "@done bra ready;\n\t"
      "bra again;\n\t"
      "ready:\n\t}" ::"r"(barrier),
      "r"(parity) : "memory");
}

// `bytes` of global memory into every block of the cluster whose bit is set in `blocks`, at the
// same shared address, completing on each block's own barrier; everything is a multiple of 16
// bytes.
__device__ __forceinline__ void copy_multicast(uint32_t destination, const void* from,
                                               uint32_t bytes, uint32_t barrier, uint16_t blocks) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
  __trap();  // There is only a slow imitation, which no plan asks for.
#else
  JAX_GPTQ_CLUSTER_ASM(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1], %2, [%3], %4;" ::"r"(destination),
      "l"(from), "r"(bytes), "r"(barrier), "h"(blocks) : "memory");
#endif
}

#undef JAX_GPTQ_CLUSTER_ASM

}  // namespace jax_gptq::cuda

#endif  // JAX_GPTQ_EMULATED
