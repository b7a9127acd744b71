"""Tiny random models as transformers saves them, with their logits in float32: what an import is compared with. As on the hub, GPT-2's tensors have no prefix, and one model is in bfloat16."""

import json

import safetensors.torch
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

TOKENS = 40


def shape(**more):
    return dict(
        vocab_size=71, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, rms_norm_eps=1e-5, initializer_range=0.2, bos_token_id=1, eos_token_id=2,
    ) | more  # fmt: skip


def models():
    # Short first contexts, so that all kinds of turns are there within 40 tokens.
    llama3 = dict(
        rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32,
    )  # fmt: skip
    linear = dict(rope_type="linear", rope_theta=10000.0, factor=2.5)
    plain = dict(rope_type="default", rope_theta=10000.0)
    gpt2 = GPT2Config(vocab_size=71, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2, bos_token_id=0, eos_token_id=0)
    return {
        "gpt2": GPT2LMHeadModel(gpt2),
        "llama3": LlamaForCausalLM(LlamaConfig(**shape(rope_parameters=llama3))),
        "llama-linear": LlamaForCausalLM(LlamaConfig(**shape(rope_parameters=linear, attention_bias=True, mlp_bias=True))),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**shape(rope_parameters=plain, tie_word_embeddings=True))),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**shape(rope_parameters=plain, head_dim=12))),
        "mistral": MistralForCausalLM(MistralConfig(**shape(rope_parameters=plain, sliding_window=9))),
    }


def fixture(out_dir):
    """`import-NAME.safetensors`: the model's tensors as in its folder, `input_ids` [1, T] and `logits` [1, T, V]; `import-NAME.json`: its config."""
    for seed, (name, model) in enumerate(models().items()):
        generator = torch.Generator().manual_seed(seed)
        model = model.eval()
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = 0.1 * noise + (0.0 if key.endswith("bias") or "norm" not in key and "ln_" not in key else 1.0)
            if name == "qwen3":
                parameter.data = parameter.data.bfloat16().float()
        ids = torch.randint(0, 71, (1, TOKENS), generator=generator)
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        tensors = {key: value.detach().clone().contiguous() for key, value in model.named_parameters()}
        if name == "gpt2":
            tensors = {key.removeprefix("transformer."): value for key, value in tensors.items()}
        if name == "qwen3":
            tensors = {key: value.bfloat16() for key, value in tensors.items()}
        config = json.loads(model.config.to_json_string(use_diff=False)) | {"architectures": [type(model).__name__]}
        config["dtype"] = "bfloat16" if name == "qwen3" else "float32"
        config.pop("transformers_version", None)
        (out_dir / f"import-{name}.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
        path = out_dir / f"import-{name}.safetensors"
        safetensors.torch.save_file(tensors | {"input_ids": ids.int(), "logits": logits}, path)
        path.chmod(0o644)
        print(f"{path.name}: {path.stat().st_size // 1000} kB")
