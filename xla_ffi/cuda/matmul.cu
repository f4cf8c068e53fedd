#include "kernels.h"
#include "wgmma_launch.h"

namespace jax_gptq::cuda {

cudaError_t launch_matmul(const Problem& problem, const Plan& plan, void* workspace,
                          cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  switch (plan.kernel) {
    case Kernel::kNone:
      return problem.m == 0 ? cudaSuccess : cudaErrorNotSupported;
    case Kernel::kDecode:
      error = launch_decode(problem, plan, workspace, stream);
      break;
    case Kernel::kMma:
      error = launch_mma(problem, plan, workspace, stream);
      break;
    case Kernel::kWgmma:
      return launch_wgmma(problem, wgmma_plan(problem, plan.device), workspace, stream);
  }
  if (error != cudaSuccess || plan.reduction != Reduction::kWorkspace) return error;
  return launch_reduce(problem, plan, workspace, stream);
}

}  // namespace jax_gptq::cuda
