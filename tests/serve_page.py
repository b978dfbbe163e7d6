#!/usr/bin/env python3
"""serve_page.py TM_RUN MODEL: the chat page in a real browser, on tm-run serve with a model, and on a stand-in
server that fails in every way. TMF_SHOTS names a folder for screenshots."""
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(here, "support"))
import cdp  # noqa: E402

ENTER, ALT, SHIFT = "Enter", 1, 8
checks = 0


def check(value, what):
    global checks
    checks += 1
    if not value:
        raise cdp.Failed(f"{what}: {value!r}")


def text_of(selector):
    return f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.innerText)"


def ask(page, text, wait=True):
    page.eval("document.getElementById('text').focus()")
    page.type(text)
    page.key(ENTER)
    page.wait("document.body.classList.contains('busy') || !!document.querySelector('.assistant')", "an answer begins")
    if wait:
        page.wait("!document.body.classList.contains('busy')", f"the answer to {text!r}")


def answers(page):
    return page.eval(text_of("article.assistant .md"))


def click(page, name, last=True):
    """The button of that name, by what a screen reader calls it."""
    found = page.eval(f"""(() => {{
      const all = [...document.querySelectorAll('button, summary')].filter(b => b.checkVisibility() &&
        (b.getAttribute('aria-label') || b.innerText).trim() === {json.dumps(name)});
      const b = all[{'all.length - 1' if last else 0}];
      if (b) b.click();
      return !!b; }})()""")
    check(found, f"a button {name!r}")


def shot(page, name):
    if os.environ.get("TMF_SHOTS"):
        time.sleep(0.15)
        page.shot(os.path.join(os.environ["TMF_SHOTS"], name + ".png"))


def fits(page, what):
    wide = page.eval("""[document.documentElement.scrollWidth - innerWidth, ...[...document.querySelectorAll(
      'main, #dock, #ask, #turns, article, #top')].map(e => Math.round(e.getBoundingClientRect().right - innerWidth))]""")
    check(max(wide) <= 0, f"{what} is no wider than the screen")


def names(page, what):
    bare = page.eval("""[...document.querySelectorAll('button, summary, input:not([hidden]), textarea, select')]
      .filter(e => !(e.getAttribute('aria-label') || e.textContent.trim() || (e.labels && e.labels.length)))
      .map(e => e.outerHTML)""")
    check(bare == [], f"every control has a name {what}, not {bare}")


def with_model(page, url):
    page.size(1280, 800)
    page.scheme("light")
    page.go(url)
    page.wait("document.getElementById('model').textContent === 'demo'", "the model's name")
    shot(page, "desktop-light-empty")
    click(page, "Settings")
    page.eval("document.getElementById('o-temperature').focus()")
    page.type("0")
    shot(page, "desktop-light-settings")
    page.key("Escape")
    ask(page, "What is 17 + 25?")
    check(answers(page) == ["17 + 25 = 42."], "the model's answer")
    stats = page.eval(text_of(".assistant .num"))[0]
    check(re.fullmatch(r"1[0-9] tokens · [0-9,.]+ tokens/s · first after [0-9.]+ s", stats), f"figures: {stats}")
    bar = page.wait("document.getElementById('figures').innerText.includes('cache') && "
                    "document.getElementById('figures').innerText")
    check(re.fullmatch(r"context 3[0-9] of 1,024 · cache [0-9.]+ %", bar), f"context and cache: {bar}")
    check("17 + 25 = 42." in page.eval("document.getElementById('live').textContent"), "the live region has it")
    ask(page, "Remember this. The code of Anna is 4821. The code of Ben is 9377.")
    ask(page, "What is the code of Ben?")
    check(len(answers(page)) == 3, "three turns")
    check("from cache" in page.eval(text_of(".assistant .num"))[2], "what was said came from the cache")
    shot(page, "desktop-light")
    page.scheme("dark")
    shot(page, "desktop-dark")
    page.size(390, 844, 2, True)
    shot(page, "phone-dark")
    page.scheme("light")
    shot(page, "phone-light")
    fits(page, "a phone's page")
    own = [r for r in page.requests() if not r.startswith((url, "data:", "blob:", "about:", "chrome"))]
    check(own == [], "no request to another place")
    check(page.complaints() == [], "no complaint")


