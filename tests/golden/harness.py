"""Multiple choice by lm-evaluation-harness itself: a tiny Llama, rows in the forms of HellaSwag, ARC and others, and what its tasks and its class for models of transformers make of them.

    python harness.py FOLDER TASK=ROWS.jsonl...     # what the harness makes of another model and other rows: a comparison by hand

TASK is hellaswag, arc or choices, with +K behind it for K examples. The answer, as JSON, has for each the harness's results and the log-likelihoods of each row's choices.
"""

import json
import os
import pathlib
import sys
import tempfile

os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"

import safetensors.torch
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

METRICS = [dict(metric=name, aggregation="mean", higher_is_better=True) for name in ("acc", "acc_norm")]
# The harness's own files, with rows from a file.
TASKS = {
    "hellaswag": dict(include="hellaswag/hellaswag.yaml"),
    "arc": dict(include="arc/arc_easy.yaml"),
    "choices": dict(
        output_type="multiple_choice", doc_to_text="{{context}}", doc_to_choice="{{choices}}", doc_to_target="{{gold}}", metric_list=METRICS,
    ),
}  # fmt: skip


def evaluate(lm, task, rows, shots, folder):
    """Results of the harness, and the log-likelihoods of each row's choices."""
    import lm_eval.tasks
    import yaml

    name = f"local_{task}"
    config = dict(TASKS[task])
    if "include" in config:
        base = pathlib.Path(lm_eval.tasks.__file__).parent / config["include"]
        config["include"] = str(base)
    config |= dict(
        task=name, dataset_path="json", dataset_name=None, dataset_kwargs=dict(data_files=dict(validation=str(rows))), training_split=None,
        validation_split="validation", test_split="validation", fewshot_split="validation", fewshot_config=dict(sampler="first_n"),
    )  # fmt: skip
    here = pathlib.Path(folder) / f"{task}-{shots}"
    here.mkdir()
    (here / "task.yaml").write_text(yaml.safe_dump(config))
    manager = TaskManager(include_path=str(here))
    found = simple_evaluate(
        model=lm, tasks=[name], task_manager=manager, num_fewshot=shots, log_samples=True, bootstrap_iters=100, batch_size=1,
    )  # fmt: skip
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    results = {key.split(",")[0]: value for key, value in found["results"][name].items() if key.split(",")[0].startswith("acc")}
    return dict(
        task=task, shots=shots, results=results,
        log_likelihoods=[[float(response[0][0]) for response in sample["resps"]] for sample in samples],
    )  # fmt: skip


NOUNS = "boiler fire valve piston driver tender whistle river station mountain".split()
VERBS = "feeds warms opens turns watches follows repairs paints".split()
ENDS = ["and the train goes on.", "until it stops at the wall", "because nobody looked, [substeps] which is rare.", "in the École’s yard — twice.", "for 3 days."]


def sentence(i):
    return f"The {NOUNS[i % 10]} {VERBS[i * 3 % 8]} the {NOUNS[(i * 7 + 3) % 10]} {i * i % 17} times"


def rows():
    hellaswag = [
        dict(
            ctx_a=sentence(i) + [".", " [header] now.", ". [title] Steam  "][i % 3], ctx_b=["", "the Driver", "éCOLE rules", "She [step]"][i % 4],
            activity_label=["Driving trains", "How to [title] make  steam"][i % 2],
            endings=[f"{sentence(i + 5 * k)[4:]} {ENDS[(i + 2 * k) % 5]}" + " " * (k == 3) for k in range(4)], label=str(i * 5 % 4),
        )
        for i in range(10)
    ]  # fmt: skip
    arc = [
        dict(
            question=f"What does the {NOUNS[i % 10]} {VERBS[i % 8][:-1]}?",
            choices=dict(text=[f"{['the', 'a'][k % 2]} {NOUNS[(i + 3 * k) % 10]}{' of steam' * (k % 3)}" for k in range(3 + i % 3)], label=list("ABCDE" if i % 2 else "12345")[: 3 + i % 3]),
            answerKey=("ABCDE" if i % 2 else "12345")[i * 2 % 3],
        )
        for i in range(10)
    ]  # fmt: skip
    contexts = [sentence(0), "", sentence(1) + "  ", sentence(2) + ":\n", "中文 – " + sentence(3), " ".join(map(sentence, range(12)))]
    choices = [
        dict(context=context, choices=["yes", "no, never", "über 🙂 alles", "The fire"][: 2 + i % 3], gold=i % 2) for i, context in enumerate(contexts)
    ]  # fmt: skip
    return dict(hellaswag=hellaswag, arc=arc, choices=choices)


