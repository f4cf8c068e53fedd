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
// rows gives the same bits. 256 * acc[0] + acc[1] fits: 128 rows * 255 * 2^15 < 2^31, and what
// overflows on the way there wraps back. Why there is no separate path for large M, and what else
// was measured, is in xla_ffi/docs/cpu_notes.md.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "float_types.h"
#include "prefetch.h"
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

// The scales and zero points of a group's columns, as they are stored.
template <class Isa>
struct StoredColumns {
  static constexpr bool kWidened = false;

  const Problem& problem;
  int64_t begin;

  StoredColumns(const Problem& p, int64_t tile, const Block& block)
      : problem(p), begin((tile * p.groups + block.group) * kTileColumns) {}

  // Of a group further on: the hardware does not follow so sparse a stream in time.
  void Prefetch() const {
    const int64_t ahead = begin + 8 * kTileColumns;
    const int64_t size = problem.scale_type == Float::kF32 ? 4 : 2;
    __builtin_prefetch(static_cast<const char*>(problem.scales) + ahead * size);
    __builtin_prefetch(problem.zeros + ahead);
  }

  typename Isa::F Scale(int column) const {
    alignas(64) float scales[Isa::kLanes];
    LoadFloats(problem.scales, problem.scale_type, begin + column, Isa::kLanes, scales);
    return Isa::LoadF(scales);
  }
  typename Isa::I Zero(int column) const {
    alignas(64) int32_t zeros[Isa::kLanes];
    for (int i = 0; i < Isa::kLanes; ++i) zeros[i] = problem.zeros[begin + column + i];
    return Isa::LoadI(zeros);
  }
};

// A block widened to signed bytes, and where acc starts for offset digits.
template <class Isa>
struct WidenedColumns {
  static constexpr bool kWidened = true;

  alignas(64) float scale[kTileColumns];
  alignas(64) int32_t start[kTileColumns];
  alignas(64) uint32_t bytes[kMaxBlockChunks * kQuads * kTileColumns];

  typename Isa::F Scale(int column) const { return Isa::LoadF(scale + column); }
  typename Isa::I Start(int column) const { return Isa::LoadI(start + column); }
};

// The running sums of a tile's outputs and what their roundings lost.
struct Sums {
  alignas(64) float sum[kMaxRows][kTileColumns];
  alignas(64) float lost[kMaxRows][kTileColumns];
};

// Adds one row's integers of a block and a vector of columns to the row's sums. `zero` is null
// where the zero points are subtracted already.
template <class Isa, int kDigits>
static inline __attribute__((always_inline)) void AddBlock(float x_scale, const int32_t* x_sums,
                                                           typename Isa::F scale,
                                                           const typename Isa::I* zero,
                                                           const typename Isa::I (&acc)[kDigits],
                                                           float* sum, float* lost) {
  using I = typename Isa::I;
  using F = typename Isa::F;
  I high = acc[0];
  if constexpr (kDigits > 1) high = Isa::Add(Isa::ShiftLeft(high, 8), acc[1]);
  if (zero != nullptr) high = Isa::Sub(high, Isa::Mul(*zero, Isa::Set(x_sums[0])));
  const F factor = Isa::MulF(scale, Isa::SetF(x_scale));
  const F old_sum = Isa::LoadF(sum);
  if constexpr (kDigits == 3) {
    I low = acc[2];
    if (zero != nullptr) low = Isa::Sub(low, Isa::Mul(*zero, Isa::Set(x_sums[1])));
    const F value = Isa::Fma(Isa::Convert(high), Isa::SetF(256.0f), Isa::Convert(low));
    const F corrected = Isa::FusedMulSub(value, factor, Isa::LoadF(lost));
    const F new_sum = Isa::AddF(old_sum, corrected);
    Isa::StoreF(lost, Isa::SubF(Isa::SubF(new_sum, old_sum), corrected));
    Isa::StoreF(sum, new_sum);
  } else {  // Coarser than f32 anyway.
    Isa::StoreF(sum, Isa::Fma(Isa::Convert(high), factor, old_sum));
  }
}

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

