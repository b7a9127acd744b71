//! The recipe's `[memory]`.

use std::fmt;
use std::path::Path;

use firebox_optim::Clip;
use serde::de::{self, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use firebox_tensor::ops::Compute;

use super::Engine;
use crate::optimizer_recipe::OptimizerRecipe;
use crate::recipe::RecipeError;

/// What a run does to need less memory. Nothing here changes a bit of the results.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MemoryRecipe {
    /// Which blocks are computed again in backward instead of kept.
    pub recompute: Recompute,
    /// Where the inputs of recomputed blocks wait.
    pub offload: Offload,
    /// Update parameters during backward, each as soon as its gradient is complete, and drop the gradient.
    pub optimizer_in_backward: bool,
}

/// Which stages are computed again in backward: `"none"`, `"blocks"`, or a number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Recompute {
    /// None: everything is kept.
    #[default]
    None,
    /// All but the last, whose backward comes first anyway. Of each only the input is kept.
    Blocks,
    /// The same, but every so many blocks one is kept: `N`, `2 N`, … of `1, 2, 3, …`. At least 2.
    Every(usize),
}

/// Where the inputs of recomputed stages wait for backward.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Offload {
    /// In memory.
    #[default]
    None,
    /// In a file in the folder of the run.
    Disk,
}

impl MemoryRecipe {
    /// The engine of a run in `dir`.
    pub fn engine(&self, dir: &Path) -> Engine {
        let offload = match self.offload {
            Offload::None => None,
            Offload::Disk => Some(dir.to_path_buf()),
        };
        Engine { recompute: self.recompute, offload, compute: Compute::F32 }
    }

    /// Checks it against the rest of the recipe.
    pub(crate) fn validate(&self, optimizer: &OptimizerRecipe, micro_batches: usize) -> Result<(), RecipeError> {
        let fail = |key, expected: &str, got: String| Err(RecipeError::Value { key, expected: expected.into(), got });
        if self.offload == Offload::Disk && self.recompute == Recompute::None {
            return fail(
                "memory.offload",
                "none, or memory.recompute beside it: what is kept stays in memory",
                "disk".into(),
            );
        }
        let own = optimizer.groups.iter().filter_map(|group| group.clip).map(|clip| ("optimizer.groups.clip", clip));
        for (key, clip) in std::iter::once(("optimizer.clip", optimizer.clip)).chain(own) {
            if let (true, true, Clip::Norm(norm)) = (self.optimizer_in_backward, clip.needs_norm(), clip) {
                let expected = "0 or { adaptive = ... } with memory.optimizer_in_backward: a norm is known only after \
                                the update";
                return fail(key, expected, norm.to_string());
            }
        }
        if self.optimizer_in_backward && micro_batches > 1 {
            let expected = "0 with memory.optimizer_in_backward: gradients of micro-batches cannot be added up";
            return fail("train.micro_batch_rows", expected, format!("{micro_batches} micro-batches"));
        }
        Ok(())
    }
}

impl Recompute {
    const NONE: &str = "none";
    const BLOCKS: &str = "blocks";

    /// Whether the graph of stage `i` of `n` is kept.
    pub fn keeps(self, i: usize, n: usize) -> bool {
        i + 1 == n
            || match self {
                Recompute::None => true,
                Recompute::Blocks => false,
                Recompute::Every(every) => i > 0 && i.is_multiple_of(every),
            }
    }
}

impl Serialize for Recompute {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Recompute::None => serializer.serialize_str(Self::NONE),
            Recompute::Blocks => serializer.serialize_str(Self::BLOCKS),
            Recompute::Every(every) => serializer.serialize_u64(*every as u64),
        }
    }
}

impl<'de> Deserialize<'de> for Recompute {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Value;

