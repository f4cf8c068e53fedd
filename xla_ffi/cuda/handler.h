// The FFI handlers of the CUDA kernels.
#pragma once

#include "xla/ffi/api/c_api.h"

extern "C" {
XLA_FFI_Error* JaxGptqCudaMatmul(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* JaxGptqCudaDequantize(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* JaxGptqCudaPack(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* JaxGptqCudaUnpack(XLA_FFI_CallFrame* call_frame);
}
