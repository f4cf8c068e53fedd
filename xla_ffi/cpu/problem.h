// What a kernel is given: plain pointers, no XLA and no Python.
//
// The weight is in the `cpu` layout, drawn in jax_gptq/stores/cpu.py: tiles of 32 columns, chunks
// of 32 rows, `words` 32-bit words per column and chunk. A block is what shares one scale of x: up
// to four chunks of one group (one chunk with int8 activations).
#pragma once

#include <cstdint>

namespace jax_gptq::cpu {

constexpr int kTileColumns = 32;
constexpr int kChunkRows = 32;
constexpr int kQuads = kChunkRows / 4;  // a quad: four consecutive rows, one byte each
constexpr int kMaxBlockChunks = 4;
constexpr int kMaxBlockRows = kMaxBlockChunks * kChunkRows;

enum class Float { kF32, kBF16, kF16 };

struct Block {
  int64_t chunk;   // first chunk
  int32_t chunks;  // 1 to kMaxBlockChunks
  int32_t rows;    // rows of W in them; the rest is padding
  int64_t row;     // first row, in order of group
  int64_t group;
};

struct Problem {
  // x [rows, k], and row i of the packed W reads column perm[i] of x (column i where perm is null).
  const void* x;
  Float x_type;
  int64_t rows;
  int64_t k;
  const int32_t* perm;

  // W [k, columns].
  const uint32_t* tiles;  // [tiles, chunks, words, 32]
  int words;              // 2, 3, 4 or 8: how the codes are held
  const void* scales;     // [tiles, groups, 32]
  Float scale_type;
  const uint8_t* zeros;  // [tiles, groups, 32]
  int64_t chunks;
  int64_t groups;
  int64_t columns;
  const Block* blocks;
  int64_t block_count;

  const float* bias;  // [columns] or null
  void* y;            // [rows, columns], of x_type

  // x as fixed point, filled by Kernel::quantize: x = x_scale * sum over d of digit[d] *
  // 256^(D-1-d).
  int digits;          // D: 3, 2, or 1 for int8 activations
  bool offset_digits;  // stored as digit + 128, unsigned
  // Block by block, so that the rows of one block are read as one stream.
  int8_t* x_digits;   // [block_count][rows, chunks of the block, D, 32], top digit first
  float* x_scales;    // [block_count, rows]
  int32_t* x_sums;    // [block_count, rows, 2]: of all digits but a third, of the third
  uint8_t* x_in_f32;  // [rows]: not fit for fixed point, computed by f32 FMA
};

// Rows that one call of Kernel::matmul handles at most.
constexpr int kMaxRows = 128;

// y = x W^T, of a table W.
struct TableProblem {
  const float* x;     // [rows, k]
  const void* table;  // [columns, k], of table_type
  Float table_type;   // kBF16 or kF16
  float* y;           // [rows, columns]
  int64_t rows, columns, k;
};

}  // namespace jax_gptq::cpu
