//! A family's table of names, and the tensors that it makes of a model's parameters.

use std::collections::{BTreeMap, BTreeSet};

use super::pieces::{Entry, Piece};
use super::{Family, experts, vit};
use crate::transformer::config::{FeedForward, NormKind, Positions, TransformerConfig};

/// A part of the model and what a family calls it, both without `.weight` and `.bias`; or a parameter that has no such end, and its tensor. `#` stands for a block's number. Where theirs
/// are several, they stand side by side in ours.
pub(super) type Pair = (&'static str, &'static [&'static str]);

/// What the classes of a family call their tensors.
#[derive(Clone, Copy)]
pub(super) struct Names {
    /// What the class with a head has before the names of the one without.
    pub base: &'static str,
    /// Whether matrices are `[out, in]`: everywhere but in GPT-2, whose heads for tasks alone have such.
    pub transposed: bool,
    /// The parts of all models.
    pub body: &'static [Pair],
    /// The parts of the model's head.
    pub head: &'static [Pair],
    /// How names of all heads begin, which have nothing before them.
    pub heads: &'static [&'static str],
    /// A second name of a tensor, under which some versions write it, and the first.
    pub copies: &'static [(&'static str, &'static str)],
    /// How names of buffers end, which are no parameters and which each program makes itself.
    pub buffers: &'static [&'static str],
}

impl Names {
    /// What stands before names that are no head's in the file of a class with this config's head.
    pub fn prefix(&self, config: &TransformerConfig) -> &'static str {
        if config.head.is_of_a_class_with_a_head() { self.base } else { "" }
    }

    fn is_of_a_head(&self, name: &str) -> bool {
        self.heads.iter().any(|root| name.starts_with(root))
    }

    fn with_prefix(&self, config: &TransformerConfig, name: &str) -> String {
        if self.is_of_a_head(name) { name.into() } else { format!("{}{name}", self.prefix(config)) }
    }

    /// Their names of a parameter.
    fn of(&self, config: &TransformerConfig, param: &str) -> Option<Vec<String>> {
        let pairs = || self.body.iter().chain(self.head);
        let block = param.strip_prefix("blocks.").and_then(|rest| rest.split('.').next());
        let ours = match block {
            Some(number) => param.replacen(&format!("blocks.{number}."), "blocks.#.", 1),
            None => param.to_owned(),
        };
        let part = ours.rsplit_once('.').map_or(&ours[..], |(part, _)| part);
        let (theirs, end) = match pairs().find(|(known, _)| *known == ours) {
            Some((_, theirs)) => (theirs, ""),
            None => (pairs().find(|(known, _)| *known == part).map(|(_, theirs)| theirs)?, &ours[part.len()..]),
        };
        let name = |name: &&str| self.with_prefix(config, &(name.replace('#', block.unwrap_or_default()) + end));
        Some(theirs.iter().map(name).collect())
    }
}

/// A parameter of the model, before a family names it.
struct Parameter {
    name: String,
    shape: Vec<usize>,
    /// Whether it is a linear layer's matrix, `[in, out]`.
    matrix: bool,
    /// Widths of what stands side by side.
    widths: Vec<usize>,
}

/// Every parameter of the model in order.
#[derive(Default)]
struct Parameters(Vec<Parameter>);

impl Parameters {
    fn whole(&mut self, name: &str, shape: &[usize]) {
        let widths = shape.last().copied().into_iter().collect();
        self.0.push(Parameter { name: name.into(), shape: shape.into(), matrix: false, widths });
    }

    fn norm(&mut self, name: &str, d: usize, bias: bool) {
        for part in ["weight", "bias"].into_iter().take(if bias { 2 } else { 1 }) {
            self.whole(&format!("{name}.{part}"), &[d]);
        }
    }

