"""PyTorch's contenders: a child process of the benchmark that speaks its line protocol (src/protocol.rs).

    python worker.py '{"contender": "torch-eager", "threads": 2, "task": {"train": {...}}}'

It answers with a JSON line when it is ready, with one for each `go CASE N` on standard input, and with a last one after `quit`.
"""

import json
import sys
import time

import numpy
import torch


def say(message):
    print(json.dumps(message), flush=True)


def memory(key):
    """`VmHWM` (the peak) or `VmRSS` (now) of this process, bytes; 0 where the system has no /proc."""
    try:
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith(key + ":"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def tokens(seed, count, vocab):
    """The same numbers as `tokens` in src/protocol.rs: SplitMix64 of a counter."""
    with numpy.errstate(over="ignore"):
        z = numpy.arange(1, count + 1, dtype=numpy.uint64) + numpy.uint64(seed)
        z *= numpy.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
        z ^= z >> numpy.uint64(31)
    return torch.from_numpy((z % numpy.uint64(vocab)).astype(numpy.int64))


class Training:
    """Steps on one fixed batch."""

    def __init__(self, task, contender):
        from models import Decoder, adamw, of_transformers

        config = task["model"]
        torch.manual_seed(task["seed"])
        self.model = of_transformers(config) if task.get("transformers") else Decoder(config)
        self.params = sum(p.numel() for p in self.model.parameters())
        self.clip = task["clip"]
        self.optimizer = adamw(self.model, task["lr"], (task["beta1"], task["beta2"]), task["weight_decay"])
        rows = tokens(task["seed"], task["batch"] * (task["tokens"] + 1), config["vocab_size"])
        rows = rows.view(task["batch"], task["tokens"] + 1)
        self.inputs, self.targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        self.loss = torch.compile(self.model) if contender == "torch-compile" else self.model
        self.bf16 = contender == "torch-bf16"
        self.first_loss = self.step()
        for _ in range(task["warmup_steps"] - 1):
            self.step()

    def step(self):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss = self.loss(self.inputs, self.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def go(self, _case, steps):
        start = time.perf_counter()
        for _ in range(steps):
            loss = self.step()
        return {"seconds": time.perf_counter() - start, "value": loss}


def main():
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    before = memory("VmRSS")
    kind, task = next(iter(job["task"].items()))
    if kind == "train":
        runner = Training(task, job["contender"])
        ready = {"params": runner.params, "loss": runner.first_loss}
    elif kind == "kernels":
        from kernels import Kernels

        runner = Kernels(task, job["contender"])
        ready = {"params": 0, "loss": 0.0}
    else:
        sys.exit(f"worker.py knows no task `{kind}`")
    say({**ready, "rss_before_model_bytes": before, "software": f"PyTorch {torch.__version__}"})
    for line in sys.stdin:
        words = line.split()
        if words[:1] == ["quit"]:
            say({"peak_rss_bytes": memory("VmHWM")})
            return
        if words[:1] != ["go"]:
            sys.exit(f"worker.py knows no command `{line.strip()}`")
        say(runner.go(int(words[1]), int(words[2])))


if __name__ == "__main__":
    main()
