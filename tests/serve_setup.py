#!/usr/bin/env python3
"""What options make of tm-run serve, each test with a server of its own."""
import json
import os
import shutil
import signal
import ssl
import stat
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from serve_lib import LONG_ANSWER, LONG_SESSION, Server, check, expect, read_answer, run, tool_and_model, until  # noqa: E402

TOOL, MODEL = tool_and_model()
CHAT, TALK = "/v1/chat/completions", "/v1/chat/interactive"
ASK = {"model": "demo", "temperature": 0, "messages": [{"role": "user", "content": "What is 17 + 25?"}]}
RIGHT = "17 + 25 = 42."
folder = tempfile.TemporaryDirectory()


def path(name, text=None, mode=0o644):
    name = os.path.join(folder.name, name)
    if text is not None:
        with open(name, "w", encoding="utf-8") as f:
            f.write(text)
        os.chmod(name, mode)
    return name


def served(test, *options, **more):
    """Runs a test with a server; it must end with 0."""
    server = Server(TOOL, MODEL, "--model-name", "demo", *options, **more)
    try:
        test(server)
    finally:
        code = server.stop()
    expect("exit code", code, 0)


def test_template_without_earlier_answers():
    """A session whose template shows only the last answers is laid out as a whole at every turn."""
    hides = path("hides.jinja", "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' or loop.index0 > 2 %}"
                 "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
                 "{{ '<|im_start|>assistant\\n' }}")

    def body(server):
        said = []
        for i, words in enumerate(["What is 17 + 25?", "What is 3 + 4?", "And 5 + 6?", "So?"]):
            said.append({"role": "user", "content": words})
            whole = server.post("/apply-template", {"messages": said}).json
            a = server.post(TALK, {"prompt": words, "session_id": 1, "interactive_mode": True, "temperature": 0,
                                   "request_output_len": 12, "stop": ["= 4"]})
            expect(f"turn {i}: {a.text}", a.status, 200)
            a = a.json
            expect("laid out as a whole", a["input_tokens"] + a["history_tokens"], whole["count"])
            expect("the same answer", a["text"],
                   server.post(CHAT, {**ASK, "messages": said, "max_tokens": 12, "stop": ["= 4"]}).json["choices"][0]
                   ["message"]["content"])
            said.append({"role": "assistant", "content": a["text"]})
        check("an answer is hidden", "17 + 25 \n" not in whole["prompt"], whole["prompt"])

    served(body, "--chat-template", hides)


# ---- limits ----

LONG = {**ASK, "max_tokens": LONG_ANSWER, "ignore_eos": True, "stream": True}  # with LONG_SESSION


def begin(server, n, headers=None, body=None):
    """n streams that have their first bytes, as open sockets; 0 bytes where `body` waits."""
    data = json.dumps(body or LONG).encode()
    head = "".join(f"{k}: {v}\r\n" for k, v in (headers or {}).items())
    request = (f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{head}"
               f"Content-Length: {len(data)}\r\n\r\n").encode() + data
    sockets = []
    for _ in range(n):
        s = server.connect()
        s.sendall(request)
        if body is None:
            check("begins", b"200 OK" in s.recv(200))
        sockets.append(s)
    return sockets


def full(answer, word):
    expect(f"status ({answer.text[:200]})", answer.status, 429)
    check("Retry-After", int(answer.headers["retry-after"]) >= 1, answer.headers)
    expect("code", answer.json["error"]["code"], "queue_full")
    check("says why", word in answer.json["error"]["message"], answer.text)


def test_max_per_key():
    keys = path("keys", "one\ntwo\n", 0o600)
    one, two = {"Authorization": "Bearer one"}, {"X-Api-Key": "two"}

    def body(server):
        open_ones = begin(server, 2, one)
        full(server.post(CHAT, ASK, one), "this key may have 2")
        expect("another key", server.post(CHAT, ASK, two).status, 200)
        many = server.post(CHAT, {**ASK, "n": 3}, two)
        expect("more than it may ever have", (many.status, many.json["error"]["param"]), (400, "n"))
        lists = server.post("/get_ppl", {"input": ["a fox", "a hen", "a cat"]}, two)
        expect("more texts than it may ever have", (lists.status, lists.json["error"]["param"]), (400, "input"))
        expect("as many", server.post("/get_ppl", {"input": ["a fox", "a hen"]}, two).status, 200)
        each = server.post("/v1/completions", {"model": "demo", "prompt": ["a fox", "a hen"], "n": 2, "max_tokens": 2},
                           two)
        expect("n for each of two", (each.status, each.json["error"]["param"]), (400, "prompt"))
        text = server.get("/metrics", two).text
        check("counted", 'tm_requests_rejected_total{reason="key_limit"} 1\n' in text, text)
        for s in open_ones:
            s.close()
        until("given back", lambda: server.post(CHAT, {**ASK, "n": 2}, one).status == 200)

    served(body, "--api-key-file", keys, "--max-per-key", "2", *LONG_SESSION)


