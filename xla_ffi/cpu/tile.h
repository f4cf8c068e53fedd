// The matmul of one tile, written once for all instruction sets.
//
// Isa describes one: vectors I of kLanes int32 and F of as many float32; kVectors of them side by
// side and kRows (1, 2 or 4) rows of x are in registers at once. Dot<wide>(acc, a, b) adds the four
// products of each lane's unsigned bytes a with the lane's signed bytes b; `wide` says that the
// weight's bytes may exceed 15. Isa lives in an unnamed namespace, so that every instantiation is
// private to its file.
//
// For each block of rows k, each row of x and each column, with z the zero point:
//
//   acc[d] = sum over k of digit[d][k] * (q[k] - z)                   exact, int32
//   y     += scale * x_scale * (256 * float(256 * acc[0] + acc[1]) + float(acc[2]))
//
// in f32 with compensation (Kahan). Few rows take q as the unsigned bytes, straight from the packed
// words, and subtract z * sum(digit[d]) at the end. Many rows share q - z, widened once to signed
// bytes, and take digit + 128 as the unsigned ones; -128 * sum(q - z) is where acc then starts.
// Both are the same integers, in any order of summation: every instruction set and every number of
// rows gives the same bits. There is no separate path for large M: three 8-bit dot products have
// 4/3 of the throughput of the f32 FMA that would do the same work, two and one proportionally
// more. 256 * acc[0] + acc[1] fits: 128 rows * 255 * 2^15 < 2^31, and what overflows on the way
// there wraps back.
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
  alignas(64) int32_t start[kTileColumns];  // of acc, for offset digits
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

// The integers of one FixedBlock on their way into the sums. The next FixedBlock takes them there
// bit by bit, between its own dot products, so that both kinds of work share the core.
template <class Isa, int kDigits, bool kOffset>
struct Pending {
  static constexpr int kMaxVectors = Isa::kRows * Isa::kVectors;
  static_assert(kMaxVectors <= kQuads, "a chunk must have a quad for every vector");

  alignas(64) int32_t totals[kMaxVectors][kDigits][Isa::kLanes];
  int vectors = 0;  // how many of them: rows * kVectors
  int64_t at;       // of the first row, in x_scales and x_sums
  float* sum;       // of the first row and column
  float* lost;
  const int32_t* zero;
  const float* scale;

  __attribute__((always_inline)) void Take(int r,
                                           const typename Isa::I (&acc)[Isa::kVectors][kDigits]) {
#pragma GCC unroll 8
    for (int v = 0; v < Isa::kVectors; ++v) {
#pragma GCC unroll 8
      for (int d = 0; d < kDigits; ++d) Isa::StoreI(totals[r * Isa::kVectors + v][d], acc[v][d]);
    }
  }

  __attribute__((always_inline)) void Finish(const Problem& problem, int i) const {
    using I = typename Isa::I;
    using F = typename Isa::F;
    const int r = i / Isa::kVectors, c = i % Isa::kVectors * Isa::kLanes;
    const int64_t x = at + r;
    I high = Isa::LoadI(totals[i][0]);
    if constexpr (kDigits > 1) {
      high = Isa::Add(Isa::ShiftLeft(high, 8), Isa::LoadI(totals[i][1]));
    }
    if constexpr (!kOffset) {
      high = Isa::Sub(high, Isa::Mul(Isa::LoadI(zero + c), Isa::Set(problem.x_sums[2 * x])));
    }
    const F factor = Isa::MulF(Isa::LoadF(scale + c), Isa::SetF(problem.x_scales[x]));
    float* s = sum + r * kTileColumns + c;
    const F old_sum = Isa::LoadF(s);
    if constexpr (kDigits == 3) {
      I low = Isa::LoadI(totals[i][2]);
      if constexpr (!kOffset) {
        low = Isa::Sub(low, Isa::Mul(Isa::LoadI(zero + c), Isa::Set(problem.x_sums[2 * x + 1])));
      }
      float* l = lost + r * kTileColumns + c;
      const F value = Isa::Fma(Isa::Convert(high), Isa::SetF(256.0f), Isa::Convert(low));
      const F corrected = Isa::FusedMulSub(value, factor, Isa::LoadF(l));
      const F new_sum = Isa::AddF(old_sum, corrected);
      Isa::StoreF(l, Isa::SubF(Isa::SubF(new_sum, old_sum), corrected));
      Isa::StoreF(s, new_sum);
    } else {  // Coarser than f32 anyway.
      Isa::StoreF(s, Isa::Fma(Isa::Convert(high), factor, old_sum));
    }
  }

