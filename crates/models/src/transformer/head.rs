//! What follows the last block: the next token, masked tokens, classes or numbers of rows and tokens, or one vector per row; and the losses of each.
//!
//! Shapes: `B` batch rows, `T` tokens, `D` model width, `W` width of the embedding's rows, `V` vocabulary, `N` classes or values. A row is its first segment; what follows is padding.

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::{Tensor, TensorData};
use firebox_parallel::Communicator;
use firebox_tensor::ops::collective::gather_tokens;
use firebox_tensor::ops::{self, LossConfig, Pre};
use firebox_tensor::random::{Counter, Purpose};
use serde::{Deserialize, Serialize};

use super::config::{ConfigError, FeedForward, NormKind, TransformerConfig};
use super::model::{Init, Linear, Norm, Transformer};
use crate::stage::{Flow, TokenBatch};

/// What follows the last block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Head {
    /// The next token, by a product with the (tied) table of tokens.
    #[default]
    Language,
    /// Nothing: the last stage gives hidden states after the final norm, as a part of another model.
    Hidden,
    /// The tokens at places with a target, by a transform (linear, the feed-forward layer's activation, norm) and the (tied) table with a bias per token: BERT's masked language
    /// model (Devlin et al., arXiv:1810.04805, section 3.1).
    Masked,
    /// A class per row; targets are the batch's labels.
    Classes {
        /// How many.
        n: usize,
        /// How a row becomes one vector.
        pooler: Pooler,
    },
    /// A class per token; targets are the batch's.
    TokenClasses {
        /// How many.
        n: usize,
    },
    /// Numbers per row, whose loss is their mean squared error.
    Values {
        /// How many.
        n: usize,
        /// How a row becomes one vector.
        pooler: Pooler,
    },
    /// One vector per row. Some rows are anchors, each of which is to find the row that belongs to it among all others (InfoNCE, van den Oord et al.,
    /// arXiv:1807.03748; with in-batch negatives, Henderson et al., arXiv:1705.00652, section 4). Without labels, rows come in pairs, of which the first is the anchor.
    Embedding {
        /// How a row becomes one vector.
        pool: Pool,
        /// Whether vectors have length 1.
        normalize: bool,
        /// What products of vectors are divided by in the loss.
        temperature: f64,
    },
}

/// How a row becomes the one vector that a classifier sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pooler {
    /// The first token through a linear layer and tanh (BERT, RoBERTa, ALBERT).
    Tanh,
    /// The first token through a linear layer and ReLU (DistilBERT).
    Relu,
    /// The first token (ViT).
    First,
    /// The last token, of a causal decoder; the classifier has no bias then.
    Last,
}

/// How a row becomes one vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pool {
    /// The mean of its tokens.
    Mean,
    /// The first token.
    First,
}

impl Head {
    pub(super) fn is_language(&self) -> bool {
        *self == Head::Language
    }

    /// Whether it is a product with a table of tokens.
    pub fn has_table(&self) -> bool {
        matches!(self, Head::Language | Head::Masked)
    }

    pub(super) fn validate(&self, config: &TransformerConfig) -> Result<(), ConfigError> {
        let fail = |field, got: String, expected: &str| Err(ConfigError { field, got, expected: expected.into() });
        let (encoder, name) = (config.encoder.is_some(), format!("{self:?}"));
        match *self {
            Head::Language if encoder => {
                return fail(
                    "head",
                    "language".into(),
                    "must be another of an encoder, whose tokens see the next: masked, say",
                );
            }
            Head::Masked if !encoder => {
                return fail("head", "masked".into(), "must be another of a causal decoder: language, say");
            }
            Head::Classes { n, .. } if n < 2 => return fail("head.classes.n", n.to_string(), "must be at least 2"),
            Head::TokenClasses { n } if n < 2 => {
                return fail("head.token_classes.n", n.to_string(), "must be at least 2");
            }
            Head::Values { n: 0, .. } => return fail("head.values.n", "0".into(), "must be at least 1"),
            Head::Classes { n, .. } | Head::TokenClasses { n } | Head::Values { n, .. } if n > 1 << 24 => {
                return fail("head", name, "must have fewer outputs");
            }
            Head::Classes { pooler, .. } | Head::Values { pooler, .. } if (pooler == Pooler::Last) == encoder => {
                return fail(
                    "head.pooler",
                    name,
                    "must be last of a causal decoder, whose last token alone sees the row, and another of an encoder",
                );
            }
            Head::Embedding { pool: Pool::First, .. } if !encoder => {
                return fail(
                    "head.embedding.pool",
                    "first".into(),
                    "must be mean of a causal decoder, whose first token sees no other",
                );
            }
            Head::Embedding { temperature, .. } if !(temperature.is_finite() && temperature > 0.0) => {
                return fail("head.embedding.temperature", temperature.to_string(), "must be positive");
            }
            Head::Masked if config.feed_forward == FeedForward::SwiGlu => {
                return fail(
                    "feed_forward",
                    "swi_glu".into(),
                    "must be gelu or gelu_exact with a masked head, whose transform has the same",
                );
            }
            _ => {}
        }
        if config.logit_softcap != 0.0 && !self.has_table() {
            return fail("logit_softcap", config.logit_softcap.to_string(), "must be 0 without a head of tokens");
        }
        Ok(())
    }
}

