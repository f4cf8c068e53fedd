// The matmul of one tile, written once for all instruction sets.
//
// Isa describes one: vectors I of kLanes int32 and F of as many float32; kVectors of them side by
// side and kRows rows of x are in registers at once. Dot<wide>(acc, codes, digits) adds the four
// products of each lane's unsigned bytes with the lane's signed bytes; `wide` says that codes may
// exceed 15. Isa lives in an unnamed namespace, so that every instantiation is private to its file.
//
// For each block of rows k, each row of x and each column, with z the zero point:
//
//   acc[d] = sum over k of digit[d][k] * q[k]                         exact, int32
//   high   = 256 * acc[0] + acc[1] - z * x_sums[0]                    exact, int32
//   low    = acc[2] - z * x_sums[1]                                   exact, int32
//   y     += scale * x_scale * (256 * float(high) + float(low))       f32, compensated (Kahan)
//
// |high| < 2^31: 128 rows * 255 * 2^15 is below it, and the subtraction may wrap on the way. The
// integers do not depend on the order of summation, so every instruction set and every number of
// rows gives the same bits.
#pragma once

#include <cstdint>

#include "float_types.h"
#include "problem.h"
#include "quantize.h"

namespace jax_gptq::cpu {

// The codes of quad j (a constant after unrolling) of a chunk, one per byte.
template <class Isa, int kWords>
static inline typename Isa::I LoadQuad(const uint32_t* chunk, int j) {
  if constexpr (kWords == 8) {
    return Isa::Load(chunk + j * kTileColumns);
  } else if constexpr (kWords == 4) {
    auto words = Isa::Load(chunk + j / 2 * kTileColumns);
    return Isa::And(Isa::ShiftRight(words, 4 * (j % 2)), Isa::Set(0x0f0f0f0f));
  } else {
    auto words = Isa::Load(chunk + j / 4 * kTileColumns);
    auto codes = Isa::And(Isa::ShiftRight(words, 2 * (j % 4)), Isa::Set(0x03030303));
    if constexpr (kWords == 3) {
      auto top = Isa::Load(chunk + 2 * kTileColumns);
      top = j < 2 ? Isa::ShiftLeft(top, 2 - j) : Isa::ShiftRight(top, j - 2);
      codes = Isa::Or(codes, Isa::And(top, Isa::Set(0x04040404)));
    }
    return codes;
  }
}

// What one block's rows of W have in common with every row of x.
struct BlockColumns {
  alignas(64) float scale[kTileColumns];
  alignas(64) int32_t zero[kTileColumns];
};

static inline void LoadColumns(const Problem& problem, int64_t tile, const Block& block,
                               BlockColumns* columns) {
  const int64_t begin = (tile * problem.groups + block.group) * kTileColumns;
  LoadFloats(problem.scales, problem.scale_type, begin, kTileColumns, columns->scale);
  for (int i = 0; i < kTileColumns; ++i) columns->zero[i] = problem.zeros[begin + i];
}

// The running sums of a tile's outputs and what their roundings lost.
struct Sums {
  alignas(64) float sum[kMaxRows][kTileColumns];
  alignas(64) float lost[kMaxRows][kTileColumns];
};

// One block of fixed-point x: kRows rows from `row`, the tile's columns from `column`.
template <class Isa, int kWords, bool kWide, int kDigits, int kRows>
static inline void FixedBlock(const Problem& problem, const uint32_t* words, int64_t b, int64_t row,
                              const BlockColumns& columns, int column, Sums* sums, int64_t slot) {
  using I = typename Isa::I;
  using F = typename Isa::F;
  constexpr int kVectors = Isa::kVectors;
  const Block& block = problem.blocks[b];
  const int64_t stride = problem.chunks * kDigits * kChunkRows;
  const int8_t* digits = problem.x_digits + row * stride + block.chunk * kDigits * kChunkRows;
  words += column;

  I acc[kRows][kVectors][kDigits];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 8
      for (int d = 0; d < kDigits; ++d) acc[r][v][d] = Isa::Set(0);
    }
  }
  for (int chunk = 0; chunk < block.chunks; ++chunk) {
#pragma GCC unroll 8
    for (int j = 0; j < kQuads; ++j) {
      I codes[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        codes[v] = LoadQuad<Isa, kWords>(words + v * Isa::kLanes, j);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int d = 0; d < kDigits; ++d) {
          const I x = Isa::Broadcast(digits + r * stride + d * kChunkRows + j * 4);
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) {
            acc[r][v][d] = Isa::template Dot<kWide>(acc[r][v][d], codes[v], x);
          }
        }
      }
    }
    words += kWords * kTileColumns;
    digits += kDigits * kChunkRows;
  }

