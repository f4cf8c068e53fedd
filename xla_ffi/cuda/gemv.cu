#include "gemv.cuh"
#include "kernels.h"

namespace jax_gptq::cuda {
namespace {

template <class T, int kBits, int kSets>
__global__ void __launch_bounds__(kGemvThreads, 1) gemv(GemvArguments args) {
  gemv_block<T, kBits, kSets>(args);
}

using GemvKernel = void (*)(GemvArguments);

template <class T, int kBits>
GemvKernel choose(int sets) {
  switch (sets) {
    case 1:
      return gemv<T, kBits, 1>;
    case 2:
      return gemv<T, kBits, 2>;
    case 4:
      return gemv<T, kBits, 4>;
    default:
      return gemv<T, kBits, 8>;
  }
}

template <class T>
GemvKernel choose(int bits, int sets) {
  return bits == 4 ? choose<T, 4>(sets) : choose<T, 8>(sets);
}

}  // namespace

cudaError_t launch_gemv(const Problem& problem, const Plan& plan, cudaStream_t stream) {
  const int sets = parameter_sets(problem);
  const GemvKernel kernel = problem.type == Dtype::kF16 ? choose<F16>(problem.bits, sets)
                                                        : choose<Bf16>(problem.bits, sets);
  Grid grid = {};
  grid.grid = dim3(plan.grid);
  grid.threads = kGemvThreads;
  grid.shared_bytes = plan.shared_bytes;
  return launch(kernel, "gemv", grid, stream, gemv_arguments(problem, plan));
}

}  // namespace jax_gptq::cuda
