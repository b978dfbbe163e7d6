#!/usr/bin/env python3
"""Writes the seeds of tests/fuzz/corpus/{tokenizer,spm,corpus}: small inputs, one per rule of the parsers.

usage: make_token_fuzz_corpus.py CORPUS_DIR

Inputs that a fuzzer found are kept beside them under the names that the fuzzer gave.
"""
import gzip
import io
import json
import lzma
import pathlib
import struct
import subprocess
import sys
import tarfile

out = pathlib.Path(sys.argv[1])


def put(target, name, data):
    path = out / target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
SMALL = {"type": "BPE", "vocab": {"a": 0, "b": 1, "\u0120": 2, "ab": 3, "\u010a": 4, "<u>": 5}, "merges": ["a b"]}


def tok(name, text=None, **parts):
    j = {"added_tokens": [{"id": 9, "content": "<s>", "special": True, "normalized": False}], "normalizer": None,
         "pre_tokenizer": BYTES, "decoder": {"type": "ByteLevel"}, "model": SMALL, **parts}
    data = json.dumps(j, separators=(",", ":")).encode()
    put("tokenizer", name, data if text is None else data + b"\0" + text)


tok("small", b"ab <s> ba\n")
tok("merge-lists", model={**SMALL, "merges": [["a", "b"]]})
tok("ignore-merges", model={**SMALL, "ignore_merges": True})
tok("unknown", b"xyz", pre_tokenizer=None, model={**SMALL, "unk_token": "<u>", "fuse_unk": True})
tok("fallback", "\u00e9x".encode(), pre_tokenizer=None, decoder={"type": "Sequence", "decoders": [
    {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
    model={"vocab": {"\u2581": 0, "a": 1, "\u2581a": 2, "<0xC3>": 3, "<0xA9>": 4, "\n": 5}, "merges": ["\u2581 a"],
           "byte_fallback": True, "unk_token": "a"})
tok("prepend", b"a a\na", pre_tokenizer=None, normalizer={"type": "Sequence", "normalizers": [
    {"type": "Prepend", "prepend": "\u2581"}, {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]},
    model={"vocab": {"\u2581": 0, "a": 1, "\u2581a": 2, "\n": 3}, "merges": ["\u2581 a"]})
tok("metaspace", b"a a", pre_tokenizer={"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": True},
    decoder={"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first"},
    model={"vocab": {"\u2581": 0, "a": 1, "\u2581a": 2}, "merges": ["\u2581 a"]})
for form in ("NFC", "NFD", "NFKC", "NFKD", "Strip"):
    tok("normal-" + form, "e\u0301 \u212b".encode(), normalizer={"type": form})
for behavior in ("Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"):
    for invert in (False, True):
        tok(f"split-{behavior}-{invert}", b"aab ba b", pre_tokenizer={"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "b|\\s+"}, "behavior": behavior, "invert": invert}, BYTES]})
tok("split-string", b"abab", pre_tokenizer={"type": "Split", "pattern": {"String": "b"}, "behavior": "Removed", "invert": False})
tok("digits", b"a12", pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]})
tok("gpt2", b"a's b \n\n a", pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "use_regex": True})
tok("qwen2", b"the a b aa bb ab", pre_tokenizer={"type": "Sequence", "pretokenizers": [
    {"type": "Split", "pattern": {"Regex": "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| "
                                           "?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"},
     "behavior": "Isolated", "invert": False}, BYTES]})
tok("slow-regex", b"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", pre_tokenizer={
    "type": "Split", "pattern": {"Regex": "(?:a+)+[xy]"}, "behavior": "Isolated", "invert": False})
tok("added", b"a <l>  b <n> w ab", added_tokens=[
    {"id": 9, "content": "<l>", "special": True, "lstrip": True, "normalized": False},
    {"id": 10, "content": "<n>", "special": False, "rstrip": True, "normalized": True},
    {"id": 11, "content": "w", "special": False, "single_word": True, "normalized": False}])
tok("template", post_processor={"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}]})
put("tokenizer", "nothing", b"")
put("tokenizer", "no-model", b"{}")


def field(number, data):
    n, size = len(data), b""
    while True:
        size += bytes([n & 0x7f | (0x80 if n > 0x7f else 0)])
        n >>= 7
        if not n:
            return bytes([number << 3 | 2]) + size + data


def piece(text, score, kind):
    return field(1, field(1, text) + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind]))


def model(trainer=b"\x18\2", normalizer=b"\x20\0", more=b""):
    base = [(b"<unk>", 0, 2), (b"<s>", 0, 3), (b"</s>", 0, 3), ("\u2581".encode(), -4, 1), (b"a", -5, 1), (b"b", -6, 1),
            (b"ab", -1, 1), ("\u2581a".encode(), -2, 1)]
    return b"".join(piece(*p) for p in base) + field(2, trainer) + field(3, normalizer) + more


bytes_pieces = b"".join(piece(b"<0x%02X>" % b, 0, 6) for b in range(256))
put("spm", "bpe", model())
put("spm", "unigram", model(trainer=b"\x18\1"))
put("spm", "word", model(trainer=b"\x18\3"))
put("spm", "char", model(trainer=b"\x18\4"))
put("spm", "no-prefix", model(normalizer=b"\x18\0\x20\0"))
put("spm", "collapse", model(normalizer=b"\x20\1"))
put("spm", "suffix", model(trainer=b"\x18\2\xc0\1\1"))
put("spm", "user", model(more=piece(b"abba", 0, 4) + piece(b"un", 0, 5)))
put("spm", "fallback", model(trainer=b"\x18\2\x98\2\1", more=bytes_pieces))
put("spm", "surface", model(trainer=b"\x18\2" + b"\xe2\2\1?"))
put("spm", "charsmap", model(normalizer=field(2, struct.pack("<I", 1024) + bytes(1024) + b"x\0") + b"\x20\0"))
put("spm", "denormalizer", model(more=field(5, field(2, struct.pack("<I", 1024) + bytes(1024) + b"x\0"))))
put("spm", "ranks", b"".join(__import__("base64").b64encode(bytes([b])) + b" %d\n" % b for b in range(256)) + b"YWI= 256\n")
put("spm", "nothing", b"")


def tar(members, **how):
    b = io.BytesIO()
    with tarfile.open(fileobj=b, mode="w", **how) as t:
        for name, data in members:
            i = tarfile.TarInfo(name)
            if data is None:
                i.type, i.linkname = tarfile.SYMTYPE, "/etc/passwd"
                t.addfile(i)
            else:
                i.size = len(data)
                t.addfile(i, io.BytesIO(data))
    return b.getvalue()


def zst(data):
    return subprocess.run(["zstd", "-c"], input=data, capture_output=True, check=True).stdout


TEXT, JSONL, TAR = 0, 1, 2
rows = b'{"text":"one two three four"}\n{"messages":[{"role":"user","content":"Q"},{"role":"assistant","content":"A"}]}\n'
for number, name in enumerate(("plain", "wikitext2", "ptb", "c4", "pileval")):
    put("corpus", "text-" + name, bytes([TEXT + 3 * number]) + b" = T = \n\n a b \nsome words here\n")
    put("corpus", "rows-" + name, bytes([JSONL + 3 * number]) + rows)
    put("corpus", "first-" + name, bytes([0x80 | (JSONL + 3 * number)]) + rows)
put("corpus", "conversations", b'\1{"conversations":[{"from":"human","value":"h"},{"from":"gpt","value":"g"}]}')
put("corpus", "bom", b"\0\xef\xbb\xbfx")
put("corpus", "latin1", b"\0caf\xe9")
put("corpus", "zst", b"\0" + zst(b"packed text\n"))
put("corpus", "zst-cut", b"\0" + zst(b"packed text\n")[:-3])
put("corpus", "gz", b"\0" + gzip.compress(b"packed text\n", mtime=0))
put("corpus", "xz", b"\0" + lzma.compress(b"packed text\n"))
members = [("d/a.txt", b"A"), ("d/b.jsonl", rows), ("l", None), ("c.zst", zst(b"zipped"))]
put("corpus", "tar", b"\2" + tar(members))
put("corpus", "tar-gnu", b"\2" + tar(members, format=tarfile.GNU_FORMAT))
put("corpus", "tar-zst", b"\0" + zst(tar(members)))
put("corpus", "tar-up", b"\2" + tar([("../x", b"B")]))
put("corpus", "nothing", b"")
