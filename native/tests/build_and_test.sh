# Builds the native kernels in a temporary folder and runs their tests on them; read by sanitize.sh and soft_tiles.sh.
#   build_and_test "cmake options" tests and pytest's arguments ...
# PYTHON: with the package and its test extras; default .venv/bin/python. BUILD: a folder that is kept, so that the next run compiles less.
# SANITIZE: not empty, to build with the address and undefined-behaviour sanitizers.
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
PATH="$(cd "$(dirname "$python")" && pwd):$PATH"  # cmake of the test extras
export PATH
if [ -z "${BUILD:-}" ]; then
    BUILD=$(mktemp -d)
    trap 'rm -rf "$BUILD"' EXIT
fi

build_and_test() {
    options=$1
    shift
    mkdir -p "$BUILD"
    # shellcheck disable=SC2086 # the options are words
    cmake -S native -B "$BUILD" $options ${SANITIZE:+-DLINESHAFT_SANITIZE=ON} -DPython_EXECUTABLE="$(command -v "$python")" \
        -Dnanobind_DIR="$("$python" -m nanobind --cmake_dir)" >"$BUILD/configure.log"
    cmake --build "$BUILD" --parallel 2 >"$BUILD/build.log" 2>&1 || { cat "$BUILD/build.log"; exit 1; }
    LINESHAFT_SANITIZED=$(ls "$BUILD"/_native*.so)
    PYTHONPATH="native/tests${PYTHONPATH:+:$PYTHONPATH}"
    export LINESHAFT_SANITIZED PYTHONPATH
    if [ -z "${SANITIZE:-}" ]; then
        "$python" -m pytest -p sanitized "$@"
        return
    fi
    # The interpreter is not instrumented, so the sanitizer must be loaded first; what Python and torch keep until the end is no leak.
    # libstdc++ comes along, because the sanitizer looks up the functions that throw when it starts.
    LD_PRELOAD="$(${CXX:-g++} -print-file-name=libasan.so) $(${CXX:-g++} -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 "$python" -m pytest -n0 -p sanitized "$@"
}
