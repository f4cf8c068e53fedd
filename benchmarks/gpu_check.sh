#!/bin/sh
# Builds the package on a machine with an NVIDIA GPU, runs the test suite on it, then the benchmarks.
# Needs nvcc, CMake, ninja, nanobind and scikit-build-core; fetches nothing.
#
#   sh benchmarks/gpu_check.sh [architectures, e.g. 90a; default: all]
set -e
cd "$(dirname "$0")/.."
arch=${1:+-C cmake.define.JAX_GPTQ_CUDA_ARCHITECTURES=$1}
python3 -m pip install --no-build-isolation --no-deps -C cmake.define.JAX_GPTQ_CUDA=ON $arch .
# From outside the source tree, so that the installed package is the one that is tested.
tests=$PWD/tests
(cd /; python3 -m pytest -q -c "$tests/../pyproject.toml" --rootdir "$tests/.." "$tests")
python3 benchmarks/gpu_matmul.py
python3 benchmarks/gpu_decode.py
