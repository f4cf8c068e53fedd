// What both kinds of products of kernel A read from shared memory.
#pragma once

#include "decode.h"
#include "fragment.cuh"

namespace jax_gptq::cuda {

// Where a lane finds, in a set of a stage, the zero points and scales of output features lane / 4
// (row 0) and lane / 4 + 8 (row 1). Stages are addressed with the lane's place in the codes added.
template <int kBits>
class StageParameters {
 public:
  __device__ __forceinline__ explicit StageParameters(Dtype scale_type) : scale_type_(scale_type) {
    const int lane = threadIdx.x % 32;
    const int first = unit_code_bytes(kBits) - lane * kLaneBytes;
    to_zero_ = first + kFragmentN * 4 + lane / 4;
    keep(to_zero_);
    to_scale_ = first + lane / 4 * (scale_type == Dtype::kF32 ? 4 : 2);
    keep(to_scale_);
  }

  __device__ __forceinline__ uint32_t zero(uint32_t set, int row) const {
    return ld_shared<uint8_t>(set + to_zero_ + row * 8);
  }
  __device__ __forceinline__ float scale(uint32_t set, int row) const {
    return load_scale(set + to_scale_, row * 8, scale_type_);
  }

 private:
  Dtype scale_type_;
  uint32_t to_zero_, to_scale_;
};

// Four words of each of kLoads pieces of shared memory, `pitch` bytes apart.
template <int kLoads>
__device__ __forceinline__ void load_words(uint32_t (&words)[4 * kLoads], uint32_t from,
                                           int pitch) {
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const uint4 v = ld_shared<uint4>(from + i * pitch);
    words[4 * i] = v.x;
    words[4 * i + 1] = v.y;
    words[4 * i + 2] = v.z;
    words[4 * i + 3] = v.w;
  }
}

}  // namespace jax_gptq::cuda