/// What a head has besides a table, or in its place.
#[derive(Module, Debug)]
pub struct TaskHead {
    /// From the pooled row, `[D, D]`; of a masked language model from each token, `[D, W]`.
    pub dense: Option<Linear>,
    /// The norm of a masked language model's transform, `[W]`.
    pub norm: Option<Norm>,
    /// To classes or values, `[D, N]`.
    pub output: Option<Linear>,
    /// A masked language model's bias of each token, `[V]`.
    pub bias: Option<Param<Tensor<1>>>,
}

impl TransformerConfig {
    /// The parameters of [`TaskHead`], by path in the module, and their shapes.
    pub(super) fn head_shapes(&self) -> Vec<(&'static str, Vec<usize>)> {
        let (d, w, v) = (self.d_model, self.embed_width(), self.vocab_size);
        let dense =
            |width| [("task_head.dense.weight", vec![d, width]), ("task_head.dense.bias", vec![width])].to_vec();
        let output = |n| [("task_head.output.weight", vec![d, n]), ("task_head.output.bias", vec![n])].to_vec();
        match self.head {
            Head::Language | Head::Hidden | Head::Embedding { .. } => vec![],
            Head::Masked => {
                let norm = [("task_head.norm.weight", vec![w]), ("task_head.norm.bias", vec![w])];
                let norm = norm.into_iter().take(if self.bias && self.norm == NormKind::LayerNorm { 2 } else { 1 });
                [dense(w), norm.collect(), vec![("task_head.bias", vec![v])]].concat()
            }
            Head::TokenClasses { n } => output(n),
            Head::Classes { n, pooler } | Head::Values { n, pooler } => match pooler {
                Pooler::Tanh | Pooler::Relu => [dense(d), output(n)].concat(),
                Pooler::First => output(n),
                Pooler::Last => output(n)[..1].to_vec(),
            },
        }
    }
}

impl Init<'_> {
    pub(super) fn task_head(&self) -> Option<TaskHead> {
        let (config, std) = (self.config, self.config.init_std);
        let shapes = config.head_shapes();
        let shape = |param: &str| shapes.iter().find(|(name, _)| *name == param).map(|(_, shape)| shape);
        let linear = |part: &str| {
            let name = format!("task_head.{part}");
            let weight = shape(&format!("{name}.weight"))?;
            Some(self.linear(&name, [weight[0], weight[1]], std, shape(&format!("{name}.bias")).is_some()))
        };
        (!shapes.is_empty()).then(|| TaskHead {
            dense: linear("dense"),
            norm: shape("task_head.norm.weight").map(|shape| self.norm(shape[0])),
            output: linear("output"),
            bias: shape("task_head.bias").map(|shape| self.divided("task_head.bias", shape[0])),
        })
    }
}

/// Rows `at` of all tokens of `x`, `[B, T, D] -> [N, D]`.
fn rows_at(x: Tensor<3>, at: Vec<i32>) -> Tensor<2> {
    let ([b, t, d], n) = (x.dims(), at.len());
    ops::embedding(x.reshape([b * t, d]), at.into(), 1, n).reshape([n, d])
}

/// Rows `at` of `x`, `[N, D] -> [M, D]`.
fn rows_of(x: &Tensor<2>, at: Vec<i32>) -> Tensor<2> {
    rows_at(x.clone().unsqueeze_dim(0), at)
}

