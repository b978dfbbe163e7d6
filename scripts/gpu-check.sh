#!/bin/bash
# gpu-check.sh STAGE ...: checks and measures the CUDA backend on a machine with a GPU.
#   build      configures and builds with CUDA for the GPU's own architecture (TMF_BUILD, build/gpu)
#   ops        every CUDA op against the CPU's references (tests/test_cuda.c, test_cuda_attn.c), and loading,
#              drawing, the search's ops and those of deterministic devices (test_cuda_*.c)
#   engine     the server's engine: the same answers alone, in batches, after preemption; and the search
#   e2e        the bundled model: perplexity, exact replies of dialogues after each other, and greedy text,
#              each cache format, GPU beside CPU
#   golden     log-probabilities and greedy ids of golden files, each cache format, token by token and
#              twice (tests/test_golden.c): the bundled model, and those in TMF_SHARED (../shared)
#   sanitizer  ops and loading again under compute-sanitizer, fewer shapes; the recorded pass is one of them
#   ptx        the ops once more with the kernels for sm_75 and sm_80, compiled by the driver from PTX
#   kernels    products and decode attention alone, beside their floors and cuBLAS (tests/bench_cuda.c)
#   load       random 7B and 1.8B models: seconds to the first token, and device memory
#   bench      the same models: prefill and decode
# `load` and `bench` print tables for docs/perf.md; their models go to TMF_WORK (/tmp/tmforge-gpu): 9 GB.
# Without `build` the binaries under TMF_BUILD are taken as they are (tools/tm-run, tests/test_cuda ..; for
# `ptx` those under TMF_BUILD-ptx75 and -ptx80 where there is no cmake). Exit 0 only if every stage passed;
# each takes less than 9 minutes.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
build=${TMF_BUILD:-build/gpu} work=${TMF_WORK:-/tmp/tmforge-gpu} shared=${TMF_SHARED:-../shared}
demo=datasets/demo
[ $# -gt 0 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2; }

field() { # KEY: the number behind it in one line of JSON
    grep -o "\"$1\":[-0-9.e+]*" | head -n 1 | cut -d: -f2
}

stage_build() {
    [ -e kernels/cuda.cmake ] || { echo 'this version has no kernels/cuda.cmake'; return 1; }
    local arch
    arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .) || return 1
    [ "$arch" != 90 ] || arch=90a
    cmake -S . -B "$build" -DWITH_CUDA=ON -DCUDA_ARCHS="$arch" &&
        cmake --build "$build" -j "$(nproc)" --target tm-run make_model test_cuda \
            test_cuda_attn test_cuda_load test_cuda_fixed test_cuda_sample test_cuda_search \
            test_ahead test_engine test_awq_device test_golden bench_cuda
}

stage_ops() {
    local t
    for t in '' _attn _load _fixed _sample _search; do
        timeout 150 "$build/tests/test_cuda$t" || return 1
    done
}

stage_engine() { timeout 100 "$build/tests/test_ahead" cuda && timeout 200 "$build/tests/test_engine" cuda && timeout 250 "$build/tests/test_awq_device"; }

stage_golden() {
    local out rc
    out=$(timeout 500 "$build/tests/test_golden" --device cuda --shared "$shared" --demo $demo)
    rc=$?
    echo "$out"
    # 77: no GPU, or only the bundled model was there; the first has no line of checks
    [ $rc -eq 0 ] || { [ $rc -eq 77 ] && grep -q ' checks, 0 failures$' <<<"$out"; }
}