    /// Of a rank that is not 0, two matrices.
    fn linear(&mut self, name: &str, inputs: usize, widths: &[usize], bias: bool, rank: usize) {
        let outputs: usize = widths.iter().sum();
        if rank > 0 {
            self.whole(&format!("{name}.weight"), &[inputs, rank]);
            self.whole(&format!("{name}.factor"), &[rank, outputs]);
        } else {
            let (name, shape) = (format!("{name}.weight"), vec![inputs, outputs]);
            self.0.push(Parameter { name, shape, matrix: true, widths: widths.into() });
        }
        if bias {
            let (name, shape) = (format!("{name}.bias"), vec![outputs]);
            self.0.push(Parameter { name, shape, matrix: false, widths: widths.into() });
        }
    }

    fn tables(&mut self, config: &TransformerConfig, norm_bias: bool) {
        let (d, v, e) = (config.d_model, config.vocab_size, config.embed_width());
        self.whole("embed.weight", &[v, e]);
        if e < d {
            self.linear("embed_proj", e, &[d], config.embed_proj_bias(), 0);
        }
        if config.positions == Positions::Learned {
            self.whole("positions.weight", &config.positions_shape());
        }
        if let Some(image) = &config.image {
            for part in ["class", "bias"].into_iter().take(1 + usize::from(image.bias)) {
                self.whole(&format!("patches.{part}"), &[d]);
            }
        }
        if config.token_types() > 0 {
            self.whole("token_types.weight", &[config.token_types(), e]);
        }
        if config.encoder.is_some_and(|encoder| encoder.embed_norm) {
            self.norm("embed_norm", e, norm_bias);
        }
    }

    fn block(&mut self, config: &TransformerConfig, i: usize, norm_bias: bool) {
        let [rank_qkv, rank_out, rank_input, rank_output] = config.matrices().map(|matrix| matrix.rank);
        let (d, f) = (config.d_model, config.d_ff);
        let (h, k) = (config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim);
        let name = |part: &str| format!("blocks.{i}.{part}");
        self.norm(&name("attn_norm"), d, norm_bias);
        self.linear(&name("attn.qkv"), d, &[h, k, k], config.has_qkv_bias(), rank_qkv);
        if config.qk_norm {
            self.norm(&name("attn.q_norm"), config.head_dim, false);
            self.norm(&name("attn.k_norm"), config.head_dim, false);
        }
        self.linear(&name("attn.out"), h, &[d], config.bias, rank_out);
        self.norm(&name("mlp_norm"), d, norm_bias);
        if config.experts.is_some() {
            return;
        }
        let input: &[_] = if config.feed_forward == FeedForward::SwiGlu { &[f, f] } else { &[f] };
        self.linear(&name("mlp.input"), d, input, config.bias, rank_input);
        self.linear(&name("mlp.output"), f, &[d], config.bias, rank_output);
    }

    fn heads(&mut self, config: &TransformerConfig) {
        let (d, v, e) = (config.d_model, config.vocab_size, config.embed_width());
        if config.head_projects() {
            self.whole("head_proj.weight", &[d, e]);
        }
        if config.head.has_table() && !config.tied {
            self.whole("head.weight", &[v, e]);
        }
        for (name, shape) in config.head_shapes() {
            match (&shape[..], name.strip_suffix(".weight")) {
                (&[inputs, outputs], Some(part)) => self.linear(part, inputs, &[outputs], false, 0),
                _ => self.whole(name, &shape),
            }
        }
    }
}

/// Every parameter of the model in order, with the tensors that it is stored as: under our names where the family has none.
pub(super) fn entries(family: Family, config: &TransformerConfig) -> Vec<Entry> {
    let names = family.names(config);
    let norm_bias = config.bias && config.norm == NormKind::LayerNorm;
    let mut entries = vec![];
    let filled = |fill: &dyn Fn(&mut Parameters)| {
        let mut parameters = Parameters::default();
        fill(&mut parameters);
        let entry = |parameter| entry(names.as_ref(), config, parameter);
        parameters.0.into_iter().map(entry).collect::<Vec<Entry>>()
    };
    entries.extend(filled(&|to| to.tables(config, norm_bias)));
    for i in 0..config.n_blocks() {
        entries.extend(filled(&|to| to.block(config, i, norm_bias)));
        if let Some(of_block) = &config.experts {
            let prefix = names.filter(|_| family == Family::Llama).map(|names| names.prefix(config));
            entries.extend(experts::entries(prefix, config, of_block, i));
        }
    }
    for (name, shape) in config.delta_shapes() {
        entries.push(Entry::whole(&name, &shape, &name));
    }
    if !config.norm_after() {
        entries.extend(filled(&|to| to.norm("norm", config.d_model, norm_bias)));
    }
    entries.extend(filled(&|to| to.heads(config)));
    entries
}

