//! Weights that training sees as they will be quantized.

use burn::backend::Dispatch;
use burn::backend::tensor::FloatTensor;
use burn::tensor::Tensor;

use super::extension::FusedOps;
use super::linear::or_none;
use super::vjp::{Keep, Sink, Vjp, dims, kept};
use crate::adapter::HostBackend;
use crate::buffers::{buffer, recycle};
use crate::device::is_fused;
use crate::kernels::fake_quant::Grid;

/// To what weights are rounded: symmetric integers of `bits` bits, from `-(2^(bits - 1) - 1)` to `2^(bits - 1) - 1`, times a step for every group of inputs of an
/// output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FakeQuant {
    /// 2 to 8.
    pub bits: u32,
    /// Inputs of a group, one after the other; 0: all. Steps of groups are numbers of 16 bits (f16), those of whole outputs of 32.
    pub group: usize,
}

impl FakeQuant {
    /// The largest code.
    pub fn largest(self) -> u32 {
        (1 << (self.bits - 1)) - 1
    }

    /// Inputs of a group of a weight with so many.
    pub fn rows(self, inputs: usize) -> usize {
        if self.group == 0 { inputs } else { self.group }
    }

    /// Number of steps of a weight `[in, out]`.
    pub fn steps(self, [inputs, outputs]: [usize; 2]) -> usize {
        inputs / self.rows(inputs).max(1) * outputs
    }

    fn grid(self, [inputs, outputs]: [usize; 2]) -> Grid {
        Grid { outputs, rows: self.rows(inputs), largest: self.largest() as f32, half: self.group > 0 }
    }

    /// Where learned steps start: at `2 <|w|> / sqrt(largest code)` (Esser et al., arXiv:1902.08153, section 2.1), of weights `[in, out]`, row-major;
    /// `[groups, out]`.
    ///
    /// # Panics
    /// If the shape is not that of the weights.
    pub fn initial_steps(self, weights: &[f32], shape: [usize; 2]) -> Vec<f32> {
        assert_eq!(weights.len(), shape[0] * shape[1], "fake_quantize: weights of another shape");
        let factor = 2.0 / (self.largest() as f32).sqrt();
        self.grid(shape).mean(weights).into_iter().map(|mean| mean * factor).collect()
    }

    /// The factor of the gradients of learned steps, `1 / sqrt(weights of a step × largest code)` (section 2.2).
    pub fn step_gradient_factor(self, inputs: usize) -> f32 {
        1.0 / (self.rows(inputs) as f32 * self.largest() as f32).sqrt()
    }
}

/// `w` rounded to its grid: `step × code`, the code that is nearest to `w / step`, ties to even.
///
/// Without `steps`, those with which the largest weight of each group is the largest code; the gradient of `w` is that of the result (the straight-through estimate:
/// Bengio et al., arXiv:1308.3432). With them, their gradient and that of `w` are those of LSQ (Esser et al., arXiv:1902.08153, section 2): inside the grid,
/// rounding is taken to have a slope of 1; beyond it, `w` has no gradient. Steps below 2^-20 count as that.
///
/// # Shapes
/// - `w`: `[in, out]`, `steps`: `[groups × out]`; output as `w`
///
/// # Panics
/// If groups do not divide the inputs, there are other than 2 to 8 bits, or another number of steps.
pub fn fake_quantize(w: Tensor<2>, steps: Option<Tensor<1>>, format: FakeQuant) -> Tensor<2> {
    let (shape, device) = (w.dims(), w.device());
    let rows = format.rows(shape[0]);
    assert!((2..=8).contains(&format.bits), "fake_quantize: {} bits, expected 2 to 8", format.bits);
    assert!(
        rows > 0 && shape[0].is_multiple_of(rows),
        "fake_quantize: groups of {rows} do not divide {} inputs",
        shape[0]
    );
    if let Some(steps) = &steps {
        assert_eq!(steps.dims(), [format.steps(shape)], "fake_quantize: another number of steps");
    }
    if is_fused(&device) {
        let steps = or_none(steps, &device).into_dispatch();
        return Tensor::from_dispatch(Dispatch::fused_fake_quantize(w.into_dispatch(), steps, format));
    }
    composed(w, steps, format)
}

/// The same of burn's operations.
fn composed(w: Tensor<2>, steps: Option<Tensor<1>>, format: FakeQuant) -> Tensor<2> {
    let shape @ [inputs, outputs] = w.dims();
    let rows = format.rows(inputs);
    let groups = inputs / rows;
    let largest = format.largest() as f32;
    let grouped = w.clone().reshape([groups, rows, outputs]);
    // The nearest number of 11 bits, but for the smallest (Veltkamp's splitting).
    let stored = |step: Tensor<3>| {
        if format.group == 0 {
            return step;
        }
        let high = step.clone() * 8193.0;
        high.clone() - (high - step)
    };
    let Some(steps) = steps else {
        let plain = grouped.detach();
        let step = stored(plain.clone().abs().max_dim(1) / largest).clamp_min(f32::MIN_POSITIVE);
        let rounded = (plain.clone() / step.clone()).round().clamp(-largest, largest) * step;
        return w + (rounded - plain).reshape(shape);
    };
    let factor = format.step_gradient_factor(inputs);
    let plain = steps.clone().detach().clamp_min(1.0 / (1 << 20) as f32).reshape([groups, 1, outputs]);
    let plain = stored(plain);
    let scaled = steps.reshape([groups, 1, outputs]) * factor;
    // The value of the one, the gradient of the other.
    let step = plain - scaled.clone().detach() + scaled;
    let inside = (grouped / step.clone()).clamp(-largest, largest);
    let code = inside.clone() + (inside.clone().round() - inside).detach();
    (code * step).reshape(shape)
}

