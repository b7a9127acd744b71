#!/usr/bin/env python3
"""Writes the golden values that Firebox is compared with; README.md says how to run it and what is in the files.

Everything is computed in float64 on one CPU thread, from parameters and inputs that are exact in float32, and
stored as float32. The distance of a Firebox value from its golden is then Firebox's own rounding error, not the
sum of two. How far transformers itself, in float32, is from these values stands in each file's metadata under
`float32_error`: it is the scale for tolerances.
"""

import argparse
import copy
import importlib.metadata
import json
import pathlib
import platform
import tempfile

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

import bounded
import compress
import distillation
import experts
import imported
import lsq
import optimizers
import preference
import peft_adapters
import torch_schedules
import vision
from torch_schedules import DECAY, PEAK, STEPS, WARMUP

BATCH, TOKENS = 3, 17
IGNORE_INDEX = -100
ADAMW = dict(lr=3e-3, betas=(0.9, 0.95), eps=1e-8)
WEIGHT_DECAY = 0.1
ADAMW_STEPS = 10

VERSIONS = {
    "python": platform.python_version(),
    "torch": torch.__version__.split("+")[0],
    "transformers": transformers.__version__,
    "safetensors": safetensors.__version__,
    "numpy": np.__version__,
    **{name: importlib.metadata.version(name) for name in ("gguf", "lion-pytorch", "pytorch-optimizer", "schedulefree")},
}


# --- transformers in float64 ----------------------------------------------------------------------------------------
# transformers' Llama casts to float32 in two places whatever the model's dtype is: RMSNorm and the rotary angles.
# Both are replaced by the same formula in the dtype of the input. `float32_error`, measured against the untouched
# classes, shows that the replacement is the same function.


class RMSNormInInputDtype(modeling_llama.LlamaRMSNorm):
    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class RotaryInInputDtype(modeling_llama.LlamaRotaryEmbedding):
    def forward(self, x, position_ids):
        head_dim, theta = HEAD_DIM_AND_THETA
        inverse_frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=x.dtype) / head_dim)
        angle = position_ids[..., None].to(x.dtype) * inverse_frequency
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos(), angle.sin()


HEAD_DIM_AND_THETA = None


def in_float64(model):
    """A float64 copy of `model`, free of casts to float32."""
    global HEAD_DIM_AND_THETA
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if isinstance(module, modeling_llama.LlamaRMSNorm):
            module.__class__ = RMSNormInInputDtype
        elif isinstance(module, experts.modeling.Qwen3MoeRMSNorm):
            module.__class__ = RMSNormInInputDtype
        elif isinstance(module, experts.modeling.Qwen3MoeTopKRouter):
            module.__class__ = experts.RouterInInputDtype
        elif isinstance(module, (modeling_llama.LlamaRotaryEmbedding, experts.modeling.Qwen3MoeRotaryEmbedding)):
            HEAD_DIM_AND_THETA = (model.config.head_dim, model.config.rope_parameters["rope_theta"])
            module.__class__ = RotaryInInputDtype
    return model


# --- the two models -------------------------------------------------------------------------------------------------


def randomize(model, generator):
    """Weights large enough that every path matters: normalization gains around 1, biases around 0."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "ln_" in name or "norm" in name:
            parameter.data = 0.2 * noise + (0.0 if name.endswith("bias") else 1.0)
        elif name.endswith("bias"):
            parameter.data = 0.1 * noise
        elif "wte" in name or "wpe" in name or "embed_tokens" in name:
            parameter.data = 0.3 * noise
        else:
            parameter.data = 0.2 * noise


def make_batch(vocab, generator):
    """Tokens, the tokens after them, and a few targets that are not to be predicted."""
    tokens = torch.randint(0, vocab, (BATCH, TOKENS + 1), generator=generator)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].clone()
    targets[0, :3] = IGNORE_INDEX
    targets[2, -2:] = IGNORE_INDEX
    return inputs, targets


def loss_of(model, inputs, targets):
    """Logits [B, T, V], the mean loss over the targets that are not ignored, and what training minimizes: this, and experts' balancing loss."""
    with_experts = isinstance(model, experts.Qwen3MoeForCausalLM)
    out = model(input_ids=inputs, use_cache=False, **(dict(output_router_logits=True) if with_experts else {}))
    loss = F.cross_entropy(out.logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)
    return out.logits, loss, loss + experts.added_loss(model, out.router_logits) if with_experts else loss


