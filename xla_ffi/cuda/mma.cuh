// Kernel B without wgmma: y [m, n] = x [m, k] W [k, n] for what the others leave, each weight
// rounded once to the type of x. A pipeline of the class of Marlin (Frantar et al., 2024).
//
// A block computes 128 output features times kBlockM rows of x, or a part of K of them. Its 8 warps
// are 4 along n, of 32 output features each, times 2 along k, which take the two halves of every
// step of 64. So each code is dequantized once per block, and used kBlockM / 8 times. Codes,
// parameters and x stream through a ring of stages filled by cp.async.
#pragma once

#include "fragment.cuh"
#include "mma.h"
#include "output.cuh"

namespace jax_gptq::cuda {

// The scale of a row as it multiplies the pair q - z: f32 bits, or the 16-bit scale twice where it
// is of the activations' type, so that one multiplication rounds the exact product.
template <class T>
__device__ __forceinline__ void scale_pair(uint32_t& pair, uint32_t scale, bool same_type) {
  if (same_type) {
    pair = mul2<T>(pair, scale);
  } else {
    const float2 exact = unpack2<T>(pair);
    pair = pack2<T>(exact.x * bits_float(scale), exact.y * bits_float(scale));
  }
}

template <class T, int kBits, int kBlockM>
__device__ __forceinline__ void mma_block(const MmaArguments& args) {
  constexpr int kStages = mma_stages(kBits, kBlockM);
  constexpr int kRight = kBlockM / 8;  // fragments of x along m
  constexpr int kSteps16 = kStepK / kFragmentK;

  const Problem& p = args.problem;
  const MmaStage layout(p, kBlockM);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int along_n = warp % 4;
  const int along_k = warp / 4;

  const int m0 = blockIdx.x % args.m_blocks * kBlockM;
  const int n_block = blockIdx.x / args.m_blocks % args.n_blocks;
  const int split = blockIdx.x / (args.m_blocks * args.n_blocks);
  const int steps = steps_k(p.k);
  const int first_step = static_cast<int64_t>(steps) * split / args.splits;
  const int last_step = static_cast<int64_t>(steps) * (split + 1) / args.splits;

  const bool fine = fine_groups(p);
  const bool same_type =
      (p.scale_type == Dtype::kF16) == std::is_same<T, F16>::value && p.scale_type != Dtype::kF32;
  const int group_rows = groups_per_step(p);
  const int scale_bytes = dtype_bytes(p.scale_type);
  const int parameter_bytes = mma_parameter_bytes(p);
  const int last_tile = tiles_n(p.n) - 1;

  // Group of the 16 input features `sixteenth` (of all) with fine groups, else of a step of 64.
  auto fine_group = [&](int sixteenth) { return min(args.group.divide(sixteenth), p.groups - 1); };
  auto first_group = [&](int step) {
    return fine ? fine_group(step * kSteps16) : args.group.divide(step);
  };

  // ---- What this thread copies, step after step ----
  // Codes: 16 bytes of each tile at 8 bits, of one tile at 4. A second tile beyond n repeats the
  // first: it is computed and thrown away.
  constexpr int kTilePieces = step_bytes(kBits) / 16;
  const char* codes[kBits / 4];
#pragma unroll
  for (int i = 0; i < kBits / 4; ++i) {
    const int piece = threadIdx.x + i * kMmaThreads;
    const int tile = min(2 * n_block + piece / kTilePieces, last_tile);
    codes[i] = static_cast<const char*>(p.codes) +
               (static_cast<int64_t>(tile) * steps + first_step) * step_bytes(kBits) +
               piece % kTilePieces * 16;
  }
  // Parameters: 16 bytes of one tile and group, for the first threads.
  const int parameter_pieces = parameter_bytes / 16;
  const int parameter_row = threadIdx.x / parameter_pieces;
  const int parameter_piece = threadIdx.x - parameter_row * parameter_pieces;
  const bool copies_parameters = parameter_row < 2 * group_rows;
  const int parameter_tile = parameter_row >= group_rows;
  const int parameter_group = parameter_row - parameter_tile * group_rows;
  const bool copies_scales = parameter_piece < kTileN * scale_bytes / 16;
  const int64_t parameter_base =
      parameter_index(p.groups, 0, min(2 * n_block + parameter_tile, last_tile) * kTileN);
  const char* parameters = copies_scales ? static_cast<const char*>(p.scales) +
                                               parameter_base * scale_bytes + parameter_piece * 16
                                         : static_cast<const char*>(p.zeros) + parameter_base +
                                               (parameter_piece - kTileN * scale_bytes / 16) * 16;
  const int parameter_stride = kTileN * (copies_scales ? scale_bytes : 1);
  // x: pieces of 8 values, in rows x_row + 32 i.
  constexpr int kRowsAtOnce = kMmaThreads / (kStepK / 8);
  const int x_row = threadIdx.x / (kStepK / 8);
  const int x_piece = threadIdx.x % (kStepK / 8);
  const uint16_t* x =
      static_cast<const uint16_t*>(p.x) + static_cast<int64_t>(m0 + x_row) * p.k + x_piece * 8;
  const uint32_t x_to = layout.x + x_row * kMmaPitchX + x_piece * 16;
  const bool x_aligned = p.k % 8 == 0;

  auto fill = [&](int step, int stage) {
    const uint32_t to = shared_base() + stage * layout.size;
#pragma unroll
    for (int i = 0; i < kBits / 4; ++i) {
      cp_async_16(to + (threadIdx.x + i * kMmaThreads) * 16, codes[i]);
      codes[i] += step_bytes(kBits);
    }
    if (copies_parameters) {
      const int group = min(first_group(step) + parameter_group, p.groups - 1);
      cp_async_16(to + layout.parameters + threadIdx.x * 16,
                  parameters + static_cast<int64_t>(group) * parameter_stride);
    }
    const int k = step * kStepK + x_piece * 8;
#pragma unroll
    for (int i = 0; i < (kBlockM + kRowsAtOnce - 1) / kRowsAtOnce; ++i) {
      const int row = x_row + i * kRowsAtOnce;
      if (kBlockM < kRowsAtOnce && row >= kBlockM) break;
      const bool present = m0 + row < p.m;
      const uint16_t* from = x + static_cast<int64_t>(i) * kRowsAtOnce * p.k + step * kStepK;
      const uint32_t at = to + x_to + i * kRowsAtOnce * kMmaPitchX;
      if (x_aligned) {
        const bool valid = present && k < p.k;
        cp_async_16(at, valid ? static_cast<const void*>(from) : p.x, valid);
      } else {
        for (int e = 0; e < 8; ++e) {
          const bool valid = present && k + e < p.k;
          const uint16_t value = valid ? ld_global_nc<uint16_t>(from + e) : 0;
          st_shared(at + 2 * e, value);
        }
      }
    }
  };

  float sum[2][kRight][4];
#pragma unroll
  for (int f = 0; f < 2; ++f) {
#pragma unroll
    for (int r = 0; r < kRight; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[f][r][i] = 0.0f;
    }
  }
  uint32_t scale[4];  // of rows lane / 4 + 8 i of the warp's 32
  uint32_t zero[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) scale[i] = zero[i] = 0;
  int held_group = -1;

  // Matrix j of ldmatrix is k 8 (j % 2) of 16, rows of x 8 (j / 2) of 16.
  const uint32_t x_lane = layout.x + (lane % 8 + lane / 16 * 8) * kMmaPitchX + lane / 8 % 2 * 16 +
                          along_k * (kStepK / 2) * 2;

  auto multiply = [&](int step, int stage) {
    const uint32_t from = shared_base() + stage * layout.size;
    const uint32_t codes = from + along_n / 2 * step_bytes(kBits) + along_n % 2 * 1024;
    uint32_t words[2][kBits / 2];  // [fragment]: two steps of 16 along k
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      if constexpr (kBits == 4) {
        const uint2 v = ld_shared<uint2>(codes + f * 512 + lane * kLaneBytes + along_k * 8);
        words[f][0] = v.x;
        words[f][1] = v.y;
      } else {
        const uint4 v =
            ld_shared<uint4>(codes + along_k * kTileBytes + f * 512 + lane * kLaneBytes);
        words[f][0] = v.x;
        words[f][1] = v.y;
        words[f][2] = v.z;
        words[f][3] = v.w;
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int first = first_group(step);
      const int group = fine ? fine_group(step * kSteps16 + 2 * along_k + j) : first;
      if (group != held_group) {
        held_group = group;
        const uint32_t base =
            from + layout.parameters + (along_n / 2 * group_rows + group - first) * parameter_bytes;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = along_n % 2 * 32 + lane / 4 + 8 * i;
          if (same_type) {
            const uint32_t bits = ld_shared<uint16_t>(base + 2 * row);
            scale[i] = bits | bits << 16;
          } else {
            scale[i] = float_bits(load_scale(base, row, p.scale_type));
          }
          zero[i] = prepare_zero<T, kBits>(ld_shared<uint8_t>(base + kTileN * scale_bytes + row));
        }
      }
      uint32_t a[2][4];
#pragma unroll
      for (int f = 0; f < 2; ++f) {
        exact_fragment<T, kBits>(a[f], &words[f][j * kBits / 4], &zero[2 * f]);
#pragma unroll
        for (int i = 0; i < 4; ++i) scale_pair<T>(a[f][i], scale[2 * f + i % 2], same_type);
      }
#pragma unroll
      for (int r = 0; r < kRight; r += 2) {
        uint32_t right[4];
        ldmatrix_x4(right, from + x_lane + r * 8 * kMmaPitchX + j * 32);
        const uint32_t b0[2] = {right[0], right[1]};
        const uint32_t b1[2] = {right[2], right[3]};
#pragma unroll
        for (int f = 0; f < 2; ++f) {
          mma_m16n8k16<T>(sum[f][r], a[f], b0);
          mma_m16n8k16<T>(sum[f][r + 1], a[f], b1);
        }
      }
    }
  };

