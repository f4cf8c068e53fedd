#include "kernels.h"
#include "reduce.cuh"

namespace jax_gptq::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kReduceThreads)
    reduce(Problem p, int splits, const float* partial) {
  reduce_block<T>(p, splits, partial);
}

}  // namespace

cudaError_t launch_reduce(const Problem& problem, const Plan& plan, const void* workspace,
                          cudaStream_t stream) {
  Grid grid = {};
  grid.grid = dim3(reduce_blocks(problem));
  grid.threads = kReduceThreads;
  return launch(problem.type == Dtype::kF16 ? reduce<F16> : reduce<Bf16>, "reduce", grid, stream,
                problem, plan.splits, static_cast<const float*>(workspace));
}

}  // namespace jax_gptq::cuda
