// One or two rows of x for kernel A: products of integers.
//
// A row becomes four balanced base-256 digits, in fixed point relative to the largest of its values
// that a warp holds. Digits are bytes, and so are codes: the tensor cores multiply the codes as
// they are, four to a word after one mask, by the digits, which are four of the eight columns of a
// product. That is half of the instructions that 16-bit floats take. Zero points are subtracted
// from the sums, with the sum of the digits, a product with ones; scales apply in f32.
//
// Error: the digits hold 30 bits below the largest |x| of a warp's part of K, so an output differs
// by at most 2^-31 sum over parts of max |x| sum |W|, beside the rounding of f32 sums. A part that
// holds an Inf or a NaN, or an |x| so large that usual ones would lose their digits, or nothing but
// tiny ones, is multiplied in f32 instead, value by value.
#pragma once

#include "stage.cuh"

namespace jax_gptq::cuda {

// How many times the least of the lanes' largest |x| the largest may be: 2^-14 of those is kept.
constexpr float kWidestRange = 131072.0f;
// Of the largest |x|: 2^(30 - e) is a float.
constexpr int kLeastExponent = -96;

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

// The codes of 16 along K, of rows lane / 4 and lane / 4 + 8, from one word at 4 bits, two at 8:
// bytes for k = 2t, 2t + 8, 2t + 1, 2t + 9 with t = lane % 4. At 4 bits the second row is 16 times
// its codes, as they lie.
template <int kBits>
__device__ __forceinline__ void code_bytes(uint32_t& low_row, uint32_t& high_row,
                                           const uint32_t* words) {
  if constexpr (kBits == 4) {
    low_row = words[0] & 0x0f0f0f0fu;
    high_row = words[0] & 0xf0f0f0f0u;
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
  const uint16_t* from = static_cast<const uint16_t*>(p.x) + static_cast<int64_t>(row) * p.k;
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
    sum = fmaf(to_float<T>(ld_global_nc<uint16_t>(from + k)), weight, sum);
  }
  return sum + shuffle(sum, lane ^ kFragmentN);
}

// One lane's part of the products of a warp.
//
// In shared memory the digits of a row have 16 bytes for every step of 64 along K, digit and
// lane % 4: a word for each 16 along K, its bytes in the order of code_bytes. The row itself, as
// copied, lies in the second half until digits take its place.
template <class T, int kBits, int kSets>
class DigitProducts {
 public:
  using Type = T;
  static constexpr bool kMayShareX = false;

  __device__ __forceinline__ DigitProducts(const DecodeArguments& args, const Run& run)
      : problem_(args.problem), run_(run), parameters_(args.problem.scale_type) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int row = 0; row < problem_.m; ++row) {
      const int exponent = write_digits(run.x + row * args.x_pitch);
      if (exponent == kNoDigits) plain_ |= 1 << row;
      if (row == lane_row()) exponent_ = exponent;
    }
    warp_sync();
    // The lane holds column lane / 4 of the digits. Where there is no such row, any will do.
    const int row = min(lane / 16, problem_.m - 1);
    digits_ = run.x + row * args.x_pitch + (lane / 4 % kDigits * 4 + lane % 4) * 16;
    // Its sums are digits 2 (lane % 2) and the next of row lane_row().
    partner_ = lane ^ 1;
    keep(partner_);
    place_ = lane % 2 == 0 ? 1.0f : 65536.0f;
    to_sums_ = (lane_row() * kSumsPitch + lane / 4) * 4;
    keep(to_sums_);
    writes_ = lane % 2 == 0 && lane_row() < problem_.m;
    keep(writes_);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      ones_[i] = 0x01010101u;
      keep(ones_[i]);
    }
  }

  // Where the first row is copied to.
  __device__ __forceinline__ static uint32_t x_to(const Run& run) {
    return run.x + run.units * (kDigitBytes / 2);
  }

  __device__ __forceinline__ void begin_strip() {
#pragma unroll
    for (int i = 0; i < 4; ++i) total_[i] = 0.0f;
    unit_digits_ = digits_;
  }

  // Adds the next unit, whose codes are `words` and whose parameters are in the stage.
  __device__ __forceinline__ void add_unit(uint32_t stage, const uint32_t* words) {
    uint32_t right[kUnitBlocks];
    load_words<kUnitBlocks / 4>(right, unit_digits_, kDigitBytes / 2);
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
      int sum[4] = {}, of_digits[4] = {};
#pragma unroll
      for (int j = set * kSetBlocks; j < (set + 1) * kSetBlocks; j += 2) {
        uint32_t a[4];
        code_bytes<kBits>(a[0], a[1], words + j * kBits / 4);
        if constexpr (kSetBlocks > 1) {
          code_bytes<kBits>(a[2], a[3], words + (j + 1) * kBits / 4);
          mma_m16n8k32(sum, a, {right[j], right[j + 1]});
          mma_m16n8k32(of_digits, ones_, {right[j], right[j + 1]});
        } else {
          mma_m16n8k16(sum, {a[0], a[1]}, right[j]);
          mma_m16n8k16(of_digits, {ones_[0], ones_[1]}, right[j]);
        }
      }
      const uint32_t at = stage + set * kSetBytes;
#pragma unroll
      for (int i = 0; i < 2; ++i) {  // output features lane / 4 and lane / 4 + 8
        const float scale = parameters_.scale(at, i);
        const int zero = parameters_.zero(at, i) << (i == 1 ? kHighShift : 0);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int exact = sum[2 * i + j] - zero * of_digits[j];
          total_[2 * i + j] = fmaf(scale, static_cast<float>(exact), total_[2 * i + j]);
        }
      }
    }
    unit_digits_ += kDigitBytes;
  }

  // Writes the warp's sums of the strip: [m][kSumsPitch] f32.
  __device__ __forceinline__ void store(int strip, uint32_t sums) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float value = fmaf(total_[2 * i + 1], 256.0f, total_[2 * i]) * place_;
      value += shuffle(value, partner_);
      value = scale_by_power(value, exponent_ - 30 - (i == 1 ? kHighShift : 0));
      if (writes_) st_shared(sums + to_sums_ + 8 * i * 4, value);
    }
    if (plain_ == 0) return;
    warp_sync();