// Calls body(kBegin), body(kBegin + kStep), ..., with constants below kEnd.
template <int kBegin, int kEnd, int kStep, class Body>
static inline __attribute__((always_inline)) void Steps(const Body& body) {
  if constexpr (kBegin < kEnd) {
    body(Constant<kBegin>());
    Steps<kBegin + kStep, kEnd, kStep>(body);
  }
}

// One block of fixed-point x: kRows rows from `row`, the tile's columns from `column`.
template <class Isa, int kWords, bool kWide, int kDigits, int kRows, class Columns>
static inline __attribute__((always_inline)) void FixedBlock(const Problem& problem, int64_t b,
                                                             int64_t row, const uint32_t* words,
                                                             const Columns& columns, int column,
                                                             float (*sum)[kTileColumns],
                                                             float (*lost)[kTileColumns]) {
  using I = typename Isa::I;
  using F = typename Isa::F;
  constexpr int kVectors = Isa::kVectors;
  constexpr bool kWidened = Columns::kWidened;
  constexpr int kQuadLines = kWords == 8 ? 2 : 1;  // of the cache
  // A dot product takes several cycles: too few accumulators would wait for one another.
  constexpr int kParts = kRows * kVectors * kDigits < 4 ? 2 : 1;
  // Rows of widened columns meet the last chunk a few at a time, so that the CPU adds the sums of
  // some while it multiplies the next: as few as keep enough accumulators.
  constexpr int kStep = !kWidened || kDigits == 1 ? kRows : std::min(kRows, kDigits == 3 ? 1 : 2);
  const Block& block = problem.blocks[b];
  const int64_t stride = block.chunks * kDigits * kChunkRows;
  const int8_t* digits = Digits(problem, block, row);
  const float* x_scales = problem.x_scales + b * problem.rows + row;
  const int32_t* x_sums = problem.x_sums + 2 * (b * problem.rows + row);
  words += column;

  I acc[kRows][kVectors][kParts][kDigits];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 8
      for (int d = 0; d < kParts * kDigits; ++d) acc[r][v][d / kDigits][d % kDigits] = Isa::Set(0);
      if constexpr (kWidened) {
#pragma GCC unroll 8
        for (int d = 0; d < kDigits; ++d) acc[r][v][0][d] = columns.Start(column + v * Isa::kLanes);
      }
    }
  }
  const auto multiply = [&](auto first, auto last) __attribute__((always_inline)) {
    constexpr int kFirst = first, kLast = last;
#pragma GCC unroll 8
    for (int j = 0; j < kQuads; ++j) {
      if constexpr (!kWidened) {
#pragma GCC unroll 2
        for (int line = 0; line < kQuadLines; ++line) {
          Prefetch(words + j * (kWords * kTileColumns / kQuads) + line * 16);
        }
      }
      I codes[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        codes[v] = LoadQuad<Isa, kWords>(words + v * Isa::kLanes, j);
      }
#pragma GCC unroll 8
      for (int r = kFirst; r < kLast; ++r) {
#pragma GCC unroll 8
        for (int d = 0; d < kDigits; ++d) {
          const I x = Isa::Broadcast(digits + r * stride + d * kChunkRows + j * 4);
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) {
            I& a = acc[r][v][j % kParts][d];
            a = Isa::template Dot<kWide>(a, kWidened ? x : codes[v], kWidened ? codes[v] : x);
          }
        }
      }
    }
  };
  const int chunks = kStep < kRows ? block.chunks - 1 : block.chunks;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    multiply(Constant<0>(), Constant<kRows>());
    words += kWords * kTileColumns;
    digits += kDigits * kChunkRows;
  }
  F scale[kVectors];
  I zero[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    scale[v] = columns.Scale(column + v * Isa::kLanes);
    if constexpr (!kWidened) zero[v] = columns.Zero(column + v * Isa::kLanes);
  }
  Steps<0, kRows, kStep>([&](auto first) __attribute__((always_inline)) {
    constexpr int kFirst = first;
    if constexpr (kStep < kRows) multiply(first, Constant<kFirst + kStep>());
#pragma GCC unroll 8
    for (int r = kFirst; r < kFirst + kStep; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 8
        for (int d = 0; d < kDigits; ++d) {
          if constexpr (kParts == 2) acc[r][v][0][d] = Isa::Add(acc[r][v][0][d], acc[r][v][1][d]);
        }
        const int c = column + v * Isa::kLanes;
        AddBlock<Isa, kDigits>(x_scales[r], x_sums + 2 * r, scale[v], kWidened ? nullptr : &zero[v],
                               acc[r][v][0], sum[r] + c, lost[r] + c);
      }
    }
  });
}

