// Products of the warpgroup tensor cores that are under way.
//
// Nothing is computed before its wait: left operands are then read from the registers (so that
// writing over them too early shows), right operands from shared memory as the descriptor says.
// Until then the accumulators hold NaN.
//
// Emulated: descriptors with 128-byte swizzle and K-major rows, left operands from registers, f32
// accumulators, in-order groups. Not covered: that the four warps of a warpgroup issue in step
// (each warp computes its own 16 of the 64 rows), other layouts, setmaxnreg, and the rounding
// inside of the tensor cores, which add up in another order and with fewer bits than f32.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace jax_gptq::emulator {

// d[16 x n] += a[16 x 16] b[n x 16]^T of one warp, or = where it does not accumulate.
struct AsyncProduct {
  int n;
  bool bf16, accumulate;
  uint64_t b;  // descriptor
  std::array<const uint32_t*, 32> a;
  std::array<float*, 32> d;
};

// The products of one warp. Functions return what is wrong, or nothing.
class AsyncProducts {
 public:
  // The 16 checked bytes at an address of shared memory, for row `row` of the right operand.
  using Read = std::function<const uint16_t*(int row, uint32_t address)>;

  void fence() { fenced_ = true; }
  std::string issue(const AsyncProduct& product);
  void commit();
  std::string wait(size_t pending, const Read& read);

 private:
  void multiply(const AsyncProduct& product, const Read& read);

  bool fenced_ = false;  // since the last commit
  std::vector<AsyncProduct> open_;
  std::deque<std::vector<AsyncProduct>> groups_;
  // Accumulators under way, [32][n / 2], by the address of lane 0's.
  struct Sums {
    AsyncProduct product;
    std::vector<float> values;
  };
  std::map<const float*, Sums> sums_;
};

}  // namespace jax_gptq::emulator
