// Kernel A, decode: y [m, n] = x [m, k] W [k, n] for m <= 16, limited by reading the weight.
//
// A warp takes a strip of 32 output features (half a tile). A block of 16 warps holds 1, 2, 4 or 8
// strips at once and a part of K (its split); the warps share its K among those of the same strip:
//
//      strips 8: 2 parts of K     strips 4: 4 parts     strips 2: 8 parts     strips 1: 16 parts
//
// Weights stream through a ring of kStages steps of 64 along K per warp, private to the warp: a
// lane copies the very 16 bytes that it will use, so there is no block barrier in the main loop,
// and 16 warps x kStages x 1 KB are under way per SM. The stream runs on over the columns of a
// block: blocks stay and walk over columns of 32 * strips output features, while the part of x for
// their split rests in shared memory (x is loaded again only where it does not fit at once).
//
// The tensor cores multiply the exact integers q - z; at the end of a group the scale applies to
// the f32 sums. Parts of K are added in a fixed order: warps of a block through shared memory, then
// splits through the cluster's shared memory or, without clusters, by reduce.cuh.
#pragma once

#include "decode.h"
#include "fragment.cuh"

namespace jax_gptq::cuda {

// Where a warp is in its stream of steps: over columns, over chunks of x, over its steps.
struct DecodeCursor {
  int column;
  int chunk;  // first step of the chunk of x
  int step, end;
  int group, left;  // group of `step`, and steps left in it (coarse groups)
  bool fresh;       // the group's parameters are needed: first step of a run, or of a group
};

// Copies the part of x of the steps [first, last) to shared memory, zeros beyond k.
template <class T>
__device__ __forceinline__ void decode_load_x(const DecodeArguments& args, uint32_t x, int first,
                                              int last) {
  const Problem& p = args.problem;
  const int pieces = args.x_pieces.value;
  const int present = (last - first) * (kStepK / 8);
  const int pitch = decode_x_pitch(args.x_steps);
  const uint16_t* source = static_cast<const uint16_t*>(p.x);
  for (int i = threadIdx.x; i < p.m * pieces; i += kDecodeThreads) {
    const int row = args.x_pieces.divide(i);
    const int piece = i - row * pieces;
    if (piece >= present) continue;
    const int k = first * kStepK + piece * 8;
    const uint16_t* from = source + static_cast<int64_t>(row) * p.k + k;
    uint4 value = make_uint4(0, 0, 0, 0);
    if (p.k % 8 == 0) {
      if (k < p.k) value = ld_global_nc<uint4>(from);
    } else {
      uint32_t pairs[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t low = k + 2 * j < p.k ? ld_global_nc<uint16_t>(from + 2 * j) : 0;
        const uint32_t high = k + 2 * j + 1 < p.k ? ld_global_nc<uint16_t>(from + 2 * j + 1) : 0;
        pairs[j] = low | high << 16;
      }
      value = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
    st_shared(x + row * pitch + piece * 16, value);
  }
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
  const bool x_stays = args.x_steps >= last_step - first_step;
  const int scale_bytes = dtype_bytes(p.scale_type);

  const int parameter_bytes = decode_parameter_bytes(p);
  const int stage_bytes = decode_stage_bytes(p);
  const uint32_t ring = shared_base() + warp * kStages * stage_bytes;
  const uint32_t x = shared_base() + args.x;

  // ---- The stream of steps ----
  auto begin_run = [&](DecodeCursor& c) {
    const int count = min(args.x_steps, last_step - c.chunk);
    c.step = c.chunk + (count * part >> parts_log2);
    c.end = c.chunk + (count * (part + 1) >> parts_log2);
    c.fresh = true;
    if (!kFine) {
      c.group = args.group.divide(c.step);
      c.left = args.group.value - (c.step - c.group * args.group.value);
    }
  };
  auto skip_empty = [&](DecodeCursor& c) {
    while (c.step == c.end && c.column < args.columns) {
      c.chunk += args.x_steps;
      if (c.chunk >= last_step) {
        c.chunk = first_step;
        c.column += clusters;
      }
      begin_run(c);
    }
  };
  auto advance = [&](DecodeCursor& c) {
    ++c.step;
    c.fresh = false;
    if (!kFine && --c.left == 0) {
      ++c.group;
      c.left = args.group.value;
      c.fresh = true;
    }
  };

  // With fine groups, the group of the i-th 16 input features of a step.
  auto fine_group = [&](int step, int i) {
    return min(args.group.divide(step * (kStepK / kFragmentK) + i), p.groups - 1);
  };

  auto prefetch = [&](const DecodeCursor& c, int stage) {
    const uint32_t to = ring + stage * stage_bytes;
    const int n = ((c.column << args.strips_log2) + strip) * kStripN;
    if (c.column < args.columns && n < p.n) {
      const char* codes = static_cast<const char*>(p.codes) +
                          (static_cast<int64_t>(n / kTileN) * steps + c.step) * step_bytes(kBits) +
                          n % kTileN / kFragmentN * 512 + lane * kLaneBytes;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        // At 8 bits a step is two tiles of 32 along K.
        cp_async_16(to + i * 512 + lane * kLaneBytes, codes + i / 2 * kTileBytes + i % 2 * 512);
      }
      if (kFine || c.fresh) {
        const int first = kFine ? fine_group(c.step, 0) : c.group;
        const int last = kFine ? fine_group(c.step, kStepK / kFragmentK - 1) : c.group;
        const int pieces = 2 * scale_bytes + 2;  // of 16 bytes, per group
        for (int i = lane; i < (last - first + 1) * pieces; i += 32) {
          const int row = i / pieces;
          const int piece = i - row * pieces;
          const int64_t at = parameter_index(p.groups, first + row, n);
          const bool is_scale = piece < 2 * scale_bytes;
          const char* from =
              is_scale ? static_cast<const char*>(p.scales) + at * scale_bytes + piece * 16
                       : static_cast<const char*>(p.zeros) + at + (piece - 2 * scale_bytes) * 16;
          cp_async_16(to + kCodeBytes + row * parameter_bytes + piece * 16, from);
        }
      }
    }
    cp_async_commit();
  };

  DecodeCursor ahead = {};
  ahead.column = cluster;
  ahead.chunk = first_step;
  begin_run(ahead);
  skip_empty(ahead);
#pragma unroll 1
  for (int i = 0; i < kStages; ++i) {
    prefetch(ahead, i);
    if (ahead.column < args.columns) {
      advance(ahead);
      skip_empty(ahead);
    }
  }

  // ---- Lane-constant addresses of x for ldmatrix ----
  // 8 columns: matrix j is k 8 j of 32; 16 columns: matrix j is k 8 (j % 2), rows of x 8 (j / 2).
  const int x_row = min(lane % 8 + (kRight == 2 ? lane / 16 * 8 : 0), p.m - 1);
  const int x_k = kRight == 2 ? lane / 8 % 2 * 16 : lane / 8 * 16;
  const uint32_t x_lane = x + x_row * decode_x_pitch(args.x_steps) + x_k;

  float total[2][kRight][4];
  float sum[2][kRight][4];
  float scale[4];  // of rows lane / 4 + 8 i of the strip
  uint32_t zero[4];

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
  auto load_parameters = [&](uint32_t parameters) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scale[i] = load_scale(parameters, lane / 4 + 8 * i, p.scale_type);
      zero[i] = prepare_zero<T, kBits>(
          ld_shared<uint8_t>(parameters + 32 * scale_bytes + lane / 4 + 8 * i));
    }
  };

  DecodeCursor now = {};
  int stage = 0;
  auto refill = [&] {
    warp_sync();  // Every lane has read the stage.
    prefetch(ahead, stage);
    if (ahead.column < args.columns) {
      advance(ahead);
      skip_empty(ahead);
    }
  };
  int buffer = 0;
  int pending = -1;  // column whose sums the cluster has yet to add
  clear(sum);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    scale[i] = 0.0f;
    zero[i] = 0;
  }

  for (int column = cluster;; column += clusters) {
    const bool done = column >= args.columns;
    const bool real = ((column << args.strips_log2) + strip) * kStripN < p.n;
    clear(total);
    for (int chunk = done ? last_step : first_step; chunk < last_step; chunk += args.x_steps) {
      if (column == cluster || !x_stays) {
        if (!x_stays) block_sync();  // The previous chunk has been read.
        decode_load_x<T>(args, x, chunk, min(chunk + args.x_steps, last_step));
        block_sync();
      }
      now.column = column;
      now.chunk = chunk;
      begin_run(now);
      int group = -1;  // fine groups: the one whose parameters are held
      while (now.step < now.end) {
        cp_async_wait<kStages - 1>();
        warp_sync();
        const uint32_t from = ring + stage * stage_bytes;
        uint32_t words[kLoads][4];
        if (real) {
#pragma unroll
          for (int i = 0; i < kLoads; ++i) {
            const uint4 v = ld_shared<uint4>(from + i * 512 + lane * kLaneBytes);
            words[i][0] = v.x;
            words[i][1] = v.y;
            words[i][2] = v.z;
            words[i][3] = v.w;
          }
          if (!kFine && now.fresh) load_parameters(from + kCodeBytes);
        }
        if (!kFine) refill();
        if (real) {
          const uint32_t x_step = x_lane + (now.step - chunk) * kStepK * 2;
          uint32_t right[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {  // steps of 16 along k
            if (kFine) {
              const int next = fine_group(now.step, j);
              if (next != group) {
                if (group >= 0) end_group();
                group = next;
                const int first = fine_group(now.step, 0);
                load_parameters(from + kCodeBytes + (group - first) * parameter_bytes);
              }
            }
            if (kRight == 2) {
              ldmatrix_x4(right, x_step + j * 32);
            } else if (j % 2 == 0) {
              ldmatrix_x4(right, x_step + j * 32);
            }
#pragma unroll
            for (int f = 0; f < 2; ++f) {
              uint32_t a[4];
              const uint32_t* codes =
                  kBits == 4 ? &words[f][j] : &words[kLoads == 4 ? j / 2 * 2 + f : 0][j % 2 * 2];
              exact_fragment<T, kBits>(a, codes, &zero[2 * f]);
#pragma unroll
              for (int r = 0; r < kRight; ++r) {
                const int at = kRight == 2 ? 2 * r : j % 2 * 2;
                const uint32_t b[2] = {right[at], right[at + 1]};
                mma_m16n8k16<T>(sum[f][r], a, b);
              }
            }
          }
        }
        if (kFine) refill();
        stage = stage + 1 == kStages ? 0 : stage + 1;
        advance(now);
        if (!kFine && (now.fresh || now.step == now.end)) end_group();
      }
      if (kFine) end_group();
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
