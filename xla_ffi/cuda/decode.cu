#include "decode.cuh"
#include "digits.cuh"
#include "kernels.h"

namespace jax_gptq::cuda {
namespace {

template <class Products, int kBits, int kSets>
__global__ void __launch_bounds__(kDecodeThreads, 1) decode(DecodeArguments args) {
  decode_block<Products, kBits, kSets>(args);
}

using DecodeKernel = void (*)(DecodeArguments);

template <class T, int kBits, int kSets>
DecodeKernel choose(const Problem& p) {
  if (as_digits(p)) return decode<DigitProducts<T, kBits, kSets>, kBits, kSets>;
  return p.m > 8 ? decode<FloatProducts<T, kBits, 16, kSets>, kBits, kSets>
                 : decode<FloatProducts<T, kBits, 8, kSets>, kBits, kSets>;
}

template <class T, int kBits>
DecodeKernel choose(const Problem& p) {
  switch (parameter_sets(p)) {
    case 1:
      return choose<T, kBits, 1>(p);
    case 2:
      return choose<T, kBits, 2>(p);
    case 4:
      return choose<T, kBits, 4>(p);
    default:
      return choose<T, kBits, 8>(p);
  }
}

template <class T>
DecodeKernel choose(const Problem& p) {
  return p.bits == 4 ? choose<T, 4>(p) : choose<T, 8>(p);
}

}  // namespace

cudaError_t launch_decode(const Problem& problem, const Plan& plan, void* workspace,
                          cudaStream_t stream) {
  const DecodeKernel kernel =
      problem.type == Dtype::kF16 ? choose<F16>(problem) : choose<Bf16>(problem);
  Grid grid = {};
  grid.grid = dim3(plan.grid);
  grid.threads = kDecodeThreads;
  const DecodeArguments args = decode_arguments(problem, plan, workspace);
  if (args.shares_x) grid.cluster = 2;
  if (plan.reduction == Reduction::kCluster) grid.cluster = plan.splits;
  grid.shared_bytes = plan.shared_bytes;
  return launch(kernel, "decode", grid, stream, args);
}

}  // namespace jax_gptq::cuda
