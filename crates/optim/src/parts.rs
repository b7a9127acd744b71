//! An optimizer that has parts of the parameters: its share where several ranks divide the state among themselves (ZeRO, Rajbhandari et al.,
//! arXiv:1910.02054).

use std::collections::BTreeMap;
use std::ops::Range;

use burn::module::Module;
use burn::tensor::Tensor;
use firebox_tensor::ops::{is_bf16, to_bf16_from, to_f32};

use crate::algorithm::{ParamState, Slot};
use crate::optimizer::{Optimizer, STEPS, Step, rounding, rows, state_name, trainable};
use crate::{Clipping, NamedGrads, OptimError, ParamInfo};

/// Which elements of each parameter an optimizer has; those that it has nothing of are not in it.
pub type Parts = BTreeMap<String, Range<usize>>;

impl Optimizer {
    /// Divides the trainable parameters of `module` among `ranks`: one that is updated by elements is cut into even parts, any other goes as a whole to
    /// the rank that has the least of those so far.
    ///
    /// # Errors
    /// [`OptimError::DuplicateName`].
    pub fn divide<M: Module>(&self, module: &M, ranks: usize) -> Result<Vec<Parts>, OptimError> {
        let mut parts = vec![Parts::new(); ranks.max(1)];
        let mut whole = vec![0; parts.len()];
        for (name, (info, _)) in trainable(module)? {
            let n = info.elements();
            if self.is_element_wise(&info) {
                let n_parts = parts.len();
                for (i, parts) in parts.iter_mut().enumerate() {
                    let part = n * i / n_parts..n * (i + 1) / n_parts;
                    if !part.is_empty() {
                        parts.insert(name.clone(), part);
                    }
                }
            } else {
                let least = (0..whole.len()).min_by_key(|&i| whole[i]).unwrap_or(0);
                whole[least] += n;
                parts[least].insert(name, 0..n);
            }
        }
        Ok(parts)
    }

    /// Whether every parameter is updated by elements, so that any part of it can be anywhere.
    ///
    /// # Errors
    /// [`OptimError::DuplicateName`].
    pub fn works_by_elements<M: Module>(&self, module: &M) -> Result<bool, OptimError> {
        Ok(trainable(module)?.values().all(|(info, _)| self.is_element_wise(info)))
    }

    fn is_element_wise(&self, info: &ParamInfo) -> bool {
        let to = self.rules.assign(info);
        to.adaptive.is_none() && to.algorithm.rule().is_element_wise(to.kind)
    }

    /// Keeps the state of `parts` alone, one of those that [`divide`](Self::divide) returns. From now on gradients are those of the parts, `module` in
    /// [`step`](Self::step) still has its whole parameters of which only the parts are updated, and [`state`](Self::state) has what is left.
    ///
    /// # Errors
    /// [`OptimError::DuplicateName`].
    pub fn shard<M: Module>(&mut self, module: &M, parts: Parts) -> Result<(), OptimError> {
        let trainable = trainable(module)?;
        let cut = |(name, state): (String, ParamState)| {
            let (part, (_, device)) = parts.get(&name).zip(trainable.get(&name))?;
            Some((name, state.part(part, device)))
        };
        self.state = std::mem::take(&mut self.state).into_iter().filter_map(cut).collect();
        self.parts = Some(parts);
        Ok(())
    }

