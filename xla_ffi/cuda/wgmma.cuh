// Class B on sm_90a: y[m, n] = x[m, k] W[k, n] with W dequantized in registers.
//
// The packed weight is the A operand of wgmma, taken from registers; the activations are its B
// operand, taken from shared memory. A tile of the output is therefore computed transposed:
// rows of the accumulator are output features, columns are rows of x.
//
//   warpgroup 0       one thread of each of three warps copies: boxes of kBlockM rows of x
//   (the producer)    (128-byte swizzle, multicast to the blocks of the cluster that need them),
//                     the packed tiles of kBlockN output features, their scales and zero points,
//                     all through tensor maps, as many stages of one or two steps of 64 along K
//                     ahead as fit.
//   the other         each owns 64 output features, in half of the steps where there are two for
//   warpgroups        the same. It dequantizes a whole stage, hands over its products and reads the
//   (the consumers)   codes of the next, while others are elsewhere in that round.
//
// A cluster is one block, or two for neighbouring output tiles that share x by multicast. Clusters
// take whole tiles in turn, or each an equal share of all tiles' stages in a row:
//
//   stages    |  tile 0  |  tile 1  |  tile 2  |  tile 3  |        The share that begins a tile
//   shares    |   0   |   1   |   2   |   3   |   4   |   5   |    stores it, after adding what
//                                                                  those that go on with it found.
//
// These put their f32 sums into the workspace, and they come first: a share begins with the end of
// a tile. A warp that copies nothing raises their block's flag then, and waits for the flags that
// its own block needs. The storing share adds sums in order of K, so that equal inputs give equal
// bits. Whoever waits waits for clusters of lower index. That these start first is how devices
// behave, not what CUDA promises; the look-back of CUB's scans relies on the same.
//
// Shared memory:  | barriers, 1024 bytes | stage 0 | stage 1 | ... | staging |
// In the staging are output tiles on their way, and before that sums on their way from warpgroup to
// warpgroup.
//
// Rounding: (q - z) is exact, its product with the scale is rounded once to the type of x. In the
// mode kOnSums it is not: q - z is multiplied by x, and the scale by the f32 sum of 128 along K.
#pragma once

#include <algorithm>
#include <type_traits>

#include "fragment.cuh"
#include "output.cuh"
#include "plan.h"
#include "wgmma.h"
#include "wgmma_primitives.cuh"

