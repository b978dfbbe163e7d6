# --device cuda: a binary with CUDA serves a machine without a GPU too, with one line; cuda:0 insists.
. "$TMF_CLI/lib.sh"
demo=$TMF_SOURCE/datasets/demo
answer="generate $demo --prompt hello --max-new-tokens 8 --temperature 0 --json"
gpu=0
! nvidia-smi -L >/dev/null 2>&1 || gpu=1

# shellcheck disable=SC2086
check 'on the CPU' 0 tm-run $answer
out_json '"ids" in d and len(d["ids"]) > 0'
ids=$(grep -o '"ids":\[[0-9,]*\]' out)
# shellcheck disable=SC2086
if tm-run --version | grep -q 'backends:.*cuda'; then
    check 'cuda, or else the CPU' 0 tm-run $answer --device cuda
    if [ $gpu -eq 0 ]; then
        err_lines 1
        err_has '^tm-run: warning: device cuda: no usable driver or GPU on this machine; using the CPU$'
        [ "$(grep -o '"ids":\[[0-9,]*\]' out)" = "$ids" ]
        verdict $? 'the same answer'
        check 'in bench' 0 tm-run bench "$demo" --device cuda --probe 0 --rounds 1 --prompt-tokens 8 --new-tokens 4 --json
        err_has 'using the CPU$'
        out_json 'd["device"].startswith("cpu") and d["load_seconds"] <= d["first_token_seconds"] and "device_bytes" not in d'
        check 'cuda:0 insists' 4 tm-run $answer --device cuda:0
        err_has 'no usable driver or GPU on this machine'
    else
        skip 'a GPU is there: nothing falls back'
    fi
else
    check 'a build without CUDA says so' 4 tm-run $answer --device cuda
    err_lines 1
    err_has 'built without CUDA'
fi
finish
