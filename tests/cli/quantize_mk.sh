# scripts/quantize.mk: nothing twice, true dependencies, whole outputs, kills and parallel runs.
. "$TMF_CLI/lib.sh"
PATH=$TMF_BIN/../tests:$PATH
mk=$TMF_SOURCE/scripts/quantize.mk
command -v make >/dev/null || { skip 'make is missing'; exit 77; }
for tool in calib-collect awq-search pack-w4 tm-convert tm-run make_model; do
    command -v $tool >/dev/null || { fail "$tool is not built"; finish; }
done
check 'a model' 0 make_model --shape tiny-internlm2 --dtype bf16 model
for i in $(seq 400); do echo "line $i of a text with words enough for sixteen windows"; done >text.txt

build() { make -f "$mk" MODEL=model OUT=made DATA=text.txt SAMPLES=16 SEQLEN=64 "$@"; }
times() { find made -type f -printf '%p %T@\n' | sort; }
digest() { sed -n 's/.*"sha256":.*"\([0-9a-f]*\)".*/\1/p' "$1/manifest.json"; }

check 'no model' 2 make -f "$mk" OUT=made
err_has 'MODEL: expected a model directory'
check 'no output' 2 make -f "$mk" MODEL=model
err_has 'OUT: expected a directory'
check 'not a model' 2 make -f "$mk" MODEL=/nowhere OUT=made
err_has "'/nowhere' has no config.json"
check 'no data' 2 build DATA=none.txt
err_has "no file 'none.txt'"
absent made

check 'dry run' 0 build -n
out_has '^calib-collect model --data text.txt --samples 16'
absent made
check 'question before' 1 build -q
absent made
check 'first run' 0 build
for f in calib plan awq/manifest.json workspace/manifest.json; do
    [ -s "made/$f" ]; verdict $? "first run: $f is there"
done
check 'the workspace is whole' 0 tm-run info made/workspace --json
out_json 'd["manifest"]["verified"] and d["model"]["w4_group"] == 128'
first=$(digest made/workspace)
[ -n "$first" ]; verdict $? 'a digest is found'

times >before
check 'second run' 0 build
out_has 'Nothing to be done'
err_lines 0
times >after
same before after
check 'question after' 0 build -q

# A newer input of the same content: the tools look, nothing is written, the next run is quiet again.
touch -d '+2 seconds' text.txt
touch -d '+1 seconds' model/config.json
check 'question with a newer input' 1 build -q
sleep 2.2
check 'newer input, same content' 0 build
err_has "'made/workspace' is up to date"
check 'and then nothing' 0 build -q
[ "$(digest made/workspace)" = "$first" ]; verdict $? 'same workspace'

# Options count as inputs.
check 'dry run with another method' 0 build -n METHOD=rtn
out_has '^awq-search model --method rtn'
check 'which changes nothing' 0 build -q
check 'another method' 0 build METHOD=rtn
[ "$(digest made/workspace)" != "$first" ]; verdict $? 'another workspace'
check 'kept' 0 build -q METHOD=rtn
check 'threads do not count' 0 build -q METHOD=rtn THREADS=1
check 'back' 0 build
[ "$(digest made/workspace)" = "$first" ]; verdict $? 'the first workspace again'
rm -r made/awq
check 'a missing step is made again' 0 build
[ -s made/awq/manifest.json ]; verdict $? 'awq is there again'
[ "$(digest made/workspace)" = "$first" ]; verdict $? 'the first workspace still'

check 'group of 64 stops at the awq directory' 0 build GROUP=64
check 'info of that' 0 tm-run info made/awq --json
out_json 'd["kind"] == "awq" and d["model"]["w4_group"] == 64'
check 'asked for a workspace of it' 2 build GROUP=64 workspace
err_has 'TurboMind loads 128 only'

# Killed at many moments: what has its final name is whole, and the run after completes the same bytes.
rm -rf made
for after in 0.02 0.05 0.1 0.15 0.2 0.3 0.4 0.6 0.9 1.3 1.7; do
    timeout -s KILL "$after" make -f "$mk" MODEL=model OUT=made DATA=text.txt SAMPLES=16 SEQLEN=64 >log 2>&1
    for kind in calib plan awq workspace; do
        [ -e made/$kind ] || continue
        tm-run info made/$kind >info 2>&1
        verdict $? "killed after $after s: $kind is whole" "$(tail -n 1 info)"
    done
done 2>/dev/null
check 'after the kills' 0 build
[ "$(digest made/workspace)" = "$first" ]; verdict $? 'same workspace after kills'
# A kill between the last rename and the end leaves a lock or layers beside a finished file: the tool's next
# run takes them away.
check 'every tool once more' 0 build -B
[ -z "$(find made -name '.*.tmp*' -o -name '*.lock' -o -name '*.part' | head -n 1)" ]; verdict $? 'no litter' "$(ls -A made)"

# Parallel: -j2, and two makes on one folder (one may find the other's lock, none may spoil anything).
rm -rf made
check 'with -j2' 0 build -j2 all awq plan
[ "$(digest made/workspace)" = "$first" ]; verdict $? 'same workspace with -j2'
rm -rf made
build >log1 2>&1 &
build >log2 2>&1 &
wait
check 'after two at once' 0 build
[ "$(digest made/workspace)" = "$first" ]; verdict $? 'same workspace after two at once'
check 'which is whole' 0 tm-run info made/workspace
finish