namespace jax_gptq::cuda {

constexpr int kWgmmaMaxStages = 10;
constexpr int kWgmmaBarrierBytes = 1024;
constexpr int kWgmmaSharedBytes = 227 * 1024;
// Tiles of m walked before the next tile of n, so that x and the weights meet in the L2 cache.
constexpr int kWgmmaRasterRows = 8;

// Warpgroups that multiply share the output features, 64 each, and, where there would be two of
// them to keep the multiprocessor busy, also the steps along K.
constexpr int wgmma_parts(int block_n, int block_m) {
  return block_n == 128 && block_m == 32 ? 2 : 1;
}
constexpr int wgmma_consumers(int block_n, int block_m) {
  return block_n / kTileN * wgmma_parts(block_n, block_m);
}
constexpr int wgmma_threads(int consumers) { return 128 * (consumers + 1); }

// Registers of a thread after the warpgroups have traded: the block starts with
// 65536 / threads each, rounded down to a multiple of 8.
constexpr int wgmma_consumer_registers(int consumers) { return consumers == 2 ? 232 : 112; }
constexpr int wgmma_producer_registers(int consumers) { return consumers == 2 ? 40 : 32; }

// Offsets in a stage, after the box of x.
struct WgmmaStage {
  int codes, scales, zeros;
  int parameters;  // bytes of scales and zero points
  int size;        // of everything, rounded up to the alignment of the swizzle
};

constexpr WgmmaStage wgmma_stage(int block_n, int block_m, int bits, Dtype scale_type,
                                 int group_rows) {
  const int k = wgmma_stage_steps(block_m) * kStepK;
  WgmmaStage stage{};
  stage.codes = block_m * k * 2;
  stage.scales = stage.codes + block_n * k * bits / 8;
  stage.zeros = stage.scales + block_n * group_rows * dtype_bytes(scale_type);
  stage.parameters = stage.zeros + block_n * group_rows - stage.scales;
  stage.size = ceil_div(stage.scales + stage.parameters, 1024) * 1024;
  return stage;
}

// Bytes in which the sums of one part of the warpgroups reach those of the other.
constexpr int wgmma_exchange_bytes(int block_n, int block_m) {
  return wgmma_parts(block_n, block_m) == 1 ? 0 : block_n * block_m * 4;
}

struct WgmmaArguments {
  const void *codes, *scales, *zeros;  // layout.h
  int m, n, k_steps;
  int groups;
  int group_rows;        // groups that one stage can touch
  int group_steps;       // steps of 64 of a group, if it ends between steps
  Divisor group_pieces;  // steps of 16 of a group
  int m_tiles, n_tiles;
  int works;          // m_tiles times the columns of tiles that a cluster takes at once
  int clusters;       // launched
  int columns;        // 1 or 2
  Divisor tile_size;  // stages of a tile
  bool in_shares;     // whether clusters have shares of `share_size` stages, the first
  int share_size;     // `longer_shares` one more
  int longer_shares;
  uint64_t* flags;  // [clusters * columns]
  float* partial;   // [clusters * columns][block_n * block_m]
  int stages;       // that fit; fewer than 2: the plan does not
  bool y_mapped;    // y is written through its tensor map: 16-bit, n a multiple of 8
  bool y_f32;
  Dtype scale_type;
  const float* bias;  // [n] or null
  void* y;            // [m, n]
  WgmmaStage stage;
  int staging;  // from the first stage
  int shared_bytes;
};

inline WgmmaArguments wgmma_arguments(const Problem& problem, const WgmmaPlan& plan,
                                      void* workspace) {
  WgmmaArguments args{};
  args.codes = problem.codes;
  args.scales = problem.scales;
  args.zeros = problem.zeros;
  args.m = problem.m;
  args.n = problem.n;
  args.k_steps = steps_k(problem.k);
  args.groups = problem.groups;
  const int stage_k = wgmma_stage_steps(plan.block_m) * kStepK;
  const int stage_count = wgmma_stages(problem, plan);
  // A single group covers all of k and its padding.
  const int group_size = problem.groups == 1 ? stage_count * stage_k : problem.group_size;
  args.group_steps = group_size / kStepK;
  args.group_pieces = Divisor(group_size / kFragmentK);
  args.group_rows = 1;
  if (group_size % stage_k != 0) {
    // A group may begin before the stage: one more than fits, unless the beginnings coincide.
    args.group_rows =
        stage_k % group_size == 0 ? stage_k / group_size : (stage_k - 1) / group_size + 2;
  }
  args.m_tiles = ceil_div(problem.m, plan.block_m);
  args.n_tiles = ceil_div(problem.n, plan.block_n);
  args.works = wgmma_works(problem, plan);
  args.clusters = plan.clusters;
  args.columns = plan.columns;
  args.tile_size = Divisor(stage_count);
  args.in_shares = plan.shares > 0;
  args.share_size = args.works * stage_count / plan.clusters;
  args.longer_shares = args.works * stage_count % plan.clusters;
  args.flags = static_cast<uint64_t*>(workspace);
  args.partial = reinterpret_cast<float*>(args.flags + kWgmmaFlags);
  args.y_f32 = problem.y_f32;
  args.y_mapped = problem.n % 8 == 0 && !problem.y_f32;
  args.scale_type = problem.scale_type;
  args.bias = problem.bias;
  args.y = problem.y;
  args.stage =
      wgmma_stage(plan.block_n, plan.block_m, problem.bits, problem.scale_type, args.group_rows);
  const int tile = args.y_mapped ? plan.block_n * plan.block_m * 2 : 0;
  const int staging = std::max(tile, wgmma_exchange_bytes(plan.block_n, plan.block_m));
  const int room = kWgmmaSharedBytes - kWgmmaBarrierBytes - staging;
  args.stages = std::min(room / args.stage.size, kWgmmaMaxStages);
  args.staging = args.stages * args.stage.size;
  args.shared_bytes = kWgmmaBarrierBytes + args.staging + staging;
  return args;
}

struct WgmmaMaps {
  MapDescription x, codes, scales, zeros, y;
};

inline WgmmaMaps wgmma_maps(const Problem& problem, const WgmmaPlan& plan,
                            const WgmmaArguments& args) {
  const int tiles = plan.block_n / kTileN;
  const int64_t all_tiles = tiles_n(problem.n);
  WgmmaMaps maps;
  maps.x = {problem.x,
            problem.type,
            2,
            2,
            {problem.k, problem.m},
            {int64_t{problem.k} * 2},
            {kStepK, plan.block_m / plan.columns, 1},
            true};
  // The codes as 8-byte words, so that a tile is 256 of them: the longest box side there is.
  const int64_t blocks = int64_t{steps_k(problem.k)} * (problem.bits / 4);
  maps.codes = {problem.codes,
                problem.type,
                8,
                3,
                {256, blocks, all_tiles},
                {kTileBytes, blocks * kTileBytes},
                {256, wgmma_stage_steps(plan.block_m) * problem.bits / 4, tiles},
                false};
  const int64_t groups = problem.groups;
  const int element = dtype_bytes(problem.scale_type);
  maps.scales = {problem.scales,
                 problem.scale_type,
                 element,
                 3,
                 {kTileN, groups, all_tiles},
                 {kTileN * element, groups * kTileN * element},
                 {kTileN, args.group_rows, tiles},
                 false};
  maps.zeros = {problem.zeros,
                problem.type,
                1,
                3,
                {kTileN, groups, all_tiles},
                {kTileN, groups * kTileN},
                {kTileN, args.group_rows, tiles},
                false};
  maps.y = {problem.y,
            problem.type,
            2,
            2,
            {problem.n, problem.m},
            {int64_t{problem.n} * 2},
            {kTileN, plan.block_m, 1},
            true};
  return maps;
}

// ---- Dequantization ------------------------------------------------------------------------

// Scale and zero point of this lane's two rows of one 64-row tile, rows r and r + 8.
// The scale as a duplicated pair in kExact and kSplit, else in f32; the zero point as prepare_zero
// makes it for the type that q - z is taken in.
struct WgmmaParameters {
  uint32_t scale[2];
  uint32_t rest[2];  // kSplit: of the scale, rounded to bf16
  uint32_t zero[2];
};

// The 16-bit type that holds q - z.
template <class T, WgmmaMode kMode>
using ExactType =
    std::conditional_t<kMode == WgmmaMode::kExact || kMode == WgmmaMode::kOnSums, T, Bf16>;

// `scales` and `zeros` are where those of row r are.
template <class T, int kBits, WgmmaMode kMode>
__device__ __forceinline__ WgmmaParameters load_parameters(uint32_t scales, uint32_t zeros,
                                                           Dtype scale_type) {
  WgmmaParameters p;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    p.zero[i] = prepare_zero<ExactType<T, kMode>, kBits>(ld_shared<uint8_t>(zeros + 8 * i));
    if constexpr (kMode == WgmmaMode::kExact) {
      p.scale[i] = ld_shared<uint16_t>(scales + 16 * i) * 0x00010001u;
    } else if constexpr (kMode == WgmmaMode::kSplit) {
      const float scale = to_float<F16>(ld_shared<uint16_t>(scales + 16 * i));
      const uint16_t rounded = from_float<Bf16>(scale);
      p.scale[i] = rounded * 0x00010001u;
      p.rest[i] = from_float<Bf16>(scale - to_float<Bf16>(rounded)) * 0x00010001u;
    } else {
      p.scale[i] = float_bits(load_scale(scales, 8 * i, scale_type));
    }
  }
  return p;
}