def trace(model, inputs, targets):
    """Logits, loss, gradients, the losses of 10 AdamW steps on the one batch, and the parameters after them."""
    out = {}
    logits, loss, minimized = loss_of(model, inputs, targets)
    minimized.backward()
    out["logits"], out["loss"] = logits, loss
    for name, parameter in model.named_parameters():
        out[f"grad.{name}"] = parameter.grad.clone()

    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [dict(params=matrices, weight_decay=WEIGHT_DECAY), dict(params=vectors, weight_decay=0.0)], **ADAMW
    )
    losses = []
    for _ in range(ADAMW_STEPS):
        optimizer.zero_grad()
        _, loss, minimized = loss_of(model, inputs, targets)
        minimized.backward()
        optimizer.step()
        losses.append(loss.detach())
    out["losses"] = torch.stack(losses)  # losses[k] is the loss before step k + 1, so losses[0] == loss
    for name, parameter in model.named_parameters():
        out[f"final.{name}"] = parameter
    return experts.as_in_files({name: tensor.detach().clone() for name, tensor in out.items()})


def largest_relative_difference(ours, golden):
    """max |a - b| / max |b|, the measure Firebox's parity tests use."""
    return ((ours.double() - golden).abs().max() / golden.abs().max()).item()


def float32_error(single, double):
    """The largest relative differences of transformers in float32 from itself in float64, by kind of value."""
    worst = {}
    for name, golden in double.items():
        kind = name.split(".")[0]
        ours = single[name]
        if name.startswith("final.") and name.endswith("attn.c_attn.bias"):
            # A bias of the keys adds the same number to all scores of a query, and softmax ignores it: its gradient
            # is zero but for rounding, and AdamW divides that by its own size. Its path means nothing.
            width = golden.numel() // 3
            ours, golden = (torch.cat((x[:width], x[2 * width :])) for x in (ours, golden))
        error = largest_relative_difference(ours, golden)
        if error > worst.get(kind, (0.0, ""))[0]:
            worst[kind] = (float(f"{error:.1e}"), name)
    return worst


def model_fixture(out_dir, name, model, seed, config_text=None):
    generator = torch.Generator().manual_seed(seed)
    randomize(model, generator)
    model.eval()  # dropout is 0 anyway
    inputs, targets = make_batch(model.config.vocab_size, generator)

    tensors = {n: p.detach().clone() for n, p in model.named_parameters()}  # tied parameters once, as in a checkpoint
    tensors = experts.as_in_files(tensors)
    if isinstance(model, experts.Qwen3MoeForCausalLM):
        experts.assert_as_in_files(model, tensors)
    double = trace(in_float64(model), inputs, targets)
    single = trace(copy.deepcopy(model), inputs, targets)
    error = float32_error(single, double)
    assert max(error[kind][0] for kind in ("logits", "loss", "losses")) < 1e-5, error

    tensors |= {"input_ids": inputs, "targets": targets} | double
    config = config_text or model.config.to_json_string(use_diff=True)
    (out_dir / f"{name}.json").write_text(config)
    save(
        out_dir / f"{name}.safetensors",
        tensors,
        seed=seed,
        adamw=dict(ADAMW, weight_decay=WEIGHT_DECAY, decay_on="matrices", steps=ADAMW_STEPS),
        ignore_index=IGNORE_INDEX,
        float32_error=error,
    )
    print(f"  loss {double['losses'][0]:.4f} -> {double['losses'][-1]:.4f}; float32 error {error}")


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=61, n_positions=23, n_embd=20, n_layer=3, n_head=5, activation_function="gelu_new",
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, architectures=["GPT2LMHeadModel"],
        )
    )  # fmt: skip


def llama(heads, kv_heads, tied):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=67, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=heads,
            num_key_value_heads=kv_heads, head_dim=24 // heads, max_position_embeddings=31, rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, tie_word_embeddings=tied,
            bos_token_id=1, eos_token_id=2, architectures=["LlamaForCausalLM"],
        )
    )  # fmt: skip


def older_llama_config(config):
    """The same configuration as transformers 4 wrote it: `rope_theta` on top, no `head_dim`."""
    values = json.loads(config.to_json_string(use_diff=True))
    values["rope_theta"] = values.pop("rope_parameters")["rope_theta"]
    values["rope_scaling"] = None
    values["torch_dtype"] = "float32"
    values.pop("dtype", None)
    values.pop("head_dim")
    values["transformers_version"] = "4.40.0"
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


