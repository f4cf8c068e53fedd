#include "wgmma.cuh"
#include "wgmma_launch.h"

namespace jax_gptq::cuda {
namespace {

template <class T, int kBits, WgmmaMode kMode, int kBlockN, int kBlockM>
__global__ void __launch_bounds__(wgmma_threads(wgmma_consumers(kBlockN, kBlockM)), 1)
    wgmma_kernel(const __grid_constant__ WgmmaArguments args,
                 const __grid_constant__ TensorMap x_map,
                 const __grid_constant__ TensorMap code_map,
                 const __grid_constant__ TensorMap scale_map,
                 const __grid_constant__ TensorMap zero_map,
                 const __grid_constant__ TensorMap y_map) {
  wgmma_block<T, kBits, kMode, kBlockN, kBlockM>(args, x_map, code_map, scale_map, zero_map, y_map);
}

template <class T, int kBits, WgmmaMode kMode, int kBlockN, int kBlockM>
cudaError_t launch_tiles(const Problem& problem, const WgmmaPlan& plan, void* workspace,
                         cudaStream_t stream) {
  const WgmmaArguments args = wgmma_arguments(problem, plan, workspace);
  if (args.stages < 2 || !wgmma_fits(plan)) return cudaErrorInvalidConfiguration;
  const WgmmaMaps maps = wgmma_maps(problem, plan, args);
  TensorMap x_map, code_map, scale_map, zero_map, y_map{};
  if (!encode_tensor_map(&x_map, maps.x) || !encode_tensor_map(&code_map, maps.codes) ||
      !encode_tensor_map(&scale_map, maps.scales) || !encode_tensor_map(&zero_map, maps.zeros) ||
      (args.y_mapped && !encode_tensor_map(&y_map, maps.y))) {
    return cudaErrorInvalidValue;
  }
  const char* name = args.in_shares     ? "wgmma, shares"
                     : plan.columns > 1 ? "wgmma, multicast"
                                        : "wgmma";
  const Grid grid{dim3(plan.clusters * plan.columns),
                  wgmma_threads(wgmma_consumers(kBlockN, kBlockM)), plan.columns, args.shared_bytes,
                  args.in_shares};
  return jax_gptq::cuda::launch(wgmma_kernel<T, kBits, kMode, kBlockN, kBlockM>, name, grid, stream,
                                args, x_map, code_map, scale_map, zero_map, y_map);
}

template <class T, int kBits, WgmmaMode kMode>
cudaError_t launch_block(const Problem& problem, const WgmmaPlan& plan, void* workspace,
                         cudaStream_t stream) {
#define JAX_GPTQ_BLOCK(BLOCK_N, BLOCK_M)                                                        \
  if constexpr (kMode != WgmmaMode::kOnSums || wgmma_on_sums(BLOCK_N, BLOCK_M)) {               \
    if (plan.block_n == BLOCK_N && plan.block_m == BLOCK_M) {                                   \
      return launch_tiles<T, kBits, kMode, BLOCK_N, BLOCK_M>(problem, plan, workspace, stream); \
    }                                                                                           \
  }
  JAX_GPTQ_BLOCK(256, 16)
  JAX_GPTQ_BLOCK(256, 32)
  JAX_GPTQ_BLOCK(256, 64)
  JAX_GPTQ_BLOCK(128, 32)
  JAX_GPTQ_BLOCK(128, 64)
  JAX_GPTQ_BLOCK(128, 128)
  JAX_GPTQ_BLOCK(128, 256)
#undef JAX_GPTQ_BLOCK
  return cudaErrorInvalidConfiguration;
}

template <class T>
cudaError_t launch_type(const Problem& problem, const WgmmaPlan& plan, void* workspace,
                        cudaStream_t stream) {
  const WgmmaMode mode = wgmma_mode(problem, plan.block_n, plan.block_m);
  if (problem.bits == 8) {
    return mode == WgmmaMode::kFine
               ? launch_block<T, 8, WgmmaMode::kFine>(problem, plan, workspace, stream)
               : launch_block<T, 8, WgmmaMode::kGeneral>(problem, plan, workspace, stream);
  }
  switch (mode) {
    case WgmmaMode::kExact:
      return launch_block<T, 4, WgmmaMode::kExact>(problem, plan, workspace, stream);
    case WgmmaMode::kSplit:
      if constexpr (std::is_same<T, Bf16>::value) {
        return launch_block<T, 4, WgmmaMode::kSplit>(problem, plan, workspace, stream);
      }
      return cudaErrorInvalidConfiguration;
    case WgmmaMode::kOnSums:
      return launch_block<T, 4, WgmmaMode::kOnSums>(problem, plan, workspace, stream);
    case WgmmaMode::kGeneral:
      return launch_block<T, 4, WgmmaMode::kGeneral>(problem, plan, workspace, stream);
    case WgmmaMode::kFine:
      return launch_block<T, 4, WgmmaMode::kFine>(problem, plan, workspace, stream);
  }
  return cudaErrorInvalidConfiguration;
}

}  // namespace

cudaError_t launch_wgmma(const Problem& problem, const WgmmaPlan& plan, void* workspace,
                         cudaStream_t stream) {
  switch (problem.type) {
    case Dtype::kF16:
      return launch_type<F16>(problem, plan, workspace, stream);
    case Dtype::kBf16:
      return launch_type<Bf16>(problem, plan, workspace, stream);
    default:
      return cudaErrorNotSupported;
  }
}

}  // namespace jax_gptq::cuda
