# calib-collect, awq-search, pack-w4: outputs, exit codes, what may be replaced, damaged and foreign inputs, resume.
. "$TMF_CLI/lib.sh"
PATH=$TMF_BIN/../tests:$PATH
for tool in calib-collect awq-search pack-w4 tm-run make_model; do
    command -v $tool >/dev/null || { fail "$tool is not built"; finish; }
done
for i in $(seq 4000); do echo "line $i of a text: $((i * 7919 % 1000)) and $((i * i % 977))"; done >text
check 'a model' 0 make_model --shape tiny-internlm2 --seed 1 model
check 'another model' 0 make_model --shape tiny-internlm2 --seed 2 other
windows='--data text --samples 16 --seqlen 64'

# poke FILE TENSOR BYTES OFFSET: overwrites bytes of a tensor in a safetensors file
poke() {
    python3 - "$@" <<'P'
import json, struct, sys
path, name, new, at = sys.argv[1], sys.argv[2], bytes.fromhex(sys.argv[3]), int(sys.argv[4])
b = bytearray(open(path, 'rb').read())
n, = struct.unpack('<Q', b[:8])
h = json.loads(b[8:8 + n])
at += 8 + n + h[name]['data_offsets'][0]
b[at:at + len(new)] = new
open(path, 'wb').write(b)
P
}

# ---- calib-collect ----
check 'no output' 2 calib-collect model --data text
err_has '^calib-collect: --output: expected a file name'
check 'no text' 2 calib-collect model -o calib
err_has '--data: expected a text, or --dataset self'
check 'unknown data set' 2 calib-collect model --data text --dataset imagenet -o calib
check 'bad pick' 2 calib-collect model --data text --pick last -o calib
check 'seqlen beyond the context' 2 calib-collect model --data text --seqlen 512 -o calib
err_has "--seqlen: expected up to the model's context of 256, got 512"
check 'no model' 6 calib-collect nowhere --data text -o calib
check 'no such text' 6 calib-collect model --data nothing -o calib
: >empty
check 'an empty text' 3 calib-collect model --data empty --samples 1 --seqlen 8 -o calib
err_has "empty"
head -c 30 text >short
for pick in first random; do
    check "a short text, $pick" 3 calib-collect model --data short --samples 16 --seqlen 64 --pick $pick -o calib -q
    err_lines 1
done
printf 'caf\351 \377 %.0s' $(seq 2000) >latin1
check 'a text that is not UTF-8' 3 calib-collect model --data latin1 --samples 1 --seqlen 8 -o calib
check 'no such folder' 6 calib-collect model $windows -o no/such/calib
check 'a place to write nothing in' 6 calib-collect model $windows -o /proc/calib
check 'a folder as output' 2 sh -c "mkdir folder && calib-collect model $windows -o folder"
check 'disk full' 6 bash -c "ulimit -f 40; calib-collect model $windows -o calib -q"
err_lines 1
absent calib
rm -rf calib.part
check 'dry run' 0 calib-collect model $windows -o calib --dry-run
out_has '^ +[0-9.]+ MB  hidden states and forward pass$'
out_has ' MB  in all$'
check 'dry run as JSON' 0 calib-collect model $windows -o calib --dry-run --json
out_json 'd["total"] == sum(d["memory"].values()) and d["total"] > 0'
absent calib

