#include "decode.cuh"
#include "kernels.h"

namespace jax_gptq::cuda {
namespace {

template <class T, int kBits, int kColumns, bool kFine, int kStages>
__global__ void __launch_bounds__(kDecodeThreads, 1) decode(DecodeArguments args) {
  decode_block<T, kBits, kColumns, kFine, kStages>(args);
}

using DecodeKernel = void (*)(DecodeArguments);

template <class T, int kBits, bool kFine, int kStages>
DecodeKernel choose(int m) {
  return m <= 8 ? decode<T, kBits, 8, kFine, kStages> : decode<T, kBits, 16, kFine, kStages>;
}

template <class T, int kBits, bool kFine>
DecodeKernel choose(int m, int stages) {
  return stages == kShallowStages ? choose<T, kBits, kFine, kShallowStages>(m)
                                  : choose<T, kBits, kFine, deep_stages(kBits)>(m);
}

template <class T, int kBits>
DecodeKernel choose(int m, bool fine, int stages) {
  return fine ? choose<T, kBits, true>(m, stages) : choose<T, kBits, false>(m, stages);
}

template <class T>
DecodeKernel choose(int m, int bits, bool fine, int stages) {
  return bits == 4 ? choose<T, 4>(m, fine, stages) : choose<T, 8>(m, fine, stages);
}

}  // namespace

cudaError_t launch_decode(const Problem& problem, const Plan& plan, void* workspace,
                          cudaStream_t stream) {
  const bool fine = fine_groups(problem);
  const DecodeKernel kernel = problem.type == Dtype::kF16
                                  ? choose<F16>(problem.m, problem.bits, fine, plan.stages)
                                  : choose<Bf16>(problem.m, problem.bits, fine, plan.stages);
  Grid grid = {};
  grid.grid = dim3(plan.grid);
  grid.threads = kDecodeThreads;
  grid.cluster = plan.reduction == Reduction::kCluster ? plan.splits : 1;
  grid.shared_bytes = plan.shared_bytes;
  return launch(kernel, "decode", grid, stream, decode_arguments(problem, plan, workspace));
}

}  // namespace jax_gptq::cuda
