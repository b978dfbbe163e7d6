#!/usr/bin/env python3
"""Perplexity of a model on a file of dialogues, computed apart from our C code: NumPy float32 arithmetic,
the sentencepiece package, and the files of the model directory as they are stored.

    python3 scripts/make_golden.py MODEL_DIR DIALOGUES.jsonl > golden_eval.json
    python3 scripts/make_golden.py --check MODEL_DIR    this program itself against MODEL_DIR/golden.json

Needs numpy and sentencepiece (pip). The model is an InternLM2 directory with one safetensors file.

The protocol, which `tm-run ppl MODEL_DIR --data DIALOGUES.jsonl --window 1024` follows too:
1. Each line is {"messages": [{"role", "content"}, ...]}. Through the model's chat template it becomes BOS, and
   for each message <|im_start|> "ROLE\\nCONTENT" <|im_end|> "\\n": the marks as their single ids, each quoted
   piece through sentencepiece by itself. No reply is opened behind the last message.
2. The ids of all lines follow one another.
3. They are cut into windows of 1024 from the start; a shorter rest is dropped. Each window is a sequence of
   its own from position 0 and gives 1023 losses, that of its tokens 1 to 1023 given those before.
4. ppl = exp(sum of losses / number of losses).
"bos_once" is the same with one BOS before the first line only.
"""
import hashlib
import json
import math
import struct
import sys

import numpy as np
import sentencepiece

WINDOW = 1024


