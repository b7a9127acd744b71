//! Writing a file, a tensor at a time.

use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};

use super::value::write_text;
use super::{ALIGNMENT, GgufError, MAGIC, MAX_DIMS, MAX_NAME, TensorInfo, VERSION, Value};

/// Writes a file: aside, flushed, and renamed when it is whole. Dropped before that, it leaves nothing.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    temp: PathBuf,
    file: Option<BufWriter<File>>,
    tensors: Vec<TensorInfo>,
    next: usize,
}

impl Writer {
    /// Begins the file `path` with its metadata and the table of the tensors that will follow in this order.
    ///
    /// # Errors
    /// [`GgufError`]: names that repeat or are too long, rows that are not whole blocks, the disk.
    pub fn create(
        path: impl Into<PathBuf>,
        metadata: &[(String, Value)],
        tensors: Vec<TensorInfo>,
    ) -> Result<Self, GgufError> {
        let path = path.into();
        let head = head(&path, metadata, &tensors)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let temp = path.with_file_name(format!(".{name}.tmp-{}", std::process::id()));
        let file = File::create(&temp).map_err(io("create", &temp))?;
        let mut writer = Self { path, temp, file: Some(BufWriter::new(file)), tensors, next: 0 };
        writer.write(&head)?;
        Ok(writer)
    }

    /// Writes the next tensor.
    ///
    /// # Errors
    /// [`GgufError`]: another one than announced, values that its format cannot hold, the disk.
    pub fn tensor(&mut self, name: &str, values: &[f32]) -> Result<(), GgufError> {
        let info = self.expected(name, values.len())?;
        let mut bytes = vec![];
        let quantized = info.format.quantize(values, info.columns(), &mut bytes);
        quantized.map_err(|source| GgufError::Block { tensor: name.to_owned(), source })?;
        self.put(bytes)
    }

    /// Writes the next tensor from blocks that exist.
    ///
    /// # Errors
    /// As [`tensor`](Self::tensor).
    pub fn blocks(&mut self, name: &str, bytes: Vec<u8>) -> Result<(), GgufError> {
        let elements = self.tensors.get(self.next).map_or(0, TensorInfo::elements);
        let expected = self.expected(name, elements)?.bytes();
        match expected {
            Ok(expected) if expected == bytes.len() => self.put(bytes),
            expected => Err(self.order(format!("{expected:?} bytes of {name}"), bytes.len().to_string())),
        }
    }

    /// Flushes everything and gives the file its name.
    ///
    /// # Errors
    /// [`GgufError`]: tensors that are missing, the disk.
    pub fn finish(mut self) -> Result<(), GgufError> {
        if let Some(missing) = self.tensors.get(self.next) {
            return Err(self.order(missing.name.clone(), "the end".into()));
        }
        let Some(file) = self.file.take() else { return Ok(()) };
        let file = file.into_inner().map_err(|error| io("write", &self.temp)(error.into_error()))?;
        file.sync_all().map_err(io("flush", &self.temp))?;
        fs::rename(&self.temp, &self.path).map_err(io("rename the finished file to", &self.path))
    }

    fn expected(&self, name: &str, elements: usize) -> Result<&TensorInfo, GgufError> {
        match self.tensors.get(self.next) {
            Some(info) if info.name == name && info.elements() == elements => Ok(info),
            Some(info) => {
                Err(self.order(format!("{} values of {}", info.elements(), info.name), format!("{elements} of {name}")))
            }
            None => Err(self.order("the end".into(), name.to_owned())),
        }
    }

    fn order(&self, expected: String, got: String) -> GgufError {
        GgufError::Order { path: self.path.clone(), expected, got }
    }

    fn put(&mut self, mut bytes: Vec<u8>) -> Result<(), GgufError> {
        bytes.resize(bytes.len().next_multiple_of(ALIGNMENT as usize), 0);
        self.next += 1;
        self.write(&bytes)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), GgufError> {
        self.file.as_mut().map_or(Ok(()), |file| file.write_all(bytes)).map_err(io("write", &self.temp))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if self.file.take().is_some() {
            // What cannot be removed is a hidden file that nothing takes for a model.
            drop(fs::remove_file(&self.temp));
        }
    }
}

/// Everything before the first tensor.
fn head(path: &Path, metadata: &[(String, Value)], tensors: &[TensorInfo]) -> Result<Vec<u8>, GgufError> {
    let mut out = MAGIC.to_vec();
    out.extend(VERSION.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        write_text(key, &mut out);
        out.extend((value.kind() as u32).to_le_bytes());
        value.write(&mut out);
    }
    let mut offset = 0u64;
    let mut names = std::collections::BTreeSet::new();
    for info in tensors {
        let wrong = |expected: &str, got: String| {
            let (path, expected) = (path.to_path_buf(), expected.to_owned());
            Err(GgufError::Order { path, expected, got })
        };
        if info.name.len() > MAX_NAME {
            return wrong("names of at most 63 bytes", info.name.clone());
        }
        if !names.insert(&info.name) {
            return wrong("each name once", format!("{} twice", info.name));
        }
        if info.shape.is_empty() || info.shape.len() > MAX_DIMS {
            return wrong("1 to 4 dimensions", format!("{:?} of {}", info.shape, info.name));
        }
        let bytes = info.bytes().map_err(|source| GgufError::Block { tensor: info.name.clone(), source })?;
        write_text(&info.name, &mut out);
        out.extend((info.shape.len() as u32).to_le_bytes());
        info.shape.iter().rev().for_each(|dim| out.extend((*dim as u64).to_le_bytes()));
        out.extend(info.format.id().to_le_bytes());
        out.extend(offset.to_le_bytes());
        offset += (bytes as u64).next_multiple_of(ALIGNMENT);
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT as usize), 0);
    Ok(out)
}

pub(super) fn io(operation: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> GgufError {
    let path = path.to_path_buf();
    move |source| GgufError::Io { operation, path, source }
}
