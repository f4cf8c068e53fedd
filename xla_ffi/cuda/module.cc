// The Python module `jax_gptq._cuda`. It can be imported without a GPU and without a driver.
#include <nanobind/nanobind.h>

#include "handler.h"

namespace nb = nanobind;

NB_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of jax_gptq.";
  m.def(
      "targets",
      [] {
        nb::dict targets;
        const auto add = [&](const char* name, auto* handler) {
          targets[name] = nb::capsule(reinterpret_cast<void*>(handler), "xla._CUSTOM_CALL_TARGET");
        };
        add("jax_gptq.cuda.matmul.v1", JaxGptqCudaMatmul);
        add("jax_gptq.cuda.dequantize.v1", JaxGptqCudaDequantize);
        add("jax_gptq.cuda.pack.v1", JaxGptqCudaPack);
        add("jax_gptq.cuda.unpack.v1", JaxGptqCudaUnpack);
        return targets;
      },
      "FFI target name -> handler.");
}
