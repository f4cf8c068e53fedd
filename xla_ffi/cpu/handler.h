#pragma once

#include "xla/ffi/api/c_api.h"

extern "C" XLA_FFI_Error* JaxGptqCpuMatmul(XLA_FFI_CallFrame* call_frame);
extern "C" XLA_FFI_Error* JaxGptqCpuTableLogits(XLA_FFI_CallFrame* call_frame);
