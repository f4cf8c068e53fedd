// The FFI handlers `jax_gptq.cuda_emulated.<kernel>.v1`: the same checks, plans and launches as on
// the device, on a machine that is made of fibers. Whatever a kernel does wrong is the call's
// error.
#include "handler.h"

#include <functional>
#include <mutex>

#include "../cuda/checks.h"
#include "../cuda/kernels.h"
#include "../cuda/wgmma_launch.h"

namespace jax_gptq::emulator {
namespace {

namespace ffi = xla::ffi;

// One machine at a time; also guards what follows.
std::mutex mutex;
Settings current;
std::vector<std::string> latest_launches;

template <class FfiBuffer>
Buffer operand(const char* name, const FfiBuffer& buffer) {
  return {name, static_cast<unsigned char*>(buffer.untyped_data()), buffer.size_bytes(), false};
}

template <class FfiBuffer>
Buffer result(const char* name, const FfiBuffer& buffer) {
  return {name, static_cast<unsigned char*>(buffer.untyped_data()), buffer.size_bytes(), true};
}

// Runs `launches` on a machine that knows these buffers; `output` must be written completely.
ffi::Error emulate(std::vector<Buffer> buffers, const char* output,
                   const std::function<cudaError_t(const cuda::Device&)>& launches) {
  std::lock_guard<std::mutex> lock(mutex);
  latest_launches.clear();
  const Architecture& architecture = current.architecture;
  const cuda::Device device{architecture.arch, architecture.processors,
                            max_shared_bytes(architecture.arch)};
  if (!cuda::supported(device)) {
    return ffi::Error(ffi::ErrorCode::kUnimplemented,
                      "jax_gptq CUDA kernels: there is no kernel for sm_" +
                          std::to_string(device.arch) + "; sm_80 or newer is needed");
  }
  try {
    GlobalMemory memory(std::move(buffers));
    Machine emulated(memory, architecture, current.seed);
    machine = &emulated;
    const cudaError_t error = launches(device);
    machine = nullptr;
    latest_launches = emulated.launched_kernels();
    if (error != cudaSuccess) {
      return ffi::Error::Internal("emulator: CUDA error " + std::to_string(error));
    }
    const std::string unwritten = memory.unwritten(output);
    if (!unwritten.empty()) {
      return ffi::Error::Internal("emulator: " + unwritten + " was never written");
    }
    return ffi::Error::Success();
  } catch (const std::exception& error) {
    machine = nullptr;
    return ffi::Error::Internal(std::string("emulator: ") + error.what());
  }
}

ffi::Error matmul(ffi::AnyBuffer x, ffi::Buffer<ffi::U32> codes, ffi::AnyBuffer scales,
                  ffi::Buffer<ffi::U8> zeros, ffi::Buffer<ffi::F32> bias,
                  ffi::Result<ffi::AnyBuffer> y, ffi::ResultBuffer<ffi::U8> workspace,
                  int32_t group_size, int32_t bits) {
  cuda::Problem problem{};
  const ffi::Error error =
      cuda::fill_matmul(x, codes, scales, zeros, bias, *y, *workspace, group_size, bits, &problem);
  if (error.failure()) return error;
  return emulate(
      {operand("x", x), operand("codes", codes), operand("scales", scales), operand("zeros", zeros),
       operand("bias", bias), result("y", *y), result("workspace", *workspace)},
      "y", [&](const cuda::Device& device) {
        if (current.wgmma) {
          cuda::WgmmaPlan plan = *current.wgmma;
          plan.clusters = cuda::wgmma_clusters(problem, plan, device.processors);
          return cuda::launch_wgmma(problem, plan, workspace->untyped_data(), nullptr);
        }
        const cuda::Plan plan = cuda::make_plan(problem, device);
        return cuda::launch_matmul(problem, plan, workspace->untyped_data(), nullptr);
      });
}

ffi::Error dequantize(ffi::Buffer<ffi::U32> codes, ffi::AnyBuffer scales,
                      ffi::Buffer<ffi::U8> zeros, ffi::Result<ffi::AnyBuffer> weight,
                      int32_t group_size, int32_t bits) {
  cuda::Problem problem{};
  const ffi::Error error =
      cuda::fill_dequantize(codes, scales, zeros, *weight, group_size, bits, &problem);
  if (error.failure()) return error;
  return emulate({operand("codes", codes), operand("scales", scales), operand("zeros", zeros),
                  result("weight", *weight)},
                 "weight", [&](const cuda::Device&) {
                   return cuda::launch_dequantize(problem, weight->untyped_data(), nullptr);
                 });
}

ffi::Error pack(ffi::Buffer<ffi::U32> qweight, ffi::Buffer<ffi::U8> zeros,
                ffi::Buffer<ffi::S32> perm, ffi::ResultBuffer<ffi::U32> codes, int32_t bits,
                int32_t group_size, int32_t in_features) {
  cuda::RepackProblem problem{};
  ffi::Error error = cuda::fill_repack(qweight, *codes, perm, bits, in_features, &problem);
  if (error.failure()) return error;
  error = cuda::fill_zeros(zeros, group_size, &problem);
  if (error.failure()) return error;
  return emulate({operand("qweight", qweight), operand("zeros", zeros), operand("perm", perm),
                  result("codes", *codes)},
                 "codes", [&](const cuda::Device&) {
                   return cuda::launch_pack(problem, qweight.typed_data(), codes->untyped_data(),
                                            nullptr);
                 });
}

ffi::Error unpack(ffi::Buffer<ffi::U32> codes, ffi::Buffer<ffi::S32> perm,
                  ffi::ResultBuffer<ffi::U32> qweight, int32_t bits, int32_t in_features) {
  cuda::RepackProblem problem{};
  const ffi::Error error = cuda::fill_repack(*qweight, codes, perm, bits, in_features, &problem);
  if (error.failure()) return error;
  return emulate({operand("codes", codes), operand("perm", perm), result("qweight", *qweight)},
                 "qweight", [&](const cuda::Device&) {
                   return cuda::launch_unpack(problem, codes.untyped_data(), qweight->typed_data(),
                                              nullptr);
                 });
}

}  // namespace

void set(const Settings& settings) {
  std::lock_guard<std::mutex> lock(mutex);
  current = settings;
}

Settings settings() {
  std::lock_guard<std::mutex> lock(mutex);
  return current;
}

std::vector<std::string> launches() {
  std::lock_guard<std::mutex> lock(mutex);
  return latest_launches;
}

}  // namespace jax_gptq::emulator

namespace ffi = xla::ffi;

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxGptqEmulatedMatmul, jax_gptq::emulator::matmul,
                              jax_gptq::cuda::bind_matmul(ffi::Ffi::Bind()));

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxGptqEmulatedDequantize, jax_gptq::emulator::dequantize,
                              jax_gptq::cuda::bind_dequantize(ffi::Ffi::Bind()));

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxGptqEmulatedPack, jax_gptq::emulator::pack,
                              jax_gptq::cuda::bind_pack(ffi::Ffi::Bind()));

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxGptqEmulatedUnpack, jax_gptq::emulator::unpack,
                              jax_gptq::cuda::bind_unpack(ffi::Ffi::Bind()));
