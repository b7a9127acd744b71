"""Twenty steps of every optimizer by an independent implementation, in float64: torch.optim, the authors' packages, pytorch-optimizer, or,
where none of them has the paper's algorithm, the paper's formula in numpy."""

import types

import lion_pytorch
import numpy as np
import pytorch_optimizer
import schedulefree
import torch
import torch.optim._muon as torch_muon
from pytorch_optimizer.optimizer import soap as pytorch_soap

# Names say what a parameter is: matrices are [in, out], as Firebox stores them.
SHAPES = {"wide.weight": (6, 11), "tall.weight": (11, 6), "tall.bias": (13,), "embed.weight": (9, 4)}
STEPS = 20
KEPT = (1, 2, 10, 20)
LR = [1e-2 * (1 + step % 3) / 2 for step in range(STEPS)]

BETAS = {"beta1": 0.9, "beta2": 0.99}
ADAM = {"betas": (0.9, 0.99)}


class Float64Torch(types.SimpleNamespace):
    """torch, but for the types in which Muon iterates and SOAP decomposes: float64 instead of bfloat16 and float32."""

    bfloat16 = float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


class Muon:
    """torch.optim.Muon for matrices, which PyTorch stores as [out, in]; AdamW for the rest."""

    def __init__(self, params, scale):
        names = list(SHAPES)
        self.mine = [p for name, p in zip(names, params) if p.dim() == 2 and name != "embed.weight"]
        self.transposed = [torch.nn.Parameter(p.detach().T.contiguous()) for p in self.mine]
        rest = [p for p in params if not any(p is q for q in self.mine)]
        self.muon = torch.optim.Muon(
            self.transposed, lr=1.0, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn=scale, eps=1e-7
        )
        self.adamw = torch.optim.AdamW(rest, lr=1.0, weight_decay=0.1, eps=1e-8, **ADAM)
        self.param_groups = self.muon.param_groups + self.adamw.param_groups

    def step(self):
        for p, t in zip(self.mine, self.transposed):
            t.grad = p.grad.T.contiguous()
        torch_muon.torch = Float64Torch()
        self.muon.step()
        torch_muon.torch = torch
        self.adamw.step()
        with torch.no_grad():
            for p, t in zip(self.mine, self.transposed):
                p.copy_(t.T)


class Formula:
    """A paper's formula, for parameters and gradients as numpy arrays."""

    def __init__(self, params, update):
        self.params, self.update = params, update
        self.states = [{} for _ in params]
        self.t = 0
        self.param_groups = [{"lr": None}]

    def step(self):
        self.t += 1
        lr = self.param_groups[0]["lr"]
        for name, p, state in zip(SHAPES, self.params, self.states):
            new = self.update(name, p.detach().numpy().copy(), p.grad.numpy(), state, lr, self.t)
            p.data = torch.from_numpy(new)


def lamb(name, x, g, s, lr, t, b1=0.9, b2=0.99, eps=1e-6, decay=0.01):
    """You et al., arXiv:1904.00962, algorithm 2, with phi the identity."""
    s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
    s["v"] = b2 * s.get("v", 0) + (1 - b2) * g * g
    r = s["m"] / (1 - b1**t) / (np.sqrt(s["v"] / (1 - b2**t)) + eps)
    u = r + decay * x
    return x - lr * np.linalg.norm(x) / np.linalg.norm(u) * u


def adam_mini(name, x, g, s, lr, t, b1=0.9, b2=0.99, eps=1e-8, decay=0.1):
    """Zhang et al., arXiv:2406.16793, algorithm 1; blocks are rows of the embedding, columns of [in, out], whole vectors."""
    squares = g * g
    mean = squares.mean() if g.ndim == 1 else squares.mean(axis=1 if name == "embed.weight" else 0, keepdims=True)
    s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
    s["v"] = b2 * s.get("v", 0) + (1 - b2) * mean
    return x - lr * decay * x - lr * (s["m"] / (1 - b1**t)) / (np.sqrt(s["v"] / (1 - b2**t)) + eps)


SOPHIA_EVERY, SOPHIA_BATCH = 3, 32


def sophia(name, x, g, s, lr, t, b1=0.96, b2=0.99, gamma=0.05, decay=0.1):
    """Liu et al., arXiv:2305.14342, algorithm 3. The estimate of every third step is made from that step's own gradient."""
    if (t - 1) % SOPHIA_EVERY == 0:
        s["h"] = b2 * s.get("h", 0) + (1 - b2) * SOPHIA_BATCH * g * g
    s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
    return x - lr * decay * x - lr * np.clip(s["m"] / np.maximum(gamma * s["h"], 1e-15), -1, 1)


def schedule_free(params):
    optimizer = schedulefree.AdamWScheduleFree(params, lr=1.0, weight_decay=0.1, eps=1e-8, foreach=False, **ADAM)
    optimizer.train()
    return optimizer


class Soap(pytorch_optimizer.SOAP):
    """SOAP, but for the type of its QR decomposition: float64 instead of float32."""

    def get_orthogonal_matrix_qr(self, *args, **kwargs):
        pytorch_soap.torch = Float64Torch()
        found = super().get_orthogonal_matrix_qr(*args, **kwargs)
        pytorch_soap.torch = torch
        return found


