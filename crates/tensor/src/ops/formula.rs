//! Formulas of element-wise optimizers: every element of a parameter goes its own way.
//!
//! Each is written once over [`Number`] and runs three ways: on `f32` inside the kernels of the CPU backends, on tensors on every other device, and on
//! `f64` wherever somebody wants to know what it should have been.

use std::ops::{Add, Div, Mul, Sub};

use burn::tensor::Tensor;

/// What a formula computes with.
pub trait Number:
    Clone + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> + Div<Output = Self> + Sized
{
    /// `self * k`
    fn times(self, k: f32) -> Self;
    /// `self + k`
    fn plus(self, k: f32) -> Self;
    /// The square root.
    fn root(self) -> Self;
    /// -1, 0 or 1.
    fn sign(self) -> Self;
    /// Into `[-k, k]`.
    fn clip(self, k: f32) -> Self;
}

macro_rules! scalar {
    ($number:ty) => {
        impl Number for $number {
            #[inline(always)]
            fn times(self, k: f32) -> Self {
                self * <$number>::from(k)
            }
            #[inline(always)]
            fn plus(self, k: f32) -> Self {
                self + <$number>::from(k)
            }
            #[inline(always)]
            fn root(self) -> Self {
                self.sqrt()
            }
            #[inline(always)]
            fn sign(self) -> Self {
                // `signum` has no zero.
                <$number>::from(u8::from(self > 0.0)) - <$number>::from(u8::from(self < 0.0))
            }
            #[inline(always)]
            fn clip(self, k: f32) -> Self {
                self.max(<$number>::from(-k)).min(<$number>::from(k))
            }
        }
    };
}
scalar!(f32);
scalar!(f64);

impl Number for Tensor<1> {
    fn times(self, k: f32) -> Self {
        self * k
    }
    fn plus(self, k: f32) -> Self {
        self + k
    }
    fn root(self) -> Self {
        self.sqrt()
    }
    fn sign(self) -> Self {
        self.sign()
    }
    fn clip(self, k: f32) -> Self {
        self.clamp(-k, k)
    }
}

/// An element-wise optimizer with the numbers of one step. Gradients are multiplied by `grad_scale` first: below 1 where their norm is clipped.
pub trait Formula: Copy + Send + Sync + 'static {
    /// How many states an element has, at most 3.
    const STATES: usize;

    /// The new value of a parameter; `states`, `STATES` of them, are replaced by their new values.
    fn step<N: Number>(&self, param: N, grad: N, states: &mut [N]) -> N;
}

/// Adam and AdamW. States: m, v.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWHyper {
    /// Learning rate of this step.
    pub lr: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled weight decay, multiplied by the learning rate.
    pub weight_decay: f32,
    /// `1 - beta1^t`
    pub bias_correction1: f32,
    /// `1 - beta2^t`
    pub bias_correction2: f32,
    /// See [`Formula`].
    pub grad_scale: f32,
}

impl Formula for AdamWHyper {
    const STATES: usize = 2;

    #[inline(always)]
    fn step<N: Number>(&self, param: N, grad: N, states: &mut [N]) -> N {
        let [m, v] = states else { return param };
        // mhat / (sqrt(vhat) + eps) with the bias corrections moved into two scalars.
        let step = self.lr / self.bias_correction1;
        let root = 1.0 / self.bias_correction2.sqrt();
        let g = grad.times(self.grad_scale);
        *m = m.clone().times(self.beta1) + g.clone().times(1.0 - self.beta1);
        *v = v.clone().times(self.beta2) + g.clone().times(1.0 - self.beta2) * g;
        let update = m.clone().times(step) / v.clone().root().times(root).plus(self.eps);
        param.clone() - update - param.times(self.lr * self.weight_decay)
    }
}

/// Stochastic gradient descent without momentum. No state.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SgdHyper {
    /// Learning rate of this step.
    pub lr: f32,
    /// Added to the gradient, times the parameter (L2 regularization).
    pub l2: f32,
    /// See [`Formula`].
    pub grad_scale: f32,
}

impl Formula for SgdHyper {
    const STATES: usize = 0;

    #[inline(always)]
    fn step<N: Number>(&self, param: N, grad: N, _: &mut [N]) -> N {
        let g = grad.times(self.grad_scale) + param.clone().times(self.l2);
        param - g.times(self.lr)
    }
}

/// The same with momentum. State: the sum of gradients.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MomentumHyper {
    /// Without momentum.
    pub sgd: SgdHyper,
    /// Decay of the sum.
    pub momentum: f32,
    /// Share of a gradient that goes into the sum; in the first step all of it.
    pub share: f32,
    /// Whether to look ahead by one step.
    pub nesterov: bool,
}

impl Formula for MomentumHyper {
    const STATES: usize = 1;

    #[inline(always)]
    fn step<N: Number>(&self, param: N, grad: N, states: &mut [N]) -> N {
        let [sum] = states else { return param };
        let g = grad.times(self.sgd.grad_scale) + param.clone().times(self.sgd.l2);
        *sum = sum.clone().times(self.momentum) + g.clone().times(self.share);
        let direction = if self.nesterov { g + sum.clone().times(self.momentum) } else { sum.clone() };
        param - direction.times(self.sgd.lr)
    }
}

/// Lion. State: m.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LionHyper {
    /// Learning rate of this step.
    pub lr: f32,
    /// Weight of m in the direction.
    pub beta1: f32,
    /// Decay of m.
    pub beta2: f32,
    /// Decoupled weight decay, multiplied by the learning rate.
    pub weight_decay: f32,
    /// See [`Formula`].
    pub grad_scale: f32,
}

