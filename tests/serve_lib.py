"""What the suites of tm-run serve share: a server of one's own, and requests over plain sockets."""
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time


class Failed(Exception):
    pass


def expect(what, got, want):
    if got != want:
        raise Failed(f"{what}: expected {want!r}, got {got!r}")


def check(what, ok, detail=""):
    if not ok:
        raise Failed(f"{what}: {detail}")


def until(what, true, limit=60, pause=0.01):
    """What true() gives as soon as it is true; it must be within `limit` seconds."""
    end = time.monotonic() + limit
    while not (value := true()):
        check(f"{what} within {limit} s", time.monotonic() < end)
        time.sleep(pause)
    return value


# A session beyond the model's context, for answers that go on for seconds: a test that looks at what runs or waits has
# time for it on any machine.
LONG_SESSION = ("--session-len", "8192")
LONG_ANSWER = 8000


class Server:
    """tm-run serve on a port of its own; its log is kept in .lines(). unix: its socket instead of a port; tls: the
    context that connections are made with."""

    def __init__(self, tool, model, *options, env=None, prefix=(), unix=None, tls=None):
        self.unix, self.tls = unix, tls
        self.log = os.path.join(os.environ.get("TMPDIR", "/tmp"), f"serve-{os.getpid()}-{time.monotonic_ns()}.log")
        self.file = open(self.log, "wb")
        command = [*prefix, tool, "serve", model, "--server-port", "0", *options]
        self.process = subprocess.Popen(command, stderr=self.file, stdout=subprocess.DEVNULL,
                                        env={**os.environ, **(env or {})})
        self.port = None
        for _ in range(600):
            found = re.search(r"listening on (?:https?://[^:]+:(\d+)|/\S+)\n", "".join(self.lines()))
            if found:
                self.port = int(found.group(1) or 0)
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        text = "".join(self.lines())
        self.stop()
        raise Failed(f"the server did not start: {text}")

    def lines(self):
        with open(self.log, encoding="utf-8", errors="replace") as f:
            return f.readlines()

    def term(self):
        self.process.send_signal(signal.SIGTERM)

    def stop(self, limit=30):
        """Ends it; returns the exit code."""
        if self.process.poll() is None:
            self.term()
        try:
            code = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            code = None
        self.file.close()
        if os.path.exists(self.log):
            os.unlink(self.log)
        return code

    def rows(self):
        """The requests of its log so far."""
        return [json.loads(line) for line in self.lines() if line.startswith("{") and line.endswith("}\n")]

    def cpu(self):
        """Seconds of processors that it took so far: what others do on the machine is not in them."""
        with open(f"/proc/{self.process.pid}/stat", encoding="ascii") as f:
            fields = f.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss(self):
        with open(f"/proc/{self.process.pid}/status", encoding="ascii") as f:
            return int(re.search(r"VmRSS:\s+(\d+)", f.read()).group(1)) * 1024

    def connect(self, timeout=20):
        if self.unix:
            s = socket.socket(socket.AF_UNIX)
            s.settimeout(timeout)
            s.connect(self.unix)
            return s
        s = socket.create_connection(("127.0.0.1", self.port), timeout)
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self.tls.wrap_socket(s, server_hostname="localhost") if self.tls else s

    def raw(self, data, timeout=20):
        """Sends bytes; everything that comes back until the end of the connection or one whole answer."""
        with self.connect(timeout) as s:
            try:
                s.sendall(data)
            except OSError:
                pass  # refused before it was all sent; the answer is there
            return read_answer(s)

    def ask(self, method, path, body=None, headers=None, timeout=60):
        """One request; an Answer."""
        fields = {"Host": f"127.0.0.1:{self.port}", "Connection": "close"}
        data = b""
        if body is not None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            fields["Content-Type"] = "application/json"
            fields["Content-Length"] = str(len(data))
        fields.update(headers or {})
        head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in fields.items() if v is not None)
        return self.raw(head.encode("latin-1") + b"\r\n" + data, timeout)

    def post(self, path, body, headers=None, timeout=60):
        return self.ask("POST", path, body, headers, timeout)

    def get(self, path, headers=None):
        return self.ask("GET", path, None, headers)

    def metric(self, name):
        """Sum of a metric over its labels."""
        text = self.get("/metrics").text
        found = re.findall(rf"^tm_{name}(?:{{[^}}]*}})? ([0-9.e+-]+)$", text, re.M)
        check("metric", found, f"no tm_{name}")
        return sum(float(v) for v in found)

    def inside(self):
        """Requests that run or wait, of one look: between two of them one may have begun."""
        text = self.get("/metrics").text
        return sum(int(n) for n in re.findall(r"^tm_requests_(?:running|waiting) (\d+)$", text, re.M))

    def idle(self, limit=60):
        """Waits until no request runs and no block is held."""
        until("it is idle", lambda: self.metric("requests_running") == 0 and self.metric("kv_blocks_used") == 0, limit)


class Answer:
    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    @property
    def text(self):
        return self.body.decode("utf-8")

    @property
    def json(self):
        return json.loads(self.text)

    def events(self):
        """The JSON of each event of a stream, and whether [DONE] was the last."""
        events = [e[6:] for e in self.text.split("\n\n") if e.startswith("data: ")]
        done = bool(events) and events[-1] == "[DONE]"
        return [json.loads(e) for e in events if e != "[DONE]"], done


def read_answer(s):
    data = b""
    try:
        while b"\r\n\r\n" not in data:
            part = s.recv(65536)
            if not part:
                break
            data += part
        head, _, body = data.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        headers = {}
        for line in lines[1:]:
            k, _, v = line.partition(":")
            headers[k.strip().lower()] = v.strip()
        if not lines[0].startswith("HTTP/1."):
            return Answer(0, headers, data)
        status = int(lines[0].split(" ")[1])
        if headers.get("transfer-encoding") == "chunked":
            while not body.endswith(b"0\r\n\r\n"):
                part = s.recv(65536)
                if not part:
                    break
                body += part
            body = unchunk(body)
        else:
            n = int(headers.get("content-length", "0"))
            while len(body) < n:
                part = s.recv(65536)
                if not part:
                    break
                body += part
            body = body[:n]
        return Answer(status, headers, body)
    except ConnectionError:
        return Answer(0, {}, data)


def unchunk(data):
    out = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        n = int(size, 16)
        if n == 0:
            break
        out += data[:n]
        data = data[n + 2:]
    return out


def run(suites):
    """Runs functions by name, one line each; exit code."""
    bad = 0
    for f in suites:
        begin = time.monotonic()
        try:
            f()
            print(f"ok   {f.__name__} ({time.monotonic() - begin:.1f} s)", flush=True)
        except Exception as e:  # pylint: disable=broad-except
            bad += 1
            print(f"FAIL {f.__name__}: {type(e).__name__}: {e}", flush=True)
    return 1 if bad else 0


def tool_and_model():
    """From the command line: TM_RUN MODEL."""
    args = [a for a in sys.argv[1:] if not a.startswith("--")]
    if len(args) != 2:
        print(f"usage: {sys.argv[0]} TM_RUN MODEL [--options]", file=sys.stderr)
        sys.exit(2)
    return args