// The A fragment of 16 along K of one tile, from a word of four-bit codes (layout.h).
template <class T, WgmmaMode kMode>
__device__ __forceinline__ void dequantize4(uint32_t (&a)[4], uint32_t word,
                                            const WgmmaParameters& p) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t exact = exact_pair<ExactType<T, kMode>, 4>(i, &word, p.zero);
    if constexpr (kMode == WgmmaMode::kOnSums) {
      a[i] = exact;
    } else if constexpr (kMode == WgmmaMode::kExact) {
      a[i] = mul2<T>(exact, p.scale[i % 2]);
    } else if constexpr (kMode == WgmmaMode::kSplit) {
      // f16 has 11 bits: the rest of a scale has 3, its product with 5 bits of q - z is exact, and
      // the sum is rounded once.
      a[i] = fma2<Bf16>(exact, p.scale[i % 2], mul2<Bf16>(exact, p.rest[i % 2]));
    } else {
      const float scale = bits_float(p.scale[i % 2]);
      a[i] = pack2<T>(bits_float(exact << 16) * scale, bits_float(exact & 0xffff0000u) * scale);
    }
  }
}

// The same from two words of eight-bit codes.
template <class T>
__device__ __forceinline__ void dequantize8(uint32_t (&a)[4], uint32_t low, uint32_t high,
                                            const WgmmaParameters& p) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t word = i < 2 ? low : high;
    const float scale = bits_float(p.scale[i % 2]);
    const float zero = bits_float(p.zero[i % 2]);
    // The code becomes the low mantissa byte of 2^23.
    const float first = bits_float(prmt(word, kNumberF32, 0x7650 + i % 2));
    const float second = bits_float(prmt(word, kNumberF32, 0x7652 + i % 2));
    a[i] = pack2<T>((first - zero) * scale, (second - zero) * scale);
  }
}

// ---- The kernel ----------------------------------------------------------------------------

