# A workspace answers as the directory that it was made from, in every form of attention, rotation and window
# that the families have: the same top tokens with the same log-probabilities but for the order of sums.
. "$TMF_CLI/lib.sh"
PATH=$TMF_BIN/../tests:$PATH
command -v python3 >/dev/null || { skip 'python3 is missing'; exit 77; }
ids=$(seq -s, 5 3 400) # 132 tokens: beyond the window of those that have one, which is 64

agree() { # NAME PATH WORKSPACE
    check "$1" 0 tm-run score "$2" --ids "$ids" --top 10 --json
    cp out first
    check "$1: its workspace" 0 tm-run score "$3" --ids "$ids" --top 10 --json
    python3 - first out <<'PYTHON' 2>>err
import json, sys
a, b = (dict(json.load(open(f))["top"]) for f in sys.argv[1:])
near = [abs(a[i] - b[i]) for i in a if i in b]
sys.exit(len(near) < 9 or max(near) > 2e-3)  # the tenth may be a tie
PYTHON
    verdict $? "$1: the same answers" "$(cat first out | cut -c1-150)"
}
for shape in tiny-llama tiny-llama3 tiny-internlm2 tiny-mistral tiny-qwen2 tiny-qwen2-window tiny-yi tiny-hd80 \
    tiny-hd128 tiny-hd256; do
    make_model --shape $shape --dtype bf16 $shape 2>err || fail "$shape is made"
    check "$shape: convert" 0 tm-convert $shape -o $shape.ws
    agree "$shape, 16 bit" $shape $shape.ws
    case $shape in tiny-hd80) continue ;; esac # 320 inputs of wo are no whole groups
    check "$shape: plan" 0 awq-search $shape --method rtn -o plan --force
    check "$shape: pack" 0 pack-w4 $shape --plan plan -o $shape.awq
    check "$shape: convert W4" 0 tm-convert $shape.awq -o $shape.w4
    agree "$shape, 4 bit" $shape.awq $shape.w4
done

# The window and the stop ids come from the json files beside the tokenizer, not from the yaml.
check 'info of a workspace with a window' 0 tm-run info tiny-mistral.ws --json
out_json 'd["model"]["sliding_window"] == 64 and len(d["model"]["stop_ids"]) == 2'
finish
