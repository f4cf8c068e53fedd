// Every kernel that this CPU can run against double precision, at odd shapes, in buffers of the
// exact size (AddressSanitizer watches their ends); and the parallel loop against an unhelpful
// pool.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../matmul.h"

namespace jax_gptq::cpu {
namespace {

int failures = 0;
int64_t checks = 0;

void Check(bool ok, const std::string& what) {
  ++checks;
  if (ok) return;
  ++failures;
  std::printf("FAILED: %s\n", what.c_str());
}

std::vector<const Kernel*> Kernels() {
  std::vector<const Kernel*> kernels = AvailableKernels();
#ifdef JAX_GPTQ_X86
  // Built here with AVX-512's encoding of vpdpbusd.
  if (kernels.front() == &kAvx512Vnni) kernels.insert(kernels.begin() + 1, &kAvxVnni);
#endif
  return kernels;
}

struct Case {
  int words, bits;
  int64_t rows, k, columns;
  std::vector<int32_t> starts;
  bool permuted;
  int digits;
};

// A problem with its buffers, and the answer in double precision.
struct Instance {
  explicit Instance(const Case& c, uint32_t seed) : random(seed), which(c) {
    const int64_t tile_count = (c.columns + kTileColumns - 1) / kTileColumns;
    const int64_t groups = static_cast<int64_t>(c.starts.size()) - 1;
    blocks = MakeBlocks(c.starts.data(), groups, c.digits == 1 ? 1 : kMaxBlockChunks);
    const int64_t chunks = blocks.back().chunk + blocks.back().chunks;
    tiles.resize(tile_count * chunks * c.words * kTileColumns);
    scales.resize(tile_count * groups * kTileColumns);
    zeros.resize(scales.size());
    x.resize(c.rows * c.k);
    y.assign(c.rows * c.columns, std::numeric_limits<float>::quiet_NaN());
    for (float& v : x) v = Normal(random);
    for (float& v : scales) v = 0.001f + 0.01f * Uniform(random);
    for (uint8_t& v : zeros) v = static_cast<uint8_t>(random() % (1u << c.bits));
    perm.resize(c.permuted ? c.k : 0);
    for (int64_t i = 0; i < static_cast<int64_t>(perm.size()); ++i) {
      perm[i] = static_cast<int32_t>((i * 7 + 3) % c.k);  // k is no multiple of 7
    }
    expected.assign(c.rows * c.columns, 0.0);
    bound.assign(c.rows * c.columns, 0.0);
    std::vector<double> largest(c.rows);
    for (const Block& block : blocks) {
      for (int64_t r = 0; r < c.rows; ++r) {
        largest[r] = 0;
        for (int32_t i = 0; i < block.rows; ++i) {
          largest[r] = std::fmax(largest[r], std::fabs(At(r, block.row + i)));
        }
      }
      for (int64_t n = 0; n < c.columns; ++n) {
        const int64_t group = (n / kTileColumns * groups + block.group) * kTileColumns + n % 32;
        for (int32_t i = 0; i < block.rows; ++i) {
          const int code = static_cast<int>(random() % (1u << c.bits));
          Store(n / kTileColumns * chunks + block.chunk + i / kChunkRows, i % kChunkRows,
                static_cast<int>(n % kTileColumns), static_cast<uint32_t>(code));
          const double w = double{scales[group]} * (code - zeros[group]);
          for (int64_t r = 0; r < c.rows; ++r) {
            expected[r * c.columns + n] += At(r, block.row + i) * w;
            bound[r * c.columns + n] += largest[r] * std::fabs(w);
          }
        }
      }
    }
    problem.x = x.data();
    problem.x_type = Float::kF32;
    problem.rows = c.rows;
    problem.k = c.k;
    problem.perm = c.permuted ? perm.data() : nullptr;
    problem.tiles = tiles.data();
    problem.words = c.words;
    problem.scales = scales.data();
    problem.scale_type = Float::kF32;
    problem.zeros = zeros.data();
    problem.chunks = chunks;
    problem.groups = groups;
    problem.columns = c.columns;
    problem.blocks = blocks.data();
    problem.block_count = static_cast<int64_t>(blocks.size());
    problem.y = y.data();
    problem.digits = c.digits;
  }

