// Kernel A, decode: y [m, n] = x [m, k] W [k, n] for m <= 16, limited by reading the weight.
//
// A block takes strips of 16 output features in turn, neighbouring blocks neighbouring strips
// at the same time; its 16 warps share the K of every strip, each the same part for all strips.
// So a warp needs nothing of the block's others until the end: it holds its own part of x, and
// streams codes, scales and zero points through a ring of its own, over the ends of strips, without
// a barrier of the block. The sums of the warps lie in shared memory until enough strips are done,
// and are then added up.
//
// These kernels take a few microseconds, so that their start and end count as much as their loop.
// Memory serves requests in turn: x, which everything waits for, is asked for before the codes.
//
// What the tensor cores multiply is up to Products: one or two rows of x as digits (digits.cuh),
// more rows as 16-bit floats (FloatProducts below). Parts of K are added in a fixed order: warps of
// a block, then splits through the cluster's shared memory or, without clusters, by reduce.cuh.
#pragma once

#include "output.cuh"
#include "stage.cuh"

namespace jax_gptq::cuda {

// Starts copying the run's x [.., k] to shared memory at `to`, zeros beyond K. By one warp, for its
// own use.
__device__ __forceinline__ void decode_copy_x(const DecodeArguments& args, const Run& run,
                                              uint32_t to) {
  const Problem& p = args.problem;
  const int lane = threadIdx.x % 32;
  const int pieces = run.units * (kUnitK / 8);  // of 16 bytes, per row
#pragma unroll 1
  for (int piece = lane; piece < pieces; piece += 32) {
    const int k = run.first * kUnitK + piece * 8;
    const uint16_t* from = static_cast<const uint16_t*>(p.x) + k;
    uint32_t destination = to + piece * 16;
    if (p.k % 8 == 0) {
#pragma unroll 4
      for (int row = 0; row < p.m; ++row) {
        cp_async_16(destination, from, k < p.k);
        from += p.k;
        destination += args.x_pitch;
      }
    } else {
#pragma unroll 1
      for (int row = 0; row < p.m; ++row) {
#pragma unroll 1
        for (int e = 0; e < 8; ++e) {
          const uint16_t value = k + e < p.k ? ld_global_nc<uint16_t>(from + e) : 0;
          st_shared(destination + 2 * e, value);
        }
        from += p.k;
        destination += args.x_pitch;
      }
    }
  }
  cp_async_commit();
}

// The same by a pair of blocks for both, the even rows by the first, the odd ones by the second.
// `barrier` is the warp's own. All threads have arrived at the cluster's barrier after it was
// initialised.
__device__ __forceinline__ void decode_share_x(const DecodeArguments& args, const Run& run,
                                               uint32_t barrier) {
  const Problem& p = args.problem;
  const int lane = threadIdx.x % 32;
  cluster_wait();
  if (run.units == 0) return;
  const int k = run.first * kUnitK;
  const int pieces = run.units * (kUnitK / 8);  // of 16 bytes, per row
  const int inside = min(pieces, (p.k - k) / 8);
  if (lane == 0) barrier_arrive_expect(barrier, p.m * inside * 16);
  const int row = 2 * lane + cluster_rank();
  if (row < p.m) {
    copy_multicast(run.x + row * args.x_pitch,
                   static_cast<const uint16_t*>(p.x) + static_cast<int64_t>(row) * p.k + k,
                   inside * 16, barrier, 3);
  }
#pragma unroll 1
  for (int piece = inside + lane; piece < pieces; piece += 32) {
#pragma unroll 1
    for (int r = 0; r < p.m; ++r) {
      st_shared(run.x + r * args.x_pitch + piece * 16, make_uint4(0, 0, 0, 0));
    }
  }
}

// Adds up the sums of `slots` strips from `first_strip` on, every `stride`-th: warps in order, then
// splits; writes y, or this split's partial sums. Nothing may be written to the sums before it, and
// all of them after it.
template <class T>
__device__ __forceinline__ void decode_add(const DecodeArguments& args, int first_strip, int stride,
                                           int slots, int split) {
  const Problem& p = args.problem;
  const uint32_t parts = shared_base() + args.parts;
  const uint32_t sums = shared_base() + args.sums;
  const int count = slots * p.m * kFragmentN;
  const auto place = [&](int i, int* row, int* n) {
    const int slot = args.rows.divide(i / kFragmentN);
    *row = i / kFragmentN - slot * p.m;
    *n = (first_strip + slot * stride) * kFragmentN + i % kFragmentN;
    return slot;
  };
  block_sync();
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kDecodeThreads) {
    int row, n;
    const int slot = place(i, &row, &n);
    const uint32_t from =
        parts + ((slot * kDecodeWarps * p.m + row) * kSumsPitch + i % kFragmentN) * 4;
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kDecodeWarps; ++warp) {
      sum += ld_shared<float>(from + warp * p.m * kSumsPitch * 4);
    }
    if (args.reduction == Reduction::kCluster) {
      st_shared(sums + i * 4, sum);
    } else if (n < p.n) {
      if (args.reduction == Reduction::kWorkspace) {
        const int64_t at = (static_cast<int64_t>(split) * p.m + row) * tiles_n(p.n) * kTileN + n;
        st_global(args.partial + at, sum);
      } else {
        write_output<T>(p, row, n, sum);
      }
    }
  }
  if (args.reduction != Reduction::kCluster) return;
  cluster_arrive();
  cluster_wait();
  // Each block adds up its share.
  const int splits = 1 << args.splits_log2;
  const int last = count * (split + 1) >> args.splits_log2;
