// The XLA FFI handler `jax_gptq.cpu.matmul.v1`: checks shapes and fills a Problem.
#include "handler.h"

#include <algorithm>
#include <string>

#include "matmul.h"
#include "xla/ffi/api/ffi.h"

namespace jax_gptq::cpu {
namespace {

namespace ffi = xla::ffi;

ffi::Error Invalid(const std::string& what) {
  return ffi::Error::InvalidArgument("jax_gptq.cpu.matmul.v1: " + what);
}

ffi::Error Matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::U32> tiles,
                  ffi::AnyBuffer scales, ffi::Buffer<ffi::U8> zeros, ffi::Buffer<ffi::S32> perm,
                  ffi::Buffer<ffi::S32> group_starts, ffi::Buffer<ffi::F32> bias,
                  ffi::Result<ffi::AnyBuffer> y, int32_t group_size, int32_t int8_activations) {
  const auto x_dims = x.dimensions(), y_dims = y->dimensions();
  const auto tile_dims = tiles.dimensions(), scale_dims = scales.dimensions();
  Problem problem{};
  if (!ToFloat(x.element_type(), &problem.x_type) || y->element_type() != x.element_type()) {
    return Invalid("x and y must both be f32, bf16 or f16");
  }
  if (!ToFloat(scales.element_type(), &problem.scale_type)) {
    return Invalid("scales must be f32, bf16 or f16");
  }
  if (x_dims.size() != 2 || y_dims.size() != 2 || x_dims[0] != y_dims[0]) {
    return Invalid("x [M, K] and y [M, N] are expected");
  }
  const int64_t rows = x_dims[0], k = x_dims[1], columns = y_dims[1];
  const int64_t tile_count = (columns + kTileColumns - 1) / kTileColumns;
  if (tile_dims.size() != 4 || tile_dims[0] != tile_count || tile_dims[3] != kTileColumns) {
    return Invalid("tiles [ceil(N / 32), C, words, 32] are expected");
  }
  const int64_t words = tile_dims[2];
  if (words != 2 && words != 3 && words != 4 && words != 8) {
    return Invalid("tiles hold 2, 3, 4 or 8 words per chunk, found " + std::to_string(words));
  }
  const auto zero_dims = zeros.dimensions();
  if (scale_dims.size() != 3 || scale_dims[0] != tile_count || scale_dims[2] != kTileColumns ||
      !std::equal(zero_dims.begin(), zero_dims.end(), scale_dims.begin(), scale_dims.end())) {
    return Invalid("scales and zeros [ceil(N / 32), G, 32] are expected");
  }
  const int64_t groups = scale_dims[1];
  if (perm.element_count() != 0 && static_cast<int64_t>(perm.element_count()) != k) {
    return Invalid("perm must be empty or [K]");
  }
  if (bias.element_count() != 0 && static_cast<int64_t>(bias.element_count()) != columns) {
    return Invalid("bias must be empty or [N]");
  }

  std::vector<int32_t> regular;
  const int32_t* starts = group_starts.typed_data();
  if (group_starts.element_count() == 0) {
    if (group_size < 1) return Invalid("group_size must be at least 1");
    for (int64_t g = 0; g <= groups; ++g) {
      regular.push_back(static_cast<int32_t>(std::min(g * group_size, k)));
    }
    starts = regular.data();
  } else if (static_cast<int64_t>(group_starts.element_count()) != groups + 1) {
    return Invalid("group_starts must be empty or [G + 1]");
  }
  for (int64_t g = 0; g < groups; ++g) {
    if (starts[g] > starts[g + 1]) return Invalid("group_starts must not decrease");
  }
  if (starts[0] != 0 || starts[groups] != k) return Invalid("the groups must cover the K rows");

  const int max_chunks = int8_activations ? 1 : kMaxBlockChunks;
  const std::vector<Block> blocks = MakeBlocks(starts, groups, max_chunks);
  const int64_t chunks = blocks.empty() ? 0 : blocks.back().chunk + blocks.back().chunks;
  if (tile_dims[1] != chunks) {
    return Invalid("tiles hold " + std::to_string(tile_dims[1]) + " chunks, the groups need " +
                   std::to_string(chunks));
  }
  if (perm.element_count() != 0) {
    const int32_t* p = perm.typed_data();
    bool inside = true;
    for (int64_t i = 0; i < k; ++i)
      inside &= static_cast<uint64_t>(p[i]) < static_cast<uint64_t>(k);
    if (!inside) return Invalid("perm must hold rows of W");
    problem.perm = p;
  }

  problem.x = x.untyped_data();
  problem.rows = rows;
  problem.k = k;
  problem.tiles = tiles.typed_data();
  problem.words = static_cast<int>(words);
  problem.scales = scales.untyped_data();
  problem.zeros = zeros.typed_data();
  problem.chunks = chunks;
  problem.groups = groups;
  problem.columns = columns;
  problem.blocks = blocks.data();
  problem.block_count = static_cast<int64_t>(blocks.size());
  problem.bias = bias.element_count() == 0 ? nullptr : bias.typed_data();
  problem.y = y->untyped_data();
  // Two digits of a bfloat16 add less than an eighth of its own rounding; float16 needs three.
  problem.digits = int8_activations ? 1 : problem.x_type == Float::kBF16 ? 2 : 3;
  RunMatmul(CurrentKernel(), problem, pool.num_threads(),
            [&](auto task) { pool.Schedule(std::move(task)); });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jax_gptq::cpu

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxGptqCpuMatmul, jax_gptq::cpu::Matmul,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::U32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::U8>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int32_t>("group_size")
                                  .Attr<int32_t>("int8_activations"));
