//! The classes of labels, and what rows call them.

use std::collections::BTreeSet;

use firebox_data::{DataError, Record};
use serde_json::Value;

/// Numbers of classes that have no names go up to this.
const MOST: u64 = 65_535;

/// The names of classes, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Names {
    names: Vec<String>,
}

impl Names {
    /// Those that the recipe gives, or else those of all `labels`: names sorted, or as many as the largest number says.
    pub fn new(given: &[String], labels: &[(&Record, &Value)]) -> Result<Self, DataError> {
        if !given.is_empty() {
            return Ok(Self { names: given.to_vec() });
        }
        let (mut names, mut largest) = (BTreeSet::new(), None);
        for (record, label) in labels {
            match (label, number(label)) {
                (Value::String(name), _) if largest.is_none() => drop(names.insert(name.clone())),
                (_, Some(n)) if names.is_empty() && n <= MOST => largest = largest.max(Some(n)),
                (_, Some(n)) if names.is_empty() => {
                    return Err(
                        record.bad(format!("label {n}: expected one up to {MOST}; name the classes with task.labels"))
                    );
                }
                (Value::String(_), _) | (_, Some(_)) => {
                    return Err(
                        record.bad(format!("label {label}: expected all labels as names or all as numbers from 0"))
                    );
                }
                _ => return Err(unusable(record, label)),
            }
        }
        let all = |largest: u64| (0..=largest).map(numbered).collect();
        let names: Vec<String> = largest.map_or_else(|| names.into_iter().collect(), all);
        match labels.first() {
            Some((record, label)) if names.len() < 2 => {
                Err(record.bad(format!("label {label}: expected two classes at least, got this one in all rows")))
            }
            _ => Ok(Self { names }),
        }
    }

    /// `O`, and two of each kind of entity.
    pub fn of_entities(kinds: BTreeSet<&str>) -> Self {
        let both = kinds.into_iter().flat_map(|kind| [format!("B-{kind}"), format!("I-{kind}")]);
        Self { names: [OUTSIDE.to_owned()].into_iter().chain(both).collect() }
    }

    /// Whether they are more than numbers.
    pub fn are_given(&self) -> bool {
        (0..).zip(&self.names).any(|(i, name)| *name != numbered(i))
    }

    pub fn all(&self) -> &[String] {
        &self.names
    }

    /// The number of the class that a row names.
    pub fn class(&self, record: &Record, label: &Value) -> Result<i32, DataError> {
        let at = match (label, number(label)) {
            (Value::String(name), _) => self.names.iter().position(|known| known == name),
            (_, Some(n)) => usize::try_from(n).ok().filter(|&n| n < self.names.len()),
            _ => return Err(unusable(record, label)),
        };
        let missing = || {
            let (n, mut known) = (self.names.len(), self.names.iter().take(8).cloned().collect::<Vec<_>>().join(", "));
            if n > 8 {
                known += ", ...";
            }
            record.bad(format!(
                "label {label}: expected one of the {n} classes ({known}), or a number from 0 to {}",
                n - 1
            ))
        };
        at.map(|at| at as i32).ok_or_else(missing)
    }
}

/// The name of what is in no entity.
pub(super) const OUTSIDE: &str = "O";

/// What transformers calls a class without a name.
fn numbered(i: u64) -> String {
    format!("LABEL_{i}")
}

fn unusable(record: &Record, label: &Value) -> DataError {
    record.bad(format!("label {label}: expected a name or a number from 0"))
}

/// A whole number from 0, or 0 and 1 of false and true.
fn number(label: &Value) -> Option<u64> {
    match label {
        Value::Bool(yes) => Some(u64::from(*yes)),
        Value::Number(n) => n.as_u64().or_else(|| {
            let n = n.as_f64()?;
            (n.fract() == 0.0 && (0.0..9e15).contains(&n)).then_some(n as u64)
        }),
        _ => None,
    }
}
