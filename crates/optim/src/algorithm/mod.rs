//! The algorithms: each the step of one parameter, after its paper.

mod adafactor;
mod adam_mini;
mod adamw;
mod ademamix;
mod eigen;
mod lamb;
mod lion;
mod muon;
mod schedule_free;
mod sgd;
mod soap;
mod sophia;
mod state;

use burn::tensor::Tensor;
use firebox_tensor::ops::{SgdHyper, State, Update, update};
use serde::{Deserialize, Serialize};

pub use adafactor::AdafactorConfig;
pub use adam_mini::AdamMiniConfig;
pub use adamw::{AdamConfig, AdamWConfig};
pub use ademamix::AdEmaMixConfig;
pub use lamb::LambConfig;
pub use lion::LionConfig;
pub use muon::{MuonConfig, MuonScale};
pub use schedule_free::ScheduleFreeConfig;
pub use sgd::SgdConfig;
pub use soap::SoapConfig;
pub use sophia::SophiaConfig;
pub use state::{MAX_STEPS, ParamState};

use crate::OptimError;
use crate::error::check;
use crate::params::ParamKind;

macro_rules! algorithms {
    ($($(#[$doc:meta])* $variant:ident($config:ty) = $name:literal,)*) => {
        /// An optimizer with its hyperparameters, but for the learning rate, which belongs to the step.
        ///
        /// In a recipe: `optimizer = { kind = "adamw", lr = 3e-4, beta2 = 0.95 }`. All fields but `kind` have defaults; each configuration says which.
        #[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
        #[serde(tag = "kind")]
        pub enum Algorithm {
            $($(#[$doc])* #[serde(rename = $name)] $variant($config),)*
        }

        $(impl From<$config> for Algorithm {
            fn from(config: $config) -> Self {
                Self::$variant(config)
            }
        })*

        impl Algorithm {
            /// Every algorithm with its defaults.
            pub fn all() -> Vec<Self> {
                vec![$(<$config>::default().into()),*]
            }

            /// Its name, as in a recipe.
            pub fn name(&self) -> &'static str {
                match self {
                    $(Self::$variant(_) => $name,)*
                }
            }

            pub(crate) fn rule(&self) -> &dyn Rule {
                match self {
                    $(Self::$variant(config) => config,)*
                }
            }
        }
    };
}
algorithms! {
    /// AdamW.
    AdamW(AdamWConfig) = "adamw",
    /// Adam with L2 regularization.
    Adam(AdamConfig) = "adam",
    /// Stochastic gradient descent.
    Sgd(SgdConfig) = "sgd",
    /// Adafactor.
    Adafactor(AdafactorConfig) = "adafactor",
    /// LAMB.
    Lamb(LambConfig) = "lamb",
    /// Lion.
    Lion(LionConfig) = "lion",
    /// Muon, with AdamW for embeddings, head and vectors.
    Muon(MuonConfig) = "muon",
    /// Sophia-G.
    Sophia(SophiaConfig) = "sophia",
    /// Schedule-Free AdamW.
    ScheduleFree(ScheduleFreeConfig) = "schedule_free",
    /// AdEMAMix.
    AdEmaMix(AdEmaMixConfig) = "ademamix",
    /// Adam-mini.
    AdamMini(AdamMiniConfig) = "adam_mini",
    /// SOAP.
    Soap(SoapConfig) = "soap",
}

impl Default for Algorithm {
    fn default() -> Self {
        Self::AdamW(AdamWConfig::default())
    }
}

impl Algorithm {
    /// Its weight decay, for the parameters that decay.
    pub fn weight_decay(&self) -> f64 {
        self.rule().weight_decay()
    }

    /// Checks every range.
    ///
    /// # Errors
    /// [`OptimError::Hyperparameter`] names the first that is out of its range.
    pub fn validate(&self) -> Result<(), OptimError> {
        self.rule().validate()?;
        let decay = self.weight_decay();
        check("weight_decay", decay, (0.0..=1e6).contains(&decay), "0 <= weight_decay <= 1e6")
    }

    /// Checks a learning rate for a step of these hyperparameters.
    ///
    /// # Errors
    /// [`OptimError::Hyperparameter`] or [`OptimError::DecayTooStrong`].
    pub fn validate_lr(&self, lr: f64) -> Result<(), OptimError> {
        check("lr", lr, (0.0..=1e6).contains(&lr), "0 <= lr <= 1e6")?;
        if lr * self.weight_decay() >= 1.0 {
            return Err(OptimError::DecayTooStrong { lr, weight_decay: self.weight_decay() });
        }
        Ok(())
    }
}

/// What an algorithm knows of the parameter that it updates.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Geometry<'a> {
    pub kind: ParamKind,
    pub shape: &'a [usize],
}

impl Geometry<'_> {
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// The numbers of one step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct At<'a> {
    pub lr: f64,
    /// The configuration's, or 0 for a parameter that does not decay.
    pub weight_decay: f64,
    /// What the gradient is multiplied by first.
    pub grad_scale: f64,
    /// The number of this step of the parameter, from 1, at most [`MAX_STEPS`].
    pub t: u64,
    /// Another number in every step and for every parameter, for stochastic rounding.
    pub seed: u32,
    pub param: Geometry<'a>,
}

/// A tensor that an algorithm remembers of a parameter; zeros before the first step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Slot {
    /// Its name in checkpoints.
    pub name: &'static str,
    pub shape: Vec<usize>,
    /// Whether it can hold negative numbers.
    pub signed: bool,
    /// Whether it must be held in 32 bits.
    pub exact: bool,
}

