//! What fits and what does not between a model and a file, all of it at once.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

use super::error::CheckpointError;
use super::tensors::TensorFile;

/// How many names of a kind are shown; the rest is counted.
const SHOWN: usize = 8;
/// Names less alike than this are no help.
const ALIKE: f64 = 0.5;

/// A tensor whose shape in the file is not the model's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrongShape {
    /// The name.
    pub name: String,
    /// The model's shape.
    pub expected: Vec<usize>,
    /// The file's shape.
    pub got: Vec<usize>,
}

/// The differences between the tensors that a model expects and those that a file has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LoadReport {
    /// Expected by the model, absent in the file.
    pub missing: Vec<String>,
    /// In the file, unknown to the model.
    pub unused: Vec<String>,
    /// In both, with different shapes.
    pub wrong_shape: Vec<WrongShape>,
}

impl LoadReport {
    /// Compares the names and shapes that a model expects with those of `file`.
    pub fn compare<'a>(expected: impl IntoIterator<Item = (&'a str, &'a [usize])>, file: &TensorFile) -> Self {
        let found = file.names().filter_map(|name| Some((name, file.shape(name).ok()?)));
        Self::compare_shapes(expected, found)
    }

    /// Compares two lists of names and shapes.
    pub fn compare_shapes<'a, 'b>(
        expected: impl IntoIterator<Item = (&'a str, &'a [usize])>,
        found: impl IntoIterator<Item = (&'b str, &'b [usize])>,
    ) -> Self {
        let found: BTreeMap<&str, &[usize]> = found.into_iter().collect();
        let mut report = Self::default();
        let mut known = BTreeSet::new();
        for (name, shape) in expected {
            known.insert(name);
            match found.get(name) {
                None => report.missing.push(name.to_owned()),
                Some(&got) if got != shape => report.wrong_shape.push(WrongShape {
                    name: name.to_owned(),
                    expected: shape.to_vec(),
                    got: got.to_vec(),
                }),
                Some(_) => {}
            }
        }
        report.unused = found.keys().filter(|name| !known.contains(*name)).map(|&name| name.to_owned()).collect();
        report
    }

    /// Whether everything fits.
    pub fn is_clean(&self) -> bool {
        self.missing.is_empty() && self.unused.is_empty() && self.wrong_shape.is_empty()
    }

    /// `Ok` if everything fits.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::Mismatch`] about the file at `path` with this report in it.
    pub fn into_result(self, path: &Path) -> Result<(), CheckpointError> {
        if self.is_clean() {
            return Ok(());
        }
        Err(CheckpointError::Mismatch { path: path.to_owned(), report: Box::new(self) })
    }
}

impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_clean() {
            return f.write_str("all tensors fit");
        }
        let mut part = Parts { f, first: true };
        part.list("missing", &self.missing, |name| match nearest(name, self.unused.iter().map(String::as_str)) {
            Some(near) => format!("`{name}` (the file has `{near}`)"),
            None => format!("`{name}`"),
        })?;
        part.list("of another shape", &self.wrong_shape, |wrong| {
            format!("`{}` (expected {:?}, got {:?})", wrong.name, wrong.expected, wrong.got)
        })?;
        part.list("in the file but not in the model", &self.unused, |name| format!("`{name}`"))
    }
}

/// Writes "2 missing: a, b; 1 of another shape: c".
struct Parts<'a, 'b> {
    f: &'a mut fmt::Formatter<'b>,
    first: bool,
}

impl Parts<'_, '_> {
    fn list<T>(&mut self, what: &str, items: &[T], show: impl Fn(&T) -> String) -> fmt::Result {
        if items.is_empty() {
            return Ok(());
        }
        let names: Vec<String> = items.iter().take(SHOWN).map(show).collect();
        let start = if self.first { "" } else { "; " };
        self.first = false;
        write!(self.f, "{start}{} {what}: {}", items.len(), names.join(", "))?;
        match items.len() - names.len() {
            0 => Ok(()),
            rest => write!(self.f, " and {rest} more"),
        }
    }
}

/// The candidate most like `name`, if any is like it at all.
pub(super) fn nearest<'a>(name: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let scored = candidates.map(|other| (strsim::normalized_damerau_levenshtein(name, other), other));
    let best = scored.max_by(|a, b| a.0.total_cmp(&b.0))?;
    (best.0 >= ALIKE).then_some(best.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_said_at_once() {
        let expected: [(&str, &[usize]); 4] = [
            ("model.layers.0.self_attn.q_proj.weight", &[8, 8]),
            ("model.norm.weight", &[8]),
            ("lm_head.weight", &[16, 8]),
            ("a", &[]),
        ];
        let found: [(&str, &[usize]); 3] =
            [("model.layers.0.attn.q_proj.weight", &[8, 8]), ("model.norm.weight", &[4]), ("lm_head.weight", &[16, 8])];
        let report = LoadReport::compare_shapes(expected, found);
        assert_eq!(
            report.to_string(),
            "2 missing: `model.layers.0.self_attn.q_proj.weight` (the file has `model.layers.0.attn.q_proj.weight`), `a`; \
             1 of another shape: `model.norm.weight` (expected [8], got [4]); \
             1 in the file but not in the model: `model.layers.0.attn.q_proj.weight`"
        );
        assert!(matches!(report.into_result(Path::new("m")), Err(CheckpointError::Mismatch { .. })));
    }

    #[test]
    fn long_lists_are_counted() {
        let names: Vec<String> = (0..20).map(|i| format!("layer.{i}")).collect();
        let shape: &[usize] = &[1];
        let report = LoadReport::compare_shapes(names.iter().map(|n| (n.as_str(), shape)), []);
        assert!(report.to_string().ends_with("and 12 more"), "{report}");
        let same = LoadReport::compare_shapes([("x", shape)], [("x", shape)]);
        assert!(same.is_clean() && same.into_result(Path::new("m")).is_ok());
    }
}
