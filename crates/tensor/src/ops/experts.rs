//! Mixture of experts (Shazeer et al., arXiv:1701.06538): a router chooses a few experts for each token; the tokens' rows are sorted by expert, go through
//! the products of their experts one group after the other (dropless, as MegaBlocks, Gale et al., arXiv:2211.15841), and are added up by the router's weights.
//!
//! ```text
//! logits ─► Routing::new ─┬─► router_weights ──────────────────────────┐
//! x ──────────────────────┴─► dispatch ─► grouped_linear (twice) ─► combine ─► y
//! ```

use std::sync::Arc;

use burn::backend::Dispatch;
use burn::backend::tensor::FloatTensor;
use burn::tensor::{Int, Tensor, TensorData, activation};

use super::compute::{compute, multiply};
pub use super::expert_parallel::Exchange;
use super::extension::FusedOps;
use super::linear::or_none;
use super::vjp::{Keep, Sink, Vjp, dims, kept};
use super::{embedding, swiglu};
use crate::adapter::HostBackend;
use crate::buffers::{buffer, recycle};
use crate::device::is_fused;
use crate::kernels::activation as activations;
use crate::kernels::experts as kernel;
pub use crate::kernels::experts::Group;
use crate::kernels::matmul::{Compute, Into, Mat};

/// Where the tokens of a batch go: which experts each chose, and the order of their rows, sorted by expert.
#[derive(Clone, Debug)]
pub struct Routing {
    n_experts: usize,
    per_token: usize,
    /// The experts of each token, the best first.
    chosen: Arc<[u32]>,
    /// How many tokens chose each expert.
    load: Arc<[u32]>,
    /// The row of each choice; -1 if it was dropped.
    rows: Arc<[i32]>,
    /// The choice of each row.
    choices: Arc<[u32]>,
    /// The token of each row.
    tokens: Arc<[i32]>,
    groups: Arc<[Group]>,
}

impl Routing {
    /// Each token, a row of `n_experts` of `logits`, chooses the `per_token` experts whose probability (softmax over all), plus `bias` where there is one, is
    /// highest; of equal ones the first. The bias decides who is chosen and nothing else (Wang et al., arXiv:2408.15664).
    ///
    /// With a `capacity` an expert takes so many rows at most: the first choices of all tokens in their order, then the second choices, and so on (GShard,
    /// Lepikhin et al., arXiv:2006.16668); the others are dropped.
    ///
    /// # Panics
    /// If lengths do not fit, or `per_token` is not from 1 to `n_experts`.
    pub fn new(
        logits: &[f32],
        bias: Option<&[f32]>,
        n_experts: usize,
        per_token: usize,
        capacity: Option<usize>,
    ) -> Self {
        assert!((1..=n_experts).contains(&per_token), "routing: {per_token} of {n_experts} experts");
        assert!(logits.len().is_multiple_of(n_experts), "routing: {} logits of {n_experts} experts", logits.len());
        assert!(bias.is_none_or(|bias| bias.len() == n_experts), "routing: a bias of each of {n_experts} experts");
        let tokens = logits.len() / n_experts;
        let mut chosen = Vec::with_capacity(tokens * per_token);
        let mut load = vec![0u32; n_experts];
        let mut order: Vec<u32> = vec![];
        for logits in logits.chunks_exact(n_experts) {
            let mut scores = logits.to_vec();
            if let Some(bias) = bias {
                kernel::softmax(&mut scores);
                scores.iter_mut().zip(bias).for_each(|(score, bias)| *score += bias);
            }
            order.clear();
            order.extend(0..n_experts as u32);
            let best = |a: &u32, b: &u32| scores[*b as usize].total_cmp(&scores[*a as usize]).then(a.cmp(b));
            if per_token < n_experts {
                order.select_nth_unstable_by(per_token - 1, best);
                order.truncate(per_token);
            }
            order.sort_unstable_by(best);
            order.iter().for_each(|&expert| load[expert as usize] += 1);
            chosen.extend_from_slice(&order);
        }
        let mut of_expert = vec![vec![]; n_experts];
        let most = capacity.unwrap_or(usize::MAX);
        // Without a capacity, in the order of the tokens either way.
        let in_turns: Box<dyn Iterator<Item = usize>> = match capacity {
            None => Box::new(0..chosen.len()),
            Some(_) => Box::new((0..per_token).flat_map(|j| (0..tokens).map(move |t| t * per_token + j))),
        };
        for choice in in_turns {
            let rows: &mut Vec<u32> = &mut of_expert[chosen[choice] as usize];
            if rows.len() < most {
                rows.push(choice as u32);
            }
        }
        let groups = of_expert.iter().enumerate().map(|(expert, rows)| Group { expert, rows: rows.len() }).collect();
        let choices = of_expert.concat();
        let mut rows = vec![-1; chosen.len()];
        choices.iter().enumerate().for_each(|(row, &choice)| rows[choice as usize] = row as i32);
        Self {
            n_experts,
            per_token,
            chosen: chosen.into(),
            load: load.into(),
            rows: rows.into(),
            tokens: choices.iter().map(|&choice| (choice as usize / per_token) as i32).collect(),
            choices: choices.into(),
            groups,
        }
    }

