"""A browser driven by its DevTools protocol over a pipe: standard library only. Chromium reads commands from
descriptor 3 and writes answers and events to descriptor 4, JSON texts that end in a zero byte."""
import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def find():
    return next((p for p in map(shutil.which, BROWSERS) if p), None)


class Failed(Exception):
    pass


class Browser:
    """with Browser() as page: page.go(url); page.eval("document.title")"""

    def __init__(self, timeout=60):
        self.timeout = timeout
        self.home = tempfile.mkdtemp(prefix="tmforge-page-")
        command_r, self.w = os.pipe()
        self.r, event_w = os.pipe()
        args = [find(), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                "--no-first-run", "--disable-background-networking", "--disable-component-update",
                "--hide-scrollbars", "--lang=en", f"--user-data-dir={self.home}", "--remote-debugging-pipe",
                "about:blank"]
        # The two ends get their numbers through high ones, so that neither lands on the other.
        self.process = subprocess.Popen(
            ["bash", "-c", 'r=$1 w=$2; shift 2; exec "$@" 3<&"$r" 4>&"$w"', "sh", str(command_r), str(event_w)] + args,
            pass_fds=(command_r, event_w), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True)
        os.close(command_r)
        os.close(event_w)
        self.rest, self.next_id, self.session, self.events = b"", 1, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(domain + ".enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self.call("Browser.close")
        except (Failed, OSError):
            pass
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.w)
        os.close(self.r)
        shutil.rmtree(self.home, ignore_errors=True)

    def message(self, until):
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.r], [], [], max(0, until - time.monotonic()))
            if not ready:
                raise Failed("the browser does not answer in time")
            part = os.read(self.r, 1 << 20)
            if not part:
                raise Failed("the browser has ended")
            self.rest += part
        text, self.rest = self.rest.split(b"\0", 1)
        return json.loads(text)

    def call(self, method, **params):
        command = {"id": self.next_id, "method": method, "params": params}
        if self.session and not method.startswith("Browser."):
            command["sessionId"] = self.session
        self.next_id += 1
        data = json.dumps(command).encode() + b"\0"
        while data:
            data = data[os.write(self.w, data):]
        until = time.monotonic() + self.timeout
        while True:
            m = self.message(until)
            if m.get("id") == command["id"]:
                if "error" in m:
                    raise Failed(f"{method}: {m['error']['message']}")
                return m["result"]
            if "method" in m:
                self.events.append(m)

    def eval(self, expression):
        r = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True,
                      userGesture=True)
        if "exceptionDetails" in r:
            raise Failed(f"{expression}: {r['exceptionDetails'].get('exception', {}).get('description')}")
        return r["result"].get("value")

    def wait(self, expression, what=None, seconds=None):
        """Until the expression is true; its value. What it looks at may not be there yet."""
        until = time.monotonic() + (seconds or self.timeout)
        while True:
            try:
                value, why = self.eval(expression), ""
            except Failed as e:
                value, why = None, f" ({e})"
            if value:
                return value
            if time.monotonic() > until:
                raise Failed(f"not in time: {what or expression}{why}")
            time.sleep(0.03)

    def go(self, url):
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'", url)

    def size(self, width, height, scale=1, phone=False):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale,
                  mobile=phone)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)

    def scheme(self, name):
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def type(self, text):
        self.call("Input.insertText", text=text)

    def key(self, key, code=None, modifiers=0):
        """modifiers: 1 Alt, 2 Ctrl, 8 Shift."""
        codes = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowUp": 38, "ArrowDown": 40, " ": 32}
        press = dict(key=key, code=code or key, modifiers=modifiers,
                     windowsVirtualKeyCode=codes.get(key, ord(key[0].upper())))
        text = {"Enter": "\r", " ": " "}.get(key)
        if text and not modifiers & 3:
            press["text"] = text
        self.call("Input.dispatchKeyEvent", type="keyDown", **press)
        press.pop("text", None)
        self.call("Input.dispatchKeyEvent", type="keyUp", **press)

    def shot(self, path):
        with open(path, "wb") as f:
            f.write(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def complaints(self):
        """What the console and the log were told of: exceptions, refused content, failed requests."""
        self.eval("0")
        out = []
        for e in self.events:
            p = e["params"]
            if e["method"] == "Runtime.exceptionThrown":
                d = p["exceptionDetails"]
                out.append("exception: " + d.get("exception", {}).get("description", d.get("text", "")))
            if e["method"] == "Log.entryAdded" and p["entry"]["level"] == "error":
                out.append(p["entry"]["text"] + " " + p["entry"].get("url", ""))
        return out

    def requests(self):
        return [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
