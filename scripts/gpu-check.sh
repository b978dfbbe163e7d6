#!/bin/bash
# gpu-check.sh STAGE ...: checks and measures the CUDA backend on a machine with a GPU.
#   build      configures and builds with CUDA for the GPU's own architecture (TMF_BUILD, build/gpu)
#   ops        every CUDA op against the CPU's references (tests/test_cuda.c)
#   e2e        the bundled model: perplexity and greedy text, each cache format, GPU beside CPU
#   sanitizer  the ops again under compute-sanitizer
#   ptx        the ops once more with the kernels for sm_75 and sm_80, compiled by the driver from PTX
#   kernels    products and decode attention alone, beside their floors and cuBLAS (tests/bench_cuda.c)
#   bench      random 7B and 1.8B models: prefill and decode as a table for docs/perf.md
# Models of `bench` go to TMF_WORK (/tmp/tmforge-gpu): 5 GB. Exit 0 only if every stage passed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
build=${TMF_BUILD:-build/gpu} work=${TMF_WORK:-/tmp/tmforge-gpu}
demo=datasets/demo
[ $# -gt 0 ] || { sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; }

field() { # KEY: the number behind it in one line of JSON
    grep -o "\"$1\":[-0-9.e+]*" | head -n 1 | cut -d: -f2
}

stage_build() {
    [ -e kernels/cuda.cmake ] || { echo 'this version has no kernels/cuda.cmake'; return 1; }
    local arch
    arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .) || return 1
    [ "$arch" != 90 ] || arch=90a
    cmake -S . -B "$build" -DWITH_CUDA=ON -DCUDA_ARCHS="$arch" &&
        cmake --build "$build" -j "$(nproc)" --target tm-run make_model test_cuda bench_cuda
}

stage_ops() { timeout 500 "$build/tests/test_cuda"; }

stage_sanitizer() {
    timeout 500 compute-sanitizer --error-exitcode 9 --leak-check full "$build/tests/test_cuda"
}

stage_ptx() {
    local sm
    for sm in 75 80; do
        cmake -S . -B "$build-ptx$sm" -DWITH_CUDA=ON -DCUDA_ARCHS="$sm-virtual" &&
            cmake --build "$build-ptx$sm" -j "$(nproc)" --target test_cuda &&
            CUDA_FORCE_PTX_JIT=1 timeout 200 "$build-ptx$sm/tests/test_cuda" --sm $sm || return 1
    done
}

stage_kernels() { timeout 500 "$build/tests/bench_cuda"; }

ppl() { # DEVICE BITS
    timeout 120 "$build/tools/tm-run" ppl $demo --device "$1" --data $demo/eval.jsonl --window 1024 \
        --windows 4 --quant-policy "$2" --json | field ppl
}

ids() { # DEVICE
    timeout 120 "$build/tools/tm-run" generate $demo --device "$1" --prompt hello --chat \
        --max-new-tokens 24 --temperature 0 --json | grep -o '"ids":\[[0-9,]*\]'
}

stage_e2e() {
    local bits a b bad=0
    printf '| cache | perplexity, CPU | GPU |\n|---|---:|---:|\n'
    for bits in 0 8 4; do
        a=$(ppl cpu $bits) b=$(ppl cuda $bits)
        echo "| $bits | $a | $b |"
        awk -v a="$a" -v b="$b" 'BEGIN { exit !(a > 0 && b > 0 && a / b < 1.005 && b / a < 1.005) }' ||
            { echo "perplexities differ by more than 0.5 %"; bad=1; }
    done
    a=$(ids cpu) b=$(ids cuda)
    if [ -z "$a" ] || [ "$a" != "$b" ]; then
        echo "greedy ids differ: $a and $b"
        bad=1
    fi
    return $bad
}

row() { # NAME MODEL OPTIONS ...
    local name=$1 model=$2 out
    shift 2
    out=$(timeout 120 "$build/tools/tm-run" bench "$model" --device cuda --rounds 5 --probe 0 --json "$@") ||
        { echo "| $name | failed | |"; return 1; }
    printf '| %s | %.0f | %.0f |\n' "$name" "$(field prefill_tokens_per_second <<<"$out")" \
        "$(field decode_tokens_per_second <<<"$out")"
}

stage_bench() {
    local shape n bits bad=0
    mkdir -p "$work" || return 1
    printf '| tokens/s | prefill | decode |\n|---|---:|---:|\n'
    for shape in llama7b internlm2_1p8b; do
        [ -e "$work/$shape/config.json" ] ||
            "$build/tests/make_model" --shape $shape --w4 --dtype f16 --seed 1 "$work/$shape" || return 1
        for n in 1 8 64; do
            row "$shape W4, $n x (128 + 128)" "$work/$shape" --prompt-tokens 128 --new-tokens 128 \
                --batch $n || bad=1
        done
        row "$shape W4, 2048 + 16" "$work/$shape" --prompt-tokens 2048 --new-tokens 16 || bad=1
        for bits in 0 8 4; do
            row "$shape W4, 16384 + 48, cache $bits" "$work/$shape" --prompt-tokens 16384 \
                --new-tokens 48 --quant-policy $bits || bad=1
        done
    done
    return $bad
}

failed=()
for stage; do
    declare -F "stage_$stage" >/dev/null || { echo "gpu-check: no stage '$stage'" >&2; exit 2; }
done
for stage; do
    begin=$SECONDS
    if "stage_$stage"; then
        echo "== $stage: ok ($((SECONDS - begin)) s)"
    else
        failed+=("$stage")
        echo "== $stage: FAILED ($((SECONDS - begin)) s)"
    fi
done
[ ${#failed[@]} -eq 0 ] || { printf '== failed: %s\n' "${failed[*]}"; exit 1; }