    /// The experts of each token, `per_token` each, the best first.
    pub fn chosen(&self) -> &[u32] {
        &self.chosen
    }

    /// How many tokens chose each expert, dropped or not.
    pub fn load(&self) -> &[u32] {
        &self.load
    }

    /// The rows of each expert, in the order of the experts.
    pub fn groups(&self) -> &Arc<[Group]> {
        &self.groups
    }

    /// The number of experts.
    pub fn n_experts(&self) -> usize {
        self.n_experts
    }

    fn token_count(&self) -> usize {
        self.chosen.len() / self.per_token
    }
}

/// The weights of each token's experts: their probabilities over the sum of them (as Mixtral, arXiv:2401.04088, and Qwen 3 with `norm_topk_prob`); of a
/// single expert its probability as it is (Switch, Fedus et al., arXiv:2101.03961), through which alone its router learns.
///
/// In backward, `aux` times the gradient of the load-balancing loss is added to that of the logits, whatever comes from above: Switch's equation 4,
/// `n_experts Σ_e f_e P_e`, where f_e is the number of choices of expert e and P_e its probability, both means over the tokens; transformers'
/// `load_balancing_loss_func` of one layer. Its value is in no output.
///
/// # Shapes
/// - `logits`: `[N, n_experts]`, those of the routing; output `[N, per_token]`
///
/// # Panics
/// If the shapes do not fit, or `aux` is not 0 on a device without fused operations.
pub fn router_weights(logits: Tensor<2>, routing: &Routing, aux: f32) -> Tensor<2> {
    let n = routing.token_count();
    assert_eq!(logits.dims(), [n, routing.n_experts], "router: logits of another routing");
    if is_fused(&logits.device()) {
        let op = RouterWeights { routing: routing.clone(), aux };
        return Tensor::from_dispatch(Dispatch::fused_router_weights(logits.into_dispatch(), op));
    }
    assert!(aux == 0.0, "router: the balancing loss is an operation of the CPU backends: set router_aux_loss to 0");
    composed_weights(logits, routing)
}

fn composed_weights(logits: Tensor<2>, routing: &Routing) -> Tensor<2> {
    let (n, k) = (routing.token_count(), routing.per_token);
    let chosen: Vec<i32> = routing.chosen.iter().map(|&e| e as i32).collect();
    let chosen = Tensor::<2, Int>::from_data(TensorData::new(chosen, [n, k]), &logits.device());
    if k == 1 {
        activation::softmax(logits, 1).gather(1, chosen)
    } else {
        activation::softmax(logits.gather(1, chosen), 1)
    }
}

/// The rows of the tokens, sorted by expert.
///
/// # Shapes
/// - `x`: `[N, D]`; output `[rows, D]`, N per_token of them unless some were dropped
///
/// # Panics
/// If there are not as many tokens as in the routing.
pub fn dispatch(x: Tensor<2>, routing: &Routing) -> Tensor<2> {
    let [n, d] = x.dims();
    assert_eq!(n, routing.token_count(), "dispatch: tokens of another routing");
    let rows = routing.tokens.len();
    embedding(x, routing.tokens.clone(), 1, rows).reshape([rows, d])
}