  double At(int64_t row, int64_t i) const {
    return x[row * which.k + (perm.empty() ? i : perm[i])];
  }

  // Puts one code where the layout of jax_gptq/stores/cpu.py has it.
  void Store(int64_t chunk, int row, int column, uint32_t code) {
    const int quad = row / 4, byte = row % 4;
    uint32_t* words = tiles.data() + chunk * which.words * kTileColumns + column;
    const auto put = [&](int word, int bit, uint32_t value) {
      words[word * kTileColumns] |= value << (8 * byte + bit);
    };
    if (which.words == 8) put(quad, 0, code);
    if (which.words == 4) put(quad / 2, 4 * (quad % 2), code);
    if (which.words < 4) put(quad / 4, 2 * (quad % 4), code & 3);
    if (which.words == 3) put(2, quad, code >> 2);
  }

  std::mt19937 random;
  std::normal_distribution<float> Normal;
  std::uniform_real_distribution<float> Uniform;
  Case which;
  std::vector<Block> blocks;
  std::vector<uint32_t> tiles;
  std::vector<float> scales, x, y;
  std::vector<uint8_t> zeros;
  std::vector<int32_t> perm;
  std::vector<double> expected, bound;
  Problem problem{};
};

void RunInline(const Kernel& kernel, const Problem& problem) {
  RunMatmul(kernel, problem, 1, [](auto) {});
}

void TestKernels() {
  std::vector<Case> cases;
  const std::vector<std::pair<int, int>> codes = {{2, 2}, {3, 3}, {4, 4}, {8, 5}, {8, 8}};
  for (auto [words, bits] : codes) {
    for (int digits : {1, 2, 3}) {
      cases.push_back({words, bits, 1, 320, 33, {0, 128, 256, 320}, false, digits});
      cases.push_back({words, bits, 3, 101, 31, {0, 40, 41, 41, 101}, true, digits});
      cases.push_back({words, bits, 7, 32, 64, {0, 32}, false, digits});
      cases.push_back({words, bits, 131, 300, 5, {0, 300}, true, digits});
      cases.push_back({words, bits, 31, 74, 33, {0, 32, 42, 74}, false, digits});
    }
  }
  uint32_t seed = 1;
  for (const Case& c : cases) {
    Instance instance(c, ++seed);
    std::vector<float> first;
    for (const Kernel* kernel : Kernels()) {
      const std::string what = std::string(kernel->name) + ", " + std::to_string(c.words) +
                               " words, " + std::to_string(c.digits) + " digits, " +
                               std::to_string(c.rows) + " x " + std::to_string(c.k) + " x " +
                               std::to_string(c.columns);
      RunInline(*kernel, instance.problem);
      const double unit = c.digits == 3 ? 0x1p-21 : c.digits == 2 ? 0x1p-13 : 0x1p-6;
      bool inside = true;
      for (size_t i = 0; i < instance.y.size(); ++i) {
        // Not <=: an output left as NaN must not pass.
        inside &= std::fabs(instance.y[i] - instance.expected[i]) <= unit * instance.bound[i];
      }
      Check(inside, "bound: " + what);
      if (first.empty()) first = instance.y;
      Check(std::memcmp(first.data(), instance.y.data(), first.size() * sizeof(float)) == 0,
            "same bits: " + what);
      std::fill(instance.y.begin(), instance.y.end(), std::numeric_limits<float>::quiet_NaN());
    }
  }
}

void TestF32Rows() {
  const float inf = std::numeric_limits<float>::infinity();
  for (const Kernel* kernel : Kernels()) {
    Instance instance({4, 4, 9, 256, 40, {0, 128, 256}, false, 3}, 99);
    std::vector<float>& x = instance.x;
    RunInline(*kernel, instance.problem);
    const std::vector<float> clean = instance.y;
    x[2 * 256 + 7] = std::numeric_limits<float>::quiet_NaN();
    x[3 * 256 + 9] = inf;
    for (int i = 0; i < 256; ++i) x[5 * 256 + i] = 1e-40f;
    x[8 * 256 + 1] = 1e9f;
    RunInline(*kernel, instance.problem);
    for (int64_t r = 0; r < 9; ++r) {
      const float* row = instance.y.data() + r * 40;
      const std::string what = std::string(kernel->name) + " row " + std::to_string(r);
      if (r == 2) {
        Check(std::isnan(row[0]) && std::isnan(row[39]), "NaN: " + what);
      } else if (r == 3) {
        Check(!std::isfinite(row[0]) && !std::isfinite(row[39]), "infinity: " + what);
      } else if (r == 5) {
        Check(std::fabs(row[0]) < 1e-37f, "denormals: " + what);
      } else if (r == 8) {
        Check(std::isfinite(row[0]) && row[0] != clean[8 * 40], "outlier: " + what);
      } else {
        Check(std::memcmp(row, clean.data() + r * 40, 160) == 0, "other rows: " + what);
      }
    }
  }
}

// The 16-bit types: exact on what they can hold, rounded to nearest even, specials kept.
void TestFloatTypes() {
  for (const Kernel* kernel : Kernels()) {
    for (Float type : {Float::kBF16, Float::kF16}) {
      // An identity weight copies x to y.
      Instance instance({8, 8, 1, 32, 32, {0, 32}, false, 3}, 5);
      std::fill(instance.tiles.begin(), instance.tiles.end(), 0u);
      std::fill(instance.zeros.begin(), instance.zeros.end(), uint8_t{0});
      std::fill(instance.scales.begin(), instance.scales.end(), 1.0f);
      for (int i = 0; i < 32; ++i) instance.Store(0, i, i, 1);
      std::vector<uint16_t> x(32), y(32, 0xffff);
      for (int i = 0; i < 32; ++i) {
        x[i] = static_cast<uint16_t>((type == Float::kBF16 ? 0x3f80 : 0x3c00) + 37 * i +
                                     (i % 2) * 0x8000);
      }
      instance.problem.x = x.data();
      instance.problem.y = y.data();
      instance.problem.x_type = type;
      RunInline(*kernel, instance.problem);
      Check(x == y, std::string(kernel->name) + ": 16-bit floats pass unchanged");
    }
  }
}

void TestParallelFor() {
  // A pool that does nothing until the loop is over: the caller does all, the tasks find nothing.
  std::vector<std::function<void()>> late;
  {
    std::vector<int> done(100, 0);
    ParallelFor(8, [&](auto task) { late.emplace_back(task); }, 100, [&](int64_t i) { ++done[i]; });
    Check(done == std::vector<int>(100, 1), "the caller finishes alone");
  }
  for (auto& task : late) task();
  Check(late.size() == 7, "late tasks run and touch nothing");

  // Threads that help: each index once.
  for (int round = 0; round < 50; ++round) {
    std::vector<std::thread> threads;
    std::vector<int> done(1000, 0);
    ParallelFor(
        4, [&](auto task) { threads.emplace_back(task); }, 1000, [&](int64_t i) { ++done[i]; });
    Check(done == std::vector<int>(1000, 1), "each index once");
    for (std::thread& thread : threads) thread.join();
  }
  ParallelFor(4, [](auto) {}, 0, [](int64_t) { std::abort(); });
}

void TestThreadsDoNotChangeBits() {
  Instance instance({4, 4, 70, 192, 200, {0, 96, 192}, false, 3}, 17);
  for (const Kernel* kernel : Kernels()) {
    RunInline(*kernel, instance.problem);
    const std::vector<float> alone = instance.y;
    std::vector<std::thread> threads;
    RunMatmul(*kernel, instance.problem, 3, [&](auto task) { threads.emplace_back(task); });
    Check(std::memcmp(alone.data(), instance.y.data(), alone.size() * sizeof(float)) == 0,
          std::string(kernel->name) + ": threads");
    for (std::thread& thread : threads) thread.join();
  }
}

}  // namespace
}  // namespace jax_gptq::cpu

int main() {
  using namespace jax_gptq::cpu;
  for (const Kernel* kernel : Kernels()) std::printf("kernel: %s\n", kernel->name);
  TestKernels();
  TestF32Rows();
  TestFloatTypes();
  TestParallelFor();
  TestThreadsDoNotChangeBits();
  std::printf("%lld checks, %d failed\n", static_cast<long long>(checks), failures);
  return failures == 0 ? 0 : 1;
}
