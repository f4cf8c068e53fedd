// Kernel V, one or two rows: y [m, n] = x [m, k] W [k, n] for m <= 2, limited by reading the
// weight.
//
// The products are of integers. A row of x becomes four balanced base-256 digits, in fixed point
// relative to the largest of its values that a warp holds; digits are bytes, and so are codes: the
// tensor cores multiply the codes as they are, four to a word after two masks, by the digits, which
// are four columns of one product. Per 1 KB of codes that is a third of the instructions that
// 16-bit floats take. Zero points are subtracted from the sums, with the sum of the digits, which a
// product with ones gives; scales apply in f32.
//
// A warp owns a 16th of K, for every strip of 16 output features that its block takes: it makes the
// digits of its own part of x, streams codes and scales through a ring of its own, and meets the
// other warps once, to add up the sums. Blocks take strips in turn, neighbours at the same time.
//
// Error: the digits hold 30 bits below the largest |x| of a warp's part of K, so an output differs
// by at most 2^-31 sum over parts of max |x| sum |W|, beside the rounding of f32 sums. A part that
// holds an Inf or a NaN, or an |x| so large that usual ones would lose their digits (2^14 times the
// least of the lanes' largest), is multiplied in f32 instead, value by value.
#pragma once

#include "fragment.cuh"
#include "gemv.h"

namespace jax_gptq::cuda {

constexpr float kWidestRange = 16384.0f;

// 2^e, for e in [-126, 127].
__device__ __forceinline__ float power_of_two(int e) {
  return bits_float(static_cast<uint32_t>(e + 127) << 23);
}

// value 2^e, where 2^e alone may be out of range.
__device__ __forceinline__ float scale_by_power(float value, int e) {
  const int half = e / 2;
  return value * power_of_two(half) * power_of_two(e - half);
}

// The byte of digit d of word i is byte i of result d.
__device__ __forceinline__ void transpose_bytes(uint32_t (&words)[4]) {
  const uint32_t low01 = prmt(words[0], words[1], 0x5140),
                 high01 = prmt(words[0], words[1], 0x7362);
  const uint32_t low23 = prmt(words[2], words[3], 0x5140),
                 high23 = prmt(words[2], words[3], 0x7362);
  words[0] = prmt(low01, low23, 0x5410);
  words[1] = prmt(low01, low23, 0x7632);
  words[2] = prmt(high01, high23, 0x5410);
  words[3] = prmt(high01, high23, 0x7632);
}

// Writes the digits of row `row` of x for the steps [first, last) of 64 along K, the calling
// warp's: 16 bytes for every step, digit and lane % 4, a word for each 16 along K. Bytes of a word
// are in the order of the codes' (code_bytes). Returns the exponent e of the fixed point, values
// being digits 2^(e - 30), or kNoDigits where the part must be multiplied in f32.
constexpr int kNoDigits = 1 << 20;

template <class T>
__device__ __forceinline__ int write_digits(const Problem& p, int row, int first, int last,
                                            uint32_t digits) {
  const int lane = threadIdx.x % 32;
  const int t = lane % 4, pair = lane / 4 % 2;  // two words of 16 along K at once
  const uint16_t* x = static_cast<const uint16_t*>(p.x) + static_cast<int64_t>(row) * p.k;
  const auto load = [&](uint32_t (&pairs)[4], int step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int k = step * kStepK + pair * 32 + i * 8 + 2 * t;
      pairs[i] = k < p.k ? ld_global_nc<uint32_t>(x + k) : 0;  // K is even
    }
  };
  uint32_t own = 0;  // largest magnitude of this lane, as bits of T
#pragma unroll 1
  for (int step = first + lane / 8; step < last; step += 4) {
    uint32_t pairs[4];
    load(pairs, step);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      own = max(own, max(pairs[i] & 0x7fffu, pairs[i] >> 16 & 0x7fffu));
    }
  }
  const uint32_t bits = warp_max(own);
  const float largest = to_float<T>(static_cast<uint16_t>(bits));
  // Of lanes that have anything but zeros.
  const uint32_t least = warp_min(own == 0 ? 0x7fffu : own);
  const bool finite = bits < (std::is_same<T, F16>::value ? 0x7c00u : 0x7f80u);
  const bool digital =
      bits == 0 || (finite && largest <= kWidestRange * to_float<T>(static_cast<uint16_t>(least)));
  const int exponent = static_cast<int>(float_bits(largest) >> 23) - 126;  // largest < 2^exponent
