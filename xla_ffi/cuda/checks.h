// What both handlers, of the device and of the emulator, check and fill in: from the buffers and
// attributes of an FFI call to the Problem of a kernel.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>

#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace jax_gptq::cuda {

namespace ffi = xla::ffi;

inline ffi::Error invalid(const std::string& what) {
  return ffi::Error::InvalidArgument("jax_gptq CUDA kernels: " + what);
}

inline bool to_dtype(ffi::DataType type, Dtype* dtype) {
  switch (type) {
    case ffi::F16:
      *dtype = Dtype::kF16;
      return true;
    case ffi::BF16:
      *dtype = Dtype::kBf16;
      return true;
    case ffi::F32:
      *dtype = Dtype::kF32;
      return true;
    default:
      return false;
  }
}

inline bool has_shape(ffi::Span<const int64_t> found, std::initializer_list<int64_t> expected) {
  return std::equal(found.begin(), found.end(), expected.begin(), expected.end());
}

inline std::string text(ffi::Span<const int64_t> shape) {
  std::string list;
  for (int64_t size : shape) list += (list.empty() ? "" : ", ") + std::to_string(size);
  return "[" + list + "]";
}

// The weight's part of `problem`; problem->n and ->k are known.
inline ffi::Error fill_weight(ffi::Buffer<ffi::U32> codes, ffi::AnyBuffer scales,
                              ffi::Buffer<ffi::U8> zeros, int32_t group_size, int32_t bits,
                              Problem* problem) {
  if (bits != 4 && bits != 8) {
    return invalid("codes are held in 4 or 8 bits, found " + std::to_string(bits));
  }
  const int n = problem->n, k = problem->k;
  if (n < 1 || k < 1) return invalid("the weight is empty");
  if (group_size < 1 || (group_size < k && group_size % kFragmentK != 0)) {
    return invalid("group_size must be a multiple of 16 or at least K, found " +
                   std::to_string(group_size));
  }
  const int groups = group_size >= k ? 1 : ceil_div(k, group_size);
  if (!has_shape(codes.dimensions(), {tiles_n(n), steps_k(k) * bits / 4, 4, 32, 4})) {
    return invalid("codes [ceil(N / 64), ceil(K / 64) * bits / 4, 4, 32, 4] are expected, found " +
                   text(codes.dimensions()));
  }
  if (!to_dtype(scales.element_type(), &problem->scale_type)) {
    return invalid("scales must be f16, bf16 or f32");
  }
  if (!has_shape(scales.dimensions(), {tiles_n(n), groups, kTileN}) ||
      !has_shape(zeros.dimensions(), {tiles_n(n), groups, kTileN})) {
    return invalid("scales and zeros [ceil(N / 64), groups, 64] are expected, found " +
                   text(scales.dimensions()) + " and " + text(zeros.dimensions()));
  }
  problem->bits = bits;
  problem->group_size = group_size;
  problem->groups = groups;
  problem->codes = codes.untyped_data();
  problem->scales = scales.untyped_data();
  problem->zeros = zeros.untyped_data();
  return ffi::Error::Success();
}

// jax_gptq.*.matmul.v1
inline ffi::Error fill_matmul(ffi::AnyBuffer x, ffi::Buffer<ffi::U32> codes, ffi::AnyBuffer scales,
                              ffi::Buffer<ffi::U8> zeros, ffi::Buffer<ffi::F32> bias,
                              ffi::AnyBuffer y, ffi::Buffer<ffi::U8> workspace, int32_t group_size,
                              int32_t bits, Problem* problem) {
  const auto x_shape = x.dimensions(), y_shape = y.dimensions();
  if (x_shape.size() != 2 || y_shape.size() != 2 || x_shape[0] != y_shape[0]) {
    return invalid("x [M, K] and y [M, N] are expected, found " + text(x_shape) + " and " +
                   text(y_shape));
  }
  if (std::max({x_shape[0], x_shape[1], y_shape[1]}) > std::numeric_limits<int32_t>::max() / 2) {
    return invalid("M, N and K must be below 2^30");
  }
  problem->y_f32 = y.element_type() == ffi::F32;
  if (!to_dtype(x.element_type(), &problem->type) || problem->type == Dtype::kF32 ||
      (!problem->y_f32 && y.element_type() != x.element_type())) {
    return invalid("x must be f16 or bf16, and y of its type or f32");
  }
  problem->m = static_cast<int>(x_shape[0]);
  problem->k = static_cast<int>(x_shape[1]);
  problem->n = static_cast<int>(y_shape[1]);
  const size_t biases = bias.element_count();
  if (biases != 0 && !has_shape(bias.dimensions(), {problem->n})) {
    return invalid("bias must be empty or [N], found " + text(bias.dimensions()));
  }
  if (static_cast<int64_t>(workspace.element_count()) < kWorkspaceBytes) {
    return invalid("a workspace of " + std::to_string(kWorkspaceBytes) +
                   " bytes is expected, found " + std::to_string(workspace.element_count()) +
                   "; what another version of jax_gptq exported must be exported anew");
  }
  problem->x = x.untyped_data();
  problem->y = y.untyped_data();
  problem->bias = biases == 0 ? nullptr : bias.typed_data();
  return fill_weight(codes, scales, zeros, group_size, bits, problem);
}

