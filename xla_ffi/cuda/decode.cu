#include "decode.cuh"
#include "kernels.h"

namespace jax_gptq::cuda {
namespace {

template <class T, int kBits, int kColumns, int kSets>
__global__ void __launch_bounds__(kDecodeThreads, 1) decode(DecodeArguments args) {
  decode_block<T, kBits, kColumns, kSets>(args);
}

using DecodeKernel = void (*)(DecodeArguments);

template <class T, int kBits, int kSets>
DecodeKernel choose(int m) {
  return m > 8 ? decode<T, kBits, 16, kSets> : decode<T, kBits, 8, kSets>;
}

template <class T, int kBits>
DecodeKernel choose(int m, int sets) {
  switch (sets) {
    case 1:
      return choose<T, kBits, 1>(m);
    case 2:
      return choose<T, kBits, 2>(m);
    case 4:
      return choose<T, kBits, 4>(m);
    default:
      return choose<T, kBits, 8>(m);
  }
}

template <class T>
DecodeKernel choose(const Problem& p) {
  const int sets = parameter_sets(p);
  return p.bits == 4 ? choose<T, 4>(p.m, sets) : choose<T, 8>(p.m, sets);
}

}  // namespace

cudaError_t launch_decode(const Problem& problem, const Plan& plan, void* workspace,
                          cudaStream_t stream) {
  const DecodeKernel kernel =
      problem.type == Dtype::kF16 ? choose<F16>(problem) : choose<Bf16>(problem);
  Grid grid = {};
  grid.grid = dim3(plan.grid);
  grid.threads = kDecodeThreads;
  grid.cluster = plan.reduction == Reduction::kCluster ? plan.splits : 1;
  grid.shared_bytes = plan.shared_bytes;
  return launch(kernel, "decode", grid, stream, decode_arguments(problem, plan, workspace));
}

}  // namespace jax_gptq::cuda
