//! The coordinate check of a parametrization.

use burn::tensor::{Device, Tensor};
use firebox_models::transformer::Transformer;
use firebox_models::{Staged, TokenBatch};
use firebox_optim::{NamedGrads, Optimizer};

use crate::model_io::{parameters, to_host};
use crate::recipe::RecipeError;
use crate::{Recipe, TrainError};

/// The width at which the standard and the maximal update parametrization are the same model in [`coordinate_recipe`].
pub const BASE_WIDTH: usize = 64;

/// Root mean squares of what training has changed in a model's coordinates.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Change {
    /// Of the hidden states before the head.
    pub hidden: f64,
    /// Of the logits by the head's own update. What the head's initial values make of changed hidden states is left out: it vanishes with the width, as it
    /// should.
    pub logits: f64,
}

/// A decoder of a width (a multiple of 16), in the standard parametrization or in μP from [`BASE_WIDTH`] on; all else is the same.
///
/// # Errors
/// [`RecipeError`] for a width that is none.
pub fn coordinate_recipe(width: usize, mup: bool) -> Result<Recipe, RecipeError> {
    let of_width = match mup {
        true => format!("init_std = {}, mup_base_width = {BASE_WIDTH}", 1.0 / (BASE_WIDTH as f64).sqrt()),
        false => format!("init_std = {}", 1.0 / (width as f64).sqrt()),
    };
    let (heads, d_ff) = (width / 16, 3 * width);
    let model = format!(
        "model={{ d_model = {width}, n_layers = 2, n_heads = {heads}, d_ff = {d_ff}, tied = false, context = 16, {of_width} }}"
    );
    Recipe::load("tiny", &[model, "optimizer={ lr = 5e-4, weight_decay = 0.0 }".into()])
}

/// What each of `steps` steps on one fixed batch of a vocabulary of `tokens` has changed since the start (the coordinate check of Yang et al.,
/// <https://arxiv.org/abs/2203.03466>, appendix D.1). Over widths it must neither grow nor vanish.
///
/// # Errors
/// [`TrainError`]: an impossible shape, or μP with what it does not fit.
pub fn coordinate_check(
    recipe: &Recipe,
    tokens: usize,
    steps: usize,
    device: &Device,
) -> Result<Vec<Change>, TrainError> {
    const ROWS: usize = 8;
    let (mut model, mut optimizer) = start(recipe, tokens, device)?;
    let (width, context) = (model.config().d_model, model.config().context);
    let text: Vec<i32> =
        (0..ROWS * (context + 1)).map(|i| ((i * i * 7 + i / (context + 1) * 13) % tokens.max(1)) as i32).collect();
    let part = |from: usize| text.chunks(context + 1).flat_map(|row| row[from..from + context].to_vec()).collect();
    let batch = TokenBatch::plain(ROWS, context, part(0), part(1));
    let hidden = |model: &Transformer| model.hidden(&batch).inner().reshape([ROWS * context, width]);
    let head = |model: &Transformer| {
        let found = parameters(model).into_iter().find(|(name, _)| name == "head.weight");
        found.map(|(_, value)| value.reshape([tokens, width]))
    };
    let before = (hidden(&model), head(&model));
    let mut changes = vec![];
    for _ in 0..steps {
        let loss = model.loss(&batch, None);
        let mut grads = NamedGrads::from_backward(&model, &mut loss.backward());
        model = optimizer.step(recipe.peak_lr(), model, &mut grads)?;
        let after = hidden(&model);
        let logits = match (head(&model), &before.1) {
            (Some(head), Some(before)) => rms(after.clone().matmul((head - before.clone()).transpose())),
            // Tied: it has no update of its own.
            _ => 0.0,
        };
        changes.push(Change { hidden: rms(after - before.0.clone()), logits });
    }
    Ok(changes)
}

/// The initial model and optimizer of a recipe.
pub(crate) fn start(recipe: &Recipe, tokens: usize, device: &Device) -> Result<(Transformer, Optimizer), TrainError> {
    let config = recipe.model.resolve(tokens)?;
    config.validate()?;
    let mup = recipe.mup(&config)?;
    let model = Transformer::new(&config, recipe.seed, &device.clone().autodiff())?;
    let model = if let Some(mup) = mup { mup.initial(model) } else { model };
    Ok((model, recipe.optimizer.build(recipe.train.batch_rows, mup, vec![])?))
}

fn rms(x: Tensor<2>) -> f64 {
    f64::from(to_host(x.powi_scalar(2).mean())[0]).sqrt()
}