  void FinishAll(const Problem& problem) {
    for (int i = 0; i < vectors; ++i) Finish(problem, i);
    vectors = 0;
  }
};

// One quad's products with one row of x.
template <class Isa, bool kWide, int kDigits, bool kOffset>
static inline __attribute__((always_inline)) void RowQuad(
    const int8_t* digits, const typename Isa::I (&codes)[Isa::kVectors],
    typename Isa::I (&acc)[Isa::kVectors][kDigits]) {
#pragma GCC unroll 8
  for (int d = 0; d < kDigits; ++d) {
    const typename Isa::I x = Isa::Broadcast(digits + d * kChunkRows);
#pragma GCC unroll 8
    for (int v = 0; v < Isa::kVectors; ++v) {
      acc[v][d] =
          Isa::template Dot<kWide>(acc[v][d], kOffset ? x : codes[v], kOffset ? codes[v] : x);
    }
  }
}

// One chunk, quad by quad: each is unpacked once for all rows.
template <class Isa, int kWords, bool kWide, int kDigits, bool kOffset, int kRows, bool kFinish>
static inline __attribute__((always_inline)) void ChunkByQuad(
    const Problem& problem, const uint32_t* words, const int8_t* digits, int64_t stride,
    const char* next, int next_step, typename Isa::I (&acc)[kRows][Isa::kVectors][kDigits],
    const Pending<Isa, kDigits, kOffset>& pending) {
#pragma GCC unroll 8
  for (int j = 0; j < kQuads; ++j) {
    __builtin_prefetch(next + j * next_step);
    typename Isa::I codes[Isa::kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < Isa::kVectors; ++v) {
      codes[v] = LoadQuad<Isa, kWords>(words + v * Isa::kLanes, j);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      RowQuad<Isa, kWide, kDigits, kOffset>(digits + r * stride + j * 4, codes, acc[r]);
    }
    if (kFinish && j < pending.kMaxVectors && j < pending.vectors) pending.Finish(problem, j);
  }
}

// The last chunk of a block, as bytes, row by row. A row's totals are stored while the next row's
// are computed: the stores of all rows in one go would hold the dot products up.
template <class Isa, bool kWide, int kDigits, bool kOffset, int kRows>
static inline __attribute__((always_inline)) void LastChunk(
    const uint32_t* bytes, const int8_t* digits, int64_t stride, const char* next, int next_step,
    typename Isa::I (&acc)[kRows][Isa::kVectors][kDigits],
    Pending<Isa, kDigits, kOffset>* pending) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    // Each row reads the quads anew: pointers the compiler cannot see through keep it from holding
    // them all in registers, which the accumulators need.
    const int8_t* row_digits = digits + r * stride;
    asm("" : "+r"(bytes), "+r"(row_digits));
#pragma GCC unroll 8
    for (int j = 0; j < kQuads; ++j) {
      if (j % kRows == r) __builtin_prefetch(next + j * next_step);
      typename Isa::I codes[Isa::kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < Isa::kVectors; ++v) {
        codes[v] = LoadQuad<Isa, 8>(bytes + v * Isa::kLanes, j);
      }
      RowQuad<Isa, kWide, kDigits, kOffset>(row_digits + j * 4, codes, acc[r]);
    }
    pending->Take(r, acc[r]);
  }
}

// Where the rows of a block are, and what to prefetch meanwhile.
struct Position {
  const uint32_t* words;
  int64_t block;
  int64_t row_begin;
  int64_t row_end;
  const char* next;
  int next_step;  // bytes per quad
};

