// The launch of class B on sm_90a.
#pragma once

#include <cuda_runtime_api.h>

#include "wgmma.h"

namespace jax_gptq::cuda {

// One kernel on `stream`; nothing is allocated and nothing waits. `workspace`: as launch_matmul.
cudaError_t launch_wgmma(const Problem& problem, const WgmmaPlan& plan, void* workspace,
                         cudaStream_t stream);

}  // namespace jax_gptq::cuda
