// Device primitives that only class B on sm_90a needs: warpgroup matrix products, tensor-map copies
// and a few more. Each is a PTX instruction or two, so that the kernel in wgmma.cuh reads as plain
// C++.
//
// PTX ISA 8.0+, sections "Asynchronous Warpgroup Level Matrix Instructions" and "Data Movement:
// cp.async.bulk.tensor".
//
// Barriers and tiles are named by their address in shared memory, as in primitives.h.
#pragma once

#include <cstdint>

#include "primitives.h"
#include "tensor_map.h"

#ifndef JAX_GPTQ_EMULATED  // the emulator's primitives.h defines all of these

#include <cuda.h>

namespace jax_gptq::cuda {

using TensorMap = CUtensorMap;

// ---- Warps --------------------------------------------------------------------------------

// True for one lane of the warp; all lanes ask.
__device__ __forceinline__ bool elect_one() {
  uint32_t elected = 0;
  asm volatile(
      "{\n\t.reg .pred p;\n\t"
      "elect.sync _|p, 0xffffffff;\n\t"
      "@p mov.s32 %0, 1;\n\t}"
      : "+r"(elected));
  return elected != 0;
}

// ---- Tensor-map copies --------------------------------------------------------------------

// On the host. False if the driver refuses it.
inline bool encode_tensor_map(TensorMap* map, const MapDescription& description) {
  // Through the runtime, so that the library needs no link to the driver.
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* symbol = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &symbol,
                                                               12000, cudaEnableDefault, &result);
    const bool found = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return found ? reinterpret_cast<Encode>(symbol) : nullptr;
  }();
  if (encode == nullptr) return false;
  CUtensorMapDataType type = CU_TENSOR_MAP_DATA_TYPE_INT64;
  if (description.element_bytes == 1) type = CU_TENSOR_MAP_DATA_TYPE_UINT8;
  if (description.element_bytes == 4) type = CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  if (description.element_bytes == 2) {
    type = description.float_type == Dtype::kBf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                  : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  }
  cuuint64_t sizes[3], strides[2];
  cuuint32_t box[3];
  const cuuint32_t steps[3] = {1, 1, 1};
  for (int i = 0; i < description.rank; ++i) {
    sizes[i] = description.sizes[i];
    box[i] = description.box[i];
    if (i > 0) strides[i - 1] = description.strides[i - 1];
  }
  return encode(map, type, description.rank, const_cast<void*>(description.base), sizes, strides,
                box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                description.swizzle ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Has `bytes` of global memory, a multiple of 16 as the address is, read into the L2 cache.
__device__ __forceinline__ void prefetch_l2(const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copy_box(uint32_t destination, const TensorMap* map,
                                         uint32_t barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
}

__device__ __forceinline__ void copy_box(uint32_t destination, const TensorMap* map,
                                         uint32_t barrier, int x, int y, int z, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "l"(policy)
      : "memory");
}

// The same box into every block of the cluster whose bit is set in `blocks`, at the same shared
// address, completing on each block's own barrier.
__device__ __forceinline__ void copy_box_multicast(uint32_t destination, const TensorMap* map,
                                                   uint32_t barrier, int x, int y,
                                                   uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "h"(blocks)
      : "memory");
}

__device__ __forceinline__ void store_box(const TensorMap* map, uint32_t source, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
      "r"(source), "r"(x), "r"(y)
      : "memory");
}

__device__ __forceinline__ void store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until the copy engine has read the shared memory of every committed store.
__device__ __forceinline__ void store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Orders this thread's ordinary shared-memory accesses before the copy engine's.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- Warpgroups ---------------------------------------------------------------------------

template <int kRegisters>
__device__ __forceinline__ void registers_raise() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void registers_lower() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Waits for `threads` threads (whole warps) that name the same barrier, 1 to 15.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Four 8x8 matrices of 16-bit values, each written transposed: lane 8j + i gives the address of
// the 16 bytes that hold column i of matrix j.
__device__ __forceinline__ void stmatrix_x4_trans(uint32_t address, uint32_t m0, uint32_t m1,
                                                  uint32_t m2, uint32_t m3) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
      "r"(m0), "r"(m1), "r"(m2), "r"(m3)
      : "memory");
}

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Descriptor of a K-major operand tile in shared memory with 128-byte rows and 128-byte swizzle:
// 8-row atoms of 1024 bytes follow one another. The tile starts at a multiple of 1024 bytes; a
// step of 16 along K adds 32 bytes to the address.
__device__ __forceinline__ uint64_t swizzled_descriptor(uint32_t address) {
  constexpr uint64_t kLayout128B = 1ull << 62;
  constexpr uint64_t kStride = static_cast<uint64_t>(1024 >> 4) << 32;
  constexpr uint64_t kLeading = 1ull << 16;  // unused with this swizzle
  return kLayout128B | kStride | kLeading | ((address & 0x3ffff) >> 4);
}

