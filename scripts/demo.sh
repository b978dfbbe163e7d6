#!/bin/bash
# demo.sh: from nothing to a chat. Installs missing packages (Debian 12, Ubuntu 24.04; root or sudo), builds,
# takes the bundled model through all five tools, prints one table and answers one prompt. A second run finds
# its artifacts up to date and only measures. Results stay in build/demo.
set -euo pipefail
cd "$(dirname "$0")/.."
model=datasets/demo out=build/demo bin=build/release/tools
prompt='What is the capital of France?'

./scripts/setup.sh
echo '== build'
log=$(mktemp)
trap 'rm -f "$log"' EXIT
{
    cmake --preset release &&
        cmake --build --preset release -j "$(nproc)" \
            --target calib-collect awq-search pack-w4 tm-convert tm-run
} >"$log" 2>&1 || {
    tail -n 40 "$log" >&2
    exit 1
}
mkdir -p "$out"

show() { # runs a tool and shows its command line
    echo "\$ $*"
    "$bin/$1" "${@:2}"
}
echo '== quantize'
show calib-collect $model --data $model/calib.jsonl --samples 32 --seqlen 512 -o $out/calib
show awq-search $model --calib $out/calib -o $out/plan
show pack-w4 $model --plan $out/plan -o $out/awq
show tm-convert $out/awq -o $out/workspace

number() { sed -nE "s/.*\"$1\":([-+0-9.e]+).*/\1/p"; } # of a line of JSON
row() { # NAME PATH KV_BITS
    local name=$1 path=$2 kv=$3 bytes ppl all speed
    bytes=$("$bin/tm-run" info "$path" --json | number total)
    ppl=$("$bin/tm-run" ppl "$path" --data $model/eval.jsonl --window 1024 --quant-policy "$kv" --json -q | number ppl)
    all=$("$bin/tm-run" tasks "$path" --data $model/tasks.jsonl --quant-policy "$kv" --json -q | number all)
    speed=$("$bin/tm-run" bench "$path" --prompt-tokens 128 --new-tokens 64 --quant-policy "$kv" --json -q |
        number decode_tokens_per_second)
    awk -v n="$name" -v b="$bytes" -v p="$ppl" -v a="$all" -v s="$speed" \
        'BEGIN { printf "%-14s %8.1f MB %12.4f %9.1f %% %12.0f\n", n, b / 1e6, p, 100 * a, s }'
}
echo '== measure (50 windows of 1024 tokens, 200 tasks)'
printf '%-14s %11s %12s %11s %12s\n' '' size perplexity accuracy tokens/s
row '16-bit, KV16' $model 0
row 'W4, KV16' $out/workspace 0
row 'W4, KV8' $out/workspace 8
row 'W4, KV4' $out/workspace 4

echo '== chat'
echo "> $prompt"
"$bin/tm-run" chat $out/workspace -p "$prompt" --temperature 0 -q
