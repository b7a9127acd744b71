//! Rows with named fields, as fine-tuning and evaluation read them: lines of .jsonl files (plain, gzip, Zstandard) and rows of .parquet files, all in memory.

use crate::config::Source;
use crate::error::DataError;
use crate::files::{CorpusFile, Format, list_files};
use crate::permute::{permute, random};
use crate::read::lines;
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

/// A row.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    path: Arc<Path>,
    line: u64,
    /// Its fields, by name.
    pub fields: Map<String, Value>,
    /// Columns of bytes, which only .parquet files have, by name; those inside a group are called `group.column`.
    pub bytes: BTreeMap<String, Vec<u8>>,
}

impl Record {
    /// The file that it is from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The error that this row is not what a task needs.
    pub fn bad(&self, reason: impl Into<String>) -> DataError {
        DataError::BadRow { path: self.path.to_path_buf(), line: self.line, reason: reason.into() }
    }

    /// A field.
    ///
    /// # Errors
    /// [`DataError::BadRow`] where it is missing or null.
    pub fn field(&self, name: &str) -> Result<&Value, DataError> {
        match self.fields.get(name) {
            Some(value) if !value.is_null() => Ok(value),
            _ => {
                let names: Vec<&str> = self.fields.keys().chain(self.bytes.keys()).map(String::as_str).collect();
                let found = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
                Err(self.bad(format!("no field `{name}` (there are: {found})")))
            }
        }
    }

    /// A field that holds text.
    ///
    /// # Errors
    /// [`DataError::BadRow`] where it does not.
    pub fn text(&self, name: &str) -> Result<&str, DataError> {
        let value = self.field(name)?;
        value.as_str().ok_or_else(|| self.bad(format!("`{name}`: expected text, got {}", kind(value))))
    }

    /// A field that holds a list.
    ///
    /// # Errors
    /// [`DataError::BadRow`] where it does not.
    pub fn list(&self, name: &str) -> Result<&[Value], DataError> {
        let value = self.field(name)?;
        let list =
            value.as_array().ok_or_else(|| self.bad(format!("`{name}`: expected a list, got {}", kind(value))))?;
        Ok(list)
    }
}

/// What kind of JSON a value is, for errors.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// All rows of the files, folders and globs, in order.
///
/// # Errors
/// When a file cannot be read or parsed, is neither .jsonl nor .parquet, or there is no row at all.
pub fn read_records<S: AsRef<str>>(paths: &[S]) -> Result<Vec<Record>, DataError> {
    let source = Source::new(paths.iter().map(|path| path.as_ref().to_owned()));
    let mut records = Vec::new();
    for file in list_files(&[source], "")? {
        records.append(&mut records_of(&file)?);
    }
    if records.is_empty() {
        let given: Vec<&str> = paths.iter().map(AsRef::as_ref).collect();
        return Err(DataError::EmptyCorpus(format!("no row in {}", given.join(", "))));
    }
    Ok(records)
}

/// The rows of one file.
pub(crate) fn records_of(file: &CorpusFile) -> Result<Vec<Record>, DataError> {
    let mut records = Vec::new();
    match file.format {
        Format::Jsonl => jsonl(file, &mut records)?,
        Format::Parquet => parquet_rows(file, &mut records)?,
        Format::Plain => {
            let why = "rows with fields are in .jsonl, .jsonl.gz, .jsonl.zst or .parquet files".to_owned();
            return Err(DataError::NothingMatches { pattern: file.path.display().to_string(), why });
        }
    }
    Ok(records)
}

fn jsonl(file: &CorpusFile, records: &mut Vec<Record>) -> Result<(), DataError> {
    let path: Arc<Path> = file.path.clone().into();
    lines(file, &mut |line, number| {
        let fields = serde_json::from_slice(line).map_err(|e| DataError::BadJsonLine {
            path: path.to_path_buf(),
            line: number,
            reason: e.to_string(),
        })?;
        records.push(Record { path: path.clone(), line: number, fields, bytes: BTreeMap::new() });
        Ok(ControlFlow::Continue(()))
    })
}

fn parquet_rows(file: &CorpusFile, records: &mut Vec<Record>) -> Result<(), DataError> {
    let damaged =
        |e: ParquetError| DataError::Damaged { path: file.path.clone(), format: "parquet", reason: e.to_string() };
    let raw = File::open(&file.path).map_err(DataError::io("open", &file.path))?;
    let reader = SerializedFileReader::new(raw).map_err(damaged)?;
    let path: Arc<Path> = file.path.clone().into();
    for (number, row) in reader.get_row_iter(None).map_err(damaged)?.enumerate() {
        let mut record =
            Record { path: path.clone(), line: number as u64 + 1, fields: Map::new(), bytes: BTreeMap::new() };
        record.take(row.map_err(damaged)?, "");
        records.push(record);
    }
    Ok(())
}

impl Record {
    fn take(&mut self, row: Row, prefix: &str) {
        for (name, field) in row.into_columns() {
            let name = format!("{prefix}{name}");
            match field {
                Field::Bytes(bytes) => drop(self.bytes.insert(name, bytes.data().to_vec())),
                Field::Group(group) => {
                    self.fields.insert(name.clone(), group_value(&group));
                    self.take(group, &format!("{name}."));
                }
                field => drop(self.fields.insert(name, value(&field))),
            }
        }
    }
}

