//! SOAP.

use burn::tensor::{Device, Int, Tensor, TensorData};
use firebox_tensor::ops::{self, AdamWHyper, SgdHyper, State, Update, update, zeros_like};
use serde::{Deserialize, Serialize};

use super::eigen::{eigenvectors, orthonormal};
use super::{AdamWConfig, At, Geometry, Rule, Slot, correction, lerp};
use crate::OptimError;
use crate::error::check;

/// SOAP (Vyas et al., <https://arxiv.org/abs/2409.11321>, algorithm 3): Adam in the eigenbasis of Shampoo's preconditioner.
///
/// ```text
/// g' = Q_Lᵀ g Q_R        m, v, u' as Adam's of g'        θ_t = (1 − η λ) (θ − η Q_L u' Q_Rᵀ)
/// L = β2 L + (1−β2) g gᵀ        R = β2 R + (1−β2) gᵀ g
/// ```
///
/// As the authors' code: the first step makes L, R and their eigenvectors Q and leaves the parameter alone; later, every
/// `precondition_frequency` steps, Q becomes the orthogonal factor of L Q (R Q) in a QR decomposition, columns in the order of their eigenvalues, with v
/// in the same order and m turned to the new basis. All of it follows the step, so that no gradient meets a basis that it has made. A side wider than
/// `max_precond_dim` is not turned, and neither are vectors, which leaves Adam. Parameters of three or more dimensions are taken as vectors.
///
/// The defaults are the authors'. The step does not depend on the signs of eigenvectors. It depends on their choice where eigenvalues are equal, as those
/// of the wider side are in the first step, where they are 0.
///
/// State: m and v, 8 bytes per element, and 8 per element of L and R (a square matrix has 24), which stay in 32 bits. Decompositions are made on the host, in
/// double precision, in time that grows with the cube of a side.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SoapConfig {
    /// β1, decay of the mean of gradients. Default 0.95.
    pub beta1: f64,
    /// β2, decay of the mean of squared gradients, and of L and R. Default 0.95.
    pub beta2: f64,
    /// ε, added to the root of v, before its correction. Default 1e-8.
    pub eps: f64,
    /// λ, decoupled weight decay, multiplied by the learning rate. Default 0.01.
    pub weight_decay: f64,
    /// Steps from one basis to the next. Default 10.
    pub precondition_frequency: u64,
    /// The widest side that is turned. Default 10,000, less than most vocabularies.
    pub max_precond_dim: usize,
}

impl Default for SoapConfig {
    fn default() -> Self {
        Self {
            beta1: 0.95,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.01,
            precondition_frequency: 10,
            max_precond_dim: 10_000,
        }
    }
}

impl SoapConfig {
    fn adamw(&self) -> AdamWConfig {
        let Self { beta1, beta2, eps, weight_decay, .. } = *self;
        AdamWConfig { beta1, beta2, eps, weight_decay }
    }

    /// A parameter as a matrix, and which of its sides are turned.
    fn sides(&self, param: Geometry<'_>) -> ([usize; 2], [bool; 2]) {
        match *param.shape {
            [rows, columns] => ([rows, columns], [rows, columns].map(|side| side <= self.max_precond_dim)),
            _ => ([1, param.elements()], [false; 2]),
        }
    }
}

/// Eigenvectors of the sides that are turned, as rows.
#[derive(Clone)]
struct Basis {
    left: Option<Tensor<2>>,
    right: Option<Tensor<2>>,
}

impl Basis {
    fn get(sides: &[Option<Side<'_>>; 2], device: &Device) -> Self {
        let [left, right] = sides.each_ref().map(|side| side.as_ref().map(|side| side.basis(device)));
        Self { left, right }
    }

    /// Into the basis.
    fn enter(&self, x: Tensor<2>) -> Tensor<2> {
        let x = if let Some(left) = &self.left { ops::linear(left.clone(), x, None) } else { x };
        if let Some(right) = &self.right { ops::linear_transposed(x, right.clone()) } else { x }
    }

    /// And back.
    fn leave(&self, x: Tensor<2>) -> Tensor<2> {
        let x = if let Some(left) = &self.left { ops::linear(left.clone().transpose(), x, None) } else { x };
        if let Some(right) = &self.right { ops::linear(x, right.clone(), None) } else { x }
    }
}

/// The states of a side that is turned.
struct Side<'a> {
    width: usize,
    gram: &'a mut State,
    basis: &'a mut State,
}