// One block of fixed-point x: kRows rows from `row`, the tile's columns from `column`.
template <class Isa, int kWords, bool kWide, int kDigits, bool kOffset, int kRows>
static __attribute__((noinline)) void FixedBlock(const Problem& problem, const Position& at,
                                                 int64_t row, const BlockColumns& columns,
                                                 int column, Sums* sums,
                                                 Pending<Isa, kDigits, kOffset>* pending) {
  using I = typename Isa::I;
  const Block& block = problem.blocks[at.block];
  const int64_t stride = block.chunks * kDigits * kChunkRows;
  const int8_t* digits = Digits(problem, block, row);
  const uint32_t* words = at.words + column;
  const char* next = at.next;

  I acc[kRows][Isa::kVectors][kDigits];
#pragma GCC unroll 8
  for (int v = 0; v < Isa::kVectors; ++v) {
    const I start = kOffset ? Isa::LoadI(columns.start + column + v * Isa::kLanes) : Isa::Set(0);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int d = 0; d < kDigits; ++d) acc[r][v][d] = start;
    }
  }
  if constexpr (kDigits == 1) {  // Its blocks are single chunks, with few totals to store.
    ChunkByQuad<Isa, kWords, kWide, kDigits, kOffset, kRows, true>(
        problem, words, digits, stride, next, at.next_step, acc, *pending);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) pending->Take(r, acc[r]);
  } else {
    if (block.chunks == 1) pending->FinishAll(problem);
    for (int chunk = 0; chunk + 1 < block.chunks; ++chunk) {
      if (chunk == 0) {
        ChunkByQuad<Isa, kWords, kWide, kDigits, kOffset, kRows, true>(
            problem, words, digits, stride, next, at.next_step, acc, *pending);
      } else {
        ChunkByQuad<Isa, kWords, kWide, kDigits, kOffset, kRows, false>(
            problem, words, digits, stride, next, at.next_step, acc, *pending);
      }
      words += kWords * kTileColumns;
      digits += kDigits * kChunkRows;
      next += kQuads * at.next_step;
    }
    alignas(64) uint32_t bytes[kWords == 8 ? 1 : kQuads * kTileColumns];
    if constexpr (kWords != 8) {
#pragma GCC unroll 8
      for (int j = 0; j < kQuads; ++j) {
#pragma GCC unroll 8
        for (int v = 0; v < Isa::kVectors; ++v) {
          Isa::StoreI(bytes + j * kTileColumns + v * Isa::kLanes,
                      LoadQuad<Isa, kWords>(words + v * Isa::kLanes, j));
        }
      }
      words = bytes;
    }
    LastChunk<Isa, kWide, kDigits, kOffset, kRows>(words, digits, stride, next, at.next_step, acc,
                                                   pending);
  }
  pending->vectors = kRows * Isa::kVectors;
  pending->at = at.block * problem.rows + row;
  pending->sum = sums->sum[row - at.row_begin] + column;
  pending->lost = sums->lost[row - at.row_begin] + column;
  pending->zero = columns.zero + column;
  pending->scale = columns.scale + column;
}

// FixedBlock for all rows and columns of the tile.
template <class Isa, int kWords, bool kWide, int kDigits, bool kOffset>
static void FixedRows(const Problem& problem, const Position& at, const BlockColumns& columns,
                      Sums* sums, Pending<Isa, kDigits, kOffset>* pending) {
  for (int column = 0; column < kTileColumns; column += Isa::kVectors * Isa::kLanes) {
    int64_t row = at.row_begin;
    for (; row + Isa::kRows <= at.row_end; row += Isa::kRows) {
      FixedBlock<Isa, kWords, kWide, kDigits, kOffset, Isa::kRows>(problem, at, row, columns,
                                                                   column, sums, pending);
    }
    if constexpr (Isa::kRows == 4) {
      if (row + 2 <= at.row_end) {
        FixedBlock<Isa, kWords, kWide, kDigits, kOffset, 2>(problem, at, row, columns, column, sums,
                                                            pending);
        row += 2;
      }
    }
    if (row < at.row_end) {
      FixedBlock<Isa, kWords, kWide, kDigits, kOffset, 1>(problem, at, row, columns, column, sums,
                                                          pending);
    }
  }
}

