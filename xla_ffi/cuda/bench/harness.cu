// Standalone harness of the CUDA kernels: no XLA, no Python.
//
//   harness check                 every format and odd shapes against float64, poisoned outputs,
//                                 100 runs bit for bit
//   harness small                 a few small cases, once each: for compute-sanitizer
//   harness streams               two streams at once give the bits that each gives alone
//   harness ceilings              copy bandwidth, read bandwidth, an empty graph node
//   harness tune M N K [SCALES BITS GROUP]   every plan, the fastest first, and the chosen; scales
//                                 bf16, f16 or f32, 4 bits and groups of 128 where not said
//
// build.sh builds it for sm_90a.
//
// Times are CUDA graph replays over at least 256 MB of rotating weights, so that every launch
// reads its weight from device memory.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "../decode.h"
#include "../kernels.h"
#include "../wgmma_launch.h"

namespace {

using namespace jax_gptq::cuda;

#define CHECK(call)                                                      \
  do {                                                                   \
    const cudaError_t error_ = (call);                                   \
    if (error_ != cudaSuccess) {                                         \
      std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, \
                   cudaGetErrorString(error_));                          \
      std::exit(1);                                                      \
    }                                                                    \
  } while (0)

constexpr int kSharedBytes = 227 * 1024;

int multiprocessors() {
  static const int count = [] {
    int value;
    CHECK(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 0));
    return value;
  }();
  return count;
}

// ---- Random data on the device ---------------------------------------------------------------

__device__ uint32_t hash(uint64_t i, uint32_t seed) {
  uint64_t z = i * 0x9E3779B97F4A7C15ull + (uint64_t(seed) << 32) + 0x632BE59BD9B4E019ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return uint32_t(z >> 32);
}

__device__ float normal(uint64_t i, uint32_t seed) {
  const float u = (hash(2 * i, seed) + 1.0f) * 2.3283064e-10f;
  const float v = hash(2 * i + 1, seed) * 2.3283064e-10f;
  return sqrtf(-2.0f * logf(fminf(u, 1.0f))) * cospif(2.0f * v);
}

__global__ void fill_bits(uint32_t* data, size_t count, uint32_t seed) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < count;
       i += size_t(gridDim.x) * blockDim.x) {
    data[i] = hash(i, seed);
  }
}

__device__ void put(void* data, size_t i, Dtype dtype, float value) {
  if (dtype == Dtype::kF32) static_cast<float*>(data)[i] = value;
  if (dtype == Dtype::kBf16) static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16(value);
  if (dtype == Dtype::kF16) static_cast<__half*>(data)[i] = __float2half(value);
}

__host__ __device__ float get(const void* data, size_t i, Dtype dtype) {
  if (dtype == Dtype::kF32) return static_cast<const float*>(data)[i];
  if (dtype == Dtype::kBf16) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
  return __half2float(static_cast<const __half*>(data)[i]);
}

// kind 0: normal; 1: positive scales around 0.01; 2: small integers; 3: powers of two.
__global__ void fill_values(void* data, size_t count, Dtype dtype, int kind, uint32_t seed) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < count;
       i += size_t(gridDim.x) * blockDim.x) {
    float value = 0;
    if (kind == 0) value = normal(i, seed);
    if (kind == 1) value = 0.005f + 0.01f * (hash(i, seed) * 2.3283064e-10f);
    if (kind == 2) value = float(int(hash(i, seed) % 5) - 2);
    if (kind == 3) value = exp2f(-float(hash(i, seed) % 3));
    put(data, i, dtype, value);
  }
}

__global__ void fill_zero_points(uint8_t* data, size_t count, int bits, uint32_t seed) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < count;
       i += size_t(gridDim.x) * blockDim.x) {
    data[i] = hash(i, seed) & ((1 << bits) - 1);
  }
}

// ---- The reference ---------------------------------------------------------------------------

struct Layout {
  int bits, k_tiles, groups, group_size;
};

