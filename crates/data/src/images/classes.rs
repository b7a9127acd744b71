//! The classes of labelled images.

use super::rows::ImageRow;
use crate::error::DataError;

/// The names of classes, in the order of their numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Classes {
    names: Vec<String>,
}

impl Classes {
    /// Of these names.
    pub fn new(names: Vec<String>) -> Self {
        Self { names }
    }

    /// The names, in the order of their numbers.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The number of a row's class.
    ///
    /// # Errors
    /// A row without a label, or with one that is not among the classes.
    pub fn of(&self, row: &ImageRow, field: &str) -> Result<i32, DataError> {
        let label = row.label(field)?;
        let found = self.names.iter().position(|name| *name == label);
        found.map(|n| n as i32).ok_or_else(|| {
            let known = self.names.iter().take(20).cloned().collect::<Vec<_>>().join(", ");
            let more = if self.names.len() > 20 { ", .." } else { "" };
            row.bad(format!("label `{label}`: expected one of the {} classes: {known}{more}", self.names.len()))
        })
    }
}

/// The classes that rows are labelled with, sorted: by their value where all are whole numbers.
///
/// # Errors
/// A row without a label.
pub fn classes_of(rows: &[ImageRow], field: &str) -> Result<Classes, DataError> {
    let mut names = rows.iter().map(|row| row.label(field)).collect::<Result<Vec<_>, _>>()?;
    if names.iter().all(|name| name.parse::<i64>().is_ok()) {
        names.sort_by_key(|name| name.parse::<i64>().unwrap_or_default());
    } else {
        names.sort();
    }
    names.dedup();
    Ok(Classes { names })
}
