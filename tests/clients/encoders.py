#!/usr/bin/env python3
"""What transformers makes of folders of encoders and classifiers.

    python encoders.py REQUEST.json OUT.safetensors

REQUEST has `models`, folders by name; `ids` [B, T] and `types`, or `texts` and `pairs` to divide into tokens by each folder's tokenizer. The answer, as JSON, has of each model its `class`, what
was `missing` in the file or `unexpected` there, and the `tokens` and `types` of each text and pair. OUT gets `NAME` of each model: logits or hidden states of each row, or of texts and pairs; then, too,
`NAME.embedding`, the means of hidden states at length 1. `same`, if it is there, names two models whose parameters are compared.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file


def main(request: dict, out: Path) -> dict:
    torch.set_num_threads(2)
    answer, tensors, states = {}, {}, {}
    for name, folder in request["models"].items():
        kind = json.loads((Path(folder) / "config.json").read_text())["architectures"][0]
        model, report = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
        model, states[name] = model.eval(), model.state_dict()
        answer[name] = {"class": kind, "missing": sorted(report["missing_keys"]), "unexpected": sorted(report["unexpected_keys"])}
        if "texts" in request:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            given = [tokenizer(text) for text in request["texts"]] + [tokenizer(*pair) for pair in request["pairs"]]
            answer[name] |= {"tokens": [row["input_ids"] for row in given], "types": [row["token_type_ids"] for row in given]}
            batch = tokenizer.pad(given, return_tensors="pt")
        else:
            batch = {"input_ids": torch.tensor(request["ids"])}
            if model.config.to_dict().get("type_vocab_size", 0) > 1:
                batch["token_type_ids"] = torch.tensor(request["types"])
        with torch.no_grad():
            output = model(**batch)[0]
        tensors[name] = output.contiguous()
        if "texts" in request:
            mask = batch["attention_mask"][..., None]
            mean = (output * mask).sum(1) / mask.sum(1)
            tensors[f"{name}.embedding"] = torch.nn.functional.normalize(mean)
    if "same" in request:
        a, b = (states[name] for name in request["same"])
        answer["same"] = a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    save_file(tensors, out)
    return answer


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: encoders.py REQUEST.json OUT.safetensors")
    request, out = map(Path, sys.argv[1:])
    json.dump(main(json.loads(request.read_text()), out), sys.stdout)
    print()
