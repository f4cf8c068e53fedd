// The kernels, one per instruction set, and which of them runs.
#pragma once

#include <string>
#include <vector>

#include "problem.h"

namespace jax_gptq::cpu {

// One instruction set's implementation. All functions may run on several threads at once.
struct Kernel {
  const char* name;
  // From this many rows on, codes are widened to bytes once per block and `offset_digits` is set;
  // with one digit from half as many, because unpacking them is then more of the work.
  int widen_rows;
  // Fills the x_* buffers of one row.
  void (*quantize)(const Problem& problem, int64_t row);
  // Computes y[row_begin:row_end, columns of tile]; at most kMaxRows rows.
  void (*matmul)(const Problem& problem, int64_t tile, int64_t row_begin, int64_t row_end);
  // Computes y[:, begin:end] of a table's logits.
  void (*table_logits)(const TableProblem& problem, int64_t begin, int64_t end);
};

extern const Kernel kAvx512Vnni;
extern const Kernel kAvxVnni;
extern const Kernel kAvx2;
extern const Kernel kPortable;

// The kernels that this CPU can run, best first; "portable" is always the last.
std::vector<const Kernel*> AvailableKernels();

// The kernel in use: the best available one, unless a test chose another.
const Kernel& CurrentKernel();

// Chooses an available kernel by name; "" goes back to the best. False if there is none.
bool UseKernel(const std::string& name);

}  // namespace jax_gptq::cpu