// Code of W[k, n] in the tile layout, read one at a time.
__device__ uint32_t code_at(const uint8_t* qweight, Layout layout, int k, int n) {
  const int row = n % 16, column = k % 16;
  const int lane = row % 8 * 4 + column % 8 / 2;
  const int reg = column / 8 * 2 + row / 8;
  const int warp = n % 64 / 16;
  const size_t tile = size_t(n / 64) * layout.k_tiles + k / 64;
  if (layout.bits == 4) {
    const uint8_t* at = qweight + tile * 2048 + (warp * 32 + lane) * 16 + k % 64 / 16 * 4;
    const uint32_t word = *reinterpret_cast<const uint32_t*>(at);
    return word >> (4 * reg + 16 * (column % 2)) & 15;
  }
  const uint8_t* at =
      qweight + tile * 4096 + k % 64 / 32 * 2048 + (warp * 32 + lane) * 16 + k % 32 / 16 * 8;
  return at[reg / 2 * 4 + reg % 2 + column % 2 * 2];
}

__global__ void dequantize_reference(float* w, const uint8_t* qweight, const void* scales,
                                     Dtype scale_dtype, const uint8_t* qzeros, Layout layout,
                                     int n_all, int k_all) {
  const int n = blockIdx.x * blockDim.x + threadIdx.x;
  const int k = blockIdx.y;
  if (n >= n_all) return;
  const int group = min(k / layout.group_size, layout.groups - 1);
  const size_t at = (size_t(n / 64) * layout.groups + group) * 64 + n % 64;
  w[size_t(k) * n_all + n] =
      get(scales, at, scale_dtype) * (int(code_at(qweight, layout, k, n)) - int(qzeros[at]));
}

__global__ void multiply_reference(double* y, const void* x, Dtype dtype, const float* w,
                                   const void* bias, Dtype bias_dtype, const int* rows, int n_all,
                                   int k_all) {
  const int n = blockIdx.x * blockDim.x + threadIdx.x;
  if (n >= n_all) return;
  const int m = rows[blockIdx.y];
  double sum = 0;
  for (int k = 0; k < k_all; ++k) {
    sum += double(get(x, size_t(m) * k_all + k, dtype)) * w[size_t(k) * n_all + n];
  }
  if (bias != nullptr) sum += get(bias, n, bias_dtype);
  y[size_t(blockIdx.y) * n_all + n] = sum;
}

// ---- A problem with its buffers --------------------------------------------------------------

struct Case {
  int m, n, k, bits = 4, group_size = 128;
  Dtype dtype = Dtype::kBf16, scale_dtype = Dtype::kBf16;
  bool bias = false;
  bool exact = false;  // small integers and power-of-two scales: the result must be exact
  int copies = 1;      // rotating weights
};

class Buffers {
 public:
  explicit Buffers(const Case& c) : c_(c) {
    k_tiles_ = ceil_div(c.k, 64);
    n_tiles_ = ceil_div(c.n, 64);
    group_ = c.group_size <= 0 ? c.k : c.group_size;
    groups_ = ceil_div(c.k, group_);
    weight_bytes_ = size_t(n_tiles_) * k_tiles_ * 512 * c.bits;
    parameters_ = size_t(n_tiles_) * groups_ * 64;
    const int element = c.scale_dtype == Dtype::kF32 ? 4 : 2;
    for (int i = 0; i < c.copies; ++i) {
      qweight_.push_back(allocate(weight_bytes_));
      scales_.push_back(allocate(parameters_ * element));
      qzeros_.push_back(allocate(parameters_));
      fill_bits<<<1024, 256>>>(static_cast<uint32_t*>(qweight_[i]), weight_bytes_ / 4, 100 + i);
      fill_values<<<256, 256>>>(scales_[i], parameters_, c.scale_dtype, c.exact ? 3 : 1, 200 + i);
      fill_zero_points<<<256, 256>>>(static_cast<uint8_t*>(qzeros_[i]), parameters_, c.bits,
                                     300 + i);
    }
    x_ = allocate(size_t(c.m) * c.k * 2);
    y_ = allocate(size_t(c.m) * c.n * 2);
    workspace_ = allocate(kWorkspaceBytes);
    fill_values<<<256, 256>>>(x_, size_t(c.m) * c.k, c.dtype, c.exact ? 2 : 0, 1);
    if (c.bias) {
      bias_ = allocate(size_t(c.n) * 4);
      fill_values<<<16, 256>>>(bias_, c.n, Dtype::kF32, c.exact ? 2 : 0, 2);
    }
    CHECK(cudaDeviceSynchronize());
  }
  ~Buffers() {
    for (void* p : all_) cudaFree(p);
  }

