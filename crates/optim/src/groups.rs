//! Parameter groups: which parameters have their own learning rate, decay or algorithm.

use std::collections::BTreeMap;
use std::fmt;

use burn::module::Module;
use globset::{Glob, GlobSet, GlobSetBuilder};
use serde::{Deserialize, Serialize};

use crate::OptimError;
use crate::algorithm::Algorithm;
use crate::clip::{Adaptive, Clip};
use crate::error::check;
use crate::params::{DecayRule, ParamInfo, ParamKind, in_words, parameters};

/// A group of parameters that are trained in their own way. A parameter belongs to the first group that it fits, by name and by kind, or else to the rest, which
/// has the optimizer's own values.
///
/// In a recipe: `[[optimizer.groups]]` with `params = ["blocks.0.*"]` or `kinds = ["embedding", "head"]`, and `lr_scale = 0.1`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GroupConfig {
    /// Patterns of names, with `*` for anything, `?` for one character, `{a,b}` for either; one must match. None: every name.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub params: Vec<String>,
    /// Kinds, of which one must fit. None: every kind.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub kinds: Vec<ParamKind>,
    /// What the learning rate is multiplied by. 0 keeps the parameters as they are. Default 1.
    pub lr_scale: f64,
    /// Weight decay of all its parameters; by default the algorithm's, where the rule of decay says so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<f64>,
    /// The algorithm; by default the optimizer's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub algorithm: Option<Algorithm>,
    /// How its gradients are clipped, a norm being that of the group's own; by default together with the rest by the optimizer's [`Clip`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip: Option<Clip>,
}

impl Default for GroupConfig {
    fn default() -> Self {
        Self { params: vec![], kinds: vec![], lr_scale: 1.0, weight_decay: None, algorithm: None, clip: None }
    }
}

impl GroupConfig {
    fn describe(&self) -> String {
        let kinds = self.kinds.iter().map(|kind| format!("{kind:?}").to_lowercase());
        let parts: Vec<String> = self.params.iter().cloned().chain(kinds).collect();
        if parts.is_empty() { "all".to_owned() } else { parts.join(" ") }
    }
}

/// Patterns of parameters' names, with `*` for anything, `?` for one character, `{a,b}` for either.
#[derive(Debug, Clone)]
pub struct Patterns(GlobSet);

impl Patterns {
    /// From texts.
    ///
    /// # Errors
    /// [`OptimError::Pattern`] for one that is none.
    pub fn new(patterns: &[String]) -> Result<Self, OptimError> {
        let mut set = GlobSetBuilder::new();
        let error = |pattern: &str, e: &globset::Error| OptimError::Pattern {
            pattern: pattern.to_owned(),
            reason: e.kind().to_string(),
        };
        for pattern in patterns {
            set.add(Glob::new(pattern).map_err(|e| error(pattern, &e))?);
        }
        set.build().map(Self).map_err(|e| error(&patterns.join(" "), &e))
    }

    /// Whether one of them fits the whole name.
    pub fn matches(&self, name: &str) -> bool {
        self.0.is_match(name)
    }
}

/// The groups of an optimizer, ready to say what a parameter is trained with.
#[derive(Debug, Clone)]
pub(crate) struct Rules {
    algorithm: Algorithm,
    decay: DecayRule,
    /// Of the parameters in no group, and of groups that have none of their own.
    clip: Clip,
    groups: Vec<(GroupConfig, Patterns)>,
    /// What the learning rates of parameters are multiplied by besides, by name; of those that are not in it, by 1.
    lr_scales: BTreeMap<String, f64>,
}

/// What a parameter is trained with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Assigned {
    /// Index of the group; none in the rest.
    pub group: Option<usize>,
    pub kind: ParamKind,
    pub algorithm: Algorithm,
    pub lr_scale: f64,
    pub weight_decay: f64,
    /// Which of [`Rules::clips`] its gradient counts to.
    pub clip: usize,
    /// How its gradient is clipped by itself.
    pub adaptive: Option<Adaptive>,
}

