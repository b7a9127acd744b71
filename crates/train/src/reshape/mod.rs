//! Trained models in other shapes: [shared layers](share), [low rank](low_rank()), [structures taken out](structured), and all of these [written out](expand) again.
//!
//! Each reads the folder of a model, one parameter at a time, and writes another that [`model_io::load`](crate::model_io::load) opens: a model larger than memory can be reshaped.
//! The new folder is written aside, flushed, and renamed.

mod factor;
mod folder;
mod low_rank;
mod share;
pub mod structured;

use std::path::Path;

use firebox_models::transformer::{Source, TransformerConfig};

use crate::TrainError;

pub use folder::ModelFolder;
pub use low_rank::low_rank;
pub use share::share;

/// Writes the model in `input` to the folder `output` with a whole matrix for every layer and rows as wide as the model: what programs can load that know no sharing and no
/// low rank. Returns its shape.
///
/// # Errors
/// A model that cannot be read, an `output` that is there, or a full disk.
pub fn expand(input: &Path, output: &Path) -> Result<TransformerConfig, TrainError> {
    let model = ModelFolder::open(input)?;
    let config = model.config().expanded();
    model.write(output, &config, |param| expanded(&model, param))?;
    Ok(config)
}

/// The values of a parameter of the [expanded](TransformerConfig::expanded) model.
///
/// # Errors
/// A parameter that cannot be read.
pub fn expanded(model: &ModelFolder, param: &str) -> Result<Vec<f32>, TrainError> {
    let Source { whole, products } = model.config().source(param);
    let mut sum = whole.map(|name| model.read(&name)).transpose()?;
    for product in products {
        let [a, b] = &product.factors;
        let (rows, inner) = sides(model.shape(a)?);
        let (b_rows, b_columns) = sides(model.shape(b)?);
        let right = model.read(b)?;
        let (right, columns) = match product.transposed {
            true => (factor::transposed(&right, b_rows, b_columns), b_rows),
            false => (right, b_columns),
        };
        let values = factor::product(&model.read(a)?, &right, [rows, inner, columns]);
        match &mut sum {
            Some(sum) => sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value),
            None => sum = Some(values),
        }
    }
    Ok(sum.unwrap_or_default())
}

fn sides(shape: &[usize]) -> (usize, usize) {
    match shape {
        [rows, columns] => (*rows, *columns),
        other => (1, other.iter().product()),
    }
}
