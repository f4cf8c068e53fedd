// Kernel A, decode: y [m, n] = x [m, k] W [k, n] for m <= 16, limited by reading the weight.
//
// A warp takes a strip of 32 output features (half a tile). A block of 16 warps holds 1, 2, 4 or 8
// strips at once and a part of K (its split); the warps share its K among those of the same strip:
//
//      strips 8: 2 parts of K     strips 4: 4 parts     strips 2: 8 parts     strips 1: 16 parts
//
// Weights stream through a ring of kStages steps of 64 along K per warp: a lane copies the very 16
// bytes that it will use, so that the main loop has no barrier at all, and 16 warps x kStages x 1
// KB are under way per SM. Scales and zero points are fetched one group ahead into registers. Both
// streams run on over the columns of a block: blocks stay and walk over columns of 32 * strips
// output features, while the part of x for their split rests in shared memory. The loop is limited
// by the instructions it issues, so nothing in it is computed that can be kept.
//
// The tensor cores multiply the exact integers q - z; at the end of a group the scale applies to
// the f32 sums. Parts of K are added in a fixed order: warps of a block through shared memory, then
// splits through the cluster's shared memory or, without clusters, by reduce.cuh.
#pragma once

#include "decode.h"
#include "fragment.cuh"

namespace jax_gptq::cuda {

// Starts copying the part of x of the steps [first, last) to shared memory, zeros beyond k.
__device__ __forceinline__ void decode_copy_x(const DecodeArguments& args, int first, int last) {
  const Problem& p = args.problem;
  const int pieces = args.x_pieces.value;  // of the longest split
  const int present = (last - first) * (kStepK / 8);
  for (int i = threadIdx.x; i < p.m * pieces; i += kDecodeThreads) {
    const int row = args.x_pieces.divide(i);
    const int piece = i - row * pieces;
    if (piece >= present) continue;
    const int k = first * kStepK + piece * 8;
    const uint16_t* from = static_cast<const uint16_t*>(p.x) + static_cast<int64_t>(row) * p.k + k;
    const uint32_t to = shared_base() + args.x + row * args.x_pitch + piece * 16;
    if (p.k % 8 == 0) {
      const bool valid = k < p.k;
      cp_async_16(to, valid ? static_cast<const void*>(from) : p.x, valid);
    } else {
#pragma unroll 1
      for (int e = 0; e < 8; ++e) {
        const uint16_t value = k + e < p.k ? ld_global_nc<uint16_t>(from + e) : 0;
        st_shared(to + 2 * e, value);
      }
    }
  }
  cp_async_commit();
}

// y [row, n] from the sum over all of K.
template <class T>
__device__ __forceinline__ void decode_write(const Problem& p, int row, int n, float sum) {
  if (p.bias != nullptr) sum += ld_global_nc<float>(p.bias + n);
  st_global(static_cast<uint16_t*>(p.y) + static_cast<int64_t>(row) * p.n + n, from_float<T>(sum));
}

// Adds up the sums of the parts of K, in order; then writes y, or this split's partial sums, or
// leaves them for the cluster.
template <class T>
__device__ __forceinline__ void decode_add_parts(const DecodeArguments& args, uint32_t parts,
                                                 uint32_t sums, int column, int split) {
  const Problem& p = args.problem;
  const int rows_log2 = args.strips_log2 + kStripLog2;
  const int pitch = sum_pitch(1 << args.strips_log2);
  const int count = kDecodeWarps >> args.strips_log2;
#pragma unroll 1
  for (int i = threadIdx.x; i < p.m << rows_log2; i += kDecodeThreads) {
    const int row = i >> rows_log2;
    const int local = i - (row << rows_log2);
    const int n = (column << rows_log2) + local;
    const int offset = (row * pitch + local) * 4;
    float sum = ld_shared<float>(parts + offset);
#pragma unroll 4
    for (int part = 1; part < count; ++part) {
      sum += ld_shared<float>(parts + part * p.m * pitch * 4 + offset);
    }
    if (args.reduction == Reduction::kCluster) {
      st_shared(sums + offset, sum);
    } else if (n < p.n) {
      if (args.reduction == Reduction::kWorkspace) {
        const int64_t at = (static_cast<int64_t>(split) * p.m + row) * tiles_n(p.n) * kTileN + n;
        st_global(args.partial + at, sum);
      } else {
        decode_write<T>(p, row, n, sum);
      }
    }
  }
}

// This block's share of the output features of a column: adds up the sums of the cluster's blocks,
// in rank order, and writes y.
template <class T>
__device__ __forceinline__ void decode_add_cluster(const DecodeArguments& args, uint32_t sums,
                                                   int column, int split) {
  const Problem& p = args.problem;
  const int splits = 1 << args.splits_log2;
  const int rows_log2 = args.strips_log2 + kStripLog2 - args.splits_log2;
  const int pitch = sum_pitch(1 << args.strips_log2);
#pragma unroll 1
  for (int i = threadIdx.x; i < p.m << rows_log2; i += kDecodeThreads) {
    const int row = i >> rows_log2;
    const int local = (split << rows_log2) + i - (row << rows_log2);
    const int n = (column << (args.strips_log2 + kStripLog2)) + local;
    if (n >= p.n) continue;
    const uint32_t address = sums + (row * pitch + local) * 4;
    float part[kMaxClusterSplits];
#pragma unroll
    for (int rank = 0; rank < kMaxClusterSplits; ++rank) {
      part[rank] = rank < splits ? ld_cluster<float>(cluster_map(address, rank)) : 0.0f;
    }
    float sum = part[0];
#pragma unroll
    for (int rank = 1; rank < kMaxClusterSplits; ++rank) sum += part[rank];
    decode_write<T>(p, row, n, sum);
  }
}

// kColumns: 8 or 16 columns of the tensor cores' product hold the m rows of x.
template <class T, int kBits, int kColumns, bool kFine, int kStages>
__device__ __forceinline__ void decode_block(const DecodeArguments& args) {
  constexpr int kRight = kColumns / 8;  // right-hand fragments
  constexpr int kCodeBytes = step_bytes(kBits) / 2;
  constexpr int kLoads = kCodeBytes / 512;  // 16-byte loads of a lane per step
  constexpr int kSteps16 = kStepK / kFragmentK;
  constexpr int kSets = kFine ? kSteps16 : 1;  // of parameters fetched at once
  static_assert((kStages & (kStages - 1)) == 0);

  const Problem& p = args.problem;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int parts_log2 = kDecodeWarpsLog2 - args.strips_log2;
  const int strip = warp & ((1 << args.strips_log2) - 1);
  const int part = warp >> args.strips_log2;
  const int cluster = blockIdx.x >> args.splits_log2;
  const int clusters = gridDim.x >> args.splits_log2;
  const int split = blockIdx.x & ((1 << args.splits_log2) - 1);

  const int steps = steps_k(p.k);
  const int first_step = steps * split >> args.splits_log2;
  const int last_step = steps * (split + 1) >> args.splits_log2;
  // This warp's steps, the same in every column.
  const int run_first = first_step + ((last_step - first_step) * part >> parts_log2);
  const int run_steps =
      first_step + ((last_step - first_step) * (part + 1) >> parts_log2) - run_first;

  auto column_n = [&](int column) { return ((column << args.strips_log2) + strip) * kStripN; };

  // x is copied first, for as long as the block lives: everything waits for it.
  decode_copy_x(args, first_step, last_step);

  // ---- The stream of codes ----
  const uint32_t ring = shared_base() + warp * kStages * kCodeBytes + lane * kLaneBytes;
  const char* codes = nullptr;  // this lane's next 16 bytes
  int codes_column = cluster - clusters;
  int codes_left = 0;  // steps left in the column
  bool codes_real = false;
  auto copy_codes = [&](int offset) {
    if (codes_left == 0) {
      codes_column += clusters;
      codes_left = run_steps;
      const int n = column_n(codes_column);
      codes_real = n < p.n;
      codes = static_cast<const char*>(p.codes) +
              (static_cast<int64_t>(n / kTileN) * steps + run_first) * step_bytes(kBits) +
              n % kTileN / kFragmentN * 512 + lane * kLaneBytes;
    }
    if (codes_real) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        // At 8 bits a step is two tiles of 32 along K.
        cp_async_16(ring + offset + i * 512, codes + i / 2 * kTileBytes + i % 2 * 512);
      }
    }
    cp_async_commit();
    codes += step_bytes(kBits);
    --codes_left;
  };
  // ---- The stream of scales and zero points ----
  // They change with the group or, where groups end inside steps, are fetched for every step.
  const int unit_steps = kFine ? 1 : args.group.value;
  const int first_unit = kFine ? run_first : args.group.divide(run_first);
  const int first_unit_steps = min((first_unit + 1) * unit_steps - run_first, run_steps);
  const int run_units =
      kFine ? run_steps : args.group.divide(run_first + run_steps - 1) - first_unit + 1;
  int64_t parameters = 0;  // index of this lane's row, group 0
  int parameters_column = cluster - clusters;
  int units_left = 0;
  int unit = 0;
  bool parameters_real = false;
  // Of row `lane` of the strip, as stored.
  uint32_t next_scale[kSets];
  uint32_t next_zero[kSets];
  auto fetch_parameters = [&](int set) {
    if (set == 0 && units_left == 0) {
      parameters_column += clusters;
      units_left = run_units;
      unit = first_unit;
      const int n = column_n(parameters_column);
      parameters_real = n < p.n;
      parameters = parameter_index(p.groups, 0, n) + lane;
    }
    if (parameters_real) {
      const int group = kFine ? min(args.group.divide(unit * kSteps16 + set), p.groups - 1) : unit;
      const int64_t at = parameters + static_cast<int64_t>(group) * kTileN;
      next_zero[set] = ld_global_nc<uint8_t>(static_cast<const uint8_t*>(p.zeros) + at);
      next_scale[set] = p.scale_type == Dtype::kF32
                            ? ld_global_nc<uint32_t>(static_cast<const uint32_t*>(p.scales) + at)
                            : ld_global_nc<uint16_t>(static_cast<const uint16_t*>(p.scales) + at);
    }
    if (set == kSets - 1) {
      ++unit;
      --units_left;
    }
  };