#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const int64_t at = (row + r) * problem.block_count + b;
    const I high_sum = Isa::Set(problem.x_sums[2 * at]);
    const I low_sum = Isa::Set(problem.x_sums[2 * at + 1]);
    const F x_scale = Isa::SetF(problem.x_scales[at]);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const int c = column + v * Isa::kLanes;
      const I zero = Isa::LoadI(columns.zero + c);
      I high = acc[r][v][0];
      if constexpr (kDigits > 1) high = Isa::Add(Isa::ShiftLeft(high, 8), acc[r][v][1]);
      F value = Isa::Convert(Isa::Sub(high, Isa::Mul(zero, high_sum)));
      if constexpr (kDigits == 3) {
        const I low = Isa::Sub(acc[r][v][2], Isa::Mul(zero, low_sum));
        value = Isa::Fma(value, Isa::SetF(256.0f), Isa::Convert(low));
      }
      const F term = Isa::MulF(value, Isa::MulF(Isa::LoadF(columns.scale + c), x_scale));
      float* sum = sums->sum[slot + r] + c;
      float* lost = sums->lost[slot + r] + c;
      const F old_sum = Isa::LoadF(sum);
      const F corrected = Isa::SubF(term, Isa::LoadF(lost));
      const F new_sum = Isa::AddF(old_sum, corrected);
      Isa::StoreF(lost, Isa::SubF(Isa::SubF(new_sum, old_sum), corrected));
      Isa::StoreF(sum, new_sum);
    }
  }
}

// FixedBlock for all rows and columns of the tile.
template <class Isa, int kWords, bool kWide, int kDigits>
static void FixedRows(const Problem& problem, const uint32_t* words, int64_t b, int64_t row_begin,
                      int64_t row_end, const BlockColumns& columns, Sums* sums) {
  for (int column = 0; column < kTileColumns; column += Isa::kVectors * Isa::kLanes) {
    int64_t row = row_begin;
    for (; row + Isa::kRows <= row_end; row += Isa::kRows) {
      FixedBlock<Isa, kWords, kWide, kDigits, Isa::kRows>(problem, words, b, row, columns, column,
                                                          sums, row - row_begin);
    }
    const int64_t slot = row - row_begin;
    switch (row_end - row) {
      case 3:
        if constexpr (Isa::kRows > 3) {
          FixedBlock<Isa, kWords, kWide, kDigits, 3>(problem, words, b, row, columns, column, sums,
                                                     slot);
        }
        break;
      case 2:
        if constexpr (Isa::kRows > 2) {
          FixedBlock<Isa, kWords, kWide, kDigits, 2>(problem, words, b, row, columns, column, sums,
                                                     slot);
        }
        break;
      case 1:
        FixedBlock<Isa, kWords, kWide, kDigits, 1>(problem, words, b, row, columns, column, sums,
                                                   slot);
    }
  }
}

// One byte per code: what the masks and shifts of LoadQuad give, done once for many rows.
template <class Isa, int kWords>
static inline void WidenBlock(const uint32_t* words, int chunks, uint32_t* bytes) {
  for (int chunk = 0; chunk < chunks; ++chunk) {
#pragma GCC unroll 8
    for (int j = 0; j < kQuads; ++j) {
      for (int c = 0; c < kTileColumns; c += Isa::kLanes) {
        Isa::StoreI(bytes + j * kTileColumns + c, LoadQuad<Isa, kWords>(words + c, j));
      }
    }
    words += kWords * kTileColumns;
    bytes += kQuads * kTileColumns;
  }
}

template <class Isa, int kWords, int kDigits>
static void FixedMatmul(const Problem& problem, int64_t tile, int64_t row_begin, int64_t row_end,
                        Sums* sums) {
  constexpr bool kWide = kWords == 8;
  const uint32_t* tile_words = problem.tiles + tile * problem.chunks * (kWords * kTileColumns);
  for (int64_t b = 0; b < problem.block_count; ++b) {
    const Block& block = problem.blocks[b];
    const uint32_t* words = tile_words + block.chunk * (kWords * kTileColumns);
    BlockColumns columns;
    LoadColumns(problem, tile, block, &columns);
    if (kWords != 8 && row_end - row_begin >= Isa::kWidenRows) {
      alignas(64) uint32_t bytes[kMaxBlockChunks * kQuads * kTileColumns];
      WidenBlock<Isa, kWords>(words, block.chunks, bytes);
      FixedRows<Isa, 8, kWide, kDigits>(problem, bytes, b, row_begin, row_end, columns, sums);
    } else {
      FixedRows<Isa, kWords, kWide, kDigits>(problem, words, b, row_begin, row_end, columns, sums);
    }
  }
}