def test_max_queue_tokens():
    words = {**ASK, "messages": [{"role": "user", "content": "a fox and a hen " * 12}], "max_tokens": 4}

    def body(server):
        n = server.post("/apply-template", {"messages": words["messages"]}).json["count"]
        check("one fits, two do not", 30 < n < 100 < 2 * n, n)
        answers(server)
        runs = begin(server, 1)
        expect("none waits", server.metric("prompt_tokens_waiting"), 0)
        waits = begin(server, 1, None, words)
        until("one waits", lambda: server.metric("prompt_tokens_waiting") == n)
        full(server.post(CHAT, words), "prompts of 100 tokens wait")
        short = begin(server, 1, None, ASK)
        for s in runs:
            s.close()
        for s in waits + short:
            expect("what was let in is answered", read_answer(s).status, 200)
            s.close()
        expect("all given back", server.metric("prompt_tokens_waiting"), 0)
        expect("a long one alone passes", server.post(CHAT, {**words, "messages": [{"role": "user", "content": "x " * 300}]}).status,
               200)

    served(body, "--max-batch-size", "1", "--max-queue-tokens", "100", *LONG_SESSION)


def test_environment():
    """Options from the environment; the command line rules."""
    env = {"TM_RUN_STRICT_PARAMS": "1", "TM_RUN_MAX_BATCH_SIZE": "3", "TM_RUN_MODEL_NAME": "another",
           "TM_RUN_SESSION_LEN": "512", "TM_RUN_PROMPT": "of another command", "TM_RUN_MAX_BACTH_SIZE": "9"}

    def body(server):
        p = server.get("/props").json
        expect("taken", (p["model"], p["max_batch"], p["n_ctx"]), ("demo", 5, 512))
        expect("strict", server.post(CHAT, {**ASK, "nope": 1}).json["error"]["param"], "nope")
        told = [line for line in server.lines() if "environment" in line]
        check("unknown ones are told", len(told) == 1 and "TM_RUN_MAX_BACTH_SIZE" in told[0], told)

    served(body, "--max-batch-size", "5", env=env)
    refused(2, "environment: TM_RUN_MAX_QUEUE", env={"TM_RUN_MAX_QUEUE": "many"})


def test_keys_that_show():
    """Who reads the list of processes reads the command line, not the environment."""
    def body(warned):
        def ask(server):
            expect("a key is needed", server.get("/v1/models").status, 401)
            expect("with it", server.get("/v1/models", {"X-Api-Key": "open"}).status, 200)
            expect("warned", any("every user of this machine" in line for line in server.lines()), warned)
        return ask

    served(body(True), "--api-keys", "open")
    served(body(False), env={"TM_RUN_API_KEYS": "open"})


def test_metrics_alias():
    def body(server, prefix, names):
        answers(server)
        stopped = prefix + 'request_success_total{model_name="demo",engine="0",finished_reason="stop"}'
        # a request is counted once all of its answer is sent: its reader may be faster
        text = until("counted", lambda: f"{stopped} 0\n" not in (t := server.get("/metrics").text) and t)
        lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        own, labels = {k: v for k, v in lines.items() if k.startswith("tm_")}, '{model_name="demo",engine="0"}'
        for alias, ours in names.items():
            expect(alias, lines[prefix + alias + labels], own["tm_" + ours])
        expect("a reason", lines[stopped], "1")
        bucket = 'time_to_first_token_seconds_bucket{model_name="demo",engine="0",le="+Inf"}'
        expect("histogram", lines[prefix + bucket], own['tm_time_to_first_token_seconds_bucket{le="+Inf"}'])
        check("a share", float(lines[prefix + "gpu_cache_usage_perc" + labels]) <= 1)
        types = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
        expect("each told once", len(types), len(set(types)))

    both = {"num_requests_running": "requests_running", "prompt_tokens_total": "prompt_tokens_total",
            "generation_tokens_total": "generation_tokens_total",
            "e2e_request_latency_seconds_sum": "e2e_request_latency_seconds_sum"}
    served(lambda server: body(server, "vllm:", {**both, "num_preemptions_total": "preemptions_total"}),
           "--metrics-alias", "vllm")
    served(lambda server: body(server, "lmdeploy:", both), "--metrics-alias", "lmdeploy")
    refused(2, "vllm|lmdeploy", "--metrics-alias", "other")