check 'collect' 0 calib-collect model $windows -o calib --json
out_json 'd["samples"] == 16 and d["seqlen"] == 64 and d["held_out"] == 2 and d["layers"] == 2 and not d["up_to_date"]'
err_has "^calib-collect: wrote 'calib': .*, 2 layers, 16 windows of 64 tokens$"
absent calib.part
absent calib.lock
cp calib first
stat -c %Y.%i calib >before
check 'again' 0 calib-collect model $windows -o calib --json
err_has "'calib' is up to date"
out_json 'd["up_to_date"]'
stat -c %Y.%i calib >after
same before after
check 'by force' 0 calib-collect model $windows -o calib --force --threads 1
same calib first
check 'three threads' 0 calib-collect model $windows -o calib --force --threads 3
same calib first
check "LMDeploy's names" 0 calib-collect model --data text --calib-samples 16 --calib-seqlen 64 --work-dir calib
err_has 'up to date'
check 'another seed is stale' 0 calib-collect model $windows -o calib --seed 7
cmp -s calib first; [ $? -eq 1 ]; verdict $? 'other windows'
check 'the first windows' 0 calib-collect model $windows --pick first -o calib
check 'back' 0 calib-collect model $windows -o calib
same calib first
grep -c "$PWD" calib >count
[ "$(cat count)" -eq 0 ]; verdict $? 'no path in the file'
echo notes >foreign
check 'a file of others' 2 calib-collect model $windows -o foreign
err_has "'foreign' exists and is no calib file of ours, use --force"
[ "$(cat foreign)" = notes ]; verdict $? 'it is untouched'
check 'its own text' 0 calib-collect model --dataset self --samples 4 --seqlen 32 -o self --json
out_json 'd["samples"] == 4'
check 'its own text again' 0 calib-collect model --dataset self --samples 4 --seqlen 32 -o self2 --threads 1
same self self2

# ---- awq-search ----
check 'no output' 2 awq-search model --calib calib
check 'no statistics' 2 awq-search model --method awq -o plan
err_has "method 'awq' needs --calib"
check 'unknown method' 2 awq-search model --calib calib --method nonesuch -o plan
err_has "'--method'.*rtn"
check 'unknown loss' 2 awq-search model --calib calib --loss l2 -o plan
check 'a loss without a search' 2 awq-search model --calib calib --method rtn --loss module -o plan
check 'a group of 48' 2 awq-search model --calib calib --group-size 48 -o plan
check 'three bits' 2 awq-search model --calib calib --w-bits 3 -o plan
err_has '[-]-w-bits: expected 4, got 3'
check 'a model of odd shape' 0 make_model --shape tiny-hd80 odd
check 'a group that does not divide' 4 awq-search odd --method rtn -o plan
err_has 'group 128 does not divide the 320 inputs of o'
check 'statistics of another model' 3 awq-search other --calib calib -o plan
err_has 'calib: made from model [0-9a-f]+, but this one is [0-9a-f]+$'
err_lines 1
check 'a plan as statistics' 3 sh -c 'awq-search model --method rtn -o rtn -q && awq-search model --calib rtn -o plan'
err_has "kind: expected 'calib', found 'plan'"
cp calib bad
poke bad layers.1.gate.blocks 01 5
check 'damaged statistics' 3 awq-search model --calib bad -o plan
err_has "bad: tensor 'layers.1.gate.blocks': expected digest [0-9a-f]+, found [0-9a-f]+$"
for cut in 0 7 400 100000; do
    head -c $cut calib >bad
    check "statistics cut at $cut bytes" 3 awq-search model --calib bad -o plan
    err_lines 1
done
check 'a text as statistics' 3 awq-search model --calib text -o plan
check 'no such statistics' 6 awq-search model --calib nothing -o plan
check 'no such folder' 6 awq-search model --calib calib -o no/such/plan
check 'a place to write nothing in' 6 awq-search model --calib calib -o /proc/plan
check 'disk full' 6 bash -c 'ulimit -f 10; awq-search model --calib calib --group-size 32 -o plan -q'
absent plan
rm -rf plan.part
check 'dry run' 0 awq-search model --calib calib -o plan --dry-run
out_has 'second moments$'
absent plan

for method in rtn lmdeploy awq best; do
    check "search $method" 0 awq-search model --calib calib --method $method -o plan-$method --json
    out_json "d['method'] == '$method' and d['layers'] == 2 and 0 < d['loss_after'] <= d['loss_before']"
    check "search $method with one thread" 0 awq-search model --calib calib --method $method -o again --threads 1 --force
    same again plan-$method
