# tm-run generate: ways to give a prompt, ends of an answer, sampling, errors.
. "$TMF_CLI/lib.sh"
demo=$TMF_SOURCE/datasets/demo

check 'greedy chat' 0 tm-run generate "$demo" --chat --prompt 'What is 17 + 25?' --temperature 0 --json
out_json 'd["text"] == "17 + 25 = 42." and d["finish_reason"] == "stop" and d["ids"][-1] == 4094'
out_json 'd["new_tokens"] == len(d["ids"]) and d["prompt_tokens"] == 22'
check 'text alone' 0 tm-run generate "$demo" --chat --prompt 'What is 17 + 25?' --temperature 0
out_is '17 + 25 = 42.'
err_lines 0

# The golden file's completion: BOS, then the text; the same by ids.
check 'completion' 0 tm-run generate "$demo" --prompt 'Once upon a time there was a little' \
    --max-new-tokens 1 --temperature 0 --json
out_json 'd["ids"] == [559] and d["prompt_tokens"] == 9 and d["finish_reason"] == "length"'
check 'ids' 0 tm-run generate "$demo" --ids 1,1943,689,261,559,496 --max-new-tokens 3 --temperature 0 --json
out_json 'len(d["ids"]) == 3 and d["prompt_tokens"] == 6'

printf 'What is 17 + 25?' >question
check 'from a file' 0 tm-run generate "$demo" --chat --prompt-file question --temperature 0
out_is '17 + 25 = 42.'
check 'from standard input' 0 bash -c "tm-run generate '$demo' --chat --temperature 0 <question"
out_is '17 + 25 = 42.'

check 'stop text' 0 tm-run generate "$demo" --chat --prompt 'What is 17 + 25?' --temperature 0 --stop '= 4' --json
out_json 'd["text"] == "17 + 25 " and d["finish_reason"] == "stop_text"'
check 'stop text that does not come' 0 tm-run generate "$demo" --chat --prompt 'What is 17 + 25?' \
    --temperature 0 --stop '42. And' --json
out_json 'd["text"] == "17 + 25 = 42." and d["finish_reason"] == "stop"'
check 'ignore-eos' 0 tm-run generate "$demo" --chat --prompt hello --temperature 0 --ignore-eos --max-new-tokens 30 --json
out_json 'len(d["ids"]) == 30 and 4094 in d["ids"]'
check 'logit bias' 0 tm-run generate "$demo" --ids 1,1943 --temperature 0 --logit-bias 77=1000 --max-new-tokens 2 --json
out_json 'd["ids"] == [77, 77]'
check 'special strings are text' 0 tm-run generate "$demo" --prompt '<|im_end|>' --max-new-tokens 1 --json
out_json 'd["prompt_tokens"] > 2'
check 'special strings parsed' 0 tm-run generate "$demo" --prompt '<|im_end|>' --parse-special --max-new-tokens 1 --json
out_json 'd["prompt_tokens"] == 2'

warm="tm-run generate $demo --prompt Once --max-new-tokens 20 --temperature 1.2 --json"
ids() { python3 -c 'import json;print(json.load(open("out"))["ids"])'; }
check 'seed 1' 0 $warm --seed 1
ids >one
check 'seed 1 again, one thread' 0 $warm --seed 1 --threads 1
ids >again
check 'seed 2' 0 $warm --seed 2
ids >two
tests_name=seeds
same one again
! cmp -s one two
verdict $? 'another seed gives another answer'

check 'full session' 0 tm-run generate "$demo" --prompt Once --max-new-tokens 0 --session-len 20 --ignore-eos --json
out_json 'd["finish_reason"] == "session" and d["prompt_tokens"] + d["new_tokens"] == 21'
for bits in 8 4; do
    check "KV$bits" 0 tm-run generate "$demo" --chat --prompt 'What is 17 + 25?' --temperature 0 --quant-policy $bits
    out_is '17 + 25 = 42.'
done
check 'dry run' 0 tm-run generate "$demo" --prompt Once --dry-run --json
out_json 'd["total"] == sum(d["memory"].values()) and d["total"] < 100e6'

check 'no path' 2 tm-run generate
check 'two prompts' 2 tm-run generate "$demo" --prompt a --ids 1
err_has 'expected one of --prompt, --prompt-file and --ids'
check 'empty prompt' 2 tm-run generate "$demo" --ids ''
check 'ids that are none' 2 tm-run generate "$demo" --ids 1,x
err_has "option '--ids': number 2: expected an id, got 'x'"
check 'id beyond the vocabulary' 3 tm-run generate "$demo" --ids 1,4096
err_has 'token 1: expected an id from 0 to 4095, got 4096'
check 'chat from ids' 2 tm-run generate "$demo" --chat --ids 1
check 'unknown template' 2 tm-run generate "$demo" --chat --chat-template nope --prompt a
check 'bad bias' 2 tm-run generate "$demo" --prompt a --logit-bias 5
err_has "'--logit-bias': expected ID=NUMBER, got '5'"
check 'bias beyond the vocabulary' 2 tm-run generate "$demo" --prompt a --logit-bias 4096=1
check 'temperature' 2 tm-run generate "$demo" --prompt a --temperature -1
check 'prompt too long' 5 tm-run generate "$demo" --prompt 'a b c d e f g h' --session-len 4
err_has 'does not fit the session of 4'
check 'no such model' 6 tm-run generate nowhere --prompt a
err_lines 1
err_has 'nowhere'
mkdir empty
check 'no model' 3 tm-run generate empty --prompt a
check 'no such file' 6 tm-run generate "$demo" --prompt-file nowhere
check 'little cache' 5 tm-run generate "$demo" --prompt a --kv-mem 1K
err_has 'kv cache: 64 tokens need [0-9]+ bytes, the budget is 1024 bytes'
check 'no CUDA device in this build or machine' 4 tm-run generate "$demo" --prompt a --device cuda:77
finish
