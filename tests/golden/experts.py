"""A mixture of experts: transformers' Qwen3MoeForCausalLM, its load-balancing loss, and its parameters under the names that they have in files."""

import tempfile

import safetensors.torch
import torch
import torch.nn.functional as F
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe import modeling_qwen3_moe as modeling

COEFFICIENT = 0.02


def qwen3_moe():
    config = Qwen3MoeConfig(
        vocab_size=53, hidden_size=20, intermediate_size=36, moe_intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, max_position_embeddings=31, rms_norm_eps=1e-5, num_experts=5, num_experts_per_tok=2,
        norm_topk_prob=True, router_aux_loss_coef=COEFFICIENT, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, bos_token_id=1, eos_token_id=2,
        architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip
    config._experts_implementation = "eager"
    return Qwen3MoeForCausalLM(config)


class RouterInInputDtype(modeling.Qwen3MoeTopKRouter):
    def forward(self, x):
        logits = F.linear(x.reshape(-1, self.hidden_dim), self.weight)
        weights, chosen = torch.topk(logits.softmax(-1), self.top_k, dim=-1)
        return logits, weights / weights.sum(-1, keepdim=True), chosen


def balancing_loss(logits, k):
    """Of one layer, as transformers' function, which casts to float32."""
    n = logits.shape[1]
    p = logits.softmax(-1)
    share = F.one_hot(p.topk(k, dim=-1).indices, n).sum((0, 1)).to(p.dtype) / len(p)
    return n * (share * p.mean(0)).sum()


def added_loss(model, all_logits):
    """What a step minimizes beside the cross-entropy: the balancing loss of each layer, added up as in Switch (arXiv:2101.03961). transformers
    takes the means over the tokens of all layers at once."""
    k = model.config.num_experts_per_tok
    losses = [balancing_loss(logits, k) for logits in all_logits]
    for loss, logits in zip(losses, all_logits):
        theirs = modeling.load_balancing_loss_func((logits,), logits.shape[1], k)
        torch.testing.assert_close(loss.float(), theirs.float(), rtol=1e-5, atol=0)
    return COEFFICIENT * sum(losses)


def as_in_files(tensors):
    """The tensors with those of all experts taken apart into those of each."""
    out = {}
    for name, tensor in tensors.items():
        stem, _, part = name.rpartition(".experts.")
        for e, values in enumerate(tensor) if part in ("gate_up_proj", "down_proj") else []:
            halves = dict(zip(("gate_proj", "up_proj"), values.chunk(2))) if part == "gate_up_proj" else {part: values}
            out |= {f"{stem}.experts.{e}.{p}.weight": half for p, half in halves.items()}
        if not stem:
            out[name] = tensor
    return out


def assert_as_in_files(model, tensors):
    """Holds `as_in_files` to what transformers writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        written = safetensors.torch.load_file(f"{folder}/model.safetensors")
    assert written.keys() == tensors.keys(), sorted(written.keys() ^ tensors.keys())
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