# Under the sanitizer a kernel takes many times as long: one shape of each kind (--few).
stage_sanitizer() {
    local each suite bad=0
    for each in w4 'w4 tiles' norm rows _attn:attention '_attn:prompt tails' _attn:pass; do
        suite=test_cuda
        [ "$each" = "${each#*:}" ] || suite+=${each%%:*}
        CK_RUN_CASE=${each#*:} timeout 70 compute-sanitizer --error-exitcode 9 --leak-check full \
            "$build/tests/$suite" --few || { echo "sanitizer: $each: exit $?"; bad=1; }
    done
    timeout 80 compute-sanitizer --error-exitcode 9 --leak-check full "$build/tests/test_cuda_load" ||
        { echo "sanitizer: loading: exit $?"; bad=1; }
    return $bad
}

stage_ptx() {
    local sm t
    for sm in 75 80; do
        if command -v cmake >/dev/null; then
            cmake -S . -B "$build-ptx$sm" -DWITH_CUDA=ON -DCUDA_ARCHS="$sm-virtual" &&
                cmake --build "$build-ptx$sm" -j "$(nproc)" --target test_cuda test_cuda_attn || return 1
        fi
        # There is nothing but PTX in it; CUDA_FORCE_PTX_JIT would ask the same of cuBLAS, which has none.
        for t in test_cuda test_cuda_attn; do
            CUDA_CACHE_DISABLE=1 timeout 130 "$build-ptx$sm/tests/$t" --sm $sm || return 1
        done
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

# Exact replies of 120 dialogues after each other in one process: what an earlier one left in the
# cache must not show. Questions of one turn are taken from the bundled dialogues.
replies() { # DEVICE BITS
    local from='s/^{"messages": \[\({"role": "user", "content": "[^"]*"}\), {"role": "assistant",'
    from+=' "content": \("[^"]*"\)}\]}$/{"kind":"demo","messages":[\1],"answer":\2}/p'
    sed -n "$from" $demo/eval.jsonl | head -n 120 >"$work.jsonl"
    timeout 120 "$build/tools/tm-run" tasks $demo --device "$1" --data "$work.jsonl" \
        --quant-policy "$2" --json | field all
}

# Whether A and B differ by no more than SHARE of A.
close() { # A B SHARE
    awk -v a="$1" -v b="$2" -v s="$3" 'BEGIN { exit !(a > 0 && b - a <= s * a && a - b <= s * a) }'
}

stage_e2e() {
    local bits a b c d bad=0
    printf '| cache | perplexity, CPU | GPU | exact replies, CPU | GPU |\n|---|---:|---:|---:|---:|\n'
    for bits in 0 8 4; do
        a=$(ppl cpu $bits) b=$(ppl cuda $bits) c=$(replies cpu $bits) d=$(replies cuda $bits)
        echo "| $bits | $a | $b | $c | $d |"
        close "$a" "$b" 0.005 || { echo "perplexities differ by more than 0.5 %"; bad=1; }
        close "$c" "$d" 0.05 || { echo "exact replies differ by more than 5 %"; bad=1; }
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

model() { # SHAPE [w4]: its directory, made if it is not there
    local dir=$work/$1${2:+-w4}
    mkdir -p "$work" || return 1
    [ -e "$dir/config.json" ] ||
        "$build/tests/make_model" --shape "$1" ${2:+--w4} --dtype f16 --seed 1 "$dir" >&2 || return 1
    echo "$dir"
}

mb() { awk -v b="$1" 'BEGIN { printf "%.0f", b / 1e6 }'; }

# The best of three, the page cache warm: what is shown is the program, not the disk.
load_row() { # NAME MODEL OPTIONS ...
    local name=$1 dir=$2 i out best=
    shift 2
    cat "$dir"/*.safetensors >/dev/null
    for i in 1 2 3; do
        out=$(timeout 60 "$build/tools/tm-run" bench "$dir" --device cuda --rounds 1 --probe 0 --json "$@") ||
            { echo "| $name | failed | | | | |"; return 1; }
        [ -n "$best" ] && awk -v a="$(field first_token_seconds <<<"$out")" \
            -v b="$(field first_token_seconds <<<"$best")" 'BEGIN { exit a < b }' || best=$out
    done
    printf '| %s | %.2f | %.2f | %s | %s | %s |\n' "$name" "$(field load_seconds <<<"$best")" \
        "$(field first_token_seconds <<<"$best")" "$(mb "$(field planned_bytes <<<"$best")")" \
        "$(mb "$(field device_bytes <<<"$best")")" "$(mb "$(field context_bytes <<<"$best")")"
}

stage_load() {
    local l7 i2 i2f bad=0
    l7=$(model llama7b w4) && i2=$(model internlm2_1p8b w4) && i2f=$(model internlm2_1p8b) || return 1
    echo '| | loaded, s | first token, s | planned, MB | taken, MB | context, MB |'
    echo '|---|---:|---:|---:|---:|---:|'
    load_row "${l7##*/}" "$l7" --prompt-tokens 16 --new-tokens 4 || bad=1
    for i in "$i2f" "$i2"; do
        load_row "${i##*/}, cache 0.2 GB" "$i" --prompt-tokens 16 --new-tokens 4 --session-len 2034 \
            --kv-mem 200000000 || bad=1
        load_row "${i##*/}, cache 0.01 of what is free" "$i" --prompt-tokens 16 --new-tokens 4 \
            --session-len 32768 --cache-max-entry-count 0.01 || bad=1
    done
    return $bad
}

stage_bench() {
    local shape dir n bits bad=0
    printf '| tokens/s | prefill | decode |\n|---|---:|---:|\n'
    for shape in llama7b internlm2_1p8b; do
        dir=$(model $shape w4) || return 1
        for n in 1 8 64; do
            row "$shape W4, $n x (128 + 128)" "$dir" --prompt-tokens 128 --new-tokens 128 \
                --batch $n || bad=1
        done
        row "$shape W4, 2048 + 16" "$dir" --prompt-tokens 2048 --new-tokens 16 || bad=1
        for bits in 0 8 4; do
            row "$shape W4, 16384 + 48, cache $bits" "$dir" --prompt-tokens 16384 \
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
