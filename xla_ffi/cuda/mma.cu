#include "kernels.h"
#include "mma.cuh"

namespace jax_gptq::cuda {
namespace {

template <class T, int kBits, int kBlockM>
__global__ void __launch_bounds__(kMmaThreads, kBlockM <= 32 ? 2 : 1) mma(MmaArguments args) {
  mma_block<T, kBits, kBlockM>(args);
}

using MmaKernel = void (*)(MmaArguments);

template <class T, int kBits>
MmaKernel choose(int block_m) {
  switch (block_m) {
    case 16:
      return mma<T, kBits, 16>;
    case 32:
      return mma<T, kBits, 32>;
    case 64:
      return mma<T, kBits, 64>;
    default:
      return mma<T, kBits, 128>;
  }
}

template <class T>
MmaKernel choose(int bits, int block_m) {
  return bits == 4 ? choose<T, 4>(block_m) : choose<T, 8>(block_m);
}

}  // namespace

cudaError_t launch_mma(const Problem& problem, const Plan& plan, void* workspace,
                       cudaStream_t stream) {
  const MmaKernel kernel = problem.type == Dtype::kF16 ? choose<F16>(problem.bits, plan.block_m)
                                                       : choose<Bf16>(problem.bits, plan.block_m);
  Grid grid = {};
  grid.grid = dim3(plan.grid);
  grid.threads = kMmaThreads;
  grid.shared_bytes = plan.shared_bytes;
  return launch(kernel, "mma", grid, stream, mma_arguments(problem, plan, workspace));
}

}  // namespace jax_gptq::cuda
