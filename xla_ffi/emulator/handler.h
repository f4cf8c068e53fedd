// The FFI handlers of the emulated kernels, and what the tests may set.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "../cuda/wgmma.h"
#include "machine.h"
#include "xla/ffi/api/c_api.h"

namespace jax_gptq::emulator {

struct Settings {
  Architecture architecture;
  uint64_t seed = 0;  // of the order of blocks, warps, lanes and copies
  // If given, every product is class B of sm_90a in this way; its `clusters` are not looked at.
  std::optional<cuda::WgmmaPlan> wgmma = {};
};

void set(const Settings& settings);
Settings settings();

// The kernels that the latest call launched, in order.
std::vector<std::string> launches();

}  // namespace jax_gptq::emulator

extern "C" {
XLA_FFI_Error* JaxGptqEmulatedMatmul(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* JaxGptqEmulatedDequantize(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* JaxGptqEmulatedPack(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* JaxGptqEmulatedUnpack(XLA_FFI_CallFrame* call_frame);
}
