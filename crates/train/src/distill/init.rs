//! A student that starts from its teacher's layers.

use std::collections::HashMap;
use std::path::Path;

use burn::tensor::Device;
use firebox_models::transformer::{Positions, Transformer, TransformerConfig};

use crate::TrainError;
use crate::model_io::{Later, later, load, set_later};

/// The teacher's layer from which layer `i` of `student` starts, of `teacher` layers: evenly spaced, the first from the first and the last from the last, as DistilBERT's.
fn layer(i: usize, student: usize, teacher: usize) -> usize {
    let gaps = student.saturating_sub(1).max(1);
    (2 * i * (teacher - 1) + gaps) / (2 * gaps)
}

/// The student with its teacher's embeddings, norm, head and some of its layers. Values are read when they are first used.
///
/// # Errors
/// [`TrainError::Input`] for a student of another shape than its teacher, or with more layers.
pub(crate) fn from_teacher(student: Transformer, path: &Path, device: &Device) -> Result<Transformer, TrainError> {
    let teacher = load(path, device)?.model;
    if teacher.is_packed() {
        let expected = "random with a quantized teacher, which has no parameters in floats".into();
        return Err(TrainError::Input { what: "distill.init", expected, got: "teacher".into() });
    }
    let (of_student, of_teacher) = (student.config().clone(), teacher.config().clone());
    check(&of_student, &of_teacher)?;
    let mut values: HashMap<String, Later> = HashMap::new();
    // Two layers of the student never start from the same one: it has no more of them.
    let from: HashMap<usize, usize> =
        (0..of_student.n_layers).map(|i| (layer(i, of_student.n_layers, of_teacher.n_layers), i)).collect();
    for (info, value) in later(&teacher) {
        let block = info.name.strip_prefix("blocks.").and_then(|rest| rest.split_once('.'));
        let name = match block {
            None => info.name,
            Some((number, rest)) => {
                let Some(i) = number.parse().ok().and_then(|number: usize| from.get(&number)) else { continue };
                format!("blocks.{i}.{rest}")
            }
        };
        values.insert(name, value);
    }
    Ok(set_later(student, values))
}

fn check(student: &TransformerConfig, teacher: &TransformerConfig) -> Result<(), TrainError> {
    let fail = |what, expected: String, got: String| Err(TrainError::Input { what, expected, got });
    let why = "with distill.init = \"teacher\"";
    if student.n_layers > teacher.n_layers {
        let expected = format!("at most the teacher's {} {why}", teacher.n_layers);
        return fail("model.n_layers", expected, student.n_layers.to_string());
    }
    for (what, mine, theirs) in [
        ("model.d_model", student.d_model, teacher.d_model),
        ("model.n_heads", student.n_heads, teacher.n_heads),
        ("model.n_kv_heads", student.n_kv_heads, teacher.n_kv_heads),
        ("model.head_dim", student.head_dim, teacher.head_dim),
        ("model.d_ff", student.d_ff, teacher.d_ff),
        ("model.vocab_size", student.vocab_size, teacher.vocab_size),
    ] {
        if mine != theirs {
            return fail(what, format!("the teacher's {theirs} {why}"), mine.to_string());
        }
    }
    for (what, config) in [("model", student), ("the teacher", teacher)] {
        if !config.reduction.is_none() {
            let expected = format!("whole matrices for every layer {why}");
            return fail(what, expected, format!("{:?}", config.reduction));
        }
    }
    // What changes no parameter's shape or meaning.
    let mut same = TransformerConfig {
        n_layers: teacher.n_layers,
        dropout: teacher.dropout,
        init_std: teacher.init_std,
        window: teacher.window,
        ..student.clone()
    };
    if matches!(student.positions, Positions::Rotary { .. }) {
        same.context = teacher.context;
    }
    if same != *teacher {
        let expected = format!("the teacher's shape but for its layers {why}: {teacher:?}");
        return fail("model", expected, format!("{student:?}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::layer;

    #[test]
    fn layers_are_evenly_spaced() {
        let of = |student, teacher| (0..student).map(|i| layer(i, student, teacher)).collect::<Vec<_>>();
        assert_eq!(of(6, 12), [0, 2, 4, 7, 9, 11]);
        assert_eq!(of(2, 4), [0, 3]);
        assert_eq!(of(1, 4), [0]);
        assert_eq!(of(5, 5), [0, 1, 2, 3, 4]);
        for teacher in 1..40 {
            for student in 1..=teacher {
                let of = of(student, teacher);
                assert!(of.windows(2).all(|pair| pair[0] < pair[1]) && of.iter().all(|&layer| layer < teacher));
            }
        }
    }
}
