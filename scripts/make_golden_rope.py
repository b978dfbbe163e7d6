#!/usr/bin/env python3
"""Writes tests/golden/rope.json: rotary frequencies by the published formulas, in NumPy float32.

usage: make_golden_rope.py > tests/golden/rope.json

Shares nothing with the C code. Each case is a config.json fragment as model directories hold it, the number of
tokens (it matters to dynamic scaling), and what follows: inv_freq and the factor on cos and sin. Arrays are float32
and operations are in the order of the transformers library, with Python's floats for scalars, so the C code has
to agree to the last bits, not just roughly.
"""
import json
import math
import sys

import numpy as np

F = np.float32
BASE = {"architectures": ["LlamaForCausalLM"], "vocab_size": 100, "hidden_size": 512, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 4}


def plain(base, dims):
    exponent = np.arange(0, dims, 2).astype(F) / F(dims)
    return F(1) / np.power(F(base), exponent)


def llama3(freq, r):
    length, low, high = r["original_max_position_embeddings"], r["low_freq_factor"], r["high_freq_factor"]
    wave = F(2 * math.pi) / freq
    smooth = (F(length) / wave - F(low)) / F(high - low)
    mixed = (F(1) - smooth) * freq / F(r["factor"]) + smooth * freq
    out = np.where(wave > F(length / low), freq / F(r["factor"]), freq)
    return np.where((wave >= F(length / high)) & (wave <= F(length / low)), mixed, out)


def yarn(base, dims, r, max_positions):
    length = r.get("original_max_position_embeddings") or max_positions
    factor = r.get("factor") or max_positions / length

    def dim_of(turns):
        return dims * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    def stretch(m):
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    low = max(math.floor(dim_of(r.get("beta_fast") or 32)), 0)
    high = min(math.ceil(dim_of(r.get("beta_slow") or 1)), dims - 1)
    if low == high:
        high += 0.001
    keep = F(1) - np.clip((np.arange(dims // 2, dtype=F) - F(low)) / F(high - low), F(0), F(1))
    period = np.power(F(base), np.arange(0, dims, 2).astype(F) / F(dims))
    freq = F(1) / (F(factor) * period) * (F(1) - keep) + F(1) / period * keep
    attention = r.get("attention_factor")
    if attention is None:
        a, b = r.get("mscale"), r.get("mscale_all_dim")
        attention = stretch(a) / stretch(b) if a and b else stretch(1)
    return freq, attention


def solve(config, tokens):
    r = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = r.get("rope_type", r.get("type", "default"))
    base = r.get("rope_theta", config.get("rope_theta", 10000.0))
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    dims = int(head * r.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)))
    positions = config["max_position_embeddings"]
    if kind == "yarn":
        return yarn(base, dims, r, positions)
    if kind == "dynamic":
        n = max(tokens, positions)
        base = base * ((r["factor"] * n / positions) - (r["factor"] - 1)) ** (dims / (dims - 2))
    freq = plain(base, dims)
    if kind == "linear":
        freq = freq / F(r["factor"])
    if kind == "llama3":
        freq = llama3(freq, r)
    return freq, 1.0


CASES = [
    ("llama 2", {"max_position_embeddings": 4096}, 0),
    ("theta 1e6, head 64", {"max_position_embeddings": 4096, "rope_theta": 1e6, "head_dim": 64}, 0),
    ("head 80", {"max_position_embeddings": 4096, "head_dim": 80}, 0),
    ("head 256, theta 5e6", {"max_position_embeddings": 4096, "head_dim": 256, "rope_theta": 5e6}, 0),
    ("half rotated", {"max_position_embeddings": 4096, "partial_rotary_factor": 0.5}, 0),
    ("linear", {"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}, 0),
    ("dynamic, short", {"max_position_embeddings": 2048, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 2048),
    ("dynamic, long", {"max_position_embeddings": 2048, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 5000),
    ("dynamic, InternLM2.5", {"max_position_embeddings": 32768, "rope_theta": 1e6,
                              "rope_scaling": {"type": "dynamic", "factor": 2.5}}, 100001),
    ("llama 3.1", {"max_position_embeddings": 131072, "rope_theta": 500000.0,
                   "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                                    "original_max_position_embeddings": 8192, "rope_type": "llama3"}}, 0),
    ("llama 3.2, head 64", {"max_position_embeddings": 131072, "rope_theta": 500000.0, "head_dim": 64,
                            "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                                             "original_max_position_embeddings": 8192, "rope_type": "llama3"}}, 0),
    ("llama 3.1 as newer configs say it", {
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_theta": 500000.0, "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                            "original_max_position_embeddings": 8192, "rope_type": "llama3"}}, 0),
    ("default in rope_parameters", {"max_position_embeddings": 4096,
                                    "rope_parameters": {"rope_theta": 123456.0, "rope_type": "default"}}, 0),
    ("yarn, Qwen2.5", {"max_position_embeddings": 32768, "rope_theta": 1e6,
                       "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}}, 0),
    ("yarn, factor from the lengths", {"max_position_embeddings": 65536, "rope_theta": 10000.0, "rope_scaling": {
        "factor": None, "original_max_position_embeddings": 4096, "rope_type": "yarn"}}, 0),
    ("yarn, own betas and attention", {"max_position_embeddings": 8192, "rope_theta": 10000.0, "head_dim": 64,
                                       "rope_scaling": {"factor": 16.0, "attention_factor": 0.75, "beta_fast": 16,
                                                        "beta_slow": 2, "rope_type": "yarn"}}, 0),
    ("yarn, mscale", {"max_position_embeddings": 163840, "rope_theta": 10000.0,
                      "rope_scaling": {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0,
                                       "mscale_all_dim": 0.5, "rope_type": "yarn"}}, 0),
    ("yarn, no stretch", {"max_position_embeddings": 8192, "rope_scaling": {"factor": 1.0, "rope_type": "yarn"}}, 0),
]

lines = []
for name, part, tokens in CASES:
    config = {**BASE, **part}
    freq, mscale = solve(config, tokens)
    assert freq.dtype == F
    # The shortest text that names one float32, in 17 digits at most for a reader of doubles.
    lines.append(json.dumps({"name": name, "config": config, "tokens": tokens, "mscale": float(F(mscale)),
                             "inv_freq": [float(repr(float(v))) for v in freq]}))
sys.stdout.write("[\n" + ",\n".join(lines) + "\n]\n")
