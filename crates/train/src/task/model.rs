//! Models as the Trainer sees them.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Tensor};
use firebox_models::Staged;
use firebox_models::transformer::hf::{Entry, Family};
use firebox_models::transformer::{Head, TensorParallel, Transformer};
use firebox_parallel::Communicator;
use serde_json::Value;

use crate::TrainError;
use crate::checkpoint::Checkpoint;
use crate::model_io::{entries, from_entries};
use crate::recipe::Recipe;
use crate::trainer::{TRAINED, load_trained};

/// A model that the [`Trainer`](crate::Trainer) trains.
pub trait Model: Staged + 'static {
    /// What it is, in a few words: "decoder, 4 layers, width 128, 4 heads, context 256".
    fn describe(&self) -> String;

    /// Number of parameters, of which shared ones count once.
    fn total_params(&self) -> usize {
        struct Visitor(usize);
        impl ModuleVisitor for Visitor {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                self.0 += param.lazy_shape().num_elements();
            }
        }
        let mut visitor = Visitor(0);
        self.visit(&mut visitor);
        visitor.0
    }

    /// Floating-point operations of forward and backward per token; 0 if that is not known.
    fn flops_per_token(&self) -> f64 {
        0.0
    }

    /// Its parameters and the tensors of files that they become.
    fn entries(&self) -> Vec<Entry>;

    /// The `config.json` beside them.
    fn config_json(&self) -> Value;

    /// A model of the same shape, on the same device, with initial values of this seed, which are not made before they are used.
    ///
    /// # Errors
    /// [`TrainError`].
    fn empty(&self, seed: u64) -> Result<Self, TrainError>;

    /// The model as the recipe wants it in training: with its losses.
    fn for_recipe(self, _recipe: &Recipe) -> Self {
        self
    }

    /// The same model with the parameters of a checkpoint of its run.
    ///
    /// # Errors
    /// Tensors that do not fit.
    fn reload(&self, checkpoint: &Checkpoint, recipe: &Recipe) -> Result<Self, TrainError> {
        let empty = self.empty(recipe.seed)?.for_recipe(recipe);
        let file = if checkpoint.contains(TRAINED) { TRAINED } else { "model.safetensors" };
        let entries = self.entries();
        from_entries(empty, entries, checkpoint.tensors(file)?)
    }

    /// The transformer that this is; `None` of a model with more than one, or another kind. What works on a transformer's layers alone (experts, pruning, training for few bits,
    /// distillation) is for these.
    fn transformer(&self) -> Option<&Transformer> {
        None
    }

    /// The model with its [`transformer`](Self::transformer) changed; as it is where it is none.
    fn map_transformer(self, _change: impl FnOnce(Transformer) -> Transformer) -> Self {
        self
    }

    /// The ranks among which its matrices are divided, if they are.
    fn parallel(&self) -> Option<&TensorParallel> {
        self.transformer().and_then(Transformer::parallel)
    }

    /// One rank's part of such a model, with initial values: each parameter has the shape that [`Staged::placement`] of the part says.
    ///
    /// # Errors
    /// A model that cannot be divided.
    fn sharded(&self, _seed: u64, group: &Communicator, _sequence_parallel: bool) -> Result<Self, TrainError> {
        let expected = format!("1 with this model ({}), whose matrices are not divided among ranks", self.describe());
        Err(TrainError::Input { what: "tp", expected, got: group.size().to_string() })
    }

    /// Whether the loss of a row depends on other rows of its micro-batch, and of those that other ranks compute at the same time: contrastive losses.
    fn couples_rows(&self) -> bool {
        false
    }

    /// The same model as one of the ranks that compute micro-batches at the same time, for losses that [couple rows](Self::couples_rows). In evaluation (a stage's step is `None`) each
    /// rank is by itself.
    fn with_data_ranks(self, _group: &Communicator) -> Self {
        self
    }
}

impl Model for Transformer {
    fn describe(&self) -> String {
        let c = self.config();
        let kind = if c.encoder.is_some() { "encoder" } else { "decoder" };
        format!("{kind}, {} layers, width {}, {} heads, context {}", c.n_layers, c.d_model, c.n_heads, c.context)
    }

    fn total_params(&self) -> usize {
        self.config().num_params()
    }

    fn flops_per_token(&self) -> f64 {
        self.config().flops_per_token()
    }

    fn entries(&self) -> Vec<Entry> {
        entries(self)
    }

    fn config_json(&self) -> Value {
        Family::of(self.config()).config_json(self.config())
    }

    fn empty(&self, seed: u64) -> Result<Self, TrainError> {
        Ok(Transformer::new(self.config(), seed, &device_of(self))?)
    }

    fn for_recipe(self, recipe: &Recipe) -> Self {
        let model = match &recipe.adapter {
            Some(adapter) => adapter.pack(self),
            None => self,
        };
        model.with_loss(recipe.train.loss())
    }

    fn reload(&self, checkpoint: &Checkpoint, recipe: &Recipe) -> Result<Self, TrainError> {
        let model = load_trained(checkpoint, &device_of(self), recipe.qat.as_ref())?.model;
        let model = model.for_training(recipe.seed, self.config().dropout)?;
        Ok(model.with_context(self.context_parallel().cloned()).for_recipe(recipe))
    }

    fn transformer(&self) -> Option<&Transformer> {
        Some(self)
    }

    fn map_transformer(self, change: impl FnOnce(Transformer) -> Transformer) -> Self {
        change(self)
    }

    fn couples_rows(&self) -> bool {
        matches!(self.config().head, Head::Embedding { .. })
    }

    fn with_data_ranks(self, group: &Communicator) -> Self {
        if self.couples_rows() { Transformer::with_data_ranks(self, group.clone()) } else { self }
    }

    fn sharded(&self, seed: u64, group: &Communicator, sequence_parallel: bool) -> Result<Self, TrainError> {
        let part = Transformer::sharded(self.config(), seed, &device_of(self), group, sequence_parallel);
        part.map_err(|error| crate::trainer::cannot_divide("tp", error))
    }
}

/// The device of a module's parameters, none of which is made for that.
///
/// # Panics
/// Of a module without float parameters.
pub(crate) fn device_of<M: Module>(module: &M) -> Device {
    struct Visitor(Option<Device>);
    impl ModuleVisitor for Visitor {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if self.0.is_none() {
                self.0 = Some(param.lazy_device());
            }
        }
    }
    let mut visitor = Visitor(None);
    module.visit(&mut visitor);
    // PANIC: a model has parameters.
    visitor.0.expect("a module with parameters")
}
