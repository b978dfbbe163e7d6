# Every kind of bad input, three or more cases each: one line that names file, thing, expected and found, the exit
# code of the table, and nothing under the output's name.
. "$TMF_CLI/lib.sh"
PATH=$TMF_BIN/../tests:$PATH
for tool in calib-collect awq-search pack-w4 tm-convert tm-run make_model; do
    command -v $tool >/dev/null || { fail "$tool is not built"; finish; }
done
for i in $(seq 4000); do echo "line $i of a text: $((i * 7919 % 1000)) and $((i * i % 977))"; done >text
check 'a model' 0 make_model --shape tiny-internlm2 --seed 1 model
check 'another model' 0 make_model --shape tiny-internlm2 --seed 2 other
windows='--samples 16 --seqlen 64'
check 'its calibration' 0 calib-collect model --data text $windows -o calib -q
check 'its plan' 0 awq-search model --calib calib --group-size 32 -o plan -q
check 'its W4 directory' 0 pack-w4 model --plan plan -o awq -q

# refused KIND CODE REGEX OUTPUT COMMAND ...: the command fails with CODE and one line that matches
refused() {
    local kind=$1 code=$2 line=$3 made=$4
    shift 4
    rm -rf out1 out1.part
    check "$kind" "$code" "$@"
    err_lines 1
    err_has "^[a-z0-9-]+: .*$line"
    absent "$made"
}
# damaged FROM: a fresh copy named bad, links broken
damaged() { rm -rf bad && cp -r "$1" bad; }
collect() { calib-collect bad --data text $windows -o out1 -q; }

# edit FILE PYTHON: header h (a dict) and data d (a bytearray) of a safetensors file, written back
edit() {
    python3 - "$@" <<'P'
import json, struct, sys
path, code = sys.argv[1:3]
b = open(path, "rb").read()
n, = struct.unpack("<Q", b[:8])
h, d = json.loads(b[8:8 + n]), bytearray(b[8 + n:])
names = [k for k in h if k != "__metadata__"]
length = None
exec(code)
head = json.dumps(h).encode()
open(path, "wb").write(struct.pack("<Q", len(head) if length is None else length) + head + bytes(d))
P
}
file=bad/model.safetensors
norm=model.layers.1.attention_norm.weight

# ---- safetensors headers: truncated, overlapping, oversized ----
for bytes in 3 100 20000; do
    damaged model && truncate -s $bytes $file
    refused "truncated to $bytes bytes" 3 "model.safetensors: .*[0-9]+.*[0-9]+" out1 collect
done
damaged model && edit $file 'h[names[1]]["data_offsets"] = h[names[0]]["data_offsets"]'
refused 'two tensors in one place' 3 'model.safetensors.*data_offsets' out1 collect
damaged model && edit $file 'o = h[names[2]]["data_offsets"]; o[0] -= 2; o[1] -= 2'
refused 'an overlap of one value' 3 'model.safetensors.*(overlap|expected)' out1 collect
damaged model && edit $file 'h["extra"] = dict(h[names[0]])'
refused 'a second name for the same bytes' 3 'model.safetensors.*(overlap|expected)' out1 collect
damaged model && edit $file 'length = 2**62'
refused 'a header of 2^62 bytes' 3 'model.safetensors.*header.*expected' out1 collect
damaged model && edit $file 'length = len(d) + 2**20'
refused 'a header longer than the file' 3 'model.safetensors.*header of [0-9]+ bytes reaches beyond the file.s [0-9]+' out1 collect
damaged model && edit $file 'h[names[0]]["shape"] = [2**40, 2**40]'
refused 'a shape whose product overflows' 3 "model.safetensors.*" out1 collect

