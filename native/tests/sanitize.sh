#!/bin/sh
# Builds the native kernels with the address and undefined-behaviour sanitizers in a temporary folder and runs their tests on them.
#   native/tests/sanitize.sh [pytest arguments]     PYTHON: with the package and its test extras; default .venv/bin/python
# BUILD: a folder that is kept, so that the next run compiles less.
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
if [ -z "${BUILD:-}" ]; then
    BUILD=$(mktemp -d)
    trap 'rm -rf "$BUILD"' EXIT
fi
cmake -S native -B "$BUILD" -DLINESHAFT_SANITIZE=ON -DPython_EXECUTABLE="$(command -v "$python")" \
    -Dnanobind_DIR="$("$python" -m nanobind --cmake_dir)" >"$BUILD/configure.log"
cmake --build "$BUILD" --parallel 2 >"$BUILD/build.log" 2>&1 || { cat "$BUILD/build.log"; exit 1; }
LINESHAFT_SANITIZED=$(ls "$BUILD"/_native*.so)
export LINESHAFT_SANITIZED
# The interpreter is not instrumented, so the sanitizer must be loaded first; what Python and torch keep until the end is no leak.
# libstdc++ comes along, because the sanitizer looks up the functions that throw when it starts.
LD_PRELOAD="$(${CXX:-g++} -print-file-name=libasan.so) $(${CXX:-g++} -print-file-name=libstdc++.so)" \
ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH="native/tests${PYTHONPATH:+:$PYTHONPATH}" \
    "$python" -m pytest -n0 -p sanitized tests/ops/test_native.py tests/ops/test_native_bits.py tests/ops/test_packing.py "$@"