#pragma unroll 1
    for (int row = 0; row < problem_.m; ++row) {
      if ((plain_ >> row & 1) == 0) continue;
      const int first_k = run_.first * kUnitK;
      const float sum =
          multiply_plainly<T, kBits>(problem_, row, strip, first_k, first_k + run_.units * kUnitK);
      const int lane = threadIdx.x % 32;
      if (lane < kFragmentN) st_shared(sums + (row * kSumsPitch + lane) * 4, sum);
    }
  }

 private:
  static constexpr int kSetBlocks = kUnitBlocks / kSets;
  static constexpr int kHighShift = kBits == 4 ? 4 : 0;  // of the second row (code_bytes)
  static constexpr int kNoDigits = 1 << 20;

  // The row whose sums the lane holds.
  __device__ __forceinline__ static int lane_row() { return threadIdx.x % 4 / 2; }

  // Makes digits, at `to`, of the row that has been copied there. Returns the exponent e of the
  // fixed point, values being digits 2^(e - 30), or kNoDigits where the part must be multiplied in
  // f32.
  __device__ __forceinline__ int write_digits(uint32_t to) const {
    const int lane = threadIdx.x % 32;
    const uint32_t x = to + run_.units * (kDigitBytes / 2);
    const int t = lane % 4, pair = lane / 4 % 2;  // two words of 16 along K at once
    const int steps = 2 * run_.units;
    uint32_t own2 = 0;  // the largest magnitudes of this lane, as bits of T
#pragma unroll 1
    for (int at = lane * 16; at < run_.units * (kUnitK * 2); at += 32 * 16) {
      const uint4 v = ld_shared<uint4>(x + at);
      own2 = max_u16x2(own2, v.x & 0x7fff7fffu);
      own2 = max_u16x2(own2, v.y & 0x7fff7fffu);
      own2 = max_u16x2(own2, v.z & 0x7fff7fffu);
      own2 = max_u16x2(own2, v.w & 0x7fff7fffu);
    }
    const uint32_t own = max(own2 & 0xffffu, own2 >> 16);
    const uint32_t bits = warp_max(own);
    const float largest = to_float<T>(static_cast<uint16_t>(bits));
    // Of lanes that have anything but zeros.
    const uint32_t least = warp_min(own == 0 ? 0x7fffu : own);
    const bool finite = bits < (std::is_same<T, F16>::value ? 0x7c00u : 0x7f80u);
    const int exponent = static_cast<int>(float_bits(largest) >> 23) - 126;  // largest < 2^exponent
    const bool digital =
        bits == 0 || (finite && exponent >= kLeastExponent &&
                      largest <= kWidestRange * to_float<T>(static_cast<uint16_t>(least)));
    const float multiplier = digital && bits != 0 ? power_of_two(30 - exponent) : 0.0f;
#pragma unroll 1
    for (int first = 0; first < steps; first += 4) {
      const int step = first + lane / 8;
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int k = step * kStepK + pair * 32 + i * 8 + 2 * t;
        pairs[i] = step < steps ? ld_shared<uint32_t>(x + 2 * k) : 0;
      }
      warp_sync();  // What is overwritten has been read.
      uint32_t words[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float2 value = unpack2<T>(pairs[2 * i + half]);
          const float values[2] = {value.x, value.y};
#pragma unroll
          for (int odd = 0; odd < 2; ++odd) {
            const int fixed = to_int(values[odd] * multiplier);
            // Bytes from 0 to 255 with 128 added become digits from -128 to 127.
            words[i][2 * odd + half] = (static_cast<uint32_t>(fixed) + 0x00808080u) ^ 0x00808080u;
          }
        }
        transpose_bytes(words[i]);
      }
      if (step < steps) {
#pragma unroll
        for (int d = 0; d < kDigits; ++d) {
          st_shared(to + step * (kDigitBytes / 2) + (d * 4 + t) * 16 + pair * 8,
                    make_uint2(words[0][d], words[1][d]));
        }
      }
    }
    return digital ? exponent : kNoDigits;
  }

  const Problem& problem_;
  const Run& run_;
  StageParameters<kBits> parameters_;
  uint32_t plain_ = 0;    // rows that have no digits
  int partner_, writes_;  // a lane with the other digits; whether this one writes sums
  float place_;           // 1 or 256^2: what the lane's digits count
  uint32_t to_sums_;
  int exponent_ = 0;
  uint32_t digits_, unit_digits_, ones_[4];
  float total_[4];
};

}  // namespace jax_gptq::cuda