#pragma unroll 1
  for (int step = first + lane / 8; step < last; step += 4) {
    uint32_t pairs[4];
    load(pairs, step);
    uint32_t words[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 value = unpack2<T>(pairs[2 * i + half]);
        const float values[2] = {value.x, value.y};
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const int fixed = digital ? to_int(scale_by_power(values[odd], 30 - exponent)) : 0;
          // Bytes from 0 to 255 with 128 added become digits from -128 to 127.
          words[i][2 * odd + half] = (static_cast<uint32_t>(fixed) + 0x00808080u) ^ 0x00808080u;
        }
      }
      transpose_bytes(words[i]);
    }
#pragma unroll
    for (int d = 0; d < kDigits; ++d) {
      st_shared(digits + step * (kStepK * kDigits) + (d * 4 + t) * 16 + pair * 8,
                make_uint2(words[0][d], words[1][d]));
    }
  }
  return digital ? exponent : kNoDigits;
}

// The codes of 16 along K, of rows lane / 4 and lane / 4 + 8, from one word at 4 bits, two at 8:
// bytes for k = 2t, 2t + 8, 2t + 1, 2t + 9 with t = lane % 4.
template <int kBits>
__device__ __forceinline__ void code_bytes(uint32_t& low_row, uint32_t& high_row,
                                           const uint32_t* words) {
  if constexpr (kBits == 4) {
    low_row = words[0] & 0x0f0f0f0fu;
    high_row = words[0] >> 4 & 0x0f0f0f0fu;
  } else {
    low_row = prmt(words[0], words[1], 0x6240);
    high_row = prmt(words[0], words[1], 0x7351);
  }
}

// Sum over [first_k, last_k) of x [row, k] W [k, n], value by value; lanes 0..15 are the output
// features of the strip and get it.
template <class T, int kBits>
__device__ __forceinline__ float multiply_plainly(const Problem& p, int row, int strip, int first_k,
                                                  int last_k) {
  const int lane = threadIdx.x % 32;
  const int n = strip * kFragmentN + lane % kFragmentN;  // below the padded N
  float sum = 0.0f;
#pragma unroll 1
  for (int k = first_k + lane / kFragmentN; k < min(last_k, p.k); k += 2) {
    const CodePosition at = code_position(kBits, steps_k(p.k), n, k);
    const uint32_t byte = ld_global_nc<uint8_t>(static_cast<const uint8_t*>(p.codes) + at.byte);
    const int code = byte >> at.shift & ((1 << kBits) - 1);
    const int64_t parameter = parameter_index(p.groups, min(k / p.group_size, p.groups - 1), n);
    const int zero = ld_global_nc<uint8_t>(static_cast<const uint8_t*>(p.zeros) + parameter);
    const float weight =
        load_scale_global(p.scales, parameter, p.scale_type) * static_cast<float>(code - zero);
    const uint16_t* x = static_cast<const uint16_t*>(p.x) + static_cast<int64_t>(row) * p.k + k;
    sum = fmaf(to_float<T>(ld_global_nc<uint16_t>(x)), weight, sum);
  }
  return sum + shuffle(sum, lane ^ kFragmentN);
}

