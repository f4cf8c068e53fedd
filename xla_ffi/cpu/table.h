// Logits of a few rows against a bfloat16 table: y = x W^T, where W is stored row by row.
//
// XLA widens a whole bfloat16 operand to float32 in memory before its dot; an output head is read
// once per token, so this reads it as it lies and is bound by memory.
#pragma once

#include <cstdint>

namespace jax_gptq::cpu {

struct TableProblem {
  const float* x;         // [rows, k]
  const uint16_t* table;  // [columns, k], bfloat16
  float* y;               // [rows, columns]
  int64_t rows, columns, k;
};

// Rows of the table per parallel task.
constexpr int64_t kTableRows = 256;

// Computes y[:, begin:end]. An output depends on its own row of x and of the table only.
void TableLogits(const TableProblem& problem, int64_t begin, int64_t end);

}  // namespace jax_gptq::cpu