fn entry(names: Option<&Names>, config: &TransformerConfig, parameter: Parameter) -> Entry {
    let entry = named(names, config, parameter);
    match (names, &config.image) {
        (Some(_), Some(image)) => vit::of_images(entry, image),
        _ => entry,
    }
}

fn named(names: Option<&Names>, config: &TransformerConfig, parameter: Parameter) -> Entry {
    let Parameter { name, shape, matrix, widths } = parameter;
    let Some((names, theirs)) = names.and_then(|names| Some((names, names.of(config, &name)?))) else {
        return Entry::whole(&name, &shape, &name);
    };
    let transposed = matrix && (names.transposed || name.starts_with("task_head."));
    if !transposed && theirs.len() == 1 {
        return Entry::whole(&name, &shape, &theirs[0]);
    }
    let width = shape.last().copied().unwrap_or(1);
    let widths = if theirs.len() == 1 { vec![width] } else { widths };
    debug_assert_eq!(theirs.len(), widths.len(), "{name}: as many names as parts");
    let rows = shape.iter().product::<usize>() / width.max(1);
    let mut first = 0;
    let piece = |(name, n): (String, usize)| {
        let columns = (first, n);
        first += n;
        let shape = match shape.len() {
            1 => vec![n],
            _ if transposed => vec![n, rows],
            _ => vec![rows, n],
        };
        Piece { name, shape, rows: (0, rows), columns, transposed }
    };
    let pieces = theirs.into_iter().zip(widths).map(piece).collect();
    Entry { param: name, shape, pieces }
}

impl Family {
    /// The names under which a file's tensors are in [`entries`](Self::entries), by their names in the file: with or without what the class with a head has before the others' names, as
    /// old versions call norms' parameters (`gamma`, `beta`). Buffers, copies of tied tensors, and the head of another class where this one has none, are not among them.
    pub fn canonical<'a>(
        self,
        config: &TransformerConfig,
        names: impl Iterator<Item = &'a str>,
    ) -> BTreeMap<String, String> {
        let all: BTreeSet<&str> = names.collect();
        let Some(table) = self.names(config) else {
            return all.into_iter().map(|name| (name.to_owned(), name.to_owned())).collect();
        };
        let has_prefix = !table.base.is_empty() && all.iter().any(|name| name.starts_with(table.base));
        let tied = table.of(config, "head.weight").filter(|_| config.tied).unwrap_or_default();
        let rename = |name: &&str| {
            if table.buffers.iter().any(|end| name.ends_with(end)) {
                return None;
            }
            let modern = match name.rsplit_once('.') {
                Some((part, "gamma")) => format!("{part}.weight"),
                Some((part, "beta")) => format!("{part}.bias"),
                _ => (*name).to_owned(),
            };
            if table.is_of_a_head(&modern) {
                let first = table.copies.iter().find(|(copy, _)| *copy == modern).map(|(_, first)| *first);
                let dropped = !config.head.is_of_a_class_with_a_head()
                    || tied.contains(&modern)
                    || first.is_some_and(|first| all.contains(first));
                return (!dropped).then(|| first.map_or(modern, str::to_owned));
            }
            Some(match (has_prefix, modern.strip_prefix(table.base)) {
                (true, Some(bare)) => format!("{}{bare}", table.prefix(config)),
                // One of our names.
                (true, None) => modern,
                (false, _) => format!("{}{modern}", table.prefix(config)),
            })
        };
        all.iter().filter_map(|name| Some(((*name).to_owned(), rename(name)?))).collect()
    }
}
