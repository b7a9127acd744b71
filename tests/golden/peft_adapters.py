"""LoRA and DoRA as PEFT makes and saves them, on the tiny models of `imported.py`: what importing adapters, and training them, is compared with."""

import json
import tempfile
from pathlib import Path

import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

CASES = {
    "llama3": (LlamaConfig, LlamaForCausalLM, ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]),
    "gpt2": (GPT2Config, GPT2LMHeadModel, ["c_attn", "c_proj", "c_fc"]),
}


def fixture(out_dir):
    """`peft-NAME-KIND.safetensors`: the adapters as PEFT saves them, `logits` [1, T, V] of `input_ids` [1, T], and `grad.TENSOR` of the mean loss of the next token; `peft-NAME-KIND.json`: PEFT's configuration."""
    for name, (config, model_class, targets) in CASES.items():
        stored = safetensors.torch.load_file(out_dir / f"import-{name}.safetensors")
        ids = stored.pop("input_ids").long()
        stored.pop("logits")
        for kind in ("lora", "dora"):
            torch.manual_seed(7)
            base = model_class(config.from_dict(json.loads((out_dir / f"import-{name}.json").read_text()))).eval()
            prefix = "transformer." if name == "gpt2" else ""
            base.load_state_dict({prefix + key: value for key, value in stored.items()}, strict=False)
            base.tie_weights()
            lora = LoraConfig(
                r=3, lora_alpha=6, lora_dropout=0.0, use_dora=kind == "dora", target_modules=targets,
                fan_in_fan_out=name == "gpt2", task_type="CAUSAL_LM",
            )  # fmt: skip
            model = get_peft_model(base, lora).eval()
            generator = torch.Generator().manual_seed(11)
            trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
            for key, value in trained.items():
                noise = torch.randn(value.shape, generator=generator)
                value.data = value.data * (1 + 0.1 * noise) if "magnitude" in key else 0.1 * noise
            output = model(input_ids=ids, labels=ids)
            output.loss.backward()
            tensors = {"input_ids": ids.int(), "logits": output.logits.detach().clone(), "loss": output.loss.detach().clone()}
            for key, value in trained.items():
                plain = key.replace(".default", "").replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
                tensors[f"grad.{plain}"] = value.grad.clone()
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                saved = safetensors.torch.load_file(Path(folder) / "adapter_model.safetensors")
                said = json.loads((Path(folder) / "adapter_config.json").read_text())
            said = {key: said[key] for key in sorted(said) if key not in ("peft_version", "auto_mapping")}
            said["target_modules"] = sorted(said["target_modules"])
            (out_dir / f"peft-{name}-{kind}.json").write_text(json.dumps(said, indent=1) + "\n")
            path = out_dir / f"peft-{name}-{kind}.safetensors"
            safetensors.torch.save_file({key: value.contiguous() for key, value in (saved | tensors).items()}, path)
            path.chmod(0o644)
            print(f"{path.name}: {path.stat().st_size // 1000} kB")