/// Of (w, steps).
impl Vjp<2> for FakeQuant {
    const KEEPS: [Keep; 2] = [Keep::Parameter, Keep::Parameter];

    fn forward<B: HostBackend>(&self, [w, steps]: [FloatTensor<B>; 2]) -> FloatTensor<B> {
        let shape = dims::<B>(&w);
        let grid = self.grid([shape[0], shape[1]]);
        let (w, steps) = (B::values(w), B::values(steps));
        let steps = match steps.as_ref() {
            [] => grid.absmax(w.as_ref()),
            steps => steps.iter().map(|step| grid.learned(*step)).collect(),
        };
        let mut out = buffer(w.as_ref().len());
        grid.quantize(w.as_ref(), &steps, &mut out);
        B::tensor(out, &shape)
    }

    fn backward<B: HostBackend>(
        &self,
        [w, steps]: [Option<FloatTensor<B>>; 2],
        grad: FloatTensor<B>,
        [dw, dsteps]: [Sink<B>; 2],
    ) -> [Option<FloatTensor<B>>; 2] {
        let (w, steps) = (kept(w), B::values(kept(steps)));
        if steps.as_ref().is_empty() {
            return [dw.hand_over(grad), None];
        }
        let shape = dims::<B>(&w);
        let shape = [shape[0], shape[1]];
        let grid = self.grid(shape);
        let used: Vec<f32> = steps.as_ref().iter().map(|step| grid.learned(*step)).collect();
        let (w, mut dy) = (B::values(w), B::into_vec(grad));
        let sums = grid.learned_gradients(w.as_ref(), &used, &mut dy, self.step_gradient_factor(shape[0]));
        let dsteps = dsteps.put(&[sums.len()], sums);
        if dw.wanted() {
            return [dw.put(&shape, dy), dsteps];
        }
        recycle(dy);
        [None, dsteps]
    }
}

/// Weights as [`fake_quantize`] gives them, on the host: `[in, out]`, row-major, with steps `[groups × out]` or those of the largest weights; and the steps that
/// were used.
///
/// # Panics
/// As [`fake_quantize`].
pub fn fake_quantized(w: &[f32], shape: [usize; 2], steps: Option<&[f32]>, format: FakeQuant) -> (Vec<f32>, Vec<f32>) {
    assert_eq!(w.len(), shape[0] * shape[1], "fake_quantize: weights of another shape");
    let grid = format.grid(shape);
    let steps: Vec<f32> = match steps {
        Some(steps) => steps.iter().map(|step| grid.learned(*step)).collect(),
        None => grid.absmax(w),
    };
    assert_eq!(steps.len(), format.steps(shape), "fake_quantize: another number of steps");
    let mut out = vec![0.0; w.len()];
    grid.quantize(w, &steps, &mut out);
    (out, steps)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Backend;
    use crate::ops::to_host;
    use crate::random::{Counter, Purpose, normal};

    /// What other devices compute is what the kernels do, to rounding in f32 and of ties.
    #[test]
    fn composed_and_fused_are_the_same() {
        let Ok(device) = Backend::NdArray.device() else { return };
        let device = device.autodiff();
        let shape = [96, 5];
        let random = |seed: u64, shape: [usize; 2]| {
            let counter = Counter::new(seed, Purpose::Init, 0);
            let values: Vec<f32> = (0..shape[0] * shape[1]).map(|i| normal(counter, i as u64)).collect();
            Tensor::<2>::from_data(burn::tensor::TensorData::new(values, shape), &device)
        };
        for (bits, group, learned) in [(2, 32, true), (4, 32, true), (3, 0, true), (4, 32, false), (8, 0, false)] {
            let format = FakeQuant { bits, group };
            let n = format.steps(shape);
            let run = |f: fn(Tensor<2>, Option<Tensor<1>>, FakeQuant) -> Tensor<2>| {
                let w = random(1, shape).require_grad();
                let steps = learned.then(|| {
                    let start = format.initial_steps(&to_host(w.clone().inner()), shape);
                    Tensor::<1>::from_data(burn::tensor::TensorData::new(start, [n]), &device).require_grad()
                });
                let y = f(w.clone(), steps.clone(), format);
                let grads = (y.clone() * random(2, shape)).sum().backward();
                let dw = w.grad(&grads).map(to_host).unwrap_or_default();
                let dsteps = steps.and_then(|steps| steps.grad(&grads)).map(to_host).unwrap_or_default();
                [to_host(y.inner()), dw, dsteps]
            };
            for (part, (a, b)) in run(fake_quantize).iter().zip(&run(composed)).enumerate() {
                assert_eq!(a.len(), b.len());
                let far = a.iter().zip(b).filter(|(a, b)| (**a - **b).abs() > 1e-4 * (1.0 + a.abs()));
                assert_eq!(far.count(), 0, "{format:?}, learned {learned}, part {part}");
                assert_eq!(a.is_empty(), part == 2 && !learned);
            }
        }
    }
}
