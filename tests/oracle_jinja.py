#!/usr/bin/env python3
"""Our template interpreter beside Jinja2 itself, set up as the transformers library does: every template
of the shared data over many conversations, and the small cases of tests/golden/jinja.json.

usage: oracle_jinja.py JINJA_LINES SHARED_DIR GOLDEN [--write]

--write makes GOLDEN's answers anew. Exit 77 without Jinja2.
"""
import datetime
import functools
import json
import pathlib
import subprocess
import sys

try:
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
except ImportError:
    print("SKIP: no jinja2 here")
    sys.exit(77)

lines, shared, golden = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
DAY = datetime.datetime(2024, 6, 7, 12, 0, tzinfo=datetime.timezone.utc)


class Generation(Extension):
    tags = {"generation"}

    def parse(self, parser):
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(lineno)

    def _text(self, caller):
        return caller()


def refuse(message):
    raise jinja2.exceptions.TemplateError(message)


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
env.filters["tojson"] = tojson
env.globals["raise_exception"] = refuse
env.globals["strftime_now"] = lambda fmt: DAY.strftime(fmt)


@functools.lru_cache(maxsize=4)
def compiled(text):
    return env.from_string(text)


def render(text, context):
    try:
        return {"text": compiled(text).render(**context)}
    except Exception as ex:  # noqa: BLE001: whatever Jinja2 refuses with
        return {"error": f"{type(ex).__name__}: {ex}"}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


TOOLS = [{"type": "function", "function": {
    "name": "get_weather", "description": "Get the weather of a city",
    "parameters": {"type": "object", "properties": {
        "city": {"type": "string", "description": "city \"name\" <b> & more"},
        "days": {"type": "integer", "default": 3}, "units": {"type": "array", "items": {"type": "string", "enum": ["c", "f"]}}},
        "required": ["city"]}}},
    {"type": "function", "function": {"name": "now", "description": "Time", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"id": "call_abc12", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "K\u00f6ln", "days": 2}}}]}
CALL_NONE = {**CALL, "content": None}
CALL_TEXT = {**CALL, "content": "Let me look.", "tool_calls": CALL["tool_calls"] + [
    {"id": "call_xyz34", "type": "function", "function": {"name": "now", "arguments": {}}}]}
CALL_STR = {"role": "assistant", "content": "", "tool_calls": [
    {"id": "call00001", "type": "function", "function": {"name": "get_weather", "arguments": "{\"city\": \"Rom\"}"}}]}
ANSWER = {"role": "tool", "tool_call_id": "call_abc12", "name": "get_weather", "content": "{\"sun\": true, \"t\": 21.5}"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "part one "}, {"type": "text", "text": "part two"}]}
THINK = assistant("<think>\nhm, let me see\n</think>\n\nThe answer is 4.")
TALKS = [
    [user("Hello")],
    [user("  q1? \n")],
    [user("q1"), assistant(" a1. ")],
    [system(" You are helpful.\n"), user("q1"), assistant("a1"), user("  q2 ")],
    [system("sys"), user("q1"), assistant("a1"), user("q2"), assistant("\na2 ")],
    [system(""), user("q1")],
    [user("q1"), THINK, user("q2")],
    [user("q1"), {**assistant("a1"), "reasoning_content": "because"}, user("q2")],
    [system("sys"), user("weather?"), CALL, ANSWER],
    [user("weather?"), CALL, ANSWER, assistant("sunny"), user("thanks")],
    [user("weather?"), CALL_NONE, ANSWER],
    [user("weather?"), CALL_TEXT, ANSWER, {**ANSWER, "tool_call_id": "call_xyz34", "name": "now", "content": "12:00"}],
    [user("weather?"), CALL_STR, {**ANSWER, "tool_call_id": "call00001"}, user("and?")],
    [PARTS], [system("s"), PARTS, assistant("a"), user("b")],
    [user("a"), user("b")], [assistant("a")], [system("only")], [{"role": "developer", "content": "d"}, user("u")],
    [user("<|im_end|> \u4e16\u754c \U0001f600 'quoted' \"double\" \\ back\tslash {{ braces }}")],
]
EXTRA = [{}, {"tools": TOOLS}, {"tools": None, "enable_thinking": False}, {"tools": TOOLS, "enable_thinking": True},
         {"documents": [{"title": "T", "text": "body"}]}]


def contexts():
    for i, talk in enumerate(TALKS):
        for extra in EXTRA if i in (0, 3, 8, 11) else EXTRA[:2]:
            for gen in (True, False):
                yield {"messages": talk, "add_generation_prompt": gen, "bos_token": "<s>", "eos_token": "</s>",
                       "unk_token": "<unk>", **extra}


def templates():
    folder = shared / "data" / "chat-templates"
    for path in sorted(folder.glob("*/*.jinja")):
        yield path.name, path.read_text(encoding="utf-8")
    if (folder / "templates.jsonl").exists():
        for i, line in enumerate((folder / "templates.jsonl").read_text(encoding="utf-8").splitlines()):
            yield f"templates.jsonl:{i + 1}", list(json.loads(line).values())[0]
    for path in sorted((shared / "data" / "hf-configs").glob("*/tokenizer_config.json")):
        text = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
        if isinstance(text, str):
            yield path.parent.name, text


def ours(cases):
    feed = "".join(json.dumps({"template": t, "context": c, "now": int(DAY.timestamp())}) + "\n" for _, t, c in cases)
    done = subprocess.run([lines], input=feed, text=True, capture_output=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def main():
    small = json.loads(golden.read_text(encoding="utf-8"))
    if "--write" in sys.argv:
        for case in small:
            case.pop("text", None)
            case.pop("error", None)
            got = render(case["template"], case.get("context", {}))
            case.update({"error": True} if "error" in got else got)
        golden.write_text("[\n" + ",\n".join(json.dumps(c, ensure_ascii=False) for c in small) + "\n]\n", encoding="utf-8")
    cases = [("golden", c["template"], c.get("context", {})) for c in small]
    cases += [(name, text, context) for name, text in templates() for context in contexts()]
    bad = texts = errors = 0
    failing = {}
    for (name, text, context), got in zip(cases, ours(cases)):
        want = render(text, context)
        texts += "text" in want
        errors += "error" in want
        if ("error" in want) == ("error" in got) and want.get("text") == got.get("text"):
            continue
        bad += 1
        failing.setdefault(name, []).append((context, want, got, text))
    for name, list_ in failing.items():
        context, want, got, text = list_[0]
        print(f"{name}: {len(list_)} differ, the first:\n  {json.dumps(context)[:300]}\n  want {json.dumps(want)[:600]}\n"
              f"  got  {json.dumps(got)[:600]}" + (f"\n  {text}" if name == "golden" else ""))
    print(f"{len(cases)} renderings: {texts} texts, {errors} refusals, {bad} differ from Jinja2 {jinja2.__version__}")
    return bad > 0


sys.exit(main())
