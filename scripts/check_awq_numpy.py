#!/usr/bin/env python3
"""An outside reader of AWQ directories and TurboMind workspaces: NumPy and the safetensors package, written
from the descriptions of the formats alone (docs/formats.md), sharing no code with tmforge.

usage: check_awq_numpy.py AWQ_DIR [--workspace DIR] [--dump W4_DUMP] [--source MODEL_DIR]

It dequantizes every linear, and compares bit for bit with what tmforge makes of AWQ_DIR (and of the
workspace) as printed by W4_DUMP. With --workspace every weight file is made again from AWQ_DIR and
compared byte for byte, and config.yaml with what the model says. With --source the unquantized parts are
compared with those of the model (16-bit norms may carry folded factors: only their shape is), and the largest
error of a weight against its group's step is printed for models that no factors were folded into.
Exits 0 when all agree, 1 when something differs, 77 where a package is missing.
"""
import argparse
import json
import os
import subprocess
import sys

try:
    import numpy as np
except ImportError as missing:
    print(f"SKIP check_awq_numpy: {missing}")
    sys.exit(77)
try:
    from safetensors import safe_open
except ImportError as missing:
    print(f"note: {missing}; its file format is read by hand")
    safe_open = None

NUMPY_TYPE = {"F16": np.float16, "F32": np.float32, "I32": np.int32, "BF16": np.uint16}


class ByHand:
    """The few calls on a safetensors file that are needed here, for machines without the package."""

    def __init__(self, path):
        self.path = path
        with open(path, "rb") as f:
            self.base = 8 + int.from_bytes(f.read(8), "little")
            self.header = json.loads(f.read(self.base - 8))
        self.meta = self.header.pop("__metadata__", None)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False

    def keys(self):
        return self.header.keys()

    def metadata(self):
        return self.meta

    def get_tensor(self, name):
        h = self.header[name]
        count = int(np.prod(h["shape"]))
        return np.fromfile(self.path, NUMPY_TYPE[h["dtype"]], count, offset=self.base + h["data_offsets"][0]).reshape(h["shape"])


def open_file(path):
    return safe_open(path, "np") if safe_open else ByHand(path)


# Nibble p of an AWQ word holds column 8w + ORDER[p].
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
failures = []


def check(ok, what):
    if not ok:
        failures.append(what)
        print(f"differs: {what}")


class Directory:
    """The tensors of a Hugging Face directory by name."""

    def __init__(self, path):
        self.path = path
        with open(os.path.join(path, "config.json")) as f:
            self.config = json.load(f)
        self.where = {}
        for name in sorted(os.listdir(path)):
            if name.endswith(".safetensors"):
                with open_file(os.path.join(path, name)) as f:
                    for key in f.keys():
                        check(key not in self.where, f"{key} is in two files")
                        self.where[key] = name
        index = os.path.join(path, "model.safetensors.index.json")
        if os.path.exists(index):
            with open(index) as f:
                check(json.load(f)["weight_map"] == self.where, "the index agrees with the files")

    def __contains__(self, name):
        return name in self.where

    def get(self, name):
        with open_file(os.path.join(self.path, self.where[name])) as f:
            return f.get_tensor(name)

    def metadata(self, name):
        with open_file(os.path.join(self.path, self.where[name])) as f:
            return f.metadata()


def unpack_awq(words):
    """int32 [rows, n/8] -> uint8 [rows, n], one code an element."""
    words = words.view(np.uint32)
    out = np.empty((words.shape[0], words.shape[1] * 8), np.uint8)
    for p, column in enumerate(ORDER):
        out[:, column::8] = words >> np.uint32(4 * p) & np.uint32(15)
    return out


def pack_sequential(codes):
    """uint8 [rows, n] -> uint32 [rows, n/8], nibble p = column 8w + p."""
    out = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for p in range(8):
        out |= codes[:, p::8].astype(np.uint32) << np.uint32(4 * p)
    return out


