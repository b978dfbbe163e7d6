#!/usr/bin/env python3
"""Every way to be refused: status, the four keys of the body, param, and the headers that belong to it."""
import json
import os
import socket
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from serve_lib import (LONG_ANSWER, LONG_SESSION, Failed, Server, check, expect, read_answer, run,  # noqa: E402
                       tool_and_model, until)

TOOL, MODEL = tool_and_model()
CHAT = "/v1/chat/completions"
KEY = "correct-horse"
HELLO = {"model": "demo", "messages": [{"role": "user", "content": "What is 17 + 25?"}], "max_tokens": 4}


def error(answer, status, code, param=None, type_=None):
    expect("status", answer.status, status)
    check("x-request-id", answer.headers.get("x-request-id", "").startswith("req-"), answer.headers)
    expect("type", answer.headers.get("content-type"), "application/json")
    body = answer.json
    expect("keys", list(body), ["error"])
    e = body["error"]
    for key in ("message", "type", "param", "code"):
        check("keys", key in e, f"no {key} in {e}")
    check("message", isinstance(e["message"], str) and e["message"], e)
    check("type", isinstance(e["type"], str), e)
    expect(f"code of {e}", e["code"], code)
    expect(f"param of {e}", e["param"], param)
    if type_:
        expect("type", e["type"], type_)
    return e