struct OutputTile {
  int m, n;  // counted in blocks
};

// The `work`-th output tile: bands of kWgmmaRasterRows tiles of m, walked along n. Few rows of x
// have one tile of m, and no time for divisions.
__device__ __forceinline__ OutputTile output_tile(const WgmmaArguments& args, int work,
                                                  int column) {
  if (args.m_tiles == 1) return {0, work * args.columns + column};
  const int along_n = (args.n_tiles + args.columns - 1) >> (args.columns - 1);
  const int band = work / (kWgmmaRasterRows * along_n);
  const int left = args.m_tiles - band * kWgmmaRasterRows;
  const int rows = left < kWgmmaRasterRows ? left : kWgmmaRasterRows;
  const int within = work - band * kWgmmaRasterRows * along_n;
  return {band * kWgmmaRasterRows + within % rows, within / rows * args.columns + column};
}

// Of a step of 16 along K.
__device__ __forceinline__ int group_of(const WgmmaArguments& args, int piece) {
  const int group = args.group_pieces.divide(piece);
  return group < args.groups ? group : args.groups - 1;
}

__device__ __forceinline__ float load_bias(const WgmmaArguments& args, int n) {
  return args.bias != nullptr && n < args.n ? ld_global_nc<float>(args.bias + n) : 0.0f;
}

// The first stage of a share, of all tiles' stages in a row.
__device__ __forceinline__ int share_begin(const WgmmaArguments& args, int share) {
  return share * args.share_size + min(share, args.longer_shares);
}

// The share of this cluster: the first cluster has the last.
__device__ __forceinline__ int own_share(const WgmmaArguments& args) {
  return args.clusters - 1 - cluster_index();
}

// The works of a cluster, every `stride`-th from `first` on, and the steps of 64 along K,
// `stage_steps` in a stage, where the first begins and the last ends.
struct Walk {
  int first, end, stride;
  int first_step, last_step;
};

__device__ __forceinline__ Walk walk(const WgmmaArguments& args, int stage_steps) {
  const int tile_size = args.tile_size.value;
  if (!args.in_shares) {
    return {cluster_index(), args.works, args.clusters, 0, tile_size * stage_steps};
  }
  const int share = own_share(args);
  const int begin = share_begin(args, share), last = share_begin(args, share + 1) - 1;
  const int first_work = args.tile_size.divide(begin), last_work = args.tile_size.divide(last);
  // The same for all lanes, which the compiler must know.
  return {shuffle(first_work, 0), shuffle(last_work + 1, 0), 1,
          shuffle((begin - first_work * tile_size) * stage_steps, 0),
          shuffle((last + 1 - last_work * tile_size) * stage_steps, 0)};
}

// Calls visit(work, tile, begin, end) for each of a cluster's tiles: the steps of its K from
// `begin` to `end` are this cluster's.
template <class Visit>
__device__ __forceinline__ void walk_tiles(const WgmmaArguments& args, const Walk& walked,
                                           int stage_steps, int column, const Visit& visit) {
  int begin = walked.first_step;
  for (int work = walked.first; work < walked.end; work += walked.stride) {
    const bool last = work + walked.stride >= walked.end;
    const int end = last ? walked.last_step : static_cast<int>(args.tile_size.value) * stage_steps;
    visit(work, output_tile(args, work, column), begin, end);
    begin = 0;
  }
}

// A block of a share, by which its flag and sums are found in the workspace.
__device__ __forceinline__ int share_slot(const WgmmaArguments& args, int share, int column) {
  return share * args.columns + column;
}

// Where the sums of the `holder`-th warp of a block are, for this lane.
template <int kTileSums, int kSums>
__device__ __forceinline__ float* partial_sums(const WgmmaArguments& args, int slot, int holder) {
  return args.partial + static_cast<int64_t>(slot) * kTileSums + holder * (kSums * 32) +
         threadIdx.x % 32 * 4;
}

// Hands a warp's sums over to the share that stores the tile. Another warp raises the flag, since a
// release waits for the stores before it.
template <int kTileSums, int kSums>
__device__ __forceinline__ void hand_over(const float (&sums)[kSums], const WgmmaArguments& args,
                                          int slot, int holder) {
  float* to = partial_sums<kTileSums, kSums>(args, slot, holder);
#pragma unroll
  for (int i = 0; i < kSums; i += 4) {
    st_global(to + i * 32, make_float4(sums[i], sums[i + 1], sums[i + 2], sums[i + 3]));
  }
}