// Calls body(row, number) for kRows rows at a time, and for what remains by halves of that.
template <int kRows, class Body>
static inline void ByRows(int64_t begin, int64_t end, const Body& body) {
  for (; begin + kRows <= end; begin += kRows) body(begin, Constant<kRows>());
  if constexpr (kRows > 1) ByRows<kRows / 2>(begin, end, body);
}

// All blocks of fixed-point x, for kRows rows that read the packed words themselves.
template <class Isa, int kWords, int kDigits, int kRows>
static __attribute__((noinline)) void FewRows(const Problem& problem, int64_t tile, int64_t row,
                                              float (*sum)[kTileColumns],
                                              float (*lost)[kTileColumns]) {
  const uint32_t* words = problem.tiles + tile * problem.chunks * (kWords * kTileColumns);
  for (int column = 0; column < kTileColumns; column += Isa::kVectors * Isa::kLanes) {
    for (int64_t b = 0; b < problem.block_count; ++b) {
      const Block& block = problem.blocks[b];
      const StoredColumns<Isa> columns(problem, tile, block);
      columns.Prefetch();
      FixedBlock<Isa, kWords, kWords == 8, kDigits, kRows>(
          problem, b, row, words + block.chunk * (kWords * kTileColumns), columns, column, sum,
          lost);
    }
  }
}

// One byte per code, as the masks and shifts of LoadQuad give them.
template <class Isa, int kWords>
static inline void WidenBlock(const uint32_t* words, int chunks, uint32_t* bytes) {
  for (int chunk = 0; chunk < chunks; ++chunk) {
    for (int c = 0; c < kTileColumns; c += Isa::kLanes) {
#pragma GCC unroll 8
      for (int j = 0; j < kQuads; ++j) {
        Isa::StoreI(bytes + (chunk * kQuads + j) * kTileColumns + c,
                    LoadQuad<Isa, kWords>(words + chunk * (kWords * kTileColumns) + c, j));
      }
    }
  }
}

// The same less the zero point: signed bytes, and what goes with them.
template <class Isa, int kWords>
static __attribute__((noinline)) void WidenSigned(const StoredColumns<Isa>& stored,
                                                  const uint32_t* words, int chunks,
                                                  WidenedColumns<Isa>* columns) {
  using I = typename Isa::I;
  for (int c = 0; c < kTileColumns; c += Isa::kLanes) {
    const I zeros = Isa::Mul(stored.Zero(c), Isa::Set(0x01010101));
    I sums[2] = {Isa::Set(0), Isa::Set(0)};  // One would be a chain of dot products.
    for (int chunk = 0; chunk < chunks; ++chunk) {
#pragma GCC unroll 8
      for (int j = 0; j < kQuads; ++j) {
        const uint32_t* from = words + chunk * (kWords * kTileColumns);
        if (c == 0) Prefetch(from + j * (kWords * kTileColumns / kQuads));
        const I quad = Isa::SubBytes(LoadQuad<Isa, kWords>(from + c, j), zeros);
        sums[j % 2] = Isa::template Dot<false>(sums[j % 2], Isa::Set(0x01010101), quad);
        Isa::StoreI(columns->bytes + (chunk * kQuads + j) * kTileColumns + c, quad);
      }
    }
    const I sum = Isa::Add(sums[0], sums[1]);
    Isa::StoreI(columns->start + c, Isa::Sub(Isa::Set(0), Isa::ShiftLeft(sum, 7)));
    Isa::StoreF(columns->scale + c, stored.Scale(c));
  }
}