def test_slots():
    """Behind the key; figures and no words."""
    keys = path("keys", "one\n", 0o600)
    one = {"Authorization": "Bearer one"}

    def body(server):
        expect("no key", server.get("/slots").status, 401)
        expect("nothing", server.get("/slots", one).json, [])
        sockets = begin(server, 2, one) + begin(server, 1, one, {**LONG, "stream": False})
        rows = until("three of them", lambda: len(r := server.get("/slots", one).json) == 3 and r)
        expect("states", sorted(r["state"] for r in rows), ["answering", "answering", "waiting"])
        expect("keys", set(rows[0]), {"id", "route", "state", "prompt_tokens", "tokens", "seconds"})
        check("figures", all(r["route"] == CHAT and r["prompt_tokens"] > 5 and r["seconds"] >= 0 for r in rows), rows)
        for s in sockets:
            s.close()
        until("gone", lambda: not server.get("/slots", one).json)

    served(body, "--api-key-file", keys, "--max-batch-size", "2", *LONG_SESSION)


def test_supervisor():
    """READY when it answers, WATCHDOG while it works, STOPPING when it ends."""
    import socket  # pylint: disable=import-outside-toplevel
    for name in (path("notify"), "@tm-run-test-" + str(os.getpid())):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
            s.bind("\0" + name[1:] if name[0] == "@" else name)
            s.settimeout(60)
            told = []

            def body(server, s=s, told=told):
                told.append(s.recv(100))
                expect("ready", server.get("/readyz").status, 200)
                told.append(s.recv(100))

            served(body, env={"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "300000"})
            while told[-1] != b"STOPPING=1":
                told.append(s.recv(100))
            expect("first", told[0], b"READY=1")
            expect("between", set(told[1:-1]), {b"WATCHDOG=1"})
    served(answers, env={"NOTIFY_SOCKET": path("nobody listens")})


# ---- ways in ----

def answers(server):
    a = server.post(CHAT, ASK)
    expect(f"status ({a.text[:200]})", a.status, 200)
    expect("text", a.json["choices"][0]["message"]["content"], RIGHT)


def refused(code, word, *options, env=None):
    """The tool ends at once, with this code and word."""
    p = subprocess.run([TOOL, "serve", MODEL, "--server-port", "0", *options], capture_output=True, timeout=60,
                       env={**os.environ, **(env or {})}, check=False)
    expect(f"{options}: exit code ({p.stderr.decode()[-300:]})", p.returncode, code)
    check(f"{options}: names it", word in p.stderr.decode(), p.stderr.decode())


def test_unix_socket():
    name = path("socket")

    def body(server):
        expect("mode", stat.S_IMODE(os.stat(name).st_mode), 0o600)
        answers(server)
        events, done = server.post(CHAT, {**LONG, "max_tokens": 400}).events()
        check("streamed", done and len(events) > 3, events)

    served(body, "--server-name", "unix:" + name, unix=name)
    check("it is gone", not os.path.exists(name))
    refused(2, "a path of at most", "--server-name", "unix:/" + 200 * "x")
    refused(6, "no socket", "--server-name", "unix:" + path("file", "text"))


def pair(name, mode=0o600):
    """A certificate for localhost and its key, made anew."""
    cert, key = path(name + ".crt"), path(name + ".key")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                    "-keyout", key, "-out", cert, "-days", "2", "-subj", f"/CN={name}", "-addext",
                    "subjectAltName=DNS:localhost"], check=True, capture_output=True)
    os.chmod(key, mode)
    return cert, key


def trusting(cert):
    return ssl.create_default_context(cafile=cert)


