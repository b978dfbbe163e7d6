#!/usr/bin/env python3
"""lib_python.py LIBTMFORGE SOURCE_DIR: tmforge.py as LMDeploy's users would call it."""
import os
import subprocess
import sys
import threading

library, source = sys.argv[1:3]
if b"libasan" in subprocess.run(["ldd", library], stdout=subprocess.PIPE, check=True).stdout:
    print("SKIP the library needs the address sanitizer in the process that loads it")
    sys.exit(77)
os.environ["TMFORGE_LIBRARY"] = library
sys.path.insert(0, os.path.join(source, "lib"))
import tmforge  # noqa: E402
from tmforge import ChatTemplateConfig, GenerationConfig, TurbomindEngineConfig, pipeline  # noqa: E402

demo = os.path.join(source, "datasets", "demo")
ask, talk = "What is 17 + 25?", [{"role": "user", "content": "What is 17 + 25?"}]
greedy = GenerationConfig(max_new_tokens=64, temperature=0)


def refused(code, call):
    try:
        call()
    except tmforge.TmforgeError as e:
        assert e.code == code, (e.code, str(e))
        return str(e)
    raise AssertionError("it was not refused")


logged = []
pipe = pipeline(demo, backend_config=TurbomindEngineConfig(cache_max_entry_count=0.4, quant_policy=8, session_len=512),
                log_level=lambda level, line: logged.append(line))
assert pipe.info["kv_bits"] == 8 and pipe.info["session_len"] == 512, pipe.info

# One prompt gives one response, a list gives a list; texts and conversations mix.
one = pipe(ask, gen_config=greedy)
assert one.text == "17 + 25 = 42." and one.finish_reason == "stop", one
assert one.generate_token_len == len(one.token_ids) and one.input_token_len > 10 and one.logprobs is None
both = pipe([ask, talk], gen_config=GenerationConfig(max_new_tokens=64, do_sample=False))
assert [r.text for r in both] == 2 * ["17 + 25 = 42."] and [r.index for r in both] == [0, 1]
assert pipe(talk, gen_config=greedy).text == one.text
assert pipe.decode(one.token_ids) == one.text
assert pipe([], gen_config=greedy) == []
raw = pipe(pipe.encode("The quick"), gen_config=greedy)
assert raw.text == pipe("The quick", gen_config=greedy, do_preprocess=False).text
short = pipe([ask, ask], gen_config=[GenerationConfig(max_new_tokens=2, temperature=0), greedy])
assert [r.finish_reason for r in short] == ["length", "stop"] and short[0].generate_token_len == 2
assert short[1].cached_token_len >= 0

# Options.
assert pipe(ask, gen_config=GenerationConfig(temperature=0, stop_words=["= 4"])).text == "17 + 25 "
probs = pipe(ask, gen_config=GenerationConfig(temperature=0, logprobs=1))
assert len(probs.logprobs) == probs.generate_token_len and all(-5 < p <= 0 for p in probs.logprobs)
seeded = [pipe("Tell me a story", gen_config=GenerationConfig(max_new_tokens=20, random_seed=7)) for _ in range(2)]
assert seeded[0].token_ids == seeded[1].token_ids
schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
made = pipe(ask, gen_config=GenerationConfig(response_format={
    "type": "json_schema", "json_schema": {"name": "x", "schema": schema}}))
assert made.text.startswith("{") and made.finish_reason in ("stop", "length"), made
made = pipe(ask, gen_config=GenerationConfig(response_format={"type": "regex_schema", "regex_schema": "[0-9]{3}"}))
assert made.text.isdigit() and len(made.text) == 3, made
assert "hello w\u00f6rld" == pipe.decode(pipe.encode("hello w\u00f6rld", add_bos=False))
assert "user\nhi" in pipe.apply_chat_template([{"role": "user", "content": "hi"}])

# Streams: what is new, and one end for each prompt.
text, ends = {0: "", 1: ""}, []
for piece in pipe.stream_infer([ask, talk], gen_config=greedy):
    text[piece.index] += piece.text
    if piece.finish_reason:
        ends.append((piece.index, piece.finish_reason))
assert set(text.values()) == {"17 + 25 = 42."} and sorted(ends) == [(0, "stop"), (1, "stop")]
stream = pipe.stream_infer(3 * [ask], gen_config=GenerationConfig(max_new_tokens=400, ignore_eos=True))
next(stream)
stream.close()  # what runs is canceled
assert pipe(ask, gen_config=greedy).text == one.text

# Conversations: a turn sees those before it.
s = pipe.chat(ask, gen_config=greedy)
assert s.response.text == one.text and s.history == [(ask, one.text)] and s.response.finish_reason == "stop"
again = pipe.chat("What is 3 + 4?", s, gen_config=greedy)
assert again is s and len(s.history) == 2
whole = pipe([talk + [{"role": "assistant", "content": one.text}, {"role": "user", "content": "What is 3 + 4?"}]],
             gen_config=greedy)[0]
assert s.response.text == whole.text and s.response.token_ids == whole.token_ids, (s.response, whole)
assert s.response.cached_token_len > 0 or len(pipe.encode(ask)) < 64
assert "ASSISTANT:\n" + one.text in repr(s)
named = pipe.chat(ask, "mine", gen_config=greedy)
assert pipe.chat(ask, "mine", gen_config=greedy) is named and len(named.history) == 2
assert pipe.chat(ask, 7, gen_config=greedy).id == 7 and pipe.session().id == 8
named.close()
assert pipe.chat(ask, "mine", gen_config=greedy).history == [(ask, one.text)]
with pipe.chat(ask, gen_config=greedy, stream_response=True) as s:
    assert s.history == [] and "".join(p.text for p in s.generator) == one.text and s.history == [(ask, one.text)]

# Likelihoods.
ids = pipe.encode("The quick brown fox and the hen")
noise = [(97 * i) % 2000 + 10 for i in range(len(ids))]
scores = pipe.get_ppl([ids, noise] * 40)
assert len(scores) == 80 and scores[::2] == 40 * scores[:1] and 0 < scores[0] < scores[1], scores[:2]
assert pipe.get_ppl(ids) == scores[:1] and pipe.get_ppl([]) == []
assert "prompt 1: expected 2 ids or more, got 1" in refused(1, lambda: pipe.get_ppl([ids, [5]]))
refused(9, lambda: pipe.get_ppl([list(range(10, 1500)) * 2]))

# More than the batch holds, from several threads.
results = {}


def work(name):
    results[name] = pipe([f"What is {i} + 25?" for i in range(40)], gen_config=greedy)


threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
for t in threads:
    t.start()
for t in threads:
    t.join()
assert [[r.text for r in results[i]] for i in range(3)] == 3 * [[r.text for r in results[0]]]
assert results[0][17].text == one.text and {r.finish_reason for r in results[0]} <= {"stop", "length"}

# Refusals.
long = pipe([2000 * "x ", ask], gen_config=greedy)
assert long[0].finish_reason == "error" and "2" in long[0].error and long[1].text == one.text
assert "nonexistent" in refused(3, lambda: pipeline("/nonexistent"))
assert "top" in refused(1, lambda: pipe(ask, gen_config=GenerationConfig(top_p=7)))
refused(1, lambda: pipeline(demo, chat_template_config=ChatTemplateConfig("no such template")))
refused(2, lambda: pipe([[{"role": "user"}]]))
try:
    pipeline(demo, backend_config=TurbomindEngineConfig(tp=2))
except ValueError as e:
    assert "tp" in str(e)
pipe.close()
pipe.close()
print(f"tmforge.py {tmforge.version()}: all of it holds")
