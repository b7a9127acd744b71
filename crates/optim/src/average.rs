//! Running averages of parameters, which are mostly better than the parameters themselves until the learning rate has fallen.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};
use firebox_tensor::ops::to_host;
use serde::{Deserialize, Serialize};

use crate::algorithm::{Slot, lerp};
use crate::error::check;
use crate::optimizer::problem;
use crate::params::{ParamInfo, located, map_trainable, values};
use crate::{OptimError, Parts, StateTensor};

/// Which average.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum AverageConfig {
    /// An exponential moving average. In its update t = 1, 2, … the decay is min(`decay`, (1 + t) / (10 + t)), so that the start is forgotten; the first
    /// takes the parameters as they are.
    Ema {
        /// 0 ≤ decay < 1. Default 0.999.
        #[serde(default = "decay")]
        decay: f64,
    },
    /// The mean of the last parameters, taken every so many steps: LAWA (Kaddour, <https://arxiv.org/abs/2209.14981>).
    Lawa {
        /// Steps from one to the next. Default 10.
        #[serde(default = "every")]
        every: u64,
        /// How many. Default 6. Each takes as much memory as the parameters.
        #[serde(default = "count")]
        count: usize,
    },
}

fn decay() -> f64 {
    0.999
}

fn every() -> u64 {
    10
}

fn count() -> usize {
    6
}

impl AverageConfig {
    /// Checks every range.
    ///
    /// # Errors
    /// [`OptimError::Hyperparameter`].
    pub fn validate(&self) -> Result<(), OptimError> {
        match *self {
            Self::Ema { decay } => check("decay", decay, (0.0..1.0).contains(&decay), "0 <= decay < 1"),
            Self::Lawa { every, count } => {
                check("every", every as f64, every >= 1, "at least 1")?;
                check("count", count as f64, (1..=100).contains(&count), "1 to 100")
            }
        }
    }
}

/// A running average of the trainable parameters of a module, by name.
#[derive(Debug, Clone)]
pub struct Average {
    config: AverageConfig,
    /// Calls of [`update`](Self::update).
    updates: u64,
    /// Of each parameter one flat tensor (EMA), or the last ones, the oldest first (LAWA).
    kept: BTreeMap<String, Vec<Tensor<1>>>,
    /// Of the whole parameters.
    shapes: BTreeMap<String, Vec<usize>>,
    /// What it has of them, if that is not all; of others there are empty tensors.
    parts: Option<Parts>,
}

/// The name of the count of updates in a saved state.
const UPDATES: &str = "updates";

impl Average {
    /// An average of nothing yet.
    ///
    /// # Errors
    /// [`OptimError::Hyperparameter`].
    pub fn new(config: AverageConfig) -> Result<Self, OptimError> {
        config.validate()?;
        Ok(Self { config, updates: 0, kept: BTreeMap::new(), shapes: BTreeMap::new(), parts: None })
    }

    /// Keeps these parts of the parameters alone, where ranks divide them: it then takes in [parts](Self::update_parts), and together the ranks have its
    /// [state](Self::state).
    pub fn shard(&mut self, parts: Parts) {
        for (name, kept) in &mut self.kept {
            let part = parts.get(name).cloned().unwrap_or(0..0);
            for tensor in kept {
                let values = to_host(tensor.clone())[part.clone()].to_vec();
                *tensor = Tensor::from_data(TensorData::new(values, [part.len()]), &tensor.device());
            }
        }
        self.parts = Some(parts);
    }

    /// Takes in the parameters after a step.
    pub fn update<M: Module>(&mut self, module: &M) {
        self.update_parts(trainable(module));
    }

