#!/usr/bin/env python3
"""Writes the seeds of tests/fuzz/corpus/{calib,plan}: small artifacts with true digests, one per rule of the readers.

usage: make_artifact_corpus.py CORPUS_DIR        (needs NumPy and libxxhash)
"""
import ctypes
import json
import pathlib
import struct
import sys

import numpy as np

out = pathlib.Path(sys.argv[1])


class Hash128(ctypes.Structure):
    _fields_ = [("low", ctypes.c_uint64), ("high", ctypes.c_uint64)]


xxh = ctypes.CDLL("libxxhash.so.0").XXH3_128bits
xxh.restype = Hash128
xxh.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
NAMES = {"float32": "F32", "float64": "F64", "float16": "F16", "uint8": "U8", "int32": "I32", "int64": "I64"}


def digest(data):
    h = xxh(data, len(data))
    return "%016x%016x" % (h.high, h.low)


def put(folder, name, tensors, drop=(), digests=True, **meta):
    common = dict(kind=folder, version="1", tool="tmforge", fingerprint="f", layers="1")
    own = {"calib": {"parent.model": "m", "parent.tokenizer": "t", "options": "{}"},
           "plan": {"parent.model": "m", "parent.calib": "c", "options": "{}", "method": "awq", "loss": "gram", "group": "4"}}
    info = {**common, **own[folder]}
    body, header, at = b"", {}, 0
    for key, a in sorted(tensors.items(), key=lambda x: (-x[1].itemsize, x[0])):
        data = np.ascontiguousarray(a).tobytes()
        header[key] = {"dtype": NAMES[a.dtype.name], "shape": list(a.shape), "data_offsets": [at, at + len(data)]}
        if digests:
            info["xxh3." + key] = digest(data)
        body, at = body + data, at + len(data)
    info.update({k.replace("__", "."): v for k, v in meta.items()})
    for key in drop:
        info.pop(key)
    text = json.dumps({"__metadata__": info, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path = out / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


f32, f64, f16, u8, i32, i64 = np.float32, np.float64, np.float16, np.uint8, np.int32, np.int64


def calib(k=6, g=6, layers=1, taps=("qkv", "o", "gate", "down")):
    t = {"tokens": np.arange(8, dtype=i32).reshape(2, 4), "held_out": np.zeros(2, u8)}
    for layer in range(layers):
        for tap in taps:
            p = "layers.%d.%s." % (layer, tap)
            t[p + "absmax"], t[p + "abssum"] = np.ones(k, f32), np.ones(k, f64)
            t[p + "count"], t[p + "blocks"] = np.full(1, 8, i64), np.ones((k // g, g, g), f32)
    return t


def change(t, **values):
    return {**t, **{k.replace("__", "."): v for k, v in values.items()}}


def plan(n=8, k=8, group=4, linears=("qkv", "o", "gate", "up", "down"), codes=True):
    t = {"layers.0.fold.attn_norm": np.full(k, 2, f32), "layers.0.fold.up": np.full(n, .5, f32)}
    for name in linears:
        p = "layers.0.%s." % name
        t[p + "scale"], t[p + "zero"] = np.full((n, k // group), .25, f16), np.full((n, k // group), 7, u8)
        t[p + "loss"] = np.array([2, 1], f64)
        if codes:
            t[p + "codes"] = np.full((n, k // 2), 0x7a, u8)
    return t


def write_calib():
    c = calib()
    put("calib", "whole", c)
    put("calib", "two-layers", calib(layers=2), layers="2")
    put("calib", "groups", calib(k=96, g=32))
    put("calib", "no-digests", c, digests=False)
    put("calib", "wrong-digest", c, xxh3__tokens="0" * 32)
    put("calib", "wrong-kind", c, kind="plan")
    put("calib", "wrong-version", c, version="2")
    put("calib", "no-parent", c, drop=["parent.model"])
    for value in ("0", "-1", "2", "4097", "1x", "", "99999999999"):
        put("calib", "layers-" + value, c, layers=value)
    put("calib", "no-tap", calib(taps=("qkv", "o", "gate")))
    put("calib", "one-more", change(c, extra=np.zeros(1, u8)))
    put("calib", "no-windows", change(c, tokens=np.zeros((0, 4), i32), held_out=np.zeros(0, u8)))
    put("calib", "negative-id", change(c, tokens=np.full((2, 4), -1, i32)))
    put("calib", "tokens-f32", change(c, tokens=np.zeros((2, 4), f32)))
    put("calib", "held-out-short", change(c, held_out=np.zeros(1, u8)))
    put("calib", "no-channels", calib(k=0, g=6))
    put("calib", "count-zero", change(c, layers__0__o__count=np.zeros(1, i64)))
    put("calib", "sums-short", change(c, layers__0__o__abssum=np.ones(5, f64)))
    put("calib", "blocks-flat", change(c, layers__0__o__blocks=np.ones((6, 6), f32)))
    for name, v in (("nan", np.nan), ("infinite", np.inf), ("negative", -1)):
        put("calib", "absmax-" + name, change(c, layers__0__gate__absmax=np.full(6, v, f32)))
        put("calib", "abssum-" + name, change(c, layers__0__gate__abssum=np.full(6, v, f64)))
        put("calib", "blocks-" + name, change(c, layers__0__gate__blocks=np.full((1, 6, 6), v, f32)))


def write_plan():
    p = plan()
    put("plan", "whole", p)
    put("plan", "split", plan(linears=("q", "k", "v", "o", "gate", "up", "down"), codes=False))
    put("plan", "too-many-linears", plan(linears=("qkv", "q", "k", "v", "o", "gate", "up", "down"), codes=False))
    put("plan", "no-linears", {"layers.0.fold.up": np.ones(4, f32)})
    put("plan", "unknown-linear", plan(linears=("qkv", "router")))
    put("plan", "wrong-digest", p, **{"xxh3__layers__0__o__zero": "f" * 32})
    put("plan", "wrong-kind", p, kind="calib")
    put("plan", "no-method", p, drop=["method"])
    for value in ("0", "-4", "3", "x", "1048577"):
        put("plan", "group-" + value, p, group=value)
    put("plan", "layers-2", p, layers="2")
    put("plan", "zero-missing", {k: v for k, v in p.items() if k != "layers.0.o.zero"})
    put("plan", "loss-missing", {k: v for k, v in p.items() if k != "layers.0.o.loss"})
    put("plan", "zero-short", change(p, layers__0__o__zero=np.zeros((8, 1), u8)))
    put("plan", "codes-short", change(p, layers__0__o__codes=np.zeros((8, 3), u8)))
    put("plan", "no-rows", plan(n=0, codes=False))
    put("plan", "zero-16", change(p, layers__0__o__zero=np.full((8, 2), 16, u8)))
    for name, v in (("nan", np.nan), ("infinite", np.inf), ("negative", -1), ("zero", 0)):
        put("plan", "scale-" + name, change(p, layers__0__up__scale=np.full((8, 2), v, f16)))
        put("plan", "fold-" + name, change(p, layers__0__fold__up=np.full(8, v, f32)))
    put("plan", "fold-square", change(p, layers__0__fold__up=np.ones((2, 4), f32)))
    put("plan", "rotation", change(p, rotation__residual=np.eye(2, dtype=f32)))
    put("plan", "rotation-flat", change(p, rotation__residual=np.ones(4, f32)))
    put("plan", "rotation-oblong", change(p, rotation__residual=np.ones((2, 3), f32)))
    put("plan", "rotation-scalar", change(p, rotation__residual=np.ones((), f32)))


write_calib()
write_plan()
