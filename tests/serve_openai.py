#!/usr/bin/env python3
"""The official `openai` client against tm-run serve: at least 60 calls, typed answers, every one checked.

serve_openai.py TM_RUN MODEL: makes a virtual environment (kept under build/) on its first run; without a
network it says SKIP and exits with 77.
"""
import asyncio
import json
import os
import re
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
from serve_lib import LONG_ANSWER, LONG_SESSION, Server, check, expect, run, tool_and_model, until  # noqa: E402

VENV = os.path.join(os.path.dirname(HERE), "build", "venv-openai")


def into_venv():
    """Starts this script again inside the environment that has the client."""
    python = os.path.join(VENV, "bin", "python")
    if sys.prefix == VENV:
        return
    if not os.path.exists(os.path.join(VENV, "complete")):
        for command in ([sys.executable, "-m", "venv", VENV],
                        [os.path.join(VENV, "bin", "pip"), "install", "--quiet", "--retries", "1", "--timeout", "20", "openai"]):
            p = subprocess.run(command, capture_output=True, check=False)
            if p.returncode:
                print("SKIP the openai client: pip cannot install it here:", p.stderr.decode().strip().split("\n")[-1])
                sys.exit(77)
        with open(os.path.join(VENV, "complete"), "w", encoding="ascii"):
            pass
    os.execv(python, [python, os.path.abspath(__file__), *sys.argv[1:]])


into_venv()
import openai  # noqa: E402  pylint: disable=wrong-import-position

TOOL, MODEL = tool_and_model()
KEY = "sk-ours"
ASK = [{"role": "user", "content": "What is 17 + 25?"}]
RIGHT = "17 + 25 = 42."
WEATHER = {"type": "function", "function": {
    "name": "get_weather", "description": "the weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string", "enum": ["Paris", "Oslo"]},
                                                    "days": {"type": "integer", "minimum": 1, "maximum": 9}},
                   "required": ["city", "days"], "additionalProperties": False}}}
TIME = {"type": "function", "function": {"name": "get_time", "parameters": {
    "type": "object", "properties": {"zone": {"enum": ["UTC", "CET"]}}, "required": ["zone"], "additionalProperties": False}}}


def chat(**more):
    return client.chat.completions.create(**{"model": "demo", "messages": ASK, "temperature": 0, **more})


def text(**more):
    return chat(**more).choices[0].message.content


def refused(error, **more):
    try:
        chat(**more)
    except error as e:
        return e
    raise AssertionError(f"{more}: not refused")


def test_01_models():
    expect("list", [m.id for m in client.models.list()], ["demo"])
    expect("one", client.models.retrieve("demo").id, "demo")
    try:
        client.models.retrieve("nothing")
        check("404", False)
    except openai.NotFoundError as e:
        expect("code", e.code, "model_not_found")


def test_02_chat():
    a = chat()
    m = a.choices[0].message
    expect("answer", (m.role, m.content, m.tool_calls, a.choices[0].finish_reason), ("assistant", RIGHT, None, "stop"))
    expect("usage", a.usage.total_tokens, a.usage.prompt_tokens + a.usage.completion_tokens)
    expect("object", (a.object, a.model), ("chat.completion", "demo"))
    check("created", abs(a.created - time.time()) < 60)
    check("request id", a._request_id.startswith("req-"), a._request_id)
    expect("again", text(), RIGHT)
    expect("developer", text(messages=[{"role": "developer", "content": "Be brief."}, *ASK]) != "", True)
    expect("history", text(messages=[*ASK, {"role": "assistant", "content": RIGHT}, *ASK]) != "", True)
    expect("parts", text(messages=[{"role": "user", "content": [{"type": "text", "text": "What is 17 + 25?"}]}]), RIGHT)


