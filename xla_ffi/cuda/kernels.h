// The launches: what the FFI handler calls. Every function enqueues on `stream` and returns the
// error of the launch; none allocates, synchronises or chooses anything by measuring.
#pragma once

#include <cuda_runtime_api.h>

#include "plan.h"
#include "repack.h"

namespace jax_gptq::cuda {

// y = x W + bias by the kernel that `plan` names. `workspace`: kWorkspaceBytes, aligned to 16, with
// anything in it; products that may run at the same time have one each.
cudaError_t launch_matmul(const Problem& problem, const Plan& plan, void* workspace,
                          cudaStream_t stream);

// Kernels A, B (mma.sync) and the second pass of a split K; called by launch_matmul.
cudaError_t launch_decode(const Problem& problem, const Plan& plan, void* workspace,
                          cudaStream_t stream);
cudaError_t launch_mma(const Problem& problem, const Plan& plan, void* workspace,
                       cudaStream_t stream);
cudaError_t launch_reduce(const Problem& problem, const Plan& plan, const void* workspace,
                          cudaStream_t stream);

// Kernel C: the transposed weight [n, k] of problem.type, each value rounded once, into `weight`.
// problem.m, x, bias and y are not used.
cudaError_t launch_dequantize(const Problem& problem, void* weight, cudaStream_t stream);

// Kernel D: the dense bit stream `qweight` uint32 [ceil(k * bits / 32), n] to the tile layout and
// back.
cudaError_t launch_pack(const RepackProblem& problem, const uint32_t* qweight, void* codes,
                        cudaStream_t stream);
cudaError_t launch_unpack(const RepackProblem& problem, const void* codes, uint32_t* qweight,
                          cudaStream_t stream);

}  // namespace jax_gptq::cuda