/// Each anchor is to find its own among the candidates of all `ranks`: see [`Extra::labels`](crate::Extra::labels).
fn contrastive_loss(
    vectors: Tensor<2>,
    batch: &TokenBatch,
    temperature: f64,
    ranks: Option<&Communicator>,
    loss: &LossConfig,
) -> Tensor<1> {
    let [rows, _] = vectors.dims();
    let labels = batch.extra.as_ref().map_or(&[][..], |extra| &extra.labels);
    let (anchors, candidates, mut own): (Vec<i32>, Vec<i32>, Vec<i32>) = if labels.is_empty() {
        assert!(rows.is_multiple_of(2), "an embedding's rows come in pairs, got {rows}");
        let every_second = |first: i32| (first..rows as i32).step_by(2).collect();
        (every_second(0), every_second(1), (0..rows as i32 / 2).collect())
    } else {
        assert_eq!(labels.len(), rows, "an embedding's rows have a label each");
        let (anchors, candidates): (Vec<i32>, Vec<i32>) = (0..rows as i32).partition(|&i| labels[i as usize] >= 0);
        let own = anchors.iter().map(|&i| labels[i as usize]).collect();
        (anchors, candidates, own)
    };
    let n = candidates.len();
    let (anchors, mut candidates) = (rows_of(&vectors, anchors), rows_of(&vectors, candidates));
    if let Some(ranks) = ranks {
        candidates = gather_tokens(candidates.unsqueeze_dim(0), [1, n * ranks.size()], ranks).squeeze_dim(0);
        own.iter_mut().for_each(|i| *i += (ranks.rank() * n) as i32);
    }
    ops::cross_entropy(anchors.matmul(candidates.transpose()) / temperature, &own, batch.loss_scale, loss)
}

impl Transformer {
    /// The last stage: the loss of the head, or, where there is none, hidden states.
    ///
    /// # Panics
    /// If the batch has not what the head learns from.
    pub(super) fn last_stage(&self, x: Tensor<3>, batch: &TokenBatch, step: Option<u64>) -> Flow {
        let loss = if step.is_some() { self.context.loss } else { LossConfig::default() };
        let scale = batch.loss_scale;
        let normed = |x| self.normed(x, &batch.sequence);
        Flow::Loss(match self.config().head {
            Head::Language => self.next_token_loss(x, batch, &loss),
            Head::Hidden => return Flow::Hidden(normed(x)),
            Head::Masked => self.masked_loss(x, batch, &loss),
            Head::TokenClasses { n } => {
                let logits = self.classify_tokens(normed(x), batch, step);
                let rows = batch.targets.len();
                ops::cross_entropy(logits.reshape([rows, n]), &batch.targets, scale, &loss)
            }
            Head::Classes { pooler, .. } => {
                let logits = self.classify_rows(normed(x), pooler, batch, step);
                let labels = batch.extra.as_ref().map_or(&[][..], |extra| &extra.labels);
                ops::cross_entropy(logits, labels, scale, &loss)
            }
            Head::Values { n, pooler } => {
                let got = self.classify_rows(normed(x), pooler, batch, step);
                let [rows, _] = got.dims();
                let values = batch.extra.as_ref().map_or(&[][..], |extra| &extra.values);
                assert_eq!(values.len(), rows * n, "values: {rows} rows of {n}: give the batch as many");
                let known: Vec<f32> = values.iter().map(|v| f32::from(u8::from(!v.is_nan()))).collect();
                let want: Vec<f32> = values.iter().map(|v| if v.is_nan() { 0.0 } else { *v }).collect();
                let [want, known] =
                    [want, known].map(|v| Tensor::from_data(TensorData::new(v, [rows, n]), &got.device()));
                let off = (got - want) * known;
                (off.clone() * off).sum() * (scale / n as f64)
            }
            Head::Embedding { temperature, .. } => {
                let ranks = self.context.data.as_ref().filter(|_| step.is_some());
                contrastive_loss(self.pooled(normed(x), batch), batch, temperature, ranks, &loss)
            }
        })
    }

    fn next_token_loss(&self, x: Tensor<3>, batch: &TokenBatch, loss: &LossConfig) -> Tensor<1> {
        if let Some(parallel) = self.parallel() {
            return parallel.loss(x, self, batch, loss);
        }
        let [b, t, d] = x.dims();
        let x = self.before_head(self.final_norm(x).reshape([b * t, d]));
        let (targets, scale, cap) = (batch.targets.clone(), batch.loss_scale, self.config().logit_softcap);
        if let Some(pairs) = batch.preference() {
            return self.preference_loss(x, batch, pairs);
        }
        if let Some(head) = &self.head_table().packed {
            return ops::packed_cross_entropy(x, head, &targets, scale, cap);
        }
        let head = self.head_weight();
        match batch.lesson.as_ref().and_then(|lesson| lesson.taught().soft.as_ref()) {
            Some(soft) => ops::linear_distillation(x, head, targets, scale, cap, loss, soft, None),
            None => ops::linear_cross_entropy(x, head, targets, scale, cap, loss),
        }
    }

