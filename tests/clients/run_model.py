#!/usr/bin/env python3
"""Runs an exported model as its users do, and prints what it does as JSON.

    python run_model.py hf|onnx|gguf|llama PATH REQUEST.json

REQUEST has `texts` to divide into tokens, `ids` to continue, and how many tokens to write, `new`. The answer has the
`tokens` of each text, the `logits` at each of the ids, and the ids that are `greedy` written after them. `gguf` only reads
the file, with PyPI's package: its `metadata`, and of each of its `tensors` shape, type and sums.
"""

import json
import sys
from pathlib import Path

import numpy as np


def greedy(ids: list[int], new: int, step) -> list[int]:
    """`step(ids)` gives the logits after new ids; the first call gets them all."""
    out, fresh = [], ids
    for _ in range(new):
        fresh = [int(np.argmax(step(fresh)))]
        out += fresh
    return out


def hf(path: Path, request: dict) -> dict:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    ids = torch.tensor([request["ids"]])
    with torch.no_grad():
        logits = model(ids).logits[0].float()
        written = model.generate(ids, max_new_tokens=request["new"], min_new_tokens=request["new"], do_sample=False)
    return {
        "class": type(model).__name__,
        "tokens": [tokenizer(text)["input_ids"] for text in request["texts"]],
        "texts": [tokenizer.decode(tokenizer(text)["input_ids"]) for text in request["texts"]],
        "eos": tokenizer.eos_token_id,
        "dtype": str(next(model.parameters()).dtype),
        "logits": logits.tolist(),
        "greedy": written[0, len(request["ids"]) :].tolist(),
    }


def onnx(path: Path, request: dict) -> dict:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path / "model.onnx", options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    config = json.loads((path / "config.json").read_text())
    layers = sum(name.endswith(".key") for name in names)
    shape = next(value.shape for value in session.get_inputs() if value.name == "past_key_values.0.key")

    def empty(rows: int) -> list:
        return [np.zeros((rows, shape[1], 0, shape[3]), np.float32)] * (2 * layers)

    def call(ids: list[list[int]], mask: list[list[int]], cache: list) -> tuple[np.ndarray, list]:
        ids, mask = np.array(ids, np.int64), np.array(mask, np.int64)
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        for i in range(layers):
            feed[f"past_key_values.{i}.key"], feed[f"past_key_values.{i}.value"] = cache[2 * i : 2 * i + 2]
        logits, *cache = session.run(names, feed)
        return logits, cache

    class State:
        seen, cache = 0, empty(1)

    def step(ids: list[int]) -> np.ndarray:
        State.seen += len(ids)
        logits, State.cache = call([ids], [[1] * State.seen], State.cache)
        return logits[0]

    ids = request["ids"]
    # Half of the ids at once, two more, then one by one.
    half = len(ids) // 2
    parts = [ids[:half], ids[half : half + 2], *[[id] for id in ids[half + 2 :]]]
    logits = np.concatenate([step(part) for part in parts])
    written = greedy([], request["new"], lambda fresh: step(fresh)[-1] if fresh else logits[-1])
    # Two rows, the second of which is shorter, with padding before it.
    short = ids[:-3]
    padded, cache = call([ids[:-1], [0, 0] + short], [[1] * (len(ids) - 1), [0, 0] + [1] * len(short)], empty(2))
    after, _ = call([[ids[-1]], [ids[-3]]], [[1] * len(ids), [0, 0] + [1] * (len(short) + 1)], cache)
    return {
        "model_type": config["model_type"],
        "names": [value.name for value in session.get_inputs()] + names,
        "logits": logits.tolist(),
        "padded": np.concatenate([padded[1, 2:], after[1]]).tolist(),
        "greedy": written,
    }


def gguf(path: Path, _: dict) -> dict:
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(path)
    tensors = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
        sums = [values.sum(), np.abs(values).sum(), (values.ravel() * np.arange(values.size)).sum()]
        tensors[tensor.name] = {"shape": list(values.shape), "type": tensor.tensor_type.name, "sums": sums}
    metadata = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return {"metadata": metadata, "tensors": tensors}


def llama(path: Path, request: dict) -> dict:
    from llama_cpp import Llama

    floats = 0  # GGML_TYPE_F32, for the cache
    model = Llama(str(path), n_ctx=request["context"], n_batch=request["context"], n_threads=1, logits_all=True, type_k=floats,
                  type_v=floats, flash_attn=False, verbose=False)  # fmt: skip
    ids = request["ids"]
    model.eval(ids)
    logits = np.array(model.scores[: len(ids)])

    def step(fresh: list[int]) -> np.ndarray:
        if fresh:
            model.eval(fresh)
        return model.scores[model.n_tokens - 1]

    written = greedy([], request["new"], step)
    return {
        "tokens": [model.tokenize(text.encode(), add_bos=True, special=False) for text in request["texts"]],
        "texts": [
            model.detokenize(model.tokenize(text.encode(), add_bos=False, special=False)).decode()
            for text in request["texts"]
        ],
        "eos": model.token_eos(),
        "logits": logits.tolist(),
        "greedy": written,
    }


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit("usage: run_model.py hf|onnx|gguf|llama PATH REQUEST.json")
    run = {"hf": hf, "onnx": onnx, "gguf": gguf, "llama": llama}[sys.argv[1]]
    json.dump(run(Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text())), sys.stdout)
    print()
