#!/usr/bin/env python3
"""Random answers within grammars, checked by Python: the jsonschema package for schemas, re for patterns.

usage: check_grammar.py GRAMMAR_LINES TOKENIZER_DIR [WALKS] [SEED]

GRAMMAR_LINES is tests/grammar_lines of a build. Schemas are the hand-written ones below and random
combinations of them; each answer that is complete must validate, none may get stuck.
"""
import json
import random
import re
import subprocess
import sys

import jsonschema

lines, folder = sys.argv[1:3]
walks = sys.argv[3] if len(sys.argv) > 3 else "6"
seed = sys.argv[4] if len(sys.argv) > 4 else "1"
random.seed(int(seed))

leaf = [
    {"type": "string"}, {"type": "string", "minLength": 2, "maxLength": 5}, {"type": "string", "maxLength": 1},
    {"type": "string", "pattern": "^[A-Z][a-z]+$"}, {"type": "string", "pattern": "[0-9]{3}"},
    {"type": "string", "pattern": "^(\\+\\d{1,3} )?[\\w.-]+$"}, {"type": "string", "pattern": "\\S\\s\\S"},
    {"type": "string", "pattern": "^[^\\d\\s]{2,4}$"}, {"type": "string", "format": "date"},
    {"type": "string", "format": "time"}, {"type": "string", "format": "date-time"}, {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"}, {"type": "integer"}, {"type": "integer", "minimum": 0},
    {"type": "integer", "minimum": -17, "maximum": 2345}, {"type": "integer", "exclusiveMinimum": 9, "exclusiveMaximum": 11},
    {"type": "integer", "maximum": -100}, {"type": "number"}, {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}, {"type": "number", "exclusiveMaximum": -5},
    {"type": "number", "minimum": -3, "exclusiveMaximum": 1000}, {"type": "boolean"}, {"type": "null"},
    {"enum": ["red", "green", 3, None, {"a": [1, 2.5]}]}, {"const": "x\"y\\z\n\u00e9"}, {"type": ["integer", "null"]}, {},
    True, {"minimum": 3}, {"maxLength": 3, "maximum": 3, "title": "only what is spoken of"},
]


def combine(depth):
    kind = random.randrange(8) if depth else 0
    if kind <= 1:
        return random.choice(leaf)
    if kind <= 4:
        names = random.sample(["a", "ab", "abc", "b", "n m", "\u00e9t\u00e9", "q\"", "id"], random.randint(0, 5))
        o = {"type": "object", "properties": {n: combine(depth - 1) for n in names}}
        o["required"] = [n for n in names if random.random() < 0.5]
        if random.random() < 0.2:
            o["required"].append("extra")
        more = random.choice([None, False, True, combine(depth - 1)])
        if more is not None and not (more is False and "extra" in o["required"]):
            o["additionalProperties"] = more
        return o
    if kind == 5:
        a = {"type": "array", "items": combine(depth - 1)}
        if random.random() < 0.5:
            a["minItems"] = random.randint(0, 2)
        if random.random() < 0.5:
            a["maxItems"] = random.randint(2, 4)
        if random.random() < 0.3:
            a["prefixItems"] = [combine(depth - 1), combine(depth - 1)]
        return a
    if kind == 6:
        return {"anyOf": [combine(depth - 1) for _ in range(random.randint(1, 3))]}
    return {"allOf": [{"type": "object", "properties": {"k": combine(depth - 1)}, "required": ["k"]},
                      {"properties": {"l": combine(depth - 1)}}]}


special = [
    {"$defs": {"n": {"type": "object", "properties": {"v": {"type": "integer"}, "kids": {"type": "array", "items":
     {"$ref": "#/$defs/n"}, "maxItems": 2}}, "required": ["v"], "additionalProperties": False}}, "$ref": "#/$defs/n"},
    {"oneOf": [{"type": "object", "properties": {"t": {"const": "a"}, "x": {"type": "integer"}}, "required": ["t", "x"]},
               {"type": "object", "properties": {"t": {"const": "b"}, "y": {"type": "string"}}, "required": ["t", "y"]}]},
    {"oneOf": [{"type": "string"}, {"type": "integer"}, {"type": "null"}]},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
     "additionalProperties": True},
]
patterns = ["[a-z]{1,8}", "(yes|no|maybe)", "\\d{4}-\\d\\d", "[^\\n]{3,20}", "(a|b)*c{2,}d?", ".{1,10}", "\\w+@\\w+\\.com",
            "[\\u4e00-\\u9fff]{2,4}", "\\s?\\S{1,3}\\D\\W", "(?:x[0-9A-F]{2}){1,4}", "-?(0|[1-9]\\d{0,5})(\\.\\d+)?"]

cases = [{"schema": s} for s in leaf + special] + [{"schema": combine(3)} for _ in range(600)]
cases += [{"regex": p} for p in patterns]
done = subprocess.run([lines, folder, walks, seed], input="\n".join(map(json.dumps, cases)) + "\n", text=True,
                      capture_output=True, check=False)
out = [json.loads(line) for line in done.stdout.splitlines()]
if done.returncode or len(out) != len(cases):
    sys.exit(f"{lines}: exit {done.returncode}, {len(out)} of {len(cases)} lines\n{done.stderr}")
checked = bad = refused = unfinished = 0
for case, o in zip(cases, out):
    if "error" in o:
        refused += 1
        if o["error"] not in ("input", "unsupported"):
            bad += 1
            print("REFUSED", json.dumps(case), o)
        elif o["error"] == "input" and "no answer can match" not in o["message"] and "no type" not in o["message"]:
            print("note:", json.dumps(case), o)
        continue
    unfinished += o["unfinished"]
    if o["stuck"]:
        bad += 1
        print("STUCK", json.dumps(case))
    for text in o["answers"]:
        checked += 1
        try:
            if "regex" in case:
                if not re.fullmatch(case["regex"], text):
                    raise ValueError("no match")
            else:
                jsonschema.validate(json.loads(text), case["schema"], cls=jsonschema.Draft202012Validator,
                                    format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
        except Exception as ex:  # noqa: BLE001: whatever a validator finds is a finding
            bad += 1
            print("WRONG", json.dumps(case), repr(text), str(ex).split("\n")[0])
print(f"{len(cases)} grammars, {refused} refused, {checked} answers checked, {unfinished} unfinished, {bad} bad")
sys.exit(bad > 0)