def bad_values():
    """(changes to a good chat request, param of the refusal)"""
    user = {"role": "user", "content": "x"}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    yield {"messages": None}, "messages"
    yield {"messages": []}, "messages"
    yield {"messages": 7}, "messages"
    yield {"messages": [7]}, "messages[0]"
    yield {"messages": [{"content": "x"}]}, "messages[0].role"
    yield {"messages": [{"role": "root", "content": "x"}]}, "messages[0].role"
    yield {"messages": [{"role": "user"}]}, "messages[0].content"
    yield {"messages": [user, {"role": "user", "content": 7}]}, "messages[1].content"
    yield {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"
    yield {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"
    yield {"messages": [user, {"role": "assistant", "content": None}]}, "messages[1].content"
    yield {"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function"
    yield {"model": None}, "model"
    yield {"model": 5}, "model"
    for name, values in {
            "temperature": [-0.1, 2.1, "1", True, 1e308], "top_p": [0, 1.1, -1, "1"], "min_p": [-0.1, 1.1],
            "top_k": [-1, 1.5, 2**40, "40"], "repetition_penalty": [0, -1, 1e9],
            "presence_penalty": [-2.1, 2.1], "frequency_penalty": [-2.1, 2.1, "x"],
            "n": [0, -1, 1.5, 129, 2**31, 2**63, "2"], "max_tokens": [0, -1, 1.5, 2**31, 2**63, "10"],
            "max_completion_tokens": [0, -1], "min_tokens": [-1, "1"], "timeout_ms": [0, -5, 1e12],
            "seed": [0.5, 2**65, "1", -2**70], "stream": [1, "true"], "ignore_eos": ["yes"],
            "skip_special_tokens": [0], "logprobs": [1, "yes"], "top_logprobs": [-1, 21, 10**6],
            "stop": [7, [7], [""], [], ""][:3], "stop_token_ids": [7, [1.5], [-1], [10**9]],
            "tools": [7, {}], "tool_choice": ["any", 7], "response_format": ["json", {}],
            "logit_bias": [[], 7], "stream_options": [7], "chat_template_kwargs": [7]}.items():
        for v in values:
            p = {"stop": "stop[0]" if isinstance(v, list) else "stop",
                 "stop_token_ids": "stop_token_ids[0]" if isinstance(v, list) else "stop_token_ids",
                 "response_format": "response_format.type" if v == {} else "response_format"}.get(name, name)
            yield {name: v}, p
    yield {"top_logprobs": 3}, "top_logprobs"  # without logprobs
    yield {"stop": ["a"] * 17}, "stop"
    yield {"stop": "x" * (1 << 20)}, "stop"
    yield {"logit_bias": {"x": 1}}, "logit_bias.x"
    yield {"logit_bias": {"99999999": 1}}, "logit_bias.99999999"
    yield {"logit_bias": {"5": 101}}, "logit_bias.5"
    yield {"stream_options": {"include_usage": 1}}, "stream_options.include_usage"
    yield {"tools": [{"type": "x"}]}, "tools[0].type"
    yield {"tools": [{"type": "function"}]}, "tools[0].function"
    yield {"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"
    yield {"tools": [tool, tool]}, "tools[1].function.name"
    yield {"tool_choice": "required"}, "tool_choice"
    yield {"tools": [tool], "tool_choice": {"function": {"name": "g"}}}, "tool_choice.function.name"
    yield {"response_format": {"type": "xml"}}, "response_format.type"
    yield {"response_format": {"type": "json_schema"}}, "response_format.json_schema"
    yield {"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"
    yield {"response_format": {"type": "regex"}}, "response_format.regex"
    yield {"response_format": {"type": "regex", "regex": "(a"}}, "response_format"
    yield {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}}, "response_format"
    yield {"adapter_name": "lora"}, "adapter_name"
    yield {"chat_template": "{{ x }}"}, "chat_template"
    yield {"functions": []}, "functions"


def test_bad_values():
    for change, param in bad_values():
        body = {k: v for k, v in {**HELLO, **change}.items() if v is not None}
        try:
            error(plain.post(CHAT, body), 400, "invalid_value", param, "invalid_request_error")
        except Failed as e:
            raise Failed(f"{json.dumps(change)[:200]}: {e}") from e


def test_bad_values_of_completions():
    for change, param in [({"prompt": None}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": [""]}, None),
                          ({"prompt": [1, 2.5]}, "prompt[1]"), ({"prompt": [-1]}, "prompt[0]"),
                          ({"prompt": {}}, "prompt"), ({"best_of": 2}, "best_of"), ({"suffix": "x"}, "suffix"),
                          ({"logprobs": 21}, "logprobs"), ({"logprobs": -1}, "logprobs"), ({"max_tokens": 0}, "max_tokens")]:
        body = {k: v for k, v in {"model": "demo", "prompt": "x", "max_tokens": 2, **change}.items() if v is not None}
        answer = plain.post("/v1/completions", body)
        if param:
            error(answer, 400, "invalid_value", param)
        else:
            check("status", answer.status in (200, 400), answer.status)  # BOS alone is a prompt


def test_bad_json():
    for body in [b"", b"{", b"[]", b"null", b'"x"', b'{"model":"demo"', b'{"a":1}{"b":2}', b'{"a":1,"a":2}',
                 b'{"model":"\xff\xfe"}', b"{\"model\":\"\\ud800\"}", b'{"temperature":1e999}', b'{"n":' + b"1" * 5000 + b"}",
                 b'{"x":' + b"[" * 5000 + b"]" * 5000 + b"}", b"\x00", b'{"model":"a\\u0000b"}', b"\xef\xbb\xbf{}"]:
        e = error(plain.ask("POST", CHAT, body), 400, "invalid_value")
        check("no inside", "/" not in e["message"] or "0x" not in e["message"], e)


def test_unknown_fields_pass():
    expect("status", plain.post(CHAT, {**HELLO, "shoe_size": 46}).status, 200)


def test_strict_params():
    error(strict.post(CHAT, {**HELLO, "shoe_size": 46}, KEYED), 400, "invalid_value", "shoe_size")


def test_context():
    long = "word " * 5000
    e = error(plain.post(CHAT, {**HELLO, "messages": [{"role": "user", "content": long}]}), 400,
              "context_length_exceeded", "messages")
    check("figures", e["n_prompt_tokens"] > e["n_ctx"] > 0, e)
    error(plain.post("/v1/completions", {"model": "demo", "prompt": long}), 400, "context_length_exceeded", "prompt")


def test_keys():
    for headers in [{}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": f"Basic {KEY}"},
                    {"X-Api-Key": KEY + "x"}, {"Authorization": "Bearer "}]:
        for method, path in [("GET", "/v1/models"), ("POST", CHAT), ("GET", "/metrics"), ("GET", "/nothing"),
                             ("GET", "/props"), ("GET", "/v1/models/x"), ("GET", "//v1/models"), ("GET", "/openapi.json")]:
            answer = strict.ask(method, path, HELLO if method == "POST" else None, headers)
            error(answer, 401, "invalid_api_key")
            expect("WWW-Authenticate", answer.headers.get("www-authenticate"), "Bearer")
    for headers in [KEYED, {"X-Api-Key": KEY}, {"Authorization": "bearer second-key"}]:
        expect("status", strict.ask("GET", "/v1/models", None, headers).status, 200)
    for path in ["/livez", "/readyz", "/health", "/"]:
        expect(path, strict.get(path).status, 200)


def test_prefixes_stay_with_their_key():
    """What one key's prompts left in the cache shows in nobody else's times."""
    body = {**HELLO, "messages": [{"role": "user", "content": "A fox and a hen. " * 60}], "max_tokens": 2}

    def cached(headers):
        return strict.post(CHAT, body, headers).json["usage"]["prompt_tokens_details"]["cached_tokens"]
    expect("first", cached(KEYED), 0)
    check("again", cached(KEYED) > 100)
    expect("another key", cached({"X-Api-Key": "second-key"}), 0)
    check("its own", cached({"X-Api-Key": "second-key"}) > 100)


def test_host_and_origin():
    for host in ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "127.0.0.1:x", "10.0.0.1"]:
        error(plain.get("/v1/models", {"Host": host}), 403, "forbidden")
    for host in ["localhost", f"localhost:{plain.port}", "127.0.0.1", "[::1]:80", "LOCALHOST"]:
        expect(host, plain.get("/v1/models", {"Host": host}).status, 200)
    error(plain.get("/v1/models", {"Origin": "https://evil.example"}), 403, "forbidden")
    error(plain.get("/v1/models", {"Origin": "null"}), 403, "forbidden")
    same = plain.get("/v1/models", {"Origin": f"http://127.0.0.1:{plain.port}"})
    expect("own page", same.status, 200)
    check("no CORS", "access-control-allow-origin" not in same.headers, same.headers)
    there = strict.get("/v1/models", {**KEYED, "Origin": "https://page.example"})
    expect("allowed", there.headers.get("access-control-allow-origin"), "https://page.example")
    asked = strict.ask("OPTIONS", CHAT, None, {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"})
    expect("asked before", (asked.status, asked.headers.get("access-control-allow-origin")), (204, "https://page.example"))
    expect("from elsewhere", strict.ask("OPTIONS", CHAT, None, {
        "Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}).status, 403)
    check("no credentials", "access-control-allow-credentials" not in there.headers, there.headers)


def test_not_found():
    error(plain.post(CHAT, {**HELLO, "model": "gpt-9"}), 404, "model_not_found", "model")
    error(plain.get("/v1/models/gpt-9"), 404, "model_not_found", "model")
    for path in ["/nothing", "/v1", "/v1/", "//", "/v1/chat/completions/", "/%2e%2e/etc/passwd", "/../x", "/V1/models",
                 "/" + "a" * 5000]:
        error(plain.get(path), 404, "not_found")


def test_method():
    for method, path, allow in [("GET", CHAT, "POST"), ("DELETE", "/v1/models", "GET, HEAD"), ("PUT", "/", "GET, HEAD"),
                                ("OPTIONS", CHAT, "POST")]:
        answer = plain.ask(method, path)
        error(answer, 405, "method_not_allowed")
        expect("Allow", answer.headers.get("allow"), allow)


def test_media_type():
    for type_ in ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/jsonx", None]:
        error(plain.ask("POST", CHAT, HELLO, {"Content-Type": type_}), 415, "unsupported_media_type")
    error(plain.ask("POST", CHAT, HELLO, {"Content-Encoding": "gzip"}), 415, "unsupported_media_type")
    expect("charset", plain.ask("POST", CHAT, HELLO, {"Content-Type": "application/json; charset=utf-8"}).status, 200)


def test_too_large():
    error(strict.post(CHAT, b" " * 70000, KEYED), 413, "body_too_large")
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nAuthorization: Bearer {KEY}\r\n"
    error(strict.raw((head + "Content-Length: 1073741824\r\n\r\n").encode() + b"x" * 100000), 413, "body_too_large")
    error(strict.raw((head + "Content-Length: 1073741824\r\nExpect: 100-continue\r\n\r\n").encode()), 413, "body_too_large")
    chunks = b"".join(b"4000\r\n" + b" " * 0x4000 + b"\r\n" for _ in range(5)) + b"0\r\n\r\n"
    error(strict.raw((head + "Transfer-Encoding: chunked\r\n\r\n").encode() + chunks), 413, "body_too_large")


def test_headers_too_large():
    error(plain.get("/v1/models", {"X-Long": "x" * 40000}), 431, "headers_too_large")
    error(plain.get("/v1/models", {f"X-{i}": "y" * 20 for i in range(2000)}), 431, "headers_too_large")
    check("beyond the library's buffer", plain.get("/v1/models", {"X-Long": "x" * 400000}).status in (431, 0), "")


def test_framing():
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for fields in ["Content-Length: 2\r\nTransfer-Encoding: chunked\r\n", "Content-Length: 2\r\nContent-Length: 3\r\n",
                   "Content-Length: 2\r\nHost: localhost\r\n"]:
        answer = plain.raw((head + fields + "\r\n").encode() + b"{}")
        check(fields, answer.status == 400, answer.status)
        expect("close", answer.headers.get("connection", "").lower(), "close")
    answer = plain.raw(b"GET /v1/models HTTP/1.1\r\n\r\n")
    expect("no Host", answer.status, 400)


def test_body_too_slow():
    hasty = Server(TOOL, MODEL, "--body-timeout", "0.5", "--header-timeout", "0.5")
    try:
        for part in (f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                     f"Content-Length: 100\r\n\r\n{{", "GET /v1/mod"):
            with hasty.connect() as s:
                s.sendall(part.encode())
                error(read_answer(s), 408, "request_timeout")
    finally:
        expect("exit code", hasty.stop(), 0)


def test_session_busy():
    body = {"prompt": "Tell me a story.", "session_id": 7, "interactive_mode": True, "stream": True,
            "request_output_len": LONG_ANSWER, "ignore_eos": True}
    with lasting.connect() as s:
        data = json.dumps(body).encode()
        s.sendall(f"POST /v1/chat/interactive HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                  f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        check("it answers", b"200 OK" in s.recv(4096), "")
        error(lasting.post("/v1/chat/interactive", {**body, "stream": False}), 409, "conflict", "session_id")
        lasting.post("/v1/chat/interactive", {"session_id": 7, "cancel": True})
    lasting.idle()


def test_feature_off():
    error(plain.post("/v1/embeddings", {"model": "demo", "input": "x"}), 501, "unsupported_feature")


def stream(s, tokens):
    """Asks for a stream of so many tokens."""
    data = json.dumps({**HELLO, "max_tokens": tokens, "ignore_eos": True, "stream": True}).encode()
    s.sendall((f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
               f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n").encode() + data)
    return s


def test_queue_full():
    """One answer at once and one that waits: the third is refused at the door, while they go on."""
    with lasting.connect() as first, lasting.connect() as second:
        for s in (first, second):
            stream(s, LONG_ANSWER)
        until("both are in", lambda: lasting.inside() == 2)
        refused = lasting.post(CHAT, HELLO)
        error(refused, 429, "queue_full", type_="rate_limit")
        check("Retry-After", int(refused.headers["retry-after"]) >= 1, refused.headers)
        expect("at once: both are still there", lasting.inside(), 2)
    lasting.idle()
    error(lasting.post(CHAT, {**HELLO, "n": 2}), 400, "invalid_value", "n")
    expect("accepted again", lasting.post(CHAT, HELLO).status, 200)


def test_draining():
    """What was let in is answered, and nothing else is. A long answer holds the server up meanwhile."""
    server = Server(TOOL, MODEL, "--model-name", "demo", "--max-batch-size", "1", *LONG_SESSION)
    sockets = []
    try:
        for tokens in (1000, LONG_ANSWER, 300, 300):
            sockets.append(stream(server.connect(), tokens))
        until("all are in", lambda: sum(r["route"] == CHAT for r in server.rows()) + server.inside() == 4)
        server.term()
        until("it drains", lambda: server.get("/readyz").status == 503)
        for answer in [server.post(CHAT, HELLO), server.get("/readyz")]:
            error(answer, 503, "service_unavailable")
            check("Retry-After", int(answer.headers["retry-after"]) >= 1, answer.headers)
        expect("alive", server.get("/livez").status, 200)
        sockets.pop(1).close()
        for s in sockets:
            s.settimeout(60)
            rest = b""
            while part := s.recv(65536):
                rest += part
            check("whole answer", b"data: [DONE]" in rest and b'"finish_reason":"length"' in rest, rest[-300:])
        code = server.process.wait(60)
    finally:
        for s in sockets:
            s.close()
        server.stop()
    expect("exit code", code, 0)


def test_options():
    """What serve refuses before it listens."""
    import subprocess  # pylint: disable=import-outside-toplevel
    key_file = os.path.join(tempfile.mkdtemp(), "keys")
    with open(key_file, "w", encoding="ascii") as f:
        f.write("k\n")
    os.chmod(key_file, 0o644)
    for options, code, word in [(["--server-name", "0.0.0.0"], 2, "--api-key-file"), (["--tp", "2"], 4, "--tp 1"),
                                (["--api-key-file", key_file], 3, "0600"), (["--server-port", "99999"], 2, "server-port"),
                                (["--api-key-file", "/nowhere"], 6, "nowhere")]:
        p = subprocess.run([TOOL, "serve", MODEL, *options], capture_output=True, timeout=60, check=False)
        expect(f"{options}", p.returncode, code)
        check(f"{options}", word in p.stderr.decode(), p.stderr)


def test_socket_in_use():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        import subprocess  # pylint: disable=import-outside-toplevel
        p = subprocess.run([TOOL, "serve", MODEL, "--server-port", str(s.getsockname()[1])], capture_output=True,
                           timeout=60, check=False)
        expect("exit code", p.returncode, 6)


KEYED = {"Authorization": f"Bearer {KEY}"}
with tempfile.NamedTemporaryFile("w") as keys:
    keys.write(f"# ours\n{KEY}\n")
    keys.flush()
    plain = Server(TOOL, MODEL, "--model-name", "demo", "--model-name", "gpt-3.5-turbo")
    strict = Server(TOOL, MODEL, "--model-name", "demo", "--api-key-file", keys.name, "--strict-params", "--max-body", "64K",
                    "--allow-origin", "https://page.example", env={"TM_RUN_API_KEY": "second-key"})
    lasting = Server(TOOL, MODEL, "--model-name", "demo", "--max-batch-size", "1", "--max-queue", "1", *LONG_SESSION)
servers = (plain, strict, lasting)
try:
    result = run([f for name, f in sorted(globals().items()) if name.startswith("test_")])
    if any(s.process.poll() is not None for s in servers):
        print("FAIL a server is gone")
        result = 1
finally:
    codes = [s.stop() for s in servers]
if any(codes):
    print(f"FAIL exit codes: {codes}")
    result = 1
sys.exit(result)
