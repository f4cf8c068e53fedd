#!/bin/sh
# Builds the package on a machine with an NVIDIA GPU, tests it there, then runs the benchmarks.
# Needs nvcc, CMake, ninja, nanobind and scikit-build-core; fetches nothing.
#
#   sh benchmarks/gpu_check.sh [architectures, e.g. 90a; default: all]
set -e
cd "$(dirname "$0")/.."
arch=${1:+-C cmake.define.JAX_GPTQ_CUDA_ARCHITECTURES=$1}
python3 -m pip install --no-build-isolation --no-deps -C cmake.define.JAX_GPTQ_CUDA=ON $arch .
# The whole suite with the GPU as default device (tests marked `host` run on the CPU), from outside
# the source tree, so that the installed package is the one that is tested.
root=$PWD
if python3 -c "import xdist" 2>/dev/null; then workers="-n $(($(nproc) * 3 / 4))"; fi
(cd / && XLA_PYTHON_CLIENT_PREALLOCATE=false python3 -m pytest -q -p no:benchmark ${workers:-} \
  -c "$root/pyproject.toml" --rootdir "$root" "$root/tests")
# The kernels without XLA: float64, poisoned outputs, bits from run to run, two streams; and under
# the sanitizer where there is one.
harness=$(mktemp)
sh xla_ffi/cuda/bench/build.sh "$harness"
"$harness" check 100
"$harness" streams
if command -v compute-sanitizer >/dev/null; then
  compute-sanitizer --tool memcheck --error-exitcode 1 "$harness" small
  compute-sanitizer --tool racecheck --error-exitcode 1 "$harness" small
fi
python3 benchmarks/gpu_matmul.py
python3 benchmarks/gpu_decode.py
