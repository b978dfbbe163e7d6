#!/usr/bin/env python3
"""Routes, parameters and framing of tm-run serve over plain sockets: what no client library looks at."""
import json
import math
import os
import re
import sys
import threading

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from serve_lib import LONG_ANSWER, LONG_SESSION, Server, check, expect, read_answer, run, tool_and_model, until  # noqa: E402

TOOL, MODEL = tool_and_model()
CHAT, TEXT, TALK = "/v1/chat/completions", "/v1/completions", "/v1/chat/interactive"
ASK = {"model": "demo", "temperature": 0, "messages": [{"role": "user", "content": "What is 17 + 25?"}]}
RIGHT = "17 + 25 = 42."


def chat(**more):
    answer = server.post(CHAT, {**ASK, **more})
    expect(f"status ({answer.text[:300]})", answer.status, 200)
    return answer


def content(**more):
    return chat(**more).json["choices"][0]["message"]["content"]


def complete(prompt, **more):
    answer = server.post(TEXT, {"model": "demo", "prompt": prompt, "temperature": 0, "max_tokens": 8, **more})
    expect(f"status ({answer.text[:300]})", answer.status, 200)
    return answer.json


def test_models():
    data = server.get("/v1/models").json["data"]
    expect("ids", [m["id"] for m in data], ["demo"])
    one = server.get("/v1/models/demo").json
    expect("one", one, data[0])
    expect("alias", server.get("/v1/models/other").json, one)
    expect("alias", server.post(CHAT, {**ASK, "model": "other"}).json["model"], "demo")


def test_chat():
    a = chat().json
    expect("keys", set(a) >= {"id", "object", "created", "model", "choices", "usage", "timings"}, True)
    expect("object", a["object"], "chat.completion")
    c = a["choices"][0]
    expect("message", c["message"], {"role": "assistant", "content": RIGHT, "refusal": None})
    expect("finish", (c["finish_reason"], c["logprobs"], c["index"]), ("stop", None, 0))
    u = a["usage"]
    expect("sum", u["total_tokens"], u["prompt_tokens"] + u["completion_tokens"])
    check("ids differ", a["id"] != chat().json["id"])


def test_parts_and_string():
    parts = [{"type": "text", "text": "What is 17 + 25?"}]
    expect("parts", content(messages=[{"role": "user", "content": parts}]), RIGHT)
    expect("string", content(messages="What is 17 + 25?"), RIGHT)
    two = server.post("/apply-template", {"messages": [{"role": "user", "content": parts * 2}]}).json["prompt"]
    check("two parts", "25?\nWhat" in two, two)


def test_stream():
    a = chat(stream=True, stream_options={"include_usage": True})
    expect("type", a.headers["content-type"], "text/event-stream; charset=utf-8")
    expect("buffering", (a.headers["x-accel-buffering"], a.headers["cache-control"]), ("no", "no-cache"))
    events, done = a.events()
    check("[DONE]", done)
    check("each event is one line of data and an empty one", re.fullmatch(r"(data: [^\n]+\n\n)+", a.text), a.text[:200])
    expect("first", events[0]["choices"][0]["delta"], {"role": "assistant", "content": ""})
    for key in ("id", "created", "model", "object"):
        expect(key, len({e[key] for e in events}), 1)
    expect("text", "".join(e["choices"][0]["delta"].get("content", "") for e in events[:-1]), RIGHT)
    expect("last", (events[-2]["choices"][0]["delta"], events[-2]["choices"][0]["finish_reason"]), ({}, "stop"))
    expect("finish before", {e["choices"][0]["finish_reason"] for e in events[:-2]}, {None})
    expect("usage", [e["usage"] for e in events[:-1]], [None] * (len(events) - 1))
    expect("usage chunk", (events[-1]["choices"], events[-1]["usage"]["completion_tokens"]), ([], 12))
    plain, _ = chat(stream=True).events()
    check("no usage unasked", all("usage" not in e for e in plain))