impl Formula for LionHyper {
    const STATES: usize = 1;

    #[inline(always)]
    fn step<N: Number>(&self, param: N, grad: N, states: &mut [N]) -> N {
        let [m] = states else { return param };
        let g = grad.times(self.grad_scale);
        let direction = (m.clone().times(self.beta1) + g.clone().times(1.0 - self.beta1)).sign();
        *m = m.clone().times(self.beta2) + g.times(1.0 - self.beta2);
        param.clone() - param.times(self.lr * self.weight_decay) - direction.times(self.lr)
    }
}

/// AdEMAMix. States: m1, m2, v.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdEmaMixHyper {
    /// Learning rate, β1, β2, ε, decay and corrections as AdamW's.
    pub adamw: AdamWHyper,
    /// Decay of the slow mean, as scheduled.
    pub beta3: f32,
    /// Weight of the slow mean, as scheduled.
    pub alpha: f32,
}

impl Formula for AdEmaMixHyper {
    const STATES: usize = 3;

    #[inline(always)]
    fn step<N: Number>(&self, param: N, grad: N, states: &mut [N]) -> N {
        let [m1, m2, v] = states else { return param };
        let h = &self.adamw;
        let g = grad.times(h.grad_scale);
        *m1 = m1.clone().times(h.beta1) + g.clone().times(1.0 - h.beta1);
        *m2 = m2.clone().times(self.beta3) + g.clone().times(1.0 - self.beta3);
        *v = v.clone().times(h.beta2) + g.clone().times(1.0 - h.beta2) * g;
        let root = 1.0 / h.bias_correction2.sqrt();
        let mixed = m1.clone().times(1.0 / h.bias_correction1) + m2.clone().times(self.alpha);
        let update = mixed / v.clone().root().times(root).plus(h.eps);
        param.clone() - (update + param.times(h.weight_decay)).times(h.lr)
    }
}

/// Schedule-Free AdamW; the parameter is y, where gradients are taken. States: z, v.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScheduleFreeHyper {
    /// Learning rate of this step.
    pub lr: f32,
    /// Where y lies between z and x.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decay, at y.
    pub weight_decay: f32,
    /// `1 - beta2^t`
    pub bias_correction2: f32,
    /// The share of this step in the average x.
    pub share: f32,
    /// See [`Formula`].
    pub grad_scale: f32,
}

impl Formula for ScheduleFreeHyper {
    const STATES: usize = 2;

    #[inline(always)]
    fn step<N: Number>(&self, param: N, grad: N, states: &mut [N]) -> N {
        let [z, v] = states else { return param };
        let g = grad.times(self.grad_scale);
        *v = v.clone().times(self.beta2) + g.clone().times(1.0 - self.beta2) * g.clone();
        let root = 1.0 / self.bias_correction2.sqrt();
        let g = g / v.clone().root().times(root).plus(self.eps) + param.clone().times(self.weight_decay);
        let y = param.clone() + (z.clone() - param).times(self.share)
            - g.clone().times(self.lr * (1.0 - self.beta1 * (1.0 - self.share)));
        *z = z.clone() - g.times(self.lr);
        y
    }
}

/// Sophia's update. States: m, h, of which h is made elsewhere.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SophiaHyper {
    /// Learning rate of this step.
    pub lr: f32,
    /// Decay of m.
    pub beta1: f32,
    /// What h is multiplied by in the denominator.
    pub gamma: f32,
    /// Decoupled weight decay, multiplied by the learning rate.
    pub weight_decay: f32,
    /// Smallest denominator.
    pub eps: f32,
    /// See [`Formula`].
    pub grad_scale: f32,
}

impl Formula for SophiaHyper {
    const STATES: usize = 2;

    #[inline(always)]
    fn step<N: Number>(&self, param: N, grad: N, states: &mut [N]) -> N {
        let [m, h] = states else { return param };
        *m = m.clone().times(self.beta1) + grad.times(self.grad_scale).times(1.0 - self.beta1);
        let update = (m.clone() / h.clone().times(self.gamma).plus(self.eps)).clip(1.0);
        param.clone() - param.times(self.lr * self.weight_decay) - update.times(self.lr)
    }
}

/// An element-wise optimizer, chosen at run time.
#[derive(Clone, Copy, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Update {
    AdamW(AdamWHyper),
    Sgd(SgdHyper),
    Momentum(MomentumHyper),
    Lion(LionHyper),
    AdEmaMix(AdEmaMixHyper),
    ScheduleFree(ScheduleFreeHyper),
    Sophia(SophiaHyper),
}

/// Calls `$body` with `$formula` bound to the formula of an [`Update`].
macro_rules! with_formula {
    ($update:expr, $formula:ident => $body:expr) => {
        match $update {
            $crate::ops::Update::AdamW($formula) => $body,
            $crate::ops::Update::Sgd($formula) => $body,
            $crate::ops::Update::Momentum($formula) => $body,
            $crate::ops::Update::Lion($formula) => $body,
            $crate::ops::Update::AdEmaMix($formula) => $body,
            $crate::ops::Update::ScheduleFree($formula) => $body,
            $crate::ops::Update::Sophia($formula) => $body,
        }
    };
}
pub(crate) use with_formula;

impl Update {
    /// How many states an element has.
    pub fn states(&self) -> usize {
        fn of<F: Formula>(_: F) -> usize {
            F::STATES
        }
        with_formula!(*self, formula => of(formula))
    }

    /// One element, or one tensor composed of burn's operations: see [`Formula::step`].
    pub fn step<N: Number>(&self, param: N, grad: N, states: &mut [N]) -> N {
        with_formula!(*self, formula => formula.step(param, grad, states))
    }
}