def test_tls():
    cert, key = pair("first")

    def body(server):
        answers(server)
        with server.connect() as s:
            check("version", s.version() in ("TLSv1.2", "TLSv1.3"), s.version())
            for _ in range(3):  # one connection, several requests
                s.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
                expect("kept alive", read_answer(s).status, 200)
        events, done = server.post(CHAT, {**LONG, "max_tokens": 400}).events()
        check("streamed", done and len(events) > 3, events)
        for file, code in ((cert, 0), (key, 6)):  # tm-run client trusts what it is told to
            p = subprocess.run([TOOL, "client", f"https://localhost:{server.port}", "-p", "What is 17 + 25?", "-t", "0"],
                               capture_output=True, timeout=60, env={**os.environ, "SSL_CERT_FILE": file}, check=False)
            expect(f"client ({p.stderr.decode()[-200:]})", p.returncode, code)
            check("its answer", (RIGHT in p.stdout.decode()) == (code == 0), p.stdout)
        expect("a long body", server.post("/tokenize", {"content": "word " * 100000}).json["count"] > 100000, True)
        expect("too long", server.post(CHAT, b"x" * (5 << 20)).status, 413)
        old = trusting(cert)
        old.minimum_version = ssl.TLSVersion.TLSv1
        old.maximum_version = ssl.TLSVersion.TLSv1_1
        old.set_ciphers("ALL:@SECLEVEL=0")
        middle = trusting(cert)
        middle.maximum_version = ssl.TLSVersion.TLSv1_2
        server.tls = middle
        answers(server)
        server.tls = old
        try:
            server.connect()
            check("TLS 1.1 is refused", False)
        except (ssl.SSLError, ConnectionError):
            pass
        server.tls = None
        with server.connect() as s:  # plain HTTP
            s.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            check("no HTTP", b"HTTP" not in s.recv(4096))
        with server.connect(8) as s:  # a handshake that never comes: ended before the default of 10 s
            expect("closed", s.recv(10), b"")
        server.tls = trusting(cert)
        for s in begin(server, 1):  # a client that goes away
            s.close()
        until("it is noticed", lambda: server.metric("requests_cancelled_total") >= 1)
        server.idle()

    served(body, "--ssl-certfile", cert, "--ssl-keyfile", key, "--header-timeout", "2", *LONG_SESSION, tls=trusting(cert))


def test_tls_reload():
    cert, key = pair("now")
    after = pair("later")

    def serial(server):
        with server.connect() as s:
            return s.getpeercert()["serialNumber"]

    def hang_up(server, word):
        server.process.send_signal(signal.SIGHUP)
        until(f"it tells '{word}'", lambda: any(word in line for line in server.lines()))

    def body(server):
        first = serial(server)
        check("told", any("can read this key" in line for line in server.lines()), server.lines())
        with server.connect() as s:  # goes on over a change
            shutil.copy(after[0], cert)
            hang_up(server, "is not the key of the certificate")
            expect("stays", serial(server), first)
            shutil.copy(after[1], key)
            hang_up(server, "read again")
            server.tls = trusting(cert)
            check("the new one", serial(server) != first)
            path("now.crt", "no certificate")
            hang_up(server, "expected certificates in PEM form")
            server.tls = trusting(after[0])
            answers(server)
            s.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            check("the old connection", b"200 OK" in s.recv(4096))

    os.chmod(key, 0o644)
    served(body, "--ssl-certfile", cert, "--ssl-keyfile", key, tls=trusting(cert))


def test_tls_refusals():
    cert, key = pair("a")
    other = pair("b")
    refused(2, "need each other", "--ssl-certfile", cert)
    refused(2, "need each other", "--ssl-keyfile", key)
    refused(3, "is not the key of the certificate", "--ssl-certfile", cert, "--ssl-keyfile", other[1])
    refused(3, "expected certificates in PEM form", "--ssl-certfile", key, "--ssl-keyfile", key)
    refused(3, "expected a private key in PEM form", "--ssl-certfile", cert, "--ssl-keyfile", cert)
    refused(6, "No such file", "--ssl-certfile", cert, "--ssl-keyfile", path("nowhere"))
    refused(6, "No such file", "--ssl-certfile", path("nowhere"), "--ssl-keyfile", key)


if not shutil.which("openssl"):
    print("SKIP test_tls*: there is no openssl to make certificates with")
    for n in [n for n in globals() if n.startswith("test_tls")]:
        del globals()[n]
result = run([f for name, f in sorted(globals().items()) if name.startswith("test_")])
folder.cleanup()
sys.exit(result)