  Problem problem(int copy = 0) const {
    Problem p{};
    p.m = c_.m;
    p.n = c_.n;
    p.k = c_.k;
    p.bits = c_.bits;
    p.group_size = group_;
    p.groups = groups_;
    p.type = c_.dtype;
    p.scale_type = c_.scale_dtype;
    p.x = x_;
    p.codes = qweight_[copy];
    p.scales = scales_[copy];
    p.zeros = qzeros_[copy];
    p.bias = static_cast<const float*>(bias_);
    p.y = y_;
    return p;
  }

  size_t bytes() const {
    return weight_bytes_ + parameters_ * (c_.scale_dtype == Dtype::kF32 ? 5 : 3) +
           size_t(c_.m) * (c_.k + c_.n) * 2;
  }

  // Products that may run at the same time have one each.
  void* workspace() const { return workspace_; }

  void poison() { CHECK(cudaMemset(y_, 0xff, size_t(c_.m) * c_.n * 2)); }

  std::vector<uint16_t> output() const {
    std::vector<uint16_t> y(size_t(c_.m) * c_.n);
    CHECK(cudaMemcpy(y.data(), y_, y.size() * 2, cudaMemcpyDeviceToHost));
    return y;
  }

  // Relative Frobenius error of the sampled rows; the float64 result is computed once.
  double error() {
    if (reference_.empty()) {
      const int count = std::min(c_.m, 64);
      for (int i = 0; i < count; ++i) rows_.push_back(int(int64_t(i) * c_.m / count));
      rows_.back() = c_.m - 1;
      float* w = static_cast<float*>(allocate(size_t(c_.n) * c_.k * 4));
      int* rows = static_cast<int*>(allocate(count * 4));
      double* y = static_cast<double*>(allocate(size_t(count) * c_.n * 8));
      CHECK(cudaMemcpy(rows, rows_.data(), count * 4, cudaMemcpyHostToDevice));
      const Layout layout{c_.bits, k_tiles_, groups_, group_};
      dequantize_reference<<<dim3(ceil_div(c_.n, 128), c_.k), 128>>>(
          w, static_cast<uint8_t*>(qweight_[0]), scales_[0], c_.scale_dtype,
          static_cast<uint8_t*>(qzeros_[0]), layout, c_.n, c_.k);
      multiply_reference<<<dim3(ceil_div(c_.n, 128), count), 128>>>(y, x_, c_.dtype, w, bias_,
                                                                    Dtype::kF32, rows, c_.n, c_.k);
      reference_.resize(size_t(count) * c_.n);
      CHECK(cudaMemcpy(reference_.data(), y, reference_.size() * 8, cudaMemcpyDeviceToHost));
    }
    const std::vector<uint16_t> y = output();
    double difference = 0, norm = 0;
    for (size_t r = 0; r < rows_.size(); ++r) {
      for (int n = 0; n < c_.n; ++n) {
        const double expected = reference_[r * c_.n + n];
        const double found = get(y.data(), size_t(rows_[r]) * c_.n + n, c_.dtype);
        difference += (found - expected) * (found - expected);
        norm += expected * expected;
      }
    }
    return std::sqrt(difference / norm);
  }

  bool unwritten() const {
    for (uint16_t v : output()) {
      if (v == 0xffff) return true;
    }
    return false;
  }

 private:
  void* allocate(size_t bytes) {
    void* p;
    CHECK(cudaMalloc(&p, std::max<size_t>(bytes, 256)));
    CHECK(cudaMemset(p, 0xff, std::max<size_t>(bytes, 256)));
    all_.push_back(p);
    return p;
  }

  Case c_;
  int k_tiles_, n_tiles_, group_, groups_;
  size_t weight_bytes_, parameters_;
  std::vector<void*> all_, qweight_, scales_, qzeros_;
  void *x_ = nullptr, *y_ = nullptr, *bias_ = nullptr, *workspace_ = nullptr;
  std::vector<int> rows_;
  std::vector<double> reference_;
};

