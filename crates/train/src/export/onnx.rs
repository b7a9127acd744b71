//! The decoder as an ONNX graph with a cache of keys and values, under the names that Hugging Face's Optimum has for inputs and outputs.
//!
//! Inputs: `input_ids [B, T]`, `attention_mask [B, P + T]`, `position_ids [B, T]`, and of each block `past_key_values.N.key` and `.value [B, K, P, E]`. Outputs:
//! `logits [B, T, V]`, `present.N.key` and `.value [B, K, P + T, E]`. P may be 0.

use std::path::Path;

use firebox_compress::onnx::{Attribute, Dim, Element, Writer};
use firebox_models::transformer::hf::Family;
use firebox_models::transformer::{ExpertsConfig, FeedForward, NormKind, Positions, TransformerConfig};

use super::source::Source;
use super::{ExportError, OnnxType, hf};
use crate::TrainError;

/// Writes the folder's files.
pub fn write(source: &Source, kind: OnnxType, dir: &Path) -> Result<(), TrainError> {
    let config = &source.config;
    let mut json = source.family.config_json(config);
    if source.family == Family::Firebox {
        // Tools read from it how many layers and heads the cache has.
        let shape = [
            ("hidden_size", config.d_model),
            ("num_hidden_layers", config.n_layers),
            ("num_attention_heads", config.n_heads),
            ("num_key_value_heads", config.n_kv_heads),
            ("head_dim", config.head_dim),
            ("vocab_size", config.vocab_size),
            ("max_position_embeddings", config.context),
        ];
        shape.into_iter().for_each(|(key, value)| json[key] = value.into());
    }
    hf::side_files(source, json, dir)?;
    let writer = Writer::create(dir, "decoder").map_err(ExportError::from)?;
    Net { source, config, kind, writer }.decoder()
}

/// A graph in the making: what a method computes is a node, whose name it returns.
struct Net<'a> {
    source: &'a Source,
    config: &'a TransformerConfig,
    kind: OnnxType,
    writer: Writer,
}

/// What all blocks share.
struct Shared {
    /// 0 where a query may look, a large negative number where it may not; `[B, 1, 1, T, P + T]`.
    mask: String,
    /// Cosines and sines of the positions, `[B, T, E / 2]`.
    rotation: Option<[String; 2]>,
}

