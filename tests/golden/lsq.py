"""Weights rounded to learned steps (LSQ, arXiv:1902.08153), as the paper's appendix A writes it in PyTorch: value, gradients, and where steps start."""

import torch

INPUTS, OUTPUTS = 64, 5


def grad_scale(x, scale):
    return (x - x * scale).detach() + x * scale


def round_pass(x):
    return (x.round() - x).detach() + x


def quantize(weight, step, largest, factor):
    """Symmetric codes; `weight` is [groups, rows, out], `step` [groups, 1, out]."""
    step = grad_scale(step, factor)
    return round_pass((weight / step).clamp(-largest, largest)) * step


def fixture(save, out_dir):
    torch.manual_seed(7)
    # Exact in float32, and steps in float16, in which those of groups are stored.
    exact = lambda *shape: torch.randn(*shape).float().double()
    weight, upstream = exact(INPUTS, OUTPUTS), exact(INPUTS, OUTPUTS)
    tensors = dict(weight=weight, upstream=upstream)
    for bits in (2, 3, 4, 8):
        for rows in (32, INPUTS):
            largest, groups = 2 ** (bits - 1) - 1, INPUTS // rows
            grouped = weight.reshape(groups, rows, OUTPUTS)
            start = 2 * grouped.abs().mean(1, keepdim=True) / largest**0.5
            step = (start * (0.5 + torch.rand(groups, 1, OUTPUTS))).half().double().requires_grad_()
            w = grouped.clone().requires_grad_()
            value = quantize(w, step, largest, 1 / (rows * largest) ** 0.5)
            value.backward(upstream.reshape(value.shape))
            name = f"{bits}.{0 if rows == INPUTS else rows}"
            tensors |= {
                f"{name}.start": start.flatten(), f"{name}.step": step.detach().flatten(), f"{name}.value": value.detach(),
                f"{name}.grad_weight": w.grad, f"{name}.grad_step": step.grad.flatten(),
            }  # fmt: skip
    save(out_dir / "lsq.safetensors", {name: tensor.flatten() for name, tensor in tensors.items()})

