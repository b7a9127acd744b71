"""Direct preference optimization (Rafailov et al., arXiv:2305.18290) of `llama-tiny`: losses, gradients and probabilities of answers."""

import safetensors.torch
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

PAIRS, TOKENS = 2, 15
CASES = {"plain": dict(beta=0.1, label_smoothing=0.0), "conservative": dict(beta=0.5, label_smoothing=0.2)}
GRADIENTS = ["model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight", "model.layers.2.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"]
STEPS = 5


def log_probabilities(model, inputs, targets):
    logits = model(input_ids=inputs, use_cache=False).logits
    of_tokens = logits.log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    return (of_tokens * (targets >= 0)).sum(1)


def loss_of(model, inputs, targets, reference, beta, label_smoothing):
    gains = log_probabilities(model, inputs, targets) - reference
    margin = beta * (gains[0::2] - gains[1::2])
    return (-(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)).mean()


def rows(vocab, generator):
    """Answers of different lengths; each pair shares its prompt."""
    inputs = torch.randint(0, vocab, (2 * PAIRS, TOKENS), generator=generator)
    following = torch.randint(0, vocab, (2 * PAIRS, 1), generator=generator)
    targets = torch.cat((inputs[:, 1:], following), 1)
    for pair, prompt in enumerate((4, 7)):
        inputs[2 * pair + 1, :prompt] = inputs[2 * pair, :prompt]
        targets[2 * pair : 2 * pair + 2, : prompt - 1] = -100
    targets[1, -3:] = -100
    targets[2, -5:] = -100
    return inputs, targets


def fixture(save, in_float64, out_dir):
    """`input_ids`, `targets` [4, T] and `reference` [4], the better answer of each pair first; `log_probabilities` [4]; for each case `CASE.loss`, `CASE.grad.PARAMETER` and
    the `CASE.losses` before each of 5 steps of SGD at 0.05."""
    file = safetensors.torch.load_file(out_dir / "llama-tiny.safetensors")
    config = LlamaConfig.from_json_file(out_dir / "llama-tiny.json")
    generator = torch.Generator().manual_seed(23)
    inputs, targets = rows(config.vocab_size, generator)

    def model():
        made = LlamaForCausalLM(config)
        made.load_state_dict({name: file[name] for name, _ in made.named_parameters()})
        return in_float64(made.eval())

    with torch.no_grad():
        known = log_probabilities(model(), inputs, targets)
    # What another model thinks, exact in float32.
    reference = (known + torch.randn(2 * PAIRS, generator=generator).double()).float()
    out = dict(input_ids=inputs, targets=targets, reference=reference, log_probabilities=known)
    for name, case in CASES.items():
        policy, losses = model(), []
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
        for step in range(STEPS):
            optimizer.zero_grad()
            loss = loss_of(policy, inputs, targets, reference.double(), **case)
            loss.backward()
            losses.append(loss.detach())
            if step == 0:
                out[f"{name}.loss"] = loss
                out.update({f"{name}.grad.{key}": dict(policy.named_parameters())[key].grad.clone() for key in GRADIENTS})
            optimizer.step()
        out[f"{name}.losses"] = torch.stack(losses)
    save(out_dir / "preference.safetensors", out, seed=23, cases=CASES)
