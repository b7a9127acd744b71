"""Learning rates of the schedules that PyTorch has by itself, at full double precision."""

import torch
from torch.optim import lr_scheduler

STEPS, WARMUP, DECAY, PEAK = 50, 7, 20, 3e-3


def run(make, calls=STEPS + 1):
    """The rates of the first `calls` steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    schedule = make(optimizer)
    rates = []
    for _ in range(calls):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def wsd_exponential(optimizer):
    """Warmup from a tenth, as transformers' wsd with min_lr_ratio = 0.1; the peak; an exponential decay to a tenth."""
    parts = [
        lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=WARMUP),
        lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0),
        lr_scheduler.ExponentialLR(optimizer, gamma=0.1 ** (1 / DECAY)),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[WARMUP, STEPS - DECAY])


def schedules():
    """By name; `one_cycle` has no step after its last, so one rate less than the others."""

    def one_cycle(optimizer, **given):
        return lr_scheduler.OneCycleLR(optimizer, max_lr=PEAK, total_steps=STEPS, cycle_momentum=False, **given)

    return {
        "cosine_annealing": run(lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=STEPS, eta_min=0.1 * PEAK)),
        "wsd_exponential": run(wsd_exponential),
        "one_cycle": run(one_cycle, STEPS),
        "one_cycle_linear": run(
            lambda o: one_cycle(o, pct_start=0.45, anneal_strategy="linear", div_factor=10, final_div_factor=100), STEPS
        ),
    }
