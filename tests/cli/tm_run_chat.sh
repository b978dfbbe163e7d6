# tm-run chat without a terminal: one answer to standard input. The terminal is test_chat_tty's.
. "$TMF_CLI/lib.sh"
demo=$TMF_SOURCE/datasets/demo
export XDG_STATE_HOME=$PWD/state

check 'standard input is the question' 0 bash -c "printf 'What is 17 + 25?\n' | tm-run chat '$demo' -t 0"
out_is '17 + 25 = 42.'
err_lines 0
check '-p and nothing behind it' 0 tm-run chat "$demo" -t 0 -p 'What is 17 + 25?'
out_is '17 + 25 = 42.'
check '-p with standard input behind it' 0 bash -c "printf '25?' | tm-run chat '$demo' -t 0 -p 'What is 17 +' --stats"
err_has '[0-9]+ tokens read in [0-9.]+ s, [0-9]+ written at [0-9.]+ tokens/s; context [0-9]+ of 1024 tokens'
check 'events' 0 tm-run chat "$demo" -t 0 -p 'What is 17 + 25?' --json
python3 - >joined <<'P'
import json
rows = [json.loads(l) for l in open("out")]
assert rows[0] == {"event": "start"} and rows[-1]["event"] == "end", rows
assert rows[-1]["finish_reason"] == "stop" and rows[-1]["new_tokens"] == len(rows) - 2
print("".join(r["text"] for r in rows if r["event"] == "token"))
P
[ "$(cat joined)" = '17 + 25 = 42.' ]
verdict $? 'the events make the answer'
check 'a system text' 0 tm-run chat "$demo" -t 0 --meta-instruction 'You are a helpful assistant.' -p hello --json
tail -n 1 out >end && mv end out
out_json 'd["event"] == "end" and d["prompt_tokens"] > 20'
check 'cut answer' 0 tm-run chat "$demo" -t 0 -p 'What is 17 + 25?' --max-new-tokens 3
err_has 'cut at 3 tokens'
check 'no history without a terminal' 0 tm-run chat "$demo" -t 0 -p hello
absent state

cat >talk.jsonl <<'J'
{"role": "user", "content": "Remember this. The code of Anna is 4821. The code of Ben is 9377."}
{"role": "assistant", "content": "I will remember it."}
J
check 'going on from a file' 0 tm-run chat "$demo" -t 0 --load talk.jsonl -p 'What is the code of Ben?'
out_is 'The code of Ben is 9377.'
printf '{"role":"assistant","content":"x"}\n' >bad.jsonl
check 'a file that begins with an answer' 3 tm-run chat "$demo" --load bad.jsonl -p hello
err_has "'bad.jsonl': line 1: "
printf '{"role":"user","content":"x"}\n' >bad.jsonl
check 'a file that ends with a question' 3 tm-run chat "$demo" --load bad.jsonl -p hello
printf '{"role":"user"' >bad.jsonl
check 'a file that is cut' 3 tm-run chat "$demo" --load bad.jsonl -p hello

check 'empty question' 2 tm-run chat "$demo"
err_has 'the prompt is empty'
check 'question beyond the session' 5 tm-run chat "$demo" -p 'What is 17 + 25?' --session-len 8
err_has 'the session is full'
check 'answer beyond the session' 0 tm-run chat "$demo" -t 0 -p 'What is 17 + 25?' --session-len 25
err_has 'the session of 25 tokens is full: /clear begins anew'
check 'unknown template' 2 tm-run chat "$demo" -p hello --chat-template nope
check 'dry run' 0 tm-run chat "$demo" --dry-run --json
out_json 'd["memory"]["kv cache"] == 1024 * 8 * 2 * 128 * 2'
finish
