"""The two model families of the benchmark in plain PyTorch, as nanoGPT and Hugging Face's Llama write them.

A configuration is firebox's `DecoderConfig` as JSON: the same shapes and the same number of parameters.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def make_norm(c):
    if c["norm"] == "layer_norm":
        return nn.LayerNorm(c["d_model"], eps=c["norm_eps"], bias=c["bias"])
    return nn.RMSNorm(c["d_model"], eps=c["norm_eps"])


def rotary_tables(c):
    """Cosines and sines, each [context, E / 2]."""
    half = c["head_dim"] // 2
    frequencies = c["positions"]["rotary"]["theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.outer(torch.arange(c["context"], dtype=torch.float64), frequencies)
    return angles.cos().float(), angles.sin().float()


def rotate_half(x, cos, sin):
    """Turns the pairs (j, j + E / 2) of x [B, H, T, E]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.kv_heads, self.width = c["n_heads"], c["n_kv_heads"], c["head_dim"]
        self.qkv = nn.Linear(c["d_model"], (self.heads + 2 * self.kv_heads) * self.width, bias=c["bias"])
        self.out = nn.Linear(self.heads * self.width, c["d_model"], bias=c["bias"])

    def forward(self, x, rotation):
        rows, tokens, _ = x.shape
        sizes = [self.heads * self.width, self.kv_heads * self.width, self.kv_heads * self.width]
        q, k, v = (part.view(rows, tokens, -1, self.width).transpose(1, 2) for part in self.qkv(x).split(sizes, dim=2))
        if rotation is not None:
            q, k = rotate_half(q, *rotation), rotate_half(k, *rotation)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv_heads != self.heads)
        return self.out(y.transpose(1, 2).reshape(rows, tokens, -1))


class Mlp(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gated = c["feed_forward"] == "swi_glu"
        self.approximate = "tanh" if c["feed_forward"] == "gelu" else "none"
        self.input = nn.Linear(c["d_model"], c["d_ff"] * (2 if self.gated else 1), bias=c["bias"])
        self.output = nn.Linear(c["d_ff"], c["d_model"], bias=c["bias"])

    def forward(self, x):
        x = self.input(x)
        if self.gated:
            gate, up = x.chunk(2, dim=-1)
            return self.output(F.silu(gate) * up)
        return self.output(F.gelu(x, approximate=self.approximate))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.attn_norm, self.attn = make_norm(c), Attention(c)
        self.mlp_norm, self.mlp = make_norm(c), Mlp(c)

    def forward(self, x, rotation):
        x = x + self.attn(self.attn_norm(x), rotation)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.rotary = c["positions"] != "learned"
        self.embed = nn.Embedding(c["vocab_size"], c["d_model"])
        if self.rotary:
            for name, table in zip(("cos", "sin"), rotary_tables(c)):
                self.register_buffer(name, table, persistent=False)
        else:
            self.positions = nn.Embedding(c["context"], c["d_model"])
        self.blocks = nn.ModuleList(Block(c) for _ in range(c["n_layers"]))
        self.norm = make_norm(c)
        self.head = nn.Linear(c["d_model"], c["vocab_size"], bias=False)
        self.apply(lambda module: initialize(module, c["init_std"]))
        # GPT-2's smaller initial weights for what writes to the residual stream.
        for block in self.blocks:
            for linear in (block.attn.out, block.mlp.output):
                nn.init.normal_(linear.weight, std=c["init_std"] / math.sqrt(2 * c["n_layers"]))
        if c["tied"]:
            self.head.weight = self.embed.weight

    def forward(self, inputs, targets):
        tokens = inputs.shape[1]
        x = self.embed(inputs)
        rotation = None
        if self.rotary:
            rotation = (self.cos[:tokens], self.sin[:tokens])
        else:
            x = x + self.positions(torch.arange(tokens, device=inputs.device))
        for block in self.blocks:
            x = block(x, rotation)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


class OfTransformers(nn.Module):
    """transformers' Llama, with PEFT's adapters where the configuration has some."""

    def __init__(self, c):
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=c["vocab_size"], hidden_size=c["d_model"], intermediate_size=c["d_ff"], num_hidden_layers=c["n_layers"],
            num_attention_heads=c["n_heads"], num_key_value_heads=c["n_kv_heads"], head_dim=c["head_dim"], max_position_embeddings=c["context"],
            rms_norm_eps=c["norm_eps"], tie_word_embeddings=c["tied"], initializer_range=c["init_std"],
            rope_parameters={"rope_type": "default", "rope_theta": c["positions"]["rotary"]["theta"]}, use_cache=False,
        )  # fmt: skip
        self.model = LlamaForCausalLM(config)
        adapter = c.get("adapter")
        if adapter is not None:
            from peft import LoraConfig, get_peft_model

            lora = LoraConfig(
                r=adapter["rank"], lora_alpha=adapter["alpha"], target_modules=adapter["targets"], lora_dropout=0.0,
                use_dora=adapter["kind"] == "dora", task_type="CAUSAL_LM",
            )  # fmt: skip
            self.model = get_peft_model(self.model, lora)

    def forward(self, inputs, targets):
        # The targets are the next tokens already: transformers would shift labels once more.
        logits = self.model(input_ids=inputs).logits
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


def of_transformers(c):
    return OfTransformers(c)


def initialize(module, std):
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def adamw_of(groups, lr, betas):
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8, fused=True)


def adamw(model, lr, betas, weight_decay):
    """Fused AdamW that decays matrices alone, nanoGPT's way."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return adamw_of(groups, lr, betas)
