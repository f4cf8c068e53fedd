#include "decode.cuh"
#include "kernels.h"

namespace jax_gptq::cuda {
namespace {

template <class T, int kBits, int kColumns, bool kFine, int kStages>
__global__ void __launch_bounds__(kDecodeThreads, 1) decode(DecodeArguments args) {
  decode_block<T, kBits, kColumns, kFine, kStages>(args);
}

using DecodeKernel = void (*)(DecodeArguments);

template <class T, int kBits, bool kFine, bool kDeep>
DecodeKernel choose(int m) {
  constexpr int kStages = decode_stages(kBits, kDeep);
  return m <= 8 ? decode<T, kBits, 8, kFine, kStages> : decode<T, kBits, 16, kFine, kStages>;
}

template <class T, int kBits>
DecodeKernel choose(int m, bool fine, bool deep) {
  if (fine) return deep ? choose<T, kBits, true, true>(m) : choose<T, kBits, true, false>(m);
  return deep ? choose<T, kBits, false, true>(m) : choose<T, kBits, false, false>(m);
}

template <class T>
DecodeKernel choose(int m, int bits, bool fine, bool deep) {
  return bits == 4 ? choose<T, 4>(m, fine, deep) : choose<T, 8>(m, fine, deep);
}

}  // namespace

cudaError_t launch_decode(const Problem& problem, const Plan& plan, void* workspace,
                          cudaStream_t stream) {
  const bool fine = fine_groups(problem);
  const DecodeKernel kernel = problem.type == Dtype::kF16
                                  ? choose<F16>(problem.m, problem.bits, fine, plan.deep)
                                  : choose<Bf16>(problem.m, problem.bits, fine, plan.deep);
  Grid grid = {};
  grid.grid = dim3(plan.grid);
  grid.threads = kDecodeThreads;
  grid.cluster = plan.reduction == Reduction::kCluster ? plan.splits : 1;
  grid.shared_bytes = plan.shared_bytes;
  return launch(kernel, "decode", grid, stream, decode_arguments(problem, plan, workspace));
}

}  // namespace jax_gptq::cuda
