#!/usr/bin/env python3
"""Renders known chat_template texts with Jinja2, set up as the transformers library does, over a few
conversations: tests/golden/chat.jsonl, the oracle of tests/test_chat.c.

usage: make_chat_golden.py SHARED_DIR > tests/golden/chat.jsonl

Each line: {"row": our name of the template, "messages": [...], "gen": bool, "text": rendered, or "error": true}.
BOS is <s>, EOS is </s>. The texts themselves are third-party data and stay where they are.
"""
import json
import pathlib
import sys

from jinja2.sandbox import ImmutableSandboxedEnvironment

shared = pathlib.Path(sys.argv[1])
templates = shared / "data" / "chat-templates"
listed = [list(json.loads(line).values())[0] for line in open(templates / "templates.jsonl", encoding="utf-8")]


def config(path):
    return json.loads((shared / path / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]


rows = [
    ("hf-chatml", listed[6]), ("hf-chatml", listed[15]), ("hf-chatml", config("models/qwen")),
    ("hf-chatml-bos", listed[16]), ("hf-chatml-bos", config("models/demo")),
    ("hf-chatml-bos", (templates / "vllm/tool_chat_template_internlm2_tool.jinja").read_text(encoding="utf-8")),
    ("hf-chatml-eos", listed[3]), ("hf-qwen2", listed[7]), ("hf-qwen2", listed[17]), ("hf-qwen1.5", listed[8]),
    ("hf-qwen2.5", config("data/hf-configs/qwen2.5-instruct")), ("hf-yi-1.5", listed[0]),
    ("hf-llama2", listed[12]), ("hf-llama2", listed[26]), ("hf-mistral", listed[10]), ("hf-mistral-v0.1", listed[14]),
    ("hf-llama3", listed[22]),
    ("hf-llama3.1", (templates / "llama.cpp/meta-llama-Llama-3.1-8B-Instruct.jinja").read_text(encoding="utf-8")),
    ("hf-llama3.1", (templates / "llama.cpp/meta-llama-Llama-3.2-3B-Instruct.jinja").read_text(encoding="utf-8")),
    ("hf-zephyr", listed[2]), ("hf-openchat", listed[4]), ("hf-solar", listed[33]),
    ("hf-deepseek-r1", (templates / "llama.cpp/deepseek-ai-DeepSeek-R1-Distill-Llama-8B.jinja").read_text(encoding="utf-8")),
    ("hf-deepseek-r1-0120", config("data/hf-configs/deepseek-r1-distill-qwen-14b")),
]


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


conversations = [
    [user("  q1? \n")],
    [user("q1"), assistant(" a1. ")],
    [system(" sys.\n"), user("q1"), assistant("a1"), user("  q2 ")],
    [system("sys"), user("q1"), assistant("a1"), user("q2"), assistant("\na2 ")],
    [system(""), user("q1")],
    [user("q1"), assistant("<think>t</think>a1"), user("q2")],
]


def render(text, messages, gen):
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])

    def refuse(message):
        raise ValueError(message)

    env.globals["raise_exception"] = refuse
    try:
        return {"text": env.from_string(text).render(messages=messages, add_generation_prompt=gen, bos_token="<s>",
                                                     eos_token="</s>")}
    except ValueError:
        return {"error": True}


for name, text in rows:
    for messages in conversations:
        for gen in (True, False):
            line = {"row": name, "messages": messages, "gen": gen, **render(text, messages, gen)}
            print(json.dumps(line, ensure_ascii=False, separators=(",", ":")))