// One block in f32: kRows of x, already gathered and padded.
template <class Isa, int kRows>
static inline void F32Block(const uint32_t* bytes, int chunks, const float (*x)[kMaxBlockRows],
                            const BlockColumns& columns, int column, float (*sums)[kTileColumns]) {
  using I = typename Isa::I;
  using F = typename Isa::F;
  constexpr int kVectors = Isa::kVectors;
  F acc[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) acc[r][v] = Isa::SetF(0.0f);
  }
  for (int quad = 0; quad < chunks * kQuads; ++quad) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const int c = column + v * Isa::kLanes;
        const I words = Isa::Load(bytes + quad * kTileColumns + c);
        const I code = Isa::And(Isa::ShiftRight(words, 8 * i), Isa::Set(255));
        const F w = Isa::Convert(Isa::Sub(code, Isa::LoadI(columns.zero + c)));
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          acc[r][v] = Isa::Fma(Isa::SetF(x[r][4 * quad + i]), w, acc[r][v]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const int c = column + v * Isa::kLanes;
      const F scale = Isa::LoadF(columns.scale + c);
      Isa::StoreF(sums[r] + c, Isa::Fma(scale, acc[r][v], Isa::LoadF(sums[r] + c)));
    }
  }
}

// Up to kRows rows of x, given by index, in f32.
template <class Isa, int kWords, int kRows>
static void F32Matmul(const Problem& problem, int64_t tile, const int64_t* rows,
                      float (*sums)[kTileColumns]) {
  const uint32_t* tile_words = problem.tiles + tile * problem.chunks * (kWords * kTileColumns);
  for (int64_t b = 0; b < problem.block_count; ++b) {
    const Block& block = problem.blocks[b];
    BlockColumns columns;
    LoadColumns(problem, tile, block, &columns);
    alignas(64) uint32_t bytes[kMaxBlockChunks * kQuads * kTileColumns];
    WidenBlock<Isa, kWords>(tile_words + block.chunk * (kWords * kTileColumns), block.chunks,
                            bytes);
    float x[kRows][kMaxBlockRows];
    for (int r = 0; r < kRows; ++r) LoadBlock(problem, block, rows[r], x[r]);
    for (int column = 0; column < kTileColumns; column += Isa::kVectors * Isa::kLanes) {
      F32Block<Isa, kRows>(bytes, block.chunks, x, columns, column, sums);
    }
  }
}

static inline void StoreRow(const Problem& problem, int64_t tile, int64_t row, float* sums) {
  const int64_t first = tile * kTileColumns;
  const int64_t left = problem.columns - first;
  const int count = left < kTileColumns ? static_cast<int>(left) : kTileColumns;
  if (problem.bias != nullptr) {
    for (int i = 0; i < count; ++i) sums[i] += problem.bias[first + i];
  }
  StoreFloats(sums, count, problem.y, problem.x_type, row * problem.columns + first);
}

template <class Isa, int kWords>
static void MatmulOfWords(const Problem& problem, int64_t tile, int64_t row_begin,
                          int64_t row_end) {
  Sums sums;
  const int64_t count = row_end - row_begin;
  std::memset(sums.sum, 0, count * sizeof(sums.sum[0]));
  std::memset(sums.lost, 0, count * sizeof(sums.lost[0]));
  switch (problem.digits) {
    case 1:
      FixedMatmul<Isa, kWords, 1>(problem, tile, row_begin, row_end, &sums);
      break;
    case 2:
      FixedMatmul<Isa, kWords, 2>(problem, tile, row_begin, row_end, &sums);
      break;
    default:
      FixedMatmul<Isa, kWords, 3>(problem, tile, row_begin, row_end, &sums);
  }
  int64_t in_f32[kMaxRows];
  int64_t in_f32_count = 0;
  for (int64_t row = row_begin; row < row_end; ++row) {
    if (problem.x_in_f32[row]) {
      in_f32[in_f32_count++] = row;
    } else {
      StoreRow(problem, tile, row, sums.sum[row - row_begin]);
    }
  }
  for (int64_t i = 0; i < in_f32_count;) {
    const int64_t rows = in_f32_count - i >= 4 ? 4 : 1;
    std::memset(sums.sum, 0, rows * sizeof(sums.sum[0]));
    if (rows == 4) {
      F32Matmul<Isa, kWords, 4>(problem, tile, in_f32 + i, sums.sum);
    } else {
      F32Matmul<Isa, kWords, 1>(problem, tile, in_f32 + i, sums.sum);
    }
    for (int64_t r = 0; r < rows; ++r) StoreRow(problem, tile, in_f32[i + r], sums.sum[r]);
    i += rows;
  }
}

template <class Isa>
static void Matmul(const Problem& problem, int64_t tile, int64_t row_begin, int64_t row_end) {
  switch (problem.words) {
    case 2:
      return MatmulOfWords<Isa, 2>(problem, tile, row_begin, row_end);
    case 3:
      return MatmulOfWords<Isa, 3>(problem, tile, row_begin, row_end);
    case 4:
      return MatmulOfWords<Isa, 4>(problem, tile, row_begin, row_end);
    default:
      return MatmulOfWords<Isa, 8>(problem, tile, row_begin, row_end);
  }
}

}  // namespace jax_gptq::cpu
