#!/usr/bin/env python3
"""What options make of tm-run serve, each test with a server of its own."""
import os
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from serve_lib import Server, check, expect, run, tool_and_model  # noqa: E402

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


result = run([f for name, f in sorted(globals().items()) if name.startswith("test_")])
folder.cleanup()
sys.exit(result)
