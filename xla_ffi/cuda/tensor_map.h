// What a tensor map of the copy engine says, in plain words: the device encodes it as a
// CUtensorMap, the emulator reads it as it is.
#pragma once

#include <cstdint>

#include "layout.h"

namespace jax_gptq::cuda {

// A box is copied at once; what lies outside of the tensor is read as zero and not written.
struct MapDescription {
  const void* base;
  Dtype float_type;  // of elements of 2 and 4 bytes; those of 1 and 8 bytes are integers
  int element_bytes;
  int rank;            // 2 or 3
  int64_t sizes[3];    // in elements, from the innermost dimension on
  int64_t strides[2];  // in bytes, of the dimensions after the innermost
  int box[3];          // in elements
  bool swizzle;        // the 16-byte chunk c of the r-th 128-byte row lies at c ^ (r % 8)
};

}  // namespace jax_gptq::cuda