def test_03_parameters():
    expect("max_tokens", chat(max_tokens=3).choices[0].finish_reason, "length")
    expect("max_completion_tokens", chat(max_completion_tokens=4).usage.completion_tokens, 4)
    expect("stop", text(stop="25 ="), "17 + ")
    expect("stops", text(stop=["nothing", "= 42"]), "17 + 25 ")
    kinds = {text(temperature=1.9, seed=s, max_tokens=30) for s in range(4)}
    check("seeds differ", len(kinds) > 1, kinds)
    expect("seed", text(temperature=1.9, seed=3, max_tokens=30), text(temperature=1.9, seed=3, max_tokens=30))
    a = chat(n=4, temperature=1.5, seed=1, max_tokens=6)
    expect("n", [c.index for c in a.choices], [0, 1, 2, 3])
    check("top_p", text(top_p=0.1, temperature=1, seed=1) != "")
    check("penalties", text(presence_penalty=1, frequency_penalty=1) != "")
    check("logit_bias", "Z" not in text(logit_bias={"100": -100}))
    check("extra", text(extra_body={"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": False}) != "")
    check("user and metadata", text(user="u", metadata={"a": "b"}, store=False) != "")


def test_04_stream():
    parts, finish = [], None
    for chunk in chat(stream=True):
        if chunk.choices[0].delta.content:
            parts.append(chunk.choices[0].delta.content)
        finish = chunk.choices[0].finish_reason or finish
    expect("stream", ("".join(parts), finish), (RIGHT, "stop"))
    chunks = list(chat(stream=True, stream_options={"include_usage": True}))
    expect("usage", (chunks[-1].choices, chunks[-1].usage.completion_tokens), ([], 12))
    check("one id", len({c.id for c in chunks}) == 1)
    expect("role", chunks[0].choices[0].delta.role, "assistant")
    texts = {}
    for chunk in chat(stream=True, n=3, temperature=1.2, seed=4, max_tokens=8):
        for c in chunk.choices:
            texts[c.index] = texts.get(c.index, "") + (c.delta.content or "")
    expect("n", sorted(texts), [0, 1, 2])
    expect("stop", "".join(c.choices[0].delta.content or "" for c in chat(stream=True, stop="= 42")), "17 + 25 ")
    with client.chat.completions.with_streaming_response.create(model="demo", messages=ASK, stream=True) as r:
        check("raw lines", any(line == "data: [DONE]" for line in r.iter_lines()))


def test_05_stream_helper():
    with client.chat.completions.stream(model="demo", messages=ASK, temperature=0) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    check("events", "content.delta" in kinds and "content.done" in kinds, kinds)
    expect("final", final.choices[0].message.content, RIGHT)


def test_06_logprobs():
    c = chat(logprobs=True, top_logprobs=5).choices[0]
    expect("tokens", "".join(t.token for t in c.logprobs.content).strip(), RIGHT)
    expect("alternatives", {len(t.top_logprobs) for t in c.logprobs.content}, {5})
    check("values", all(t.logprob <= 0 and t.bytes is not None for t in c.logprobs.content))
    got = [c for c in chat(logprobs=True, stream=True) if c.choices[0].logprobs]
    check("streamed", sum(len(c.choices[0].logprobs.content) for c in got) >= 10)


def test_07_json_schema():
    schema = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99},
                                               "b": {"enum": ["x", "y"]}}, "required": ["a", "b"], "additionalProperties": False}
    for seed in range(3):
        a = chat(response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}},
                 temperature=1, seed=seed, max_tokens=200)
        expect("finish", a.choices[0].finish_reason, "stop")
        d = json.loads(a.choices[0].message.content)
        check("valid", set(d) == {"a", "b"} and 0 <= d["a"] <= 99 and d["b"] in ("x", "y"), d)
    got = "".join(c.choices[0].delta.content or "" for c in chat(stream=True, max_tokens=200, response_format={
        "type": "json_schema", "json_schema": {"name": "s", "schema": schema}}))
    check("streamed", set(json.loads(got)) == {"a", "b"}, got)
    a = chat(response_format={"type": "json_object"}, max_tokens=300, seed=1)
    if a.choices[0].finish_reason == "stop":
        check("an object", isinstance(json.loads(a.choices[0].message.content), dict))
    check("begins as one", a.choices[0].message.content.lstrip().startswith("{"), a.choices[0].message.content)
    t = text(extra_body={"response_format": {"type": "regex", "regex": "[0-9]{3}-[a-f]{4}"}}, max_tokens=40)
    check("regex", re.fullmatch("[0-9]{3}-[a-f]{4}", t), t)
    e = refused(openai.BadRequestError, response_format={"type": "json_schema", "json_schema": {
        "name": "s", "schema": {"type": "string", "pattern": "(?=x)y"}}})
    expect("fails closed", e.param, "response_format")


