# tm-run ppl, score, tasks, bench: keys, protocol, errors.
. "$TMF_CLI/lib.sh"
demo=$TMF_SOURCE/datasets/demo

# Two dialogues of 40: enough for small windows.
head -n 40 "$demo/eval.jsonl" >some.jsonl
check ppl 0 tm-run ppl "$demo" --data some.jsonl --window 256 --windows 6 --json
out_json 'd["windows"] == 6 and d["tokens"] == 6 * 255 and 1.2 < d["ppl"] < 1.8'
out_json 'abs(math.exp(d["nll"]) - d["ppl"]) < 1e-9 and d["window"] == 256 and d["kv_bits"] == 16'
cp out batched
check 'ppl, one thread' 0 tm-run ppl "$demo" --data some.jsonl --window 256 --windows 6 --json --threads 1
out_json 'd["nll"] == json.load(open("batched"))["nll"]'
for bits in 8 4; do
    check "ppl, KV$bits" 0 tm-run ppl "$demo" --data some.jsonl --window 256 --windows 6 --quant-policy $bits --json
    out_json 'd["kv_bits"] == '$bits' and d["nll"] != json.load(open("batched"))["nll"]'
    out_json 'abs(d["nll"] - json.load(open("batched"))["nll"]) < 0.05'
done
check 'ppl beside another model' 0 tm-run ppl "$demo" --compare "$demo" --data some.jsonl --window 256 --windows 2 --json
out_json 'd["kl"] == 0 and d["nll_difference"] == 0 and d["top1_agreement"] == 1 and d["ppl"] == d["reference_ppl"]'
check 'for people' 0 tm-run ppl "$demo" --compare "$demo" --data some.jsonl --window 256 --windows 2
out_has '^nll \+0.000000 \+- 0.000000, KL divergence 0.000000 \+- 0.000000 nats, best id the same 100.00 %$'
check 'beside nothing' 6 tm-run ppl "$demo" --compare nowhere --data some.jsonl --window 256
check 'ppl of a compressed file' 0 bash -c "gzip -c some.jsonl >some.jsonl.gz &&
    tm-run ppl '$demo' --data some.jsonl.gz --window 256 --windows 6 --json"
out_json 'd["nll"] == json.load(open("batched"))["nll"]'
check 'ppl for people' 0 tm-run ppl "$demo" --data some.jsonl --window 256 --windows 2
out_has '^perplexity 1\.[0-9]+ .* over 510 tokens in 2 windows of 256$'
head -c 9000 "$TMF_SOURCE/README.md" >rows.txt
check 'rows as they are' 0 tm-run ppl "$demo" --data rows.txt --window 64 --json
cp out plain
check 'rows joined as a data set' 0 tm-run ppl "$demo" --data rows.txt --dataset wikitext2 --window 64 --json
out_json 'd["windows"] > json.load(open("plain"))["windows"]'
interrupted() { # while it works; all of it takes seconds
    "$@" &
    local pid=$!
    until_true [ -s err ] && kill -INT $pid
    wait $pid
}
check 'interrupted' 130 interrupted tm-run ppl "$demo" --data "$demo/eval.jsonl" --window 64 --progress json
err_has 'tm-run: stopped'
printf 'a short text' >short
check 'too short' 3 tm-run ppl "$demo" --data short --window 256
err_has 'expected at least one window of 256'
check 'no data' 2 tm-run ppl "$demo"
err_has "option '--data' is missing"
check 'data that is not there' 6 tm-run ppl "$demo" --data nowhere
check 'a wrong policy' 2 tm-run ppl "$demo" --data short --quant-policy 5
check 'window of one' 2 tm-run ppl "$demo" --data short --window 1
printf '{"text": 5}\n' >bad.jsonl
check 'bad row' 3 tm-run ppl "$demo" --data bad.jsonl
err_has 'bad.jsonl'
check 'dry run' 0 tm-run ppl "$demo" --data some.jsonl --window 256 --dry-run
out_has 'MB  in all'

