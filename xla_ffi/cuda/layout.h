// The tile layout of the packed weight, shared by every kernel, the emulator and stores/cuda.py.
//
// The weight W [K, N] is the left operand of the tensor cores: a kernel computes y^T = W^T x^T, so
// that rows of a tile are output features n and columns are input features k. N and K are padded
// to multiples of 64; the tiles of one 64 output features follow one another along K.
//
//                      k: 64 per tile                        a tile, 4 bits: 2048 bytes
//            +--------+--------+--------+----            +-----------------------------------+
//      n 64  | tile 0 | tile 1 | tile 2 | ...            | n  0..15: lane 0..31, 16 bytes each |
//            +--------+--------+--------+----            | n 16..31: lane 0..31, 16 bytes each |
//      n 64  | tile S | S + 1  | S + 2  | ...            | n 32..47: lane 0..31, 16 bytes each |
//            +--------+--------+--------+----            | n 48..63: lane 0..31, 16 bytes each |
//                                                        +-----------------------------------+
//
// The 16 bytes of a lane are its fragments of mma.m16n8k16's A operand (the same as wgmma's, from
// registers) for four consecutive steps of 16 along K, one 32-bit word each. With g = lane / 4 and
// t = lane % 4, a fragment is four registers of two 16-bit values, the lower k in the low half:
//
//                 k:  2t, 2t + 1     2t + 8, 2t + 9
//      row n = g      register 0     register 2
//      row n = g + 8  register 1     register 3
//
// Word j of a lane (k from 16 j), 4 bits: nibble r holds the low half of register r, nibble r + 4
// its high half, so that (word >> 4 r) & 0x000f000f is register r as a pair of integers, and OR-ing
// in the exponent of a 16-bit float whose unit in the last place is 1 makes it a pair of floats:
//
//      bit      31    28 27    24 23    20 19    16 15    12 11     8 7      4 3      0
//      register   3 hi     2 hi     1 hi     0 hi     3 lo     2 lo     1 lo     0 lo
//
// 8 bits: a tile is 64 n x 32 k, also 2048 bytes; the 16 bytes of a lane are two steps of 16 along
// K, two words each. The bytes of the first word, from the lowest, are
//      register 0 low, register 1 low, register 0 high, register 1 high
// and the second word holds registers 2 and 3 in the same way. 2 and 3 bits are held as 4.
//
// Scales (f16, bf16 or f32, as stored in the checkpoint) and zero points (one byte) lie as
// [N / 64][groups][64]: the 64 output features of a tile and a group are contiguous.
//
// Padding: where n >= N, codes, zero points and scales are zero; where k >= K, the code is the zero
// point of the last group. Padding therefore dequantizes to exactly zero.
#pragma once

#include <cstdint>

namespace jax_gptq::cuda {

constexpr int kTileN = 64;        // output features of a tile
constexpr int kStepK = 64;        // input features of a step: one tile at 4 bits, two at 8
constexpr int kTileBytes = 2048;  // bytes of a tile, at 4 and at 8 bits
constexpr int kLaneBytes = 16;    // contiguous bytes of one lane in a tile
constexpr int kFragmentN = 16;    // output features of one fragment
constexpr int kFragmentK = 16;    // input features of one fragment

// Element type of activations, scales and bias.
enum class Dtype : int { kF16, kBf16, kF32 };

constexpr int dtype_bytes(Dtype dtype) { return dtype == Dtype::kF32 ? 4 : 2; }

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Division by a number that the host knows, as one multiplication and addition: exact while
// (a + 1) * value < 2^32.
struct Divisor {
  uint32_t value = 1, magic = 0xffffffffu;  // ceil(2^32 / value) - 1

  Divisor() = default;
  explicit constexpr Divisor(int v)
      : value(v), magic(static_cast<uint32_t>(((uint64_t{1} << 32) - 1) / v)) {}

  constexpr int divide(int a) const {
    return static_cast<int>((uint64_t{static_cast<uint32_t>(a)} * magic + magic) >> 32);
  }
};

// Width in which codes of `bits` bits (2, 3, 4 or 8) are held.
constexpr int held_bits(int bits) { return bits <= 4 ? 4 : 8; }

// Tiles along N, and steps of 64 along K.
constexpr int tiles_n(int n) { return ceil_div(n, kTileN); }
constexpr int steps_k(int k) { return ceil_div(k, kStepK); }

// Bytes of the codes of one tile row (64 output features) for one step of 64 along K.
constexpr int step_bytes(int held) { return kTileBytes * held / 4; }

// Byte offset of the 16 bytes of `lane`, for the fragment rows 16 * fragment .. + 15 of tile
// `tile`, at step `step` of `steps`; at 8 bits `half` selects the first or second 32 along K.
constexpr int64_t lane_offset(int held, int steps, int tile, int step, int half, int fragment,
                              int lane) {
  return (static_cast<int64_t>(tile) * steps + step) * step_bytes(held) +
         (half * 4 + fragment) * (32 * kLaneBytes) + lane * kLaneBytes;
}

// Where the code of (n, k) is: the byte of the tile layout that holds it, and the first bit in it.
struct CodePosition {
  int64_t byte;
  int shift;
};

constexpr CodePosition code_position(int held, int steps, int n, int k) {
  const int row = n % kFragmentN;
  const int column = k % kFragmentK;
  const int lane = row % 8 * 4 + column % 8 / 2;
  const int reg = row / 8 + column / 8 * 2;
  const int high = column % 2;
  const int fragment = n % kTileN / kFragmentN;
  const int part = k % kStepK / kFragmentK;  // step of 16 within the 64
  if (held == 4) {
    const int bit = 4 * reg + 16 * high;
    return {lane_offset(4, steps, n / kTileN, k / kStepK, 0, fragment, lane) + part * 4 + bit / 8,
            bit % 8};
  }
  const int byte = reg / 2 * 4 + high * 2 + reg % 2;
  return {
      lane_offset(8, steps, n / kTileN, k / kStepK, part / 2, fragment, lane) + part % 2 * 8 + byte,
      0};
}

// Index of the scale (and zero point) of group `group` and output feature n.
constexpr int64_t parameter_index(int groups, int group, int n) {
  return (static_cast<int64_t>(n / kTileN) * groups + group) * kTileN + n % kTileN;
}

}  // namespace jax_gptq::cuda
