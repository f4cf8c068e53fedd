// The Python module `jax_gptq._cpu`.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "handler.h"
#include "kernels.h"

namespace nb = nanobind;

NB_MODULE(_cpu, m) {
  m.doc() = "Native host kernels of jax_gptq.";
  m.def(
      "targets",
      [] {
        nb::dict targets;
        targets["jax_gptq.cpu.matmul.v1"] =
            nb::capsule(reinterpret_cast<void*>(JaxGptqCpuMatmul), "xla._CUSTOM_CALL_TARGET");
        targets["jax_gptq.cpu.table_logits.v1"] =
            nb::capsule(reinterpret_cast<void*>(JaxGptqCpuTableLogits), "xla._CUSTOM_CALL_TARGET");
        return targets;
      },
      "FFI target name -> handler.");
  m.def(
      "kernels",
      [] {
        std::vector<std::string> names;
        for (auto* kernel : jax_gptq::cpu::AvailableKernels()) names.push_back(kernel->name);
        return names;
      },
      "Instruction sets that this CPU can run, best first.");
  m.def(
      "kernel", [] { return std::string(jax_gptq::cpu::CurrentKernel().name); },
      "The instruction set in use.");
  m.def(
      "use_kernel",
      [](const std::string& name) {
        if (!jax_gptq::cpu::UseKernel(name)) {
          throw nb::value_error(("this CPU cannot run the kernel \"" + name + "\"").c_str());
        }
      },
      nb::arg("name") = "",
      "Use one instruction set by name, for tests; none goes back to the best. Raises ValueError.");
}