  for (int i = 0; i < kStages - 1; ++i) {
    if (first_step + i < last_step) fill(first_step + i, i);
    cp_async_commit();
  }
  int stage = 0;
  for (int step = first_step; step < last_step; ++step) {
    cp_async_wait<kStages - 2>();
    block_sync();  // The stage is there for all, and all have done with the one before.
    const int ahead = step + kStages - 1;
    if (ahead < last_step) fill(ahead, stage == 0 ? kStages - 1 : stage - 1);
    cp_async_commit();
    multiply(step, stage);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  cp_async_wait<0>();
  block_sync();

  // ---- Sums [m][n] of both halves of the steps, where the pipeline was ----
  auto for_each_sum = [&](auto&& use) {
#pragma unroll
    for (int f = 0; f < 2; ++f) {
#pragma unroll
      for (int r = 0; r < kRight; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int n = along_n * 32 + f * 16 + lane / 4 + i / 2 * 8;
          const int m = r * 8 + lane % 4 * 2 + i % 2;
          use(sum[f][r][i], shared_base() + (m * kMmaPitchSums + n) * 4);
        }
      }
    }
  };
  if (along_k == 1) {
    for_each_sum([](float value, uint32_t at) { st_shared(at, value); });
  }
  block_sync();
  if (along_k == 0) {
    for_each_sum([](float value, uint32_t at) { st_shared(at, value + ld_shared<float>(at)); });
  }
  block_sync();
  const int padded_n = tiles_n(p.n) * kTileN;
  for (int i = threadIdx.x; i < kBlockM * kMmaBlockN; i += kMmaThreads) {
    const int row = i / kMmaBlockN;
    const int n = n_block * kMmaBlockN + i % kMmaBlockN;
    const int m = m0 + row;
    if (m >= p.m || n >= p.n) continue;
    float value = ld_shared<float>(shared_base() + (row * kMmaPitchSums + i % kMmaBlockN) * 4);
    if (args.partial != nullptr) {
      st_global(args.partial + (static_cast<int64_t>(split) * p.m + m) * padded_n + n, value);
    } else {
      write_output<T>(p, m, n, value);
    }
  }
}

}  // namespace jax_gptq::cuda