#pragma unroll 1
  for (int i = (count * split >> args.splits_log2) + threadIdx.x; i < last; i += kDecodeThreads) {
    int row, n;
    place(i, &row, &n);
    if (n >= p.n) continue;
    float part[kMaxClusterSplits];
#pragma unroll
    for (int rank = 0; rank < kMaxClusterSplits; ++rank) {
      part[rank] = rank < splits ? ld_cluster<float>(cluster_map(sums + i * 4, rank)) : 0.0f;
    }
    float sum = part[0];
#pragma unroll
    for (int rank = 1; rank < kMaxClusterSplits; ++rank) sum += part[rank];
    write_output<T>(p, row, n, sum);
  }
  // The others may be reading this block's sums.
  cluster_arrive();
  cluster_wait();
}

// One lane's part of the products of a warp, of up to 16 rows of x with codes less zero points,
// both as 16-bit floats. The integers q - z are exact; at the end of a group the scale applies to
// the f32 sums. kColumns: 8 or 16 columns of the product hold the rows of x. kSets: groups that
// begin in a unit of 128 along K.
template <class T, int kBits, int kColumns, int kSets>
class FloatProducts {
 public:
  using Type = T;
  static constexpr bool kMayShareX = true;

  __device__ __forceinline__ FloatProducts(const DecodeArguments& args, const Run& run)
      : problem_(args.problem), parameters_(args.problem.scale_type) {
    const int lane = threadIdx.x % 32;
    // Lane addresses for ldmatrix. 8 columns: matrix j is k 8 j of 32; 16 columns: matrix j is
    // k 8 (j % 2) of 16, rows of x 8 (j / 2).
    const int row = min(lane % 8 + (kRight == 2 ? lane / 16 * 8 : 0), problem_.m - 1);
    x_ = run.x + row * args.x_pitch + (kRight == 2 ? lane / 8 % 2 * 16 : lane / 8 * 16);
    to_sums_ = (first_row() * kSumsPitch + lane / 4) * 4;
    keep(to_sums_);
  }

  __device__ __forceinline__ static uint32_t x_to(const Run& run) { return run.x; }

  __device__ __forceinline__ void begin_strip() {
#pragma unroll
    for (int r = 0; r < kRight; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i) total_[r][i] = 0.0f;
    }
    x_unit_ = x_;
  }

  // Adds the next unit, whose codes are `words` and whose parameters are in the stage.
  __device__ __forceinline__ void add_unit(uint32_t stage, const uint32_t* words) {
    uint32_t right[4];
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
      const uint32_t at = stage + set * kSetBytes;
      uint32_t zero[2];  // of rows lane / 4 and lane / 4 + 8
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        zero[i] = prepare_zero<T, kBits>(parameters_.zero(at, i));
      }
      float sum[kRight][4] = {};
