#!/usr/bin/env python3
"""What PEFT makes of adapters beside a model of transformers.

    python adapters.py REQUEST.json OUT.safetensors

REQUEST has `models`, by name `base`, a folder of transformers, and `adapters`, one of PEFT; and `ids` [B, T]. The answer, as JSON, has of each what was `missing` in the adapters' file or `unexpected`
there. OUT gets the logits `NAME`, and `NAME.merged` after `merge_and_unload`.
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def main(request: dict, out: Path) -> dict:
    torch.set_num_threads(2)
    ids = torch.tensor(request["ids"])
    answer, tensors = {}, {}
    for name, folders in request["models"].items():
        base = AutoModelForCausalLM.from_pretrained(folders["base"], dtype=torch.float32)
        # By hand once more, which says what does not fit; the short way only warns.
        empty = get_peft_model(AutoModelForCausalLM.from_pretrained(folders["base"]), PeftConfig.from_pretrained(folders["adapters"]))
        report = set_peft_model_state_dict(empty, load_peft_weights(folders["adapters"], device="cpu"))
        missing = [key for key in report.missing_keys if "lora_" in key]
        answer[name] = {"missing": missing, "unexpected": list(report.unexpected_keys)}
        model = PeftModel.from_pretrained(base, folders["adapters"]).eval()
        with torch.no_grad():
            tensors[name] = model(ids).logits.contiguous()
            tensors[f"{name}.merged"] = model.merge_and_unload()(ids).logits.contiguous()
    save_file(tensors, out)
    return answer


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: adapters.py REQUEST.json OUT.safetensors")
    request, out = map(Path, sys.argv[1:])
    json.dump(main(json.loads(request.read_text()), out), sys.stdout)
    print()
