#!/bin/sh
# The tests of the native kernels on a build whose tiles of AMX are emulated: native/tests/soft_tiles.sh [pytest arguments]
# For a processor with AVX-512; without bf16 products those and VNNI are emulated, too. PYTHON, BUILD, SANITIZE: see build_and_test.sh.
set -eu
. "$(dirname "$0")/build_and_test.sh"
LINESHAFT_ISA=amx
export LINESHAFT_ISA
products=ON
if grep -qw avx512_bf16 /proc/cpuinfo; then products=OFF; fi
build_and_test "-DLINESHAFT_SOFT_TILES=ON -DLINESHAFT_SOFT_PRODUCTS=$products" tests/ops/test_native.py tests/ops/test_native_bits.py \
    tests/ops/test_native_experts.py tests/ops/test_native_indexer.py tests/ops/test_native_neighbours.py tests/ops/test_native_tiles.py tests/ops/test_packing.py "$@"
