"""Quantization, pruning and low rank by the papers' formulas in numpy, in float64 and without any of the factorizations that make them fast: where a paper
updates an inverse or has a Cholesky factor of it, the inverse of what is left is computed anew. GGUF's blocks by PyPI's `gguf`."""

import gguf
import numpy as np
import torch

ROWS, COLS, SAMPLES = 10, 160, 240
DAMPING = 0.01
BLOCK = 128
INT = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}
# Appendix E of arXiv:2305.14314.
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], dtype=np.float32).astype(np.float64)  # fmt: skip
E4M3 = np.array([torch.tensor(b, dtype=torch.uint8).view(torch.float8_e4m3fn).double() for b in range(127)])
E4M3 = np.unique(np.concatenate([-E4M3, E4M3]))
FORMATS = ("int8", "int8-channel", "int8-channel-asym", "int4-g32", "int4-g32-sym", "int3-g32", "int2-g32", "nf4-g32", "fp8")


class Format:
    """A group's range, and the nearest values in it."""

    def __init__(self, name):
        element, *more = name.split("-")
        self.bits, self.element = INT.get(element), element
        self.symmetric = "sym" in more or (element in ("int8", "nf4", "fp8") and "asym" not in more)
        self.group = 32 if "g32" in more else "row" if "channel" in more else "tensor"

    def parts(self, w):
        """Slices of the groups of a matrix."""
        if self.group == "tensor":
            return [np.s_[:, :]]
        width = w.shape[1] if self.group == "row" else self.group
        return [np.s_[i : i + 1, j : j + width] for i in range(w.shape[0]) for j in range(0, w.shape[1], width)]

    def range(self, w, shrink=1.0):
        low, high = min(w.min(), 0.0), max(w.max(), 0.0)
        low, high = (float(np.float32(x) * np.float32(shrink)) for x in (low, high))
        largest = max(high, -low)
        if self.element == "nf4":
            scale = largest
        elif self.element == "fp8":
            scale = largest / 448
        elif self.symmetric:
            scale = largest / (2 ** (self.bits - 1) - 1)
        else:
            scale = (high - low) / (2**self.bits - 1)
        scale = float(np.float16(np.float32(scale)) if self.group == 32 else np.float32(scale))
        return scale, 0 if self.symmetric else round(-low / scale)

    def nearest(self, w, scale, zero):
        if self.bits is None:
            levels = scale * (NF4 if self.element == "nf4" else E4M3)
            return levels[np.abs(w[..., None] - levels).argmin(-1)]
        if self.symmetric:
            last = 2 ** (self.bits - 1) - 1
            return scale * np.clip(np.round(w / scale), -last, last)
        return scale * (np.clip(np.round(w / scale) + zero, 0, 2**self.bits - 1) - zero)

    def rounded(self, w, shrinks=(1.0,), weigh=None):
        """Each group in the range of least error: in squares, or by `weigh(group's slice, differences)`."""
        weigh = weigh or (lambda part, d: (d**2).sum())
        out = np.empty_like(w)
        for part in self.parts(w):
            tries = [self.nearest(w[part], *self.range(w[part], shrink)) for shrink in shrinks]
            out[part] = min(tries, key=lambda q: weigh(part, q - w[part]))
        return out


def damped(h):
    return h + DAMPING * np.diag(h).mean() * np.eye(len(h))