/// `residual` plus the sum of each token's rows by their weights; what was dropped adds nothing.
///
/// # Shapes
/// - `y`: `[rows, D]`, `weights`: `[N, per_token]`, `residual` and output: `[N, D]`
///
/// # Panics
/// If the shapes do not fit.
pub fn combine(y: Tensor<2>, weights: Tensor<2>, residual: Option<Tensor<2>>, routing: &Routing) -> Tensor<2> {
    let (n, k, [rows, d]) = (routing.token_count(), routing.per_token, y.dims());
    assert_eq!((rows, weights.dims()), (routing.choices.len(), [n, k]), "combine: rows or weights of another routing");
    let device = y.device();
    if let Some(residual) = &residual {
        assert_eq!(residual.dims(), [n, d], "combine: the residual has not the output's shape");
    }
    if is_fused(&device) {
        return Tensor::from_dispatch(Dispatch::fused_combine(
            y.into_dispatch(),
            weights.into_dispatch(),
            or_none(residual, &device).into_dispatch(),
            Combine { routing: routing.clone() },
        ));
    }
    composed_sum(y, weights, residual, routing)
}

fn composed_sum(y: Tensor<2>, weights: Tensor<2>, residual: Option<Tensor<2>>, routing: &Routing) -> Tensor<2> {
    let (n, k, [rows, d], device) = (routing.token_count(), routing.per_token, y.dims(), y.device());
    // A row of zeros for what was dropped.
    let y = Tensor::cat(vec![y, Tensor::zeros([1, d], &device)], 0);
    let at: Vec<i32> = routing.rows.iter().map(|&row| if row < 0 { rows as i32 } else { row }).collect();
    let at = Tensor::<1, Int>::from_data(TensorData::new(at, [n * k]), &device);
    let sum: Tensor<2> = (y.select(0, at).reshape([n, k, d]) * weights.reshape([n, k, 1])).sum_dim(1).reshape([n, d]);
    match residual {
        Some(residual) => sum + residual,
        None => sum,
    }
}

/// `x w[expert]` for the rows of each group, `swiglu(x) w[expert]` where `gated`.
///
/// # Shapes
/// - `x`: `[rows, I]` (`[rows, 2 I]` where gated), `w`: `[experts, I, O]`; output `[rows, O]`
///
/// # Panics
/// If the shapes do not fit, or a group's expert is not there.
pub fn grouped_linear(x: Tensor<2>, gated: bool, w: Tensor<3>, groups: &Arc<[Group]>) -> Tensor<2> {
    let ([rows, width], [experts, inputs, _]) = (x.dims(), w.dims());
    assert_eq!(width, if gated { 2 * inputs } else { inputs }, "grouped linear: rows do not fit the weight's inputs");
    assert_eq!(groups.iter().map(|group| group.rows).sum::<usize>(), rows, "grouped linear: groups of other rows");
    assert!(
        groups.iter().all(|group| group.expert < experts),
        "grouped linear: an expert of {experts} that is not there"
    );
    if is_fused(&x.device()) {
        let op = GroupedLinear { gated, groups: groups.clone(), compute: compute() };
        return Tensor::from_dispatch(Dispatch::fused_grouped_linear(x.into_dispatch(), w.into_dispatch(), op));
    }
    composed_products(if gated { swiglu(x) } else { x }, w, groups)
}

fn composed_products(a: Tensor<2>, w: Tensor<3>, groups: &[Group]) -> Tensor<2> {
    let [_, inputs, outputs] = w.dims();
    let mut at = 0;
    let products: Vec<Tensor<2>> = (groups.iter())
        .filter(|group| group.rows > 0)
        .map(|group| {
            let rows = a.clone().narrow(0, at, group.rows);
            at += group.rows;
            multiply(rows, w.clone().narrow(0, group.expert, 1).reshape([inputs, outputs]))
        })
        .collect();
    if products.is_empty() { a.slice([0..0, 0..0]).reshape([0, outputs]) } else { Tensor::cat(products, 0) }
}

/// See [`router_weights`].
#[derive(Clone, Debug)]
pub(crate) struct RouterWeights {
    routing: Routing,
    aux: f32,
}

impl Vjp<1> for RouterWeights {
    const KEEPS: [Keep; 1] = [Keep::Activation];

    fn forward<B: HostBackend>(&self, [logits]: [FloatTensor<B>; 1]) -> FloatTensor<B> {
        let Routing { n_experts, per_token, chosen, .. } = &self.routing;
        let logits = B::values(logits);
        let mut weights = buffer(chosen.len());
        kernel::weights(logits.as_ref(), *n_experts, chosen, *per_token, &mut weights);
        B::tensor(weights, &[self.routing.token_count(), *per_token])
    }

