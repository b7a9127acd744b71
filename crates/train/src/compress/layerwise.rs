//! Through a model stage by stage, with what calibration text makes of each matrix's inputs.
//!
//! Of the model no more than one stage is in memory: each visit opens it anew, with parameters that are read when they are used. Between stages wait the hidden
//! states of the calibration text, which a changed stage computes again, so that the next one sees what it will get from the compressed model (GPTQ,
//! arXiv:2210.17323, section 4).

use std::collections::{BTreeMap, HashMap};

use burn::tensor::Tensor;
use firebox_compress::{CompressError, Hessian};
use firebox_models::{Flow, Layered, TokenBatch};
use firebox_tensor::ops;
use rayon::prelude::*;

use crate::TrainError;
use crate::model_io::{later, set_parameters, to_host};

/// What calibration says of a matrix's inputs.
#[derive(Debug, Clone, PartialEq)]
pub struct Inputs {
    /// Sum over rows of `x xᵀ`, `[in, in]`.
    gram: Vec<f64>,
    /// Mean absolute value of each.
    pub mean_abs: Vec<f32>,
    /// Largest absolute value of each.
    pub max_abs: Vec<f32>,
    /// Rows seen.
    pub rows: usize,
}

impl Inputs {
    fn new(width: usize) -> Self {
        Self { gram: vec![0.0; width * width], mean_abs: vec![0.0; width], max_abs: vec![0.0; width], rows: 0 }
    }

    fn add(&mut self, x: Tensor<2>) {
        let [rows, width] = x.dims();
        let gram = to_host(ops::linear(x.clone().transpose(), x.clone(), None));
        self.gram.par_iter_mut().zip(gram).for_each(|(sum, g)| *sum += f64::from(g));
        let before = self.rows as f32 / (self.rows + rows) as f32;
        self.mean_abs.iter_mut().for_each(|mean| *mean *= before);
        self.rows += rows;
        for row in to_host(x).chunks_exact(width) {
            for (i, v) in row.iter().enumerate() {
                self.mean_abs[i] += v.abs() / self.rows as f32;
                self.max_abs[i] = self.max_abs[i].max(v.abs());
            }
        }
    }

    /// Euclidean norm of each over all rows.
    pub fn norms(&self) -> Vec<f32> {
        let n = self.mean_abs.len();
        (0..n).map(|i| self.gram[i * n + i].sqrt() as f32).collect()
    }

    /// Root mean square of each.
    pub fn rms(&self) -> Vec<f32> {
        let rows = (self.rows.max(1) as f32).sqrt();
        self.norms().into_iter().map(|norm| norm / rows).collect()
    }

    /// The second moments.
    ///
    /// # Errors
    /// [`CompressError::NotFinite`]: the model is damaged.
    pub fn hessian(self) -> Result<Hessian, CompressError> {
        Hessian::new(self.mean_abs.len(), self.gram)
    }
}

/// One stage of the model, to be changed.
#[derive(Debug)]
pub struct Stage {
    /// Its number.
    pub number: usize,
    /// The parameters that it is the first to use: by path, with shape and values.
    pub parameters: BTreeMap<String, Values>,
    /// Its matrices in the order of their use, with what goes into them; nothing without calibration text.
    pub inputs: Vec<(String, Option<Inputs>)>,
    /// How little the stage changes its input: mean cosine of the hidden states before and after (ShortGPT, arXiv:2403.03853, section 3.1 has one minus it); none
    /// for embedding, head, and without calibration text.
    pub cosine: Option<f64>,
}

/// A parameter on the host.
#[derive(Debug, Clone, PartialEq)]
pub struct Values {
    /// Its shape; `[in, out]` for a matrix.
    pub shape: Vec<usize>,
    /// Its values.
    pub values: Vec<f32>,
}

/// The walk through a model.
pub struct Layerwise<'a, M> {
    open: Box<dyn Fn() -> Result<M, TrainError> + 'a>,
    batches: Vec<TokenBatch>,
    /// The hidden states of each batch before the next stage.
    flows: Vec<Flow>,
    next: usize,
}

impl<'a, M: Layered> Layerwise<'a, M> {
    /// Starts before the first stage of the model that `open` opens: on a device without gradients, with parameters that wait to be used. Without batches no stage
    /// is run.
    pub fn new(open: impl Fn() -> Result<M, TrainError> + 'a, batches: Vec<TokenBatch>) -> Self {
        let flows = vec![Flow::Start; batches.len()];
        Self { open: Box::new(open), batches, flows, next: 0 }
    }