    /// Few tokens have a target: these alone go through the transform and the table.
    fn masked_loss(&self, x: Tensor<3>, batch: &TokenBatch, loss: &LossConfig) -> Tensor<1> {
        let taught = batch.lesson.as_ref().is_some_and(|lesson| lesson.taught().soft.is_some());
        assert!(!taught, "a masked language model does not learn from a teacher's predictions");
        let mut at: Vec<i32> = (0..).zip(&*batch.targets).filter(|(_, target)| **target >= 0).map(|(i, _)| i).collect();
        if at.is_empty() {
            // One that counts nothing, for gradients of zero.
            at.push(0);
        }
        let targets: Arc<[i32]> = at.iter().map(|&i| batch.targets[i as usize]).collect();
        let divided = self.parallel().is_some_and(|parallel| parallel.sequence_parallel());
        let x = if divided {
            let [b, t, d] = x.dims();
            let x = self.transformed(x.reshape([b * t, d]));
            rows_at(self.all_tokens(x.reshape([b, t, self.config().embed_width()]), &batch.sequence), at)
        } else {
            self.transformed(rows_at(x, at))
        };
        let (cap, scale, [n, _], device) = (self.config().logit_softcap, batch.loss_scale, x.dims(), x.device());
        if self.head_table().packed.is_some() {
            let logits = self.masked_logits(x.unsqueeze_dim(0)).squeeze_dim(0);
            return ops::cross_entropy(logits, &targets, scale, loss);
        }
        // The bias is one more column of the table.
        let x = Tensor::cat(vec![x, Tensor::ones([n, 1], &device)], 1);
        let table = Tensor::cat(vec![self.head_weight(), self.task().1.unsqueeze_dim(1)], 1);
        match self.parallel() {
            Some(parallel) => parallel.cross_entropy(x, table, targets, self, batch, loss),
            None => ops::linear_cross_entropy(x, table, targets, scale, cap, loss),
        }
    }

    /// The head's parts, and a masked language model's bias of each token.
    fn task(&self) -> (&TaskHead, Tensor<1>) {
        // PANIC: `Init::task_head` makes what `head_shapes` says.
        let head = self.task_head.as_ref().expect("a head with parameters");
        let bias = head.bias.as_ref().map(Param::val);
        (head, bias.unwrap_or_else(|| Tensor::zeros([1], &self.embed.weight.lazy_device())))
    }

    /// A masked language model's transform, from what the last block gives: `[N, D] -> [N, W]`.
    fn transformed(&self, x: Tensor<2>) -> Tensor<2> {
        let (Some(dense), Some(norm)) = (&self.task().0.dense, &self.task().0.norm) else { return x };
        let (weight, bias) = dense.values();
        let bias = bias.map(|bias| self.of_tokens(bias));
        let x = ops::fused_linear(self.final_norm(x), Pre::Nothing, self.of_tokens(weight), bias, None);
        let x = match self.config().feed_forward {
            FeedForward::Gelu => ops::gelu(x),
            _ => ops::gelu_exact(x),
        };
        norm.forward_with(x, |param| self.of_tokens(param))
    }

    /// Logits of what [`transformed`](Self::transformed) gives.
    fn masked_logits(&self, x: Tensor<3>) -> Tensor<3> {
        ops::soft_cap(self.head_table().products(x) + self.task().1.unsqueeze::<3>(), self.config().logit_softcap)
    }

    /// `[B, T, D] -> [B, T, N]`
    fn classify_tokens(&self, x: Tensor<3>, batch: &TokenBatch, step: Option<u64>) -> Tensor<3> {
        let x = self.drop(x, &batch.sequence, step, "head");
        match &self.task().0.output {
            Some(output) => output.forward(x, Pre::Nothing, None),
            None => x,
        }
    }