int rotating_copies(const Case& c) {
  const size_t bytes = size_t(ceil_div(c.n, 64)) * ceil_div(c.k, 64) * 512 * c.bits;
  return int((size_t(256) << 20) / bytes) + 1;
}

// ---- Timing ----------------------------------------------------------------------------------

// Microseconds of one launch: a graph of `launches` calls, replayed; the median of the replays.
double time_graph(int launches, const std::function<cudaError_t(int, cudaStream_t)>& launch,
                  double seconds = 0.03) {
  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream));
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < launches; ++i) {
    const cudaError_t error = launch(i, stream);
    if (error != cudaSuccess) {
      cudaStreamEndCapture(stream, &graph);
      cudaGetLastError();
      return -1;
    }
  }
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&executable, graph, 0));
  cudaEvent_t start, stop;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&stop));
  CHECK(cudaGraphLaunch(executable, stream));
  CHECK(cudaStreamSynchronize(stream));
  std::vector<double> times;
  double total = 0;
  while (times.size() < 5 || (total < seconds * 1e6 && times.size() < 200)) {
    CHECK(cudaEventRecord(start, stream));
    CHECK(cudaGraphLaunch(executable, stream));
    CHECK(cudaEventRecord(stop, stream));
    CHECK(cudaEventSynchronize(stop));
    float ms;
    CHECK(cudaEventElapsedTime(&ms, start, stop));
    times.push_back(ms * 1e3 / launches);
    total += ms * 1e3;
  }
  CHECK(cudaEventDestroy(start));
  CHECK(cudaEventDestroy(stop));
  CHECK(cudaGraphExecDestroy(executable));
  CHECK(cudaGraphDestroy(graph));
  CHECK(cudaStreamDestroy(stream));
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

// ---- Every plan of a problem -----------------------------------------------------------------

struct Variant {
  std::string name;
  std::function<cudaError_t(const Problem&, void* workspace, cudaStream_t)> launch;
};

std::string format(const char* pattern, int a, int b, int c = 0, int d = 0) {
  char text[80];
  std::snprintf(text, sizeof text, pattern, a, b, c, d);
  return text;
}

Device device() { return {90, multiprocessors(), kSharedBytes}; }

// What the op takes.
Variant chosen(const Problem& problem) {
  const Plan plan = make_plan(problem, device());
  const auto launch = [=](const Problem& p, void* workspace, cudaStream_t stream) {
    return launch_matmul(p, plan, workspace, stream);
  };
  switch (plan.kernel) {
    case Kernel::kDecode:
      return {format("chosen: decode splits %d grid %d", plan.splits, plan.grid), launch};
    case Kernel::kWgmma: {
      const WgmmaPlan w = wgmma_plan(problem, device());
      return {
          format("chosen: n%d m%d cols %d shares %d", w.block_n, w.block_m, w.columns, w.shares),
          launch};
    }
    default:
      return {"chosen: mma", launch};
  }
}

std::vector<Variant> variants(const Problem& problem) {
  std::vector<Variant> result = {chosen(problem)};
  if (problem.m <= kDecodeRows) {
    for (int splits : {1, 2, 4, 8}) {
      if (splits > ceil_div(problem.k, kUnitK)) continue;
      const int strips = decode_strips(problem);
      const int groups = decode_groups(problem, device(), splits,
                                       multiprocessors() * (splits > 2 ? 10 : 11) / 11 / splits);
      const DecodeShared shared(problem, splits, ceil_div(strips, groups), splits > 1,
                                kSharedBytes);
      if (shared.slots == 0) continue;
      Plan plan;
      plan.device = device();
      plan.kernel = Kernel::kDecode;
      plan.reduction = splits == 1 ? Reduction::kNone : Reduction::kCluster;
      plan.splits = splits;
      plan.grid = groups * splits;
      plan.shared_bytes = shared.size;
      result.push_back({format("decode splits %d grid %d", splits, plan.grid),
                        [=](const Problem& p, void* workspace, cudaStream_t stream) {
                          return launch_matmul(p, plan, workspace, stream);
                        }});
    }
    if (problem.m <= 4) return result;
  }
  for (int block_m : {16, 32, 64, 128, 256}) {
    if (problem.m <= block_m / 2 && block_m > 32) continue;
    if (problem.m > 2 * block_m && block_m == 16) continue;
    if (problem.m > 4 * block_m && block_m < 128) continue;
    for (int block_n : {128, 256}) {
      if (block_n == 256 ? block_m > 64 : block_m == 16) continue;
      for (int columns : {1, 2}) {
        WgmmaPlan plan{block_n, block_m, columns};
        const int works = wgmma_works(problem, plan);
        const int resident = wgmma_resident_clusters(columns, multiprocessors());
        // Whole tiles, up to eight parts of each, and as many shares as are resident.
        std::vector<int> shares = {0};
        for (int parts = 2; parts <= 8; ++parts) shares.push_back(parts * works);
        shares.push_back(resident);
        for (const int wanted : shares) {
          plan.shares = wanted;
          if (wanted > resident) continue;
          plan.clusters = wgmma_clusters(problem, plan, multiprocessors());
          if (plan.shares > 0 && plan.clusters < plan.shares) continue;
          result.push_back(
              {format("n%d m%d cols %d shares %d", block_n, block_m, columns, plan.shares),
               [=](const Problem& p, void* workspace, cudaStream_t stream) {
                 return launch_wgmma(p, plan, workspace, stream);
               }});
        }
      }
    }
  }
  return result;
}

