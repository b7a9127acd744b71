//! What goes into the decoder's matrices.

use burn::tensor::Tensor;
use firebox_tensor::ops;

use super::config::{FeedForward, NormKind};
use super::model::{Block, Transformer};
use crate::layered::{Layered, Scaled};
use crate::stage::{Flow, Staged, TokenBatch};

impl Layered for Transformer {
    /// Of attention, and of a dense feed-forward layer; experts, of which each sees other tokens, are not among them, nor what layers add to a block that they share. A
    /// matrix of low rank is its first factor.
    fn matrices(&self, i: usize) -> Vec<String> {
        let layers = self.config().reduction.layers_per_block;
        let first = i.checked_sub(1).filter(|&layer| layer < self.config().n_layers && layer.is_multiple_of(layers));
        let Some(block) = first.map(|layer| layer / layers) else { return vec![] };
        let dense = if self.blocks[block].mlp.is_some() { &["mlp.input", "mlp.output"][..] } else { &[] };
        ["attn.qkv", "attn.out"].iter().chain(dense).map(|name| format!("blocks.{block}.{name}.weight")).collect()
    }

    fn forward_observed(
        &self,
        i: usize,
        flow: Flow,
        batch: &TokenBatch,
        observe: &mut dyn FnMut(&str, Tensor<2>),
    ) -> Flow {
        self.assert_whole();
        let names = self.matrices(i);
        let (Some(layer), [qkv, out, rest @ ..]) = (i.checked_sub(1).and_then(|i| self.layer(i)), &names[..]) else {
            return self.forward_stage(i, flow, batch, None);
        };
        let Block { attn_norm, mlp_norm, .. } = layer.block;
        let x = flow.hidden();
        observe(qkv, rows(layer.input(attn_norm, x.clone())));
        let y = layer.project(x.clone(), self.attention_config());
        let y = ops::attention(y, self.attention_config(), &batch.sequence);
        observe(out, rows(y.clone()));
        let x = self.after(attn_norm, layer.attention_output(y, Some(x)));
        let [input, output] = rest else {
            return Flow::Hidden(layer.feed_forward(x.clone(), Some(x), None));
        };
        observe(input, rows(layer.input(mlp_norm, x.clone())));
        let Some(y) = layer.inner(x.clone()) else { return Flow::Hidden(x) };
        observe(
            output,
            rows(match self.config().feed_forward {
                FeedForward::Gelu => ops::gelu(y.clone()),
                FeedForward::GeluExact => ops::gelu_exact(y.clone()),
                FeedForward::QuickGelu => ops::quick_gelu(y.clone()),
                FeedForward::SwiGlu => ops::swiglu(y.clone()),
            }),
        );
        Flow::Hidden(self.after(mlp_norm, layer.outer(y, Some(x.clone())).unwrap_or(x)))
    }

    /// The norm before queries, keys, values and the feed-forward layer; the values before attention's output, where each head has its own; what SwiGLU's gate multiplies.
    fn scaled_before(&self, matrix: &str) -> Vec<Scaled> {
        let config = self.config();
        // What layers share or add, and factors, are scaled by none of these alone.
        if !config.reduction.is_none() {
            return vec![];
        }
        let Some((block, name)) = matrix.strip_suffix(".weight").and_then(|path| {
            let (at, _) = path.match_indices('.').nth(1)?;
            Some((&path[..at], &path[at + 1..]))
        }) else {
            return vec![];
        };
        let both = |layer: &str, columns: std::ops::Range<usize>, bias: bool| {
            let parts = if bias { &["weight", "bias"][..] } else { &["weight"] };
            parts
                .iter()
                .map(|part| Scaled { param: format!("{block}.{layer}.{part}"), columns: columns.clone() })
                .collect()
        };
        let norm_bias = config.bias && config.norm == NormKind::LayerNorm;
        let (qkv, heads) = (config.qkv_width(), config.n_heads * config.head_dim);
        match name {
            // A norm that follows an addition scales the residual stream as well.
            "attn.qkv" | "mlp.input" if config.norm_after() => vec![],
            "attn.qkv" => both("attn_norm", 0..config.d_model, norm_bias),
            // Experts see the same normed states, and none of them is divided with it.
            "mlp.input" if config.experts.is_none() => both("mlp_norm", 0..config.d_model, norm_bias),
            "attn.out" if config.n_heads == config.n_kv_heads => {
                both("attn.qkv", qkv - heads..qkv, config.has_qkv_bias())
            }
            "mlp.output" if config.feed_forward == FeedForward::SwiGlu => {
                both("mlp.input", config.d_ff..2 * config.d_ff, config.bias)
            }
            _ => vec![],
        }
    }
}

