#include "kernels.h"
#include "repack.cuh"

namespace jax_gptq::cuda {
namespace {

template <int kHeld>
__global__ void __launch_bounds__(kRepackThreads)
    pack(RepackProblem p, const uint32_t* qweight, uint32_t* codes) {
  pack_block<kHeld>(p, qweight, codes);
}

template <int kHeld>
__global__ void __launch_bounds__(kRepackThreads)
    unpack(RepackProblem p, const uint8_t* codes, uint32_t* qweight) {
  unpack_block<kHeld>(p, codes, qweight);
}

Grid blocks_for(int64_t words) {
  Grid grid = {};
  grid.grid = dim3(static_cast<unsigned>((words + kRepackThreads - 1) / kRepackThreads));
  grid.threads = kRepackThreads;
  return grid;
}

}  // namespace

cudaError_t launch_pack(const RepackProblem& problem, const uint32_t* qweight, void* codes,
                        cudaStream_t stream) {
  return launch(held_bits(problem.bits) == 4 ? pack<4> : pack<8>, "pack",
                blocks_for(pack_words(problem)), stream, problem, qweight,
                static_cast<uint32_t*>(codes));
}

cudaError_t launch_unpack(const RepackProblem& problem, const void* codes, uint32_t* qweight,
                          cudaStream_t stream) {
  return launch(held_bits(problem.bits) == 4 ? unpack<4> : unpack<8>, "unpack",
                blocks_for(unpack_words(problem)), stream, problem,
                static_cast<const uint8_t*>(codes), qweight);
}

}  // namespace jax_gptq::cuda