def test_n():
    a = chat(n=3, temperature=1.5, seed=5, max_tokens=12, ignore_eos=True).json
    expect("indices", [c["index"] for c in a["choices"]], [0, 1, 2])
    texts = [c["message"]["content"] for c in a["choices"]]
    for i in range(3):
        expect("choice i has seed + i", content(temperature=1.5, seed=5 + i, max_tokens=12, ignore_eos=True), texts[i])
    expect("usage", a["usage"]["completion_tokens"], 36)
    events, done = chat(n=3, temperature=1.5, seed=5, max_tokens=12, ignore_eos=True, stream=True).events()
    check("[DONE]", done)
    for i in range(3):
        parts = [e["choices"][0]["delta"].get("content", "") for e in events if e["choices"][0]["index"] == i]
        expect("streamed", "".join(parts), texts[i])
    # What came since the last look at an answer is one event: of short ones each may be whole when it is looked at.
    events, _ = chat(n=3, temperature=1.5, seed=5, max_tokens=400, ignore_eos=True, stream=True).events()
    order = [e["choices"][0]["index"] for e in events]
    check("interleaved", order != sorted(order), order)


def test_seed():
    big = 2**64 - 1
    kinds = {content(temperature=2, seed=s, max_tokens=60, ignore_eos=True) for s in (big, big - 1, 2**53 + 1, 2**53)}
    expect("every bit of a seed counts", len(kinds), 4)
    expect("again", content(temperature=1.5, seed=big, max_tokens=16), content(temperature=1.5, seed=big, max_tokens=16))
    alone, beside = content(temperature=1.2, seed=9, max_tokens=40, ignore_eos=True), []
    threads = [threading.Thread(target=lambda s=s: beside.append(
        (s, content(temperature=1.2, seed=s, max_tokens=40, ignore_eos=True)))) for s in (9, 10, 11, 12)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    expect("in a batch", dict(beside)[9], alone)


def test_stop():
    for stop, want in [("25 = 42", "17 + "), (["= 4", "nothing"], "17 + 25 "), (["42. And more"], RIGHT),
                       (["2"], "17 + "), (["."], "17 + 25 = 42")]:
        c = chat(stop=stop).json["choices"][0]
        expect(f"{stop}", c["message"]["content"], want)
        expect("finish", c["finish_reason"], "stop")
        events, _ = chat(stop=stop, stream=True).events()
        expect("streamed", "".join(e["choices"][0]["delta"].get("content", "") for e in events), want)
    expect("told", chat(stop=["= 4"]).json["choices"][0]["stop_reason"], "= 4")
    expect("kept", content(stop=["= 4"], include_stop_str_in_output=True), "17 + 25 = 4")
    expect("long ones", content(stop=["25 = 42" + "x" * 60000, "42"]), "17 + 25 = ")
    ids = server.post("/tokenize", {"content": RIGHT, "add_special": False}).json["tokens"]
    got = chat(stop_token_ids=[ids[4]]).json["choices"][0]
    expect("stop id", (got["finish_reason"], got["stop_reason"]), ("stop", ids[4]))


def test_lengths():
    c = chat(max_tokens=3).json
    expect("length", (c["choices"][0]["finish_reason"], c["usage"]["completion_tokens"]), ("length", 3))
    expect("newer name wins", chat(max_tokens=3, max_completion_tokens=5).json["usage"]["completion_tokens"], 5)
    expect("min_tokens", chat(min_tokens=40, max_tokens=60).json["usage"]["completion_tokens"] >= 40, True)
    expect("ignore_eos", chat(ignore_eos=True, max_tokens=50).json["usage"]["completion_tokens"], 50)
    n_ctx = server.get("/props").json["n_ctx"]
    cut = chat(ignore_eos=True, max_tokens=2**31 - 1)
    a = cut.json
    expect("cut to the context", a["usage"]["total_tokens"] <= n_ctx, True)
    expect("and told", int(cut.headers["x-max-tokens"]), n_ctx - a["usage"]["prompt_tokens"])
    check("else not", "x-max-tokens" not in chat(max_tokens=3).headers)
    expect("length", a["choices"][0]["finish_reason"], "length")
    c = chat(ignore_eos=True, max_tokens=900, timeout_ms=60).json["choices"][0]
    expect("timeout", (c["finish_reason"], c["timed_out"]), ("length", True))


def test_sampling():
    expect("greedy", content(temperature=0, top_k=1, seed=3), RIGHT)
    expect("top_k 1", content(temperature=2, top_k=1, seed=3), RIGHT)
    ids = server.post("/tokenize", {"content": "Z", "add_special": False}).json["tokens"]
    a = chat(logit_bias={str(ids[-1]): 100}, max_tokens=4).json["choices"][0]["message"]["content"]
    check("logit_bias", set(a.strip()) == {"Z"}, a)
    check("penalties act", content(frequency_penalty=2, presence_penalty=2, max_tokens=200, ignore_eos=True) !=
          content(max_tokens=200, ignore_eos=True))
    check("repetition", content(repetition_penalty=5, max_tokens=30, ignore_eos=True) !=
          content(max_tokens=30, ignore_eos=True))


def test_logprobs():
    c = chat(logprobs=True, top_logprobs=3).json["choices"][0]
    items = c["logprobs"]["content"]
    expect("joined", b"".join(bytes(i["bytes"]) for i in items).decode().strip(), RIGHT)
    for i in items:
        expect("alternatives", len(i["top_logprobs"]), 3)
        expect("greedy is the first", i["token"], i["top_logprobs"][0]["token"])
        check("sorted", i["top_logprobs"][0]["logprob"] >= i["top_logprobs"][1]["logprob"])
        check("a probability", i["logprob"] <= 0)
    events, _ = chat(logprobs=True, top_logprobs=3, stream=True).events()
    streamed = [i for e in events if e["choices"][0]["logprobs"] for i in e["choices"][0]["logprobs"]["content"]]
    expect("streamed", [i["token"] for i in streamed], [i["token"] for i in items])
    for a, b in zip(streamed, items):
        check("same values", abs(a["logprob"] - b["logprob"]) < 1e-3, (a, b))
    expect("none", chat(logprobs=True).json["choices"][0]["logprobs"]["content"][0]["top_logprobs"], [])


def test_completions():
    a = complete("One two three", max_tokens=5)
    expect("object", a["object"], "text_completion")
    expect("tokens", a["usage"]["completion_tokens"], 5)
    ids = server.post("/tokenize", {"content": "One two three"}).json["tokens"]
    expect("ids", complete(ids, max_tokens=5)["choices"][0]["text"], a["choices"][0]["text"])
    many = complete(["One two three", "Four"], max_tokens=5, n=2)["choices"]
    expect("prompts x n", [c["index"] for c in many], [0, 1, 2, 3])
    expect("first prompt", many[0]["text"], a["choices"][0]["text"])
    expect("lists of ids", complete([ids, ids], max_tokens=5)["choices"][1]["text"], a["choices"][0]["text"])
    echoed = complete("One two three", max_tokens=5, echo=True)["choices"][0]["text"]
    expect("echo", echoed, "One two three" + a["choices"][0]["text"])
    events, done = server.post(TEXT, {"model": "demo", "prompt": "One two three", "temperature": 0, "max_tokens": 5,
                                      "stream": True, "echo": True}).events()
    check("[DONE]", done)
    expect("streamed", "".join(e["choices"][0]["text"] for e in events), echoed)


def test_echo_logprobs():
    """What evaluation harnesses ask for: the prompt's own log-probabilities, and no answer."""
    text = "What is 17 + 25?"
    a = complete(text, max_tokens=0, echo=True, logprobs=2)
    c = a["choices"][0]
    expect("text", c["text"], text)
    p = c["logprobs"]
    expect("lengths", len({len(p[k]) for k in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}), 1)
    expect("first", (p["token_logprobs"][0], p["top_logprobs"][0]), (None, None))
    expect("tokens", len(p["tokens"]), a["usage"]["prompt_tokens"])
    expect("none generated", a["usage"]["completion_tokens"], 0)
    for t, v, top in zip(p["tokens"][1:], p["token_logprobs"][1:], p["top_logprobs"][1:]):
        check("own token among the alternatives", top[t] <= 0 and abs(top[t] - v) < 1e-4, (t, v, top))
        check("two or three", 2 <= len(top) <= 3, top)
    nll = -sum(p["token_logprobs"][1:]) / (len(p["tokens"]) - 1)
    ppl = server.post("/get_ppl", {"input": [text, "Four"]}).json
    check("/get_ppl", abs(ppl["nll"][0] - nll) < 1e-3 and abs(ppl["ppl"][0] - math.exp(nll)) < 0.01 * math.exp(nll),
          (ppl, nll))
    one = complete(text, max_tokens=3, echo=True, logprobs=0, ignore_eos=True)["choices"][0]["logprobs"]
    expect("prompt and answer", len(one["tokens"]), len(p["tokens"]) + 3)
    prompt = chat(prompt_logprobs=1, max_tokens=2).json["choices"][0]["prompt_logprobs"]
    expect("prompt_logprobs", (prompt[0], len(prompt[1]["top_logprobs"])), (None, 1))


def test_encode():
    a = server.post("/v1/encode", {"input": "Hello world"}).json
    expect("length", a["length"], len(a["input_ids"]))
    both = server.post("/v1/encode", {"input": ["Hello world", "x"], "add_bos": False}).json
    expect("list", (len(both["input_ids"]), both["length"][0]), (2, a["length"] - 1))
    for key in ("content", "prompt"):
        expect(key, server.post("/tokenize", {key: "Hello world"}).json["tokens"], a["input_ids"])
    back = server.post("/detokenize", {"tokens": a["input_ids"]}).json
    expect("back", (back["text"], back["content"], back["prompt"]), ("Hello world",) * 3)
    special = server.post("/tokenize", {"content": "<|im_end|>", "add_special": False}).json["count"]
    check("a user's words are text", special > 1, special)
    expect("unless asked for", server.post("/tokenize", {"content": "<|im_end|>", "parse_special": True,
                                                         "add_special": False}).json["count"], 1)
    expect("nothing", server.post("/detokenize", {"tokens": []}).json["text"], "")


def test_template():
    a = server.post("/apply-template", {"messages": ASK["messages"]}).json
    check("prompt", "What is 17 + 25?" in a["prompt"], a)
    expect("tokens", a["count"], chat().json["usage"]["prompt_tokens"])
    cut = server.post("/apply-template", {"messages": ASK["messages"], "add_generation_prompt": False}).json
    check("without the head", cut["count"] < a["count"])


def test_props_and_health():
    p = server.get("/props").json
    for key in ("model", "n_ctx", "kv_bits", "chat_template_name", "default_generation_settings", "version", "max_batch"):
        check("props", key in p, key)
    for path in ("/health", "/livez", "/readyz"):
        expect(path, server.get(path).status, 200)
    page = server.get("/")
    expect("page", page.status, 200)
    check("policy", "default-src 'none'" in page.headers["content-security-policy"], page.headers)
    head = server.ask("HEAD", "/v1/models")
    expect("HEAD", (head.status, head.body), (200, b""))


def test_metrics():
    before = server.metric("generation_tokens_total")
    chat(max_tokens=5)
    until("counted", lambda: server.metric("generation_tokens_total") - before >= 5)
    text = server.get("/metrics").text
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.M))
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        m = re.fullmatch(r"([a-z0-9_]+)(?:\{[^}]*\})? [0-9.e+-]+", line)
        check("line", m, line)
        base = re.sub(r"_(bucket|sum|count)$", "", m.group(1))
        check("has a type", m.group(1) in types or types.get(base) == "histogram", line)
    for name in ("requests_running", "requests_waiting", "requests_total", "kv_blocks_used", "kv_blocks_total",
                 "prefix_cache_tokens_total", "prompt_tokens_total", "time_to_first_token_seconds",
                 "time_per_output_token_seconds", "e2e_request_latency_seconds", "decode_batch_size",
                 "preemptions_total", "requests_rejected_total", "requests_cancelled_total", "build_info", "model_info"):
        check("there", "tm_" + name in types, name)
    for name in [n for n, t in types.items() if t == "histogram"]:
        counts = [int(v) for v in re.findall(rf'^{name}_bucket\{{le="[^"]+"\}} (\d+)$', text, re.M)]
        check("cumulative", counts == sorted(counts), (name, counts))
        expect("+Inf is the count", counts[-1], int(re.search(rf"^{name}_count (\d+)$", text, re.M).group(1)))


