"""Tiny random encoders as transformers saves them, in several classes each, with what these compute in float64: what an import is compared with."""

import json
import tempfile
import zlib
from pathlib import Path

import safetensors.torch
import torch
import transformers

ROWS, TOKENS = 3, 11
LENGTHS = [11, 7, 3]
VOCABULARY = 53
LABELS = ["ham", "spam", "neither"]


def like_bert(**more):
    return dict(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=20, max_position_embeddings=24, type_vocab_size=2,
    ) | more  # fmt: skip


def families():
    """Of each family: its configuration, how its classes' names begin, what stands before the names of the class without a head, and the classes."""
    classes = dict(hidden="Model", masked="ForMaskedLM", classes="ForSequenceClassification", tokens="ForTokenClassification")
    bert = classes | dict(pretraining="ForPreTraining", values="ForSequenceClassification")
    distilbert = dict(vocab_size=VOCABULARY, dim=16, n_layers=2, n_heads=4, hidden_dim=20, max_position_embeddings=24)
    shared = dict(embedding_size=8, num_hidden_layers=4, num_hidden_groups=2)
    return {
        "bert": ("Bert", "bert.", like_bert(), bert),
        "roberta": ("Roberta", "roberta.", like_bert(type_vocab_size=1), classes),
        "distilbert": ("DistilBert", "distilbert.", distilbert, classes),
        "albert": ("Albert", "albert.", like_bert(**shared), classes | dict(pretraining="ForPreTraining")),
    }


def values(key, shape):
    """The same for the same name."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    noise = 0.2 * torch.randn(shape, generator=generator)
    return noise + (1.0 if "norm" in key.lower() and key.endswith("weight") else 0.0)


def inputs(name, config):
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    ids = torch.randint(5, VOCABULARY, (ROWS, TOKENS), generator=generator)
    mask = torch.arange(TOKENS)[None] < torch.tensor(LENGTHS)[:, None]
    given = dict(input_ids=torch.where(mask, ids, config.pad_token_id), attention_mask=mask.long())
    if getattr(config, "type_vocab_size", 0) > 1:
        given["token_type_ids"] = (torch.arange(TOKENS)[None] >= torch.tensor([6, 2, 11])[:, None]).long() * mask
    return given


def fixture(out_dir):
    """`encoder-FAMILY.safetensors`: the tensors of all classes as they are saved, once those of the class without a head, and after `CASE:` those of heads; `input_ids`, `token_type_ids`
    [B, T] and `lengths` [B]; `CASE:output`, hidden states [B, T, D] or logits [B, T, N] or [B, N], 0 for padding. `encoder-FAMILY.json`: the configurations by case."""
    for name, (stem, base, shape, classes) in families().items():
        tensors, configs = {}, {}
        for case, ending in classes.items():
            kind = getattr(transformers, stem + ending)
            config = kind.config_class(**shape)
            if case == "classes":
                config.id2label, config.label2id = dict(enumerate(LABELS)), {label: i for i, label in enumerate(LABELS)}
            if case == "tokens":
                config.num_labels = 5
            if case == "values":
                config.num_labels, config.problem_type = 1, "regression"
            model = kind(config).eval()
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    bare = key.removeprefix(base)
                    parameter.copy_(values(bare if key.startswith(base) or case == "hidden" else f"{case} {key}", parameter.shape))
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                saved = safetensors.torch.load_file(Path(folder) / "model.safetensors")
                configs[case] = json.loads((Path(folder) / "config.json").read_text())
            configs[case].pop("transformers_version", None)
            for key, value in saved.items():
                bare = key.removeprefix(base)
                key = bare if key.startswith(base) or case == "hidden" else f"{case}:{key}"
                assert key not in tensors or torch.equal(tensors[key], value), key
                tensors[key] = value
            given = inputs(name, config)
            with torch.no_grad():
                output = model.double()(**given)[0 if case != "pretraining" else "prediction_logits"]
            if output.dim() == 3:
                output = output * given["attention_mask"][..., None]
            tensors[f"{case}:output"] = output.float().contiguous()
        tensors |= {key: given[key].int() for key in ("input_ids", "token_type_ids") if key in given}
        tensors["lengths"] = torch.tensor(LENGTHS).int()
        (out_dir / f"encoder-{name}.json").write_text(json.dumps(configs, indent=1, sort_keys=True) + "\n")
        path = out_dir / f"encoder-{name}.safetensors"
        safetensors.torch.save_file(tensors, path)
        path.chmod(0o644)
        print(f"{path.name}: {path.stat().st_size // 1000} kB")
