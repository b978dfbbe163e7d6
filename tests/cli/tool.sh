# The shared main: exit codes, messages, signals, progress, version, completion.
. "$TMF_CLI/lib.sh"
PATH=$TMF_BIN/../tests:$PATH
command -v tool_probe >/dev/null || { fail 'tool_probe is not built'; finish; }

# The table of exit codes: err_code, code.
for row in 0:0 1:2 2:3 3:6 4:5 5:3 6:4 7:1 8:1 9:5 10:7; do
    check "err_code ${row%:*}" "${row#*:}" tool_probe fail --code "${row%:*}" --text 'some reason'
    [ "${row%:*}" = 0 ] || { err_lines 1; err_has '^tool_probe: some reason'; }
done

check 'help of the tool' 0 tool_probe --help
out_has '^  steps +makes slow steps'
check 'help of a command' 0 tool_probe show --help
out_has '^      --threads N'
out_has '--isa NAME .*auto\|ref\|avx2\|avx512\|amx'
[ "$(wc -L <out)" -le 100 ]; verdict $? 'help fits 100 columns'
check 'help of a single tool' 0 tool_probe1 --help
out_has '^usage: tool_probe1 \[options\]'
check 'no command' 2 tool_probe
err_has "missing command \(try 'tool_probe --help'\)"
check 'unknown command' 2 tool_probe nope
err_has "unknown command 'nope'"
check 'unknown option' 2 tool_probe steps --stepz 3
err_has "unknown option '--stepz' \(did you mean '--steps'\?\) \(try 'tool_probe steps --help'\)"
err_lines 1
check 'bad value' 2 tool_probe steps --steps many
err_has "'--steps': expected an integer, got 'many'"
check 'unexpected argument' 2 tool_probe show there
check 'missing argument' 2 tool_probe shrink

check 'version' 0 tool_probe --version
out_has '^tool_probe \(tmforge\) [0-9]+\.[0-9]+\.[0-9]+$'
out_has '^licence: Apache-2.0$'
out_has '^backends: cpu'
for form in '--version --json' 'show --version --json'; do
    check "$form" 0 tool_probe $form
    out_json 'd["package"] == "tmforge" and d["backends"].startswith("cpu")'
done

check 'shared options' 0 tool_probe show --threads 3 --seed 9 --device cuda:1 --isa ref --json -n
out_json 'd == {"threads":3,"seed":9,"device":1,"index":1,"isa":"ref","json":True,"dry_run":True}'
for bad in gpu cuda: cuda:x cuda:-1 cuda:1x cudax; do
    check "device $bad" 2 tool_probe show --device "$bad"
done

# Progress and notes stay on stderr; levels as asked.
check 'notes' 0 tool_probe steps
out_is ''
err_lines 2
err_has '^tool_probe: warning: a warning$'
check 'quiet' 0 tool_probe steps -q
err_lines 0
check 'verbose' 0 tool_probe steps -v
err_has '^tool_probe: a detail$'
now_ms() { echo $(($(date +%s%N) / 1000000)); }
begin=$(now_ms)
check 'json progress' 0 tool_probe steps --progress json --steps 50 --ms 10 -q
allowed=$((($(now_ms) - begin) * 6 / 1000 + 3)) # 6 a second, the first and the last
tail -n 1 err >out
out_json 'd["done"] == 50 and d["total"] == 50 and d["rate"] > 0 and d["eta_s"] == 0'
[ "$(wc -l <err)" -le $allowed ]; verdict $? "json progress: at most $allowed lines" "$(wc -l <err)"
if script -qec true /dev/null >/dev/null 2>&1 </dev/null; then
    begin=$(now_ms)
    check 'progress on a terminal' 0 env TERM=xterm script -qec 'tool_probe steps --steps 200 --ms 10' /dev/null
    out_has 'probing: step [0-9]+/200 \([0-9]+ %\), [0-9.]+ step/s, 0:0[0-9] elapsed, 0:0[0-9] left'
    tr '\r' '\n' <out | grep -c 'probing' >count
    allowed=$((($(now_ms) - begin) * 6 / 1000 + 3))
    [ "$(cat count)" -le $allowed ]; verdict $? "at most $allowed redraws" "$(cat count)"
    check 'dumb terminal' 0 env TERM=dumb script -qec 'tool_probe steps --steps 100 --ms 10' /dev/null
    grep -q probing out; [ $? -eq 1 ]; verdict $? 'no redraws on a dumb terminal'
