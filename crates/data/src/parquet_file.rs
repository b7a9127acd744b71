//! Texts out of a column of a .parquet file, a few at a time.

use crate::error::DataError;
use crate::files::CorpusFile;
use crate::read::Emit;
use parquet::basic::Type;
use parquet::column::reader::ColumnReader;
use parquet::data_type::ByteArray;
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use std::fs::File;

/// Texts taken out of a column at once. A page of the column, usually 1 MiB, is in memory besides.
const TEXTS_AT_ONCE: usize = 64;

/// Reads the column of the text, row group by row group. Nulls are documents without text.
pub(crate) fn read(file: &CorpusFile, emit: &mut Emit<'_>) -> Result<(), DataError> {
    let damaged =
        |e: ParquetError| DataError::Damaged { path: file.path.clone(), format: "parquet", reason: e.to_string() };
    let raw = File::open(&file.path).map_err(DataError::io("open", &file.path))?;
    let reader = SerializedFileReader::new(raw).map_err(damaged)?;
    let column = find_column(file, &reader)?;
    for group in 0..reader.num_row_groups() {
        let group = reader.get_row_group(group).map_err(damaged)?;
        let ColumnReader::ByteArrayColumnReader(mut texts) = group.get_column_reader(column).map_err(damaged)? else {
            return Err(missing(file, "no text in column", &reader));
        };
        loop {
            let (mut values, mut levels): (Vec<ByteArray>, Vec<i16>) = (Vec::new(), Vec::new());
            let (records, got, _) =
                texts.read_records(TEXTS_AT_ONCE, Some(&mut levels), None, &mut values).map_err(damaged)?;
            if records == 0 {
                break;
            }
            let nulls = std::iter::repeat_n(Vec::new(), records - got.min(records));
            for text in values.into_iter().map(|v| v.data().to_vec()).chain(nulls) {
                if emit.document(text).is_break() {
                    return Ok(());
                }
            }
        }
    }
    Ok(())
}

/// A column without repetition whose physical type is bytes.
fn is_text(column: &parquet::schema::types::ColumnDescriptor) -> bool {
    column.physical_type() == Type::BYTE_ARRAY && column.max_rep_level() == 0
}

fn find_column(file: &CorpusFile, reader: &SerializedFileReader<File>) -> Result<usize, DataError> {
    let schema = reader.metadata().file_metadata().schema_descr();
    match schema.columns().iter().position(|c| c.path().string() == file.text_field) {
        Some(column) if is_text(&schema.columns()[column]) => Ok(column),
        Some(_) => Err(missing(file, "no text in column", reader)),
        None => Err(missing(file, "no column", reader)),
    }
}

fn missing(file: &CorpusFile, why: &'static str, reader: &SerializedFileReader<File>) -> DataError {
    let schema = reader.metadata().file_metadata().schema_descr();
    let names: Vec<String> = schema.columns().iter().filter(|c| is_text(c)).map(|c| c.path().string()).collect();
    let found = if names.is_empty() { "none".into() } else { names.join(", ") };
    DataError::MissingColumn { path: file.path.clone(), why, column: file.text_field.clone(), found }
}