#pragma unroll
  for (int set = 0; set < kSets; ++set) next_scale[set] = next_zero[set] = 0;
  if (run_steps > 0) {
#pragma unroll
    for (int set = 0; set < kSets; ++set) fetch_parameters(set);
  }

  float scale[4];  // of rows lane / 4 + 8 i of the strip
  uint32_t zero[4];
  auto take_parameters = [&](int set) {
    const uint32_t own_zero = prepare_zero<T, kBits>(next_zero[set]);
    const uint32_t stored = next_scale[set];
    const float own_scale = p.scale_type == Dtype::kF16
                                ? to_float<F16>(static_cast<uint16_t>(stored))
                            : p.scale_type == Dtype::kBf16 ? bits_float(stored << 16)
                                                           : bits_float(stored);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      zero[i] = shuffle(own_zero, lane / 4 + 8 * i);
      scale[i] = shuffle(own_scale, lane / 4 + 8 * i);
    }
    fetch_parameters(set);
  };

  if (run_steps > 0) {
#pragma unroll 1
    for (int i = 0; i < kStages; ++i) copy_codes(i * kCodeBytes);
    cp_async_wait<kStages>();
  } else {
    cp_async_wait<0>();
  }
  block_sync();  // x is there.
  // Lane addresses for ldmatrix. 8 columns: matrix j is k 8 j of 32; 16 columns: matrix j is
  // k 8 (j % 2) of 16, rows of x 8 (j / 2).
  const int x_row = min(lane % 8 + (kRight == 2 ? lane / 16 * 8 : 0), p.m - 1);
  const int x_k = kRight == 2 ? lane / 8 % 2 * 16 : lane / 8 * 16;
  const uint32_t x_run =
      shared_base() + args.x + x_row * args.x_pitch + x_k + (run_first - first_step) * kStepK * 2;

  float total[2][kRight][4];
  float sum[2][kRight][4];
  auto clear = [](float (&values)[2][kRight][4]) {
#pragma unroll
    for (int f = 0; f < 2; ++f) {
#pragma unroll
      for (int r = 0; r < kRight; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i) values[f][r][i] = 0.0f;
      }
    }
  };
  auto end_group = [&] {
#pragma unroll
    for (int f = 0; f < 2; ++f) {
#pragma unroll
      for (int r = 0; r < kRight; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          total[f][r][i] = fmaf(scale[2 * f + i / 2], sum[f][r][i], total[f][r][i]);
        }
      }
    }
    clear(sum);
  };

  int offset = 0;  // of the stage in the ring
  int buffer = 0;
  int pending = -1;  // column whose sums the cluster has yet to add
  for (int column = cluster;; column += clusters) {
    const bool done = column >= args.columns;
    const bool real = column_n(column) < p.n;
    clear(total);
    clear(sum);
    uint32_t x_step = x_run;
    int left = done ? 0 : run_steps;
    int unit_left = first_unit_steps;
    while (left > 0) {
      if (!kFine) take_parameters(0);
      left -= unit_left;
#pragma unroll 1
      for (; unit_left > 0; --unit_left) {
        cp_async_wait<kStages - 1>();
        uint32_t words[kLoads][4];
        if (real) {
#pragma unroll
          for (int i = 0; i < kLoads; ++i) {
            const uint4 v = ld_shared<uint4>(ring + offset + i * 512);
            words[i][0] = v.x;
            words[i][1] = v.y;
            words[i][2] = v.z;
            words[i][3] = v.w;
          }
          uint32_t right[4];
#pragma unroll
          for (int j = 0; j < kSteps16; ++j) {
            if (kRight == 2 || j % 2 == 0) ldmatrix_x4(right, x_step + j * 32);
            if (kFine) take_parameters(j);
#pragma unroll
            for (int f = 0; f < 2; ++f) {
              uint32_t a[4];
              const uint32_t* fragment =
                  kBits == 4 ? &words[f][j] : &words[kLoads == 4 ? j / 2 * 2 + f : 0][j % 2 * 2];
              exact_fragment<T, kBits>(a, fragment, &zero[2 * f]);
#pragma unroll
              for (int r = 0; r < kRight; ++r) {
                const int at = kRight == 2 ? 2 * r : j % 2 * 2;
                const uint32_t b[2] = {right[at], right[at + 1]};
                mma_m16n8k16<T>(sum[f][r], a, b);
              }
            }
            if (kFine) end_group();
          }
        }
        copy_codes(offset);
        offset = (offset + kCodeBytes) & (kStages * kCodeBytes - 1);
        x_step += kStepK * 2;
      }
      if (!kFine) end_group();
      unit_left = min(unit_steps, left);
    }

    // ---- Sums of the block ----
    const int pitch = sum_pitch(1 << args.strips_log2);
    const uint32_t parts = shared_base() + args.parts;
    const uint32_t sums = shared_base() + args.sums;
    if (pending >= 0) {
      cluster_wait();
      decode_add_cluster<T>(args, sums + (buffer ^ 1) * p.m * pitch * 4, pending, split);
    }
    if (done) break;
    if (column != cluster) block_sync();  // The parts' sums of the column before have been read.
    // A lane's sums: rows lane / 4 (+ 8) of two fragments, columns 2 (lane % 4) (+ 1).
#pragma unroll
    for (int f = 0; f < 2; ++f) {
#pragma unroll
      for (int r = 0; r < kRight; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int n = strip * kStripN + f * kFragmentN + lane / 4 + i / 2 * 8;
          const int m = r * 8 + lane % 4 * 2 + i % 2;
          if (m < p.m) st_shared(parts + ((part * p.m + m) * pitch + n) * 4, total[f][r][i]);
        }
      }
    }
    block_sync();
    decode_add_parts<T>(args, parts, sums + buffer * p.m * pitch * 4, column, split);
    if (args.reduction == Reduction::kCluster) {
      cluster_arrive();
      pending = column;
    }
    buffer ^= 1;
  }
  if (args.reduction == Reduction::kCluster) {
    // A block stays until the others have read its sums.
    cluster_arrive();
    cluster_wait();
  }
  cp_async_wait<0>();
}

}  // namespace jax_gptq::cuda
