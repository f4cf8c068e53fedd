// The XLA FFI handler `jax_gptq.cpu.table_logits.v1`: checks shapes and spreads the table's rows.
#include <algorithm>
#include <string>

#include "handler.h"
#include "parallel.h"
#include "table.h"
#include "xla/ffi/api/ffi.h"

namespace jax_gptq::cpu {
namespace {

namespace ffi = xla::ffi;

ffi::Error Logits(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::BF16> table,
                  ffi::Result<ffi::Buffer<ffi::F32>> y) {
  const auto x_dims = x.dimensions(), table_dims = table.dimensions(), y_dims = y->dimensions();
  if (x_dims.size() != 2 || table_dims.size() != 2 || y_dims.size() != 2 ||
      x_dims[0] != y_dims[0] || x_dims[1] != table_dims[1] || y_dims[1] != table_dims[0]) {
    return ffi::Error::InvalidArgument(
        "jax_gptq.cpu.table_logits.v1: x [M, K], table [N, K] and y [M, N] are expected");
  }
  const TableProblem problem{
      x.typed_data(),  reinterpret_cast<const uint16_t*>(table.untyped_data()),
      y->typed_data(), x_dims[0],
      table_dims[0],   x_dims[1]};
  const int64_t tasks = (problem.columns + kTableRows - 1) / kTableRows;
  ParallelFor(
      pool.num_threads(), [&](auto task) { pool.Schedule(std::move(task)); }, tasks,
      [&](int64_t i) {
        TableLogits(problem, i * kTableRows, std::min((i + 1) * kTableRows, problem.columns));
      });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jax_gptq::cpu

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxGptqCpuTableLogits, jax_gptq::cpu::Logits,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());