// ---- Commands --------------------------------------------------------------------------------

double limit(Dtype dtype) { return dtype == Dtype::kBf16 ? 5e-3 : 6e-4; }

bool check_case(const Case& c, const Variant& variant, Buffers& buffers, int runs) {
  const Problem problem = buffers.problem();
  buffers.poison();
  cudaError_t error = variant.launch(problem, buffers.workspace(), nullptr);
  if (error == cudaSuccess) error = cudaDeviceSynchronize();
  const char* verdict = "ok";
  double relative = NAN;
  if (error == cudaErrorInvalidConfiguration) {
    cudaGetLastError();
    return true;
  }
  if (error != cudaSuccess) {
    std::printf("FAIL %s: %s\n", variant.name.c_str(), cudaGetErrorString(error));
    std::exit(1);
  }
  relative = buffers.error();
  if (!(relative < (c.exact ? 4e-3 : limit(c.dtype)))) verdict = "FAIL error";
  if (buffers.unwritten()) verdict = "FAIL unwritten";
  const std::vector<uint16_t> first = buffers.output();
  for (int run = 1; run < runs; ++run) {
    buffers.poison();
    CHECK(variant.launch(problem, buffers.workspace(), nullptr));
    if (buffers.output() != first) {
      verdict = "FAIL changes between runs";
      break;
    }
  }
  const bool ok = verdict[0] == 'o';
  if (!ok) {
    std::printf("%s: m %d n %d k %d bits %d group %d dtype %d scale %d bias %d %s error %.2e\n",
                verdict, c.m, c.n, c.k, c.bits, c.group_size, int(c.dtype), int(c.scale_dtype),
                c.bias, variant.name.c_str(), relative);
  }
  return ok;
}

int check(int runs) {
  int cases = 0, failed = 0;
  auto run_case = [&](const Case& c, int repeats) {
    Buffers buffers(c);
    for (const Variant& variant : variants(buffers.problem())) {
      ++cases;
      failed += !check_case(c, variant, buffers, repeats);
    }
  };
  // First, the plainest case; if it fails, the rest tells nothing more.
  run_case({64, 512, 512}, 2);
  if (failed) return 1;
  const Dtype types[] = {Dtype::kF16, Dtype::kBf16, Dtype::kF32};
  int turn = 0;
  for (int bits : {4, 8}) {
    for (int group : {128, 64, 32, 16, 48, 96, 256, -1}) {
      for (Dtype dtype : {Dtype::kBf16, Dtype::kF16}) {
        Case c{17 + 29 * (turn % 6), 0, 0, bits, group, dtype, types[turn % 3], turn % 2 == 0};
        c.n = 64 * (1 + turn % 9) + (turn % 3) * 21 - 1;
        c.k = 64 * (3 + turn % 7) + (turn % 4) * 8;
        run_case(c, 2);
        c.m = 1 + turn % 16;
        run_case(c, 2);
        ++turn;
      }
    }
  }
  for (int m : {1, 2, 3, 8, 9, 16}) run_case({m, 1000, 1048}, 2);
  for (int m : {1, 2, 4, 8, 16}) run_case({m, 4096, 4096}, runs);
  for (int m : {17, 33, 64, 100, 128, 129, 257, 300}) run_case({m, 1000, 1048}, 2);
  run_case({64, 4096, 4096}, runs);
  for (int m : {16, 64, 256}) {
    run_case({m, 4096, 4096, 4, 128, Dtype::kBf16, Dtype::kF16}, runs);
  }
  run_case({5, 1000, 16392}, runs);
  run_case({256, 4096, 4096}, runs);
  run_case({1000, 4096, 4096}, 5);
  std::printf("check: %d cases, %d failed\n", cases, failed);
  return failed != 0;
}

