# AWQ directories and workspaces beside scripts/check_awq_numpy.py, which shares no code with us: made models of
# each form of attention weights, and a trained one where the shared data is.
. "$TMF_CLI/lib.sh"
PATH=$TMF_BIN/../tests:$PATH
oracle=$TMF_SOURCE/scripts/check_awq_numpy.py
command -v python3 >/dev/null || { skip 'python3 is missing'; exit 77; }
python3 -c 'import numpy' 2>/dev/null || { skip 'numpy is missing for python3'; exit 77; }
python3 -c 'import safetensors' 2>/dev/null || skip 'the safetensors package is missing: the oracle reads files by hand'

through_all() { # NAME MODEL_DIR
    check "$1: plan" 0 awq-search "$2" --method rtn -o "$1.plan"
    check "$1: pack" 0 pack-w4 "$2" --plan "$1.plan" -o "$1.awq"
    check "$1: convert" 0 tm-convert "$1.awq" -o "$1.ws"
    check "$1: the outside reader agrees" 0 "$oracle" "$1.awq" --workspace "$1.ws" --source "$2" \
        --dump "$(command -v w4_dump)"
    out_has '^0 differences$'
    out_has 'largest error: 0\.[0-9]+ of a step' # rounding, and a clipped end where zero is not on the grid
}
for shape in tiny-llama tiny-llama3 tiny-internlm2 tiny-qwen2 tiny-yi tiny-hd128; do
    check "$shape: make" 0 make_model --shape $shape --dtype bf16 --shards 2 $shape
    through_all $shape $shape
done
if [ -d "$TMF_SHARED/models/demo" ]; then through_all demo "$TMF_SHARED/models/demo"; else skip 'no shared models'; fi

# It can fail: one changed scale, one changed word, one changed setting.
change() { printf "$3" | dd of="$1" bs=1 seek="$2" conv=notrunc status=none; }
cp -r tiny-llama.ws changed
change changed/triton_models/weights/layers.1.attention.w_qkv.0.qweight 1000 '\x5a\xa5'
check 'a changed word is found' 1 "$oracle" tiny-llama.awq --workspace changed
out_has 'differs: workspace file layers.1.attention.w_qkv.0.qweight'
cp -r tiny-llama.awq changed.awq
change changed.awq/model.safetensors "$(($(stat -c %s changed.awq/model.safetensors) - 64))" '\x11'
check 'a changed value is found' 1 "$oracle" changed.awq --workspace tiny-llama.ws
finish
