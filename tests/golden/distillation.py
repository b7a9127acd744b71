"""The loss of a student: cross-entropy and Kullback-Leibler divergence at a temperature, hidden states through a projection, attention relations."""

import torch
import torch.nn.functional as F

ROWS, WIDTH, TEACHER, VOCAB = 13, 6, 9, 31
CASES = {"even": (0.5, 2.0), "soft": (0.0, 4.0), "sharp": (0.3, 0.7)}
HEADS, QUERIES, KEYS = 2, 8, 4


def tensors(seed=11):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float32).double()  # noqa: E731
    out = dict(
        hidden=draw(ROWS, WIDTH), weight=draw(VOCAB, WIDTH), teacher_hidden=draw(ROWS, TEACHER), teacher_weight=draw(VOCAB, TEACHER),
        projection=draw(WIDTH, TEACHER), qkv=draw(ROWS, QUERIES + 2 * KEYS), teacher_qkv=draw(ROWS, 2 * (QUERIES + 2 * KEYS)),
    )  # fmt: skip
    targets = torch.randint(VOCAB, (ROWS,), generator=generator)
    targets[[3, 7]] = -100
    return out, targets


def relations(x, widths):
    """log softmax of the scaled dot products of each token with itself and those before, `[heads, ROWS, ROWS]`, for queries, keys and values."""
    causal = torch.ones(len(x), len(x), dtype=torch.bool).tril()
    for part in x.split(widths, dim=1):
        part = part.unflatten(1, (HEADS, -1)).transpose(0, 1)
        scores = part @ part.transpose(1, 2) / part.shape[2] ** 0.5
        yield scores.masked_fill(~causal, -torch.inf).log_softmax(-1).masked_fill(~causal, 0.0)


def results():
    given, targets = tensors()
    counted = targets >= 0
    out = {name: value.clone() for name, value in given.items()} | {"targets": targets.int()}

    def keep(name, loss, *leaves):
        out[f"{name}.loss"] = loss.detach()
        grads = torch.autograd.grad(loss, [leaf for _, leaf in leaves])
        out.update({f"{name}.grad.{leaf}": grad for (leaf, _), grad in zip(leaves, grads)})

    def leaf(name):
        return name, given[name].clone().requires_grad_()

    teacher = given["teacher_hidden"] @ given["teacher_weight"].T
    for name, (alpha, t) in CASES.items():
        hidden, weight = leaf("hidden"), leaf("weight")
        logits = hidden[1] @ weight[1].T
        soft = F.kl_div((logits / t).log_softmax(-1)[counted], (teacher / t).log_softmax(-1)[counted], reduction="batchmean", log_target=True)
        keep(name, alpha * F.cross_entropy(logits, targets) + (1 - alpha) * t**2 * soft, hidden, weight)
    hidden, projection = leaf("hidden"), leaf("projection")
    keep("hint", F.mse_loss((hidden[1] @ projection[1])[counted], given["teacher_hidden"][counted]), hidden, projection)
    qkv = leaf("qkv")
    widths = [QUERIES, KEYS, KEYS]
    theirs = relations(given["teacher_qkv"], [2 * width for width in widths])
    loss = sum(
        F.kl_div(mine[:, counted], theirs[:, counted], reduction="sum", log_target=True)
        for mine, theirs in zip(relations(qkv[1], widths), theirs)
    )
    keep("relations", loss / HEADS / counted.sum(), qkv)
    return out


def fixture(save, out_dir):
    save(out_dir / "distillation.safetensors", results(), seed=11, cases=CASES)