// One byte per code, as the masks and shifts of LoadQuad give them, done once for many rows:
// unsigned q, or with kOffset the signed q - z and where acc starts.
template <class Isa, int kWords, bool kOffset>
static inline void WidenBlock(const uint32_t* words, int chunks, BlockColumns* columns,
                              uint32_t* bytes) {
  using I = typename Isa::I;
  for (int c = 0; c < kTileColumns; c += Isa::kLanes) {
    const I zeros = Isa::Mul(Isa::LoadI(columns->zero + c), Isa::Set(0x01010101));
    I sum = Isa::Set(0);
    for (int chunk = 0; chunk < chunks; ++chunk) {
#pragma GCC unroll 8
      for (int j = 0; j < kQuads; ++j) {
        I quad = LoadQuad<Isa, kWords>(words + chunk * (kWords * kTileColumns) + c, j);
        if constexpr (kOffset) {
          quad = Isa::SubBytes(quad, zeros);
          sum = Isa::template Dot<false>(sum, Isa::Set(0x01010101), quad);
        }
        Isa::StoreI(bytes + (chunk * kQuads + j) * kTileColumns + c, quad);
      }
    }
    Isa::StoreI(columns->start + c, Isa::Sub(Isa::Set(0), Isa::ShiftLeft(sum, 7)));
  }
}

template <class Isa, int kWords, int kDigits, bool kOffset>
static void FixedMatmul(const Problem& problem, int64_t tile, int64_t row_begin, int64_t row_end,
                        Sums* sums) {
  constexpr int kChunkWords = kWords * kTileColumns;
  const uint32_t* tile_words = problem.tiles + tile * problem.chunks * kChunkWords;
  Pending<Isa, kDigits, kOffset> pending;
  BlockColumns columns[2];  // of this block, and of the one that may be pending
  alignas(64) uint32_t bytes[kOffset ? kMaxBlockChunks * kQuads * kTileColumns : 1];
  for (int64_t b = 0; b < problem.block_count; ++b) {
    const Block& block = problem.blocks[b];
    const uint32_t* words = tile_words + block.chunk * kChunkWords;
    const char* next = reinterpret_cast<const char*>(words + block.chunks * kChunkWords);
    Position at = {words, b, row_begin, row_end, next, kChunkWords * 4 / kQuads};
    LoadColumns(problem, tile, block, &columns[b % 2]);
    if constexpr (kOffset) {
      WidenBlock<Isa, kWords, true>(words, block.chunks, &columns[b % 2], bytes);
      at.words = bytes;
      FixedRows<Isa, 8, false, kDigits, true>(problem, at, columns[b % 2], sums, &pending);
    } else {
      FixedRows<Isa, kWords, kWords == 8, kDigits, false>(problem, at, columns[b % 2], sums,
                                                          &pending);
    }
  }
  pending.FinishAll(problem);
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
    WidenBlock<Isa, kWords, false>(tile_words + block.chunk * (kWords * kTileColumns), block.chunks,
                                   &columns, bytes);
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

template <class Isa, int kWords, int kDigits>
static void FixedMatmulOfDigits(const Problem& problem, int64_t tile, int64_t row_begin,
                                int64_t row_end, Sums* sums) {
  if constexpr (kWords != 8) {
    if (problem.offset_digits) {
      return FixedMatmul<Isa, kWords, kDigits, true>(problem, tile, row_begin, row_end, sums);
    }
  }
  FixedMatmul<Isa, kWords, kDigits, false>(problem, tile, row_begin, row_end, sums);
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
      FixedMatmulOfDigits<Isa, kWords, 1>(problem, tile, row_begin, row_end, &sums);
      break;
    case 2:
      FixedMatmulOfDigits<Isa, kWords, 2>(problem, tile, row_begin, row_end, &sums);
      break;
    default:
      FixedMatmulOfDigits<Isa, kWords, 3>(problem, tile, row_begin, row_end, &sums);
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
