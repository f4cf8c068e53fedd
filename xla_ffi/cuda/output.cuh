// The last step of every product.
#pragma once

#include "plan.h"
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

// y [row, n] from the sum over all of K.
template <class T>
__device__ __forceinline__ void write_output(const Problem& p, int row, int n, float sum) {
  if (p.bias != nullptr) sum += ld_global_nc<float>(p.bias + n);
  store_output<T>(p.y, p.y_f32, static_cast<int64_t>(row) * p.n + n, sum);
}

}  // namespace jax_gptq::cuda