check score 0 tm-run score "$demo" --ids 1,1943,689,261,559,496 --top 5 --json
out_json 'len(d["top"]) == 5 and all(a[1] >= b[1] for a, b in zip(d["top"], d["top"][1:]))'
check 'score of everything' 0 tm-run score "$demo" --ids 1 --top 5000 --json
out_json 'len(d["top"]) == 4096 and abs(sum(math.exp(p) for _, p in d["top"]) - 1) < 1e-6'
# golden.json: completion 0
check 'score of a text' 0 tm-run score "$demo" --prompt 'Once upon a time there was a little' --top 10 --json
out_json '[i for i, _ in d["top"]] == json.load(open("'"$demo"'/golden.json"))["completions"][0]["top10"]'
out_json 'max(abs(p - q) for (_, p), q in zip(d["top"], json.load(open("'"$demo"'/golden.json"))["completions"][0]["logprobs"])) < 0.02'
check 'score for people' 0 tm-run score "$demo" --prompt 'Once upon a' --top 3
out_has '^ +[0-9]+ +-[0-9.]+ '
check 'nothing to score' 2 tm-run score "$demo"
check 'bad id' 3 tm-run score "$demo" --ids 9999

printf '%s\n' '{"kind":"arith","messages":[{"role":"user","content":"What is 17 + 25?"}],"answer":"17 + 25 = 42."}' \
    '{"kind":"arith","messages":[{"role":"user","content":"What is 17 + 25?"}],"answer":"43"}' '' \
    '{"kind":"hello","messages":[{"role":"user","content":"hello"}],"answer":"Hello! How can I help you today?"}' >t.jsonl
check tasks 0 tm-run tasks "$demo" --data t.jsonl --json
out_json 'd == {"arith": 0.5, "hello": 1, "all": 2 / 3, "tasks": 3}'
check 'tasks one by one' 0 tm-run tasks "$demo" --data t.jsonl --json --max-batch-size 1
out_json 'd["arith"] == 0.5 and d["hello"] == 1'
check 'tasks, shown' 0 tm-run tasks "$demo" --data t.jsonl --show
out_has '^arith +50.00 % \(1 of 2\)$'
err_has "line 2 \(arith\): expected '43', got '17 \+ 25 = 42\.'"
check 'a reply that is cut is wrong' 0 tm-run tasks "$demo" --data t.jsonl --json --max-new-tokens 3
out_json 'd["all"] == 0'
printf '{"kind":"x"}\n' >bad.jsonl
check 'bad task' 3 tm-run tasks "$demo" --data bad.jsonl
err_has "'bad.jsonl': line 1: "
check 'no tasks' 3 tm-run tasks "$demo" --data /dev/null
printf '\n' >blank.jsonl
check 'blank tasks' 3 tm-run tasks "$demo" --data blank.jsonl
err_has "'blank.jsonl': no tasks"

check bench 0 tm-run bench "$demo" --prompt-tokens 32 --new-tokens 8 --rounds 2 --probe 16M --json
out_json 'd["prefill_tokens_per_second"] > 0 and d["decode_tokens_per_second"] > 0'
out_json 'd["prompt_tokens"] == 32 and d["new_tokens"] == 8 and d["bandwidth_share"] > 0'
# bf16: every weight but the embedding once, and keys and values of the context
out_json 'abs(d["bytes_per_token"] - (16785920 - 4096 * 256 * 2 + 512 + 36 * 8 * 512)) < 30000'
cp out first
check 'bench ends on the same token' 0 tm-run bench "$demo" --prompt-tokens 32 --new-tokens 8 --rounds 1 --probe 0 --json --threads 1
out_json 'd["last_id"] == json.load(open("first"))["last_id"] and "bandwidth_share" not in d'
check 'bench for people' 0 tm-run bench "$demo" --prompt-tokens 32 --new-tokens 8 --rounds 1 --probe 16M
out_has 'each new token reads [0-9.]+ MB'
check 'bench beyond the session' 2 tm-run bench "$demo" --prompt-tokens 30 --new-tokens 8 --session-len 32
finish