    /// The same from flat values in f32 of every trainable parameter, of its [part](Self::shard) where it has no more; each with the shape of the whole.
    pub fn update_parts(&mut self, values: impl IntoIterator<Item = (ParamInfo, Tensor<1>)>) {
        self.updates += 1;
        let wanted = match self.config {
            AverageConfig::Ema { .. } => true,
            AverageConfig::Lawa { every, .. } => self.updates.is_multiple_of(every),
        };
        if !wanted {
            return;
        }
        let Self { config, updates, kept, shapes, .. } = self;
        for (ParamInfo { name, shape, .. }, value) in values {
            shapes.entry(name.clone()).or_insert(shape);
            let kept = kept.entry(name).or_default();
            match (*config, kept.pop()) {
                (AverageConfig::Ema { .. }, None) => kept.push(value),
                (AverageConfig::Ema { .. }, Some(_)) if value.dims()[0] == 0 => kept.push(value),
                (AverageConfig::Ema { decay }, Some(mean)) => {
                    let t = *updates as f64;
                    kept.push(lerp(mean, value, 1.0, 1.0 - decay.min((1.0 + t) / (10.0 + t))));
                }
                (AverageConfig::Lawa { count, .. }, last) => {
                    kept.extend(last);
                    while kept.len() >= count {
                        kept.remove(0);
                    }
                    kept.push(value);
                }
            }
        }
    }

    /// The module with averaged parameters; as it is before the first average.
    pub fn apply<M: Module>(&self, module: M) -> M {
        map_trainable(module, &|name| self.kept.contains_key(name), &mut |name, _, param| {
            self.of(name).map_or_else(|| param.into(), Into::into)
        })
    }

    /// The average of a parameter, flat, or of what there is of it; none before the first.
    pub fn of(&self, param: &str) -> Option<Tensor<1>> {
        let kept = self.kept.get(param).filter(|kept| !kept.is_empty())?;
        let share = 1.0 / kept.len() as f64;
        Some(kept.iter().skip(1).fold(kept[0].clone() * share, |sum, value| sum + value.clone() * share))
    }

