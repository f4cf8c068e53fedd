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
DecodeKernel choose(const Problem& p, bool digits) {
  if (digits) {
    return p.m > 2 ? decode<DigitProducts<T, kBits, 4, kSets>, kBits, kSets>
                   : decode<DigitProducts<T, kBits, 2, kSets>, kBits, kSets>;
  }
  return p.m > 8 ? decode<FloatProducts<T, kBits, 16, kSets>, kBits, kSets>
                 : decode<FloatProducts<T, kBits, 8, kSets>, kBits, kSets>;
}

template <class T, int kBits>
DecodeKernel choose(const Problem& p, bool digits) {
  switch (parameter_sets(p)) {
    case 1:
      return choose<T, kBits, 1>(p, digits);
    case 2:
      return choose<T, kBits, 2>(p, digits);
    case 4:
      return choose<T, kBits, 4>(p, digits);
    default:
      return choose<T, kBits, 8>(p, digits);
  }
}

template <class T>
DecodeKernel choose(const Problem& p, bool digits) {
  return p.bits == 4 ? choose<T, 4>(p, digits) : choose<T, 8>(p, digits);
}

}  // namespace

cudaError_t launch_decode(const Problem& problem, const Plan& plan, void* workspace,
                          cudaStream_t stream) {
  const bool digits = as_digits(problem, plan.device.shared_bytes);
  const DecodeKernel kernel =
      problem.type == Dtype::kF16 ? choose<F16>(problem, digits) : choose<Bf16>(problem, digits);
  Grid grid = {};
  grid.grid = dim3(plan.grid);
  grid.threads = kDecodeThreads;
  grid.cluster = plan.reduction == Reduction::kCluster ? plan.splits : 1;
  grid.shared_bytes = plan.shared_bytes;
  return launch(kernel, "decode", grid, stream, decode_arguments(problem, plan, workspace));
}

}  // namespace jax_gptq::cuda