done
err_has '^awq-search: layer 1: loss [0-9.e+]+ -> [0-9.e+]+ \([0-9.]+ %\)$'
err_has "^awq-search: wrote 'again': .*, best, gram loss [0-9.e+]+ -> [0-9.e+]+ \([0-9.]+ %\)$"
check 'one moment at a time' 0 awq-search model --calib calib --gram-memory 0 -o again --force
same again plan-best
check 'best unasked, with a page' 0 awq-search model --calib calib -o plan-best --report page.html --json
out_json 'd["method"] == "best" and d["up_to_date"] and len(d["linears"]) == 2 * len({x["linear"] for x in d["linears"]})'
out_json 'all(x["range_kept"] > 0 for x in d["linears"]) and len(d["outliers"]) == 8 and d["predicted"] is None'
[ "$(grep -c '<svg' page.html)" = 2 ]; verdict $? 'two charts'
check 'a factorless method' 2 awq-search model --calib calib --method rtn --loss gram --kv-fold yes -o again
err_has "method 'rtn' takes no factors"
check 'the better basis of the residual stream' 0 awq-search model --calib calib --rotate residual -o plan-basis --json
out_json 'd["residual_stream"]["turned"] == (d["residual_stream"]["compared"]["kl_gain"] > d["residual_stream"]["compared"]["kl_gain_error"])'
err_has '^awq-search: residual stream: KL divergence on held-out windows [0-9.]+ nats, turned [0-9.]+: .*; it (stays as it is|is turned)$'
absent plan-basis.part
check 'the same with one thread' 0 awq-search model --calib calib --rotate residual -o again --threads 1 --force
same again plan-basis
check 'and there' 0 awq-search model --calib calib --rotate residual -o plan-basis --json
out_json 'd["up_to_date"] and d["residual_stream"]["compared"] is None'
check 'an unknown basis' 2 awq-search model --calib calib --rotate vo,all -o again
err_has "rotation 'all': expected none, vo, residual or vo,residual"
check 'a basis without a judge' 2 awq-search model --calib calib --method awq --rotate residual -o again
err_has "method 'awq' does not predict"
check 'factors alone' 0 pack-w4 model --plan plan-best -o folded --w-bits 16
check 'which is a 16-bit model' 0 tm-run info folded --json
out_json 'd["model"]["w4_group"] == 0'
check 'no 8 bits' 2 pack-w4 model --plan plan-best -o folded --w-bits 8
check 'again' 0 awq-search model --calib calib --method awq -o plan-awq
err_has "'plan-awq' is up to date: awq, gram loss"
check "LMDeploy's names" 0 awq-search model --calib calib --search-scale --w-bits 4 --w-group-size 128 --work-dir plan-awq
err_has 'up to date'
check 'module loss' 0 awq-search model --calib calib --method awq --loss module -o plan-module --json
out_json 'd["loss"] == "gram" and d["loss_after"] < d["loss_before"]'
check 'a file of others' 2 awq-search model --calib calib -o foreign

# ---- pack-w4 ----
check 'no plan' 2 pack-w4 model -o awq
check 'no output' 2 pack-w4 model --plan plan-awq
check "another model's plan" 3 pack-w4 other --plan plan-awq -o awq
err_has 'plan-awq: made from model [0-9a-f]+, but this one is [0-9a-f]+$'
check 'statistics as a plan' 3 pack-w4 model --plan calib -o awq
err_has "kind: expected 'plan', found 'calib'"
cp plan-awq bad
poke bad layers.0.o.zero 0f 3
check 'a damaged plan' 3 pack-w4 model --plan bad -o awq
err_has "bad: tensor 'layers.0.o.zero': expected digest"
for cut in 0 9 3000; do
    head -c $cut plan-awq >bad
    check "a plan cut at $cut bytes" 3 pack-w4 model --plan bad -o awq
    err_lines 1
done
check 'no such plan' 6 pack-w4 model --plan nothing -o awq
check 'no such folder' 6 pack-w4 model --plan plan-awq -o no/such/awq
check 'a place to write nothing in' 6 pack-w4 model --plan plan-awq -o /proc/awq
check 'disk full' 6 bash -c 'ulimit -f 100; pack-w4 model --plan plan-awq -o awq -q'
absent awq
check 'dry run' 0 pack-w4 model --plan plan-awq -o awq --dry-run --json
out_json 'd["total"] > 0'
absent awq