template <class T, int kBits, int kSets>
__device__ __forceinline__ void gemv_block(const GemvArguments& args) {
  constexpr int kStages = gemv_stages(kBits);
  constexpr int kCodeBytes = unit_code_bytes(kBits);
  constexpr int kStageBytes = kCodeBytes + kSets * kParameterSlot;
  constexpr int kLoads = kCodeBytes / 512;      // 16-byte loads of a lane per unit
  constexpr int kBlocks = kUnitK / kFragmentK;  // of 16 along K in a unit

  const Problem& p = args.problem;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int run_first = args.units * warp / kGemvWarps;
  const int run_units = args.units * (warp + 1) / kGemvWarps - run_first;
  const int steps = steps_k(p.k);

  // ---- The stream of codes and parameters ----
  // Lanes 8 i .. 8 i + 7 copy set i (and i + 4): up to four pieces of scales, then the zero points.
  uint32_t lane_bytes = lane * kLaneBytes;
  keep(lane_bytes);
  const uint32_t ring = shared_base() + warp * kStages * kStageBytes + lane_bytes;
  const int scale_bytes = p.scale_type == Dtype::kF32 ? 4 : 2;
  int set_lane = lane / 8;
  int piece = lane % 8;
  keep(set_lane);
  keep(piece);
  int carries = set_lane < kSets && (piece < scale_bytes || piece == 4);
  keep(carries);
  int parameter_bytes = piece == 4 ? 1 : scale_bytes;
  keep(parameter_bytes);
  int group_bytes = kTileN * parameter_bytes;
  keep(group_bytes);
  const char* all_parameters =
      static_cast<const char*>(piece == 4 ? p.zeros : p.scales) + piece % 4 * 16;
  uint32_t to_parameters = kCodeBytes + set_lane * kParameterSlot + piece * 16 - lane_bytes;
  keep(to_parameters);
  const bool half_tail = 2 * (run_first + run_units) > steps;  // the last unit is one step
  const char* codes = nullptr;                                 // this lane's next 16 bytes
  const char* parameters = nullptr;                            // this lane's 16 bytes of group 0
  int copied_strip = static_cast<int>(blockIdx.x) - static_cast<int>(gridDim.x);
  int copied_set = 0;
  int left = 0;  // units left in the strip
  const auto copy_unit = [&](uint32_t stage) {
    if (left == 0) {
      copied_strip += gridDim.x;
      left = run_units;
      copied_set = run_first * kSets + set_lane;
      const int n = copied_strip * kFragmentN;
      codes =
          static_cast<const char*>(p.codes) +
          lane_offset(kBits, steps, n / kTileN, 2 * run_first, 0, n % kTileN / kFragmentN, lane);
      parameters = all_parameters + parameter_index(p.groups, 0, n) * parameter_bytes;
    }
    if (copied_strip < args.strips) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const bool valid = i < kLoads / 2 || !half_tail || left > 1;
        cp_async_16(stage + i * 512, codes + i * kTileBytes, valid);
      }
#pragma unroll
      for (int set = 0; set < kSets; set += 4) {
        const int group = min(args.sets_per_group.divide(copied_set + set), p.groups - 1);
        if (carries) {
          cp_async_16(stage + to_parameters + set * kParameterSlot,
                      parameters + uint64_t{static_cast<uint32_t>(group)} *
                                       static_cast<uint32_t>(group_bytes));
        }
      }
    }
    cp_async_commit();
    codes += kLoads * kTileBytes;
    copied_set += kSets;
    --left;
  };
  if (run_units > 0) {
#pragma unroll 1
    for (int i = 0; i < kStages; ++i) copy_unit(ring + i * kStageBytes);
  }

  // ---- The digits of this warp's part of x ----
  const uint32_t row_bytes = args.units * kUnitK * kDigits;
  const uint32_t digits = shared_base() + args.digits;
  int exponents[kGemvRows] = {};
#pragma unroll 1
  for (int row = 0; row < p.m; ++row) {
    const int exponent = write_digits<T>(p, row, 2 * run_first, 2 * (run_first + run_units),
                                         digits + row * row_bytes);
    if (row == 0) exponents[0] = exponent;
    exponents[1] = exponent;
  }
  warp_sync();
  // Columns 0..3 of a product are the digits of row 0, columns 4..7 those of row 1.
  const uint32_t own_digits = digits + (p.m == 2 ? lane / 16 * row_bytes : 0) +
                              (lane / 4 % kDigits * 4 + lane % 4) * 16 + run_first * 512;
  // This lane's sums are of columns 2t and 2t + 1.
  const int own_row = lane % 4 / 2;
  const int own_exponent = own_row == 0 ? exponents[0] : exponents[1];

  // In a stage: this lane's zero point and scale of output feature lane / 4.
  uint32_t to_zero = kCodeBytes + kScaleSlot + lane / 4 - lane_bytes;
  keep(to_zero);
  uint32_t to_scale = kCodeBytes + lane / 4 * scale_bytes - lane_bytes;
  keep(to_scale);
  uint32_t ones_bytes[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    ones_bytes[i] = 0x01010101u;
    keep(ones_bytes[i]);
  }
  uint32_t stage = ring;
  int slot = 0;                  // of the sums
  int first_strip = blockIdx.x;  // whose sums slot 0 holds
  const uint32_t sums = shared_base() + args.sums;