    /// `[B, T, D] -> [B, N]`
    fn classify_rows(&self, x: Tensor<3>, pooler: Pooler, batch: &TokenBatch, step: Option<u64>) -> Tensor<2> {
        let TaskHead { dense, output, .. } = self.task().0;
        let t = batch.sequence.tokens();
        let lengths = batch.sequence.lengths();
        let token = |(row, n): (usize, &usize)| row * t + if pooler == Pooler::Last { n - 1 } else { 0 };
        let x = rows_at(x, lengths.iter().enumerate().map(token).map(|at| at as i32).collect());
        let dense = |x| match dense {
            Some(dense) => dense.forward(x, Pre::Nothing, None),
            None => x,
        };
        let x = match pooler {
            Pooler::Tanh => dense(x).tanh(),
            Pooler::Relu => burn::tensor::activation::relu(dense(x)),
            Pooler::First | Pooler::Last => x,
        };
        let dropout = self.config().dropout;
        let x = match step {
            Some(step) if dropout > 0.0 => {
                ops::dropout(x, dropout, Counter::new(self.context.seed, Purpose::Dropout, step).fork("head"))
            }
            _ => x,
        };
        match output {
            Some(output) => output.forward(x, Pre::Nothing, None),
            None => x,
        }
    }

    /// One vector per row of an embedding model, `[B, T, D] -> [B, D]`.
    fn pooled(&self, x: Tensor<3>, batch: &TokenBatch) -> Tensor<2> {
        let Head::Embedding { pool, normalize, .. } = self.config().head else {
            panic!("embed: the head is {:?}: load the model with an embedding head", self.config().head)
        };
        let ([b, t, _], lengths) = (x.dims(), batch.sequence.lengths());
        let x = match pool {
            Pool::First => rows_at(x, (0..b).map(|row| (row * t) as i32).collect()),
            Pool::Mean => {
                let share = |&n: &usize| (0..t).map(move |i| if i < n { 1.0 / n as f32 } else { 0.0 });
                let shares = TensorData::new(lengths.iter().flat_map(share).collect::<Vec<f32>>(), [b, 1, t]);
                Tensor::<3>::from_data(shares, &x.device()).matmul(x).squeeze_dim(1)
            }
        };
        if normalize { x.clone() / (x.clone() * x).sum_dim(1).sqrt().clamp_min(1e-12) } else { x }
    }

    /// Logits of the next token where there is a target, `[N, V]` in parts of at most `rows` rows: logits of other tokens never exist. As in evaluation: without dropout.
    ///
    /// # Panics
    /// As [`logits`](Self::logits).
    pub fn target_logits(&self, batch: &TokenBatch, rows: usize) -> impl Iterator<Item = Tensor<2>> {
        self.assert_whole();
        assert!(
            self.config().head.is_language(),
            "target_logits: the next token's: use row_logits, token_logits or embed"
        );
        let hidden = self.hidden(batch);
        let at: Vec<i32> = (0..).zip(&*batch.targets).filter(|(_, target)| **target >= 0).map(|(i, _)| i).collect();
        let parts: Vec<Vec<i32>> = at.chunks(rows.max(1)).map(<[i32]>::to_vec).collect();
        let logits = move |part| self.head_logits(rows_at(hidden.clone(), part).unsqueeze_dim(0)).squeeze_dim(0);
        parts.into_iter().map(logits)
    }

    /// Classes' logits, or values, of each row, `[B, N]`. As in evaluation: without dropout.
    ///
    /// # Panics
    /// As [`hidden`](Self::hidden), and if the head has none.
    pub fn row_logits(&self, batch: &TokenBatch) -> Tensor<2> {
        match self.config().head {
            Head::Classes { pooler, .. } | Head::Values { pooler, .. } => {
                self.classify_rows(self.hidden(batch), pooler, batch, None)
            }
            head => panic!("row_logits: the head is {head:?}: load the model with classes or values"),
        }
    }

    /// Classes' logits of each token, `[B, T, N]`, or a masked language model's logits of every token, `[B, T, V]`.
    ///
    /// # Panics
    /// As [`hidden`](Self::hidden), and if the head has none, or its table is divided among ranks.
    pub fn token_logits(&self, batch: &TokenBatch) -> Tensor<3> {
        match self.config().head {
            Head::TokenClasses { .. } => self.classify_tokens(self.hidden(batch), batch, None),
            Head::Masked => {
                self.assert_whole();
                let x = self.last_hidden(batch);
                let [b, t, d] = x.dims();
                let x = self.transformed(x.reshape([b * t, d]));
                self.masked_logits(x.reshape([b, t, self.config().embed_width()]))
            }
            head => panic!("token_logits: the head is {head:?}: load the model with classes of tokens, or masked"),
        }
    }

    /// The vector of each row, `[B, D]`.
    ///
    /// # Panics
    /// As [`hidden`](Self::hidden), and if the head is not an embedding's.
    pub fn embed(&self, batch: &TokenBatch) -> Tensor<2> {
        self.pooled(self.hidden(batch), batch)
    }
}