# ---- shards ----
shards() { # MODEL: bad = the model in three shards with an index
    damaged "$1"
    python3 - <<'P'
import json, os, struct
b = open("bad/model.safetensors", "rb").read()
n, = struct.unpack("<Q", b[:8])
h, d = json.loads(b[8:8 + n]), b[8 + n:]
h.pop("__metadata__", None)
names, index = list(h), {}
for s in range(3):
    part, body, file = {}, b"", f"model-{s + 1:05}-of-00003.safetensors"
    for name in names[s::3]:
        o = h[name]["data_offsets"]
        part[name] = dict(h[name], data_offsets=[len(body), len(body) + o[1] - o[0]])
        body += d[o[0]:o[1]]
        index[name] = file
    head = json.dumps(part).encode()
    open("bad/" + file, "wb").write(struct.pack("<Q", len(head)) + head + body)
json.dump({"metadata": {"total_size": len(d)}, "weight_map": index}, open("bad/model.safetensors.index.json", "w"))
os.remove("bad/model.safetensors")
P
}
shards model
check 'three shards' 0 collect
rm -rf out1
rm bad/model-00002-of-00003.safetensors
refused 'a missing shard' 3 "model-00002-of-00003.safetensors" out1 collect
shards model && rm bad/model-0000*
refused 'no shard at all' 3 "model-0000[123]-of-00003.safetensors" out1 collect
shards model && cp bad/model-00003-of-00003.safetensors bad/model-00001-of-00003.safetensors
refused 'a shard under the name of another' 3 "model-00001-of-00003.safetensors" out1 collect
shards model && sed -i 's/model-00001-of-00003/..\/model-00001-of-00003/g' bad/model.safetensors.index.json
refused 'a shard outside the directory' 3 "model.safetensors.index.json" out1 collect

# ---- dtype and shape ----
damaged model && edit $file "h['$norm']['dtype'] = 'I16'"
refused 'a norm of integers' 3 "$norm.*expected.*(got|found)" out1 collect
damaged model && edit $file "h['$norm']['shape'] = [2, h['$norm']['shape'][0] // 2]"
refused 'a norm of two dimensions' 3 "$norm.*expected.*(got|found)" out1 collect
damaged model && edit $file 'w = h["model.layers.0.feed_forward.w1.weight"]; w["shape"] = w["shape"][::-1]'
refused 'a turned matrix' 3 "layers.0.feed_forward.w1.weight.*expected.*(got|found)" out1 collect
damaged model && edit $file "h['renamed'] = h.pop('$norm')"
refused 'a missing tensor' 3 "$norm" out1 collect

# ---- values that are not numbers ----
for where in "$norm" model.layers.0.attention.wqkv.weight model.tok_embeddings.weight; do
    damaged model && edit $file "at = h['$where']['data_offsets'][0]; d[at + 2:at + 4] = b'\\xc0\\x7f' if h['$where']['dtype'] == 'BF16' else b'\\x00\\x7e'"
    refused "NaN in $where" 3 "$where: element .*expected a finite number, got nan" out1 collect
    case $where in *tok_emb*) ;; *) # one row of the embedding: no token of the text
        refused "NaN in $where, perplexity" 3 'window 0: expected a finite loss, got nan' out1 \
            tm-run ppl bad --data text --window 64 --windows 2 -q ;;
    esac
done
refused 'NaN, to convert' 3 'embed.*NaN' out1 tm-convert bad -o out1 -q
refused 'NaN, to score' 3 'expected finite logits' out1 tm-run score bad --ids 0,1,2

# ---- a configuration that lies ----
config() { python3 -c 'import json, sys
c = json.load(open("bad/config.json")); exec(sys.argv[1]); json.dump(c, open("bad/config.json", "w"))' "$1"; }
for change in 'c["num_hidden_layers"] += 1' 'c["hidden_size"] *= 2' 'c["num_attention_heads"] = 3' \
    'c["vocab_size"] = 10**12' 'c["num_hidden_layers"] = -4' 'c["intermediate_size"] = "many"' \
    'c["rope_scaling"] = {"type": "guess", "factor": 2}'; do
    damaged model && config "$change"
    tests_code=3
    case $change in *guess*) tests_code=4 ;; esac
    refused "config: $change" $tests_code '.*' out1 collect
done

# ---- unknown family, .bin shards ----
for change in 'c["architectures"] = ["Unheard"]' 'del c["architectures"]; c["model_type"] = "unheard"' \
    'c["architectures"] = []; c["model_type"] = 7'; do
    damaged model && config "$change"
    tests_code=3
    case $change in *Unheard*) tests_code=4 ;; esac
    refused "family: $change" $tests_code 'config.json' out1 collect
