"""A decoder with everything that bounds its logits: QK-norm, soft-caps of attention scores and of logits, a window. No class of transformers has
them together, so it is written here in plain PyTorch, in the dtype of its parameters. Names and layouts are Firebox's own: linear weights are [in, out]."""

import json
import types

import torch

SHAPE = dict(
    vocab_size=59, d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=40, context=31, window=9,
    qk_norm=True, attention_softcap=1.5, logit_softcap=2.5, norm="rms_norm", norm_eps=1e-5, feed_forward="swi_glu",
    positions={"rotary": {"theta": 10000.0}}, bias=False, tied=False, dropout=0.0, init_std=0.02,
)  # fmt: skip
CONFIG = json.dumps({"architectures": ["FireboxDecoder"], "model_type": "firebox", "decoder": SHAPE}, indent=2) + "\n"
S = types.SimpleNamespace(**SHAPE)


class Weight(torch.nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(shape))


def rms_norm(x, gain):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + S.norm_eps) * gain.weight


def soft_cap(x, cap):
    return cap * torch.tanh(x / cap)


def rotate(x):
    """Of [B, heads, T, E], as Hugging Face's Llama."""
    frequency = S.positions["rotary"]["theta"] ** (-torch.arange(0, S.head_dim, 2, dtype=x.dtype) / S.head_dim)
    angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * frequency
    cos, sin = (torch.cat((f, f), dim=-1) for f in (angle.cos(), angle.sin()))
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = Weight(S.d_model, (S.n_heads + 2 * S.n_kv_heads) * S.head_dim)
        self.q_norm, self.k_norm = Weight(S.head_dim), Weight(S.head_dim)
        self.out = Weight(S.n_heads * S.head_dim, S.d_model)

    def forward(self, x):
        batch, tokens, _ = x.shape
        heads = (x @ self.qkv.weight).reshape(batch, tokens, -1, S.head_dim).transpose(1, 2)
        q, k, v = heads.split((S.n_heads, S.n_kv_heads, S.n_kv_heads), dim=1)
        q, k = rotate(rms_norm(q, self.q_norm)), rotate(rms_norm(k, self.k_norm))
        k, v = (y.repeat_interleave(S.n_heads // S.n_kv_heads, dim=1) for y in (k, v))
        scores = soft_cap(q @ k.transpose(2, 3) / S.head_dim**0.5, S.attention_softcap)
        back = torch.arange(tokens)[:, None] - torch.arange(tokens)
        p = scores.masked_fill((back < 0) | (back >= S.window), float("-inf")).softmax(-1)
        return (p @ v).transpose(1, 2).flatten(2) @ self.out.weight


class Mlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.input, self.output = Weight(S.d_model, 2 * S.d_ff), Weight(S.d_ff, S.d_model)

    def forward(self, x):
        gate, up = (x @ self.input.weight).chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up @ self.output.weight


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn_norm, self.attn = Weight(S.d_model), Attention()
        self.mlp_norm, self.mlp = Weight(S.d_model), Mlp()

    def forward(self, x):
        x = x + self.attn(rms_norm(x, self.attn_norm))
        return x + self.mlp(rms_norm(x, self.mlp_norm))


class Decoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.config = S
        self.embed, self.head, self.norm = Weight(S.vocab_size, S.d_model), Weight(S.vocab_size, S.d_model), Weight(S.d_model)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(S.n_layers))

    def forward(self, input_ids, use_cache=False):
        x = self.embed.weight[input_ids]
        for block in self.blocks:
            x = block(x)
        return types.SimpleNamespace(logits=soft_cap(rms_norm(x, self.norm) @ self.head.weight.T, S.logit_softcap))