    /// One [clipped step](Self::step_clipped) of parts that are in no module: `values` has each of them, flat and without autodiff, and `module` says no more
    /// than names and shapes. A parameter that nobody has made yet is not made.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn step_parts<M: Module>(
        &mut self,
        lr: f64,
        clipping: &Clipping,
        module: &M,
        values: &mut BTreeMap<String, Tensor<1>>,
        grads: &mut NamedGrads,
    ) -> Result<(), OptimError> {
        self.validate_lr(lr)?;
        let trainable = trainable(module)?;
        self.check_gradients(&trainable, grads)?;
        self.prepare(&trainable);
        let step = Step { lr, grad_scale: 1.0, clipping, keep_zeros: self.keep_zeros };
        for (name, grad) in std::mem::take(grads) {
            let found = values.remove(&name).zip(self.state.get_mut(&name)).zip(trainable.get(&name));
            let Some(((value, state), (info, _))) = found else { continue };
            let (half, seed) = (is_bf16(&value), rounding(state));
            let mut value = step.take((self.rules.assign(info), rows(info)), to_f32(value), grad, state);
            if half {
                let first = self.parts.as_ref().and_then(|parts| parts.get(&name)).map_or(0, |part| part.start);
                value = to_bf16_from(value, seed, first);
            }
            values.insert(name, value);
        }
        Ok(())
    }

    /// The parts, if it does not have all.
    pub fn parts(&self) -> Option<&Parts> {
        self.parts.as_ref()
    }

    /// Drops the state of parameters that `module` does not have, or does not train.
    ///
    /// # Errors
    /// [`OptimError::DuplicateName`].
    pub fn forget_others<M: Module>(&mut self, module: &M) -> Result<(), OptimError> {
        let trainable = trainable(module)?;
        self.state.retain(|name, _| trainable.contains_key(name));
        Ok(())
    }

    /// Names and shapes of the state of whole parameters, in the order of [`state`](Self::state), whatever this optimizer has of it.
    ///
    /// # Errors
    /// [`OptimError::DuplicateName`].
    pub fn whole_state_shapes<M: Module>(&self, module: &M) -> Result<Vec<(String, Vec<usize>)>, OptimError> {
        let shapes = trainable(module)?.into_iter().flat_map(|(name, (info, _))| {
            let to = self.rules.assign(&info);
            let geometry = crate::algorithm::Geometry { kind: to.kind, shape: &info.shape };
            let mut slots = to.algorithm.rule().slots(geometry);
            slots.push(Slot::unsigned(STEPS, &[1]));
            slots.into_iter().map(move |slot| (state_name(&name, slot.name), slot.shape)).collect::<Vec<_>>()
        });
        Ok(shapes.collect())
    }

    /// What this optimizer has of the state tensor of this name, flat: the parts of all ranks, one after the other, are the whole of it.
    pub fn state_part(&self, tensor: &str) -> Vec<f32> {
        let found = tensor.rsplit_once('.').and_then(|(param, kind)| Some((self.state.get(param)?, param, kind)));
        let Some((state, param, kind)) = found else { return vec![] };
        if kind == STEPS {
            // Every part knows it: the first says so.
            let first = self.parts.as_ref().is_none_or(|parts| parts.get(param).is_some_and(|part| part.start == 0));
            return if first { vec![state.steps as f32] } else { vec![] };
        }
        let slot = state.slots.iter().position(|slot| slot.name == kind);
        slot.map(|i| state.states[i].read()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::module::Param;
    use burn::tensor::{Device, Tensor, TensorData};
    use firebox_tensor::ops::{Precision, to_bf16};

    use super::*;
    use crate::{AdamWConfig, Algorithm, DecayRule, MuonConfig, NamedGrads, StateTensor, values};

    #[derive(Module, Debug)]
    struct Net {
        weight: Param<Tensor<2>>,
        head: Param<Tensor<2>>,
        gain: Param<Tensor<1>>,
    }

    fn numbers(n: usize, salt: f32) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * 0.7 + salt).sin()).collect()
    }

    fn net() -> Net {
        let device = Device::default().autodiff();
        let matrix = |a: usize, b: usize, salt| {
            Param::from_tensor(Tensor::from_data(TensorData::new(numbers(a * b, salt), [a, b]), &device))
        };
        Net { weight: matrix(5, 3, 0.1), head: matrix(4, 3, 0.4), gain: Param::from_tensor(Tensor::ones([3], &device)) }
    }

    fn grads(parts: Option<&Parts>, salt: f32) -> NamedGrads {
        let all = [("weight", 15), ("head", 12), ("gain", 3)];
        let part = |(name, n): (&str, usize)| {
            let part = parts.map_or(Some(0..n), |parts| parts.get(name).cloned())?;
            let values = numbers(n, salt + n as f32)[part.clone()].to_vec();
            Some((name.to_owned(), Tensor::from_data(TensorData::new(values, [part.len()]), &Device::default())))
        };
        all.into_iter().filter_map(part).collect()
    }

    fn flat(net: &Net) -> Vec<(String, Vec<f32>)> {
        values(net).into_iter().map(|(info, x)| (info.name, x.to_data().iter::<f32>().collect())).collect()
    }

    /// Ranks with parts of the state take the steps of one that has all, and together they have its state.
    #[test]
    fn parts_together_are_the_whole() {
        let muon = Algorithm::Muon(MuonConfig::default());
        for (algorithm, precision) in [
            (AdamWConfig::default().into(), Precision::Full),
            (muon, Precision::Full),
            (AdamWConfig::default().into(), Precision::Bf16),
        ] {
            for ranks in [1, 2, 4] {
                let make = || Optimizer::new(algorithm, DecayRule::Matrices).unwrap().with_precision(precision);
                let (mut whole, mut model) = (make(), net());
                let mut sharded: Vec<(Optimizer, Net, Parts)> = make()
                    .divide(&net(), ranks)
                    .unwrap()
                    .into_iter()
                    .map(|parts| {
                        let mut optimizer = make();
                        optimizer.shard(&net(), parts.clone()).unwrap();
                        (optimizer, net(), parts)
                    })
                    .collect();
                for step in 0..3 {
                    model = whole.step(1e-2, model, &mut grads(None, step as f32)).unwrap();
                    let want = flat(&model);
                    let updated: Vec<_> = sharded
                        .iter_mut()
                        .map(|(optimizer, model, parts)| {
                            let stepped = optimizer.step(1e-2, model.clone(), &mut grads(Some(parts), step as f32));
                            (flat(&stepped.unwrap()), parts.clone())
                        })
                        .collect();
                    for (i, (name, want)) in want.iter().enumerate() {
                        let pieces = updated.iter().filter_map(|(values, parts)| {
                            parts.get(name).map(|part| values[i].1[part.clone()].to_vec())
                        });
                        assert_eq!(pieces.collect::<Vec<_>>().concat(), *want, "{algorithm:?} on {ranks}: {name}");
                    }
                    // As an all-gather would leave it.
                    sharded.iter_mut().for_each(|(_, sharded, _)| *sharded = model.clone());
                }
                let state: Vec<StateTensor> = whole.state().collect();
                let shapes = sharded[0].0.whole_state_shapes(&net()).unwrap();
                assert_eq!(shapes, state.iter().map(|t| (t.name.clone(), t.shape.clone())).collect::<Vec<_>>());
                for tensor in &state {
                    let parts: Vec<_> = sharded.iter().map(|(o, ..)| o.state_part(&tensor.name)).collect();
                    assert_eq!(parts.concat(), tensor.values, "{}", tensor.name);
                }
                // A saved state comes back in parts.
                for (optimizer, _, parts) in &sharded {
                    let mut again = make();
                    again.shard(&net(), parts.clone()).unwrap();
                    again.load_state::<_, OptimError>(&net(), state.iter().cloned().map(Ok)).unwrap();
                    assert_eq!(again.state().collect::<Vec<_>>(), optimizer.state().collect::<Vec<_>>());
                }
            }
        }
    }

    /// Parts that are in no module take the steps that they take in one, in f32 and in bfloat16, where the rounding depends on the place.
    #[test]
    fn parts_in_no_module_take_the_same_steps() {
        let half = |param: Param<Tensor<2>>| {
            Param::from_tensor(Tensor::from_inner(to_bf16(param.val().inner(), None)).require_grad())
        };
        for (bf16, ranks) in [(false, 3), (true, 2), (true, 4)] {
            let start = || match net() {
                Net { weight, head, gain } if bf16 => Net { weight: half(weight), head: half(head), gain },
                net => net,
            };
            let make = || Optimizer::new(AdamWConfig::default(), DecayRule::Matrices).unwrap();
            let mut whole = make();
            let mut model = start();
            let mut held: Vec<(Optimizer, Parts, BTreeMap<String, Tensor<1>>)> = vec![];
            for parts in make().divide(&net(), ranks).unwrap() {
                let mut optimizer = make();
                optimizer.shard(&net(), parts.clone()).unwrap();
                let cut = |(info, x): (ParamInfo, Tensor<1>)| {
                    let part = x.slice([parts.get(&info.name)?.clone()]);
                    let half = bf16 && info.shape.len() > 1;
                    Some((info.name, if half { to_bf16(part, None) } else { part }))
                };
                let values = values(&start()).into_iter().filter_map(cut).collect();
                held.push((optimizer, parts, values));
            }
            for step in 0..3 {
                model = whole.step(1e-2, model, &mut grads(None, step as f32)).unwrap();
                let want: BTreeMap<String, Vec<f32>> = flat(&model).into_iter().collect();
                for (optimizer, parts, values) in &mut held {
                    let mut grads = grads(Some(parts), step as f32);
                    optimizer.step_parts(1e-2, &Clipping::none(), &net(), values, &mut grads).unwrap();
                    assert!(grads.is_empty());
                    for (name, part) in parts.iter() {
                        let value = values[name].clone();
                        assert_eq!(is_bf16(&value), bf16 && name != "gain");
                        let got: Vec<f32> = to_f32(value).to_data().iter::<f32>().collect();
                        assert_eq!(got, want[name][part.clone()], "{name} {part:?}, step {step}");
                    }
                }
            }
        }
    }
}