class Linear:
    """One quantized linear, inputs first: codes [k, n], zeros and scales [k/g, n], bias [n] or None."""

    def __init__(self, codes, zeros, scales, bias):
        self.codes, self.zeros, self.scales, self.bias = codes, zeros, scales, bias

    @staticmethod
    def read(d, name):
        bias = d.get(name + ".bias") if name + ".bias" in d else None
        return Linear(unpack_awq(d.get(name + ".qweight")), unpack_awq(d.get(name + ".qzeros")),
                      d.get(name + ".scales"), bias)

    def columns(self, index):
        return Linear(self.codes[:, index], self.zeros[:, index], self.scales[:, index],
                      None if self.bias is None else self.bias[index])

    def dequantized(self):
        """fp16 [n, k]: (q - z) * s, one rounding."""
        group = self.codes.shape[0] // self.scales.shape[0]
        q = self.codes.astype(np.float32)
        z = np.repeat(self.zeros, group, 0).astype(np.float32)
        s = np.repeat(self.scales, group, 0).astype(np.float32)
        return ((q - z) * s).astype(np.float16).T


def join(parts):
    bias = [p.bias for p in parts]
    return Linear(np.hstack([p.codes for p in parts]), np.hstack([p.zeros for p in parts]),
                  np.hstack([p.scales for p in parts]), None if bias[0] is None else np.hstack(bias))


LLAMA = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
         "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
         "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
INTERNLM2 = {"qkv": "attention.wqkv", "o": "attention.wo", "gate": "feed_forward.w1", "up": "feed_forward.w3",
             "down": "feed_forward.w2", "attn_norm": "attention_norm", "ffn_norm": "ffn_norm"}
OUTER_LLAMA = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
OUTER_INTERNLM2 = {"embed": "model.tok_embeddings", "norm": "model.norm", "head": "output"}


