// The XLA FFI handler `jax_gptq.cpu.table_logits.v1`: checks shapes and spreads the table's rows.
#include <algorithm>
#include <string>

#include "handler.h"
#include "kernels.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace jax_gptq::cpu {
namespace {

namespace ffi = xla::ffi;

// Rows of the table per parallel task.
constexpr int64_t kTableRows = 256;

ffi::Error Logits(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer table,
                  ffi::Result<ffi::Buffer<ffi::F32>> y) {
  const auto x_dims = x.dimensions(), table_dims = table.dimensions(), y_dims = y->dimensions();
  if (x_dims.size() != 2 || table_dims.size() != 2 || y_dims.size() != 2 ||
      x_dims[0] != y_dims[0] || x_dims[1] != table_dims[1] || y_dims[1] != table_dims[0]) {
    return ffi::Error::InvalidArgument(
        "jax_gptq.cpu.table_logits.v1: x [M, K], table [N, K] and y [M, N] are expected");
  }
  TableProblem problem{};
  if (!ToFloat(table.element_type(), &problem.table_type) || problem.table_type == Float::kF32) {
    return ffi::Error::InvalidArgument(
        "jax_gptq.cpu.table_logits.v1: the table must be bf16 or f16");
  }
  problem.x = x.typed_data();
  problem.table = table.untyped_data();
  problem.y = y->typed_data();
  problem.rows = x_dims[0];
  problem.columns = table_dims[0];
  problem.k = x_dims[1];
  const Kernel& kernel = CurrentKernel();
  const int64_t tasks = (problem.columns + kTableRows - 1) / kTableRows;
  ParallelFor(
      pool.num_threads(), [&](auto task) { pool.Schedule(std::move(task)); }, tasks,
      [&](int64_t i) {
        kernel.table_logits(problem, i * kTableRows,
                            std::min((i + 1) * kTableRows, problem.columns));
      });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jax_gptq::cpu

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxGptqCpuTableLogits, jax_gptq::cpu::Logits,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());
