#!/bin/sh
# Compile the library with its CUDA twin; needs nvcc, not a GPU. Usage: compile_cuda.sh [build dir]
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
build=${1:-"$here/../build/cuda"}
command -v nvcc >/dev/null || { echo "compile_cuda.sh: nvcc not found; install the CUDA toolkit" >&2; exit 2; }
cmake -S "$here" -B "$build" -DDIFFFORCE_CUDA=ON -DDIFFFORCE_WERROR=ON \
      -DCMAKE_CUDA_ARCHITECTURES="${CUDA_ARCHITECTURES:-90}"
cmake --build "$build"
echo "built $build/libdiffforce.so"