def turns(page):
    """Edit, other answers, branches, stop, errors."""
    ask(page, "hello")
    check(answers(page) == ["the answer is \u00e9t\u00e9 \U0001f30d."], "an answer")
    click(page, "Regenerate")
    page.wait("document.querySelector('.assistant .meta').innerText.includes('2 / 2')", "a second version")
    click(page, "Earlier version")
    page.wait("document.querySelector('.assistant .meta').innerText.includes('1 / 2')", "the first one again")
    page.eval("document.getElementById('text').focus()")
    page.key("ArrowUp")
    page.wait("document.activeElement.matches('article textarea')", "the message is edited")
    page.eval("document.activeElement.select()")
    page.type("messages")
    page.key(ENTER)
    page.wait("document.querySelector('.user .meta').innerText.includes('2 / 2') && "
              "!document.body.classList.contains('busy')", "a branch")
    check(json.loads(answers(page)[0]) == [{"role": "user", "content": "messages"}], "the branch was asked alone")
    click(page, "Earlier version", last=False)
    check(page.eval(text_of(".user .text")) == ["hello"], "the first branch is still there")

    page.key("n", "KeyN", ALT)
    ask(page, "slow", wait=False)
    page.wait("/the the the/.test(document.querySelector('.assistant .md')?.innerText)", "it streams")
    check(page.eval("document.getElementById('go').getAttribute('aria-label')") == "Stop", "Send has become Stop")
    page.wait("/^[0-9]+ tokens · [0-9.]+ tokens.s/.test(document.getElementById('figures').innerText)", "live figures")
    shot(page, "desktop-streaming")
    page.key("Escape")
    page.wait("!document.body.classList.contains('busy') && document.querySelector('.cut')?.innerText === 'Stopped'",
              "Esc stops it")
    check("the the" in answers(page)[0], "what came is kept")

    page.key("n", "KeyN", ALT)
    ask(page, "refuse")
    error = page.eval(text_of(".err"))[0]
    check("The queue is full. Try again in 2 s." in error and "429 queue_full" in error, f"a refusal: {error}")
    shot(page, "desktop-refused")
    click(page, "Retry")
    page.wait("!document.body.classList.contains('busy')")
    check(len(page.eval(text_of("article"))) == 2 and "/" not in page.eval(text_of(".meta"))[0], "a retry is no branch")
    ask(page, "break")
    check("The device failed." in page.eval(text_of(".err"))[-1], "an error inside the stream")
    ask(page, "drop")
    check(page.eval(text_of(".err"))[-1], "a connection that breaks")
    ask(page, "wrong")
    check(page.eval(text_of(".err"))[-1], "no stream at all")


def rendering(page):
    page.key("n", "KeyN", ALT)
    ask(page, "markup")
    check(page.eval("window.pwned === undefined"), "nothing of an answer runs")
    check(page.eval("""['img', 'script', 'u', 'b', 'i', 'iframe', 'style'].filter(t =>
      document.querySelector('.md ' + t))""") == [], "no element of an answer's own")
    check(page.eval("[...document.querySelectorAll('.md a')].map(a => [a.href, a.rel.includes('noopener'), a.target])")
          == [["https://example.org/" + x, True, "_blank"] for x in ("a", "i.png", "plain")], "http links alone")
    check(page.eval("document.querySelector('.md pre code').textContent") ==
          "<script>pwned = 2</script>\n  indented", "code as it is")
    check(page.eval("document.querySelector('.md h3').textContent") == "Heading <b>x</b>", "a heading")
    missing = page.eval("""['strong', 'em', 's', 'p code', 'ol > li > ul > li', 'table td.r', 'blockquote', 'hr',
      'figcaption'].filter(t => !document.querySelector('.md ' + t))""")
    check(missing == [], f"the subset is rendered, not {missing}")
    shot(page, "desktop-markup")
    page.eval("navigator.clipboard.writeText = async t => { window.copied = t; }")
    page.eval("document.querySelector('.md figcaption button').click()")
    page.wait("window.copied === '<script>pwned = 2</script>\\n  indented'", "copying code")
    page.key("n", "KeyN", ALT)
    ask(page, "long")
    check(page.eval("document.querySelector('.md').innerText.length") == 300000, "one word of 300 kB")


