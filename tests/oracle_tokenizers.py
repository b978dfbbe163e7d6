#!/usr/bin/env python3
"""Our ids and texts beside those of the tokenizers and sentencepiece packages, over random texts of many
scripts: exit 1 on the first difference, 77 where a package or the stored tokenizers are missing.

usage: oracle_tokenizers.py TOKEN_LINES SHARED_DIR [COUNT [SEED]]
"""
import pathlib
import random
import struct
import subprocess
import sys

try:
    import sentencepiece
    import tokenizers
except ImportError as missing:
    print("SKIP", missing)
    sys.exit(77)

tool, shared = sys.argv[1], pathlib.Path(sys.argv[2])
count = int(sys.argv[3]) if len(sys.argv) > 3 else 400
rng = random.Random(int(sys.argv[4]) if len(sys.argv) > 4 else 1)
if not (shared / "data" / "tokenizers").is_dir():
    print("SKIP no stored tokenizers")
    sys.exit(77)

prose = [(shared / "data/text" / name).read_text(encoding="utf-8")
         for name in ("botchan.txt", "zh/classics.txt", "zh/lmdeploy-docs-zh.md", "calib/multilingual.utf8")]
pools = ["abcXYZ019 .,!?'\n\r\t-", "  \n\n\r\t\u00a0\u3000\u2003\u180e\u200b\u0085", "'s'T'Re'll'D 'M",
         "\u00e9e\u0301\u00f1a\u0300\u1eb9\u0301o\u0302\u0301", "0123456789\u0661\u0662\u0967\u2167\u00bd",
         "\u4e2d\u6587\u5b57\u7b26\uff0c\u3002\uff01 \ud55c\uad6d\uc5b4 \u3131\u314f\uac01",
         "\U0001f600\U0001f468\u200d\U0001f469\u2764\ufe0f", "<s></s><unk><|im_start|><|im_end|><0x0A>\u2581\u2581",
         "\u1100\u1161\u11a8\uac00\u11a8\u0344\u212b\u2126\ufb01", "_-+=*/\\{}[]()<>#$%^&@~`|\"", "\u017f\u017fK'\u017f'S"]


def text():
    kind = rng.random()
    if kind < 0.4:
        whole = rng.choice(prose)
        at = rng.randrange(len(whole))
        return whole[at:at + rng.randrange(1, 400)]
    if kind < 0.8:
        return "".join(rng.choice(rng.choice(pools)) for _ in range(rng.randrange(1, 60)))
    # assigned since long: the Unicode tables of the packages and ours are of different years
    ranges = [(0x20, 0x7f), (0xa0, 0x250), (0x250, 0x370), (0x400, 0x500), (0x4e00, 0x9fa0), (0xac00, 0xd7a0),
              (0x1f300, 0x1f500)]
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(1, 40)))


texts = [text() for _ in range(count)] + ["", "".join(prose)[:300000]]


def ours(path, mode):
    data = b"".join(struct.pack("<I", len(b)) + b for b in (t.encode() for t in texts))
    out = subprocess.run([tool, str(path), mode], input=data, capture_output=True)
    if out.returncode:
        sys.exit(f"{path}: {out.stderr.decode()}")
    at, ids, back = 0, [], []
    for _ in texts:
        end = out.stdout.index(b"\n", at)
        ids.append([int(x) for x in out.stdout[at:end].split()])
        space = out.stdout.index(b" ", end)
        n = int(out.stdout[end + 1:space])
        back.append(out.stdout[space + 1:space + 1 + n].decode())
        at = space + n + 2
    return ids, back


def compare(path, mode, want):
    got = ours(path, mode)
    for t, w_ids, w_text, g_ids, g_text in zip(texts, *want, *got):
        if w_ids != g_ids or w_text != g_text:
            print(f"{path} ({mode}): {t!r}\n  theirs {w_ids} {w_text!r}\n  ours   {g_ids} {g_text!r}")
            sys.exit(1)
    print(f"{path}: {len(texts)} texts agree ({mode})")


for name in ("data/tokenizers/llama3", "data/tokenizers/qwen2", "models/qwen"):
    path = shared / name / "tokenizer.json"
    library = tokenizers.Tokenizer.from_file(str(path))
    for mode in ("special", "plain"):
        library.encode_special_tokens = mode == "plain"
        ids = [e.ids for e in library.encode_batch(texts, add_special_tokens=False)]
        compare(path, mode, (ids, library.decode_batch(ids, skip_special_tokens=False)))
for path in sorted(shared.glob("data/tokenizers/*/tokenizer.model")) + [shared / "models/base/tokenizer.model"]:
    if path.parent.name == "llama3":
        continue  # ranks, not sentencepiece
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = library.encode(texts)
    compare(path, "plain", (ids, [library.decode(x) for x in ids]))
