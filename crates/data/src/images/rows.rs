//! Where images come from.

use super::preprocess::Preprocess;
use crate::config::Source;
use crate::error::DataError;
use crate::files::{CorpusFile, image_files, is_image, list_files};
use crate::records::{Record, records_of};
use rayon::prelude::*;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// An image and what belongs to it.
#[derive(Debug, Clone)]
pub struct ImageRow {
    /// `[C, size, size]`, before they are normalized.
    pub pixels: Vec<u8>,
    from: From,
}

#[derive(Debug, Clone)]
enum From {
    /// A file, and the folder below the one that was given, if it is in one.
    File(PathBuf, Option<String>),
    /// A row, without the image's bytes.
    Row(Record),
}

/// Columns in which an image's path or bytes are looked for; the second one is that of Hugging Face's image folders.
const COLUMNS: [&str; 2] = ["image", "file_name"];

impl ImageRow {
    /// The error that this row is not what a task needs.
    pub fn bad(&self, reason: impl Into<String>) -> DataError {
        match &self.from {
            From::File(path, _) => DataError::BadImage { path: path.clone(), reason: reason.into() },
            From::Row(row) => row.bad(reason),
        }
    }

    /// Its label, as text: the row's field, or of a file the folder that it is in.
    ///
    /// # Errors
    /// Where there is none, or it is neither text nor a whole number.
    pub fn label(&self, field: &str) -> Result<String, DataError> {
        match &self.from {
            From::File(_, Some(folder)) => Ok(folder.clone()),
            From::File(_, None) => Err(self.bad(
                "no label: expected the image in a folder named after its class, below the folder that is given, or in a .jsonl or .parquet file with labels",
            )),
            From::Row(row) => match row.field(field)? {
                Value::String(text) => Ok(text.clone()),
                Value::Number(n) if n.is_u64() || n.is_i64() => Ok(n.to_string()),
                other => Err(row.bad(format!("`{field}`: expected a label (text or a whole number), got {other}"))),
            },
        }
    }

    /// Its captions: the row's field, one text or a list of them.
    ///
    /// # Errors
    /// Where there is none.
    pub fn captions(&self, field: &str) -> Result<Vec<String>, DataError> {
        let From::Row(row) = &self.from else {
            return Err(
                self.bad("no caption: captions are in .jsonl or .parquet files, beside an image's path or bytes")
            );
        };
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let captions = match row.field(field)? {
            Value::Array(list) => list.iter().map(text).collect::<Option<Vec<_>>>(),
            one => text(one).map(|one| vec![one]),
        };
        match captions {
            Some(captions) if !captions.is_empty() => Ok(captions),
            _ => Err(row.bad(format!("`{field}`: expected a caption, or a list of them"))),
        }
    }
}

/// All images of files, folders and globs, decoded and resized, in order.
///
/// - A folder with .jsonl or .parquet files is those; one without is its images, of which each has the name of the folder below it as its label (`cats/1.png`).
/// - A row of .jsonl names a file in `image` (or `file_name`), relative to its own.
/// - A row of .parquet has the bytes in `image.bytes` or `image`, as Hugging Face's data sets write them, or a path.
///
/// # Errors
/// When a file cannot be read, a row has no image, an image is broken, or there is none at all.
pub fn read_images<S: AsRef<str>>(paths: &[S], preprocess: &Preprocess) -> Result<Vec<ImageRow>, DataError> {
    if paths.is_empty() {
        return Err(DataError::NoSources);
    }
    let mut rows = vec![];
    for path in paths {
        let source = Source::new([path.as_ref()]);
        let listed = list_files(&[source], "");
        let tables = listed.as_ref().is_ok_and(|files| files.iter().any(|file| !is_image(&file.path)));
        if !tables {
            let files = image_files(path.as_ref())?;
            if !files.is_empty() {
                rows.extend(from_files(files, Path::new(path.as_ref()), preprocess)?);
                continue;
            }
        }
        for file in listed? {
            rows.extend(from_table(&file, preprocess)?);
        }
    }
    Ok(rows)
}

fn from_files(files: Vec<PathBuf>, given: &Path, preprocess: &Preprocess) -> Result<Vec<ImageRow>, DataError> {
    let row = |path: PathBuf| {
        let below = path.strip_prefix(given).ok().and_then(Path::parent);
        let folder = below.and_then(|below| below.components().next());
        let folder = folder.map(|folder| folder.as_os_str().to_string_lossy().into_owned());
        let bytes = std::fs::read(&path).map_err(DataError::io("read", &path))?;
        let pixels = preprocess.pixels(&bytes);
        let pixels = pixels.map_err(|reason| DataError::BadImage { path: path.clone(), reason })?;
        Ok(ImageRow { pixels, from: From::File(path, folder) })
    };
    files.into_par_iter().map(row).collect()
}

