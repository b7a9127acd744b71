"""Tiny Llamas as GGUF files that PyPI's `gguf` writes, with what transformers makes of the values that `gguf` reads from them, and what their tokenizers' makers make of texts.

`gguf-types.gguf` has each of its matrices in another format, heads narrower than their share of the width, and a byte-level BPE. `gguf-llama3.gguf` is of two layers in F32 and F16 with stretched
angles as Llama 3.1 has them (`rope_freqs.weight`), a head tied to the embedding, and a SentencePiece BPE that begins texts with a token."""

import io
import json

import gguf
import numpy as np
import safetensors.torch
import sentencepiece
import torch
from gguf import GGMLQuantizationType as T
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

SENTENCES = [f"The {n} {v} the {m}, {i * i} times." for i, (n, v, m) in enumerate(
    (n, v, m) for n in "boiler fire valve piston".split() for v in "feeds warms opens".split() for m in "driver tender whistle".split()
)]  # fmt: skip
TEXTS = ["The boiler feeds the fire, 12 times.", " It's 42°C —\tdéjà vu, 中文!\n\n🙂", "1234567 x2", ""]


def blocks(kind, shape, rng):
    """Bytes of a format, and the values that they stand for. Formats that `gguf` cannot write get random blocks with small scales."""
    values = (0.3 * rng.normal(size=shape)).astype(np.float32)
    if kind in (T.F32, T.F16):
        data = values.astype(np.float32 if kind == T.F32 else np.float16)
        return data, data.astype(np.float32)
    if kind in (T.Q4_K, T.Q6_K):
        _, size = gguf.GGML_QUANT_SIZES[kind]
        given = rng.integers(0, 256, size=(shape[0] * shape[1] // 256, size), dtype=np.uint8)
        for at in (0, 2) if kind == T.Q4_K else (208,):
            given[:, at + 1] = given[:, at + 1] & 0x03 | 0x10
        data = given.reshape(shape[0], -1)
    else:
        data = gguf.quants.quantize(values, kind)
    return data, gguf.quants.dequantize(data, kind).reshape(shape)


def unpermuted(rows, heads):
    """Rows of queries or keys in Hugging Face's order, from llama.cpp's."""
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write(path, config, kinds, rng, vocabulary, factors=None):
    """Writes the file, and gives the tensors of transformers' model."""
    d, e, ff = config.hidden_size, config.head_dim, config.intermediate_size
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(d)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(ff)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_key_length(e)
    writer.add_value_length(e)
    writer.add_rope_dimension_count(e)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    vocabulary(writer)
    shapes = dict(
        attn_q=("self_attn.q_proj", (heads * e, d)), attn_k=("self_attn.k_proj", (kv * e, d)), attn_v=("self_attn.v_proj", (kv * e, d)),
        attn_output=("self_attn.o_proj", (d, heads * e)), ffn_gate=("mlp.gate_proj", (ff, d)), ffn_up=("mlp.up_proj", (ff, d)), ffn_down=("mlp.down_proj", (d, ff)),
    )  # fmt: skip
    out = {}

    def add(name, theirs, shape, kind):
        data, values = blocks(kind, shape, rng)
        of = {"attn_q": heads, "attn_k": kv}.get(name.split(".")[-2])
        # The file has llama.cpp's order: what was drawn is the file's.
        out[theirs] = unpermuted(values, of) if of else values
        writer.add_tensor(name, data, raw_dtype=kind)

    def norm(name, theirs):
        values = (1 + 0.2 * rng.normal(size=d)).astype(np.float32)
        out[theirs] = values
        writer.add_tensor(name, values)

    add("token_embd.weight", "model.embed_tokens.weight", (config.vocab_size, d), kinds["token_embd"])
    for i in range(config.num_hidden_layers):
        for name, (theirs, shape) in shapes.items():
            add(f"blk.{i}.{name}.weight", f"model.layers.{i}.{theirs}.weight", shape, kinds[name])
        norm(f"blk.{i}.attn_norm.weight", f"model.layers.{i}.input_layernorm.weight")
        norm(f"blk.{i}.ffn_norm.weight", f"model.layers.{i}.post_attention_layernorm.weight")
    norm("output_norm.weight", "model.norm.weight")
    if not config.tie_word_embeddings:
        add("output.weight", "lm_head.weight", (config.vocab_size, d), kinds["output"])
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.chmod(0o644)
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in out.items()}


def logits(config, tensors, ids):
    model = LlamaForCausalLM(config).eval()
    missing = model.load_state_dict(tensors, strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"lm_head.weight"}, missing
    with torch.no_grad():
        return model(input_ids=ids).logits


def byte_level():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<|endoftext|>", "<|im_start|>"], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(SENTENCES, trainer)
    return made


def fixture(out_dir):
    rng = np.random.default_rng(31)
    tokenizer = byte_level()
    made = json.loads(tokenizer.to_str())["model"]
    names = sorted(made["vocab"], key=made["vocab"].get)

    def bpe(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(names)
        writer.add_token_types([3 if name.startswith("<|") else 1 for name in names])
        writer.add_token_merges([" ".join(merge) for merge in made["merges"]])
        writer.add_eos_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_add_bos_token(False)
        writer.add_chat_template("{{ messages[0].content }}")

    shape = dict(rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, max_position_embeddings=64)
    config = LlamaConfig(
        vocab_size=len(names), hidden_size=256, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0), tie_word_embeddings=False, **shape,
    )  # fmt: skip
    kinds = dict(
        token_embd=T.Q4_0, attn_q=T.Q4_K, attn_k=T.BF16, attn_v=T.F16, attn_output=T.Q8_0, ffn_gate=T.Q6_K, ffn_up=T.Q5_0, ffn_down=T.Q5_1, output=T.Q4_1,
    )  # fmt: skip
    stored, texts = {}, {}
    ids = torch.from_numpy(rng.integers(0, len(names), size=(1, 24)))
    tensors = write(out_dir / "gguf-types.gguf", config, kinds, rng, bpe)
    stored |= {"types.input_ids": ids.int(), "types.logits": logits(config, tensors, ids)}
    texts["types"] = [tokenizer.encode(text).ids for text in TEXTS]

    # Llama 3.1's: factor 8, of a first context of 8192 tokens.
    llama3 = dict(
        rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192,
    )  # fmt: skip
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 3), model_writer=written, model_type="bpe", vocab_size=340, byte_fallback=True, character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    n = pieces.vocab_size()

    def spm(writer):
        kinds = [2 if pieces.is_unknown(i) else 3 if pieces.is_control(i) else 6 if pieces.is_byte(i) else 1 for i in range(n)]
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([pieces.id_to_piece(i) for i in range(n)])
        writer.add_token_scores([pieces.get_score(i) for i in range(n)])
        writer.add_token_types(kinds)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        writer.add_add_bos_token(True)

    config = LlamaConfig(
        vocab_size=n, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        rope_parameters=llama3, tie_word_embeddings=True, **shape,
    )  # fmt: skip
    # llama.cpp's converter: what each pair's turns are divided by.
    factors = []
    for turns in 1.0 / 500000.0 ** (np.arange(0, 8, 2) / 8):
        wavelength = 2 * np.pi / turns
        smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
        factors.append(1.0 if wavelength < 8192 / 4 else 8.0 if wavelength > 8192 else 1 / ((1 - smooth) / 8.0 + smooth))
    kinds = dict.fromkeys(("token_embd", "attn_q", "attn_k", "ffn_gate"), T.F32) | dict.fromkeys(("attn_v", "attn_output", "ffn_up", "ffn_down"), T.F16)
    ids = torch.from_numpy(rng.integers(0, n, size=(1, 60)))
    tensors = write(out_dir / "gguf-llama3.gguf", config, kinds, rng, spm, np.array(factors))
    stored |= {"llama3.input_ids": ids.int(), "llama3.logits": logits(config, tensors, ids)}
    texts["llama3"] = [pieces.encode(text) for text in TEXTS]
    stored = {name: value.contiguous() for name, value in stored.items()}
    path = out_dir / "gguf-files.safetensors"
    safetensors.torch.save_file(stored, path, metadata={"firebox": json.dumps(dict(texts=TEXTS, ids=texts, chat="{{ messages[0].content }}"))})
    path.chmod(0o644)
    for name in ("gguf-types.gguf", "gguf-llama3.gguf", path.name):
        print(f"{name}: {(out_dir / name).stat().st_size // 1000} kB")
