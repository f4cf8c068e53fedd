// How fast one core reads memory, multiplies, and runs the kernel; CPU time, medians.
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../float_types.h"
#include "../matmul.h"

namespace jax_gptq::cpu {
namespace {

double Seconds() {
  timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

template <class Body>
double Median(int rounds, const Body& body) {
  std::vector<double> times;
  for (int i = 0; i < rounds; ++i) {
    const double begin = Seconds();
    body();
    times.push_back(Seconds() - begin);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

#ifdef JAX_GPTQ_X86
// Nanoseconds of one instruction on 16 lanes, of twelve independent ones in turn.
#define TWELVE(op)                                                     \
  op " %%zmm30, %%zmm31, %%zmm0\n" op " %%zmm30, %%zmm31, %%zmm1\n" op \
     " %%zmm30, %%zmm31, %%zmm2\n" op " %%zmm30, %%zmm31, %%zmm3\n" op \
     " %%zmm30, %%zmm31, %%zmm4\n" op " %%zmm30, %%zmm31, %%zmm5\n" op \
     " %%zmm30, %%zmm31, %%zmm6\n" op " %%zmm30, %%zmm31, %%zmm7\n" op \
     " %%zmm30, %%zmm31, %%zmm8\n" op " %%zmm30, %%zmm31, %%zmm9\n" op \
     " %%zmm30, %%zmm31, %%zmm10\n" op " %%zmm30, %%zmm31, %%zmm11\n"
#define TIME_INSTRUCTION(op, products)                                           \
  {                                                                              \
    const double seconds = Median(9, [] {                                        \
      for (int i = 0; i < 200000; ++i) asm volatile(TWELVE(op)::: "memory");     \
    });                                                                          \
    std::printf("%-12s %.3f ns, %.0f G products/s\n", op, seconds / 2.4e6 * 1e9, \
                products * 2.4e6 / seconds * 1e-9);                              \
  }

__attribute__((target("avx512f"))) void Instructions() {
  if (!__builtin_cpu_supports("avx512vnni") || !__builtin_cpu_supports("avx512bf16")) return;
  asm volatile("vpxord %%zmm30, %%zmm30, %%zmm30\nvpxord %%zmm31, %%zmm31, %%zmm31\n" ::: "memory");
  TIME_INSTRUCTION("vfmadd231ps", 16)  // f32
  TIME_INSTRUCTION("vdpbf16ps", 32)    // bfloat16
  TIME_INSTRUCTION("vpdpbusd", 64)     // of bytes: a third, half or all of it per digit
}
#else
void Instructions() {}
#endif

#ifdef JAX_GPTQ_X86
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
uint64_t Read(const char* memory, size_t bytes) {
  uint64_t parts[32] = {};
  for (size_t i = 0; i + sizeof(parts) <= bytes; i += sizeof(parts)) {
    for (int j = 0; j < 32; ++j) {
      uint64_t word;
      std::memcpy(&word, memory + i + 8 * j, 8);
      parts[j] |= word;
    }
  }
  uint64_t all = 0;
  for (uint64_t part : parts) all |= part;
  return all;
}

// Weights of 4 bits, group size 128, in more memory than the cache holds.
struct Weights {
  Weights(int64_t rows, int64_t columns, bool huge_pages) : k(rows), n(columns) {
    const int64_t tiles = (n + kTileColumns - 1) / kTileColumns;
    tile_bytes = static_cast<size_t>(tiles * (k / kChunkRows) * 4 * kTileColumns * 4);
    scale_bytes = static_cast<size_t>(tiles * (k / 128) * kTileColumns * 2);
    bytes = (tile_bytes + scale_bytes + scale_bytes / 2 + 4095) / 4096 * 4096;
    copies = std::max<size_t>(2, (size_t{192} << 20) / bytes);
    const size_t all = bytes * copies;
    memory = static_cast<char*>(
        mmap(nullptr, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (memory == MAP_FAILED) std::abort();
    madvise(memory, all, huge_pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    std::mt19937_64 random(1);
    for (size_t i = 0; i < all; i += 8) {
      const uint64_t word = random();
      std::memcpy(memory + i, &word, 8);
    }
    for (size_t c = 0; c < copies; ++c) {
      for (size_t i = 0; i < scale_bytes; i += 2) {
        const uint16_t scale = static_cast<uint16_t>(0x2000 + (random() & 1023));
        std::memcpy(memory + c * bytes + tile_bytes + i, &scale, 2);
      }
      std::memset(memory + c * bytes + tile_bytes + scale_bytes, 8, scale_bytes / 2);
    }
  }
  ~Weights() { munmap(memory, bytes * copies); }

  void Next(Problem* problem) {
    char* at = memory + turn++ % copies * bytes;
    problem->tiles = reinterpret_cast<const uint32_t*>(at);
    problem->scales = at + tile_bytes;
    problem->zeros = reinterpret_cast<const uint8_t*>(at + tile_bytes + scale_bytes);
  }

  int64_t k, n;
  size_t tile_bytes, scale_bytes, bytes, copies, turn = 0;
  char* memory;
};

void Layer(int64_t k, int64_t n, bool huge_pages) {
  Weights weights(k, n, huge_pages);
  std::vector<int32_t> starts;
  for (int64_t row = 0; row <= k; row += 128) starts.push_back(static_cast<int32_t>(row));
  std::printf("\n%lld x %lld, %s pages; ms (of the time to read the weight)\n",
              static_cast<long long>(k), static_cast<long long>(n), huge_pages ? "huge" : "small");
  for (int64_t rows : {1, 2, 4, 8, 16, 32, 64, 256}) {
    std::vector<float> x(static_cast<size_t>(rows * k)), y(static_cast<size_t>(rows * n));
    std::mt19937 random(static_cast<uint32_t>(rows));
    std::normal_distribution<float> normal;
    for (float& v : x) v = normal(random);
    const int calls = static_cast<int>(std::max<int64_t>(1, 16 / rows));
    uint64_t seen = 0;
    const double read =
        Median(9, [&] { seen |= Read(weights.memory, weights.bytes * weights.copies); }) /
        static_cast<double>(weights.copies);
    std::printf("%3lld rows: read %.3f%s", static_cast<long long>(rows), 1e3 * read,
                seen == 0 ? "?" : "");
    for (int digits : {3, 2, 1}) {
      const auto blocks = MakeBlocks(starts.data(), k / 128, digits == 1 ? 1 : kMaxBlockChunks);
      Problem problem{};
      problem.x = x.data();
      problem.x_type = Float::kF32;
      problem.rows = rows;
      problem.k = k;
      problem.words = 4;
      problem.scale_type = Float::kF16;
      problem.chunks = k / kChunkRows;
      problem.groups = k / 128;
      problem.columns = n;
      problem.blocks = blocks.data();
      problem.block_count = static_cast<int64_t>(blocks.size());
      problem.y = y.data();
      problem.digits = digits;
      const double seconds = Median(9,
                                    [&] {
                                      for (int i = 0; i < calls; ++i) {
                                        weights.Next(&problem);
                                        RunMatmul(CurrentKernel(), problem, 1, [](auto) {});
                                      }
                                    }) /
                             calls;
      std::printf("   %d digit%s %.3f (%.2f, %.0f G products/s)", digits, digits == 1 ? "" : "s",
                  1e3 * seconds, read / seconds,
                  static_cast<double>(rows * k * n * digits) / seconds * 1e-9);
    }
    std::printf("\n");
    std::fflush(stdout);
  }
}

}  // namespace
}  // namespace jax_gptq::cpu

int main(int count, char** arguments) {
  using namespace jax_gptq::cpu;
  const int64_t k = count > 2 ? std::atoll(arguments[1]) : 4096;
  const int64_t n = count > 2 ? std::atoll(arguments[2]) : 4096;
  std::printf("kernel: %s\n", CurrentKernel().name);
  Instructions();
  Layer(k, n, true);
  Layer(k, n, false);
}
