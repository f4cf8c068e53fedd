#pragma once

#include "problem.h"
#include "xla/ffi/api/c_api.h"
#include "xla/ffi/api/ffi.h"

extern "C" XLA_FFI_Error* JaxGptqCpuMatmul(XLA_FFI_CallFrame* call_frame);
extern "C" XLA_FFI_Error* JaxGptqCpuTableLogits(XLA_FFI_CallFrame* call_frame);

namespace jax_gptq::cpu {

// The element type of a buffer, false if it is none of a kernel's.
inline bool ToFloat(xla::ffi::DataType type, Float* to) {
  switch (type) {
    case xla::ffi::F32:
      *to = Float::kF32;
      return true;
    case xla::ffi::BF16:
      *to = Float::kBF16;
      return true;
    case xla::ffi::F16:
      *to = Float::kF16;
      return true;
    default:
      return false;
  }
}

}  // namespace jax_gptq::cpu