    fn backward<B: HostBackend>(
        &self,
        [logits]: [Option<FloatTensor<B>>; 1],
        grad: FloatTensor<B>,
        [dlogits]: [Sink<B>; 1],
    ) -> [Option<FloatTensor<B>>; 1] {
        let Routing { n_experts, per_token, chosen, load, .. } = &self.routing;
        let (logits, grad) = (B::values(kept(logits)), B::values(grad));
        [dlogits.write(&[self.routing.token_count(), *n_experts], |dlogits| {
            let (logits, chosen) = ((logits.as_ref(), *n_experts), (&chosen[..], *per_token));
            kernel::weights_backward(logits, chosen, grad.as_ref(), (load, self.aux), dlogits);
        })]
    }
}

/// See [`combine`].
#[derive(Clone, Debug)]
pub(crate) struct Combine {
    routing: Routing,
}

/// Of rows, weights and residual.
impl Vjp<3> for Combine {
    const KEEPS: [Keep; 3] = [Keep::Activation, Keep::Activation, Keep::Nothing];

    fn forward<B: HostBackend>(&self, [y, weights, residual]: [FloatTensor<B>; 3]) -> FloatTensor<B> {
        let (n, d) = (self.routing.token_count(), dims::<B>(&y)[1]);
        let [y, weights, residual] = [y, weights, residual].map(B::values);
        let mut out = buffer(n * d);
        match residual.as_ref() {
            [] => out.fill(0.0),
            residual => crate::kernels::copy(&mut out, residual),
        }
        let Routing { rows, per_token, .. } = &self.routing;
        kernel::combine(y.as_ref(), d, weights.as_ref(), rows, *per_token, &mut out);
        B::tensor(out, &[n, d])
    }

    fn backward<B: HostBackend>(
        &self,
        [y, weights, _]: [Option<FloatTensor<B>>; 3],
        grad: FloatTensor<B>,
        [dy, dweights, dresidual]: [Sink<B>; 3],
    ) -> [Option<FloatTensor<B>>; 3] {
        let (n, d) = (self.routing.token_count(), dims::<B>(&grad)[1]);
        let dresidual = if dresidual.wanted() { dresidual.hand_over(grad.clone()) } else { None };
        let (y, weights, grad) = (B::values(kept(y)), B::values(kept(weights)), B::values(grad));
        let Routing { rows, choices, per_token: k, .. } = &self.routing;
        let dweights = dweights.write(&[n, *k], |dw| {
            kernel::combine_backward_weights(grad.as_ref(), d, y.as_ref(), rows, *k, dw);
        });
        let dy = dy.write(&[choices.len(), d], |dy| {
            kernel::combine_backward_rows(grad.as_ref(), d, weights.as_ref(), choices, *k, dy);
        });
        [dy, dweights, dresidual]
    }
}

/// See [`grouped_linear`].
#[derive(Clone, Debug)]
pub(crate) struct GroupedLinear {
    gated: bool,
    groups: Arc<[Group]>,
    compute: Compute,
}

/// A matrix of each expert, in f32 or bfloat16.
enum Weights<B: HostBackend> {
    Full(B::Values),
    Bits(B::Bits),
}

impl<B: HostBackend> Weights<B> {
    fn new(tensor: FloatTensor<B>) -> Self {
        match B::bits(tensor) {
            Ok(bits) => Self::Bits(bits),
            Err(tensor) => Self::Full(B::values(tensor)),
        }
    }

    /// The matrix of an expert.
    fn of(&self, expert: usize, inputs: usize, outputs: usize) -> Mat<'_> {
        let at = expert * inputs * outputs..(expert + 1) * inputs * outputs;
        match self {
            Self::Full(values) => Mat::new(&values.as_ref()[at], inputs, outputs, outputs),
            Self::Bits(bits) => Mat::bf16(&bits.as_ref()[at], inputs, outputs),
        }
    }
}

impl GroupedLinear {
    /// Runs `f` on the products' rows.
    fn with_rows<R>(&self, x: &[f32], inputs: usize, f: impl FnOnce(&[f32]) -> R) -> R {
        if !self.gated {
            return f(x);
        }
        let mut a = buffer(x.len() / 2);
        activations::swiglu(x, inputs, &mut a);
        let result = f(&a);
        recycle(a);
        result
    }
}

/// Of rows and weights.
impl Vjp<2> for GroupedLinear {
    const KEEPS: [Keep; 2] = [Keep::Activation, Keep::Parameter];

