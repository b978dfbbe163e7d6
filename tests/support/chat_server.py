#!/usr/bin/env python3
"""chat_server.py PORT_FILE: a small stand-in for servers of OpenAI's chat interface, for the clients' tests. The
last user message says how it behaves: "pieces" cuts the bytes of the stream anywhere, "crlf" ends lines as other
servers do and sends comments, "refuse" is a 429, "break" an error inside the stream, "drop" a connection that ends
early, "slow" never ends by itself, "unsafe" a text with control bytes, "markup" all that the page renders and some
that it must not, "wrong" is no JSON; anything else gets a short answer. The page itself is at /.
Writes its port to PORT_FILE, and a line "left" to PORT_FILE.log when a client closes a connection early. With
TMF_KEY set, requests need that key."""
import base64
import hashlib
import http.server
import json
import os
import re
import sys
import time

PAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "runtime", "serve", "page.html")
MARKUP = """# Heading <b>x</b>

Some **bold**, *italic*, `co<i>de`, ~~gone~~, [good](https://example.org/a), [bad](javascript:pwned=1),
[data](data:text/html,x), ![image](https://example.org/i.png), https://example.org/plain. <img src=x onerror="pwned=1">
<script>pwned = 1</script>

1. one
2. two
   - nested

| a | b |
|---|--:|
| 1 | <u>2</u> |

> quoted

```html
<script>pwned = 2</script>
  indented
```

---
"""


class Server(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def answer(self, status, value, **headers):
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(body)

    def error(self, status, code, message, **headers):
        self.answer(status, {"error": {"message": message, "type": "t", "param": None, "code": code}}, **headers)

    def allowed(self):
        key = os.environ.get("TMF_KEY")
        if not key or self.headers.get("Authorization") == f"Bearer {key}":
            return True
        self.error(401, "invalid_api_key", "the key is not known")
        return False

    def page(self):
        with open(PAGE, "rb") as f:
            page = f.read()

        def source(tag):
            text = re.search(b"<%s>(.*?)</%s>" % (tag, tag), page, re.S).group(1)
            return base64.b64encode(hashlib.sha256(text).digest()).decode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        self.send_header("Content-Security-Policy", f"default-src 'none'; script-src 'sha256-{source(b'script')}'; "
                         f"style-src 'sha256-{source(b'style')}'; connect-src 'self'; img-src data:")
        self.end_headers()
        self.wfile.write(page)

    def do_GET(self):
        if self.path == "/":
            self.page()
            return
        if not self.allowed():
            return
        if self.path == "/v1/models":
            self.answer(200, {"object": "list", "data": [{"id": "echo"}, {"id": "other"}]})
        else:
            self.error(404, "not_found", "no such route")

    def chunk(self, data):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.allowed():
            return
        request = json.loads(body)
        if self.path == "/tokenize":
            self.answer(200, {"tokens": list(range(1, 1 + len(request["content"].split())))})
            return
        chat = "messages" in request
        prompt = request["messages"][-1]["content"] if chat else request["prompt"]
        mode = prompt if isinstance(prompt, str) else "echo"
        if mode == "refuse":
            self.error(429, "queue_full", "the queue is full", Retry_After="2")
            return
        if mode == "wrong":
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"<p>x")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            self.stream(request, mode, chat)
        except OSError:
            with open(sys.argv[1] + ".log", "a", encoding="utf-8") as f:
                f.write("left\n")

    def stream(self, request, mode, chat):
        end = b"\r\n" if mode == "crlf" else b"\n"
        words = ["the ", "answer ", "is ", "\u00e9t\u00e9 ", "\U0001f30d."]
        if mode == "echo":
            words = [" w"] * request.get("max_tokens", 4)
        elif mode == "unsafe":
            words = ["a\x1b[31mb\x9b", "\x07c\n\td"]
        elif mode == "nul":
            words = ["a\0b \\u0000 ", "\0", "\\\0."]
        elif mode == "markup":
            words = re.findall(r"\s*\S+|\s+", MARKUP)
        elif mode == "parameters":
            words = [json.dumps({k: v for k, v in sorted(request.items()) if k not in ("messages", "stream")})]
        elif mode == "messages":
            words = [json.dumps(request["messages"])]
        elif mode == "long":
            words = ["x" * 300000]

        def event(value):
            data = b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + end + end
            if mode == "crlf":
                data = b": ping" + end + b"event: message" + end + data.replace(b"data: ", b"data:", 1)
            if mode != "pieces":
                self.chunk(data)
                return
            for i in range(0, len(data), 7):
                self.chunk(data[i:i + 7])

        def text(s, why=None):
            part = {"delta": {"content": s} if s else {}} if chat else {"text": s}
            event({"choices": [{"index": 0, "finish_reason": why, **part}]})

        if chat:
            event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        for i, word in enumerate(words):
            text(word)
            if mode == "break" and i == 1:
                event({"error": {"message": "the device failed", "code": "internal_error"}})
                event(b"[DONE]")
                self.chunk(b"")
                return
            if mode == "drop" and i == 1:
                self.close_connection = True
                return
            while mode == "slow":
                time.sleep(0.02)
                text(word)
        text("", "length" if mode == "echo" else "stop")
        event({"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": len(words),
                                        "total_tokens": 11 + len(words)}})
        event(b"[DONE]")
        self.chunk(b"")


def main():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.daemon_threads = True
    with open(sys.argv[1] + ".new", "w", encoding="utf-8") as f:
        f.write(str(server.server_address[1]))
    os.rename(sys.argv[1] + ".new", sys.argv[1])
    server.serve_forever()


main()