// Adds what the shares after `share` handed over of the tile of `work`, in their order.
template <int kTileSums, int kSums>
__device__ __forceinline__ void add_shares(float (&sums)[kSums], const WgmmaArguments& args,
                                           int share, int work, int column, int holder) {
  constexpr int kAtOnce = kSums < 64 ? 64 / kSums : 1;  // under way
  const int end = (work + 1) * static_cast<int>(args.tile_size.value);
  int last = share + 1;
  while (share_begin(args, last + 1) < end) ++last;
#pragma unroll 1
  for (int i = share + 1; i <= last; i += kAtOnce) {
    float4 parts[kAtOnce][kSums / 4];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int slot = share_slot(args, min(i + j, last), column);
      const float* from = partial_sums<kTileSums, kSums>(args, slot, holder);
#pragma unroll
      for (int s = 0; s < kSums / 4; ++s) parts[j][s] = ld_global<float4>(from + s * 128);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (i + j > last) break;
#pragma unroll
      for (int s = 0; s < kSums / 4; ++s) {
        sums[4 * s] += parts[j][s].x;
        sums[4 * s + 1] += parts[j][s].y;
        sums[4 * s + 2] += parts[j][s].z;
        sums[4 * s + 3] += parts[j][s].w;
      }
    }
  }
}

// By one warp, beside the others' work: tells the share that stores the first tile that the sums of
// this one are there, and waits for those of the shares that go on with the last tile.
__device__ __forceinline__ void exchange_flags(const WgmmaArguments& args, const Walk& walked,
                                               int column, uint32_t handed, uint32_t received) {
  const int lane = threadIdx.x % 32;
  const int share = own_share(args);
  if (walked.first_step > 0) {
    barrier_wait(handed, 0);
    if (lane == 0) raise_flag(args.flags + share_slot(args, share, column));
    if (walked.first == walked.end - 1) return;
  }
  const int end = walked.end * static_cast<int>(args.tile_size.value);
  for (int first = share + 1; share_begin(args, first) < end; first += 32) {
    const bool mine = share_begin(args, first + lane) < end;
    uint64_t* flag = args.flags + share_slot(args, first + lane, column);
    while (!warp_all(!mine || flag_raised(flag))) {
    }
    if (mine) lower_flag(flag);
  }
  warp_sync();
  if (lane == 0) barrier_arrive_expect(received, 0);
}

