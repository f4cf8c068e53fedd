// y = x W + bias: sets up the blocks and buffers, and spreads the tiles over a thread pool.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "problem.h"

namespace jax_gptq::cpu {

// Cuts the groups into blocks. starts[g] is group g's first row, of `groups + 1`.
inline std::vector<Block> MakeBlocks(const int32_t* starts, int64_t groups, int max_chunks) {
  std::vector<Block> blocks;
  int64_t chunk = 0;
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t row = starts[g]; row < starts[g + 1];) {
      const int64_t rows = std::min<int64_t>(starts[g + 1] - row, max_chunks * kChunkRows);
      const int chunks = static_cast<int>((rows + kChunkRows - 1) / kChunkRows);
      blocks.push_back({chunk, chunks, static_cast<int32_t>(rows), row, g});
      chunk += chunks;
      row += rows;
    }
  }
  return blocks;
}

// Computes y. The caller fills everything but the x_* buffers, which live here.
template <class Schedule>
void RunMatmul(const Kernel& kernel, Problem problem, int64_t pool_threads,
               const Schedule& schedule) {
  const int64_t rows = problem.rows;
  if (rows == 0 || problem.columns == 0) return;
  const int64_t widen_rows = problem.digits == 1 ? kernel.widen_rows / 2 : kernel.widen_rows;
  problem.offset_digits = rows >= widen_rows && problem.words != 8;
  // Not initialised: quantize fills them.
  std::unique_ptr<int8_t[]> digits(new int8_t[rows * problem.chunks * problem.digits * kChunkRows]);
  std::unique_ptr<float[]> scales(new float[rows * problem.block_count]);
  std::unique_ptr<int32_t[]> sums(new int32_t[rows * problem.block_count * 2]);
  std::unique_ptr<uint8_t[]> in_f32(new uint8_t[rows]);
  problem.x_digits = digits.get();
  problem.x_scales = scales.get();
  problem.x_sums = sums.get();
  problem.x_in_f32 = in_f32.get();

  // Waking a thread costs about as much as this many elements of x.
  constexpr int64_t kElements = 1 << 15;
  const int64_t grain = std::max<int64_t>(1, kElements / std::max<int64_t>(1, problem.k));
  ParallelFor(pool_threads, schedule, (rows + grain - 1) / grain, [&](int64_t i) {
    for (int64_t row = i * grain; row < std::min(rows, (i + 1) * grain); ++row) {
      kernel.quantize(problem, row);
    }
  });

  // Tiles within rows: the digits of these rows stay in the cache while W streams past them; three
  // digits of a value take more of it.
  const int64_t tile_rows = problem.digits == 3 ? kMaxRows / 2 : kMaxRows;
  const int64_t tiles = (problem.columns + kTileColumns - 1) / kTileColumns;
  const int64_t row_blocks = (rows + tile_rows - 1) / tile_rows;
  ParallelFor(pool_threads, schedule, tiles * row_blocks, [&](int64_t i) {
    const int64_t row = i / tiles * tile_rows;
    kernel.matmul(problem, i % tiles, row, std::min<int64_t>(rows, row + tile_rows));
  });
}

}  // namespace jax_gptq::cpu
