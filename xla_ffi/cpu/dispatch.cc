// Chooses a kernel at run time. Compiled for the baseline CPU: it must not use what it asks for.
#include <atomic>

#include "kernels.h"

namespace jax_gptq::cpu {
namespace {

std::atomic<const Kernel*> current{nullptr};

}  // namespace

std::vector<const Kernel*> AvailableKernels() {
  std::vector<const Kernel*> kernels;
#ifdef JAX_GPTQ_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vnni")) {
    kernels.push_back(&kAvx512Vnni);
  }
  if (avx2 && __builtin_cpu_supports("avxvnni")) kernels.push_back(&kAvxVnni);
  if (avx2) kernels.push_back(&kAvx2);
#endif
  kernels.push_back(&kPortable);
  return kernels;
}

const Kernel& CurrentKernel() {
  const Kernel* kernel = current.load(std::memory_order_relaxed);
  if (kernel == nullptr) {
    kernel = AvailableKernels().front();
    current.store(kernel, std::memory_order_relaxed);
  }
  return *kernel;
}

bool UseKernel(const std::string& name) {
  for (const Kernel* kernel : AvailableKernels()) {
    if (name.empty() || name == kernel->name) {
      current.store(kernel, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace jax_gptq::cpu