template <class T, int kBits, WgmmaMode kMode, int kBlockN, int kBlockM>
__device__ __forceinline__ void wgmma_block(const WgmmaArguments& args, const TensorMap& x_map,
                                            const TensorMap& code_map, const TensorMap& scale_map,
                                            const TensorMap& zero_map, const TensorMap& y_map) {
  constexpr int kParts = wgmma_parts(kBlockN, kBlockM);
  constexpr int kConsumers = wgmma_consumers(kBlockN, kBlockM);
  constexpr int kTiles = kBlockN / kTileN;
  constexpr int kSteps = wgmma_stage_steps(kBlockM);  // of 64 along K, in a stage
  constexpr int kSums = kBlockM / 2;                  // f32 accumulators of a lane
  constexpr bool kOnSums = kMode == WgmmaMode::kOnSums;
  using Product = Wgmma<T, kBlockM>;

  const uint32_t barriers = shared_base();
  const uint32_t stages = barriers + kWgmmaBarrierBytes;
  const auto full = [&](int stage) { return barriers + 16 * stage; };
  const auto empty = [&](int stage) { return barriers + 16 * stage + 8; };
  const uint32_t handed = barriers + 16 * kWgmmaMaxStages, received = handed + 8;
  const uint32_t staging = stages + args.staging;

  const int thread = static_cast<int>(threadIdx.x);
  const int warpgroup = thread / 128;
  const int warp = thread / 32 % 4;
  const int lane = thread % 32;

  // Nothing slow before the first copies: no division here.
  if (thread == 0) {
#pragma unroll
    for (int i = 0; i < kWgmmaMaxStages; ++i) {
      barrier_init(full(i), 2);
      barrier_init(empty(i), 4 * kConsumers * args.columns);
    }
    barrier_init(handed, 4 * kTiles);
    barrier_init(received, 1);
    barrier_init_fence();
  } else if (thread == 32) {
    prefetch_map(&x_map);
    prefetch_map(&code_map);
    prefetch_map(&scale_map);
    prefetch_map(&zero_map);
  }
  const int column = cluster_rank();
  const Walk walked = walk(args, kSteps);
  const int tile_steps = args.tile_size.value * kSteps;
  block_sync();
  if (args.columns > 1) {
    // The peer's barriers must be there before anything is sent to them.
    cluster_arrive_relaxed();
    cluster_wait();
  }

  if (thread / 32 == 3) {
    // The copy engine starts by reading the tensor maps from memory. Meanwhile the first codes,
    // scales and zero points are on their way to the L2 cache.
    const int tile = output_tile(args, walked.first, column).n * kTiles + lane;
    constexpr int kFirst = 4;  // steps; more would delay what is needed first
    const int first_step = walked.first_step;
    const int steps = min(args.k_steps - first_step, kFirst);
    const int first_group = args.group_pieces.divide(first_step * 4);
    if (lane < kTiles && tile < tiles_n(args.n)) {
      const int64_t code = lane_offset(kBits, args.k_steps, tile, first_step, 0, 0, 0);
      const int64_t parameter = parameter_index(args.groups, first_group, tile * kTileN);
      const int element = dtype_bytes(args.scale_type);
      prefetch_l2(static_cast<const char*>(args.codes) + code, steps * step_bytes(kBits));
      prefetch_l2(static_cast<const char*>(args.scales) + parameter * element, kTileN * element);
      prefetch_l2(static_cast<const char*>(args.zeros) + parameter, kTileN);
    }
  }

  if (warpgroup == 0) {
    registers_lower<wgmma_producer_registers(kConsumers)>();
    // Three warps issue copies, each through one elected lane: x, the codes, and the scales and
    // zero points, which change with the group. The first and the third say how many bytes will
    // arrive, and so that they have come to this stage.
    // The warps stay together around the elected lane: operands then sit in uniform registers, as
    // the copy instructions want them.
    const bool elected = elect_one();
    const uint64_t weight_policy = cache_policy(args.m_tiles == 1);
    const int box_row = column * kBlockM / 2;  // There are no more than two columns.
    const uint16_t peers = (1 << args.columns) - 1;
    int stage = 0, phase = 0;
    const auto copy_tile = [&](int, const OutputTile& tile, int begin, int end) {
      int group = -1;
#pragma unroll 1
      for (int step = begin; step < end; step += kSteps) {
        const uint32_t base = stages + stage * args.stage.size;
        const int previous = group;
        group = group_of(args, step * 4);
        const bool parameters =
            kMode == WgmmaMode::kFine || args.group_rows > 1 || group != previous;
        barrier_wait(empty(stage), phase ^ 1);
        if (elected) {
          if (warp == 0) {
            barrier_arrive_expect(full(stage), args.stage.scales);
#pragma unroll
            for (int i = 0; i < kSteps; ++i) {
              const uint32_t to = base + i * (kBlockM * 128);
              if (args.columns > 1) {
                copy_box_multicast(to + box_row * 128, &x_map, full(stage), (step + i) * kStepK,
                                   tile.m * kBlockM + box_row, peers);
              } else {
                copy_box(to, &x_map, full(stage), (step + i) * kStepK, tile.m * kBlockM);
              }
            }
          } else if (warp == 1) {
            copy_box(base + args.stage.codes, &code_map, full(stage), 0, step * (kBits / 4),
                     tile.n * kTiles, weight_policy);
          } else {
            barrier_arrive_expect(full(stage), parameters ? args.stage.parameters : 0);
            if (parameters) {
              copy_box(base + args.stage.scales, &scale_map, full(stage), 0, group, tile.n * kTiles,
                       weight_policy);
              copy_box(base + args.stage.zeros, &zero_map, full(stage), 0, group, tile.n * kTiles,
                       weight_policy);
            }
          }
        }
        if (++stage == args.stages) {
          stage = 0;
          phase ^= 1;
        }
      }
    };
    if (warp < 3) {
      walk_tiles(args, walked, kSteps, column, copy_tile);
    } else if (args.in_shares) {
      exchange_flags(args, walked, column, handed, received);
    }
  } else {
    registers_raise<wgmma_consumer_registers(kConsumers)>();
    // The same for all lanes, which the compiler must know.
    const int part = kParts == 1 ? 0 : shuffle(warpgroup - 1, 0) / kTiles;
    const int feature_tile = (warpgroup - 1) % kTiles;  // of the block
    const int row = 16 * warp + lane / 4;  // of a 64-row tile; the lane also has row + 8

    // A piece is 16 along K. All of a stage are dequantized, then all multiplied: to overlap both
    // within a warpgroup is slower, as every wait costs (docs/h200_notes.md, seventh).
    constexpr int kOwnSteps = kSteps / kParts;  // in a stage, from `part` on
    constexpr int kPieces = 4 * kOwnSteps;
    uint4 words[kOwnSteps][kBits / 4];  // codes of a stage
    WgmmaParameters parameters;

    const uint32_t lane_codes = args.stage.codes +
                                (feature_tile * kSteps + part) * step_bytes(kBits) +
                                (warp * 32 + lane) * kLaneBytes;
    const int scale_bytes =
        kMode == WgmmaMode::kExact || kMode == WgmmaMode::kSplit ? 2 : dtype_bytes(args.scale_type);
    const uint32_t lane_zeros = args.stage.zeros + feature_tile * args.group_rows * kTileN + row;
    const uint32_t lane_scales =
        args.stage.scales + (feature_tile * args.group_rows * kTileN + row) * scale_bytes;
    // The stage that codes come from, its barrier, and the parity that the barrier will have.
    uint32_t fetched = stages, fetched_full = full(0);
    int fetched_phase = 0;
    int to_fetch = args.stages;  // until the ring begins anew
    // From a stage's `full` barrier to where this lane says that it is empty: a lane arrives at its
    // own peer's barrier, if it has one.
    const uint32_t to_empty = cluster_map(empty(0), lane < args.columns ? lane : 0) - full(0);
    int steps_left = 0;  // of the group whose parameters are held

    const auto load_group = [&](int group_row) {
      parameters = load_parameters<T, kBits, kMode>(
          fetched + lane_scales + group_row * kTileN * scale_bytes,
          fetched + lane_zeros + group_row * kTileN, args.scale_type);
    };

    // Comes to the own_step-th of this warpgroup's steps in the fetched stage, which begins at
    // `step`: reads the parameters if a group begins.
    const auto begin_step = [&](int step, int own_step) {
      if (kMode == WgmmaMode::kFine) return;
      if (kParts > 1 && args.group_rows > 1) {
        load_group(group_of(args, (step + part) * 4) - group_of(args, step * 4));
        return;
      }
      // In kOnSums a stage is of one group.
      if (steps_left == 0 && !(kOnSums && own_step > 0)) {
        // One that begins in the second step of a stage is the second of its rows.
        load_group(own_step);
        steps_left = args.group_steps;
      }
      steps_left -= kParts;
    };
    // Waits for a new stage, which begins at `step`, and reads this warpgroup's codes.
    const auto fetch = [&](int step) {
      barrier_wait(fetched_full, fetched_phase);
#pragma unroll
      for (int own_step = 0; own_step < kOwnSteps; ++own_step) {
#pragma unroll
        for (int i = 0; i < kBits / 4; ++i) {
          words[own_step][i] = ld_shared<uint4>(fetched + lane_codes + i * kTileBytes +
                                                own_step * step_bytes(kBits));
        }
      }
      begin_step(step, 0);
    };
    const auto next_stage = [&] {
      fetched += args.stage.size;
      fetched_full += 16;
      if (--to_fetch == 0) {
        to_fetch = args.stages;
        fetched -= args.stages * args.stage.size;
        fetched_full -= args.stages * 16;
        fetched_phase ^= 1;
      }
    };

    // A piece of the fetched stage, which begins at `step`, into its fragment; in order.
    const auto dequantize = [&](uint32_t (&fragment)[4], int step, int piece) {
      if (piece == 4) begin_step(step, 1);
      if (kMode == WgmmaMode::kFine) {
        load_group(group_of(args, (step + part) * 4 + piece) - group_of(args, step * 4));
      }
      const uint4 w = words[piece / 4][kBits == 4 ? 0 : piece % 4 / 2];
      if constexpr (kBits == 4) {
        const uint32_t step_words[4] = {w.x, w.y, w.z, w.w};
        dequantize4<T, kMode>(fragment, step_words[piece % 4], parameters);
      } else {
        const bool second = piece % 2 == 1;
        dequantize8<T>(fragment, second ? w.z : w.x, second ? w.w : w.y, parameters);
      }
    };

    // The codes and products of a stage are done.
    const auto release = [&](uint32_t stage_full) {
      warp_sync();
      if (lane < args.columns) barrier_arrive_cluster(stage_full + to_empty);
    };

    const auto multiply_tile = [&](int work, const OutputTile& tile, int begin, int end) {
      float sums[kSums];
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[i] = 0.0f;
      steps_left = 0;
      fetch(begin);
      steps_left = (args.group_pieces.divide(begin * 4) + 1) * args.group_steps - begin - kParts;
#pragma unroll 1
      for (int step = begin; step < end; step += kSteps) {
        const uint64_t x = swizzled_descriptor(fetched + part * (kBlockM * 128));
        const uint32_t multiplied_full = fetched_full;
        const uint32_t scale[2] = {parameters.scale[0], parameters.scale[1]};  // of kOnSums
        uint32_t fragments[kPieces][4];
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) dequantize(fragments[piece], step, piece);
        float products[kSums];  // of the stage, in kOnSums
        float (&to)[kSums] = kOnSums ? products : sums;
        wgmma_fence();
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
          const uint64_t rows = x + piece / 4 * (kBlockM * 128 / 16) + 2 * (piece % 4);
          if (kOnSums && piece == 0) {
            Product::start(to, fragments[piece], rows);
          } else {
            Product::add(to, fragments[piece], rows);
          }
        }
        wgmma_commit();
        next_stage();
        if (step + kSteps < end) fetch(step + kSteps);
        wgmma_wait<0>();
        if constexpr (kOnSums) Product::settle(products);
        release(multiplied_full);
        if constexpr (kOnSums) {
#pragma unroll
          for (int i = 0; i < kSums; ++i) {
            sums[i] += products[i] * bits_float(scale[i / 2 % 2]);
          }
        }
      }

      if (thread % 128 == 0) store_wait_read();  // The tile before this has left the staging.
      if constexpr (kParts > 1) {
        named_barrier(1, 128 * kConsumers);
        const uint32_t exchange = staging + (feature_tile * 4 + warp) * (kSums * 128) + lane * 16;
        if (part == 1) {
#pragma unroll
          for (int i = 0; i < kSums; i += 4) {
            st_shared(exchange + i * 128,
                      make_float4(sums[i], sums[i + 1], sums[i + 2], sums[i + 3]));
          }
        }
        named_barrier(1, 128 * kConsumers);
        if (part == 1) return;
#pragma unroll
        for (int i = 0; i < kSums; i += 4) {
          const float4 other = ld_shared<float4>(exchange + i * 128);
          sums[i] += other.x;
          sums[i + 1] += other.y;
          sums[i + 2] += other.z;
          sums[i + 3] += other.w;
        }
      }
      const int holder = feature_tile * 4 + warp;  // of sums, of a block's warps
      if (begin > 0) {
        hand_over<kBlockN * kBlockM>(sums, args, share_slot(args, own_share(args), column), holder);
        warp_sync();
        if (lane == 0) barrier_arrive_expect(handed, 0);
        return;
      }
      if (end < tile_steps) {
        barrier_wait(received, 0);
        add_shares<kBlockN * kBlockM>(sums, args, own_share(args), work, column, holder);
      }
      const int n0 = tile.n * kBlockN + feature_tile * kTileN + row;
      if (args.y_mapped) {
        // Not where other warpgroups may still be reading each other's sums.
        const uint32_t to =
            staging + feature_tile * (kTileN * kBlockM) * (kParts > 1 ? sizeof(float) : 2);
        named_barrier(2 + feature_tile, 128);
        const float bias0 = load_bias(args, n0);
        const float bias1 = load_bias(args, n0 + 8);
#pragma unroll
        for (int i = 0; i < kSums; i += 8) {
          uint32_t pairs[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float bias = j % 2 == 0 ? bias0 : bias1;
            pairs[j] = pack2<T>(sums[i + 2 * j] + bias, sums[i + 2 * j + 1] + bias);
          }
          // Matrices: rows 0..7 and 8..15 of 8 columns of m, then those of the next 8 columns.
          const int m = i / 4 * 8 + lane / 16 * 8 + lane % 8;
          const int chunk = (2 * warp + lane / 8 % 2) ^ (m % 8);
          stmatrix_x4_trans(to + m * 128 + chunk * 16, pairs[0], pairs[1], pairs[2], pairs[3]);
        }
        fence_async_proxy();
        named_barrier(2 + feature_tile, 128);
        if (thread % 128 == 0) {
          store_box(&y_map, to, tile.n * kBlockN + feature_tile * kTileN, tile.m * kBlockM);
          store_commit();
        }
      } else {
        const float bias0 = load_bias(args, n0);
        const float bias1 = load_bias(args, n0 + 8);
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
          const int m = tile.m * kBlockM + i / 4 * 8 + lane % 4 * 2 + i % 2;
          const int n = n0 + i / 2 % 2 * 8;
          if (m < args.m && n < args.n) {
            store_output<T>(args.y, args.y_f32, static_cast<int64_t>(m) * args.n + n,
                            sums[i] + (i / 2 % 2 == 0 ? bias0 : bias1));
          }
        }
      }
    };
    walk_tiles(args, walked, kSteps, column, multiply_tile);
    if (thread % 128 == 0) store_wait_read();
  }
  if (args.columns > 1) {
    // A block stays until its peer has received what it sent and arrived on its barriers.
    warp_sync();
    cluster_arrive_relaxed();
    cluster_wait();
  }
}

}  // namespace jax_gptq::cuda