        impl Visitor<'_> for Value {
            type Value = Recompute;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"none\", \"blocks\", or a number of at least 2: every so many blocks one is kept")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Recompute, E> {
                match text {
                    Recompute::NONE => Ok(Recompute::None),
                    Recompute::BLOCKS => Ok(Recompute::Blocks),
                    _ => Err(E::unknown_variant(text, &[Recompute::NONE, Recompute::BLOCKS])),
                }
            }

            fn visit_i64<E: de::Error>(self, every: i64) -> Result<Recompute, E> {
                match usize::try_from(every) {
                    Ok(every) if every >= 2 => Ok(Recompute::Every(every)),
                    _ => Err(E::invalid_value(Unexpected::Signed(every), &self)),
                }
            }

            fn visit_u64<E: de::Error>(self, every: u64) -> Result<Recompute, E> {
                self.visit_i64(i64::try_from(every).unwrap_or(i64::MAX))
            }
        }

        deserializer.deserialize_any(Value)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::Recipe;

    fn recipe(set: &[&str]) -> Result<Recipe, RecipeError> {
        Recipe::load("tiny", &set.iter().map(ToString::to_string).collect::<Vec<_>>())
    }

    #[test]
    fn values_round_trip() {
        for (set, expected) in [
            ("none", Recompute::None),
            ("blocks", Recompute::Blocks),
            ("\"blocks\"", Recompute::Blocks),
            ("2", Recompute::Every(2)),
            ("7", Recompute::Every(7)),
        ] {
            let recipe = recipe(&[&format!("memory.recompute={set}")]).unwrap();
            assert_eq!(recipe.memory.recompute, expected);
            assert_eq!(recipe.clone().with(&[]).unwrap(), recipe);
        }
        let all = recipe(&[
            "memory={ recompute = 3, offload = \"disk\", optimizer_in_backward = true }",
            "optimizer.clip=0",
            "train.micro_batch_rows=0",
        ]);
        let engine = all.unwrap().memory.engine(Path::new("runs/x"));
        assert_eq!(
            engine,
            Engine { recompute: Recompute::Every(3), offload: Some("runs/x".into()), compute: Compute::F32 }
        );
    }

    #[test]
    fn errors_say_what_to_do() {
        let oib = "memory.optimizer_in_backward=true";
        for (set, says) in [
            (&["memory.recompute=block"][..], "did you mean `blocks`?"),
            (&["memory.recompute=1"], "at least 2"),
            (&["memory.recompute=-3"], "at least 2"),
            (&["memory.recompute=1.5"], "at least 2"),
            (&["memory.ofload=disk"], "did you mean `offload`?"),
            (&["memory.recompute=blocks", "memory.offload=dsk"], "did you mean `disk`?"),
            (&["memory.offload=disk"], "memory.recompute"),
            (&["memroy.offload=disk"], "did you mean `memory`?"),
            (&[oib, "train.micro_batch_rows=0"], "optimizer.clip = 1: expected 0"),
            (
                &[oib, "optimizer={ clip = 0, groups = [{ kinds = [\"head\"], clip = 2 }] }"],
                "optimizer.groups.clip = 2: expected 0",
            ),
            (&[oib, "optimizer.clip=0", "train.batch_rows=8", "train.micro_batch_rows=3"], "3 micro-batches"),
        ] {
            let error = recipe(set).unwrap_err().to_string();
            assert!(error.contains(says), "{set:?}: {error}");
        }
        recipe(&[oib, "optimizer.clip=0", "train.batch_rows=8", "train.micro_batch_rows=8"]).unwrap();
    }

    #[test]
    fn kept_stages() {
        let kept = |recompute: Recompute| (0..8).filter(|&i| recompute.keeps(i, 8)).collect::<Vec<_>>();
        assert_eq!(kept(Recompute::None), [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(kept(Recompute::Blocks), [7]);
        assert_eq!(kept(Recompute::Every(2)), [2, 4, 6, 7]);
        assert_eq!(kept(Recompute::Every(4)), [4, 7]);
    }
}