    /// The state for a checkpoint: `P.I` for each of the tensors of parameter P, and `updates`. Where ranks divide the parameters, all tensors have the shape of
    /// the whole and the values of this rank's part: those of all ranks, one after the other, are the whole.
    pub fn state(&self) -> impl Iterator<Item = StateTensor> + '_ {
        let tensors = self.kept.iter().flat_map(move |(name, kept)| {
            kept.iter().enumerate().map(move |(i, tensor)| StateTensor {
                name: format!("{name}.{i}"),
                shape: self.shapes[name].clone(),
                values: to_host(tensor.clone()),
            })
        });
        // In two parts, each exact in f32.
        let updates = [(self.updates >> 20) as f32, (self.updates & 0xf_ffff) as f32];
        // Every part knows them: that which begins the first parameter says so.
        let first = self.parts.as_ref().zip(self.shapes.keys().next());
        let says = first.is_none_or(|(parts, name)| parts.get(name).is_some_and(|part| part.start == 0));
        let values = if says { updates.to_vec() } else { vec![] };
        tensors.chain([StateTensor { name: UPDATES.to_owned(), shape: vec![2], values }])
    }

    /// Names and shapes of what [`state`](Self::state) gives, in its order.
    pub fn state_shapes(&self) -> impl Iterator<Item = (String, Vec<usize>)> + '_ {
        let tensors = self.kept.iter().flat_map(move |(name, kept)| {
            (0..kept.len()).map(move |i| (format!("{name}.{i}"), self.shapes[name].clone()))
        });
        tensors.chain([(UPDATES.to_owned(), vec![2])])
    }

    /// Replaces the state by a saved one, of which it takes its [part](Self::shard), onto the devices of the parameters of `module`.
    ///
    /// # Errors
    /// The source's own, or [`OptimError::State`]: tensors of no parameter, of a wrong shape, not finite, or missing. The average is unchanged then.
    pub fn load_state<M, E>(
        &mut self,
        module: &M,
        tensors: impl IntoIterator<Item = Result<StateTensor, E>>,
    ) -> Result<(), E>
    where
        M: Module,
        E: From<OptimError>,
    {
        let expected: BTreeMap<String, (Slot, Device)> = located(module)?
            .into_iter()
            .filter(|(info, _)| info.trainable)
            .map(|(info, device)| (info.name, (Slot::signed("", &info.shape), device)))
            .collect();
        let mut found: BTreeMap<String, BTreeMap<usize, Tensor<1>>> = BTreeMap::new();
        let (mut updates, mut unused, mut wrong) = (None, vec![], vec![]);
        for tensor in tensors {
            let tensor = tensor?;
            if tensor.name == UPDATES && tensor.values.len() == 2 {
                updates = Some(((tensor.values[0] as u64) << 20) + tensor.values[1] as u64);
                continue;
            }
            let known = tensor
                .name
                .rsplit_once('.')
                .and_then(|(param, i)| Some((param, i.parse::<usize>().ok()?, expected.get(param)?)));
            let Some((param, i, (slot, device))) = known else {
                unused.push(tensor.name);
                continue;
            };
            wrong.extend(problem(&tensor, slot));
            let values = match &self.parts {
                None => tensor.values,
                Some(parts) => {
                    parts.get(param).and_then(|part| tensor.values.get(part.clone())).unwrap_or(&[]).to_vec()
                }
            };
            let n = values.len();
            let kept = found.entry(param.to_owned()).or_default();
            kept.insert(i, Tensor::from_data(TensorData::new(values, [n]), device));
        }
        // All parameters have the same number, 0, 1, … without a gap.
        let most = found.values().map(BTreeMap::len).max().unwrap_or(0);
        let mut missing: Vec<String> = match most {
            0 => vec![],
            most => expected
                .keys()
                .flat_map(|name| (0..most).map(move |i| (name, i)))
                .filter(|(name, i)| found.get(*name).is_none_or(|kept| !kept.contains_key(i)))
                .map(|(name, i)| format!("{name}.{i}"))
                .collect(),
        };
        let Some(updates) = updates.filter(|_| missing.is_empty() && unused.is_empty() && wrong.is_empty()) else {
            if updates.is_none() {
                missing.push(UPDATES.to_owned());
            }
            return Err(OptimError::State { missing, unused, wrong }.into());
        };
        self.updates = updates;
        self.shapes = expected.into_iter().map(|(name, (slot, _))| (name, slot.shape)).collect();
        // Of an average of another kind or length the last ones are taken.
        let limit = match self.config {
            AverageConfig::Ema { .. } => 1,
            AverageConfig::Lawa { count, .. } => count,
        };
        let last = |kept: BTreeMap<usize, Tensor<1>>| {
            let skipped = kept.len().saturating_sub(limit);
            kept.into_values().skip(skipped).collect()
        };
        self.kept = found.into_iter().map(|(name, kept)| (name, last(kept))).collect();
        Ok(())
    }
}