def conversations(page):
    page.key("n", "KeyN", ALT)
    page.eval("document.getElementById('text').focus()")
    page.type("first line")
    page.key(ENTER, modifiers=SHIFT)
    page.type("second")
    check(page.eval("document.getElementById('text').value") == "first line\nsecond", "Shift+Enter begins a line")
    page.key(ENTER)
    page.wait("!!document.querySelector('.assistant .meta')", "an answer")
    check(page.eval("document.querySelector('[aria-current]').innerText") == "first line", "the name is the first line")
    page.eval("document.querySelector('#name button').click()")
    page.type("Renamed")
    page.key(ENTER)
    page.wait("document.querySelector('[aria-current]').innerText === 'Renamed'", "a new name")
    page.key("s", "KeyS", ALT)
    page.eval("document.getElementById('system').focus()")
    page.type("be brief")
    page.key("Escape")
    ask(page, "messages")
    check([m["content"] for m in json.loads(answers(page)[1])][:2] == ["be brief", "first line\nsecond"],
          "the system prompt goes first")
    page.eval("""document.querySelector('#menu').open = true;
      window.saved = null; URL.createObjectURL = b => { b.text().then(t => { window.saved = t; }); return 'blob:x'; };
      HTMLAnchorElement.prototype.click = function () { window.file = this.download; }""")
    click(page, "Export as JSON")
    page.wait("window.saved")
    saved = json.loads(page.eval("window.saved"))
    check(page.eval("window.file") == "Renamed.json", "the file's name")
    check([m["role"] for m in saved["chats"][0]["messages"]] == ["system", "user", "assistant", "user", "assistant"],
          "what it holds")
    count = len(page.eval(text_of("#list button")))
    page.eval("document.querySelector('#menu').open = true")
    click(page, "Delete")
    page.wait("document.querySelector('[aria-current]').innerText === 'New conversation'", "it is gone")
    check("Renamed" not in page.eval(text_of("#list button")), "from the list")
    click(page, "Undo")
    page.wait("document.querySelector('[aria-current]').innerText === 'Renamed'", "and back")
    check(len(page.eval(text_of("#list button"))) == count, "as many as before")
    imports(page, saved)
    before = answers(page)
    page.eval("window.beforeReload = true")
    page.call("Page.reload")
    page.wait("!window.beforeReload && document.readyState === 'complete' && "
              "document.querySelectorAll('.assistant .md').length === 2",
              "after a reload it is all there")
    check(answers(page) == before, "word for word")
    names(page, "in a conversation")


def imports(page, saved):
    """A file of ours comes in beside what is there; one with anything in it breaks nothing."""
    def read(value):
        with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as f:
            json.dump(value, f)
        node = page.call("DOM.querySelector", nodeId=page.call("DOM.getDocument")["root"]["nodeId"], selector="#file")
        page.eval("document.getElementById('note').hidden = true")
        page.call("DOM.setFileInputFiles", files=[f.name], nodeId=node["nodeId"])
        page.wait("!document.getElementById('note').hidden")
        os.remove(f.name)
        return page.eval("document.querySelector('#note span').innerText")
    before = answers(page)
    check(read(saved) == "1 conversation read.", "what was exported is read")
    check(page.eval(text_of("#list button")).count("Renamed") == 2 and answers(page) == before, "as it was")
    odd = {"id": "odd", "title": 7, "at": "x", "head": "b", "nodes": {
        "a": {"id": "a", "parent": None, "role": "user", "text": "<b>q</b>", "error": {"message": 5}},
        "b": {"id": "b", "parent": "a", "role": "assistant", "text": "odd answer", "stats": "fast", "cut": "x",
              "error": {"message": "", "status": "y"}},
        "__proto__": {"id": "__proto__", "parent": None, "role": "user", "text": "x"}}}
    ring = {"id": "ring", "head": "a", "nodes": {
        "a": {"id": "a", "parent": "b", "role": "user", "text": "x"},
        "b": {"id": "b", "parent": "a", "role": "assistant", "text": "y"}}}
    check(read({"chats": [odd, ring, None, 7, {"id": "../x", "nodes": {}}]}) == "1 conversation read.", "one of five")
    check(answers(page) == ["odd answer"] and page.eval(text_of(".user .text")) == ["<b>q</b>"], "it is shown")
    check("no conversations" in read([1]), "another file is told")
    click(page, "Renamed")
    page.wait("document.querySelectorAll('.assistant .md').length === 2", "back to the first")