fn group_value(group: &Row) -> Value {
    Value::Object(group.get_column_iter().map(|(name, field)| (name.clone(), value(field))).collect())
}

/// What JSON can say of a field.
fn value(field: &Field) -> Value {
    match field {
        Field::Bool(v) => (*v).into(),
        Field::Byte(v) => (*v).into(),
        Field::Short(v) => (*v).into(),
        Field::Int(v) | Field::Date(v) => (*v).into(),
        Field::Long(v) | Field::TimestampMillis(v) | Field::TimestampMicros(v) => (*v).into(),
        Field::UByte(v) => (*v).into(),
        Field::UShort(v) => (*v).into(),
        Field::UInt(v) => (*v).into(),
        Field::ULong(v) => (*v).into(),
        Field::Float(v) => f64::from(*v).into(),
        Field::Double(v) => (*v).into(),
        Field::Str(v) => v.clone().into(),
        Field::Group(row) => group_value(row),
        Field::ListInternal(list) => list.elements().iter().map(value).collect(),
        Field::MapInternal(map) => {
            let key = |field: &Field| match value(field) {
                Value::String(text) => text,
                other => other.to_string(),
            };
            Value::Object(map.entries().iter().map(|(k, v)| (key(k), value(v))).collect())
        }
        // Bytes, and types that text and labels do not come in.
        _ => Value::Null,
    }
}

/// The order in which a run reads `n` rows, each once an epoch, in another order in each: a pure function of the seed and of the number of the sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Order {
    n: u64,
    seed: u64,
}

impl Order {
    /// Of `n` rows.
    pub fn new(n: usize, seed: u64) -> Self {
        Self { n: n as u64, seed }
    }

    /// The row that is sample number `sample`.
    ///
    /// # Panics
    /// Where there is no row.
    pub fn row(&self, sample: u64) -> usize {
        assert!(self.n > 0, "an order of no rows");
        permute(sample % self.n, self.n, random(self.seed, sample / self.n)) as usize
    }
}

/// Holds out a share of the rows, at least one where it is not 0 and there are two: always the same of the same number of rows. Both parts are in the order of `rows`; the second one is
/// what is held out.
pub fn hold_out<T>(rows: Vec<T>, fraction: f64) -> (Vec<T>, Vec<T>) {
    let n = rows.len() as u64;
    let held = if fraction > 0.0 && n > 1 { ((n as f64 * fraction).round() as u64).clamp(1, n - 1) } else { 0 };
    let (mut train, mut out) = (Vec::new(), Vec::new());
    for (i, row) in (0..).zip(rows) {
        if permute(i, n, 0) < held { out.push(row) } else { train.push(row) }
    }
    (train, out)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn lines_are_rows() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.jsonl").display().to_string();
        std::fs::write(&path, "{\"text\": \"one\", \"label\": 2}\n\n{\"text\": 3}\n").unwrap();
        let records = read_records(&[&path]).unwrap();
        assert_eq!((records.len(), records[0].text("text").unwrap()), (2, "one"));
        assert_eq!(records[0].field("label").unwrap(), 2);
        let error = records[1].text("text").unwrap_err().to_string();
        assert!(error.contains(":3:") && error.contains("expected text, got a number"), "{error}");
        let error = records[1].field("label").unwrap_err().to_string();
        assert!(error.contains("no field `label` (there are: text)"), "{error}");
        std::fs::write(&path, "{\"text\": \"one\"}\n[1]\n").unwrap();
        assert!(read_records(&[&path]).unwrap_err().to_string().contains(":2: not a JSON object"));
        std::fs::write(&path, "\n").unwrap();
        assert!(read_records(&[&path]).unwrap_err().to_string().contains("no row in"));
        let text = dir.path().join("a.txt");
        std::fs::write(&text, "text").unwrap();
        assert!(read_records(&[text.display().to_string()]).unwrap_err().to_string().contains(".jsonl"));
    }

    #[test]
    fn every_epoch_has_every_row_once() {
        let order = Order::new(7, 3);
        let epochs: Vec<Vec<usize>> = (0..3).map(|epoch| (0..7).map(|i| order.row(7 * epoch + i)).collect()).collect();
        for epoch in &epochs {
            let mut sorted = epoch.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..7).collect::<Vec<_>>());
        }
        assert!(epochs[0] != epochs[1] && epochs[1] != epochs[2]);
    }

    #[test]
    fn some_rows_are_held_out() {
        let rows: Vec<usize> = (0..100).collect();
        let (train, held) = hold_out(rows.clone(), 0.1);
        assert_eq!((train.len(), held.len()), (90, 10));
        assert!(train.is_sorted() && held.is_sorted());
        assert_eq!(hold_out(rows.clone(), 0.1), (train, held));
        assert_eq!(hold_out(rows, 0.0).1.len(), 0);
        assert_eq!(hold_out(vec![1, 2], 0.001).1.len(), 1);
        assert_eq!(hold_out(vec![1], 0.5).1.len(), 0);
    }
}