def test_openapi():
    d = server.get("/openapi.json").json
    for path in (CHAT, TEXT, TALK, "/v1/models/{id}", "/v1/encode", "/tokenize", "/detokenize", "/get_ppl",
                 "/apply-template", "/props", "/metrics", "/health", "/livez", "/readyz", "/v1/embeddings", "/"):
        check("path", path in d["paths"], path)
    p = d["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
    expect("range", (p["temperature"]["minimum"], p["temperature"]["maximum"]), (0, 2))
    for name, schema in p.items():  # what it says of ranges is what requests meet
        if schema.get("type") in ("integer", "number") and "maximum" in schema:
            answer = server.post(CHAT, {**ASK, "logprobs": True, name: schema["maximum"] * 2 + 1})
            expect(name, (answer.status, answer.json["error"]["param"]), (400, name))
        if schema.get("type") == "boolean":
            answer = server.post(CHAT, {**ASK, name: "x"})
            expect(name, (answer.status, answer.json["error"]["param"]), (400, name))


def test_interactive():
    ask = {"prompt": "What is 17 + 25?", "session_id": 1, "interactive_mode": True, "temperature": 0}
    a = server.post(TALK, ask).json
    expect("text", a["text"], RIGHT)
    expect("keys", set(a), {"text", "tokens", "input_tokens", "history_tokens", "finish_reason"})
    expect("history", a["history_tokens"], 0)
    b = server.post(TALK, {**ask, "prompt": "What is 3 + 4?"}).json
    expect("grows", b["history_tokens"], a["input_tokens"] + a["tokens"])
    full = content(messages=[*ASK["messages"], {"role": "assistant", "content": RIGHT},
                             {"role": "user", "content": "What is 3 + 4?"}], max_tokens=512)
    expect("as the whole conversation", b["text"], full)
    expect("ended", server.post(TALK, {"session_id": 1, "request_output_len": 0}).status, 200)
    expect("forgotten", server.post(TALK, ask).json["history_tokens"], 0)
    server.post(TALK, {"session_id": 1, "request_output_len": 0})
    events, done = server.post(TALK, {**ask, "session_id": 2, "stream": True}).events()
    check("[DONE]", done)
    expect("streamed", "".join(e["text"] for e in events), RIGHT)
    expect("finish", [e["finish_reason"] for e in events][-2:], [None, "stop"])
    old = server.post(TALK + "?framing=lines", {**ask, "session_id": 3, "stream": True})
    lines = [json.loads(x) for x in old.text.splitlines()]
    expect("old framing", "".join(x["text"] for x in lines), RIGHT)
    expect("no session", server.post(TALK, {"prompt": "What is 17 + 25?", "temperature": 0}).json["text"], RIGHT)


def test_interactive_cancel():
    body = {"prompt": "x", "session_id": 5, "stream": True, "request_output_len": LONG_ANSWER, "ignore_eos": True}
    lasting = Server(TOOL, MODEL, *LONG_SESSION)
    got = []
    try:
        t = threading.Thread(target=lambda: got.append(lasting.post(TALK, body)))
        t.start()
        until("it runs", lambda: lasting.metric("requests_running") == 1)
        lasting.post(TALK, {"session_id": 5, "cancel": True})
        t.join()
        events, done = got[0].events()
        check("ended early", done and events[-1]["tokens"] < LONG_ANSWER, events[-1])
        lasting.idle()
    finally:
        expect("exit code", lasting.stop(), 0)


def test_utf8():
    """Characters of several tokens, cut anywhere: each chunk and each answer is valid UTF-8."""
    words = "日本語 – ✓ 🙂 ÿ"
    ids = server.post("/tokenize", {"content": words, "add_special": False}).json["tokens"]
    check("more tokens than characters", len(ids) > len(words), ids)
    for seed in range(6):
        bias = {str(i): 60 + (k * 7 + seed * 13) % 30 for k, i in enumerate(ids)}
        a = server.post(CHAT, {**ASK, "logit_bias": bias, "max_tokens": 23, "temperature": 2, "seed": seed, "stream": True,
                               "logprobs": True, "top_logprobs": 2})
        a.body.decode("utf-8")
        streamed = "".join(e["choices"][0]["delta"].get("content", "") for e in a.events()[0])
        expect("as a whole", content(logit_bias=bias, max_tokens=23, temperature=2, seed=seed), streamed)


def test_ids():
    a = chat(return_token_ids=True).json
    ids = a["choices"][0]["token_ids"]
    expect("as many", len(ids), a["usage"]["completion_tokens"])
    expect("prompt", len(a["prompt_token_ids"]), a["usage"]["prompt_tokens"])
    expect("text", server.post("/detokenize", {"tokens": ids}).json["text"], RIGHT)
    special = content(skip_special_tokens=False, ignore_eos=True, max_tokens=40)
    check("special tokens shown", "<|" in special or "</s>" in special, special)


def test_streamed_ids():
    """All of them, with those that have no text: a stop token's."""
    whole = chat(return_token_ids=True).json["choices"][0]["token_ids"]
    events, _ = chat(return_token_ids=True, stream=True).events()
    expect("ids", sum((e["choices"][0].get("token_ids", []) for e in events if e["choices"]), []), whole)


def test_generate():
    """LMDeploy's raw ids: as completions, and the same in a stream."""
    ids = server.post("/apply-template", {"messages": ASK["messages"]}).json["tokens"]
    ask = {"input_ids": ids, "temperature": 0, "max_tokens": 40, "return_logprob": True}
    a = server.post("/generate", ask)
    expect(f"status ({a.text[:200]})", a.status, 200)
    a = a.json
    info = a["meta_info"]
    expect("keys", set(a) | set(info), {"text", "output_ids", "meta_info", "prompt_tokens", "completion_tokens", "finish_reason",
                                        "output_token_logprobs"})
    expect("text", (a["text"], info["finish_reason"]), (RIGHT, {"type": "stop"}))
    expect("counts", (info["prompt_tokens"], info["completion_tokens"]), (len(ids), len(a["output_ids"])))
    expect("one probability an id", [p[1] for p in info["output_token_logprobs"]], a["output_ids"])
    check("natural logarithms", all(p[0] <= 0 for p in info["output_token_logprobs"]), info)
    expect("as chat", a["output_ids"], chat(return_token_ids=True).json["choices"][0]["token_ids"])
    events, done = server.post("/generate", {**ask, "stream": True}).events()
    check("[DONE]", done)
    expect("text", "".join(e["text"] for e in events), RIGHT)
    expect("ids", sum((e["output_ids"] for e in events), []), a["output_ids"])
    expect("probabilities", sum((e["meta_info"]["output_token_logprobs"] for e in events), []), info["output_token_logprobs"])
    expect("one end", [e["meta_info"]["finish_reason"] for e in events if e["meta_info"]["finish_reason"]], [{"type": "stop"}])
    events, _ = server.post("/generate", {**ask, "max_tokens": 400, "ignore_eos": True, "stream": True}).events()
    check("bit by bit", len(events) > 2, events)
    text = server.post("/generate", {"prompt": "a fox", "temperature": 0, "max_tokens": 5, "ignore_eos": True}).json
    expect("a text", text["text"], complete("a fox", max_tokens=5, ignore_eos=True)["choices"][0]["text"])
    expect("length", (text["meta_info"]["finish_reason"], text["meta_info"]["output_token_logprobs"]), ({"type": "length"}, None))
    for body, param in [({}, "prompt"), ({"prompt": "a", "input_ids": [1]}, "input_ids"), ({"input_ids": []}, "prompt"),
                        ({"input_ids": [1, 10**6]}, "input_ids[1]"), ({"prompt": ["a", "b"]}, "prompt"),
                        ({"prompt": "a", "max_tokens": 0}, "max_tokens"), ({"prompt": "a", "image_data": "x"}, "image_data")]:
        e = server.post("/generate", body)
        expect(f"{body}", (e.status, e.json["error"]["param"]), (400, param))


def test_cached_prefix():
    long = [{"role": "user", "content": "A story of a fox and a hen. " * 40}]
    chat(messages=long, max_tokens=2)
    u = chat(messages=long, max_tokens=2).json["usage"]["prompt_tokens_details"]["cached_tokens"]
    check("reused", u > 100, u)
    u = chat(messages=long, max_tokens=2, no_prefix_cache=True).json["usage"]["prompt_tokens_details"]["cached_tokens"]
    expect("unless asked not to", u, 0)


def test_connection():
    """Keep-alive, two requests in one packet, HTTP/1.0."""
    body = json.dumps({**ASK, "max_tokens": 3}).encode()
    one = (f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
           f"Content-Length: {len(body)}\r\n\r\n").encode() + body
    with server.connect() as s:
        for _ in range(3):
            s.sendall(one)
            expect("kept alive", read_answer(s).status, 200)
        s.sendall(one + b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        data = b""
        while part := s.recv(65536):
            data += part
        expect("pipelined", data.count(b"HTTP/1.1 200 OK"), 2)
    old = server.raw(b"GET /v1/models HTTP/1.0\r\n\r\n")
    expect("HTTP/1.0", old.status, 200)


def test_log():
    chat(max_tokens=1)  # others before it are of other lengths: a row is written when all of its answer is sent
    chat(max_tokens=2)

    def lines():
        return [r for r in server.rows() if r["route"] == CHAT]
    until("two rows", lambda: [r["tokens"] for r in lines()[-2:]] == [1, 2])
    last = lines()[-1]
    expect("row", (last["code"], last["tokens"], last["reason"]), (200, 2, "length"))
    check("no prompts", not any("What is" in x for x in server.lines()))


server = Server(TOOL, MODEL, "--model-name", "demo", "--model-name", "other", "--max-batch-size", "8")
try:
    result = run([f for name, f in sorted(globals().items()) if name.startswith("test_")])
finally:
    code = server.stop()
if code != 0:
    print(f"FAIL exit code {code}")
    result = 1
sys.exit(result)
