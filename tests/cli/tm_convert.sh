# tm-convert and tm-run info: outputs, exit codes, what may be replaced, damaged workspaces.
. "$TMF_CLI/lib.sh"
PATH=$TMF_BIN/../tests:$PATH
for tool in awq-search pack-w4 tm-convert tm-run make_model; do
    command -v $tool >/dev/null || { fail "$tool is not built"; finish; }
done
check 'a model' 0 make_model --shape tiny-internlm2 --dtype bf16 model
check 'its plan' 0 awq-search model --method rtn -o plan
check 'its AWQ directory' 0 pack-w4 model --plan plan -o awq
check 'plan with groups of 64' 0 awq-search model --method rtn --group-size 64 -o plan64
check 'AWQ directory with groups of 64' 0 pack-w4 model --plan plan64 -o awq64
weights=ws/triton_models/weights

# Usage.
check 'no output' 2 tm-convert awq
err_has '^tm-convert: --output: expected a directory name'
check 'bad tp' 2 tm-convert awq -o ws --tp 0
check 'bad dtype' 2 tm-convert awq -o ws --dtype int8
check 'no such model' 6 tm-convert nowhere -o ws
check 'a file' 3 tm-convert plan -o ws
check 'an empty folder' 3 sh -c 'mkdir empty && tm-convert empty -o ws'
check 'other format than said' 3 tm-convert model -o ws --model-format awq
err_has "expected format awq, found hf"
absent ws

# What it would write.
check 'dry run' 0 tm-convert awq --dry-run
out_has '^ +32768  U32  \[256,32\]  layers.0.attention.wo.0.qweight$'
out_has ' MB  in all$'
check 'dry run as JSON' 0 tm-convert awq -o ws --dry-run --json
out_json 'd["total"] == sum(d["memory"].values()) and d["total"] > 0'
absent ws

# Writing, once.
check 'write' 0 tm-convert awq -o ws --json
out_json 'd["files"] == 37 and d["tp"] == 1 and not d["up_to_date"]'
err_has "^tm-convert: wrote 'ws'"
check 'info' 0 tm-run info ws --json
out_json 'd["kind"] == "workspace" and d["manifest"]["verified"] and d["workspace"]["lmdeploy"] == "v0.6.4 .. v0.7.3"'
check 'info as text' 0 tm-run info ws
out_has '^manifest.verified +true$'
check 'again' 0 tm-convert awq -o ws --json
err_has "'ws' is up to date"
out_json 'd["up_to_date"]'
cp -r ws copy
check 'by force' 0 tm-convert awq -o ws --force
diff -r ws copy >/dev/null; verdict $? 'the same bytes'
check "LMDeploy's names" 0 tm-convert awq --dst-path ws --model-format awq --tp 1
err_has 'up to date'
check 'other options' 0 tm-convert awq -o ws --session-len 77 --model-name mine
err_has "replacing the older 'ws'"
grep -q '^  session_len: 77$' $weights/config.yaml; verdict $? 'the option is in config.yaml'
grep -q '^  model_name: mine$' $weights/config.yaml; verdict $? 'the name is in config.yaml'
check 'back' 0 tm-convert awq -o ws
diff -r ws copy >/dev/null; verdict $? 'the same bytes again'
mkdir foreign && echo x >foreign/file
check 'a folder of others' 2 tm-convert awq -o foreign
err_has "'foreign' exists, use --force"
[ -e foreign/file ]; verdict $? 'it is untouched'
check 'nor over the AWQ directory' 2 tm-convert awq -o awq64
check 'by force over the folder' 0 tm-convert awq -o foreign --force
absent foreign/file
check '16 bit' 0 tm-convert model -o dense
check 'info of that' 0 tm-run info dense --json
out_json 'd["model"]["dtype"] == "BF16" and d["model"]["w4_group"] == 0'
check 'as float16' 0 tm-convert model -o dense --dtype float16
grep -q '^  weight_type: float16$' dense/triton_models/weights/config.yaml; verdict $? 'float16 in config.yaml'
check 'two ranks' 0 tm-convert awq -o two --tp 2
check 'info of two ranks' 0 tm-run info two --json
out_json 'd["workspace"]["tp"] == 2'
check 'which do not run here' 4 tm-run ppl two --data plan
err_has 'split for tp 2'
check 'three ranks' 4 tm-convert awq -o three --tp 3
check 'groups of 64' 4 tm-convert awq64 -o ws64
err_has "TurboMind loads 128 only: tm-run reads 'awq64' as it is"
absent ws64
check 'a workspace as source' 4 tm-convert ws -o ws2