impl Slot {
    pub fn signed(name: &'static str, shape: &[usize]) -> Self {
        Self { name, shape: shape.to_vec(), signed: true, exact: false }
    }

    pub fn unsigned(name: &'static str, shape: &[usize]) -> Self {
        Self { name, shape: shape.to_vec(), signed: false, exact: false }
    }

    /// The same, always in 32 bits: what must not be rounded, as parameters and bases.
    pub fn exact(self) -> Self {
        Self { exact: true, ..self }
    }

    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// `old + share (scale new - old)`, in place of `old`.
pub(crate) fn lerp(old: Tensor<1>, new: Tensor<1>, scale: f64, share: f64) -> Tensor<1> {
    let sgd = SgdHyper { lr: share as f32, l2: 1.0, grad_scale: -scale as f32 };
    update(Update::Sgd(sgd), old, new, &mut [], 0)
}

/// The step of one parameter.
pub(crate) trait Rule {
    fn validate(&self) -> Result<(), OptimError>;

    fn weight_decay(&self) -> f64;

    /// What is remembered of a parameter, besides the count of its steps.
    fn slots(&self, param: Geometry<'_>) -> Vec<Slot>;

    /// Whether each element of the parameter is updated without regard to the others, so that parts of it can be updated in different places.
    fn is_element_wise(&self, _kind: ParamKind) -> bool {
        false
    }

    /// The new value of a flat parameter; `state`, as [`slots`](Self::slots) says, is replaced.
    fn step(&self, at: &At<'_>, param: Tensor<1>, grad: Tensor<1>, state: &mut [State]) -> Tensor<1>;
}

/// The largest β, a memory of 100,000 steps: closer to one, 1 − β has few digits left in f32.
pub(crate) const MAX_BETA: f64 = 0.99999;

pub(crate) fn check_beta(name: &'static str, beta: f64) -> Result<(), OptimError> {
    check(name, beta, (0.0..=MAX_BETA).contains(&beta), "a decay from 0 to 0.99999")
}

pub(crate) fn check_eps(eps: f64) -> Result<(), OptimError> {
    check("eps", eps, (1e-30..=1.0).contains(&eps), "1e-30 <= eps <= 1")
}

/// `1 − β^t` for the β that is computed with, which is an f32.
pub(crate) fn correction(beta: f64, t: u64) -> f32 {
    (1.0 - f64::from(beta as f32).powf(t as f64)) as f32
}
