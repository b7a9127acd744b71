#!/usr/bin/env python3
"""What transformers makes of a GGUF file, and of the folder that Firebox imported from it.

    python pretrained.py FILE.gguf FOLDER REQUEST.json LOGITS.safetensors

REQUEST has `texts` to divide into tokens, `chats` that end with a question, and how many tokens to answer, `new`. The answer, as JSON, has the `tokens` of each text, in which names of special
tokens are these, and the `prompts` that the chat template makes of the chats, both by the tokenizer of the file and by that of the folder; the `greedy` answers; and whether all parameters
are the `same`. LOGITS gets `logits` at the first prompt's tokens, [T, V].
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(gguf: Path, folder: Path, request: dict, out: Path) -> dict:
    torch.set_num_threads(2)
    of_file = dict(pretrained_model_name_or_path=gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(**of_file, dtype=torch.float32).eval()
    imported = AutoModelForCausalLM.from_pretrained(folder).eval()
    ours = imported.state_dict()
    answer = {"same": all(torch.equal(value, ours.pop(name)) for name, value in model.state_dict().items()) and not ours}
    for name, tokenizer in (("file", AutoTokenizer.from_pretrained(**of_file)), ("folder", AutoTokenizer.from_pretrained(folder))):
        prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"] for chat in request["chats"]]
        answer[name] = {
            "tokens": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in request["texts"]],
            "prompts": [list(prompt) for prompt in prompts],
            "eos": tokenizer.eos_token_id,
        }
    prompts = [torch.tensor([prompt]) for prompt in answer["file"]["prompts"]]
    with torch.no_grad():
        save_file({"logits": model(prompts[0]).logits[0].float().contiguous()}, out)
        written = [model.generate(ids, max_new_tokens=request["new"], do_sample=False)[0, ids.shape[1] :].tolist() for ids in prompts]
    return answer | {"greedy": written}


if __name__ == "__main__":
    if len(sys.argv) != 5:
        raise SystemExit("usage: pretrained.py FILE.gguf FOLDER REQUEST.json LOGITS.safetensors")
    gguf, folder, request, out = map(Path, sys.argv[1:])
    json.dump(main(gguf, folder, json.loads(request.read_text()), out), sys.stdout)
    print()
