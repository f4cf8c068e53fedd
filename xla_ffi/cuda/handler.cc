// The FFI handlers `jax_gptq.cuda.<kernel>.v1`: check, plan, launch on XLA's stream.
//
// They promise command-buffer compatibility: nothing is allocated, synchronised or measured, and
// equal shapes on one device give the same launches every time.
#include "handler.h"

#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <string>

#include "checks.h"
#include "kernels.h"

namespace jax_gptq::cuda {
namespace {

ffi::Error to_error(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("jax_gptq CUDA kernels: ") + what + ": " +
                              cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

cudaError_t read_device(int ordinal, Device* device) {
  int major = 0, minor = 0;
  const auto read = [&](int* value, cudaDeviceAttr attribute) {
    return cudaDeviceGetAttribute(value, attribute, ordinal);
  };
  cudaError_t error = read(&major, cudaDevAttrComputeCapabilityMajor);
  if (error == cudaSuccess) error = read(&minor, cudaDevAttrComputeCapabilityMinor);
  if (error == cudaSuccess) error = read(&device->processors, cudaDevAttrMultiProcessorCount);
  if (error == cudaSuccess) {
    error = read(&device->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  }
  device->arch = 10 * major + minor;
  return error;
}

// The attributes of a device, read at its first call.
ffi::Error find_device(int ordinal, Device* device) {
  static std::mutex mutex;
  static std::map<int, Device> known;
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(ordinal);
  if (found != known.end()) {
    *device = found->second;
  } else {
    const cudaError_t error = read_device(ordinal, device);
    if (error != cudaSuccess) return to_error(error, "reading the device's attributes");
    known[ordinal] = *device;
  }
  if (!supported(*device)) {
    return ffi::Error(ffi::ErrorCode::kUnimplemented,
                      "jax_gptq CUDA kernels: there is no kernel for sm_" +
                          std::to_string(device->arch) +
                          "; sm_80 or newer is needed. Use backend=\"reference\"");
  }
  return ffi::Error::Success();
}

ffi::Error matmul(cudaStream_t stream, int32_t ordinal, ffi::AnyBuffer x,
                  ffi::Buffer<ffi::U32> codes, ffi::AnyBuffer scales, ffi::Buffer<ffi::U8> zeros,
                  ffi::Buffer<ffi::F32> bias, ffi::Result<ffi::AnyBuffer> y,
                  ffi::ResultBuffer<ffi::U8> workspace, int32_t group_size, int32_t bits) {
  Problem problem{};
  Device device{};
  ffi::Error error =
      fill_matmul(x, codes, scales, zeros, bias, *y, *workspace, group_size, bits, &problem);
  if (error.failure()) return error;
  error = find_device(ordinal, &device);
  if (error.failure()) return error;
  const Plan plan = make_plan(problem, device);
  return to_error(launch_matmul(problem, plan, workspace->untyped_data(), stream), "matmul");
}

ffi::Error dequantize(cudaStream_t stream, int32_t ordinal, ffi::Buffer<ffi::U32> codes,
                      ffi::AnyBuffer scales, ffi::Buffer<ffi::U8> zeros,
                      ffi::Result<ffi::AnyBuffer> weight, int32_t group_size, int32_t bits) {
  Problem problem{};
  Device device{};
  ffi::Error error = fill_dequantize(codes, scales, zeros, *weight, group_size, bits, &problem);
  if (error.failure()) return error;
  error = find_device(ordinal, &device);
  if (error.failure()) return error;
  return to_error(launch_dequantize(problem, weight->untyped_data(), stream), "dequantize");
}

ffi::Error pack(cudaStream_t stream, int32_t ordinal, ffi::Buffer<ffi::U32> qweight,
                ffi::Buffer<ffi::U8> zeros, ffi::Buffer<ffi::S32> perm,
                ffi::ResultBuffer<ffi::U32> codes, int32_t bits, int32_t group_size,
                int32_t in_features) {
  RepackProblem problem{};
  Device device{};
  ffi::Error error = fill_repack(qweight, *codes, perm, bits, in_features, &problem);
  if (error.failure()) return error;
  error = fill_zeros(zeros, group_size, &problem);
  if (error.failure()) return error;
  error = find_device(ordinal, &device);
  if (error.failure()) return error;
  return to_error(launch_pack(problem, qweight.typed_data(), codes->untyped_data(), stream),
                  "pack");
}

ffi::Error unpack(cudaStream_t stream, int32_t ordinal, ffi::Buffer<ffi::U32> codes,
                  ffi::Buffer<ffi::S32> perm, ffi::ResultBuffer<ffi::U32> qweight, int32_t bits,
                  int32_t in_features) {
  RepackProblem problem{};
  Device device{};
  ffi::Error error = fill_repack(*qweight, codes, perm, bits, in_features, &problem);
  if (error.failure()) return error;
  error = find_device(ordinal, &device);
  if (error.failure()) return error;
  return to_error(launch_unpack(problem, codes.untyped_data(), qweight->typed_data(), stream),
                  "unpack");
}

auto bind() {
  return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>().Ctx<ffi::DeviceOrdinal>();
}

}  // namespace
}  // namespace jax_gptq::cuda

namespace ffi = xla::ffi;

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxGptqCudaMatmul, jax_gptq::cuda::matmul,
                              jax_gptq::cuda::bind_matmul(jax_gptq::cuda::bind()),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxGptqCudaDequantize, jax_gptq::cuda::dequantize,
                              jax_gptq::cuda::bind_dequantize(jax_gptq::cuda::bind()),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxGptqCudaPack, jax_gptq::cuda::pack,
                              jax_gptq::cuda::bind_pack(jax_gptq::cuda::bind()),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxGptqCudaUnpack, jax_gptq::cuda::unpack,
                              jax_gptq::cuda::bind_unpack(jax_gptq::cuda::bind()),
                              {ffi::Traits::kCmdBufferCompatible});
