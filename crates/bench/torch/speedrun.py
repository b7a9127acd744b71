"""nanoGPT's CPU recipe (its README, "I only have a macbook") in PyTorch, from text to the loss of the held-out tenth.

    python speedrun.py '{"data": "tinyshakespeare.txt", "model": {...}, "threads": 2, "seed": 1337, "compiled": false, "steps": 2000}'

Characters; the first 90 % train, the rest is held out. 2000 steps of 12 x 64 tokens, evaluations of 20 batches per split every 250 steps.
The last line of standard output is JSON: the loss over the whole held-out text, in windows of the context, and how long that took,
which nanoGPT does not do and which is not counted.
"""

import json
import math
import sys
import time

import numpy
import torch

BATCH, EVAL_EVERY, EVAL_BATCHES = 12, 250, 20
LR, MIN_LR, WARMUP, CLIP = 1e-3, 1e-4, 100, 1.0


def learning_rate(step, steps):
    if step < WARMUP:
        return LR * (step + 1) / (WARMUP + 1)
    progress = (step - WARMUP) / max(1, steps - WARMUP)
    return MIN_LR + 0.5 * (1 + math.cos(math.pi * progress)) * (LR - MIN_LR)


def get_batch(split, context):
    starts = torch.randint(len(split) - context, (BATCH,))
    inputs = torch.stack([split[i : i + context] for i in starts])
    targets = torch.stack([split[i + 1 : i + 1 + context] for i in starts])
    return inputs, targets


@torch.no_grad()
def estimate(loss, split, context):
    return sum(loss(*get_batch(split, context)).item() for _ in range(EVAL_BATCHES)) / EVAL_BATCHES


@torch.no_grad()
def whole(loss, split, context):
    """Mean loss of every token of the split, in windows that do not overlap."""
    windows = (len(split) - 1) // context
    inputs = split[: windows * context].view(windows, context)
    targets = split[1 : windows * context + 1].view(windows, context)
    total = sum(loss(x, y).item() * x.numel() for x, y in zip(inputs.split(64), targets.split(64)))
    rest = len(split) - 1 - windows * context
    if rest > 0:
        total += loss(split[-rest - 1 : -1].view(1, -1), split[-rest:].view(1, -1)).item() * rest
    return total / (len(split) - 1)


def main():
    from models import Decoder, adamw

    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    text = open(job["data"], encoding="utf-8").read()
    ids = {c: i for i, c in enumerate(sorted(set(text)))}
    tokens = torch.from_numpy(numpy.array([ids[c] for c in text], dtype=numpy.int64))
    train, val = tokens[: int(0.9 * len(tokens))], tokens[int(0.9 * len(tokens)) :]
    config = {**job["model"], "vocab_size": len(ids)}
    context = config["context"]
    model = Decoder(config)
    loss = torch.compile(model) if job["compiled"] else model
    optimizer = adamw(model, LR, (0.9, 0.99), 0.1)
    for step in range(job["steps"] + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, job["steps"])
        if step % EVAL_EVERY == 0:
            model.eval()
            losses = [estimate(loss, split, context) for split in (train, val)]
            model.train()
            print(f"step {step}: train {losses[0]:.4f}, val {losses[1]:.4f}", file=sys.stderr, flush=True)
        if step == job["steps"]:
            break
        loss(*get_batch(train, context)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    start = time.perf_counter()
    val_loss = whole(model, val, context)
    seconds = time.perf_counter() - start
    software = f"PyTorch {torch.__version__}"
    print(json.dumps({"val_loss": val_loss, "uncounted_seconds": seconds, "val_tokens": len(val), "software": software}))


if __name__ == "__main__":
    main()