    fn forward<B: HostBackend>(&self, [x, w]: [FloatTensor<B>; 2]) -> FloatTensor<B> {
        let (rows, w_shape) = (dims::<B>(&x)[0], dims::<B>(&w));
        let (inputs, outputs) = (w_shape[1], w_shape[2]);
        let (x, w) = (B::values(x), Weights::<B>::new(w));
        let mut y = buffer(rows * outputs);
        self.with_rows(x.as_ref(), inputs, |a| {
            let of = |expert| w.of(expert, inputs, outputs);
            kernel::products(self.compute, a, &self.groups, of, &mut y, Into::Write);
        });
        B::tensor(y, &[rows, outputs])
    }

    fn backward<B: HostBackend>(
        &self,
        [x, w]: [Option<FloatTensor<B>>; 2],
        grad: FloatTensor<B>,
        [dx, dw]: [Sink<B>; 2],
    ) -> [Option<FloatTensor<B>>; 2] {
        let (x, w) = (kept(x), kept(w));
        let (x_shape, w_shape) = (dims::<B>(&x), dims::<B>(&w));
        let (rows, inputs, outputs) = (x_shape[0], w_shape[1], w_shape[2]);
        let (x, w, dy) = (B::values(x), Weights::<B>::new(w), B::values(grad));
        let of = |expert| w.of(expert, inputs, outputs).t();
        let dx = if !dx.wanted() {
            None
        } else if self.gated {
            let mut da = buffer(rows * inputs);
            kernel::products(self.compute, dy.as_ref(), &self.groups, of, &mut da, Into::Write);
            let dx = dx.write(&x_shape, |dx| activations::swiglu_backward(x.as_ref(), inputs, &da, dx));
            recycle(da);
            dx
        } else {
            dx.fill(&x_shape, |dx, into| {
                kernel::products(self.compute, dy.as_ref(), &self.groups, of, dx, into);
            })
        };
        let op = self.clone();
        let weight_gradient = move |dw: &mut [f32], into: Into| {
            op.with_rows(x.as_ref(), inputs, |a| {
                kernel::weight_gradients(op.compute, [a, dy.as_ref()], &op.groups, [inputs, outputs], dw, into);
            });
        };
        if dw.is_deferred() {
            let elements = w_shape.iter().product();
            dw.leave(Box::new(move || {
                let mut dw = buffer(elements);
                weight_gradient(&mut dw, Into::Write);
                dw
            }));
            return [dx, None];
        }
        [dx, dw.fill(&w_shape, weight_gradient)]
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::tensor::Device;

    use super::*;
    use crate::device::Backend;
    use crate::random::{Counter, Purpose, normal};

    fn values<const D: usize>(seed: u64, shape: [usize; D], device: &Device) -> Tensor<D> {
        let n = shape.iter().product::<usize>() as u64;
        let values: Vec<f32> = (0..n).map(|i| normal(Counter::new(seed, Purpose::Init, 0), i)).collect();
        Tensor::from_data(TensorData::new(values, shape), device)
    }

    /// What other devices compute is what the CPU backends do.
    #[test]
    fn composed_of_burns_operations_it_is_the_same() {
        let device = Backend::NdArray.device().unwrap();
        let same = |a: Tensor<2>, b: Tensor<2>| {
            assert_eq!(a.dims(), b.dims());
            let apart: f32 = (a - b).abs().max().into_scalar();
            assert!(apart < 1e-5, "{apart}");
        };
        for (k, capacity) in [(1, None), (2, None), (3, Some(4))] {
            let logits = values(k as u64, [11, 5], &device);
            let host = logits.to_data().try_into_vec::<f32>().unwrap();
            let routing = Routing::new(&host, None, 5, k, capacity);
            let weights = router_weights(logits.clone(), &routing, 0.0);
            same(weights.clone(), composed_weights(logits, &routing));
            let (x, w) = (values(7, [11, 6], &device), values(8, [5, 6, 3], &device));
            let rows = dispatch(x, &routing);
            let y = grouped_linear(rows.clone(), false, w.clone(), routing.groups());
            same(y.clone(), composed_products(rows, w, routing.groups()));
            for residual in [None, Some(values(9, [11, 3], &device))] {
                let sum = combine(y.clone(), weights.clone(), residual.clone(), &routing);
                same(sum, composed_sum(y.clone(), weights.clone(), residual, &routing));
            }
        }
    }
}
