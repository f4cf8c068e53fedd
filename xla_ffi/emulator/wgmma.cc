#include "wgmma.h"

#include <algorithm>
#include <cmath>

#include "floats.h"

namespace jax_gptq::emulator {
namespace {

constexpr uint32_t kPoisonBits = 0xffffffffu;
constexpr uint64_t kLayout128B = 1;  // bits 62 and 63 of a descriptor

// Address of 16-byte chunk `chunk` of row `row`: rows of 128 bytes, atoms of 8 rows `stride` bytes
// apart, and the chunk's place in its row swizzled by address bits 7 to 9.
uint32_t chunk_address(uint64_t descriptor, int row, int chunk) {
  const uint32_t start = (descriptor & 0x3fff) << 4;
  const uint32_t stride = (descriptor >> 32 & 0x3fff) << 4;
  const uint32_t address = start + row / 8 * stride + row % 8 * 128 + chunk * 16;
  return address ^ (address >> 7 & 7) << 4;
}

}  // namespace

std::string AsyncProducts::issue(const AsyncProduct& product) {
  if (!fenced_) return "wgmma without wgmma.fence since the last group";
  if (product.b >> 62 != kLayout128B || (product.b >> 49 & 7) != 0) {
    return "wgmma with a descriptor that the emulator does not know";
  }
  const int count = product.n / 2;
  auto [found, is_new] = sums_.try_emplace(product.d[0], Sums{product, {}});
  if (is_new) {
    for (float* d : product.d) {
      found->second.values.insert(found->second.values.end(), d, d + count);
      std::fill_n(d, count, float_of(kPoisonBits));
    }
  } else if (found->second.product.n != product.n) {
    return "wgmma groups of different shapes share accumulators";
  }
  open_.push_back(product);
  return "";
}

void AsyncProducts::commit() {
  groups_.push_back(std::move(open_));
  open_.clear();
  fenced_ = false;
}

std::string AsyncProducts::wait(size_t pending, const Read& read) {
  if (!open_.empty()) return "wgmma.wait_group with products that are not committed";
  while (groups_.size() > pending) {
    for (const AsyncProduct& product : groups_.front()) multiply(product, read);
    groups_.pop_front();
  }
  for (auto it = sums_.begin(); it != sums_.end();) {
    const auto uses = [&](const AsyncProduct& product) { return product.d[0] == it->first; };
    const bool busy = std::any_of(groups_.begin(), groups_.end(), [&](const auto& group) {
      return std::any_of(group.begin(), group.end(), uses);
    });
    if (busy) {
      ++it;
      continue;
    }
    const AsyncProduct& product = it->second.product;
    const int count = product.n / 2;
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < count; ++i) {
        if (bits_of(product.d[lane][i]) != kPoisonBits) {
          return "wgmma accumulators were written while their products were under way";
        }
      }
      std::copy_n(&it->second.values[lane * count], count, product.d[lane]);
    }
    it = sums_.erase(it);
  }
  return "";
}

// Fragments as in the PTX ISA, "Matrix fragments for wgmma.mma_async.m64nNk16".
void AsyncProducts::multiply(const AsyncProduct& product, const Read& read) {
  const auto to_float = [&](uint16_t bits) {
    return product.bf16 ? bf16_to_float(bits) : f16_to_float(bits);
  };
  float left[16][16];
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      for (int high = 0; high < 2; ++high) {
        left[lane / 4 + i % 2 * 8][lane % 4 * 2 + i / 2 * 8 + high] =
            to_float(product.a[lane][i] >> 16 * high);
      }
    }
  }
  std::vector<float>& sums = sums_.at(product.d[0]).values;
  const int count = product.n / 2;
  for (int column = 0; column < product.n; ++column) {
    float right[16];
    for (int chunk = 0; chunk < 2; ++chunk) {
      const uint16_t* values = read(column, chunk_address(product.b, column, chunk));
      for (int k = 0; k < 8; ++k) right[chunk * 8 + k] = to_float(values[k]);
    }
    for (int row = 0; row < 16; ++row) {
      const int lane = row % 8 * 4 + column % 8 / 2;
      float& sum = sums[lane * count + column / 8 * 4 + row / 8 * 2 + column % 2];
      if (!product.accumulate) sum = 0;
      for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k];
    }
  }
}

}  // namespace jax_gptq::emulator