fn trainable<M: Module>(module: &M) -> impl Iterator<Item = (ParamInfo, Tensor<1>)> {
    values(module).into_iter().filter(|(info, _)| info.trainable)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::module::Param;

    use super::*;

    #[derive(Module, Debug)]
    struct Net {
        weight: Param<Tensor<2>>,
        bias: Param<Tensor<1>>,
    }

    fn net(at: f32) -> Net {
        let device = Device::default().autodiff();
        let values = |n: usize, salt: f32| (0..n).map(|i| (at * 1.7 + salt + i as f32).sin()).collect::<Vec<f32>>();
        Net {
            weight: Param::from_tensor(Tensor::from_data(TensorData::new(values(15, 0.3), [3, 5]), &device)),
            bias: Param::from_tensor(Tensor::from_data(TensorData::new(values(5, 2.0), [5]), &device)),
        }
    }

    fn values(net: &Net) -> Vec<f64> {
        let read = |data: TensorData| data.iter::<f32>().map(f64::from).collect::<Vec<_>>();
        [read(net.weight.val().into_data()), read(net.bias.val().into_data())].concat()
    }

    fn close(a: &[f64], b: &[f64]) {
        assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6), "{a:?} {b:?}");
    }

    #[test]
    fn averages_follow_their_formulas_and_survive_a_restart() {
        for config in [AverageConfig::Ema { decay: 0.8 }, AverageConfig::Lawa { every: 2, count: 3 }] {
            let mut average = Average::new(config).unwrap();
            assert_eq!(values(&average.apply(net(9.0))), values(&net(9.0)), "nothing yet");
            let mut mean: Vec<f64> = vec![];
            let mut last: Vec<Vec<f64>> = vec![];
            for t in 1..=11u64 {
                let now = net(t as f32);
                average.update(&now);
                let now = values(&now);
                let decay = 0.8f64.min((1.0 + t as f64) / (10.0 + t as f64));
                mean = match t {
                    1 => now.clone(),
                    _ => mean.iter().zip(&now).map(|(m, x)| decay * m + (1.0 - decay) * x).collect(),
                };
                if t % 2 == 0 {
                    last.push(now);
                }
                if t == 7 {
                    let saved: Vec<StateTensor> = average.state().collect();
                    assert!(average.state_shapes().eq(saved.iter().map(|s| (s.name.clone(), s.shape.clone()))));
                    let mut again = Average::new(config).unwrap();
                    again.load_state::<_, OptimError>(&net(0.0), saved.into_iter().map(Ok)).unwrap();
                    average = again;
                }
            }
            let found = values(&average.apply(net(0.0)));
            match config {
                AverageConfig::Ema { .. } => close(&found, &mean),
                AverageConfig::Lawa { .. } => {
                    let of_three = |i: usize| last[last.len() - 3..].iter().map(|x| x[i]).sum::<f64>() / 3.0;
                    close(&found, &(0..20).map(of_three).collect::<Vec<_>>());
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        assert!(Average::new(AverageConfig::Ema { decay: 1.0 }).is_err());
        assert!(Average::new(AverageConfig::Lawa { every: 0, count: 3 }).is_err());
        let mut average = Average::new(AverageConfig::Ema { decay: 0.5 }).unwrap();
        average.update(&net(1.0));
        let saved: Vec<StateTensor> = average.state().collect();
        let mut load =
            |saved: Vec<StateTensor>| average.load_state::<_, OptimError>(&net(0.0), saved.into_iter().map(Ok));
        let error = load(saved[1..].to_vec()).unwrap_err().to_string();
        assert!(error.contains("1 missing: bias.0"), "{error}");
        let error = load(saved[..2].to_vec()).unwrap_err().to_string();
        assert!(error.contains("updates"), "{error}");
        let mut wrong = saved.clone();
        wrong[0].shape = vec![6];
        wrong[1].name = "wait.0".to_owned();
        let error = load(wrong).unwrap_err().to_string();
        assert!(error.contains("expected shape [5]") && error.contains("1 unused: wait.0"), "{error}");
        load(saved).unwrap();

        // The last of five become the first of an exponential average.
        let mut lawa = Average::new(AverageConfig::Lawa { every: 1, count: 5 }).unwrap();
        (1..=7).for_each(|t| lawa.update(&net(t as f32)));
        for (config, expected) in
            [(AverageConfig::Ema { decay: 0.9 }, 1), (AverageConfig::Lawa { every: 1, count: 2 }, 2)]
        {
            let mut other = Average::new(config).unwrap();
            other.load_state::<_, OptimError>(&net(0.0), lawa.state().map(Ok)).unwrap();
            assert!(other.kept.values().all(|kept| kept.len() == expected));
            other.update(&net(8.0));
            assert!(other.kept.values().all(|kept| kept.len() == expected));
        }
    }
}