def read_safetensors(path):
    """name -> float32 array."""
    with open(path, "rb") as f:
        raw = f.read()
    (size,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    out = {}
    for name, info in header.items():
        first, last = (8 + size + v for v in info["data_offsets"])
        data = raw[first:last]
        if info["dtype"] == "BF16":
            values = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(data, {"F16": "<f2", "F32": "<f4"}[info["dtype"]])
        out[name] = values.astype(np.float32).reshape(info["shape"])
    return out


class Model:
    def __init__(self, folder):
        with open(f"{folder}/config.json") as f:
            self.c = json.load(f)
        assert self.c["model_type"] == "internlm2", self.c["model_type"]
        self.w = read_safetensors(f"{folder}/model.safetensors")
        heads = self.c["num_attention_heads"]
        self.dim = self.c["hidden_size"] // heads
        self.kv = self.c["num_key_value_heads"]
        self.per_kv = heads // self.kv
        angle = np.outer(
            np.arange(WINDOW),
            self.c["rope_theta"] ** (-np.arange(0, self.dim, 2, dtype=np.float64) / self.dim),
        )
        self.cos = np.cos(np.hstack([angle, angle])).astype(np.float32)
        self.sin = np.sin(np.hstack([angle, angle])).astype(np.float32)

    def norm(self, x, name):
        scale = np.sqrt(np.mean(x * x, axis=1, keepdims=True) + np.float32(self.c["rms_norm_eps"]))
        return x / scale * self.w[name]

    def rotate(self, x):  # [tokens, dim], halves paired
        half = self.dim // 2
        turned = np.hstack([-x[:, half:], x[:, :half]])
        return x * self.cos[: len(x)] + turned * self.sin[: len(x)]

    def attention(self, x, prefix):
        n, dim = len(x), self.dim
        # Rows of wqkv: for each kv head its query heads, then its key, then its value.
        qkv = (x @ self.w[prefix + "attention.wqkv.weight"].T).reshape(n, self.kv, self.per_kv + 2, dim)
        ahead = np.triu(np.full((n, n), -np.inf, np.float32), 1)
        out = np.empty((n, self.kv * self.per_kv, dim), np.float32)
        for kv in range(self.kv):
            key, value = self.rotate(qkv[:, kv, -2]), qkv[:, kv, -1]
            for q in range(self.per_kv):
                score = self.rotate(qkv[:, kv, q]) @ key.T / np.float32(math.sqrt(dim)) + ahead
                p = np.exp(score - score.max(axis=1, keepdims=True))
                out[:, kv * self.per_kv + q] = (p / p.sum(axis=1, keepdims=True)) @ value
        return out.reshape(n, -1) @ self.w[prefix + "attention.wo.weight"].T

    def feed_forward(self, x, prefix):
        gate = x @ self.w[prefix + "feed_forward.w1.weight"].T
        up = x @ self.w[prefix + "feed_forward.w3.weight"].T
        return (gate / (1 + np.exp(-gate)) * up) @ self.w[prefix + "feed_forward.w2.weight"].T

    def logits(self, ids):
        x = self.w["model.tok_embeddings.weight"][ids]
        for layer in range(self.c["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            x = x + self.attention(self.norm(x, prefix + "attention_norm.weight"), prefix)
            x = x + self.feed_forward(self.norm(x, prefix + "ffn_norm.weight"), prefix)
        return self.norm(x, "model.norm.weight") @ self.w["output.weight"].T


class Tokenizer:
    def __init__(self, folder):
        self.sp = sentencepiece.SentencePieceProcessor(model_file=f"{folder}/tokenizer.model")
        with open(f"{folder}/tokenizer_config.json") as f:
            added = json.load(f)["added_tokens_decoder"]
        self.mark = {v["content"]: int(k) for k, v in added.items()}

    def messages(self, messages):
        ids = []
        for m in messages:
            ids.append(self.mark["<|im_start|>"])
            ids += self.sp.encode(f"{m['role']}\n{m['content']}")
            ids.append(self.mark["<|im_end|>"])
            ids += self.sp.encode("\n")
        return ids


def render(tokenizer, path, bos_once):
    ids = []
    with open(path, encoding="utf-8") as f:
        for line in f:
            if not ids or not bos_once:
                ids.append(tokenizer.mark["<s>"])
            ids += tokenizer.messages(json.loads(line)["messages"])
    return ids


def losses(model, ids):
    """Negative log-likelihoods in float64 of ids[1:]."""
    z = model.logits(np.array(ids[:-1])).astype(np.float64)
    top = z.max(axis=1)
    return np.log(np.exp(z - top[:, None]).sum(axis=1)) + top - z[np.arange(len(z)), ids[1:]]


def digest(path):
    with open(path, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()


def check(folder):
    """golden.json was made by another forward pass and another tokenizer program."""
    model, tokenizer = Model(folder), Tokenizer(folder)
    with open(f"{folder}/golden.json") as f:
        golden = json.load(f)
    worst = 0.0
    for t in golden["tokenize"]:
        assert tokenizer.sp.encode(t["text"]) == t["ids"], t["text"]
    for c in golden["completions"]:
        z = model.logits(np.array(c["ids"]))[-1].astype(np.float64)
        log_p = z - z.max() - math.log(np.exp(z - z.max()).sum())
        worst = max(worst, float(np.abs(log_p[c["top10"]] - np.array(c["logprobs"])).max()))
    for c in golden["chats"]:
        ids = [tokenizer.mark["<s>"]] + tokenizer.messages(c["messages"])
        ids += [tokenizer.mark["<|im_start|>"]] + tokenizer.sp.encode("assistant\n")
        assert ids == c["ids"], c["messages"]
        assert int(model.logits(np.array(ids))[-1].argmax()) == c["greedy"][0], c["messages"]
    assert worst < 1e-3, worst
    print(
        f"{len(golden['tokenize'])} texts and {len(golden['chats'])} chats are equal; the log-probabilities of "
        f"{len(golden['completions'])} completions differ by at most {worst:.2g}"
    )


def perplexity(model, ids):
    windows = len(ids) // WINDOW
    nll = [float(losses(model, ids[w * WINDOW : (w + 1) * WINDOW]).sum()) for w in range(windows)]
    count = windows * (WINDOW - 1)
    return {
        "ids": len(ids),
        "ids_sha256": hashlib.sha256(np.array(ids, "<i4").tobytes()).hexdigest(),
        "windows": windows,
        "tokens": count,
        "nll": math.fsum(nll),
        "ppl": math.exp(math.fsum(nll) / count),
        "ppl_first_20_windows": math.exp(math.fsum(nll[:20]) / (20 * (WINDOW - 1))),
    }


def main():
    if sys.argv[1:2] == ["--check"]:
        check(sys.argv[2])
        return
    folder, path = sys.argv[1:]
    model, tokenizer = Model(folder), Tokenizer(folder)
    result = {
        "made_by": "scripts/make_golden.py: NumPy float32, losses summed in float64",
        "protocol": "ChatML with BOS, dialogues one after another, windows of 1024, rest dropped",
        "data_sha256": digest(path),
        "model_sha256": digest(f"{folder}/model.safetensors"),
        "window": WINDOW,
    }
    result.update(perplexity(model, render(tokenizer, path, False)))
    result["bos_once"] = perplexity(model, render(tokenizer, path, True))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