done
bins() { damaged model && rm $file && touch bad/pytorch_model.bin; }
bins
refused 'weights as .bin' 4 'pytorch_model.bin.*safetensors' out1 collect
refused 'weights as .bin, to convert' 4 'pytorch_model.bin.*safetensors' out1 tm-convert bad -o out1 -q
refused 'weights as .bin, to run' 4 'pytorch_model.bin.*safetensors' out1 tm-run info bad
bins && rm bad/pytorch_model.bin && echo '{"weight_map":{"a":"pytorch_model-00001-of-00002.bin"}}' >bad/pytorch_model.bin.index.json
refused 'an index of .bin shards' 4 'pytorch_model.bin.index.json.*safetensors' out1 collect

# ---- vocabulary ----
damaged model && rm -f bad/tokenizer* && cp "$TMF_SOURCE"/datasets/demo/tokenizer* bad
refused 'the tokenizer of a model with more ids' 3 'vocab' out1 collect
damaged model && edit $file 'w = h["model.tok_embeddings.weight"]; w["shape"][0] -= 8; w["data_offsets"][1] -= 16 * w["shape"][1]'
refused 'an embedding of fewer rows' 3 'model.safetensors' out1 collect
damaged model && config 'c["vocab_size"] += 64'
refused 'more ids than the embedding has' 3 '(tok_embeddings|output).weight.*expected.*(got|found)' out1 collect

# ---- calibration texts: zstd, archives ----
zstd -q text -o whole.zst
data() { calib-collect model --data "$1" $windows -o out1 -q; }
head -c 3000 whole.zst >cut.zst
refused 'zstd cut short' 3 'cut.zst' out1 data cut.zst
cp whole.zst flipped.zst && printf '\377\377\377\377' | dd of=flipped.zst bs=1 seek=4000 conv=notrunc status=none
refused 'zstd with a damaged block' 3 'flipped.zst' out1 data flipped.zst
cp whole.zst check.zst && printf '\377\377' | dd of=check.zst bs=1 seek=$(($(stat -c %s check.zst) - 3)) conv=notrunc status=none
refused 'zstd whose checksum differs' 3 'check.zst' out1 data check.zst
for name in /etc/text ../text a/../../text; do
    python3 - "$name" <<'P'
import io, sys, tarfile
t = tarfile.open("names.tar.gz", "w:gz")
i = tarfile.TarInfo(sys.argv[1]); body = open("text", "rb").read(); i.size = len(body)
t.addfile(i, io.BytesIO(body)); t.close()
P
    refused "an archive with $name" 3 "names.tar.gz.*$name" out1 data names.tar.gz
done

# ---- outputs that cannot be written ----
for limit in 4 20 40; do
    refused "disk full after $limit KiB" 6 'out1' out1 \
        bash -c "ulimit -f $limit; exec calib-collect model --data text $windows -o out1 -q"
done
refused 'disk full, pack-w4' 6 'out1' out1 bash -c "ulimit -f 10; exec pack-w4 model --plan plan -o out1 -q"
refused 'disk full, tm-convert' 6 'out1' out1 bash -c "ulimit -f 10; exec tm-convert model -o out1 -q"
refused 'a folder that is not there' 6 'no/such' no/such calib-collect model --data text $windows -o no/such/out -q
refused 'a file as folder' 6 'text/out' text/out pack-w4 model --plan plan -o text/out -q
refused 'a system folder' 6 '/proc' /proc/out1 tm-convert model -o /proc/out1 -q
if [ "$(id -u)" -eq 0 ]; then
    skip 'unreadable and read-only files: the superuser may read and write everything'
else
    mkdir closed && chmod 555 closed
    refused 'a read-only folder' 6 'closed' closed/out calib-collect model --data text $windows -o closed/out -q
    refused 'a read-only folder, tm-convert' 6 'closed' closed/out tm-convert model -o closed/out -q
    damaged model && chmod 000 $file
    refused 'an unreadable model' 6 'model.safetensors' out1 collect
fi

# ---- artifacts of another parent ----
refused 'a calibration of another model' 3 'calib.*model' out1 awq-search other --calib calib --group-size 32 -o out1 -q
refused 'a plan of another model' 3 'plan.*model' out1 pack-w4 other --plan plan -o out1 -q
refused 'a plan as calibration' 3 'plan.*expected.*' out1 awq-search model --calib plan -o out1 -q
refused 'a calibration as plan' 3 'calib.*expected.*' out1 pack-w4 model --plan calib -o out1 -q
finish