impl Rules {
    pub fn new(algorithm: Algorithm, decay: DecayRule, groups: Vec<GroupConfig>) -> Result<Self, OptimError> {
        algorithm.validate()?;
        let compile = |config: GroupConfig| {
            if let Some(algorithm) = &config.algorithm {
                algorithm.validate()?;
            }
            let scale = config.lr_scale;
            check("lr_scale", scale, (0.0..=1e6).contains(&scale), "0 <= lr_scale <= 1e6")?;
            config.clip.unwrap_or_default().validate()?;
            if let Some(decay) = config.weight_decay {
                check("weight_decay", decay, (0.0..=1e6).contains(&decay), "0 <= weight_decay <= 1e6")?;
            }
            let set = Patterns::new(&config.params)?;
            Ok((config, set))
        };
        let clip = Clip::default();
        let groups = groups.into_iter().map(compile).collect::<Result<_, OptimError>>()?;
        Ok(Self { algorithm, decay, clip, groups, lr_scales: BTreeMap::new() })
    }

    pub fn with_lr_scales(self, lr_scales: BTreeMap<String, f64>) -> Result<Self, OptimError> {
        for &scale in lr_scales.values() {
            check("lr_scale", scale, (0.0..=1e6).contains(&scale), "0 <= lr_scale <= 1e6")?;
        }
        Ok(Self { lr_scales, ..self })
    }

    pub fn with_clip(self, clip: Clip) -> Result<Self, OptimError> {
        clip.validate()?;
        Ok(Self { clip, ..self })
    }

    /// The optimizer's clipping, then each group's; that of a group without one is over nothing.
    pub fn clips(&self) -> Vec<Clip> {
        let groups = self.groups.iter().map(|(config, _)| config.clip.unwrap_or_default());
        std::iter::once(self.clip).chain(groups).collect()
    }

    pub fn algorithm(&self) -> &Algorithm {
        &self.algorithm
    }

    /// Those of the rest and of the groups.
    pub fn algorithms(&self) -> impl Iterator<Item = &Algorithm> {
        std::iter::once(&self.algorithm).chain(self.groups.iter().filter_map(|(config, _)| config.algorithm.as_ref()))
    }

    pub fn assign(&self, info: &ParamInfo) -> Assigned {
        let kind = ParamKind::of(&info.name, &info.shape);
        let fits = |(config, names): &(GroupConfig, Patterns)| {
            (config.params.is_empty() || names.matches(&info.name))
                && (config.kinds.is_empty() || config.kinds.contains(&kind))
        };
        let group = self.groups.iter().position(fits);
        let config = group.map(|i| &self.groups[i].0);
        let algorithm = config.and_then(|config| config.algorithm).unwrap_or(self.algorithm);
        let decays = self.decay.decays(info.shape.len());
        let weight_decay = config.and_then(|config| config.weight_decay).unwrap_or(if decays {
            algorithm.weight_decay()
        } else {
            0.0
        });
        let own = config.and_then(|config| config.clip);
        let left_out = own.is_none() && matches!(kind, ParamKind::Head | ParamKind::Embedding);
        let adaptive = match own.unwrap_or(self.clip) {
            Clip::Adaptive(adaptive) if !left_out => Some(adaptive),
            _ => None,
        };
        let clip = group.filter(|_| own.is_some()).map_or(0, |group| group + 1);
        let of_name = self.lr_scales.get(&info.name).copied().unwrap_or(1.0);
        let lr_scale = config.map_or(1.0, |config| config.lr_scale) * of_name;
        Assigned { group, kind, algorithm, lr_scale, weight_decay, clip, adaptive }
    }

    /// Checks a learning rate for every group.
    pub fn validate_lr(&self, lr: f64) -> Result<(), OptimError> {
        self.algorithm.validate_lr(lr)?;
        for (config, _) in &self.groups {
            let lr = lr * config.lr_scale;
            config.algorithm.unwrap_or(self.algorithm).validate_lr(lr)?;
            if let Some(weight_decay) = config.weight_decay.filter(|decay| lr * decay >= 1.0) {
                return Err(OptimError::DecayTooStrong { lr, weight_decay });
            }
        }
        Ok(())
    }