int small() {
  int failed = 0;
  for (const Case& c :
       {Case{17, 200, 136}, Case{64, 320, 640, 4, 64}, Case{100, 257, 264, 4, 32},
        Case{33, 192, 256, 8, 128}, Case{300, 384, 512}, Case{1, 200, 136},
        Case{2, 320, 640, 4, 64}, Case{1, 257, 264, 8, 32}, Case{7, 257, 264},
        Case{16, 192, 1024, 8, 64}, Case{4, 320, 640, 4, 64}, Case{3, 257, 264, 8, 32},
        Case{9, 300, 1304, 4, 128, Dtype::kBf16, Dtype::kF16},
        Case{40, 300, 1304, 4, 128, Dtype::kBf16, Dtype::kF16},
        Case{70, 300, 1304, 4, 128, Dtype::kBf16, Dtype::kF16}}) {
    Buffers buffers(c);
    for (const Variant& variant : variants(buffers.problem())) {
      failed += !check_case(c, variant, buffers, 1);
    }
  }
  std::printf("small: %d failed\n", failed);
  return failed != 0;
}

// Two products again and again on two streams, with the plans that the op takes.
int streams(int first_m, int second_m) {
  int failed = 0;
  Buffers first({first_m, 4096, 4096}), second({second_m, 1024, 4096});
  std::vector<std::vector<uint16_t>> alone;
  const auto launch = [&](const Buffers& buffers, cudaStream_t stream) {
    const Problem problem = buffers.problem();
    CHECK(chosen(problem).launch(problem, buffers.workspace(), stream));
  };
  cudaStream_t one, two;
  CHECK(cudaStreamCreate(&one));
  CHECK(cudaStreamCreate(&two));
  for (Buffers* buffers : {&first, &second}) {
    launch(*buffers, one);
    CHECK(cudaDeviceSynchronize());
    alone.push_back(buffers->output());
    buffers->poison();
  }
  for (int round = 0; round < 50; ++round) {
    for (int i = 0; i < 10; ++i) {
      launch(first, one);
      launch(second, two);
    }
    CHECK(cudaDeviceSynchronize());
    failed += first.output() != alone[0] || second.output() != alone[1];
  }
  std::printf("streams, %d and %d rows: %d of 50 rounds differ\n", first_m, second_m, failed);
  return failed != 0;
}

void tune(Case c) {
  c.copies = c.m > 1024 ? 3 : rotating_copies(c);
  Buffers buffers(c);
  std::vector<std::pair<double, std::string>> results;
  for (const Variant& variant : variants(buffers.problem())) {
    buffers.poison();
    if (variant.launch(buffers.problem(), buffers.workspace(), nullptr) != cudaSuccess) {
      cudaGetLastError();
      continue;
    }
    CHECK(cudaDeviceSynchronize());
    const double error = buffers.error();
    if (!(error < limit(c.dtype))) std::printf("FAIL %s error %.2e\n", variant.name.c_str(), error);
    const double us = time_graph(
        c.copies,
        [&](int i, cudaStream_t stream) {
          return variant.launch(buffers.problem(i), buffers.workspace(), stream);
        },
        0.01);
    if (us > 0) results.push_back({us, variant.name});
  }
  std::sort(results.begin(), results.end(),
            [](const auto& a, const auto& b) { return a.first < b.first; });
  std::printf("m %d n %d k %d scale %d bits %d group %d\n", c.m, c.n, c.k, int(c.scale_dtype),
              c.bits, c.group_size);
  for (size_t i = 0; i < results.size(); ++i) {
    if (i >= 5 && results[i].second.compare(0, 6, "chosen") != 0) continue;
    std::printf("  %8.2f us %6.0f GB/s %6.1f TFLOP/s  %s\n", results[i].first,
                buffers.bytes() / results[i].first * 1e-3,
                2e-6 * c.m * c.n * c.k / results[i].first, results[i].second.c_str());
  }
}