class Model:
    def __init__(self, d):
        c = d.config
        self.d = d
        self.grouped = c["architectures"][0] == "InternLM2ForCausalLM"
        self.names = INTERNLM2 if self.grouped else LLAMA
        self.outer = OUTER_INTERNLM2 if self.grouped else OUTER_LLAMA
        self.layers, self.hidden = c["num_hidden_layers"], c["hidden_size"]
        self.heads = c["num_attention_heads"]
        self.kv_heads = c.get("num_key_value_heads", self.heads)
        self.head_dim = c.get("head_dim") or self.hidden // self.heads
        self.ffn, self.vocab = c["intermediate_size"], c["vocab_size"]

    def name(self, layer, role):
        return f"model.layers.{layer}.{self.names[role]}"

    def linear(self, layer, role):
        return Linear.read(self.d, self.name(layer, role))

    def linears(self):
        return [r for r in ("q", "k", "v", "qkv", "o", "gate", "up", "down") if r in self.names]

    def dense(self, base):
        return self.d.get(base + ".weight")

    def head(self):
        return self.dense(self.outer["head" if self.outer["head"] + ".weight" in self.d else "embed"])

    def split(self, layer):
        """q, k, v of a layer, heads in order."""
        if not self.grouped:
            return [self.linear(layer, r) for r in "qkv"]
        w, d, per = self.linear(layer, "qkv"), self.head_dim, self.heads // self.kv_heads
        # per KV head: its query heads, then one key head, then one value head
        order = np.arange(w.codes.shape[1]).reshape(self.kv_heads, per + 2, d)
        return [w.columns(order[:, :per].reshape(-1)), w.columns(order[:, per].reshape(-1)),
                w.columns(order[:, per + 1].reshape(-1))]

    def interleave(self, w):
        """Rotary pairs side by side: new[2j+h] = old[h*D/2+j] in every head."""
        d = self.head_dim
        order = np.arange(w.codes.shape[1]).reshape(-1, 2, d // 2).transpose(0, 2, 1).reshape(-1)
        return w.columns(order)

    def fused(self, layer):
        q, k, v = self.split(layer)
        return join([self.interleave(q), self.interleave(k), v])


def read_dump(program, path):
    """{(layer, role): fp16 [n, k]} as tmforge reads the path."""
    process = subprocess.run([program, path], check=True, capture_output=True)
    data, at, out = process.stdout, 0, {}
    while at < len(data):
        end = data.index(b"\n", at)
        layer, role, n, k = data[at:end].decode().split()
        n, k, at = int(n), int(k), end + 1
        out[int(layer), role] = np.frombuffer(data, np.float16, n * k, at).reshape(n, k)
        at += 2 * n * k
    return out


def same_bits(a, b):
    return a.shape == b.shape and np.array_equal(a.view(np.uint16), b.view(np.uint16))


def check_directory(m):
    d, c = m.d, m.d.config
    q = c["quantization_config"]
    check(q["quant_method"] == "awq" and q["version"] == "gemm" and q["bits"] == 4 and q["zero_point"] is True,
          f"quantization_config: {q}")
    check(c["torch_dtype"] == "float16", "torch_dtype")
    group, expected = q["group_size"], {}
    shapes = {"q": (m.hidden, m.heads * m.head_dim), "k": (m.hidden, m.kv_heads * m.head_dim),
              "v": (m.hidden, m.kv_heads * m.head_dim),
              "qkv": (m.hidden, (m.heads + 2 * m.kv_heads) * m.head_dim), "o": (m.heads * m.head_dim, m.hidden),
              "gate": (m.hidden, m.ffn), "up": (m.hidden, m.ffn), "down": (m.ffn, m.hidden)}
    for layer in range(m.layers):
        for role in m.linears():
            k, n = shapes[role]
            base = m.name(layer, role)
            expected[base + ".qweight"] = ("int32", (k, n // 8))
            expected[base + ".qzeros"] = ("int32", (k // group, n // 8))
            expected[base + ".scales"] = ("float16", (k // group, n))
        for role in ("attn_norm", "ffn_norm"):
            expected[m.name(layer, role) + ".weight"] = ("float16", (m.hidden,))
    expected[m.outer["embed"] + ".weight"] = ("float16", (m.vocab, m.hidden))
    expected[m.outer["norm"] + ".weight"] = ("float16", (m.hidden,))
    if not c.get("tie_word_embeddings"):
        expected[m.outer["head"] + ".weight"] = ("float16", (m.vocab, m.hidden))
    for name, (dtype, shape) in expected.items():
        if name not in d:
            check(False, f"{name} is missing")
            continue
        t = d.get(name)
        check(t.dtype == dtype and t.shape == shape, f"{name}: {t.dtype} {t.shape}, expected {dtype} {shape}")
    for name in d.where:
        check(name in expected or name.endswith(".bias"), f"{name} is not expected")
    check(d.metadata(m.outer["norm"] + ".weight").get("format") == "pt", "metadata format")
    return len(expected)


def check_dequantized(m, dump):
    for layer in range(m.layers):
        for role in m.linears():
            check(same_bits(m.linear(layer, role).dequantized(), dump[layer, role]),
                  f"layer {layer} {role}: dequantized bits")
    return len(dump)


class Workspace:
    def __init__(self, path):
        self.path = os.path.join(path, "triton_models", "weights")
        self.left = set(os.listdir(self.path)) - {"config.yaml"}

    def same(self, name, array):
        self.left.discard(name)
        with open(os.path.join(self.path, name), "rb") as f:
            found = f.read()
        check(found == np.ascontiguousarray(array).tobytes(), f"workspace file {name}")


def check_workspace(m, path):
    w = Workspace(path)
    w.same("tok_embeddings.0.weight", m.dense(m.outer["embed"]))
    w.same("norm.weight", m.dense(m.outer["norm"]))
    w.same("output.0.weight", m.head())
    for layer in range(m.layers):
        at = f"layers.{layer}."
        w.same(at + "attention_norm.weight", m.dense(m.name(layer, "attn_norm")))
        w.same(at + "ffn_norm.weight", m.dense(m.name(layer, "ffn_norm")))
        parts = {"attention.w_qkv": m.fused(layer), "attention.wo": m.linear(layer, "o"),
                 "feed_forward.w1": m.linear(layer, "gate"), "feed_forward.w3": m.linear(layer, "up"),
                 "feed_forward.w2": m.linear(layer, "down")}
        for name, x in parts.items():
            w.same(f"{at}{name}.0.qweight", pack_sequential(x.codes))
            w.same(f"{at}{name}.0.scales", x.scales)
            w.same(f"{at}{name}.0.zeros", x.zeros.astype(np.float16))
        if parts["attention.w_qkv"].bias is not None:
            w.same(at + "attention.w_qkv.0.bias", parts["attention.w_qkv"].bias.astype(np.float16))
            o = parts["attention.wo"].bias
            w.same(at + "attention.wo.0.bias", np.zeros(m.hidden, np.float16) if o is None else o)
    check(not w.left, f"workspace files that nothing explains: {sorted(w.left)}")


def check_workspace_config(m, path):
    try:
        import yaml
    except ImportError as missing:
        print(f"SKIP config.yaml: {missing}")
        return
    with open(os.path.join(path, "triton_models", "weights", "config.yaml")) as f:
        text = f.read()
    y = yaml.safe_load(text)
    c, model, attention = m.d.config, y["model_config"], y["attention_config"]
    want = {"head_num": m.heads, "kv_head_num": m.kv_heads, "hidden_units": m.hidden, "vocab_size": m.vocab,
            "embedding_size": m.vocab, "num_layer": m.layers, "inter_size": [m.ffn] * m.layers, "expert_num": [],
            "norm_eps": c["rms_norm_eps"], "size_per_head": m.head_dim, "weight_type": "int4", "tp": 1,
            "group_size": c["quantization_config"]["group_size"], "model_arch": c["architectures"][0],
            "attn_bias": int(any(n.endswith("_proj.bias") for n in m.d.where)), "model_format": "awq"}
    for key, value in want.items():
        check(model[key] == value, f"config.yaml {key}: {model[key]}, expected {value}")
    check(attention["rope_theta"] == c["rope_theta"], "config.yaml rope_theta")
    check(attention["rotary_embedding"] == m.head_dim, "config.yaml rotary_embedding")
    scaling = c.get("rope_scaling") or {}
    check(attention["rope_scaling_type"] == scaling.get("rope_type", scaling.get("type", "")), "rope_scaling_type")
    check(y["lora_config"]["lora_policy"] == "", "config.yaml lora_policy")
    # the same text that PyYAML writes, so that a diff with a workspace of LMDeploy shows values only
    check(yaml.safe_dump(y) == text, "config.yaml is laid out as yaml.safe_dump does")


def check_workspace_dump(m, dump):
    for layer in range(m.layers):
        parts = {"qkv": m.fused(layer)} | {r: m.linear(layer, r) for r in ("o", "gate", "up", "down")}
        for role, x in parts.items():
            check(same_bits(x.dequantized(), dump[layer, role]), f"workspace layer {layer} {role}: dequantized bits")


def bf16_to_f32(a):
    return (a.astype(np.uint32) << 16).view(np.float32)


def read_raw(path, name):
    """A float tensor as f32: the package's NumPy side has no bf16, so the bytes are taken by hand."""
    for file in sorted(os.listdir(path)):
        if not file.endswith(".safetensors"):
            continue
        f = ByHand(os.path.join(path, file))
        if name in f.keys():
            t = f.get_tensor(name)
            return bf16_to_f32(t) if f.header[name]["dtype"] == "BF16" else t.astype(np.float32)
    return None


def check_source(m, source):
    """Embedding and head as in the model; the weights within half a step of it, if nothing was folded."""
    for base in {m.outer["embed"], m.outer["head"]}:
        want = read_raw(source, base + ".weight")
        if want is not None and base + ".weight" in m.d:
            check(same_bits(want.astype(np.float16), m.dense(base)), f"{base}: as in the model")
    worst = 0.0
    for layer in range(m.layers):
        norms = [m.name(layer, r) + ".weight" for r in ("attn_norm", "ffn_norm")]
        if not all(same_bits(read_raw(source, n).astype(np.float16), m.d.get(n)) for n in norms):
            print("weights carry factors: their distance from the model is not measured")
            return
        for role in m.linears():
            x = m.linear(layer, role)
            want = read_raw(source, m.name(layer, role) + ".weight")
            step = np.repeat(x.scales, x.codes.shape[0] // x.scales.shape[0], 0).T.astype(np.float32)
            worst = max(worst, float(np.max(np.abs(x.dequantized().astype(np.float32) - want) / step)))
    print(f"largest error: {worst:.3f} of a step")


def main():
    p = argparse.ArgumentParser(usage=__doc__)
    p.add_argument("awq_dir")
    p.add_argument("--workspace")
    p.add_argument("--dump")
    p.add_argument("--source")
    a = p.parse_args()
    m = Model(Directory(a.awq_dir))
    print(f"{a.awq_dir}: {check_directory(m)} tensors as expected")
    if a.dump:
        print(f"{check_dequantized(m, read_dump(a.dump, a.awq_dir))} linears dequantized as tmforge does")
    if a.workspace:
        check_workspace(m, a.workspace)
        check_workspace_config(m, a.workspace)
        if a.dump:
            check_workspace_dump(m, read_dump(a.dump, a.workspace))
        print(f"{a.workspace}: made again from the AWQ directory")
    if a.source:
        check_source(m, a.source)
    print(f"{len(failures)} differences")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