# --- the optimizer --------------------------------------------------------------------------------------------------

ADAMW_CASES = [
    # (lr per step, beta1, beta2, eps, weight decay)
    dict(lr=[1e-3] * 5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0),
    dict(lr=[3e-3] * 5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1),
    dict(lr=[0.0, 1e-2, 2e-2, 5e-3, 1e-4], betas=(0.8, 0.99), eps=1e-3, weight_decay=0.5),
    dict(lr=[1e-2] * 5, betas=(0.0, 0.9), eps=1e-6, weight_decay=0.01),
    dict(lr=[1e-2] * 5, betas=(0.95, 0.0), eps=1e-5, weight_decay=0.01),
]
SHAPES = [(7,), (3, 5), (2, 3, 4)]


def adamw_fixture(out_dir):
    """`case.{c}.{param|grad|m|v}.{shape number}.{step}`: param of step 0 is the start, the others are after the step."""
    generator = torch.Generator().manual_seed(7)
    tensors, cases = {}, []
    for c, case in enumerate(ADAMW_CASES):
        params = [torch.nn.Parameter(torch.randn(s, generator=generator).double()) for s in SHAPES]
        options = {k: v for k, v in case.items() if k != "lr"}
        optimizer = torch.optim.AdamW(params, lr=1.0, **options)
        for i, p in enumerate(params):
            tensors[f"case.{c}.param.{i}.0"] = p.detach().clone()
        for step, lr in enumerate(case["lr"], start=1):
            optimizer.param_groups[0]["lr"] = lr
            for i, p in enumerate(params):
                # magnitudes from 1e-5 to 10, so that eps matters in some elements
                scale = 10.0 ** torch.randint(-5, 2, p.shape, generator=generator).float()
                grad = torch.randn(p.shape, generator=generator) * scale
                tensors[f"case.{c}.grad.{i}.{step}"] = grad
                p.grad = grad.double()
            optimizer.step()
            for i, p in enumerate(params):
                tensors[f"case.{c}.param.{i}.{step}"] = p.clone()
                tensors[f"case.{c}.m.{i}.{step}"] = optimizer.state[p]["exp_avg"].clone()
                tensors[f"case.{c}.v.{i}.{step}"] = optimizer.state[p]["exp_avg_sq"].clone()
        cases.append(case)

    clips = []
    for c, max_norm in enumerate([0.5, 1.0, 1e6]):
        params = [torch.nn.Parameter(torch.zeros(s).double()) for s in SHAPES]
        for i, p in enumerate(params):
            grad = torch.randn(p.shape, generator=generator)
            tensors[f"clip.{c}.before.{i}"] = grad
            p.grad = grad.double()
        norm = torch.nn.utils.clip_grad_norm_(params, max_norm)
        for i, p in enumerate(params):
            tensors[f"clip.{c}.after.{i}"] = p.grad.clone()
        clips.append(dict(max_norm=max_norm, norm=norm.item()))
    save(out_dir / "adamw.safetensors", tensors, seed=7, cases=cases, clips=clips)


# --- schedules ------------------------------------------------------------------------------------------------------


def schedule_fixture(out_dir):
    """Learning rates of 51 calls (step 0 to 50) by torch and transformers, at full double precision."""

    run, w, t = torch_schedules.run, WARMUP, transformers
    schedules = {
        "constant": run(lambda o: t.get_constant_schedule_with_warmup(o, w)),
        "linear": run(lambda o: t.get_linear_schedule_with_warmup(o, w, STEPS)),
        "cosine": run(lambda o: t.get_cosine_schedule_with_warmup(o, w, STEPS)),
        "cosine_min": run(
            lambda o: t.get_cosine_with_min_lr_schedule_with_warmup(o, w, STEPS, min_lr_rate=0.1)
        ),
        "inverse_sqrt": run(lambda o: t.get_inverse_sqrt_schedule(o, w)),
        **torch_schedules.schedules(),
    }
    for shape in ("linear", "cosine", "1-sqrt"):
        schedules[f"wsd_{shape}"] = run(
            lambda o: t.get_wsd_schedule(
                o, num_warmup_steps=w, num_decay_steps=DECAY, num_training_steps=STEPS, min_lr_ratio=0.1, decay_type=shape
            )
        )
    values = dict(versions=VERSIONS, steps=STEPS, warmup=WARMUP, peak=PEAK, wsd_decay_steps=DECAY, schedules=schedules)
    (out_dir / "schedules.json").write_text(json.dumps(values, indent=1) + "\n")


