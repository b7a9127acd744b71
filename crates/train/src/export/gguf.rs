//! GGUF for llama.cpp, as its `convert_hf_to_gguf.py` writes it: architectures `llama`, `qwen2`, `qwen3`, `qwen3moe` and `gpt2`.

use std::collections::BTreeMap;
use std::path::Path;

use firebox_compress::blocks::BlockType;
use firebox_compress::gguf::{TensorInfo, Value, Writer};
use firebox_models::transformer::hf::{Entry, Family, Piece};
use firebox_models::transformer::{FeedForward, Positions, RopeScaling, TransformerConfig};

use super::ExportError;
use super::source::Source;
use super::vocabulary;
use crate::TrainError;

const FORMAT: &str = "GGUF";

/// Writes the file. Returns the tensors whose rows `block` cannot hold, with the type that they got.
pub fn write(source: &Source, block: BlockType, out: &Path) -> Result<Vec<(String, BlockType)>, TrainError> {
    let architecture = architecture(source)?;
    let mut metadata = parameters(&source.config, architecture, block);
    let expected = "a tokenizer: llama.cpp loads no model without one".to_owned();
    let Some(tokenizer) = &source.tokenizer else {
        return Err(ExportError::Tokenizer { format: FORMAT, expected, got: "no tokenizer.json".into() }.into());
    };
    metadata.extend(vocabulary::metadata(tokenizer, source.config.vocab_size)?);

    let (items, fallbacks) = items(source, block)?;
    let infos = items.iter().map(|item| item.info.clone()).collect();
    let mut writer = Writer::create(out, &metadata, infos).map_err(ExportError::from)?;
    for Item { info, pieces } in &items {
        let mut values = arranged(source, architecture, pieces[0])?;
        values.reserve_exact(info.elements() - values.len());
        for piece in &pieces[1..] {
            values.extend(arranged(source, architecture, *piece)?);
        }
        writer.tensor(&info.name, &values).map_err(ExportError::from)?;
    }
    writer.finish().map_err(ExportError::from)?;
    Ok(fallbacks)
}

/// A tensor of the file, and those of Hugging Face that it is made of: one, or those of all experts.
struct Item<'a> {
    info: TensorInfo,
    pieces: Vec<(&'a Entry, &'a Piece)>,
}

/// Tensors that are of another type than asked for.
type Fallbacks = Vec<(String, BlockType)>;

/// All tensors, and those that are of another type than asked for.
fn items(source: &Source, block: BlockType) -> Result<(Vec<Item<'_>>, Fallbacks), ExportError> {
    let mut items: Vec<Item<'_>> = vec![];
    let mut places: BTreeMap<String, usize> = BTreeMap::new();
    let mut fallbacks = vec![];
    for (entry, piece) in source.pieces() {
        let name = name(&piece.name)?;
        if let Some(at) = places.get(&name) {
            // Another expert.
            items[*at].info.shape[0] += 1;
            items[*at].pieces.push((entry, piece));
            continue;
        }
        let mut shape = piece.shape.clone();
        if is_conv1d(source.family, piece) {
            shape.reverse();
        }
        if name.ends_with("_exps.weight") {
            shape.insert(0, 1);
        }
        // What llama.cpp's converter keeps in f32: vectors, positions, and what chooses experts.
        let kept = shape.len() < 2 || name == "position_embd.weight" || name.ends_with("ffn_gate_inp.weight");
        let columns = shape.last().copied().unwrap_or(1);
        let format = if kept { BlockType::F32 } else { fitting(block, columns) };
        if !kept && format != block {
            fallbacks.push((name.clone(), format));
        }
        places.insert(name.clone(), items.len());
        items.push(Item { info: TensorInfo::new(name, shape, format), pieces: vec![(entry, piece)] });
    }
    Ok((items, fallbacks))
}