else
    skip 'no terminal by script(1): progress on one is not tested'
fi

# Signals. A background job of a script ignores SIGINT unless job control is on.
set -m
signal_case() { # NAME SIGNAL CODE ARGS...
    tests_name=$1
    local signal=$2 want=$3 code=0
    shift 3
    : >err
    tool_probe steps --steps 2000 --ms 5 --progress json "$@" >out 2>err </dev/null &
    local pid=$!
    until_true [ -s err ] # its handlers stand, and it works
    kill -s "$signal" "$pid"
    wait "$pid" || code=$?
    [ "$code" -eq "$want" ]
    verdict $? "$tests_name" "exit $code, expected $want"
}
signal_case 'SIGINT' INT 130
err_has '^tool_probe: stopped$'
signal_case 'SIGTERM' TERM 143
signal_case 'SIGINT with a checkpoint' INT 8 --resumable
err_has '^tool_probe: stopped; the same command goes on from here$'
signal_case 'SIGUSR1 is no end' USR1 0 --steps 400
signal_case 'an interrupt taken back' INT 0 --steps 400 --take
err_has 'took an interrupt'
tests_name='SIGUSR1 shows progress'
tool_probe steps --steps 150 --ms 20 >out 2>err </dev/null &
pid=$!
until_true catches $pid 10
kill -USR1 $pid; wait $pid
err_has 'probing: step [0-9]+/150'
tests_name='two SIGINTs end it at once'
tool_probe steps --steps 1 --ms 60000 >out 2>err </dev/null &
pid=$!
until_true catches $pid 2 && kill -INT $pid
caught() { ! catches $pid 2; } # the first takes the handler away
until_true caught
kill -INT $pid 2>/dev/null
code=0; wait $pid || code=$?
[ $code -eq 130 ]; verdict $? "$tests_name" "exit $code"
err_lines 0 # it has not come to say that it was stopped
set +m

# Standard output: full, closed, a pipe that nobody reads.
check '/dev/full' 6 sh -c 'tool_probe print --bytes 100 >/dev/full'
err_has '^tool_probe: cannot write to standard output: No space left on device$'
check 'help to /dev/full' 6 sh -c 'tool_probe --help >/dev/full'
check 'closed stdout' 6 sh -c 'tool_probe print --bytes 100 >&-'
check 'closed pipe' 0 bash -c 'tool_probe print --bytes 1000000 | head -n 1 >/dev/null; [ ${PIPESTATUS[0]} -eq 141 ]'
err_lines 0
check 'closed pipe, SIGPIPE ignored by the parent' 0 \
    bash -c 'trap "" PIPE; tool_probe print --bytes 1000000 | head -n 1 >/dev/null; [ ${PIPESTATUS[0]} -eq 141 ]'

# Outputs.
check 'write' 0 tool_probe write -o result --bytes 8192
err_has "^tool_probe: wrote 'result': 8.19 KB in 0:00, probe$"
check 'write again' 2 tool_probe write -o result --bytes 8192
err_has "^tool_probe: output 'result' exists, use --force to replace it$"
check 'write with --force' 0 tool_probe write -o result --bytes 4096 --force
[ "$(stat -c %s result)" -eq 4096 ]; verdict $? 'the result was replaced'
check 'file size limit' 6 bash -c 'ulimit -f 100; tool_probe write -o big --bytes 1000000'
err_has "cannot write 'big': File too large"
absent big
check 'no directory' 6 tool_probe write -o no/such/file
check 'an input that shrinks' 6 tool_probe shrink result
err_has '^tool_probe: an input file shrank while it was read'

for shell in bash zsh fish; do
    for tool in tool_probe tool_probe1; do
        check "completion $tool $shell" 0 $tool --completion $shell
        [ -s out ]; verdict $? "completion $tool $shell says something"
        if command -v $shell >/dev/null; then
            cp out script
            check "completion $tool $shell parses" 0 $shell -n script
        fi
    done
done
check 'completion of a command' 0 tool_probe show --completion bash
check 'unknown shell' 2 tool_probe --completion tcsh
finish