check 'pack' 0 pack-w4 model --plan plan-awq -o awq --json
out_json 'd["group_size"] == 128 and d["bytes"] > 0 and not d["up_to_date"]'
check 'again' 0 pack-w4 model --plan plan-awq -o awq
err_has "'awq' is up to date"
check 'with one thread' 0 pack-w4 model --plan plan-awq -o awq1 --threads 1
diff -r awq awq1 >/dev/null; verdict $? 'the same bytes'
check "another plan's directory is stale" 0 pack-w4 model --plan plan-rtn -o awq1
cmp -s awq/model.safetensors awq1/model.safetensors; [ $? -eq 1 ]; verdict $? 'other bytes'
check 'a folder of others' 2 pack-w4 model --plan plan-awq -o folder
check '4-bit weights as a model' 4 pack-w4 awq --plan plan-awq -o awq2
check 'a search of 4-bit weights' 4 awq-search awq --method rtn -o again --force
for name in model.layers.1.attention.wqkv model.layers.0.feed_forward.w2.qweight model.layers.0.ffn_norm.weight output.weight; do
    check "compare $name" 0 pack-w4 model --plan plan-awq -o awq --compare-tensor $name
    err_has "^pack-w4: $name: same bytes$"
done
check 'compare nothing' 2 pack-w4 model --plan plan-awq -o awq --compare-tensor model.layers.9.x
err_has "no tensor 'model.layers.9.x'"
poke awq/model.safetensors model.layers.0.feed_forward.w2.scales ff 40
check 'compare a changed tensor' 7 pack-w4 model --plan plan-awq -o awq --compare-tensor model.layers.0.feed_forward.w2.scales
err_has 'model.layers.0.feed_forward.w2.scales: element 20: byte 0: expected [0-9a-f]{2}, found ff'

# ---- NaN in the weights: one line that names the place ----
for part in attention.wqkv feed_forward.w2 attention_norm; do
    rm -rf nan && cp -r model nan
    poke nan/model.safetensors model.layers.1.$part.weight c07f 6
    check "NaN in $part" 3 calib-collect nan $windows -o nan.calib
    err_has "nan: model.layers.1.$part.weight: element .*3\]: expected a finite number, got nan"
    check "NaN in $part, search" 3 awq-search nan --method rtn -o nan.plan -q
    err_has "nan: model.layers.1.$part.weight: element .*3\]: expected a finite number, got nan"
    absent nan.calib
    rm -rf nan.calib.part nan.plan nan.plan.part
done

# ---- stopped anywhere, then the same command: the same bytes ----
big='--data text --samples 200 --seqlen 256'
check 'a deeper model' 0 make_model --shape tiny-internlm2 --layers 6 deep
check 'unbroken' 0 calib-collect deep $big --pick first -o whole -q
check 'unbroken search' 0 awq-search deep --calib whole --method awq -o whole.plan -q
stops=0
set -m
begun() { compgen -G 'broken*' >/dev/null || ! kill -0 $pid 2>/dev/null; }
stop_after() { # SECONDS since it writes, COMMAND ...
    local seconds=$1 code=0 pid
    shift
    "$@" >out 2>err </dev/null &
    pid=$!
    until_true begun # what is stopped before has nothing to go on from
    sleep "$seconds"
    kill -INT $pid 2>/dev/null
    wait $pid || code=$?
    [ $code -eq 8 ] && stops=$((stops + 1))
    [ $code -eq 0 ] || [ $code -eq 8 ]
    verdict $? "stopped after $seconds s" "exit $code: $*"
}
for seconds in 0 0.2 0.5; do
    stop_after $seconds calib-collect deep $big --pick first -o broken
    check 'and again' 0 calib-collect deep $big --pick first -o broken
    same broken whole
    rm -rf broken*
    stop_after $seconds awq-search deep --calib whole --method awq -o broken.plan
    check 'and again' 0 awq-search deep --calib whole --method awq -o broken.plan
    same broken.plan whole.plan
    rm -rf broken*
done
set +m
[ $stops -gt 0 ]; verdict $? 'some runs were stopped' "$stops"
check 'one run at a time' 6 bash -c "exec 9>locked.lock; flock 9; calib-collect model $windows -o locked"
finish
