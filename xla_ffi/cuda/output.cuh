// The last step of every product.
#pragma once

#include "primitives.h"

namespace jax_gptq::cuda {

// y[at] = sum, in f32 or rounded once to T.
template <class T>
__device__ __forceinline__ void store_output(void* y, bool y_f32, int64_t at, float sum) {
  if (y_f32) {
    st_global(static_cast<float*>(y) + at, sum);
  } else {
    st_global(static_cast<uint16_t*>(y) + at, from_float<T>(sum));
  }
}

}  // namespace jax_gptq::cuda