__global__ void empty_kernel() {}

__global__ void read_kernel(const uint4* data, size_t count, uint32_t* sink) {
  uint32_t sum = 0;
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < count;
       i += size_t(gridDim.x) * blockDim.x) {
    const uint4 v = __ldcs(data + i);
    sum ^= v.x ^ v.y ^ v.z ^ v.w;
  }
  if (sum == 0x12345678) *sink = sum;
}

void ceilings() {
  cudaDeviceProp properties;
  CHECK(cudaGetDeviceProperties(&properties, 0));
  int driver, runtime;
  CHECK(cudaDriverGetVersion(&driver));
  CHECK(cudaRuntimeGetVersion(&runtime));
  std::printf("%s, %d SMs, L2 %d MB, driver API %d, runtime %d\n", properties.name,
              properties.multiProcessorCount, properties.l2CacheSize >> 20, driver, runtime);
  const size_t bytes = size_t(4) << 30;
  void *a, *b;
  CHECK(cudaMalloc(&a, bytes));
  CHECK(cudaMalloc(&b, bytes));
  fill_bits<<<1024, 256>>>(static_cast<uint32_t*>(a), bytes / 4, 1);
  CHECK(cudaDeviceSynchronize());
  double us = time_graph(2, [&](int, cudaStream_t s) {
    return cudaMemcpyAsync(b, a, bytes, cudaMemcpyDeviceToDevice, s);
  });
  std::printf("copy %.0f GB/s (read plus written)\n", 2e-3 * bytes / us);
  for (size_t size : {bytes, size_t(121) << 20, size_t(30) << 20, size_t(8) << 20}) {
    const int launches = std::max<int>(2, int((size_t(512) << 20) / size));
    us = time_graph(launches, [&](int i, cudaStream_t s) {
      const uint4* at = static_cast<const uint4*>(a) + (size == bytes ? 0 : i * (size / 16));
      read_kernel<<<multiprocessors() * 8, 256, 0, s>>>(at, size / 16, static_cast<uint32_t*>(b));
      return cudaGetLastError();
    });
    std::printf("read %zu MB: %.2f us, %.0f GB/s\n", size >> 20, us, 1e-3 * size / us);
  }
  us = time_graph(1000, [&](int, cudaStream_t s) {
    empty_kernel<<<132, 128, 0, s>>>();
    return cudaGetLastError();
  });
  std::printf("empty graph node: %.2f us\n", us);
  CHECK(cudaFree(a));
  CHECK(cudaFree(b));
}

}  // namespace

int main(int argc, char** argv) {
  const std::string command = argc > 1 ? argv[1] : "";
  if (command == "check") return check(argc > 2 ? std::atoi(argv[2]) : 100);
  if (command == "small") return small();
  if (command == "streams") return streams(64, 200) + streams(1, 16);
  if (command == "ceilings") {
    ceilings();
    return 0;
  }
  if (command == "tune" && argc >= 5) {
    Case c{std::atoi(argv[2]), std::atoi(argv[3]), std::atoi(argv[4])};
    const std::string scales = argc > 5 ? argv[5] : "bf16";
    c.scale_dtype = scales == "f16" ? Dtype::kF16 : scales == "f32" ? Dtype::kF32 : Dtype::kBf16;
    if (argc > 6) c.bits = std::atoi(argv[6]);
    if (argc > 7) c.group_size = std::atoi(argv[7]);
    const bool known = scales == "bf16" || c.scale_dtype != Dtype::kBf16;
    if (!known || (c.bits != 4 && c.bits != 8)) {
      std::fprintf(stderr, "tune: SCALES are bf16, f16 or f32, BITS 4 or 8\n");
      return 2;
    }
    tune(c);
    return 0;
  }
  std::fprintf(
      stderr,
      "usage: harness check | small | streams | ceilings | tune M N K [SCALES BITS GROUP]\n");
  return 2;
}
