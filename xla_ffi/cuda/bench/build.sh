#!/bin/sh
# Builds the harness for sm_90a: sh build.sh OUT
set -e
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
for source in "$here"/../*.cu "$here"/../plan.cc "$here"/../wgmma_plan.cc "$here"/harness.cu; do
  nvcc -std=c++17 -O3 --expt-relaxed-constexpr -gencode arch=compute_90a,code=sm_90a \
    -c "$source" -o "$work/$(basename "$source").o" &
done
wait
nvcc -gencode arch=compute_90a,code=sm_90a "$work"/*.o -o "$1"
rm -r "$work"