#pragma unroll 1
  for (int strip = blockIdx.x; strip < args.strips; strip += gridDim.x) {
    float total[4] = {};
    uint32_t unit_digits = own_digits;
#pragma unroll 1
    for (int unit = 0; unit < run_units; ++unit) {
      cp_async_wait<kStages - 1>();
      warp_sync();
      uint32_t words[kLoads * 4];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const uint4 v = ld_shared<uint4>(stage + i * 512);
        words[4 * i] = v.x;
        words[4 * i + 1] = v.y;
        words[4 * i + 2] = v.z;
        words[4 * i + 3] = v.w;
      }
      uint32_t right[kBlocks];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint4 v = ld_shared<uint4>(unit_digits + i * (kStepK * kDigits));
        right[4 * i] = v.x;
        right[4 * i + 1] = v.y;
        right[4 * i + 2] = v.z;
        right[4 * i + 3] = v.w;
      }
#pragma unroll
      for (int set = 0; set < kSets; ++set) {
        constexpr int kSetBlocks = kBlocks / kSets;
        int sum[4] = {}, ones[4] = {};
#pragma unroll
        for (int j = set * kSetBlocks; j < (set + 1) * kSetBlocks; j += 2) {
          uint32_t a[4];
          code_bytes<kBits>(a[0], a[1], words + j * kBits / 4);
          if constexpr (kSetBlocks > 1) {
            code_bytes<kBits>(a[2], a[3], words + (j + 1) * kBits / 4);
            mma_m16n8k32(sum, a, {right[j], right[j + 1]});
            mma_m16n8k32(ones, ones_bytes, {right[j], right[j + 1]});
          } else {
            mma_m16n8k16(sum, {a[0], a[1]}, right[j]);
            mma_m16n8k16(ones, {ones_bytes[0], ones_bytes[1]}, right[j]);
          }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {  // output features lane / 4 and lane / 4 + 8
          const uint32_t at = stage + set * kParameterSlot;
          const float scale = load_scale(at + to_scale, 8 * i, p.scale_type);
          const int zero = ld_shared<uint8_t>(at + to_zero + 8 * i);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int exact = sum[2 * i + j] - zero * ones[j];
            total[2 * i + j] = fmaf(scale, static_cast<float>(exact), total[2 * i + j]);
          }
        }
      }
      warp_sync();  // All lanes have read the stage.
      copy_unit(stage);
      stage += kStageBytes;
      if (stage == ring + kStages * kStageBytes) stage = ring;
      unit_digits += 2 * kStepK * kDigits;
    }

    // ---- This warp's sums ----
    const uint32_t own_sums = sums + (slot * kGemvWarps + warp) * p.m * kFragmentN * 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float value = fmaf(total[2 * i + 1], 256.0f, total[2 * i]);  // digits 2 (t % 2) and + 1
      if (lane % 2 == 1) value *= 65536.0f;
      value += shuffle(value, lane ^ 1);
      value = scale_by_power(value, own_exponent - 30);
      if (lane % 2 == 0 && own_row < p.m) {
        st_shared(own_sums + (own_row * kFragmentN + lane / 4 + 8 * i) * 4, value);
      }
    }
#pragma unroll 1
    for (int row = 0; row < p.m; ++row) {
      if ((row == 0 ? exponents[0] : exponents[1]) != kNoDigits) continue;
      const float value = multiply_plainly<T, kBits>(p, row, strip, run_first * kUnitK,
                                                     (run_first + run_units) * kUnitK);
      warp_sync();
      if (lane < kFragmentN) st_shared(own_sums + (row * kFragmentN + lane) * 4, value);
    }

    // ---- The block's, once enough are there ----
    ++slot;
    if (slot < kMaxRounds && strip + static_cast<int>(gridDim.x) < args.strips) continue;
    block_sync();
    const int row_sums = p.m * kFragmentN;
#pragma unroll 1
    for (int i = threadIdx.x; i < slot * row_sums; i += kGemvThreads) {
      const int round = i / row_sums, local = i % row_sums;
      const int n =
          (first_strip + round * static_cast<int>(gridDim.x)) * kFragmentN + local % kFragmentN;
      if (n >= p.n) continue;
      const uint32_t from = sums + (round * kGemvWarps * row_sums + local) * 4;
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kGemvWarps; ++w) sum += ld_shared<float>(from + w * row_sums * 4);
      if (p.bias != nullptr) sum += ld_global_nc<float>(p.bias + n);
      st_global(static_cast<uint16_t*>(p.y) + static_cast<int64_t>(local / kFragmentN) * p.n + n,
                from_float<T>(sum));
    }
    block_sync();
    first_strip += slot * static_cast<int>(gridDim.x);
    slot = 0;
  }
  cp_async_wait<0>();
}

}  // namespace jax_gptq::cuda