# One file again.
name=layers.1.attention.w_qkv.0.scales
check 'compare' 0 tm-convert awq -o ws --compare-tensor $name
err_has "$name: same bytes"
check 'compare an unknown one' 3 tm-convert awq -o ws --compare-tensor layers.7.x
printf '\377' | dd of=$weights/$name bs=1 seek=100 conv=notrunc status=none
check 'compare a changed one' 7 tm-convert awq -o ws --compare-tensor $name
err_has 'byte 100: expected [0-9a-f]+, found ff'

# Damage: each with its code and one line.
check 'a changed byte' 7 tm-run info ws
err_has "$name: expected xxh3-128 [0-9a-f]{32}, found [0-9a-f]{32}"
err_lines 1
check 'unless not to look' 0 tm-run info ws --no-verify
check 'mended' 0 tm-convert awq -o ws
damage() { # NAME CODE REGEX COMMAND: a fresh copy, damaged by the command, then opened
    rm -rf ws && cp -r copy ws
    (eval "$4")
    check "$1" "$2" tm-run info ws
    err_has "$3"
    err_lines 1
}
damage 'a short file' 3 'norm.weight: expected 512 bytes .*, found 510' "truncate -s -2 $weights/norm.weight"
damage 'a long file' 3 'expected 512 bytes .*, found 516' "truncate -s +4 $weights/norm.weight"
damage 'a missing file' 3 'found no file' "rm $weights/layers.0.feed_forward.w2.0.zeros"
damage 'an empty config' 3 'config.yaml: no value' ": >$weights/config.yaml"
damage 'no config' 3 'config.yaml: no such file' "rm $weights/config.yaml"
damage 'more layers' 3 'inter_size' "sed -i 's/num_layer: 2/num_layer: 3/' $weights/config.yaml"
damage 'another width' 3 'expected .* found' "sed -i 's/hidden_units: 256/hidden_units: 512/' $weights/config.yaml"
damage 'another type' 3 'found no file' "sed -i 's/weight_type: int4/weight_type: float16/' $weights/config.yaml"
damage 'another base' 3 'rope_theta is 5 in config.yaml' "sed -i 's/rope_theta: .*/rope_theta: 5.0/' $weights/config.yaml"
damage 'an edited session' 7 'delete manifest.json' "sed -i 's/session_len: 256/session_len: 99/' $weights/config.yaml"
damage 'a forged manifest' 7 'sha256: expected' "sed -i 's/norm.weight/norn.weight/' ws/manifest.json"
damage 'an alias in the config' 3 'aliases|anchors' "sed -i 's/tp: 1/tp: *x/' $weights/config.yaml"
damage 'an older version' 4 'v0.5.3' "mv $weights/config.yaml $weights/config.ini"
damage 'a tokenizer file changed' 7 'generation_config.json' "sed -i 's/1/2/' ws/generation_config.json"

# Outputs that cannot be written.
check 'no such folder' 6 tm-convert awq -o no/such/ws
check 'below a file' 6 tm-convert awq -o plan/ws
check 'where nothing can be' 6 tm-convert awq -o /proc/ws
check 'file size limit' 6 bash -c 'ulimit -f 50; tm-convert awq -o big'
absent big
finish