fn rows(x: Tensor<3>) -> Tensor<2> {
    let [b, t, d] = x.dims();
    x.reshape([b * t, d])
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::HashMap;

    use burn::module::{Module, ModuleMapper, Param};
    use firebox_tensor::device::Backend;

    use super::*;
    use crate::transformer::{TransformerConfig, presets};

    fn configs() -> Vec<TransformerConfig> {
        let llama = TransformerConfig {
            context: 8,
            d_model: 24,
            n_heads: 4,
            n_kv_heads: 4,
            head_dim: 6,
            d_ff: 20,
            ..presets::depth(2, 31)
        };
        let grouped = TransformerConfig { n_kv_heads: 2, ..llama.clone() };
        let mut gpt2 = presets::named("gpt2").unwrap();
        gpt2 = TransformerConfig {
            vocab_size: 31,
            context: 8,
            d_model: 24,
            n_layers: 2,
            n_heads: 4,
            n_kv_heads: 4,
            head_dim: 6,
            d_ff: 20,
            ..gpt2
        };
        vec![llama, grouped, gpt2]
    }

    fn hidden(model: &Transformer, batch: &TokenBatch) -> Vec<f32> {
        model.logits(batch).into_data().try_into_vec().unwrap()
    }

    #[test]
    fn observing_changes_nothing_and_sees_the_inputs() {
        let device = Backend::NdArray.device().unwrap();
        let batch = TokenBatch::plain(1, 5, vec![1, 2, 3, 4, 5], vec![2, 3, 4, 5, 6]);
        for config in configs() {
            let model = Transformer::new(&config, 3, &device).unwrap();
            let (mut plain, mut observed) = (Flow::Start, Flow::Start);
            for i in 0..model.n_stages() - 1 {
                plain = model.forward_stage(i, plain, &batch, None);
                let mut seen = vec![];
                observed =
                    model.forward_observed(i, observed, &batch, &mut |name, x| seen.push((name.to_owned(), x.dims())));
                let names: Vec<_> = seen.iter().map(|(name, _)| name.clone()).collect();
                assert_eq!(names, model.matrices(i));
                let widths: Vec<_> = seen.iter().map(|(_, dims)| *dims).collect();
                if i > 0 {
                    assert_eq!(widths, [[5, 24], [5, 24], [5, 24], [5, 20]]);
                }
                let [a, b]: [Vec<f32>; 2] =
                    [&plain, &observed].map(|flow| flow.clone().hidden().into_data().try_into_vec().unwrap());
                assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-6), "stage {i}");
            }
        }
    }

    /// Multiplies columns of parameters, or rows.
    struct Scale {
        path: Vec<String>,
        columns: HashMap<String, (std::ops::Range<usize>, Vec<f32>)>,
        rows: HashMap<String, Vec<f32>>,
        done: usize,
    }

    impl ModuleMapper for Scale {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.path.push(name.into());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.path.pop();
        }
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let path = self.path.join(".");
            let width = *param.lazy_shape().last().unwrap();
            let (columns, rows) = (self.columns.remove(&path), self.rows.remove(&path));
            if columns.is_none() && rows.is_none() {
                return param;
            }
            self.done += 1;
            param.map(|value| {
                let (shape, device) = (value.dims(), value.device());
                let mut values: Vec<f32> = value.into_data().try_into_vec().unwrap();
                if let Some((range, by)) = columns {
                    values
                        .chunks_mut(width)
                        .for_each(|row| row[range.clone()].iter_mut().zip(&by).for_each(|(v, s)| *v /= s));
                }
                if let Some(by) = rows {
                    values.chunks_mut(width).zip(&by).for_each(|(row, s)| row.iter_mut().for_each(|v| *v *= s));
                }
                Tensor::from_data(burn::tensor::TensorData::new(values, shape), &device)
            })
        }
    }

    #[test]
    fn what_scales_a_matrix_s_inputs_undoes_scaling_its_rows() {
        let device = Backend::NdArray.device().unwrap();
        let batch = TokenBatch::plain(1, 5, vec![1, 2, 3, 4, 5], vec![2, 3, 4, 5, 6]);
        let mut found = vec![];
        for config in configs() {
            let model = Transformer::new(&config, 3, &device).unwrap();
            let want = hidden(&model, &batch);
            for matrix in model.matrices(2) {
                let before = model.scaled_before(&matrix);
                found.push(before.len());
                let Some(first) = before.first() else { continue };
                let by: Vec<f32> = (0..first.columns.len()).map(|i| 0.5 + 0.1 * i as f32).collect();
                let mut scale = Scale {
                    path: vec![],
                    columns: before.iter().map(|s| (s.param.clone(), (s.columns.clone(), by.clone()))).collect(),
                    rows: [(matrix.clone(), by)].into(),
                    done: 0,
                };
                let got = hidden(&model.clone().map(&mut scale), &batch);
                assert_eq!(scale.done, before.len() + 1, "{matrix}: a path that is no parameter");
                assert!(want.iter().zip(&got).all(|(a, b)| (a - b).abs() < 1e-4 * (1.0 + a.abs())), "{matrix}");
            }
        }
        assert_eq!(found, [1, 1, 1, 1, 1, 0, 1, 1, 2, 2, 2, 0]);
    }
}
