#include "decode.cuh"
#include "kernels.h"

namespace jax_gptq::cuda {
namespace {

template <class T, int kBits, int kColumns, int kSets, int kFragments, int kStages>
__global__ void __launch_bounds__(kDecodeThreads, 1) decode(DecodeArguments args) {
  decode_block<T, kBits, kColumns, kSets, kFragments, kStages>(args);
}

using DecodeKernel = void (*)(DecodeArguments);

template <class T, int kBits, int kSets>
DecodeKernel choose(int m, const DecodeForm& form) {
  if constexpr (kBits == 8) {
    return m > 8 ? decode<T, 8, 16, kSets, 1, 2> : decode<T, 8, 8, kSets, 1, 2>;
  } else if (form.fragments == 2) {
    return m > 8 ? decode<T, 4, 16, kSets, 2, 2> : decode<T, 4, 8, kSets, 2, 2>;
  } else if (form.stages == 2) {
    return m > 8 ? decode<T, 4, 16, kSets, 1, 2> : decode<T, 4, 8, kSets, 1, 2>;
  } else {
    return decode<T, 4, 8, kSets, 1, 4>;
  }
}

template <class T, int kBits>
DecodeKernel choose(int m, const DecodeForm& form, int sets) {
  switch (sets) {
    case 1:
      return choose<T, kBits, 1>(m, form);
    case 2:
      return choose<T, kBits, 2>(m, form);
    case 4:
      return choose<T, kBits, 4>(m, form);
    default:
      return choose<T, kBits, 8>(m, form);
  }
}

template <class T>
DecodeKernel choose(const Problem& p, const DecodeForm& form) {
  const int sets = parameter_sets(p);
  return p.bits == 4 ? choose<T, 4>(p.m, form, sets) : choose<T, 8>(p.m, form, sets);
}

}  // namespace

cudaError_t launch_decode(const Problem& problem, const Plan& plan, void* workspace,
                          cudaStream_t stream) {
  const DecodeForm form{plan.fragments, plan.stages};
  const DecodeKernel kernel =
      problem.type == Dtype::kF16 ? choose<F16>(problem, form) : choose<Bf16>(problem, form);
  Grid grid = {};
  grid.grid = dim3(plan.grid);
  grid.threads = kDecodeThreads;
  grid.cluster = plan.reduction == Reduction::kCluster ? plan.splits : 1;
  grid.shared_bytes = plan.shared_bytes;
  return launch(kernel, "decode", grid, stream, decode_arguments(problem, plan, workspace));
}

}  // namespace jax_gptq::cuda
