"""Ten AdamW steps of transformers in float64 on ten batches: BertForMaskedLM on masked rows, and BertModel on pairs of rows with sentence-transformers' loss of in-batch negatives."""

import json
import tempfile
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from encoders import VOCABULARY, like_bert, values
from transformers import BertConfig, BertForMaskedLM, BertModel

STEPS, ROWS, TOKENS = 10, 4, 13
MASK = 4
IGNORE_INDEX = -100
TEMPERATURE = 0.05


def batches(generator):
    """Rows of 3 to TOKENS tokens with types; some tokens are masked, some replaced, some kept, and each of these is to be predicted."""
    lengths = torch.randint(3, TOKENS + 1, (STEPS, ROWS), generator=generator)
    there = torch.arange(TOKENS) < lengths[..., None]
    ids = torch.randint(5, VOCABULARY, (STEPS, ROWS, TOKENS), generator=generator) * there
    chosen = (torch.rand(ids.shape, generator=generator) < 0.3) & there
    chosen[:, :, 1] = True
    chance = torch.rand(ids.shape, generator=generator)
    targets = torch.where(chosen, ids, IGNORE_INDEX)
    masked = torch.where(chosen & (chance < 0.8), MASK, ids)
    masked = torch.where(chosen & (chance > 0.9), torch.randint(5, VOCABULARY, ids.shape, generator=generator), masked)
    types = (torch.arange(TOKENS) >= 6).long() * there
    return ids, masked, targets, types, lengths, there.long()


def masked_loss(model, given, targets):
    return F.cross_entropy(model(**given).logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)


def contrastive_loss(model, given, targets):
    """Rows 0, 2, .. look for rows 1, 3, .. (mean of tokens, length 1)."""
    mask = given["attention_mask"][..., None].double()
    vectors = F.normalize((model(**given).last_hidden_state * mask).sum(1) / mask.sum(1))
    scores = vectors[0::2] @ vectors[1::2].T / TEMPERATURE
    return F.cross_entropy(scores, torch.arange(ROWS // 2))


def fixture(out_dir):
    """`steps-NAME.safetensors`: the parameters as they are saved, `inputs`, `targets`, `types` [S, B, T] and `lengths` [S, B], the loss of each step `losses` [S], and parameters after all, `final:NAME`;
    `steps-NAME.json`: the configuration."""
    for name, kind, loss in (("masked", BertForMaskedLM, masked_loss), ("embedding", BertModel, contrastive_loss)):
        more = dict(add_pooling_layer=False) if kind is BertModel else {}
        model = kind(BertConfig(**like_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)), **more).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(values(key, parameter.shape))
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            tensors = safetensors.torch.load_file(Path(folder) / "model.safetensors")
            config = json.loads((Path(folder) / "config.json").read_text())
        config.pop("transformers_version", None)
        ids, masked, targets, types, lengths, mask = batches(torch.Generator().manual_seed(11))
        inputs = masked if name == "masked" else ids
        model = model.double()
        groups = [dict(params=[p for p in model.parameters() if (p.dim() >= 2) == matrices], weight_decay=0.1 * matrices) for matrices in (True, False)]
        optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8)
        losses = []
        for step in range(STEPS):
            optimizer.zero_grad()
            given = dict(input_ids=inputs[step], token_type_ids=types[step], attention_mask=mask[step])
            value = loss(model, given, targets[step])
            value.backward()
            optimizer.step()
            losses.append(value.detach())
        after = {f"final:{key}": value.detach().float() for key, value in model.state_dict().items() if key in tensors}
        tensors |= dict(inputs=inputs.int(), types=types.int(), lengths=lengths.int(), losses=torch.stack(losses).float()) | after
        if name == "masked":
            tensors["targets"] = targets.int()
        (out_dir / f"steps-{name}.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
        path = out_dir / f"steps-{name}.safetensors"
        safetensors.torch.save_file({key: value.contiguous() for key, value in tensors.items()}, path)
        path.chmod(0o644)
        print(f"{path.name}: {path.stat().st_size // 1000} kB; loss {losses[0]:.4f} -> {losses[-1]:.4f}")