    /// Sorts the parameters of `module`, and proves that the groups partition them: names differ, and the counts add up to what burn counts by itself.
    pub fn partition<M: Module>(&self, module: &M) -> Result<Groups, OptimError> {
        let mut groups: Vec<Group> = self
            .groups
            .iter()
            .map(|(config, _)| Group {
                label: config.describe(),
                algorithm: config.algorithm.unwrap_or(self.algorithm),
                lr_scale: config.lr_scale,
                clip: config.clip,
                params: vec![],
            })
            .collect();
        let rest = groups.len();
        for label in ["decay", "no decay"] {
            groups.push(Group {
                label: label.to_owned(),
                algorithm: self.algorithm,
                lr_scale: 1.0,
                clip: None,
                params: vec![],
            });
        }
        let mut frozen = vec![];
        for info in parameters(module)? {
            if !info.trainable {
                frozen.push(info);
                continue;
            }
            let Assigned { group, weight_decay, .. } = self.assign(&info);
            // Where the configuration decays nothing, the rule still sorts.
            let decays = weight_decay > 0.0 || self.decay.decays(info.shape.len());
            groups[group.unwrap_or(rest + usize::from(!decays))].params.push(info);
        }
        if let Some(empty) = groups[..rest].iter().find(|group| group.params.is_empty()) {
            return Err(OptimError::EmptyGroup { group: empty.label.clone() });
        }
        let grouped = groups.iter().map(Group::elements).sum::<usize>() + elements(&frozen);
        let total = module.num_params();
        if grouped != total {
            return Err(OptimError::NotAPartition { grouped, total });
        }
        Ok(Groups { groups, frozen })
    }
}

/// A group with its parameters.
#[derive(Debug, Clone, PartialEq)]
pub struct Group {
    /// What it was chosen by; of the rest `decay` and `no decay`.
    pub label: String,
    /// The algorithm.
    pub algorithm: Algorithm,
    /// What the learning rate is multiplied by.
    pub lr_scale: f64,
    /// How its gradients are clipped, if by themselves.
    pub clip: Option<Clip>,
    /// Its parameters.
    pub params: Vec<ParamInfo>,
}

impl Group {
    fn elements(&self) -> usize {
        elements(&self.params)
    }
}

/// A module's parameters, each in exactly one group.
///
/// Printed at the start of a run: `decay: 26 tensors, 13.8M; no decay: 27 tensors, 21.9k`.
#[derive(Debug, Clone, PartialEq)]
pub struct Groups {
    /// The configured groups in their order, then those of the rest that decay and those that do not.
    pub groups: Vec<Group>,
    /// Not trained: they do not require gradients.
    pub frozen: Vec<ParamInfo>,
}

impl fmt::Display for Groups {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = |params: &[ParamInfo]| {
            let s = if params.len() == 1 { "" } else { "s" };
            format!("{} tensor{s}, {}", params.len(), in_words(elements(params)))
        };
        let rest = self.groups.last().map(|group| group.algorithm);
        for (i, group) in self.groups.iter().enumerate() {
            write!(f, "{}{}: {}", if i == 0 { "" } else { "; " }, group.label, count(&group.params))?;
            if group.lr_scale != 1.0 {
                write!(f, ", lr x {}", group.lr_scale)?;
            }
            match group.clip {
                Some(Clip::Norm(norm)) if norm > 0.0 => write!(f, ", clip {norm}")?,
                Some(Clip::Norm(_)) => write!(f, ", no clip")?,
                Some(Clip::Adaptive(Adaptive { adaptive })) => write!(f, ", adaptive clip {adaptive}")?,
                None => {}
            }
            if Some(group.algorithm) != rest {
                write!(f, ", {}", group.algorithm.name())?;
            }
        }
        if !self.frozen.is_empty() {
            write!(f, "; frozen: {}", count(&self.frozen))?;
        }
        Ok(())
    }
}

fn elements(params: &[ParamInfo]) -> usize {
    params.iter().map(ParamInfo::elements).sum()
}
