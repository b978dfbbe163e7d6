#!/usr/bin/env python3
"""Expected numbers of quantization and of the AWQ search, from NumPy and the published formulas alone.

    python3 scripts/make_awq_golden.py tests/golden

writes quantize.txt (the rounding rule, case by case) and awq_search.txt (gate and up of 64 x 64: factors
and losses of every candidate, ranges, LMDeploy's factors). Line-based, floats as hexadecimal bits."""
import sys
import numpy as np

f32, f16, f64 = np.float32, np.float16, np.float64


def bits(a, t):
    return " ".join("%x" % v for v in np.ascontiguousarray(a).view(t).ravel())


# ---- the rounding rule ----
def ranges(w, group, limit=None):
    n, k = w.shape
    x = w.reshape(n, k // group, group)
    lo, hi = np.minimum(x.min(-1), 0).astype(f32), np.maximum(x.max(-1), 0).astype(f32)
    if limit is not None:
        lo, hi = np.maximum(lo, -limit), np.minimum(hi, limit)
    r = np.maximum((hi / f32(15) - lo / f32(15)).astype(f32), f32(1e-5) / f32(15))
    scale = np.minimum(r, f32(65504)).astype(f16)
    zero = np.clip(np.rint((-lo / scale.astype(f32)).astype(f32)), 0, 15).astype(np.uint8)
    return scale, zero


def codes(w, scale, zero, group):
    s = np.repeat(scale.astype(f32), group, 1)
    z = np.repeat(zero.astype(f32), group, 1)
    return np.clip(np.rint((w / s).astype(f32)) + z, 0, 15).astype(np.uint8)


def dequant(q, scale, zero, group):
    return ((q.astype(f32) - np.repeat(zero.astype(f32), group, 1)) * np.repeat(scale.astype(f32), group, 1)).astype(f32)


def fake(w, group, limit=None):
    s, z = ranges(w, group, limit)
    return dequant(codes(w, s, z, group), s, z, group)


def quantize_cases():
    r = np.random.default_rng(7)
    base = lambda *s: r.standard_normal(s).astype(f32)
    ties = ((np.arange(64) - 32) * f32(0.25)).astype(f32)[None]
    wild = base(1, 64)
    wild[0, 3], wild[0, 9] = 3e38, -3e38
    big = base(1, 64)
    big[0, 5] = 2e6
    return [
        ("random-128", 128, base(4, 256)), ("random-64", 64, base(3, 192) * f32(0.02)), ("random-32", 32, base(2, 96)),
        ("odd-group", 43, base(2, 172)), ("zeros", 64, np.zeros((1, 128), f32)), ("negative-zero", 32, -np.zeros((1, 32), f32)),
        ("positive", 32, np.abs(base(1, 64)) + f32(1)), ("negative", 32, -np.abs(base(1, 64)) - f32(1)),
        ("constant", 32, np.full((1, 32), 0.75, f32)), ("ties", 64, ties), ("tiny", 64, base(1, 64) * f32(1e-9)),
        ("subnormal-scale", 64, base(1, 64) * f32(2e-5)), ("floor", 64, base(1, 64) * f32(1e-6)),
        ("scale-overflow", 64, big), ("f32-overflow", 64, wild),
        ("one-outlier", 128, np.concatenate([base(1, 127) * f32(0.01), np.full((1, 1), 4, f32)], 1)),
    ]


def write_quantize(path):
    with open(path, "w", encoding="ascii") as f:
        f.write("# scripts/make_awq_golden.py: case name group rows columns; w f32, scale f16, zero, codes\n")
        for name, group, w in quantize_cases():
            s, z = ranges(w, group)
            q = codes(w, s, z, group)
            f.write("case %s %d %d %d\nw %s\nscale %s\nzero %s\ncodes %s\n" % (
                name, group, *w.shape, bits(w, np.uint32), bits(s, np.uint16), bits(z, np.uint8), bits(q, np.uint8)))


# ---- the search ----
def normalize(s, dead):
    s = s.astype(f32)
    live = s[~dead]
    s = (s / (np.sqrt(live.max()) * np.sqrt(live.min()))).astype(f32)
    s[dead] = 1  # channels whose norm weight is 0
    return s


def weight_mean(ws, group, eps):
    w = np.abs(np.concatenate(ws)).astype(f64)
    x = w.reshape(len(w), -1, group)
    top = x.max(-1, keepdims=True)
    top = top + eps if eps else np.where(top > 0, top, 1e-4)
    return (x / top).mean(0).ravel()


def candidates(ws, amean, group, dead):
    wm = weight_mean(ws, group, 1e-6)
    out = [np.ones_like(amean, f32)]
    for duo in (False, True):
        for p in range(21):
            r = p / 20
            a = amean ** r / (wm ** (1 - r) + 1e-4 if duo else 1)
            out.append(normalize(np.maximum(a, 1e-4), dead))
    return out


def loss(ws, s, h, group):
    total = 0.0
    for w in ws:
        e = (fake((w * s).astype(f32), group).astype(f64) - (w * s).astype(f32)) / s
        total += float(np.einsum("ni,ij,nj->", e, h, e))
    return total


def clip(w, s, h, group):
    n, k = w.shape
    x = (w * s).astype(f32)
    m0 = np.abs(x).reshape(n, k // group, group).max(-1)
    best = limit = None
    for i in range(10):
        m = (m0 * f32(1 - 0.5 * i / 10)).astype(f32)
        e = ((fake(x, group, m).astype(f64) - x) / s).reshape(n, k // group, group)
        err = np.stack([np.einsum("ni,ij,nj->n", e[:, b], h[b * group:(b + 1) * group, b * group:(b + 1) * group], e[:, b])
                        for b in range(k // group)], 1)
        if best is None:
            best, limit = err, m
        else:
            better = err < best
            best, limit = np.where(better, err, best), np.where(better, m, limit)
    scale, zero = ranges(x, group, limit)
    e = (dequant(codes(x, scale, zero, group), scale, zero, group).astype(f64) - x) / s
    return scale, zero, float(np.einsum("ni,ij,nj->", e, h, e))


def write_search(path):
    r = np.random.default_rng(11)
    n, k, group, tokens = 64, 64, 32, 512
    x = (r.standard_normal((tokens, k)) * np.exp(r.standard_normal(k))).astype(f32)
    x[:, 17] = 0  # a dead channel
    ws = [(r.standard_normal((n, k)) * 0.05).astype(f32) for _ in range(2)]
    ws[0][:, 40] *= 8
    dead = np.zeros(k, bool)
    dead[5] = True
    h = (x.T.astype(f64) @ x.astype(f64)).astype(f32).astype(f64)
    amax, asum = np.abs(x).max(0), np.abs(x).sum(0, dtype=f64)
    cs = candidates(ws, asum / tokens, group, dead)
    losses = [loss(ws, c, h, group) for c in cs]
    best = int(np.argmin(losses))
    lm = weight_mean(ws, group, 0)
    lmd = normalize(np.maximum(np.sqrt(amax.astype(f64)) / np.sqrt(lm), 1e-4), dead)
    with open(path, "w", encoding="ascii") as f:
        f.write("# scripts/make_awq_golden.py: gate and up f32 [64,64], statistics of their input, what follows\n")
        f.write("size %d %d %d %d\n" % (n, k, group, tokens))
        f.write("gate %s\nup %s\n" % tuple(bits(w, np.uint32) for w in ws))
        f.write("h %s\nabsmax %s\nabssum %s\n" % (bits(h.astype(f32), np.uint32), bits(amax, np.uint32), bits(asum, np.uint64)))
        f.write("dead 5\nlosses %s\nbest %d\nfactors %s\n" % (bits(np.array(losses), np.uint64), best, bits(cs[best], np.uint32)))
        f.write("lmdeploy %s\n" % bits(lmd, np.uint32))
        for name, w in zip(("gate", "up"), ws):
            s, z, after = clip(w, cs[best], h, group)
            both = np.array([loss([w], cs[0], h, group), after])
            f.write("%s.scale %s\n%s.zero %s\n%s.loss %s\n" % (
                name, bits(s, np.uint16), name, bits(z, np.uint8), name, bits(both, np.uint64)))


if __name__ == "__main__":
    write_quantize(sys.argv[1] + "/quantize.txt")
    write_search(sys.argv[1] + "/awq_search.txt")