def test_08_parse():
    import pydantic  # pylint: disable=import-outside-toplevel

    class Sum(pydantic.BaseModel):
        left: int
        even: bool
    a = client.chat.completions.parse(model="demo", messages=ASK, response_format=Sum, max_tokens=200, temperature=0)
    check("parsed", isinstance(a.choices[0].message.parsed, Sum), a)


def check_call(call):
    args = json.loads(call.function.arguments)
    if call.function.name == "get_weather":
        check("arguments", args["city"] in ("Paris", "Oslo") and 1 <= args["days"] <= 9, args)
    else:
        check("arguments", args["zone"] in ("UTC", "CET"), args)
    return call


def test_09_tools():
    a = chat(tools=[WEATHER, TIME], tool_choice="required", parallel_tool_calls=False, max_tokens=200)
    c = a.choices[0]
    expect("finish", (c.finish_reason, c.message.content), ("tool_calls", None))
    call = check_call(c.message.tool_calls[0])
    check("id", call.id.startswith("call_") and call.type == "function")
    named = chat(tools=[WEATHER, TIME], tool_choice={"type": "function", "function": {"name": "get_time"}}, max_tokens=200)
    expect("named", check_call(named.choices[0].message.tool_calls[0]).function.name, "get_time")
    back = chat(tools=[WEATHER, TIME], messages=[*ASK, c.message.model_dump(exclude_none=True), {
        "role": "tool", "tool_call_id": call.id, "content": "42"}], max_tokens=20)
    check("results go back", back.choices[0].message is not None)
    expect("auto", chat(tools=[WEATHER], max_tokens=60).choices[0].finish_reason in ("stop", "tool_calls", "length"), True)
    expect("none", chat(tools=[WEATHER], tool_choice="none").choices[0].message.tool_calls, None)


def test_10_tools_stream():
    options = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 200}
    name, args, ids, finish = "", "", set(), None
    for chunk in chat(stream=True, **options):
        for call in chunk.choices[0].delta.tool_calls or []:
            expect("index", call.index, 0)
            ids |= {call.id} - {None}
            name += call.function.name or ""
            args += call.function.arguments or ""
        finish = chunk.choices[0].finish_reason or finish
    expect("streamed", (name, finish, len(ids)), ("get_weather", "tool_calls", 1))
    whole = chat(**options).choices[0].message.tool_calls[0].function
    expect("as the whole answer", (name, json.loads(args)), (whole.name, json.loads(whole.arguments)))
    with client.chat.completions.stream(model="demo", messages=ASK, temperature=0, **{**options, "tools": [WEATHER]}) as s:
        final = s.get_final_completion()
    check_call(final.choices[0].message.tool_calls[0])


def test_11_completions():
    def make(**more):
        return client.completions.create(**{"model": "demo", "prompt": "One two", "max_tokens": 6, "temperature": 0, **more})
    a = make()
    expect("object", (a.object, a.usage.completion_tokens), ("text_completion", 6))
    expect("list", [c.index for c in make(prompt=["One", "Two"]).choices], [0, 1])
    expect("echo", make(echo=True).choices[0].text, "One two" + a.choices[0].text)
    p = make(echo=True, logprobs=2, max_tokens=0).choices[0].logprobs
    expect("logprobs", (p.token_logprobs[0], len(p.tokens)), (None, len(p.text_offset)))
    expect("stream", "".join(c.choices[0].text for c in make(stream=True)), a.choices[0].text)
    expect("n", len(make(n=2, temperature=1, seed=1).choices), 2)
    check("ids", make(prompt=[1, 5, 9]).choices[0].text is not None)