def tokenizer():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>", "<|start|>"], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False,
    )  # fmt: skip
    text = [sentence(i) + " " + ENDS[i % 5] for i in range(80)] + ["Question: What does the fire feed?\nAnswer: the boiler"] * 5
    made.train_from_iterator(text, trainer)
    return made


def fixture(out_dir):
    """`harness.safetensors`: the model's tensors; `harness.json`: its `config`, its `tokenizer`, the `rows` of each form, and the `runs`: with the tokenizer as it is, whose texts begin
    with nothing, and with one that begins texts with a token. Rows are longer than the context of 96 tokens, too."""
    generator = torch.Generator().manual_seed(7)
    plain = dict(rope_type="default", rope_theta=10000.0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=96,
            rope_parameters=plain, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0,
        )
    ).eval()  # fmt: skip
    for key, parameter in model.named_parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator) + (1.0 if "norm" in key else 0.0)
    made = json.loads(tokenizer().to_str())
    begins = processors.TemplateProcessing(single="<|start|> $A", pair="<|start|> $A <|start|> $B", special_tokens=[("<|start|>", 1)])
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for form, of_form in rows().items():
            files[form] = pathlib.Path(folder) / f"{form}.jsonl"
            files[form].write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in of_form))
        for start in (None, "<|start|>"):
            own = Tokenizer.from_str(json.dumps(made))
            if start:
                own.post_processor = begins
            tokens = PreTrainedTokenizerFast(tokenizer_object=own, bos_token=start, eos_token="<|endoftext|>")
            lm = HFLM(pretrained=model, tokenizer=tokens, backend="causal", device="cpu", dtype="float32", batch_size=1, max_length=96)
            for form, shots in (("hellaswag", 0), ("arc", 0), ("arc", 2), ("choices", 0)):
                with tempfile.TemporaryDirectory() as of_run:
                    runs.append(dict(start=start) | evaluate(lm, form, files[form], shots, of_run))
    config = json.loads(model.config.to_json_string(use_diff=False)) | {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    config.pop("transformers_version", None)
    post = json.loads(own.to_str())["post_processor"]
    # A list per line, where lists are long.
    text = dict(config=config, tokenizer=made, post_processor=post, rows=rows(), runs=runs)
    (out_dir / "harness.json").write_text(json.dumps(text, indent=None, sort_keys=True, ensure_ascii=False) + "\n")
    path = out_dir / "harness.safetensors"
    tensors = {key: value.detach().clone().contiguous() for key, value in model.named_parameters()}
    safetensors.torch.save_file(tensors, path)
    path.chmod(0o644)
    print(f"{path.name}: {path.stat().st_size // 1000} kB; harness.json: {(out_dir / 'harness.json').stat().st_size // 1000} kB")


def main(model, tasks):
    lm = HFLM(pretrained=model, backend="causal", device="cpu", dtype="float32", batch_size=1)
    answer = []
    for task in tasks:
        task, rows = task.split("=")
        task, shots = task.split("+") if "+" in task else (task, "0")
        with tempfile.TemporaryDirectory() as folder:
            answer.append(evaluate(lm, task, pathlib.Path(rows).resolve(), int(shots), folder))
    return answer


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    json.dump(main(sys.argv[1], sys.argv[2:]), sys.stdout)
    print()