# --- files ----------------------------------------------------------------------------------------------------------


def save(path, tensors, **about):
    """float64 becomes float32, integers become int32; `about` goes into the metadata as JSON under `firebox`."""
    stored = {}
    for name, tensor in tensors.items():
        dtype = torch.float32 if tensor.is_floating_point() else torch.int32
        stored[name] = tensor.detach().to(dtype).contiguous().clone()
        if name.startswith("grad."):
            # What is zero but for float64's rounding (the gradient of a bias of keys) is stored as zero.
            stored[name][tensor.abs() < 1e-12 * tensor.abs().max()] = 0.0
        assert not tensor.is_floating_point() or torch.isfinite(tensor).all(), name
    about["versions"] = VERSIONS
    safetensors.torch.save_file(stored, path, metadata={"firebox": json.dumps(about)})
    path.chmod(0o644)
    print(f"{path.name}: {len(stored)} tensors, {path.stat().st_size // 1000} kB")
    assert path.stat().st_size < 500_000


def compare(fresh, stored):
    """Raises where a fresh file differs from the stored one by more than another machine's rounding (1e-6)."""
    if fresh.suffix == ".json":
        new, old = (json.loads(path.read_text()) for path in (fresh, stored))
        if isinstance(new, list):
            assert new == old, f"{stored.name} has other values"
            return
        new.pop("versions", None), old.pop("versions", None)
        new.pop("transformers_version", None), old.pop("transformers_version", None)
        for name, rates in new.pop("schedules", {}).items():
            np.testing.assert_allclose(rates, old["schedules"][name], rtol=1e-12, err_msg=name)
        old.pop("schedules", None)
        assert new == old, f"{stored.name} has other values"
        return
    new, old = (safetensors.torch.load_file(path) for path in (fresh, stored))
    assert new.keys() == old.keys(), f"{stored.name} has other tensors: {sorted(new.keys() ^ old.keys())}"
    for name, tensor in new.items():
        scale = old[name].double().abs().max().item() if tensor.is_floating_point() else 0.0
        new_values, old_values = (t.float() if t.dtype == torch.bfloat16 else t for t in (tensor, old[name]))
        np.testing.assert_allclose(new_values, old_values, rtol=0, atol=1e-6 * scale, err_msg=f"{stored.name}: {name}")


def main():
    here = pathlib.Path(__file__).parent
    parser = argparse.ArgumentParser(description="Writes the golden values that Firebox is compared with.")
    parser.add_argument("--check", action="store_true", help="write nothing; compare fresh values with the stored ones")
    check = parser.parse_args().check
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    print("versions:", VERSIONS)
    if not check:
        return generate(here)
    with tempfile.TemporaryDirectory() as folder:
        fresh = pathlib.Path(folder)
        generate(fresh)
        for path in sorted(fresh.iterdir()):
            compare(path, here / path.name)
        print(f"{len(list(fresh.iterdir()))} files equal the stored ones")


def generate(out_dir):
    model_fixture(out_dir, "gpt2-tiny", gpt2(), seed=1)
    model_fixture(out_dir, "llama-tiny", llama(heads=4, kv_heads=2, tied=False), seed=2)
    tied = llama(heads=3, kv_heads=1, tied=True)
    model_fixture(out_dir, "llama-tiny-tied", tied, seed=3, config_text=older_llama_config(tied.config))
    model_fixture(out_dir, "bounded-tiny", bounded.Decoder(), seed=4, config_text=bounded.CONFIG)
    model_fixture(out_dir, "qwen3-moe-tiny", experts.qwen3_moe(), seed=5)
    imported.fixture(out_dir)
    peft_adapters.fixture(out_dir)
    adamw_fixture(out_dir)
    lsq.fixture(save, out_dir)
    optimizers.fixture(save, out_dir)
    distillation.fixture(save, out_dir)
    preference.fixture(save, in_float64, out_dir)
    compress.fixture(save, out_dir)
    schedule_fixture(out_dir)
    vision.fixture(out_dir)


if __name__ == "__main__":
    main()
