# Sourced by the scripts of this folder. TMF_BIN is the folder of the built tools, TMF_SHARED that of the
# third-party test data (it may be missing), TMF_SOURCE the project's root; the script runs in a fresh
# folder of its own, which is removed behind it.
#
#   check NAME CODE COMMAND ...   runs the command: its stdout is in ./out, its stderr in ./err
#   out_is TEXT | out_has REGEX | err_has REGEX | err_lines N | out_json PYTHON   about that command
#   absent PATH | same FILE FILE                                                  about files
#   until_true COMMAND ...        waits until it succeeds, for a minute; its status
#   catches PID NUMBER            whether the process has a handler for that signal
#   skip REASON                   says out loud that something is not tested here
#   finish                        last line: fails the script if a check failed
#
# One "ok" or "not ok" line a check.
set -u
export LC_ALL=C
tests_failed=0
tests_name=
PATH=$TMF_BIN:$PATH

pass() { printf 'ok - %s\n' "$1"; }
fail() {
    printf 'not ok - %s\n' "$1"
    tests_failed=$((tests_failed + 1))
}
verdict() { # STATUS NAME [DETAIL]
    if [ "$1" -eq 0 ]; then pass "$2"; else
        fail "$2${3:+ ($3)}"
        sed 's/^/#   /' err | tail -n 5
    fi
}
check() {
    tests_name=$1
    local want=$2 code=0
    shift 2
    "$@" >out 2>err </dev/null || code=$?
    [ "$code" -eq "$want" ]
    verdict $? "$tests_name" "exit $code, expected $want: $*"
}
out_is() { [ "$(cat out)" = "$1" ]; verdict $? "$tests_name: stdout is '$1'" "got '$(head -c 300 out)'"; }
out_has() { grep -qE -- "$1" out; verdict $? "$tests_name: stdout has '$1'" "got '$(head -c 300 out)'"; }
err_has() { grep -qE -- "$1" err; verdict $? "$tests_name: stderr has '$1'"; }
err_lines() { [ "$(wc -l <err)" -eq "$1" ]; verdict $? "$tests_name: $1 line(s) on stderr"; }
# out_json 'd["ppl"] < 20': stdout is one JSON document d, and the expression holds
out_json() {
    python3 -c 'import json,math,sys
d = json.load(open("out"))
sys.exit(not eval(sys.argv[1]))' "$1" 2>>err
    verdict $? "$tests_name: $1" "got '$(head -c 300 out)'"
}
absent() { [ ! -e "$1" ]; verdict $? "$tests_name: no $1"; }
same() { cmp -s "$1" "$2"; verdict $? "$tests_name: $1 and $2 are equal"; }
until_true() {
    local i
    for i in $(seq 3000); do "$@" && return 0 || sleep 0.02; done
    return 1
}
catches() {
    local mask
    mask=$(sed -n 's/^SigCgt:[[:space:]]*//p' "/proc/$1/status" 2>/dev/null)
    [ -n "$mask" ] && [ $((0x$mask >> ($2 - 1) & 1)) -eq 1 ]
}
skip() { printf 'SKIP - %s\n' "$1"; }
finish() { exit $((tests_failed > 0)); }