/// The architecture that llama.cpp runs the model as.
fn architecture(source: &Source) -> Result<&'static str, ExportError> {
    source.in_a_class(FORMAT)?;
    let config = &source.config;
    let refuse = |feature: &str| Err(ExportError::NoWord { format: FORMAT, feature: feature.to_owned() });
    if config.experts.is_some_and(|experts| experts.experts_per_token == 1) {
        return refuse(
            "single expert per token (model.experts_per_token = 1) with a weight in qwen3moe's architecture",
        );
    }
    if config.window.is_some_and(|window| window < config.context) {
        return refuse("sliding window (model.window) in llama's architecture");
    }
    match config.feed_forward {
        FeedForward::GeluExact => return refuse("exact GELU in gpt2's architecture"),
        FeedForward::QuickGelu => return refuse("quick GELU in gpt2's architecture"),
        FeedForward::Gelu | FeedForward::SwiGlu => {}
    }
    if matches!(config.rope_scaling, Some(RopeScaling::Llama3 { .. })) {
        return refuse("word for llama3's stretched positions (model.rope_scaling) here");
    }
    if source.family == Family::Llama && config.bias {
        return refuse("biases in llama's architecture");
    }
    Ok(match (source.family, config.qk_norm, config.experts) {
        (Family::Gpt2, ..) => "gpt2",
        _ if config.qkv_bias => "qwen2",
        (_, true, None) => "qwen3",
        (_, true, Some(_)) => "qwen3moe",
        (_, false, _) => "llama",
    })
}

/// The smallest change that makes a row whole blocks: what llama.cpp's `quantize` falls back to.
fn fitting(block: BlockType, columns: usize) -> BlockType {
    let fits = |block: BlockType| columns.is_multiple_of(block.block_len());
    let smaller = match block {
        BlockType::Q4_K => BlockType::Q5_0,
        BlockType::Q6_K => BlockType::Q8_0,
        other => other,
    };
    [block, smaller].into_iter().find(|block| fits(*block)).unwrap_or(BlockType::F16)
}

fn parameters(config: &TransformerConfig, architecture: &str, block: BlockType) -> Vec<(String, Value)> {
    let count = |n: usize| Value::U32(u32::try_from(n).unwrap_or(u32::MAX));
    let own = |key: &str| format!("{architecture}.{key}");
    let mut metadata = vec![
        ("general.architecture".to_owned(), Value::Text(architecture.into())),
        ("general.type".to_owned(), Value::Text("model".into())),
        ("general.file_type".to_owned(), Value::U32(file_type(block))),
        ("general.quantization_version".to_owned(), Value::U32(2)),
        (own("vocab_size"), count(config.vocab_size)),
        (own("context_length"), count(config.context)),
        (own("embedding_length"), count(config.d_model)),
        (own("block_count"), count(config.n_layers)),
        (own("feed_forward_length"), count(config.d_ff)),
        (own("attention.head_count"), count(config.n_heads)),
        (own("attention.head_count_kv"), count(config.n_kv_heads)),
        (own("attention.key_length"), count(config.head_dim)),
        (own("attention.value_length"), count(config.head_dim)),
    ];
    if let Some(experts) = &config.experts {
        metadata.extend([
            (own("expert_count"), count(experts.n_experts)),
            (own("expert_used_count"), count(experts.experts_per_token)),
            (own("expert_feed_forward_length"), count(config.d_ff)),
        ]);
    }
    let eps = Value::F32(config.norm_eps as f32);
    match config.positions {
        Positions::Rotary { theta } => metadata.extend([
            (own("attention.layer_norm_rms_epsilon"), eps),
            (own("rope.dimension_count"), count(config.head_dim)),
            (own("rope.freq_base"), Value::F32(theta as f32)),
        ]),
        Positions::Learned => metadata.push((own("attention.layer_norm_epsilon"), eps)),
    }
    if let Some(RopeScaling::Linear { factor }) = config.rope_scaling {
        metadata.push((own("rope.scaling.type"), Value::Text("linear".into())));
        metadata.push((own("rope.scaling.factor"), Value::F32(factor as f32)));
    }
    metadata
}

/// `LLAMA_FTYPE_*`: what most matrices are.
fn file_type(block: BlockType) -> u32 {
    match block {
        BlockType::F32 => 0,
        BlockType::F16 => 1,
        BlockType::Q4_0 => 2,
        BlockType::Q4_1 => 3,
        BlockType::Q8_0 => 7,
        BlockType::Q5_0 => 8,
        BlockType::Q5_1 => 9,
        BlockType::Q4_K => 14,
        BlockType::Q6_K => 18,
        BlockType::BF16 => 32,
    }
}