// jax_gptq.*.dequantize.v1: `weight` is [N, K].
inline ffi::Error fill_dequantize(ffi::Buffer<ffi::U32> codes, ffi::AnyBuffer scales,
                                  ffi::Buffer<ffi::U8> zeros, ffi::AnyBuffer weight,
                                  int32_t group_size, int32_t bits, Problem* problem) {
  const auto shape = weight.dimensions();
  if (shape.size() != 2 || std::max(shape[0], shape[1]) > std::numeric_limits<int32_t>::max() / 2) {
    return invalid("a result [N, K] is expected, found " + text(shape));
  }
  if (!to_dtype(weight.element_type(), &problem->type) || problem->type == Dtype::kF32) {
    return invalid("the result must be f16 or bf16");
  }
  problem->n = static_cast<int>(shape[0]);
  problem->k = static_cast<int>(shape[1]);
  return fill_weight(codes, scales, zeros, group_size, bits, problem);
}

// jax_gptq.*.pack.v1 and jax_gptq.*.unpack.v1, between `qweight` and `codes`.
inline ffi::Error fill_repack(ffi::Buffer<ffi::U32> qweight, ffi::Buffer<ffi::U32> codes,
                              ffi::Buffer<ffi::S32> perm, int32_t bits, int32_t in_features,
                              RepackProblem* problem) {
  if (bits < 2 || bits > 8) {
    return invalid("bits must be 2 to 8, found " + std::to_string(bits));
  }
  const auto shape = qweight.dimensions();
  const int64_t words = (static_cast<int64_t>(in_features) * bits + 31) / 32;
  if (in_features < 1 || shape.size() != 2 || shape[0] != words || shape[1] < 1 ||
      shape[1] > std::numeric_limits<int32_t>::max() / 2) {
    return invalid("qweight [ceil(K * bits / 32), N] is expected, found " + text(shape));
  }
  problem->n = static_cast<int>(shape[1]);
  problem->k = in_features;
  problem->bits = bits;
  const int64_t steps = static_cast<int64_t>(steps_k(problem->k)) * held_bits(bits) / 4;
  if (!has_shape(codes.dimensions(), {tiles_n(problem->n), steps, 4, 32, 4})) {
    return invalid("codes [ceil(N / 64), steps, 4, 32, 4] are expected, found " +
                   text(codes.dimensions()));
  }
  const size_t rows = perm.element_count();
  if (rows != 0 && !has_shape(perm.dimensions(), {in_features})) {
    return invalid("perm must be empty or [K], found " + text(perm.dimensions()));
  }
  problem->perm = rows == 0 ? nullptr : perm.typed_data();
  return ffi::Error::Success();
}

// The zero points that pack.v1 also takes.
inline ffi::Error fill_zeros(ffi::Buffer<ffi::U8> zeros, int32_t group_size,
                             RepackProblem* problem) {
  if (group_size < 1) return invalid("group_size must be at least 1");
  problem->groups = group_size >= problem->k ? 1 : ceil_div(problem->k, group_size);
  if (!has_shape(zeros.dimensions(), {tiles_n(problem->n), problem->groups, kTileN})) {
    return invalid("zeros [ceil(N / 64), groups, 64] are expected, found " +
                   text(zeros.dimensions()));
  }
  problem->zeros = zeros.typed_data();
  return ffi::Error::Success();
}

// ---- Operands of the handlers, results and attributes, after what a machine binds itself -------

template <class Binding>
auto bind_matmul(Binding&& binding) {
  return std::move(binding)
      .template Arg<ffi::AnyBuffer>()         // x
      .template Arg<ffi::Buffer<ffi::U32>>()  // codes
      .template Arg<ffi::AnyBuffer>()         // scales
      .template Arg<ffi::Buffer<ffi::U8>>()   // zeros
      .template Arg<ffi::Buffer<ffi::F32>>()  // bias
      .template Ret<ffi::AnyBuffer>()         // y
      .template Ret<ffi::Buffer<ffi::U8>>()   // workspace
      .template Attr<int32_t>("group_size")
      .template Attr<int32_t>("bits");
}

template <class Binding>
auto bind_dequantize(Binding&& binding) {
  return std::move(binding)
      .template Arg<ffi::Buffer<ffi::U32>>()  // codes
      .template Arg<ffi::AnyBuffer>()         // scales
      .template Arg<ffi::Buffer<ffi::U8>>()   // zeros
      .template Ret<ffi::AnyBuffer>()         // weight
      .template Attr<int32_t>("group_size")
      .template Attr<int32_t>("bits");
}

template <class Binding>
auto bind_pack(Binding&& binding) {
  return std::move(binding)
      .template Arg<ffi::Buffer<ffi::U32>>()  // qweight
      .template Arg<ffi::Buffer<ffi::U8>>()   // zeros
      .template Arg<ffi::Buffer<ffi::S32>>()  // perm
      .template Ret<ffi::Buffer<ffi::U32>>()  // codes
      .template Attr<int32_t>("bits")
      .template Attr<int32_t>("group_size")
      .template Attr<int32_t>("in_features");
}

template <class Binding>
auto bind_unpack(Binding&& binding) {
  return std::move(binding)
      .template Arg<ffi::Buffer<ffi::U32>>()  // codes
      .template Arg<ffi::Buffer<ffi::S32>>()  // perm
      .template Ret<ffi::Buffer<ffi::U32>>()  // qweight
      .template Attr<int32_t>("bits")
      .template Attr<int32_t>("in_features");
}

}  // namespace jax_gptq::cuda
