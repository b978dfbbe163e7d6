#!/usr/bin/env python3
"""Our safetensors reader and writer beside the safetensors package: same files, same tensors, same verdicts.

usage: oracle_safetensors.py ST_DUMP MAKE_MODEL      exits 77 where the package is missing
"""
import hashlib
import json
import os
import pathlib
import random
import struct
import subprocess
import sys
import tempfile

try:
    import numpy as np
    import safetensors
    import safetensors.numpy
except ImportError as missing:
    print(f"SKIP oracle_safetensors: {missing}")
    sys.exit(77)

ST_DUMP, MAKE_MODEL = sys.argv[1:3]
rng = random.Random(1)
# What we refuse on purpose and the package takes, by our message.
STRICTER = ("stands there twice", "valid escape", "more than 8 dimensions", "is not supported", "overflows",
            "expected '{' at byte 0")


def dump(paths):
    out = subprocess.run([ST_DUMP, *map(str, paths)], check=True, capture_output=True).stdout.decode()
    files = []
    for line in out.splitlines():
        if line.startswith("ok ") or line.startswith("refused "):
            files.append((line, {}))
        else:
            name, *rest = line.split("\t")
            files[-1][1][bytes.fromhex(name).decode()] = tuple(rest)
    assert len(files) == len(paths), (len(files), len(paths))
    return files


def package(data):
    """What the package makes of a file, in the form of dump; None: refused."""
    try:
        tensors = safetensors.deserialize(data)
    except Exception:
        return None
    return {name: (t["dtype"], json.dumps(t["shape"]), hashlib.sha256(bytes(t["data"])).hexdigest())
            for name, t in tensors}


def check_theirs(tmp):
    """Files that the package wrote."""
    g = np.random.default_rng(2)
    dtypes = ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool"]
    paths = []
    for i in range(40):
        tensors = {}
        for k in range(rng.randrange(12)):
            shape = [rng.choice([0, 1, 2, 3, 7]) if rng.random() < 0.3 else rng.randrange(1, 6) for _ in range(rng.randrange(5))]
            name = rng.choice(["w", "model.layers.%d.weight" % k, "\u4e2d\u6587", "x" * 300]) + str(k)
            tensors[name] = np.asarray(g.integers(0, 2, shape)).astype(rng.choice(dtypes))
        meta = {"format": "pt", "n": str(i)} if i % 2 else None
        paths.append(tmp / f"theirs{i}.safetensors")
        safetensors.numpy.save_file(tensors, paths[-1], metadata=meta)
    for path, (verdict, ours) in zip(paths, dump(paths)):
        assert verdict.startswith("ok "), verdict
        assert ours == package(path.read_bytes()), path
    return len(paths)


def check_ours(tmp):
    """Files that our writer wrote."""
    for dtype in ("bf16", "f16", "f32"):
        out = tmp / dtype
        subprocess.run([MAKE_MODEL, "--shape", "tiny-qwen2", "--dtype", dtype, "--shards", "2", str(out)], check=True)
        for path in sorted(out.glob("*.safetensors")):
            theirs = package(path.read_bytes())
            assert theirs and theirs == dump([path])[0][1], path
            with safetensors.safe_open(path, "np") as f:
                assert f.metadata() == {"format": "pt"}
                assert set(f.keys()) == set(theirs)


def mutate(data):
    b = bytearray(data)
    head = min(8 + struct.unpack("<Q", b[:8])[0], len(b)) if len(b) >= 8 else len(b)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        kind, at = rng.randrange(6), rng.randrange(max(head, 1))
        if kind == 0 and b:
            b[at % len(b)] = rng.choice(b'{}[]",:0123456789 aF\\u\n\x00\xff')
        elif kind == 1 and b:
            del b[at % len(b)]
        elif kind == 2:
            b[at:at] = rng.choice([b" ", b"0", b",", b"1", b'"', b"[]", b"{}", b"-", b".0", b"e1", b"\t", b"\\u0041"])
        elif kind == 3:
            b = b[: rng.randrange(len(b) + 1)]
        elif kind == 4:
            b += bytes(rng.randrange(4))
        else:
            old, new = rng.choice([(b"F32", b"F64"), (b"U8", b"I8"), (b"[0,", b"[1,"), (b"[2]", b"[1,2]"), (b"dtype", b"extra")])
            b = bytearray(bytes(b).replace(old, new, 1))
    if rng.random() < 0.7 and len(b) >= 8:  # keep the length word true, so that the header's inside is tried
        grown = len(b) - len(data)
        b[:8] = struct.pack("<Q", max(0, struct.unpack("<Q", data[:8])[0] + grown) & (2**64 - 1))
    return bytes(b)


def check_verdicts(tmp, rounds):
    corpus = pathlib.Path(__file__).parent / "fuzz" / "corpus" / "safetensors"
    seeds = [p.read_bytes() for p in sorted(corpus.iterdir()) if len(p.read_bytes()) >= 8]
    both = [0, 0, 0]
    for block in range(rounds):
        data = [mutate(rng.choice(seeds)) for _ in range(200)]
        paths = []
        for i, d in enumerate(data):
            paths.append(tmp / f"m{i}")
            paths[-1].write_bytes(d)
        for d, (verdict, ours) in zip(data, dump(paths)):
            theirs = package(d)
            if verdict.startswith("ok "):
                assert theirs is not None, ("accepted by us alone", d)
                assert ours == theirs, (d, ours, theirs)
                both[0] += 1
            elif theirs is None:
                both[1] += 1
            else:
                assert any(s in verdict for s in STRICTER), (verdict, d)
                both[2] += 1
    assert both[0] > 100 and both[1] > 100, both
    return both


with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as d:
    where = pathlib.Path(d)
    count = check_theirs(where)
    check_ours(where)
    accepted, refused, stricter = check_verdicts(where, 25)
    print(f"{count} files of the package, ours in 3 dtypes, {accepted} accepted and {refused} refused by both, "
          f"{stricter} refused by us alone for a stated reason")
