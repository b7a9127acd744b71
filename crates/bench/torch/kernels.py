"""PyTorch's side of `bench kernels`: the operations of src/kernels.rs as a training step calls them."""

import time

import torch
import torch.nn.functional as F

from models import adamw_of


def leaf(*shape):
    return (torch.randn(*shape) * 0.5).requires_grad_()


def backward(forward, *leaves, compiled):
    """Forward and backward from a gradient of ones; gradients are new each time, as after zero_grad(set_to_none=True)."""
    run = torch.compile(forward) if compiled else forward

    def call():
        for x in leaves:
            x.grad = None
        y = run(*leaves)
        y.backward(torch.ones_like(y))

    return call


def sgemm(c, compiled):
    a, b = torch.randn(c["m"], c["k"]), torch.randn(c["k"], c["n"])
    return lambda: torch.mm(a, b)


def linear(c, compiled):
    leaves = leaf(c["rows"], c["d_in"]), leaf(c["d_out"], c["d_in"]), leaf(c["d_out"])
    return backward(F.linear, *leaves, compiled=compiled)


def attention(c, compiled):
    b, t, h, k, e = (c[name] for name in ("batch", "tokens", "n_heads", "n_kv_heads", "head_dim"))

    def forward(qkv):
        q, key, v = (x.view(b, t, -1, e).transpose(1, 2) for x in qkv.split([h * e, k * e, k * e], dim=2))
        y = F.scaled_dot_product_attention(q, key, v, is_causal=True, enable_gqa=h != k)
        return y.transpose(1, 2).reshape(b, t, h * e)

    return backward(forward, leaf(b, t, (h + 2 * k) * e), compiled=compiled)


def layer_norm(c, compiled):
    forward = lambda x, weight, bias: F.layer_norm(x, (c["d"],), weight, bias, 1e-5)
    return backward(forward, leaf(c["rows"], c["d"]), leaf(c["d"]), leaf(c["d"]), compiled=compiled)


def rms_norm(c, compiled):
    forward = lambda x, weight: F.rms_norm(x, (c["d"],), weight, 1e-5)
    return backward(forward, leaf(c["rows"], c["d"]), leaf(c["d"]), compiled=compiled)


def gelu(c, compiled):
    return backward(lambda x: F.gelu(x, approximate="tanh"), leaf(c["rows"], c["d"]), compiled=compiled)


def swiglu(c, compiled):
    def forward(x):
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    return backward(forward, leaf(c["rows"], 2 * c["d"]), compiled=compiled)


def embedding(c, compiled):
    ids = torch.randint(c["vocab"], (c["rows"],))
    return backward(lambda table: F.embedding(ids, table), leaf(c["vocab"], c["d"]), compiled=compiled)


def linear_cross_entropy(c, compiled):
    targets = torch.randint(c["vocab"], (c["rows"],))
    forward = lambda x, weight: F.cross_entropy(F.linear(x, weight), targets)
    return backward(forward, leaf(c["rows"], c["d"]), leaf(c["vocab"], c["d"]), compiled=compiled)


def adam_w(c, compiled):
    parameter = leaf(c["n"])
    parameter.grad = torch.randn(c["n"])
    return adamw_of([{"params": [parameter], "weight_decay": 0.1}], lr=1e-4, betas=(0.9, 0.95)).step


def optimizer(c, foreach):
    """The form of the contender, where PyTorch has it; hyperparameters are Firebox's defaults."""
    parameters = [leaf(c["d"], c["d"]) for _ in range(c["count"])]
    for p in parameters:
        p.grad = torch.randn(c["d"], c["d"])
    form = {"foreach": True} if foreach else {"fused": True}
    makers = {
        "adamw": lambda: torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, **form),
        "adam": lambda: torch.optim.Adam(parameters, lr=1e-4, **form),
        "sgd": lambda: torch.optim.SGD(parameters, lr=1e-4, momentum=0.9, **form),
        "adafactor": lambda: torch.optim.Adafactor(parameters, lr=1e-4, foreach=True),
        "muon": lambda: torch.optim.Muon(parameters, lr=1e-4, weight_decay=0.1),
    }
    return makers[c["algorithm"]]().step


def copy(c, compiled):
    source, target = torch.full((c["n"],), 0.5), torch.zeros(c["n"])
    return lambda: target.copy_(source)


MAKERS = {
    "sgemm": sgemm,
    "linear": linear,
    "attention": attention,
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "gelu": gelu,
    "swi_glu": swiglu,
    "embedding": embedding,
    "linear_cross_entropy": linear_cross_entropy,
    "adam_w": adam_w,
    "optimizer": optimizer,
    "copy": copy,
}


class Kernels:
    """Makes a case, and calls it once, when it is first asked for; drops the one before."""

    def __init__(self, cases, contender):
        self.cases, self.compiled = cases, contender == "torch-compile"
        self.foreach = contender == "torch-foreach"
        self.number, self.call = None, None

    def go(self, case, n):
        if case != self.number:
            self.call = None
            torch._dynamo.reset()
            name, shape = next(iter(self.cases[case].items()))
            how = self.foreach if name == "optimizer" else self.compiled
            self.number, self.call = case, MAKERS[name](shape, how)
            self.call()
        start = time.perf_counter()
        for _ in range(n):
            self.call()
        return {"seconds": time.perf_counter() - start, "value": 0.0}
