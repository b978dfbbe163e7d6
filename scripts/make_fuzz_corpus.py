#!/usr/bin/env python3
"""Writes the seeds of tests/fuzz/corpus/{safetensors,config}: small inputs, one per rule of the parsers.

usage: make_fuzz_corpus.py CORPUS_DIR

Inputs that a fuzzer found are kept beside them under the names that the fuzzer gave.
"""
import json
import pathlib
import struct
import sys

out = pathlib.Path(sys.argv[1])


def put(target, name, data):
    path = out / target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def st(name, header, data=b"", length=None):
    if not isinstance(header, bytes):
        header = json.dumps(header, separators=(",", ":")).encode()
    put("safetensors", name, struct.pack("<Q", len(header) if length is None else length) + header + data)


def t(dtype, shape, begin, end, **more):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


put("safetensors", "nothing", b"")
put("safetensors", "seven-bytes", b"\2\0\0\0\0\0\0")
st("no-tensors", {})
st("one", {"a": t("F32", [2], 0, 8)}, bytes(8))
st("scalar", {"a": t("BF16", [], 0, 2)}, bytes(2))
st("two", {"b": t("U8", [3], 2, 5), "a": t("F16", [1], 0, 2)}, bytes(5))
st("empty-tensors", {"a": t("F32", [0, 3], 0, 0), "b": t("U8", [1], 0, 1), "c": t("I64", [0], 1, 1)}, bytes(1))
st("rank-8", {"a": t("I8", [1, 2, 1, 2, 1, 1, 1, 2], 0, 8)}, bytes(8))
st("rank-9", {"a": t("I8", [1] * 9, 0, 1)}, bytes(1))
st("metadata", {"__metadata__": {"format": "pt", "k": "v\n\u00e9"}, "a": t("BOOL", [1], 0, 1)}, bytes(1))
st("metadata-number", {"__metadata__": {"format": 1}})
st("unknown-members", {"a": t("U8", [1], 0, 1, x=[1, {"y": [None, True, "}]"]}], z={})}, bytes(1))
st("deep", b'{"a":{"x":' + b"[" * 40 + b"]" * 40 + b"}}")
st("escapes", b'{"\\u0041\\ud83d\\ude00\\n\\"\\\\\\/\\b\\f\\r\\t":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', bytes(1))
st("lone-surrogate", b'{"\\ud800":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', bytes(1))
st("nul-in-name", b'{"a\\u0000b":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', bytes(1))
st("name-twice", b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[],"data_offsets":[1,2]}}',
   bytes(2))
st("overlap", {"a": t("U8", [2], 0, 2), "b": t("U8", [2], 1, 3)}, bytes(3))
st("gap", {"a": t("U8", [2], 0, 2), "b": t("U8", [2], 3, 5)}, bytes(5))
st("too-much-data", {"a": t("U8", [2], 0, 2)}, bytes(3))
st("overflow", {"a": t("F64", [1 << 32, 1 << 32, 0], 0, 0)})
st("huge-number", b'{"a":{"dtype":"U8","shape":[99999999999999999999],"data_offsets":[0,1]}}', bytes(1))
st("newer-dtype", {"a": t("F4", [2], 0, 1)}, bytes(1))
st("padded", b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}     ', bytes(1))
st("length-2-63", b"{}", length=1 << 63)
st("length-all-ones", b"{}", length=(1 << 64) - 1)
st("spaces-everywhere", b'{ "a" :\t{ "shape" : [ 1 ,\n2 ] , "dtype" : "U8" , "data_offsets" : [ 0 , 2 ] } }', bytes(2))

LLAMA = {"architectures": ["LlamaForCausalLM"], "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96,
         "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
         "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": [2, 3], "torch_dtype": "bfloat16"}


def cfg(name, config, *more):
    parts = [x if isinstance(x, bytes) else json.dumps(x).encode() for x in (config, *more)]
    put("config", name, b"\0".join(parts))


cfg("llama", LLAMA)
cfg("yi", {**LLAMA, "vocab_size": 64000})
cfg("internlm2", {**LLAMA, "architectures": ["InternLM2ForCausalLM"], "bias": True})
cfg("mistral", {**LLAMA, "architectures": ["MistralForCausalLM"], "sliding_window": 32, "head_dim": 32})
cfg("qwen2", {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 32,
              "max_window_layers": 1, "tie_word_embeddings": True})
cfg("qwen2-layer-types", {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True,
                          "layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2})
cfg("generation", LLAMA, {"eos_token_id": [2, 5, 7]})
cfg("side", LLAMA, {}, {"w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"})
cfg("awq", {**LLAMA, "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}})
cfg("gptq", {**LLAMA, "quantization_config": {"quant_method": "gptq", "bits": 4}})
for kind, more in {"linear": {}, "dynamic": {}, "longrope": {},
                   "llama3": {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 32},
                   "yarn": {"original_max_position_embeddings": 32, "mscale": 1, "mscale_all_dim": 0.5}}.items():
    cfg("rope-" + kind, {**LLAMA, "rope_theta": 1e6, "rope_scaling": {"rope_type": kind, "factor": 4.0, **more}})
cfg("rope-parameters", {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5,
                                                     "partial_rotary_factor": 0.5}})
cfg("unknown-family", {**LLAMA, "architectures": ["GPT2LMHeadModel"]})
cfg("nothing", b"")
cfg("not-json", b'{"architectures":["LlamaForCausalLM"')
cfg("extreme-rope", {**LLAMA, "rope_theta": 1e15, "head_dim": 1024, "rope_scaling": {"type": "dynamic", "factor": 1e6}})
cfg("tiny-theta", {**LLAMA, "rope_theta": 1e-30, "rope_scaling": {"type": "linear", "factor": 1e-15}})