    /// Hands the next stage to `edit`, which may change its parameters, and returns it; none behind the last.
    ///
    /// # Errors
    /// Those of opening the model, and of `edit`.
    pub fn next(
        &mut self,
        edit: impl FnOnce(&M, &mut Stage) -> Result<(), TrainError>,
    ) -> Result<Option<Stage>, TrainError> {
        let model = (self.open)()?;
        let i = self.next;
        if i == model.n_stages() {
            return Ok(None);
        }
        self.next += 1;
        let mut parameters = BTreeMap::new();
        for (info, values) in later(&model) {
            if model.first_stage(&info.name) == i {
                parameters.insert(info.name, Values { shape: info.shape, values: values() });
            }
        }
        // The last one makes losses of them, which nothing waits for.
        let run = i + 1 < model.n_stages();
        let names = model.matrices(i);
        let mut seen: HashMap<String, Inputs> = HashMap::new();
        let mut outputs = vec![];
        let mut cosine = vec![];
        for (flow, batch) in self.flows.iter().zip(&self.batches).filter(|_| run) {
            let output = model.forward_observed(i, flow.clone(), batch, &mut |name, x| {
                let width = x.dims()[1];
                seen.entry(name.to_owned()).or_insert_with(|| Inputs::new(width)).add(x);
            });
            if let (Flow::Hidden(before), Flow::Hidden(after)) = (flow, &output) {
                cosine.push(mean_cosine(before.clone(), after.clone()));
            }
            outputs.push(output);
        }
        let inputs = names.into_iter().map(|name| (seen.remove_entry(&name), name));
        let inputs = inputs.map(|(found, name)| found.map_or((name, None), |(name, inputs)| (name, Some(inputs))));
        let cosine = (!cosine.is_empty()).then(|| cosine.iter().sum::<f64>() / cosine.len() as f64);
        let mut stage = Stage { number: i, parameters, inputs: inputs.collect(), cosine };
        let before = (run && !self.batches.is_empty()).then(|| stage.parameters.clone());
        edit(&model, &mut stage)?;
        if let Some(before) = before {
            let changed = stage.parameters.iter().filter(|(name, p)| before.get(*name) != Some(p));
            let changed: HashMap<_, _> = changed.map(|(name, p)| (name.clone(), p.values.clone())).collect();
            drop(before);
            if !changed.is_empty() {
                let model = set_parameters(model, changed);
                let rerun = |(flow, batch)| model.forward_stage(i, flow, batch, None);
                outputs = std::mem::take(&mut self.flows).into_iter().zip(&self.batches).map(rerun).collect();
            }
            self.flows = outputs;
        }
        Ok(Some(stage))
    }
}

fn mean_cosine(x: Tensor<3>, y: Tensor<3>) -> f64 {
    let width = x.dims()[2];
    let (x, y) = (to_host(x), to_host(y));
    let rows = x.chunks_exact(width).zip(y.chunks_exact(width)).map(|(x, y)| {
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
        dot(x, y) / (dot(x, x) * dot(y, y)).sqrt().max(1e-30)
    });
    rows.sum::<f64>() / (x.len() / width).max(1) as f64
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use firebox_models::Staged;
    use firebox_models::transformer::{Transformer, TransformerConfig, presets};
    use firebox_tensor::device::Backend;

    use super::*;

    fn model() -> Transformer {
        let config = TransformerConfig { context: 8, d_ff: 40, ..presets::depth(2, 31) };
        Transformer::new(&config, 3, &Backend::NdArray.device().unwrap()).unwrap()
    }

    fn batches() -> Vec<TokenBatch> {
        let row = |k: i32| (0..16).map(|i| (i * k + 3) % 31).collect::<Vec<i32>>();
        vec![TokenBatch::plain(2, 8, row(5), row(7)), TokenBatch::plain(2, 8, row(11), row(3))]
    }

    #[test]
    fn every_parameter_is_visited_once_and_the_statistics_are_those_of_the_inputs() {
        let model = model();
        let mut walk = Layerwise::new(|| Ok(model.clone()), batches());
        let (mut visited, mut matrices) = (vec![], vec![]);
        while let Some(stage) = walk.next(|_, _| Ok(())).unwrap() {
            visited.extend(stage.parameters.into_keys());
            for (name, inputs) in stage.inputs {
                let inputs = inputs.unwrap();
                assert_eq!(inputs.rows, 32);
                for (i, rms) in inputs.rms().into_iter().enumerate() {
                    let (mean, max) = (inputs.mean_abs[i], inputs.max_abs[i]);
                    assert!(mean <= rms * 1.0001 && rms <= max * 1.0001, "{name} {i}");
                }
                matrices.push(name);
            }
            assert_eq!(stage.cosine.is_some(), (1..=2).contains(&stage.number));
        }
        let mut all: Vec<String> = later(&model).into_iter().map(|(info, _)| info.name).collect();
        all.sort();
        visited.sort();
        assert_eq!((visited, matrices.len()), (all, 8));
    }

    #[test]
    fn a_stage_behind_a_changed_one_sees_what_that_makes() {
        let model = model();
        let double = |_: &Transformer, stage: &mut Stage| {
            stage.parameters.values_mut().for_each(|p| p.values.iter_mut().for_each(|v| *v *= 2.0));
            Ok(())
        };
        let mut walk = Layerwise::new(|| Ok(model.clone()), batches());
        walk.next(double).unwrap();
        let seen = walk.next(|_, _| Ok(())).unwrap().unwrap();
        // The norm takes out what doubled the embedding.
        let mut walk = Layerwise::new(|| Ok(model.clone()), batches());
        walk.next(|_, _| Ok(())).unwrap();
        let plain = walk.next(|_, _| Ok(())).unwrap().unwrap();
        let [a, b] = [&seen, &plain].map(|stage| stage.inputs[0].1.as_ref().unwrap());
        assert!(a.max_abs.iter().zip(&b.max_abs).all(|(a, b)| (a - b).abs() < 1e-2));
        assert!(seen.cosine.unwrap() > plain.cosine.unwrap(), "the same change is smaller beside a doubled stream");
        assert_eq!(model.n_stages(), 4);
    }
}
