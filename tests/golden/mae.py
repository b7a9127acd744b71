"""A tiny masked autoencoder as transformers has it, with given masks: losses of ten AdamW steps, with and without normalized targets."""

import copy
import json

import safetensors.torch
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining

ROWS, STEPS = 4, 10


def config(normalize):
    return ViTMAEConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=12, patch_size=3, num_channels=3,
        decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=20, mask_ratio=0.75,
        norm_pix_loss=normalize, initializer_range=0.1,
    )  # fmt: skip


def hub_name(name):
    """As the hub's files of this class have it, which the library's own names have left."""
    parts = {
        "vit.layers.": "vit.encoder.layer.", "attention.q_proj": "attention.attention.query", "attention.k_proj": "attention.attention.key",
        "attention.v_proj": "attention.attention.value", "attention.o_proj": "attention.output.dense", "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }  # fmt: skip
    for new, old in parts.items():
        name = name.replace(new, old)
    return name


def positions(width, grid):
    """Of the class token and of patches, as in the authors' weights: of the column in the first half, of the row in the second. (transformers 5 has the halves the other way round in new models.)"""
    frequencies = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    side = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    side = torch.cat([side.sin(), side.cos()], 1)
    patches = torch.cat([side.repeat(grid, 1), side.repeat_interleave(grid, 0)], 1)
    return torch.cat([torch.zeros(1, width), patches]).float()


def fixture(out_dir):
    """`mae-tiny.safetensors`: parameters, `pixels` [4, 3, 12, 12], `seen` [4, 4], the patches that are seen, in order; `losses` and `losses_normalized` [10]."""
    generator = torch.Generator().manual_seed(0)
    first = ViTMAEForPreTraining(config(False))
    for name, parameter in first.named_parameters():
        if parameter.requires_grad:
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.data = noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    # Made when weights are loaded, and not with a new model.
    for fixed in (first.vit.embeddings.position_embeddings, first.decoder.decoder_pos_embed):
        fixed.data = positions(fixed.shape[-1], 4)[None]
    pixels = torch.randn(ROWS, 3, 12, 12, generator=generator)
    noise = torch.rand(ROWS, 16, generator=generator)
    seen = noise.argsort(1)[:, :4].sort(1).values
    tensors = {hub_name(name): value.detach().clone() for name, value in first.named_parameters()}
    for normalize in (False, True):
        model = ViTMAEForPreTraining(config(normalize))
        model.load_state_dict(copy.deepcopy(first.state_dict()))
        model = model.double().train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
        losses = []
        for _ in range(STEPS):
            loss = model(pixel_values=pixels.double(), noise=noise.double()).loss
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        tensors["losses_normalized" if normalize else "losses"] = torch.tensor(losses)
    path = out_dir / "mae-tiny.safetensors"
    safetensors.torch.save_file(tensors | {"pixels": pixels, "seen": seen.int()}, path)
    path.chmod(0o644)
    settings = json.loads(config(True).to_json_string(use_diff=False)) | {"architectures": ["ViTMAEForPreTraining"]}
    settings.pop("transformers_version", None)
    (out_dir / "mae-tiny.json").write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")
    print(f"{path.name}: {path.stat().st_size // 1000} kB, losses {tensors['losses'][[0, -1]].tolist()}")
