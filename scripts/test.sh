#!/bin/bash
# test.sh: sets up, builds and runs the unit, cli and e2e tests.
# test.sh --all: the same in a build where warnings are errors, with the slow tests, the fuzz corpora and the
# house rules; then the suites under address+undefined sanitizers, the thread pool and the engine under the
# thread sanitizer, and where nvcc is found a build of the CUDA sources for one architecture.
# Ends with ctest's summary; exit 0 only if every step passed.
set -uo pipefail
cd "$(dirname "$0")/.."
all=${1:-}
case $all in '' | --all) ;; *) echo 'usage: test.sh [--all]' >&2; exit 2 ;; esac
jobs=$(nproc)
failed=()

# step NAME COMMAND ...: one line of outcome; the command's output only when it fails.
step() {
    local name=$1 begin=$SECONDS log
    shift
    log=$(mktemp)
    if "$@" >"$log" 2>&1; then
        echo "== $name: ok ($((SECONDS - begin)) s)"
    else
        failed+=("$name")
        tail -n 60 "$log"
        echo "== $name: FAILED ($((SECONDS - begin)) s)"
    fi
    rm -f "$log"
}

build() { # PRESET [TARGET ...]
    local preset=$1
    shift
    cmake --preset "$preset" && cmake --build --preset "$preset" -j "$jobs" ${1:+--target "$@"}
}

tests() { # PRESET LABELS
    ctest --test-dir "build/$1" -L "^($2)\$" -j "$jobs" --output-on-failure --no-tests=error
}

cuda() { # compiled and linked, and falls back to the CPU; the rest needs a GPU: scripts/gpu-check.sh
    command -v nvcc >/dev/null || { echo 'no nvcc'; return 0; }
    cmake --preset cuda && cmake --build --preset cuda -j "$jobs" --target tm-run awq-search &&
        ctest --test-dir build/cuda -R '^cli_tm_run_device$' --output-on-failure
}

# Every public header stands alone.
headers() {
    local h flags
    flags=$(pkg-config --cflags libcjson)
    for h in */*.h tests/support/*.h; do
        ! grep -qE 'immintrin.h|kernels/vec.h' "$h" || continue # needs the flags of an instruction set
        # shellcheck disable=SC2086
        gcc -std=c11 -D_GNU_SOURCE -I. -Itests $flags -Wall -Wextra -Werror -Wno-unused-function -Wno-psabi \
            -Wno-missing-field-initializers '-DTMF_SOURCE_DIR=""' -fsyntax-only -x c "$h" || return 1
    done
}

./scripts/setup.sh $all || exit 1

main=release labels='unit|cli|e2e'
if [ "$all" = --all ]; then
    main=dev labels='unit|cli|e2e|fuzz|slow'
    step 'format' ./scripts/format.sh --check
    step 'layers' ./scripts/check_layers.py
    step 'headers' headers
fi
step "build ($main)" build "$main"
if [ "$all" = --all ]; then
    step 'symbols' ./scripts/check_symbols.sh build/dev
    step 'build (asan)' build asan
    step 'tests under address,undefined' tests asan 'unit|cli|e2e|fuzz'
    step 'build (tsan)' build tsan test_base_pool test_sched test_engine_limits
    for name in base_pool sched engine_limits; do
        step "$name under thread" "./build/tsan/tests/test_$name"
    done
    step 'CUDA sources' cuda
fi

log=$(mktemp)
begin=$SECONDS
tests "$main" "$labels" 2>&1 | tee "$log"
[ "${PIPESTATUS[0]}" -eq 0 ] || failed+=("tests")
echo "== tests: $((SECONDS - begin)) s; all of it: $SECONDS s"
skips=$(grep -hE '^SKIP' "build/$main/Testing/Temporary/LastTest.log" 2>/dev/null | sort -u)
[ -z "$skips" ] || printf '== not tested here:\n%s\n' "$skips"
[ ${#failed[@]} -eq 0 ] || printf '== failed: %s\n' "${failed[@]}"
grep -E 'tests passed' "$log" | tail -n 1
rm -f "$log"
exit $((${#failed[@]} > 0))