def gptq(w, h, fmt, act_order=False):
    """Equations 2 and 3 of arXiv:2210.17323, with the inverse of the Hessian of the inputs that are left."""
    order = np.argsort(-np.diag(h), kind="stable") if act_order else np.arange(COLS)
    h, now, out = damped(h)[order][:, order], w[:, order].copy(), np.empty_like(w)
    ranges = {}
    for row in range(ROWS):
        for i in range(0, COLS, 32):
            group = {"tensor": w, "row": w[row], 32: w[row, i : i + 32]}[fmt.group]
            ranges[row, i // 32] = fmt.range(group)
    for i, column in enumerate(order):
        inverse = np.linalg.inv(h[i:, i:])
        for row in range(ROWS):
            if fmt.group == 32 and not act_order and i % 32 == 0:
                ranges[row, i // 32] = fmt.range(now[row, i : i + 32])
            out[row, column] = fmt.nearest(now[row, i : i + 1], *ranges[row, column // 32])[0]
        error = (now[:, i] - out[:, column]) / inverse[0, 0]
        now[:, i:] -= np.outer(error, inverse[0])
    return out


def awq(ws, x, fmt, clip):
    """Section 3.2 of arXiv:2306.00978 on the outputs themselves."""
    mean, best = np.abs(x).mean(0), None
    for step in range(20):
        scales = np.maximum(mean ** (step / 20), 1e-4)
        scales = scales / np.sqrt(scales.max() * scales.min())
        error = sum(((x @ (fmt.rounded(w * scales) / scales - w).T) ** 2).sum() for w in ws)
        if best is None or error < best[0]:
            best = error, step / 20, scales
    _, alpha, scales = best
    outputs = lambda part, d: ((x[:, part[1]] @ (d / scales[part[1]]).T) ** 2).sum()  # noqa: E731
    shrinks = [1 - 0.05 * i for i in range(11)] if clip else [1.0]
    return alpha, scales, [fmt.rounded(w * scales, shrinks, outputs) for w in ws]


def smooth(ws, x, alpha):
    """Equation 4 of arXiv:2211.10438."""
    return np.abs(x).max(0) ** alpha / np.max([np.abs(w).max(0) for w in ws], 0) ** (1 - alpha)


def smallest(scores, part):
    """A mask of the scores that stay."""
    keep = np.ones(scores.size, bool)
    keep[np.argsort(scores.ravel(), kind="stable")[: int(scores.size * part)]] = False
    return keep.reshape(scores.shape)


def patterned(scores, stay, of):
    groups = scores.reshape(-1, of)
    return np.stack([smallest(group, 1 - stay / of) for group in groups]).reshape(scores.shape)


def sparsegpt(w, h, part=None, pattern=None):
    """Algorithm 1 of arXiv:2301.00774, with the inverse of the Hessian of the inputs that are left."""
    h, w, keep = damped(h), w.copy(), np.ones_like(w, bool)
    inverses = [np.linalg.inv(h[i:, i:]) for i in range(COLS)]
    corner = np.array([inverse[0, 0] for inverse in inverses])
    for i in range(COLS):
        if part is not None and i % BLOCK == 0:
            keep[:, i : i + BLOCK] = smallest(w[:, i : i + BLOCK] ** 2 / corner[i : i + BLOCK], part)
        if pattern is not None and i % pattern[1] == 0:
            columns = np.s_[i : i + pattern[1]]
            keep[:, columns] = patterned(w[:, columns] ** 2 / corner[columns], *pattern)
        error = np.where(keep[:, i], 0.0, w[:, i]) / corner[i]
        w[:, i:] -= np.outer(error, inverses[i][0])
        w[~keep[:, i], i] = 0.0
    return np.where(keep, w, 0.0)


def low_rank(w, rank, root):
    u, s, vt = np.linalg.svd(w @ root)
    return (u[:, :rank] * s[:rank]) @ vt[:rank] @ np.linalg.inv(root)


def methods(save, out_dir):
    rng = np.random.default_rng(21)
    single = lambda x: x.astype(np.float32).astype(np.float64)  # noqa: E731
    # Inputs of unlike size that hang together, as in a network; a few weights are large.
    mix = rng.normal(size=(COLS, COLS)) * 0.15 + np.eye(COLS)
    x = single(rng.normal(size=(SAMPLES, COLS)) @ mix * np.exp(rng.normal(size=COLS)))
    w = [single(rng.normal(size=(ROWS, COLS)) * np.exp(0.4 * rng.normal(size=(ROWS, COLS))) * 0.1) for _ in range(2)]
    h = x.T @ x
    tensors = {"inputs": x, "weight.0": w[0], "weight.1": w[1]}
    for name in FORMATS:
        fmt = Format(name)
        tensors[f"nearest.{name}"] = fmt.rounded(w[0])
        tensors[f"gptq.{name}"] = gptq(w[0], h, fmt)
    for name in ("int4-g32", "int3-g32", "int8-channel", "nf4-g32"):
        tensors[f"mse.{name}"] = Format(name).rounded(w[0], [np.float32(1) - np.float32(0.02) * np.float32(i) for i in range(41)])
        tensors[f"ordered.{name}"] = gptq(w[0], h, Format(name), act_order=True)
    alphas = {}
    for name, clip in (("int4-g32", False), ("int3-g32", True), ("int4-g32-sym", True)):
        alphas[name], tensors[f"awq.{name}.scales"], (a, b) = awq(w, x, Format(name), clip)
        tensors[f"awq.{name}.0"], tensors[f"awq.{name}.1"] = a, b
    for alpha in (0.5, 0.75):
        tensors[f"smooth.{alpha}"] = smooth(w, x, alpha)
    scores = np.abs(w[0]) * np.linalg.norm(x, axis=0)
    both = smallest(np.abs(np.stack(w)), 0.3)
    masks = {
        "magnitude.0.5": smallest(np.abs(w[0]), 0.5),
        "magnitude.2:4": patterned(np.abs(w[0]), 2, 4),
        "global.0.3.0": both[0],
        "global.0.3.1": both[1],
        "wanda.0.5": np.stack([smallest(row, 0.5) for row in scores]),
        "wanda.2:4": patterned(scores, 2, 4),
        "wanda.4:8": patterned(scores, 4, 8),
    }
    tensors.update((name, keep.astype(np.int32)) for name, keep in masks.items())
    tensors["sparsegpt.0.5"] = sparsegpt(w[0], h, part=0.5)
    for stay, of in ((2, 4), (4, 8)):
        tensors[f"sparsegpt.{stay}:{of}"] = sparsegpt(w[0], h, pattern=(stay, of))
    for rank in (1, 4):
        tensors[f"low_rank.{rank}"] = low_rank(w[0], rank, np.eye(COLS))
        tensors[f"low_rank_for.{rank}"] = low_rank(w[0], rank, np.linalg.cholesky(damped(h)))
    # Upright, the outputs are more than the inputs.
    upright = np.linalg.cholesky(damped(x[:, :ROWS].T @ x[:, :ROWS]))
    tensors["low_rank_for.upright"] = low_rank(w[0].T, 4, upright)
    tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in tensors.items()}
    save(out_dir / "compress.safetensors", tensors, seed=21, damping=DAMPING, awq=alphas)


QUANTIZED = ("BF16", "Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1")
READ = (*QUANTIZED, "Q4_K", "Q6_K")


def blocks(save, out_dir):
    """`T.bytes`: what `gguf` makes of `values`; `T.given` and `T.values`: random blocks and what `gguf` reads from them."""
    rng = np.random.default_rng(22)
    values = rng.normal(size=(24, 256)) * np.exp(3 * rng.normal(size=(24, 1)))
    values[0, :32], values[1, 32:64], values[2, 5:90] = 0.0, -0.75, np.round(values[2, 5:90])
    values[3] = np.arange(256) / 8 - 9
    values[4] = np.where(rng.random(256) < 0.1, values[4], 0.0)
    values = values.astype(np.float32)
    tensors = {"values": values}
    kinds = gguf.GGMLQuantizationType
    for name in QUANTIZED:
        tensors[f"{name}.bytes"] = gguf.quants.quantize(values, kinds[name])
    for name in READ:
        block, size = gguf.GGML_QUANT_SIZES[kinds[name]]
        count = 4 if block == 256 else 12 if block == 32 else 64
        given = rng.integers(0, 256, size=(count, size), dtype=np.uint8)
        # Where f16 or bfloat16 stand: exponents that are finite, of both signs.
        halves = {"Q4_K": (0, 2), "Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2)}.get(name, (0,))
        for at in halves:
            given[:, at + 1] = given[:, at + 1] & 0x83 | 0x2C
        tensors[f"{name}.given"] = given
        tensors[f"{name}.values"] = gguf.quants.dequantize(given.reshape(1, -1), kinds[name]).ravel()
    tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in tensors.items()}
    save(out_dir / "gguf-blocks.safetensors", tensors, seed=22)


def fixture(save, out_dir):
    methods(save, out_dir)
    blocks(save, out_dir)