def test_12_errors():
    e = refused(openai.BadRequestError, temperature=3)
    expect("error", (e.status_code, e.param, e.code, e.type), (400, "temperature", "invalid_value", "invalid_request_error"))
    check("request id", e.request_id.startswith("req-"))
    expect("context", refused(openai.BadRequestError, messages=[{"role": "user", "content": "x " * 9000}]).code,
           "context_length_exceeded")
    expect("model", refused(openai.NotFoundError, model="gpt-9").param, "model")
    expect("role", refused(openai.BadRequestError, messages=[{"role": "king", "content": "x"}]).param, "messages[0].role")
    expect("n", refused(openai.BadRequestError, n=1000).param, "n")
    for key in ("wrong", "sk-our"):
        try:
            client.with_options(api_key=key).models.list()
            check("401", False)
        except openai.AuthenticationError as e401:
            expect("code", e401.code, "invalid_api_key")
    try:
        client.with_options(max_retries=0).embeddings.create(model="demo", input="x")
        check("501", False)
    except openai.APIStatusError as e501:
        expect("embeddings", (e501.status_code, e501.code), (501, "unsupported_feature"))
    try:
        client.post("/chat/completions", cast_to=object, body={"model": "demo", "messages": ASK},
                    options={"headers": {"Content-Type": "text/plain"}})
        check("415", False)
    except openai.APIStatusError as e415:
        expect("media type", e415.status_code, 415)


def test_13_cancel():
    before = server.metric("requests_cancelled_total")
    stream = chat(stream=True, max_tokens=LONG_ANSWER, extra_body={"ignore_eos": True})
    for _, chunk in zip(range(5), stream):
        check("chunk", chunk.id)
    stream.close()
    until("noticed", lambda: server.metric("requests_cancelled_total") > before)
    until("blocks are back", lambda: server.metric("kv_blocks_used") == 0)


def test_14_timeouts():
    try:
        client.with_options(timeout=0.05, max_retries=0).chat.completions.create(
            model="demo", messages=ASK, max_tokens=LONG_ANSWER, extra_body={"ignore_eos": True})
        check("timeout", False)
    except openai.APITimeoutError:
        pass
    a = chat(max_tokens=LONG_ANSWER, extra_body={"ignore_eos": True, "timeout_ms": 50}).choices[0]
    expect("ours", (a.finish_reason, a.timed_out), ("length", True))
    server.idle()


def test_15_async():
    async def all_():
        a = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key=KEY, max_retries=0)

        async def one(i):
            r = await a.chat.completions.create(model="demo", messages=ASK, temperature=0 if i % 2 else 1, seed=i, max_tokens=30)
            return r.choices[0].message.content

        async def stream(i):
            parts = []
            async for c in await a.chat.completions.create(model="demo", messages=ASK, temperature=0, seed=i, stream=True):
                parts.append(c.choices[0].delta.content or "")
            return "".join(parts)
        whole = await asyncio.gather(*(one(i) for i in range(20)))
        streamed = await asyncio.gather(*(stream(i) for i in range(12)))
        await a.close()
        return whole, streamed
    whole, streamed = asyncio.run(all_())
    expect("greedy ones agree", set(whole[1::2]), {RIGHT})
    expect("streams", set(streamed), {RIGHT})
    expect("seeded alone", text(temperature=1, seed=4, max_tokens=30), whole[4])


def test_99_count():
    calls = sum(1 for line in server.lines() if line.startswith("{") and '"route":"/v1/' in line)
    print(f"     {calls} calls")
    check("at least 60 calls", calls >= 60, calls)


server = Server(TOOL, MODEL, "--model-name", "demo", "--max-queue", "200", *LONG_SESSION, env={"TM_RUN_API_KEY": KEY})
ask_ours, server.ask = server.ask, lambda m, p, b=None, h=None, t=60: ask_ours(m, p, b, {"X-Api-Key": KEY, **(h or {})}, t)
client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key=KEY, max_retries=0)
try:
    result = run([f for name, f in sorted(globals().items()) if name.startswith("test_")])
finally:
    client.close()
    code = server.stop()
if code != 0:
    print(f"FAIL exit code {code}")
    result = 1
sys.exit(result)
