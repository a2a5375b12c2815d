#!/bin/sh
# The tests of the native kernels on a build with the address and undefined-behaviour sanitizers: native/tests/sanitize.sh [pytest arguments]
# PYTHON, BUILD: see build_and_test.sh.
set -eu
. "$(dirname "$0")/build_and_test.sh"
SANITIZE=1
build_and_test "" tests/ops/test_native.py tests/ops/test_native_bits.py tests/ops/test_native_indexer.py tests/ops/test_native_neighbours.py tests/ops/test_packing.py tests/ops/test_recording.py tests/ops/test_sampling.py "$@"
