#include "dequantize.cuh"
#include "kernels.h"

namespace jax_gptq::cuda {
namespace {

template <class T, int kBits>
__global__ void __launch_bounds__(kDequantizeThreads, 6) dequantize(Problem p, uint16_t* weight) {
  dequantize_block<T, kBits>(p, weight);
}

template <class T>
auto choose(int bits) {
  return bits == 4 ? dequantize<T, 4> : dequantize<T, 8>;
}

}  // namespace

cudaError_t launch_dequantize(const Problem& problem, void* weight, cudaStream_t stream) {
  Grid grid = {};
  grid.grid = dim3(dequantize_blocks(problem));
  grid.threads = kDequantizeThreads;
  grid.shared_bytes = kDequantizeShared;
  return launch(
      problem.type == Dtype::kF16 ? choose<F16>(problem.bits) : choose<Bf16>(problem.bits),
      "dequantize", grid, stream, problem, static_cast<uint16_t*>(weight));
}

}  // namespace jax_gptq::cuda
