# tm-run bench-serve against a stand-in server: what is sent, counted and timed.
. "$TMF_CLI/lib.sh"
unset TM_RUN_API_KEY
python3 "$TMF_SOURCE/tests/support/chat_server.py" port &
server=$!
trap 'kill $server; wait $server 2>/dev/null' EXIT
until_true [ -s port ]
url=127.0.0.1:$(cat port)

check 'closed loop' 0 tm-run bench-serve "$url" -c 4 -n 12 --warmup 4 --new-tokens 20 --json
out_json 'd["sent"] == d["ok"] == 12 and d["failed"] == 0 and d["errors"] == [] and d["concurrency"] == 4'
out_json 'd["new_tokens"] == 240 and d["prompt_tokens"] == 132 and d["ended_by_length"] == 12'
out_json 'd["inter_token_ms"]["count"] == 12 * 19 and d["ttft_ms"]["count"] == d["e2e_ms"]["count"] == 12'
out_json 'all(0 < d[k]["p50"] <= d[k]["p90"] <= d[k]["p99"] <= d[k]["max"] for k in ("ttft_ms", "e2e_ms"))'
out_json 'abs(d["new_tokens_per_second"] * d["wall_seconds"] - 240) < 1e-6 and d["client_cpu_seconds"] > 0'
check 'as a table' 0 tm-run bench-serve "$url" -c 2 -n 4 --new-tokens 5
out_has '^requests +4 ok, 0 failed'
out_has '^first token +[0-9.]+ +[0-9.]+'
out_has '^this client took [0-9.]+ % of a core'
check 'open loop' 0 tm-run bench-serve "$url" -r 100 -d 0.5 --new-tokens 3 --json
out_json 'd["rate"] == 100 and 5 < d["ok"] < 110 and d["wall_seconds"] > 0.05'
check 'another seed' 0 tm-run bench-serve "$url" -r 100 -n 20 --new-tokens 3 --json --seed 5
check 'chat' 0 tm-run bench-serve "$url" -n 2 -c 1 --route chat --json
out_json 'd["ok"] == 2 and d["new_tokens"] == 10'

printf '%s\n' 'hello' '' 'break' 'refuse' 'drop' >prompts.txt
check 'a file, and failures by status' 0 tm-run bench-serve "$url" --prompts prompts.txt -n 8 -c 2 --json
out_json 'd["ok"] == 2 and d["failed"] == 6'
out_json '{e["status"]: e["count"] for e in d["errors"]} == {200: 2, 429: 2, 0: 2}'
out_json 'd["refused_ms"]["count"] == 2 and "the device failed" in str(d["errors"])'
printf 'nul\n' >prompts.txt
check 'U+0000 in answers' 0 tm-run bench-serve "$url" --prompts prompts.txt -n 2 --json
out_json 'd["ok"] == 2 and d["new_tokens"] == 6'
printf '%s\n' '{"messages": [{"role": "user", "content": "x"}]}' '{"prompt": "y"}' '{"prompt": [1, 2]}' >p.jsonl
check 'rows of three kinds' 0 tm-run bench-serve "$url" --prompts p.jsonl -n 3 --new-tokens 4 --json
out_json 'd["ok"] == 3'
printf '%s\n' '{"messages": []}' '{"text": "y"}' >p.jsonl
check 'a row of another kind' 3 tm-run bench-serve "$url" --prompts p.jsonl
err_has "'p.jsonl': line 2: expected "
printf 'refuse\n' >prompts.txt
check 'nothing is answered' 7 tm-run bench-serve "$url" --prompts prompts.txt -n 3
err_has 'not one of 3 requests was answered: .*queue_full'
printf 'slow\n' >prompts.txt
check 'an interrupt' 124 timeout -s INT 4 tm-run bench-serve "$url" --prompts prompts.txt -n 3 -c 3 --json
out_json 'd["sent"] == 3 and d["ok"] == 0'
check 'nobody there' 6 tm-run bench-serve 127.0.0.1:1

# The two on a real server: the terminal's answer, and prompts of an exact length as the server counts them.
tm-run serve "$TMF_SOURCE/datasets/demo" --server-port 0 2>served &
trap 'kill $server $!; wait $server $! 2>/dev/null' EXIT
until_true grep -q 'listening on' served
url=$(sed -nE 's/.*listening on (http[^ ]*).*/\1/p' served)
for _ in $(seq 600); do tm-run client "$url" -p hello >/dev/null 2>&1 && break; sleep 0.05; done
check 'tm-run client on tm-run serve' 0 tm-run client "$url" -t 0 -p 'What is 17 + 25?'
out_is '17 + 25 = 42.'
check 'and tm-run bench-serve' 0 tm-run bench-serve "$url" -c 4 -n 12 --prompt-tokens 37 --new-tokens 11 --json
out_json 'd["ok"] == 12 and d["prompt_tokens"] == 12 * 37 and d["new_tokens"] == 12 * 11 == 11 * d["ended_by_length"]'
check 'the same prompts from the cache' 0 tm-run bench-serve "$url" -c 1 -n 4 --prompt-tokens 200 --shared-prompt \
    --new-tokens 4 --json
out_json 'd["cached_tokens"] >= 3 * 128'
finish