#define JAX_GPTQ_D8(d, i)                                                                     \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define JAX_GPTQ_D16(d, i) JAX_GPTQ_D8(d, i), JAX_GPTQ_D8(d, i + 8)
#define JAX_GPTQ_D32(d, i) JAX_GPTQ_D16(d, i), JAX_GPTQ_D16(d, i + 16)
#define JAX_GPTQ_D64(d, i) JAX_GPTQ_D32(d, i), JAX_GPTQ_D32(d, i + 32)

#define JAX_GPTQ_R8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define JAX_GPTQ_R16 JAX_GPTQ_R8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define JAX_GPTQ_R32 JAX_GPTQ_R16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define JAX_GPTQ_R64                                                                          \
  JAX_GPTQ_R32                                                                                \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53," \
  "%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define JAX_GPTQ_R128                                                                           \
  JAX_GPTQ_R64                                                                                  \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,"   \
  "%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106," \
  "%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,"  \
  "%125,%126,%127"

// d[64 x N] += a[64 x 16] b[N x 16]^T, or = to `start`. `a` is this lane's fragment of four
// registers, `b` a shared-memory descriptor. What reads `d` after `settle` is not moved before it.
template <class T, int kN>
struct Wgmma;

#define JAX_GPTQ_WGMMA_ASM(NAME, N, REGS, OUTS, A0, A1, A2, A3, B, ACCUMULATE)           \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" REGS \
               "}, {%" A0 ",%" A1 ",%" A2 ",%" A3 "}, %" B ", " ACCUMULATE ", 1, 1, 0;"  \
               : OUTS(d, 0)                                                              \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define JAX_GPTQ_WGMMA(TYPE, NAME, N, REGS, OUTS, A0, A1, A2, A3, B)                        \
  template <>                                                                               \
  struct Wgmma<TYPE, N> {                                                                   \
    static __device__ __forceinline__ void add(float (&d)[N / 2], const uint32_t (&a)[4],   \
                                               uint64_t b) {                                \
      JAX_GPTQ_WGMMA_ASM(NAME, N, REGS, OUTS, A0, A1, A2, A3, B, "1");                      \
    }                                                                                       \
    static __device__ __forceinline__ void start(float (&d)[N / 2], const uint32_t (&a)[4], \
                                                 uint64_t b) {                              \
      JAX_GPTQ_WGMMA_ASM(NAME, N, REGS, OUTS, A0, A1, A2, A3, B, "0");                      \
    }                                                                                       \
    static __device__ __forceinline__ void settle(float (&d)[N / 2]) {                      \
      asm volatile("" : OUTS(d, 0) : : "memory");                                           \
    }                                                                                       \
  };
#define JAX_GPTQ_D128(d, i) JAX_GPTQ_D64(d, i), JAX_GPTQ_D64(d, i + 64)
#define JAX_GPTQ_WGMMA_ALL(TYPE, NAME)                                                      \
  JAX_GPTQ_WGMMA(TYPE, NAME, 16, JAX_GPTQ_R8, JAX_GPTQ_D8, "8", "9", "10", "11", "12")      \
  JAX_GPTQ_WGMMA(TYPE, NAME, 32, JAX_GPTQ_R16, JAX_GPTQ_D16, "16", "17", "18", "19", "20")  \
  JAX_GPTQ_WGMMA(TYPE, NAME, 64, JAX_GPTQ_R32, JAX_GPTQ_D32, "32", "33", "34", "35", "36")  \
  JAX_GPTQ_WGMMA(TYPE, NAME, 128, JAX_GPTQ_R64, JAX_GPTQ_D64, "64", "65", "66", "67", "68") \
  JAX_GPTQ_WGMMA(TYPE, NAME, 256, JAX_GPTQ_R128, JAX_GPTQ_D128, "128", "129", "130", "131", "132")
JAX_GPTQ_WGMMA_ALL(Bf16, "bf16")
JAX_GPTQ_WGMMA_ALL(F16, "f16")
#undef JAX_GPTQ_WGMMA_ALL
#undef JAX_GPTQ_WGMMA
#undef JAX_GPTQ_WGMMA_ASM
#undef JAX_GPTQ_R8
#undef JAX_GPTQ_R16
#undef JAX_GPTQ_R32
#undef JAX_GPTQ_R64
#undef JAX_GPTQ_R128
#undef JAX_GPTQ_D8
#undef JAX_GPTQ_D16
#undef JAX_GPTQ_D32
#undef JAX_GPTQ_D64
#undef JAX_GPTQ_D128

}  // namespace jax_gptq::cuda

#endif  // JAX_GPTQ_EMULATED