def keyboard(page):
    page.eval("document.activeElement.blur()")
    page.eval("document.body.focus()")
    seen = set()
    for _ in range(80):
        page.key("Tab")
        seen.add(page.eval("document.activeElement.id || document.activeElement.innerText || "
                           "document.activeElement.getAttribute('aria-label')"))
    for want in ("new", "fold", "text", "set", "Regenerate", "Edit", "import"):
        check(want in seen, f"Tab comes to {want}")
    page.size(360, 640, 2, True)
    page.wait("!document.getElementById('unfold').hidden", "the list makes room")
    fits(page, "a small phone's page")
    click(page, "Conversations")
    fits(page, "with the list open")
    shot(page, "phone-list")
    page.key("Escape")
    click(page, "Settings")
    fits(page, "with the settings open")
    shot(page, "phone-settings")
    page.eval("document.getElementById('theme').value = 'dark'; "
              "document.getElementById('theme').dispatchEvent(new Event('change'))")
    check(page.eval("getComputedStyle(document.body).colorScheme") == "dark" or
          page.eval("getComputedStyle(document.documentElement).colorScheme") == "dark", "dark by choice")
    page.key("Escape")


def with_key(page, url):
    page.size(1280, 800)
    page.go(url)
    page.wait("document.getElementById('note').innerText.includes('API key')", "it says that it needs a key")
    ask(page, "hello")
    page.wait("document.getElementById('settings').open && document.activeElement.id === 'key'", "and where to put it")
    page.type("secret-1")
    page.key("Escape")
    page.wait("document.getElementById('model').textContent === 'echo'", "with the key it is connected")
    click(page, "Retry")
    page.wait("document.querySelector('.assistant .md')?.innerText.includes('the answer')", "and gets an answer")
    check(page.eval("JSON.stringify({...localStorage}).includes('secret-1')") is False, "the key is not kept for ever")
    check(page.eval("Object.values({...sessionStorage})") == ["secret-1"], "only for the session")


class Process:
    def __init__(self, args, **env):
        self.p = subprocess.Popen(args, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                  env={**os.environ, **env})

    def __enter__(self):
        return self.p

    def __exit__(self, *_):
        self.p.terminate()
        try:
            self.p.wait(10)
        except subprocess.TimeoutExpired:
            self.p.kill()
            self.p.wait()


def stand_in(work, **env):
    port = os.path.join(work, "port")
    if os.path.exists(port):
        os.remove(port)
    process = Process([sys.executable, os.path.join(here, "support", "chat_server.py"), port], **env)
    for _ in range(1200):
        if os.path.exists(port):
            break
        time.sleep(0.05)
    with open(port, encoding="utf-8") as f:
        return process, f"http://127.0.0.1:{f.read()}/"


def main():
    tm_run, model = sys.argv[1:3]
    if not cdp.find():
        print("SKIP the chat page: there is no Chromium here")
        sys.exit(77)
    with tempfile.TemporaryDirectory() as work:
        server, url = stand_in(work)
        with server, cdp.Browser() as page:
            page.size(1280, 800)
            page.scheme("light")
            page.go(url)
            page.wait("document.getElementById('model').textContent === 'echo'", "the first model's name")
            names(page, "at first")
            for part in (turns, rendering, conversations, keyboard):
                part(page)
            bad = [c for c in page.complaints() if not c.startswith("Failed to load resource")]
            check(bad == [], "no complaint")
        server, url = stand_in(work, TMF_KEY="secret-1")
        with server, cdp.Browser() as page:
            with_key(page, url)
        with Process([tm_run, "serve", model, "--server-port", "0", "--model-name", "demo"]) as server:
            line = server.stderr.readline()
            while line and "listening on" not in line:
                line = server.stderr.readline()
            check("http://" in line, "the server listens")
            url = re.search(r"http://\S+", line).group(0).rstrip("/") + "/"
            for _ in range(1200):
                try:
                    urllib.request.urlopen(url + "readyz").read()
                    break
                except OSError:
                    time.sleep(0.05)
            with urllib.request.urlopen(url) as r:
                body, policy = r.read(), r.headers["Content-Security-Policy"]
            check(len(body) < 60 << 10, "under 60 KiB")
            check(policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy, "the policy")
            with cdp.Browser() as page:
                with_model(page, url)
    print(f"the page: {checks} checks hold")


main()
