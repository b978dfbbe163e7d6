#!/usr/bin/env python3
"""Tasks for `tm-run tasks` out of a file of dialogues whose answers have one right form.

    python3 scripts/make_tasks.py DIALOGUES.jsonl [PER_KIND] > tasks.jsonl

Each answer of the assistant that belongs to one of the kinds below becomes a task: the messages before it and
the answer itself. The first PER_KIND (50) of each kind, in the order of the file, no question twice.
"""
import json
import re
import sys

KINDS = (
    ("recall", re.compile(r"What is the (animal|number|color|code) of \w+\?")),
    ("arith", re.compile(r"\d+ [-+*] \d+")),
    ("words", re.compile(r"(Sort these numbers|Say these words in reverse|Spell the word|Which is the (smallest|largest))")),
    ("facts", re.compile(r"(capital of|is the capital|How many (days|months|legs))")),
)


def main():
    per_kind = int(sys.argv[2]) if len(sys.argv) > 2 else 50
    found = {kind: [] for kind, _ in KINDS}
    seen = set()
    with open(sys.argv[1], encoding="utf-8") as f:
        for line in f:
            messages = json.loads(line)["messages"]
            for i, m in enumerate(messages):
                if m["role"] != "assistant":
                    continue
                question = messages[i - 1]["content"]
                kind = next((k for k, r in KINDS if r.search(question)), None)
                key = (question, m["content"])
                if kind and len(found[kind]) < per_kind and key not in seen:
                    seen.add(key)
                    found[kind].append({"kind": kind, "messages": messages[:i], "answer": m["content"]})
    for kind, _ in KINDS:
        for task in found[kind]:
            print(json.dumps(task, ensure_ascii=False))


if __name__ == "__main__":
    main()