template <class Isa, int kDigits, int kRows>
static __attribute__((noinline)) void WidenedBlock(const Problem& problem, int64_t b, int64_t row,
                                                   const WidenedColumns<Isa>& columns,
                                                   float (*sum)[kTileColumns],
                                                   float (*lost)[kTileColumns]) {
  for (int column = 0; column < kTileColumns; column += Isa::kVectors * Isa::kLanes) {
    FixedBlock<Isa, 8, false, kDigits, kRows>(problem, b, row, columns.bytes, columns, column, sum,
                                              lost);
  }
}

// All blocks of fixed-point x, each widened once for all rows.
template <class Isa, int kWords, int kDigits>
static void ManyRows(const Problem& problem, int64_t tile, int64_t row_begin, int64_t row_end,
                     Sums* sums) {
  const uint32_t* words = problem.tiles + tile * problem.chunks * (kWords * kTileColumns);
  WidenedColumns<Isa> columns;
  for (int64_t b = 0; b < problem.block_count; ++b) {
    const Block& block = problem.blocks[b];
    WidenSigned<Isa, kWords>(StoredColumns<Isa>(problem, tile, block),
                             words + block.chunk * (kWords * kTileColumns), block.chunks, &columns);
    ByRows<Isa::kRows>(row_begin, row_end, [&](int64_t row, auto rows) {
      WidenedBlock<Isa, kDigits, rows>(problem, b, row, columns, sums->sum + (row - row_begin),
                                       sums->lost + (row - row_begin));
    });
  }
}

// One block in f32: kRows of x, already gathered and padded.
template <class Isa, int kRows>
static inline void F32Block(const uint32_t* bytes, int chunks, const float (*x)[kMaxBlockRows],
                            const StoredColumns<Isa>& columns, int column,
                            float (*sums)[kTileColumns]) {
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
        const F w = Isa::Convert(Isa::Sub(code, columns.Zero(c)));
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
      Isa::StoreF(sums[r] + c, Isa::Fma(columns.Scale(c), acc[r][v], Isa::LoadF(sums[r] + c)));
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
    const StoredColumns<Isa> columns(problem, tile, block);
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
  const auto store = [&](auto count) {
    if (problem.bias != nullptr) {
      for (int i = 0; i < count; ++i) sums[i] += problem.bias[first + i];
    }
    StoreFloats(sums, count, problem.y, problem.x_type, row * problem.columns + first);
  };
  const int64_t left = problem.columns - first;
  if (left < kTileColumns) {
    store(static_cast<int>(left));
  } else {
    store(Constant<kTileColumns>());  // A copy of a constant size is no call.
  }
}

template <class Isa, int kWords, int kDigits>
static void FixedMatmul(const Problem& problem, int64_t tile, int64_t row_begin, int64_t row_end,
                        Sums* sums) {
  if constexpr (kWords != 8) {
    if (problem.offset_digits) {
      return ManyRows<Isa, kWords, kDigits>(problem, tile, row_begin, row_end, sums);
    }
  }
  ByRows<Isa::kRows>(row_begin, row_end, [&](int64_t row, auto rows) {
    FewRows<Isa, kWords, kDigits, rows>(problem, tile, row, sums->sum + (row - row_begin),
                                        sums->lost + (row - row_begin));
  });
}

template <class Isa, int kWords>
static void MatmulOfWords(const Problem& problem, int64_t tile, int64_t row_begin,
                          int64_t row_end) {
  Sums sums;
  const int64_t count = row_end - row_begin;
  std::memset(sums.sum, 0, count * sizeof(sums.sum[0]));
  if (problem.digits == 3) std::memset(sums.lost, 0, count * sizeof(sums.lost[0]));
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
