// The Python module `jax_gptq._cuda_emulated`.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "handler.h"

namespace nb = nanobind;

NB_MODULE(_cuda_emulated, m) {
  m.doc() = "The CUDA kernels of jax_gptq, run on the host for tests.";
  m.def(
      "targets",
      [] {
        nb::dict targets;
        const auto add = [&](const char* name, auto* handler) {
          targets[name] = nb::capsule(reinterpret_cast<void*>(handler), "xla._CUSTOM_CALL_TARGET");
        };
        add("jax_gptq.cuda_emulated.matmul.v1", JaxGptqEmulatedMatmul);
        add("jax_gptq.cuda_emulated.dequantize.v1", JaxGptqEmulatedDequantize);
        add("jax_gptq.cuda_emulated.pack.v1", JaxGptqEmulatedPack);
        add("jax_gptq.cuda_emulated.unpack.v1", JaxGptqEmulatedUnpack);
        return targets;
      },
      "FFI target name -> handler.");
  m.def(
      "set",
      [](int arch, int processors, uint64_t seed, const std::vector<int>& wgmma) {
        jax_gptq::emulator::Settings settings{{arch, processors}, seed};
        if (!wgmma.empty()) {
          if (wgmma.size() != 4 || wgmma[2] < 1 || wgmma[2] > 2 || wgmma[3] < 0) {
            throw nb::value_error(
                "wgmma: expected block_n, block_m, columns (1 or 2) and shares (0: whole tiles)");
          }
          settings.wgmma = {wgmma[0], wgmma[1], wgmma[2], wgmma[3]};
        }
        jax_gptq::emulator::set(settings);
      },
      nb::arg("arch") = 80, nb::arg("processors") = 108, nb::arg("seed") = 0,
      nb::arg("wgmma") = std::vector<int>(),
      "The emulated device (arch: 10 * major + minor; processors: streaming multiprocessors), the "
      "seed of the order in which blocks, warps, lanes and copies take their turns, and, if given, "
      "the plan of every product on sm_90a: block_n, block_m, columns, shares.");
  m.def("launches", &jax_gptq::emulator::launches,
        "Names of the kernels that the latest call launched, in order.");
}