impl Side<'_> {
    fn basis(&self, device: &Device) -> Tensor<2> {
        self.basis.get(device).reshape([self.width, self.width])
    }

    /// Takes a gradient in, whose rows belong to this side.
    fn add(&mut self, grad: Tensor<2>, share: f64) {
        let new = ops::linear_transposed(grad.clone(), grad).reshape([self.width * self.width]);
        let old = self.gram.take(&new.device());
        self.gram.set(lerp(old, new, 1.0, share), 0);
    }

    /// The first basis.
    fn decompose(&mut self, device: &Device) {
        let vectors = eigenvectors(self.gram.read().into_iter().map(f64::from).collect(), self.width);
        self.replace(&vectors, device);
    }

    /// The next basis: one step of the power iteration. Returns the order of the old vectors in it.
    fn turn(&mut self, device: &Device) -> Vec<i32> {
        let n = self.width;
        let old = self.basis(device);
        let powers = ops::linear(old.clone(), self.gram.get(device).reshape([n, n]), None);
        let values: Vec<f32> = (old * powers.clone()).sum_dim(1).into_data().iter().collect();
        let powers: Vec<f32> = powers.into_data().iter().collect();
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|&i, &j| values[j].total_cmp(&values[i]));
        let sorted = order.iter().flat_map(|&i| powers[i * n..(i + 1) * n].iter().map(|&x| f64::from(x)));
        self.replace(&orthonormal(sorted.collect(), n), device);
        order.into_iter().map(|i| i as i32).collect()
    }

    fn replace(&mut self, vectors: &[f64], device: &Device) {
        let values: Vec<f32> = vectors.iter().map(|&x| x as f32).collect();
        self.basis.restore(&values, device);
    }
}

impl Rule for SoapConfig {
    fn validate(&self) -> Result<(), OptimError> {
        self.adamw().validate()?;
        let every = self.precondition_frequency;
        check("precondition_frequency", every as f64, every > 0, "at least 1")?;
        check("max_precond_dim", self.max_precond_dim as f64, self.max_precond_dim > 0, "at least 1")
    }

    fn weight_decay(&self) -> f64 {
        self.weight_decay
    }

    fn slots(&self, param: Geometry<'_>) -> Vec<Slot> {
        let ([rows, columns], [left, right]) = self.sides(param);
        let mut slots = self.adamw().slots(param);
        let names = [("left", "left_basis", rows, left), ("right", "right_basis", columns, right)];
        for (gram, basis, width, _) in names.into_iter().filter(|(.., turned)| *turned) {
            // A basis of few bits is not orthogonal, and small eigenvalues are lost in the rounding of large ones.
            slots.extend([gram, basis].map(|name| Slot::signed(name, &[width, width]).exact()));
        }
        slots
    }

    fn step(&self, at: &At<'_>, param: Tensor<1>, grad: Tensor<1>, state: &mut [State]) -> Tensor<1> {
        let (matrix, turned) = self.sides(at.param);
        let elements = at.param.elements();
        let device = param.device();
        let Some((moments, rest)) = state.split_at_mut_checked(2) else { return param };
        let mut pairs = rest.chunks_exact_mut(2);
        let mut sides = [0, 1].map(|side| match turned[side].then(|| pairs.next()).flatten() {
            Some([gram, basis]) => Some(Side { width: matrix[side], gram, basis }),
            _ => None,
        });
        let grad = if at.grad_scale == 1.0 { grad } else { grad * at.grad_scale };
        let grad = grad.reshape(matrix);

        // The first gradient only makes the basis.
        let t = at.t - 1;
        let param = if t == 0 {
            param
        } else {
            let basis = Basis::get(&sides, &device);
            let turned = basis.enter(grad.clone()).reshape([elements]);
            let adam = self.adamw().hyper(&At { t, grad_scale: 1.0, ..*at });
            // ε belongs to the root before its correction. Adam's step from zero with a learning rate of -1 is its direction.
            let eps = (self.eps / f64::from(correction(self.beta2, t)).sqrt()) as f32;
            let adam = Update::AdamW(AdamWHyper { lr: -1.0, eps, ..adam });
            let direction = update(adam, zeros_like(&turned), turned, moments, at.seed);
            let direction = basis.leave(direction.reshape(matrix)).reshape([elements]);
            // (1 − η λ) (θ − η u) = θ − η ((1 − η λ) u + λ θ)
            let (lr, l2) = (at.lr as f32, at.weight_decay as f32);
            let sgd = SgdHyper { lr, l2, grad_scale: (1.0 - at.lr * at.weight_decay) as f32 };
            update(Update::Sgd(sgd), param, direction, &mut [], 0)
        };

        let share = 1.0 - f64::from(self.beta2 as f32);
        let [left, right] = &mut sides;
        if let Some(left) = left {
            left.add(grad.clone(), share);
        }
        if let Some(right) = right {
            right.add(grad.transpose(), share);
        }
        if t == 0 {
            sides.iter_mut().flatten().for_each(|side| side.decompose(&device));
        } else if t.is_multiple_of(self.precondition_frequency) && turned.contains(&true) {
            let old = Basis::get(&sides, &device);
            let [m, v] = moments else { return param };
            let mut sorted = v.take(&device).reshape(matrix);
            for (dim, side) in sides.iter_mut().enumerate() {
                if let Some(side) = side {
                    let order = TensorData::new(side.turn(&device), [side.width]);
                    sorted = sorted.select(dim, Tensor::<1, Int>::from_data(order, &device));
                }
            }
            v.set(sorted.reshape([elements]), !at.seed);
            let mean = old.leave(m.take(&device).reshape(matrix));
            m.set(Basis::get(&sides, &device).enter(mean).reshape([elements]), at.seed.rotate_left(16));
        }
        param
    }
}