fn from_table(file: &CorpusFile, preprocess: &Preprocess) -> Result<Vec<ImageRow>, DataError> {
    let folder = file.path.parent().unwrap_or(Path::new(""));
    records_of(file)?.into_par_iter().map(|record| from_record(record, folder, preprocess)).collect()
}

fn from_record(mut record: Record, folder: &Path, preprocess: &Preprocess) -> Result<ImageRow, DataError> {
    let bytes = COLUMNS
        .iter()
        .find_map(|name| record.bytes.remove(&format!("{name}.bytes")).or_else(|| record.bytes.remove(*name)));
    let (bytes, named) = match bytes {
        Some(bytes) => (bytes, String::new()),
        None => {
            let column = COLUMNS.iter().find(|name| record.fields.contains_key(**name)).unwrap_or(&COLUMNS[0]);
            let path = match record.field(column)? {
                // Hugging Face's data sets without the bytes.
                Value::Object(group) => group.get("path").and_then(Value::as_str),
                value => value.as_str(),
            };
            let Some(path) = path else {
                return Err(record.bad(format!("`{column}`: expected an image's path, relative to this file")));
            };
            let path = folder.join(path);
            (std::fs::read(&path).map_err(DataError::io("read", &path))?, format!("{}: ", path.display()))
        }
    };
    record.bytes.clear();
    let pixels =
        preprocess.pixels(&bytes).map_err(|reason| record.bad(format!("the image is broken: {named}{reason}")))?;
    Ok(ImageRow { pixels, from: From::Row(record) })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use image::{ExtendedColorType, ImageEncoder, codecs::png::PngEncoder};

    fn png(path: &Path, value: u8) {
        let mut out = vec![];
        PngEncoder::new(&mut out).write_image(&[value; 16], 4, 4, ExtendedColorType::L8).unwrap();
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, out).unwrap();
    }

    #[test]
    fn folders_are_classes_and_rows_name_files() {
        let dir = tempfile::tempdir().unwrap();
        let (root, preprocess) = (dir.path(), Preprocess::vit(2, 1));
        let read = |path: &Path| read_images(&[path.display().to_string()], &preprocess);
        png(&root.join("a/cats/1.png"), 7);
        png(&root.join("a/cats/deep/2.PNG"), 8);
        png(&root.join("a/dogs/1.png"), 9);
        let rows = read(&root.join("a")).unwrap();
        let labels: Vec<String> = rows.iter().map(|row| row.label("label").unwrap()).collect();
        assert_eq!(labels, ["cats", "cats", "dogs"]);
        assert_eq!(rows[2].pixels, [9; 4]);
        assert!(rows[0].captions("caption").unwrap_err().to_string().contains("no caption"));
        let one = read(&root.join("a/dogs/1.png")).unwrap();
        assert!(one[0].label("label").unwrap_err().to_string().contains("no label"));

        let table = root.join("a/rows.jsonl");
        std::fs::write(&table, "{\"image\": \"cats/1.png\", \"label\": 3, \"caption\": \"a cat\"}\n{\"file_name\": \"dogs/1.png\", \"label\": 1.5, \"caption\": [\"a\", \"b\"]}\n").unwrap();
        for given in [&table, &root.join("a")] {
            let rows = read(given).unwrap();
            assert_eq!((rows.len(), rows[0].label("label").unwrap().as_str()), (2, "3"));
            assert_eq!(rows[1].captions("caption").unwrap(), ["a", "b"]);
            assert!(rows[1].label("label").unwrap_err().to_string().contains("rows.jsonl:2: `label`"));
        }
        std::fs::write(&table, "{\"image\": \"none.png\"}\n").unwrap();
        assert!(read(&table).unwrap_err().to_string().contains("none.png"));
        std::fs::write(root.join("a/bad.png"), "text").unwrap();
        std::fs::write(&table, "{\"image\": \"bad.png\"}\n").unwrap();
        let error = read(&table).unwrap_err().to_string();
        assert!(error.contains("rows.jsonl:1: the image is broken") && error.contains("bad.png"), "{error}");
        std::fs::write(&table, "{\"picture\": \"bad.png\"}\n").unwrap();
        assert!(read(&table).unwrap_err().to_string().contains("no field `image` (there are: picture)"));
        std::fs::remove_file(&table).unwrap();
        let error = read(&root.join("a")).unwrap_err().to_string();
        assert!(error.contains("bad.png") && error.contains("PNG or a JPEG"), "{error}");
        assert!(read(&root.join("nothing")).unwrap_err().to_string().contains("no such file"));
    }
}