#pragma unroll
      for (int block = 0; block < kUnitBlocks / kSets; ++block) {
        const int j = set * (kUnitBlocks / kSets) + block;
        if (kRight == 2 || j % 2 == 0) ldmatrix_x4(right, x_unit_ + j * 32);
        uint32_t a[4];
        exact_fragment<T, kBits>(a, &words[j * kBits / 4], zero);
#pragma unroll
        for (int r = 0; r < kRight; ++r) {
          const int b = kRight == 2 ? 2 * r : j % 2 * 2;
          mma_m16n8k16<T>(sum[r], a, {right[b], right[b + 1]});
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float scale = parameters_.scale(at, i / 2);
#pragma unroll
        for (int r = 0; r < kRight; ++r) {
          total_[r][i] = fmaf(scale, sum[r][i], total_[r][i]);
        }
      }
    }
    x_unit_ += kUnitK * 2;
  }

  // Writes the warp's sums of the strip: [m][kSumsPitch] f32.
  __device__ __forceinline__ void store(int /*strip*/, uint32_t sums) const {
    // A lane's sums: rows lane / 4 (+ 8) of a fragment, columns 2 (lane % 4) (+ 1).
    const uint32_t at = sums + to_sums_;
#pragma unroll
    for (int r = 0; r < kRight; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = r * 8 + i % 2;
        if (first_row() < problem_.m - row) {
          st_shared(at + (row * kSumsPitch + i / 2 * 8) * 4, total_[r][i]);
        }
      }
    }
  }

 private:
  static constexpr int kRight = kColumns / 8;  // right-hand fragments

  __device__ __forceinline__ static int first_row() { return threadIdx.x % 4 * 2; }

  const Problem& problem_;
  StageParameters<kBits> parameters_;
  uint32_t x_, x_unit_, to_sums_;
  float total_[kRight][4];
};