def soap(params, **more):
    return Soap(params, lr=1.0, betas=(0.9, 0.99), weight_decay=0.1, eps=1e-8, **more)


# What Firebox is given, and the optimizer to compare with.
CASES = [
    ({"kind": "adamw", "weight_decay": 0.1, **BETAS}, lambda p: torch.optim.AdamW(p, weight_decay=0.1, eps=1e-8, **ADAM)),
    ({"kind": "adam", "weight_decay": 0.05, **BETAS}, lambda p: torch.optim.Adam(p, weight_decay=0.05, eps=1e-8, **ADAM)),
    ({"kind": "adam", **BETAS}, lambda p: torch.optim.Adam(p, eps=1e-8, **ADAM)),
    ({"kind": "sgd", "momentum": 0.0, "weight_decay": 0.1}, lambda p: torch.optim.SGD(p, lr=1.0, weight_decay=0.1)),
    (
        {"kind": "sgd", "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
        lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9, dampening=0.3, weight_decay=0.1),
    ),
    (
        {"kind": "sgd", "momentum": 0.9, "nesterov": True},
        lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9, nesterov=True),
    ),
    (
        {"kind": "adafactor", "weight_decay": 0.1},
        lambda p: torch.optim.Adafactor(p, lr=1.0, weight_decay=0.1, eps=(float(np.finfo(np.float32).eps), 1e-3)),
    ),
    ({"kind": "lamb", **BETAS}, lambda p: Formula(p, lamb)),
    (
        {"kind": "lion", "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.99},
        lambda p: lion_pytorch.Lion(p, lr=1.0, weight_decay=0.1, betas=(0.9, 0.99), decoupled_weight_decay=False),
    ),
    ({"kind": "muon", **BETAS}, lambda p: Muon(p, "match_rms_adamw")),
    ({"kind": "muon", "scale": "original", **BETAS}, lambda p: Muon(p, "original")),
    ({"kind": "sophia", "every": SOPHIA_EVERY}, lambda p: Formula(p, sophia)),
    ({"kind": "schedule_free", "weight_decay": 0.1, **BETAS}, schedule_free),
    (
        {"kind": "ademamix", "beta3": 0.999, "warmup_steps": 12, **BETAS},
        lambda p: pytorch_optimizer.AdEMAMix(
            p, lr=1.0, betas=(0.9, 0.99, 0.999), alpha=5.0, t_alpha_beta3=12, weight_decay=0.1, weight_decouple=True, eps=1e-8, foreach=False
        ),
    ),
    ({"kind": "adam_mini", **BETAS}, lambda p: Formula(p, adam_mini)),
    # The sides that are turned have distinct eigenvalues from the first step on, so that their bases are unique but for signs.
    (
        {"kind": "soap", "max_precond_dim": 8, "precondition_frequency": 3, "weight_decay": 0.1, **BETAS},
        lambda p: soap(p, max_precondition_dim=8, precondition_frequency=3),
    ),
    # Those of the wider sides are not: the first bases are kept.
    ({"kind": "soap", "weight_decay": 0.1, **BETAS}, lambda p: soap(p)),
]


def fixture(save, out_dir):
    """`start.P`, `g.P.S` (the gradient), and `C.P.S`: parameter P of case C after step S; `C.P.left_basis`, `C.P.right_basis`: eigenvectors as rows; `average.P` of the schedule-free case at its end."""
    generator = torch.Generator().manual_seed(11)
    start = [torch.randn(shape, generator=generator) for shape in SHAPES.values()]
    tensors = {f"start.{name}": p for name, p in zip(SHAPES, start)}
    for step in range(1, STEPS + 1):
        for name, shape in SHAPES.items():
            scale = 10.0 ** torch.randint(-3, 2, shape, generator=generator).float()
            # A mean that is not zero, so that momentum has something to remember.
            tensors[f"g.{name}.{step}"] = (torch.randn(shape, generator=generator) + 0.3) * scale
    cases = [given for given, _ in CASES]
    for c, (_, make) in enumerate(CASES):
        params = [torch.nn.Parameter(p.double()) for p in start]
        optimizer = make(params)
        for step, lr in enumerate(LR, start=1):
            for group in optimizer.param_groups:
                group["lr"] = lr
            for name, p in zip(SHAPES, params):
                p.grad = tensors[f"g.{name}.{step}"].double()
            optimizer.step()
            if step == 1 and cases[c] == {"kind": "soap", "weight_decay": 0.1, **BETAS}:
                for name, p in zip(SHAPES, params):
                    for side, basis in zip(("left", "right"), optimizer.state[p]["Q"] if p.dim() == 2 else ()):
                        tensors[f"{c}.{name}.{side}_basis"] = basis.T.clone()
            if step in KEPT:
                for name, p in zip(SHAPES, params):
                    tensors[f"{c}.{name}.{step}"] = p.detach().clone()
        if hasattr(optimizer, "eval"):
            optimizer.eval()
            for name, p in zip(SHAPES, params):
                tensors[f"average.{name}"] = p.detach().clone()
    about = {"sophia_batch": SOPHIA_BATCH, "kept": KEPT, "lr": LR, "cases": cases}
    save(out_dir / "optimizers.safetensors", tensors, seed=11, **about)
