# tm-run client against a stand-in server: how a stream may be cut, how it may fail, and how Ctrl-C ends it.
. "$TMF_CLI/lib.sh"
export XDG_STATE_HOME=$PWD/state
unset TM_RUN_API_KEY

serve() { # [NAME=VALUE]: starts the stand-in, $url is where it is
    rm -f port
    env "$@" python3 "$TMF_SOURCE/tests/support/chat_server.py" port &
    server=$!
    until_true [ -s port ]
    url=127.0.0.1:$(cat port)
}
stop() { kill "$server" 2>/dev/null; wait "$server" 2>/dev/null; }
trap stop EXIT
serve TMF_NONE=1
whole=$'the answer is \xc3\xa9t\xc3\xa9 \xf0\x9f\x8c\x8d.'

check 'an answer' 0 tm-run client "$url" -p hello
out_is "$whole"
err_lines 0
check 'an address as others write it' 0 tm-run client "http://$url/v1/" -p hello --stats
out_is "$whole"
err_has '11 tokens read in .* 5 written .* context 16 tokens'
check 'a stream in pieces of seven bytes' 0 tm-run client "$url" -p pieces
out_is "$whole"
check 'CR LF, comments, other fields' 0 tm-run client "$url" -p crlf
out_is "$whole"
check 'one event of 300 kB' 0 tm-run client "$url" -p long
[ "$(wc -c <out)" -eq 300001 ]
verdict $? 'all of it'
check 'U+0000 in an answer' 0 tm-run client "$url" -p nul
out_is $'a\xef\xbf\xbdb \\u0000 \xef\xbf\xbd\\\xef\xbf\xbd.'
check 'standard input behind -p' 0 bash -c "echo slow is not asked | tm-run client $url -p 'no,'"
out_is "$whole"
check 'events' 0 tm-run client "$url" -p hello --json
python3 - <<'P'
import json
rows = [json.loads(l) for l in open("out", encoding="utf-8")]
assert [r["event"] for r in rows] == ["start"] + 5 * ["token"] + ["end"], rows
assert "".join(r["text"] for r in rows if r["event"] == "token") == "the answer is \u00e9t\u00e9 \U0001f30d."
assert rows[-1]["finish_reason"] == "stop" and rows[-1]["prompt_tokens"] == 11 and rows[-1]["new_tokens"] == 5
P
verdict $? 'the events make the answer'

check 'what is not said is left to the server' 0 tm-run client "$url" -p parameters
out_json 'd == {"model": "echo", "stream_options": {"include_usage": True}}'
check 'options' 0 tm-run client "$url" -p parameters --model other -t 0.5 --top-k 3 --top-p 0.9 --min-p 0.1 \
    --repetition-penalty 1.1 --presence-penalty 0.2 --frequency-penalty -0.3 --seed 7 --max-new-tokens 9 --stop END
out_json 'd == {"model": "other", "temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "seed": 7,
    "repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": -0.3, "max_tokens": 9,
    "stop": ["END"], "stream_options": {"include_usage": True}}'
printf '%s\n' '{"role":"user","content":"a"}' '{"role":"assistant","content":"b"}' >talk.jsonl
check 'a conversation' 0 tm-run client "$url" --load talk.jsonl --meta-instruction 'be kind' -p messages
out_json '[(m["role"], m["content"]) for m in d] == [("system", "be kind"), ("user", "a"),
    ("assistant", "b"), ("user", "messages")]'

check 'refused' 1 tm-run client "$url" -p refuse
err_has 'status 429: queue_full: the queue is full$'
check 'an error inside the stream' 6 tm-run client "$url" -p break
out_is 'the answer '
err_has 'the answer failed: internal_error: the device failed$'
check 'a connection that breaks' 6 tm-run client "$url" -p drop
check 'no stream at all' 3 tm-run client "$url" -p wrong
err_has 'expected a stream of events'
check 'nobody there' 6 tm-run client 127.0.0.1:1 -p hello
err_has 'http://127.0.0.1:1: '
check 'another scheme' 2 tm-run client ftp://host -p hello
check 'empty question' 2 tm-run client "$url"

tm-run client "$url" -p slow >out 2>err </dev/null &
client=$!
until_true [ -s out ]
kill -INT $client
code=0
wait $client || code=$?
[ $code -eq 130 ]
verdict $? 'an interrupt ends the answer' "exit $code"
until_true [ -s port.log ]
[ "$(cat port.log 2>/dev/null)" = left ]
verdict $? 'and closes the connection'

cat >talk.py <<'P'
import os, pty, re, signal, sys, termios, time
pid, fd = pty.fork()
if pid == 0:
    os.environ.update(TERM="xterm", LC_ALL="C.UTF-8")
    os.execvp("tm-run", ["tm-run", "client", sys.argv[1], "--no-history"])
signal.alarm(200)
seen = b""
def expect(what):
    global seen
    while not (m := re.search(what, seen, re.S)):
        seen += os.read(fd, 65536)
    seen = seen[m.end():]
def prompt():
    expect(rb"> ")
    while termios.tcgetattr(fd)[3] & termios.ICANON:  # a key typed before the editor has the terminal is lost
        time.sleep(0.005)
prompt()
os.write(fd, b"slow\r")
expect(rb"the the the")
os.write(fd, b"\x03")
expect(rb"\[stopped\]")
prompt()
os.write(fd, b"refuse\r")
expect(rb"status 429: queue_full")
prompt()
os.write(fd, b"/set temperature 0.25\r")
expect(rb"temperature is 0.25")
prompt()
os.write(fd, b"/set top-k\r")
expect(rb"top-k is server's")
prompt()
os.write(fd, b"/undo\r")
expect(rb"the last turn is gone, 0 left")
prompt()
os.write(fd, b"unsafe\r")
expect(rb"a\?\[31mb\?\?c")
prompt()
os.write(fd, b"/show\r")
expect(rb"model 'echo'")
prompt()
os.write(fd, b"\x04")
_, status = os.waitpid(pid, 0)
sys.exit(os.waitstatus_to_exitcode(status))
P
check 'a conversation in the terminal' 0 python3 talk.py "$url"

stop
serve TMF_KEY=secret-1
printf '# ours\n\n secret-1 \nsecret-3\n' >key
printf 'secret-2' >other
printf 'two words\n' >bad
check 'a key' 0 tm-run client "$url" --api-key-file key -p hello
check 'a key of the environment' 0 env TM_RUN_API_KEY=secret-1 tm-run client "$url" -p hello
check 'no key' 3 tm-run client "$url" -p hello
err_has 'status 401: invalid_api_key: the key is not known'
check 'a wrong key' 3 tm-run client "$url" --api-key-file other -p hello
check 'no key at all' 3 tm-run client "$url" --api-key-file bad -p hello
grep -q 'two' err
[ $? -ne 0 ]
verdict $? 'keys are not shown'
finish
