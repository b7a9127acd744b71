//! Maximal update parametrization: hyperparameters that stay good as the width grows.

use firebox_models::transformer::{LowRank, Transformer, TransformerConfig};
use firebox_optim::{Algorithm, GroupConfig, ParamInfo, ParamKind};

use crate::Recipe;
use crate::model_io::{Later, later, set_later};
use crate::recipe::RecipeError;

/// μP for Adam (Yang et al., <https://arxiv.org/abs/2203.03466>, table 3): against a model of the base width, m times narrower,
///
/// | | standard deviation of initial values | learning rate |
/// |---|---|---|
/// | matrices of the blocks | / √m | / m |
/// | head | / m | / m |
/// | embeddings, vectors | the same | the same |
///
/// This is the form without multipliers in forward, so that the model remains a plain decoder. Attention's 1/√`head_dim` is right where the width grows by more heads
/// of one size.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Mup {
    /// Width as a multiple of the base width.
    times: f64,
}

impl Recipe {
    /// How a model of shape `config` is to be parametrized; none for the standard way.
    ///
    /// # Errors
    /// [`RecipeError::Value`] for what μP does not fit.
    pub(crate) fn mup(&self, config: &TransformerConfig) -> Result<Option<Mup>, RecipeError> {
        let Some(base_width) = self.model.mup_base_width else { return Ok(None) };
        let fail = |key, expected: &str, got: String| Err(RecipeError::Value { key, expected: expected.into(), got });
        if base_width == 0 {
            return fail("model.mup_base_width", "at least 1", "0".into());
        }
        if config.tied {
            let expected = "false with model.mup_base_width: a head and an embedding grow differently";
            return fail("model.tied", expected, "true".into());
        }
        let reduction = config.reduction;
        for (key, value) in [
            ("model.embed_dim", reduction.embed_dim),
            ("model.delta_rank", reduction.delta_rank),
            ("model.low_rank", if reduction.low_rank == LowRank::default() { 0 } else { 1 }),
        ] {
            if value > 0 {
                let expected = "none with model.mup_base_width: one side of its matrices does not grow with the width";
                return fail(key, expected, value.to_string());
            }
        }
        if !self.optimizer.groups.is_empty() {
            let expected = "none with model.mup_base_width, which makes its own";
            return fail("optimizer.groups", expected, self.optimizer.groups.len().to_string());
        }
        let algorithm = self.optimizer.algorithm;
        match algorithm {
            Algorithm::AdamW(_)
            | Algorithm::Adam(_)
            | Algorithm::AdamMini(_)
            | Algorithm::AdEmaMix(_)
            | Algorithm::Lion(_)
            | Algorithm::ScheduleFree(_) => Ok(Some(Mup { times: config.d_model as f64 / base_width as f64 })),
            _ => {
                let expected = "adamw, adam, adam_mini, ademamix, lion or schedule_free with model.mup_base_width: \
                                updates of one size, whatever the gradient's";
                fail("optimizer.kind", expected, algorithm.name().into())
            }
        }
    }
}

impl Mup {
    /// The groups with another learning rate.
    pub fn groups(self) -> Vec<GroupConfig> {
        let kinds = vec![ParamKind::Matrix, ParamKind::Head];
        vec![GroupConfig { kinds, lr_scale: 1.0 / self.times, ..GroupConfig::default() }]
    }

    /// Initial values, of a model whose weights all have the standard deviation of its blocks' (`init_std`, scaled to the width already).
    pub fn initial(self, model: Transformer) -> Transformer {
        let scaled = |(info, values): (ParamInfo, Later)| {
            let factor = match ParamKind::of(&info.name, &info.shape) {
                ParamKind::Embedding => self.times.sqrt(),
                ParamKind::Head => self.times.sqrt().recip(),
                ParamKind::Matrix | ParamKind::Vector => return None,
            };
            let scaled = move || values().into_iter().map(|x| (f64::from(x) * factor) as f32).collect();
            Some((info.name, Box::new(scaled) as Later))
        };
        let values = later(&model).into_iter().filter_map(scaled).collect();
        set_later(model, values)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::HashMap;

    use burn::tensor::Device;
    use firebox_tensor::device::Backend;

    use super::*;
    use crate::coordinates::{BASE_WIDTH, coordinate_check, coordinate_recipe, start};
    use crate::model_io::{parameters, to_host};

    fn recipe(width: usize, mup: bool, more: &[&str]) -> Recipe {
        let more: Vec<String> = more.iter().map(ToString::to_string).collect();
        coordinate_recipe(width, mup).unwrap().with(&more).unwrap()
    }

    fn device() -> Device {
        Backend::NdArray.device().unwrap()
    }

    /// What four steps change.
    fn changes(width: usize, mup: bool) -> [f64; 2] {
        let last = coordinate_check(&recipe(width, mup, &[]), 96, 4, &device()).unwrap()[3];
        [last.hidden, last.logits]
    }

    /// The coordinate check of Yang et al., appendix D.1.
    #[test]
    fn what_a_step_changes_does_not_grow_with_the_width() {
        let all = |mup| [64, 128, 256, 512].map(|width| changes(width, mup));
        let (standard, mup) = (all(false), all(true));
        for i in 0..2 {
            let most = mup.iter().map(|change| change[i]).fold(0.0, f64::max);
            let least = mup.iter().map(|change| change[i]).fold(f64::INFINITY, f64::min);
            // A power of the width that were off by a half would show as 2.8.
            assert!(most < 1.5 * least, "{i}: {mup:?}");
            assert!(standard.windows(2).all(|pair| pair[1][i] > 1.1 * pair[0][i]), "{i}: {standard:?}");
            assert!(standard[3][i] > 2.0 * standard[0][i], "{i}: {standard:?}");
        }
    }

    #[test]
    fn at_the_base_width_nothing_changes_and_beyond_it_as_in_table_3() {
        let values = |width, mup| {
            let (model, optimizer) = start(&recipe(width, mup, &[]), 96, &device()).unwrap();
            let values = parameters(&model).into_iter().map(|(name, values)| (name, to_host(values)));
            (values.collect::<HashMap<_, _>>(), optimizer.groups(&model).unwrap())
        };
        assert_eq!(values(BASE_WIDTH, true).0, values(BASE_WIDTH, false).0);
        let (wide, groups) = values(256, true);
        let std = |name: &str| {
            let x = &wide[name];
            (x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / x.len() as f64).sqrt()
        };
        for (name, expected) in
            [("embed.weight", 0.125), ("blocks.0.attn.qkv.weight", 0.125 / 2.0), ("head.weight", 0.125 / 4.0)]
        {
            assert!((std(name) / expected - 1.0).abs() < 0.03, "{name}: {} {expected}", std(name));
        }
        let scales: Vec<(f64, usize)> =
            groups.groups.iter().map(|group| (group.lr_scale, group.params.len())).collect();
        assert_eq!(
            scales,
            [(0.25, 9), (1.0, 1), (1.0, 5)],
            "4 matrices in 2 blocks and the head; the embedding; norms"
        );
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        for (set, words) in [
            ("model.tied=true", "model.tied = true"),
            ("model.mup_base_width=0", "model.mup_base_width = 0"),
            ("optimizer={ kind = \"sgd\" }", "optimizer.kind = sgd"),
            ("optimizer.groups=[{ kinds = [\"head\"] }]", "optimizer.groups = 1"),
        ] {
            let recipe = recipe(128, true, &[set]);
            let config = recipe.model.resolve(96).unwrap();
            let error = recipe.mup(&config).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}