template <class Products, int kBits, int kSets>
__device__ __forceinline__ void decode_block(const DecodeArguments& args) {
  constexpr int kCodeBytes = unit_code_bytes(kBits);
  constexpr int kStageBytes = stage_bytes(kBits, kSets);
  constexpr int kLoads = 2 * kBits / 4;  // 16-byte loads of a lane per unit

  const Problem& p = args.problem;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const uint32_t barrier = shared_base() + args.barriers + warp * 8;
  const bool shares_x = Products::kMayShareX && args.shares_x;
  if (shares_x) {
    if (lane == 0) {
      barrier_init(barrier, 1);
      barrier_init_fence();
    }
    warp_sync();
    cluster_arrive_relaxed();
  }
  const int split = blockIdx.x & ((1 << args.splits_log2) - 1);
  const int first_strip = blockIdx.x >> args.splits_log2;
  const int stride = gridDim.x >> args.splits_log2;
  // This warp's part of the units of its split.
  const int block_first = args.units * split >> args.splits_log2;
  const int block_units = (args.units * (split + 1) >> args.splits_log2) - block_first;
  Run run;
  run.first = block_first + block_units * warp / kDecodeWarps;
  run.units = block_first + block_units * (warp + 1) / kDecodeWarps - run.first;
  run.x = shared_base() + args.x + (run.first - block_first) * args.x_unit;
  const int steps = steps_k(p.k);

  if (shares_x) {
    decode_share_x(args, run, barrier);
  } else {
    decode_copy_x(args, run, Products::x_to(run));
  }

  // ---- The stream of codes and parameters ----
  // Lanes 8 i .. 8 i + 7 copy set i (and i + 4): up to four pieces of scales, then the zero points.
  uint32_t lane_bytes = lane * kLaneBytes;
  keep(lane_bytes);
  const uint32_t ring = shared_base() + warp * kDecodeStages * kStageBytes + lane_bytes;
  const int scale_bytes = p.scale_type == Dtype::kF32 ? 4 : 2;
  int set_lane = lane / 8;
  int piece = lane % 8;
  keep(set_lane);
  keep(piece);
  const bool is_zero = piece >= 4;
  int carries = set_lane < kSets && (is_zero ? piece == 4 : piece < scale_bytes);
  keep(carries);
  int parameter_bytes = is_zero ? 1 : scale_bytes;
  keep(parameter_bytes);
  int group_bytes = kTileN * parameter_bytes;
  keep(group_bytes);
  // This lane's pieces of the first strip of a tile, of unit 0 and group 0.
  const char* first_codes =
      static_cast<const char*>(p.codes) + lane_offset(kBits, steps, 0, 2 * run.first, 0, 0, lane);
  const char* first_parameters =
      static_cast<const char*>(is_zero ? p.zeros : p.scales) + piece % 4 * 16;
  const uint32_t tile_bytes = steps * step_bytes(kBits);
  const uint32_t tile_parameters = p.groups * group_bytes;
  uint32_t to_parameters = kCodeBytes + set_lane * kSetBytes + piece * 16 - lane_bytes;
  keep(to_parameters);
  const bool half_tail = 2 * (run.first + run.units) > steps;  // the last unit is one step
  const char* codes = nullptr;                                 // this lane's next 16 bytes
  const char* parameters = nullptr;                            // this lane's 16 bytes of group 0
  uint32_t copied_strip = first_strip - stride;  // The first copy_unit adds the stride.
  int copied_set = 0;
  int left = 0;  // units left in the strip
  const uint64_t policy = cache_policy(true);
  const auto copy_unit = [&](uint32_t stage) {
    if (left == 0) {
      copied_strip += stride;
      left = run.units;
      copied_set = run.first * kSets + set_lane;
      const uint32_t tile = copied_strip / kTileStrips, part = copied_strip % kTileStrips;
      codes = first_codes + uint64_t{tile} * tile_bytes + part * (32 * kLaneBytes);
      parameters = first_parameters + uint64_t{tile} * tile_parameters +
                   part * (kFragmentN * parameter_bytes);
    }
    if (copied_strip < static_cast<uint32_t>(args.strips)) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const bool valid = i < kLoads / 2 || !half_tail || left > 1;
        cp_async_16(stage + i * 512, codes + i * kTileBytes, valid, policy);
      }
#pragma unroll
      for (int set = 0; set < kSets; set += 4) {
        const int group = min(args.sets_per_group.divide(copied_set + set), p.groups - 1);
        if (carries) {
          cp_async_16(stage + to_parameters + set * kSetBytes,
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
  if (run.units > 0) {
#pragma unroll 1
    for (int i = 0; i < kDecodeStages; ++i) copy_unit(ring + i * kStageBytes);
    cp_async_wait<kDecodeStages>();
  } else {
    cp_async_wait<0>();
  }
  if (shares_x) {
    if (run.units > 0) barrier_wait(barrier, 0);
    cluster_arrive_relaxed();
  }
  warp_sync();  // This warp's x is there.

  Products products(args, run);

  const int strip_bytes = decode_strip_bytes(p.m);
  const uint32_t first_sums = shared_base() + args.parts + warp * p.m * kSumsPitch * 4;
  uint32_t stage = ring, sums = first_sums;
  int slot = 0;
#pragma unroll 1
  for (int strip = first_strip; strip < args.strips; strip += stride) {
    products.begin_strip();
#pragma unroll 1
    for (int unit = 0; unit < run.units; ++unit) {
      cp_async_wait<kDecodeStages - 1>();
      warp_sync();
      uint32_t words[4 * kLoads];
      load_words<kLoads>(words, stage, 512);
      products.add_unit(stage, words);
      warp_sync();  // All lanes have read the stage.
      copy_unit(stage);
      stage += kStageBytes;
      if (stage == ring + kDecodeStages * kStageBytes) stage = ring;
    }
    products.store(strip, sums);
    sums += strip_bytes;
    ++slot;
    const bool last = strip + stride >= args.strips;
    if (slot < args.slots && !last) continue;
    decode_add<typename Products::Type>(args, strip - (slot - 1) * stride, stride, slot, split);
    slot = 0;
    sums = first_sums;
    if (!last) block_sync();
  }
  cp_async_wait<0>();
  if (shares_x) cluster_wait();  // A block stays until all that it copies has arrived.
}

}  // namespace jax_gptq::cuda