const LAST: &[(&str, Attribute<'static>)] = &[("axis", Attribute::Int(-1))];

impl Net<'_> {
    fn decoder(mut self) -> Result<(), TrainError> {
        let config = self.config;
        let (k, e) = (Dim::Fixed(config.n_kv_heads), Dim::Fixed(config.head_dim));
        let [b, t, past, total] =
            ["batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"].map(Dim::Named);
        self.writer.input("input_ids", Element::I64, &[b, t]);
        self.writer.input("attention_mask", Element::I64, &[b, total]);
        self.writer.input("position_ids", Element::I64, &[b, t]);
        for i in 0..config.n_layers {
            for part in ["key", "value"] {
                self.writer.input(&format!("past_key_values.{i}.{part}"), Element::F32, &[b, k, past, e]);
            }
        }
        let table = self.table("embed.weight", [config.vocab_size, config.d_model])?;
        let mut x = self.rows(&table, "input_ids");
        if config.positions == Positions::Learned {
            let positions = self.table("positions.weight", [config.context, config.d_model])?;
            let positions = self.rows(&positions, "position_ids");
            x = self.op("Add", &[&x, &positions]);
        }
        let shared = Shared { mask: self.mask(), rotation: self.rotation()? };
        let mut present = vec![];
        for i in 0..config.n_layers {
            let block = format!("blocks.{i}");
            let y = self.norm(&x, &format!("{block}.attn_norm"), config.d_model)?;
            let (y, cached) = self.attention(&y, &block, i, &shared)?;
            present.push(cached);
            x = self.op("Add", &[&x, &y]);
            let y = self.norm(&x, &format!("{block}.mlp_norm"), config.d_model)?;
            let y = self.feed_forward(&y, &block)?;
            x = self.op("Add", &[&x, &y]);
        }
        let x = self.norm(&x, "norm", config.d_model)?;
        let head = if config.tied { table } else { self.table("head.weight", [config.vocab_size, config.d_model])? };
        let logits = self.logits(&x, &head);
        self.writer.output("logits", &logits, Element::F32, &[b, t, Dim::Fixed(config.vocab_size)]);
        for (i, cached) in present.iter().enumerate() {
            for (part, value) in ["key", "value"].iter().zip(cached) {
                self.writer.output(&format!("present.{i}.{part}"), value, Element::F32, &[b, k, total, e]);
            }
        }
        Ok(self.writer.finish().map_err(ExportError::from)?)
    }

    fn op(&mut self, operator: &str, inputs: &[&str]) -> String {
        self.writer.node(operator, inputs, &[])
    }

    /// `x` and a number.
    fn with(&mut self, operator: &str, x: &str, number: f64) -> String {
        let number = self.writer.float(number as f32);
        self.op(operator, &[x, &number])
    }

    fn reshape(&mut self, x: &str, shape: &[i64]) -> String {
        let shape = self.writer.ints(shape, false);
        self.op("Reshape", &[x, &shape])
    }

    fn unsqueeze(&mut self, x: &str, axes: &[i64]) -> String {
        let axes = self.writer.ints(axes, false);
        self.op("Unsqueeze", &[x, &axes])
    }

    fn transpose(&mut self, x: &str, order: &[i64]) -> String {
        self.writer.node("Transpose", &[x], &[("perm", Attribute::Ints(order))])
    }

    fn gather(&mut self, table: &str, ids: &str) -> String {
        self.writer.node("Gather", &[table, ids], &[("axis", Attribute::Int(0))])
    }

    /// Parts of the last axis.
    fn split<const N: usize>(&mut self, x: &str, widths: [usize; N]) -> [String; N] {
        let widths = self.writer.ints(&widths.map(|width| width as i64), false);
        self.writer.split("Split", &[x, &widths], LAST)
    }

    /// A parameter in f32, under its name.
    fn param(&mut self, name: &str, shape: &[usize]) -> Result<String, TrainError> {
        let values = self.source.param(name)?;
        self.floats(name, shape, &values)
    }

    fn floats(&mut self, name: &str, shape: &[usize], values: &[f32]) -> Result<String, TrainError> {
        let bytes = bytemuck::cast_slice(values);
        self.writer.weight(name, Element::F32, shape, bytes).map_err(ExportError::from)?;
        Ok(name.to_owned())
    }

    /// A parameter as 8-bit integers and scales: of each column, or of each row of a table.
    fn integers(&mut self, name: &str, [rows, columns]: [usize; 2], axis: usize) -> Result<[String; 2], TrainError> {
        let values = self.source.param(name)?;
        let mut most = vec![0f32; [rows, columns][axis]];
        let channel = |i: usize| if axis == 0 { i / columns } else { i % columns };
        for (i, value) in values.iter().enumerate() {
            let most = &mut most[channel(i)];
            *most = most.max(value.abs());
        }
        // A channel of zeros has any scale.
        let scales: Vec<f32> = most.iter().map(|most| if *most == 0.0 { 1.0 } else { most / 127.0 }).collect();
        let quantized = |(i, value): (usize, &f32)| (value / scales[channel(i)]).round_ties_even() as i8;
        let quantized: Vec<i8> = values.iter().enumerate().map(quantized).collect();
        drop(values);
        let bytes = bytemuck::cast_slice(&quantized);
        self.writer.weight(name, Element::I8, &[rows, columns], bytes).map_err(ExportError::from)?;
        let scale = self.floats(&format!("{name}.scale"), &[scales.len()], &scales)?;
        Ok([name.to_owned(), scale])
    }

    /// A table of rows.
    fn table(&mut self, name: &str, shape: [usize; 2]) -> Result<Table, TrainError> {
        Ok(match self.kind {
            OnnxType::F32 => Table { values: self.param(name, &shape)?, scale: None },
            OnnxType::Int8 => {
                let [values, scale] = self.integers(name, shape, 0)?;
                Table { values, scale: Some(scale) }
            }
        })
    }

    /// Rows of a table: only these are dequantized.
    fn rows(&mut self, table: &Table, ids: &str) -> String {
        let rows = self.gather(&table.values, ids);
        let Some(scale) = &table.scale else { return rows };
        let rows = self.writer.node("Cast", &[&rows], &[("to", Attribute::Int(Element::F32 as i64))]);
        let scale = self.gather(scale, ids);
        let scale = self.unsqueeze(&scale, &[-1]);
        self.op("Mul", &[&rows, &scale])
    }

    /// A matrix, or several of `rows` rows after each other, in f32.
    fn matrix(
        &mut self,
        name: &str,
        several: Option<usize>,
        [rows, columns]: [usize; 2],
    ) -> Result<String, TrainError> {
        let shape: Vec<usize> = several.into_iter().chain([rows, columns]).collect();
        if self.kind == OnnxType::F32 {
            return self.param(name, &shape);
        }
        let [values, scale] = self.integers(name, [several.unwrap_or(1) * rows, columns], 1)?;
        let values = self.writer.node("DequantizeLinear", &[&values, &scale], &[("axis", Attribute::Int(1))]);
        let shape: Vec<i64> = shape.into_iter().map(|n| n as i64).collect();
        Ok(if several.is_some() { self.reshape(&values, &shape) } else { values })
    }

    /// `x weight + bias` of a linear layer.
    fn linear(&mut self, x: &str, name: &str, shape: [usize; 2]) -> Result<String, TrainError> {
        let weight = self.matrix(&format!("{name}.weight"), None, shape)?;
        let y = self.op("MatMul", &[x, &weight]);
        if !(self.config.bias || self.config.qkv_bias && name.ends_with("attn.qkv")) {
            return Ok(y);
        }
        let bias = self.param(&format!("{name}.bias"), &[shape[1]])?;
        Ok(self.op("Add", &[&y, &bias]))
    }

    fn norm(&mut self, x: &str, name: &str, width: usize) -> Result<String, TrainError> {
        let weight = self.param(&format!("{name}.weight"), &[width])?;
        if self.config.norm == NormKind::RmsNorm {
            return Ok(self.rms_norm(x, &weight));
        }
        let attributes = [("axis", Attribute::Int(-1)), ("epsilon", Attribute::Float(self.config.norm_eps as f32))];
        if !self.config.bias {
            return Ok(self.writer.node("LayerNormalization", &[x, &weight], &attributes));
        }
        let bias = self.param(&format!("{name}.bias"), &[width])?;
        Ok(self.writer.node("LayerNormalization", &[x, &weight, &bias], &attributes))
    }

    fn rms_norm(&mut self, x: &str, weight: &str) -> String {
        let squares = self.op("Mul", &[x, x]);
        let mean = self.writer.node("ReduceMean", &[&squares], &[("axes", Attribute::Ints(&[-1]))]);
        let mean = self.with("Add", &mean, self.config.norm_eps);
        let root = self.op("Sqrt", &[&mean]);
        let x = self.op("Div", &[x, &root]);
        self.op("Mul", &[&x, weight])
    }

    /// The values of `axis` of a shape, as a number.
    fn length(&mut self, x: &str, axis: i64) -> String {
        let shape = self.op("Shape", &[x]);
        let axis = self.writer.ints(&[axis], true);
        self.gather(&shape, &axis)
    }

    fn mask(&mut self) -> String {
        let total = self.length("attention_mask", 1);
        let past = self.length("past_key_values.0.key", 2);
        let [zero, one] = [0, 1].map(|n| self.writer.ints(&[n], true));
        let keys = self.op("Range", &[&zero, &total, &one]);
        let keys = self.unsqueeze(&keys, &[0]);
        let queries = self.op("Range", &[&past, &total, &one]);
        let queries = self.unsqueeze(&queries, &[1]);
        let mut visible = self.op("LessOrEqual", &[&keys, &queries]);
        if let Some(window) = self.config.window {
            let window = self.writer.ints(&[window as i64], true);
            let before = self.op("Sub", &[&queries, &window]);
            let inside = self.op("Greater", &[&keys, &before]);
            visible = self.op("And", &[&visible, &inside]);
        }
        let to = [("to", Attribute::Int(Element::Bool as i64))];
        let real = self.writer.node("Cast", &["attention_mask"], &to);
        let real = self.unsqueeze(&real, &[1, 2, 3]);
        let visible = self.op("And", &[&visible, &real]);
        let [zero, hidden] = [0.0, -1e30].map(|x| self.writer.float(x));
        self.op("Where", &[&visible, &zero, &hidden])
    }

    fn rotation(&mut self) -> Result<Option<[String; 2]>, TrainError> {
        let Some(turns) = self.config.rope_frequencies() else { return Ok(None) };
        let (positions, half) = (self.config.context, self.config.head_dim / 2);
        let mut table = |name: &str, of: fn(f64) -> f64| {
            let value = |i: usize| of((i / half) as f64 * turns[i % half]) as f32;
            let values: Vec<f32> = (0..positions * half).map(value).collect();
            let table = self.floats(name, &[positions, half], &values)?;
            Ok::<_, TrainError>(self.gather(&table, "position_ids"))
        };
        Ok(Some([table("rotary.cos", f64::cos)?, table("rotary.sin", f64::sin)?]))
    }

    /// Rotates the halves of heads by cosines and sines of a shape that goes with theirs.
    fn rotate(&mut self, x: &str, [cos, sin]: &[String; 2]) -> String {
        let half = self.config.head_dim / 2;
        let [a, b] = self.split(x, [half, half]);
        let product = |net: &mut Self, x: &str, y: &str| net.op("Mul", &[x, y]);
        let [ac, bs, bc, as_] =
            [product(self, &a, cos), product(self, &b, sin), product(self, &b, cos), product(self, &a, sin)];
        let [first, second] = [self.op("Sub", &[&ac, &bs]), self.op("Add", &[&bc, &as_])];
        self.writer.node("Concat", &[&first, &second], LAST)
    }

    /// Attention of block `i`, and its keys and values with those of the past.
    ///
    /// Queries are `[B, K, G, T, E]`: the G heads of a group look at the same keys, `[B, K, 1, P + T, E]`.
    fn attention(
        &mut self,
        x: &str,
        block: &str,
        i: usize,
        shared: &Shared,
    ) -> Result<(String, [String; 2]), TrainError> {
        let config = self.config;
        let (d, h, k, e) = (config.d_model, config.n_heads, config.n_kv_heads, config.head_dim);
        let (kv, group, width) = (k as i64, (h / k) as i64, e as i64);
        let qkv = self.linear(x, &format!("{block}.attn.qkv"), [d, config.qkv_width()])?;
        let [q, key, value] = self.split(&qkv, [h * e, k * e, k * e]);
        let mut q = self.reshape(&q, &[0, 0, kv, group, width]);
        let mut key = self.reshape(&key, &[0, 0, kv, width]);
        let value = self.reshape(&value, &[0, 0, kv, width]);
        if config.qk_norm {
            let weights = [format!("{block}.attn.q_norm.weight"), format!("{block}.attn.k_norm.weight")];
            let [q_weight, k_weight] = [self.param(&weights[0], &[e])?, self.param(&weights[1], &[e])?];
            (q, key) = (self.rms_norm(&q, &q_weight), self.rms_norm(&key, &k_weight));
        }
        q = self.transpose(&q, &[0, 2, 3, 1, 4]);
        key = self.transpose(&key, &[0, 2, 1, 3]);
        let value = self.transpose(&value, &[0, 2, 1, 3]);
        if let Some(rotation) = &shared.rotation {
            let of_queries = rotation.each_ref().map(|x| self.unsqueeze(x, &[1, 2]));
            let of_keys = rotation.each_ref().map(|x| self.unsqueeze(x, &[1]));
            (q, key) = (self.rotate(&q, &of_queries), self.rotate(&key, &of_keys));
        }
        let with_past = |net: &mut Self, part: &str, x: &str| {
            let past = format!("past_key_values.{i}.{part}");
            net.writer.node("Concat", &[&past, x], &[("axis", Attribute::Int(2))])
        };
        let cached = [with_past(self, "key", &key), with_past(self, "value", &value)];
        let [key, value] = cached.each_ref().map(|x| self.unsqueeze(x, &[2]));
        let key = self.transpose(&key, &[0, 1, 2, 4, 3]);
        let scores = self.op("MatMul", &[&q, &key]);
        let scores = self.with("Mul", &scores, 1.0 / (e as f64).sqrt());
        let scores = self.soft_cap(scores, config.attention_softcap);
        let scores = self.op("Add", &[&scores, &shared.mask]);
        let p = self.writer.node("Softmax", &[&scores], LAST);
        let y = self.op("MatMul", &[&p, &value]);
        let y = self.transpose(&y, &[0, 3, 1, 2, 4]);
        let y = self.reshape(&y, &[0, 0, (h * e) as i64]);
        Ok((self.linear(&y, &format!("{block}.attn.out"), [h * e, d])?, cached))
    }

    fn feed_forward(&mut self, x: &str, block: &str) -> Result<String, TrainError> {
        if let Some(experts) = self.config.experts {
            return self.experts(x, &format!("{block}.experts"), &experts);
        }
        let (d, f) = (self.config.d_model, self.config.d_ff);
        let x = self.linear(x, &format!("{block}.mlp.input"), [d, self.config.ff_in_width()])?;
        let y = match self.config.feed_forward {
            FeedForward::SwiGlu => self.swiglu(&x),
            FeedForward::Gelu => {
                let square = self.op("Mul", &[&x, &x]);
                let cube = self.op("Mul", &[&square, &x]);
                let cube = self.with("Mul", &cube, 0.044715);
                let inner = self.op("Add", &[&x, &cube]);
                let inner = self.with("Mul", &inner, (2.0 / std::f64::consts::PI).sqrt());
                self.gate(&x, "Tanh", &inner)
            }
            FeedForward::GeluExact => {
                let inner = self.with("Mul", &x, std::f64::consts::FRAC_1_SQRT_2);
                self.gate(&x, "Erf", &inner)
            }
            FeedForward::QuickGelu => {
                let inner = self.with("Mul", &x, 1.702);
                let sigmoid = self.op("Sigmoid", &[&inner]);
                self.op("Mul", &[&x, &sigmoid])
            }
        };
        self.linear(&y, &format!("{block}.mlp.output"), [f, d])
    }

    fn swiglu(&mut self, x: &str) -> String {
        let [gate, up] = self.split(x, [self.config.d_ff; 2]);
        let sigmoid = self.op("Sigmoid", &[&gate]);
        let silu = self.op("Mul", &[&gate, &sigmoid]);
        self.op("Mul", &[&silu, &up])
    }

    /// Every expert of every token, of which those that are not chosen count 0: ONNX has no product of groups of rows.
    fn experts(&mut self, x: &str, name: &str, experts: &ExpertsConfig) -> Result<String, TrainError> {
        let (d, f, n) = (self.config.d_model, self.config.d_ff, experts.n_experts);
        // In f32 always: another choice is another model.
        let router = self.param(&format!("{name}.router.weight"), &[d, n])?;
        let logits = self.op("MatMul", &[x, &router]);
        let p = self.writer.node("Softmax", &[&logits], LAST);
        let mut scores = p.clone();
        if experts.router_bias_rate > 0.0 {
            let bias = self.param(&format!("{name}.bias"), &[n])?;
            scores = self.op("Add", &[&p, &bias]);
        }
        let count = self.writer.ints(&[experts.experts_per_token as i64], false);
        let [_, chosen] = self.writer.split("TopK", &[&scores, &count], LAST);
        let weights = match experts.experts_per_token {
            1 => self.writer.node("GatherElements", &[&p, &chosen], LAST),
            _ => {
                let logits = self.writer.node("GatherElements", &[&logits, &chosen], LAST);
                self.writer.node("Softmax", &[&logits], LAST)
            }
        };
        let zeros = self.with("Mul", &p, 0.0);
        let weights = self.writer.node("ScatterElements", &[&zeros, &chosen, &weights], LAST);
        let weights = self.reshape(&weights, &[-1, n as i64]);
        let weights = self.transpose(&weights, &[1, 0]);
        let weights = self.unsqueeze(&weights, &[2]);

        let rows = self.reshape(x, &[1, -1, d as i64]);
        let input = self.matrix(&format!("{name}.input.weight"), Some(n), [d, 2 * f])?;
        let y = self.op("MatMul", &[&rows, &input]);
        let y = self.swiglu(&y);
        let output = self.matrix(&format!("{name}.output.weight"), Some(n), [f, d])?;
        let y = self.op("MatMul", &[&y, &output]);
        let y = self.op("Mul", &[&y, &weights]);
        let axes = self.writer.ints(&[0], false);
        let y = self.writer.node("ReduceSum", &[&y, &axes], &[("keepdims", Attribute::Int(0))]);
        let shape = self.op("Shape", &[x]);
        Ok(self.op("Reshape", &[&y, &shape]))
    }

    /// `x (1 + sigmoidal(inner)) / 2`
    fn gate(&mut self, x: &str, sigmoidal: &str, inner: &str) -> String {
        let y = self.op(sigmoidal, &[inner]);
        let y = self.with("Add", &y, 1.0);
        let y = self.op("Mul", &[x, &y]);
        self.with("Mul", &y, 0.5)
    }

    fn soft_cap(&mut self, x: String, cap: f64) -> String {
        if cap == 0.0 {
            return x;
        }
        let x = self.with("Div", &x, cap);
        let x = self.op("Tanh", &[&x]);
        self.with("Mul", &x, cap)
    }

    /// `x headᵀ`: of a table `[V, D]`, which Gemm transposes where it lies.
    fn logits(&mut self, x: &str, head: &Table) -> String {
        let (d, v) = (self.config.d_model as i64, self.config.vocab_size as i64);
        let weight = match &head.scale {
            None => head.values.clone(),
            Some(scale) => self.writer.node("DequantizeLinear", &[&head.values, scale], &[("axis", Attribute::Int(0))]),
        };
        let flat = self.reshape(x, &[-1, d]);
        let y = self.writer.node("Gemm", &[&flat, &weight], &[("transB", Attribute::Int(1))]);
        let shape = self.op("Shape", &["input_ids"]);
        let v = self.writer.ints(&[v], false);
        let shape = self.writer.node("Concat", &[&shape, &v], &[("axis", Attribute::Int(0))]);
        let y = self.op("Reshape", &[&y, &shape]);
        self.soft_cap(y, self.config.logit_softcap)
    }
}

/// A table of rows: floats, or integers with a scale for each row.
struct Table {
    values: String,
    scale: Option<String>,
}
