"""Images: Pillow's resizing; ViT and CLIP as transformers saves them."""

import json
import tempfile
import zlib
from pathlib import Path

import safetensors.torch
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTForImageClassification, ViTModel

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def resized_fixture(out_dir):
    """`images.json`: filter, width, height, and the CRC-32 of what Pillow makes of a picture of 7 x 5 pixels."""
    values = bytes((i * i * 37 + i * 11) % 256 for i in range(7 * 5 * 3))
    picture = Image.frombytes("RGB", (7, 5), values)
    sizes = [(4, 4), (7, 3), (2, 5), (16, 9), (1, 1), (224, 3)]
    rows = []
    for name, resample in FILTERS.items():
        for size in sizes:
            rows.append([name, *size, zlib.crc32(picture.resize(size, resample).tobytes())])
    (out_dir / "images.json").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    print(f"images.json: {len(rows)} pictures")


def random_values(model, generator):
    for key, parameter in model.named_parameters():
        if key != "logit_scale":
            noise = torch.randn(parameter.shape, generator=generator)
            is_gain = "norm" in key and key.endswith("weight")
            parameter.data = 0.15 * noise + (1.0 if is_gain else 0.0)


def saved(model):
    """Config and tensors as `save_pretrained` writes them, which are not the names inside the model."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
        tensors = safetensors.torch.load_file(Path(folder) / "model.safetensors")
    config.pop("transformers_version", None)
    return config, tensors


def store(out_dir, name, config, tensors):
    (out_dir / f"{name}.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    path = out_dir / f"{name}.safetensors"
    safetensors.torch.save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    path.chmod(0o644)
    print(f"{path.name}: {path.stat().st_size // 1000} kB")


def vit_fixtures(out_dir):
    """`vit-classes` with `pixels` [2, C, 12, 12] and `logits`; `vit-hidden`, of one channel, with `hidden` [2, T, D]."""
    shape = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=36, image_size=12, patch_size=4)
    labels = {i: name for i, name in enumerate(["ape", "bee", "cat", "dog", "elk"])}
    classes = ViTConfig(**shape, id2label=labels, label2id={name: i for i, name in labels.items()})
    for seed, (name, model) in enumerate([
        ("vit-classes", ViTForImageClassification(classes)),
        ("vit-hidden", ViTModel(ViTConfig(**shape, num_channels=1, hidden_act="gelu_new"), add_pooling_layer=False)),
    ]):
        generator = torch.Generator().manual_seed(100 + seed)
        model = model.eval()
        random_values(model, generator)
        pixels = torch.randn((2, model.config.num_channels, 12, 12), generator=generator)
        with torch.no_grad():
            out = model(pixel_values=pixels)
        config, tensors = saved(model)
        said = {"logits": out.logits} if "classes" in name else {"hidden": out.last_hidden_state}
        store(out_dir, name, config, tensors | said | {"pixels": pixels})


def clip_fixture(out_dir):
    """`clip`, with `pixels` [3, 3, 8, 8], `input_ids` [3, 7] whose texts end with the largest id, `lengths` of the texts, and what the model makes of them."""
    text = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=31, max_position_embeddings=9, bos_token_id=29, eos_token_id=30)
    vision = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20, image_size=8, patch_size=4)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)).eval()
    generator = torch.Generator().manual_seed(102)
    random_values(model, generator)
    ids = torch.randint(0, 29, (3, 7), generator=generator)
    lengths = torch.tensor([7, 4, 6])
    for row, n in enumerate(lengths):
        ids[row, 0], ids[row, n - 1 :] = 29, 30
    pixels = torch.randn((3, 3, 8, 8), generator=generator)
    out = model(input_ids=ids, pixel_values=pixels, return_loss=True)
    out.loss.backward()
    grads = {"grad.logit_scale": model.logit_scale.grad.reshape(1), "grad.text_projection.weight": model.text_projection.weight.grad}
    grads["grad.visual_projection.weight"] = model.visual_projection.weight.grad
    config, tensors = saved(model)
    said = {
        "input_ids": ids.int(), "lengths": lengths.int(), "pixels": pixels, "text_embeds": out.text_embeds, "image_embeds": out.image_embeds,
        "logits_per_image": out.logits_per_image, "loss": out.loss.reshape(1),
    }  # fmt: skip
    store(out_dir, "clip", config, tensors | {key: value.detach() for key, value in (said | grads).items()})


def fixture(out_dir):
    resized_fixture(out_dir)
    vit_fixtures(out_dir)
    clip_fixture(out_dir)