/// llama.cpp's name of a tensor of Hugging Face; all experts of a block are one there.
pub(crate) fn name(theirs: &str) -> Result<String, ExportError> {
    const OUTSIDE: [(&str, &str); 6] = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("transformer.wte", "token_embd"),
        ("transformer.wpe", "position_embd"),
        ("transformer.ln_f", "output_norm"),
    ];
    const INSIDE: [(&str, &str); 25] = [
        ("input_layernorm", "attn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("self_attn.o_proj", "attn_output"),
        ("post_attention_layernorm", "ffn_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("block_sparse_moe.gate", "ffn_gate_inp"),
        ("block_sparse_moe.experts.w1", "ffn_gate_exps"),
        ("block_sparse_moe.experts.w3", "ffn_up_exps"),
        ("block_sparse_moe.experts.w2", "ffn_down_exps"),
        ("mlp.gate", "ffn_gate_inp"),
        ("mlp.experts.gate_proj", "ffn_gate_exps"),
        ("mlp.experts.up_proj", "ffn_up_exps"),
        ("mlp.experts.down_proj", "ffn_down_exps"),
        ("ln_1", "attn_norm"),
        ("attn.c_attn", "attn_qkv"),
        ("attn.c_proj", "attn_output"),
        ("ln_2", "ffn_norm"),
        ("mlp.c_fc", "ffn_up"),
        ("mlp.c_proj", "ffn_down"),
    ];
    fn of(table: &[(&str, &'static str)], stem: &str) -> Option<&'static str> {
        table.iter().find(|(theirs, _)| *theirs == stem).map(|(_, ours)| *ours)
    }
    let found = theirs.rsplit_once('.').and_then(|(stem, end)| {
        let block = ["model.layers.", "transformer.h."].iter().find_map(|prefix| stem.strip_prefix(prefix));
        match block.and_then(|rest| rest.split_once('.')) {
            Some((i, part)) => {
                let number = |part: &&str| part.bytes().all(|byte| byte.is_ascii_digit());
                let part: Vec<&str> = part.split('.').filter(|part| !number(part)).collect();
                Some(format!("blk.{i}.{}.{end}", of(&INSIDE, &part.join("."))?))
            }
            None => Some(format!("{}.{end}", of(&OUTSIDE, stem)?)),
        }
    });
    found.ok_or_else(|| ExportError::NoWord { format: FORMAT, feature: format!("name for {theirs}") })
}

/// GPT-2's linear layers are stored `[in, out]`.
fn is_conv1d(family: Family, piece: &Piece) -> bool {
    let tables = ["transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"];
    family == Family::Gpt2 && piece.shape.len() == 2 && !tables.contains(&piece.name.as_str())
}

/// A tensor as llama.cpp wants it: matrices `[out, in]`, and in its `llama` architecture the rows of queries and keys in the order of pairs that it rotates,
/// (0, E/2, 1, E/2 + 1, ..), where Hugging Face's rotate the halves of a head.
fn arranged(source: &Source, architecture: &str, (entry, piece): (&Entry, &Piece)) -> Result<Vec<f32>, TrainError> {
    let values = source.piece(entry, piece)?;
    let columns = piece.shape.last().copied().unwrap_or(1);
    if is_conv1d(source.family, piece) {
        let rows = piece.shape[0];
        let at = |i: usize| values[i % rows * columns + i / rows];
        return Ok((0..values.len()).map(at).collect());
    }
    let rotated = ["self_attn.q_proj.weight", "self_attn.k_proj.weight"].iter().any(|end| piece.name.ends_with(end));
    if architecture != "llama" || !rotated {
        return Ok(values);
    }
    let (e, mut out) = (source.config.head_dim, Vec::with_capacity(values.len()));
    for head in values.chunks_exact(e * columns) {
        for pair in 0..e / 2 {
            for row in [pair, pair + e / 2] {
                out.extend_from_slice(&head[row * columns..][..columns]);
            }
        }
    }
    Ok(out)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_do_not_fit_fall_back_as_in_llama_cpp() {
        assert_eq!(fitting(BlockType::Q4_K, 512), BlockType::Q4_K);
        assert_eq!(fitting(BlockType::Q4_K, 96), BlockType::Q5_0);
        assert_eq!(fitting(BlockType::Q6_K, 96), BlockType::Q8_0);
        assert_eq!(fitting(BlockType::Q8_0, 40), BlockType::F16);
        assert_eq!(fitting(BlockType::Q4_K, 40), BlockType::F16);
    }

    #[test]
    fn names() {
        assert_eq!(name("model.layers.11.self_attn.o_proj.weight").unwrap(), "blk.11.attn_output.weight");
        assert_eq!(name("transformer.h.0.mlp.c_fc.bias").unwrap(), "blk.0.ffn_up.bias");
        assert_eq!(name("lm_head.weight").unwrap(), "output.weight");
        assert_eq!(name("model.layers.2.mlp.experts.63.up_proj.weight").unwrap(), "blk.2.ffn_up_exps.weight");
        assert!(name("model.layers.0.mlp.shared.weight").is_err());
    }
}
