#!/bin/sh
# Builds the package on a machine with an NVIDIA GPU, tests it there, then runs the benchmarks.
# Needs nvcc, CMake, ninja, nanobind and scikit-build-core; fetches nothing.
#
#   sh benchmarks/gpu_check.sh [architectures, e.g. 90a; default: all]
set -e
cd "$(dirname "$0")/.."
arch=${1:+-C cmake.define.JAX_GPTQ_CUDA_ARCHITECTURES=$1}
python3 -m pip install --no-build-isolation --no-deps -C cmake.define.JAX_GPTQ_CUDA=ON $arch .
# From outside the source tree, so that the installed package is the one that is tested.
root=$PWD
pytest="python3 -m pytest -q -p no:benchmark -c $root/pyproject.toml --rootdir $root"
# The kernels on the GPU; then the rest of the suite, whose tolerances are the host's, on the host.
(cd / && $pytest "$root/tests/test_cuda_gpu.py")
(cd / && JAX_PLATFORMS=cpu $pytest "$root/tests")
python3 benchmarks/gpu_matmul.py
python3 benchmarks/gpu_decode.py
