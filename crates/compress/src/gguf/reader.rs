//! Reading a file through a memory map. Nothing in it is trusted.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::writer::io;
use super::{ALIGNMENT, ALIGNMENT_KEY, GgufError, Kind, MAGIC, MAX_DIMS, TensorInfo, VERSION, Value};
use crate::blocks::BlockType;

/// An open file.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    map: Mmap,
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, Placed>,
}

#[derive(Debug)]
struct Placed {
    info: TensorInfo,
    /// Its bytes in the file.
    bytes: std::ops::Range<usize>,
}

impl Gguf {
    /// Opens a file, and checks that all tensors of its table lie within it.
    ///
    /// # Errors
    /// [`GgufError`]: no such file, no GGUF, one that is cut off, a format that Firebox does not read.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, GgufError> {
        let path = path.as_ref();
        let file = File::open(path).map_err(io("open", path))?;
        // SAFETY: a map is undefined only if the file changes under it; files here are replaced by renaming.
        let map = unsafe { Mmap::map(&file) }.map_err(io("open", path))?;
        let mut cursor = Cursor { path, bytes: &map, at: 0 };
        let (metadata, tensors) = cursor.head()?;
        Ok(Self { path: path.to_path_buf(), metadata, tensors, map })
    }

    /// The metadata.
    pub fn metadata(&self) -> &BTreeMap<String, Value> {
        &self.metadata
    }

    /// The tensors, by name.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.tensors.values().map(|placed| &placed.info)
    }

    /// A tensor.
    ///
    /// # Errors
    /// [`GgufError::NoTensor`].
    pub fn info(&self, name: &str) -> Result<&TensorInfo, GgufError> {
        Ok(&self.placed(name)?.info)
    }

    /// The blocks of a tensor.
    ///
    /// # Errors
    /// [`GgufError::NoTensor`].
    pub fn blocks(&self, name: &str) -> Result<&[u8], GgufError> {
        Ok(&self.map[self.placed(name)?.bytes.clone()])
    }

    /// The values of a tensor, row-major.
    ///
    /// # Errors
    /// [`GgufError::NoTensor`].
    pub fn values(&self, name: &str) -> Result<Vec<f32>, GgufError> {
        let Placed { info, bytes } = self.placed(name)?;
        let mut values = vec![0.0; info.elements()];
        let read = info.format.dequantize(&self.map[bytes.clone()], &mut values);
        read.map_err(|source| GgufError::Block { tensor: name.to_owned(), source })?;
        Ok(values)
    }

    /// Gives back the memory in which the file's pages of a tensor lie, once they were read; reading it again reads the file again.
    pub fn release(&self, name: &str) {
        #[cfg(unix)]
        if let Ok(Placed { bytes, .. }) = self.placed(name) {
            // SAFETY: the map is of a file and only read, so that its pages come back as they were. Where the system refuses, they stay.
            let _ = unsafe {
                self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, bytes.start, bytes.len())
            };
        }
    }

    fn placed(&self, name: &str) -> Result<&Placed, GgufError> {
        self.tensors.get(name).ok_or_else(|| GgufError::NoTensor {
            path: self.path.clone(),
            name: name.to_owned(),
            n: self.tensors.len(),
            example: self.tensors.range(name.to_owned()..).next().map_or_else(String::new, |(name, _)| name.clone()),
        })
    }
}

/// Where reading is.
struct Cursor<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

type Head = (BTreeMap<String, Value>, BTreeMap<String, Placed>);

impl<'a> Cursor<'a> {
    fn wrong<T>(&self, expected: impl Into<String>, got: impl Into<String>) -> Result<T, GgufError> {
        let (path, expected, got) = (self.path.to_path_buf(), expected.into(), got.into());
        Err(GgufError::Content { path, expected, got, at: Some(self.at) })
    }

    fn take(&mut self, n: usize, what: &str) -> Result<&'a [u8], GgufError> {
        match self.bytes.get(self.at..).and_then(|rest| rest.get(..n)) {
            Some(bytes) => {
                self.at += n;
                Ok(bytes)
            }
            None => self.wrong(format!("{n} bytes of {what}"), format!("the end after {}", self.bytes.len() - self.at)),
        }
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], GgufError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N, what)?);
        Ok(out)
    }

    fn u32(&mut self, what: &str) -> Result<u32, GgufError> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, GgufError> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A number of things of at least `least` bytes each, which must fit into what is left.
    fn count(&mut self, what: &str, least: usize) -> Result<usize, GgufError> {
        let n = self.u64(what)?;
        let most = (self.bytes.len() - self.at) / least;
        match usize::try_from(n) {
            Ok(n) if n <= most => Ok(n),
            _ => self.wrong(format!("at most {most} of the {what}, for which the file has room"), n.to_string()),
        }
    }

    fn text(&mut self, what: &str) -> Result<String, GgufError> {
        let n = self.count(what, 1)?;
        Ok(String::from_utf8_lossy(self.take(n, what)?).into_owned())
    }

    fn kind(&mut self) -> Result<Kind, GgufError> {
        let id = self.u32("a type")?;
        Kind::from_id(id).map_or_else(|| self.wrong("a type from 0 to 12", id.to_string()), Ok)
    }

    fn value(&mut self, kind: Kind, key: &str) -> Result<Value, GgufError> {
        Ok(match kind {
            Kind::U8 => Value::U8(self.array::<1>(key)?[0]),
            Kind::I8 => Value::I8(i8::from_le_bytes(self.array(key)?)),
            Kind::U16 => Value::U16(u16::from_le_bytes(self.array(key)?)),
            Kind::I16 => Value::I16(i16::from_le_bytes(self.array(key)?)),
            Kind::U32 => Value::U32(self.u32(key)?),
            Kind::I32 => Value::I32(i32::from_le_bytes(self.array(key)?)),
            Kind::F32 => Value::F32(f32::from_le_bytes(self.array(key)?)),
            Kind::Bool => Value::Bool(self.array::<1>(key)?[0] != 0),
            Kind::Text => Value::Text(self.text(key)?),
            Kind::U64 => Value::U64(self.u64(key)?),
            Kind::I64 => Value::I64(i64::from_le_bytes(self.array(key)?)),
            Kind::F64 => Value::F64(f64::from_le_bytes(self.array(key)?)),
            Kind::Array => {
                let kind = self.kind()?;
                if kind == Kind::Array {
                    return self.wrong(format!("plain values in the array {key}"), "arrays");
                }
                let n = self.count(key, kind.least())?;
                Value::Array(kind, (0..n).map(|_| self.value(kind, key)).collect::<Result<_, _>>()?)
            }
        })
    }

    fn head(&mut self) -> Result<Head, GgufError> {
        let magic: [u8; 4] = self.array("the magic number")?;
        if magic != MAGIC {
            return self.wrong("a GGUF file", format!("{magic:?} at its start"));
        }
        let version = self.u32("the version")?;
        if !(2..=VERSION).contains(&version) {
            return self.wrong("GGUF version 2 or 3", version.to_string());
        }
        let n_tensors = self.count("number of tensors", 24)?;
        let n_values = self.count("number of metadata", 13)?;
        let mut metadata = BTreeMap::new();
        for _ in 0..n_values {
            let key = self.text("a key")?;
            let kind = self.kind()?;
            let value = self.value(kind, &key)?;
            metadata.insert(key, value);
        }
        let alignment = match metadata.get(ALIGNMENT_KEY) {
            None => ALIGNMENT,
            Some(value) => match value.as_u64().filter(|n| n.is_power_of_two() && *n <= 1 << 20) {
                Some(alignment) => alignment,
                None => return self.wrong(format!("a power of two as {ALIGNMENT_KEY}"), format!("{value:?}")),
            },
        };
        let infos = (0..n_tensors).map(|_| self.info()).collect::<Result<Vec<_>, _>>()?;
        let start = (self.at as u64).next_multiple_of(alignment);
        let mut tensors = BTreeMap::new();
        for (info, offset) in infos {
            let bytes = info.bytes().map_err(|source| GgufError::Block { tensor: info.name.clone(), source })?;
            let begin = start.checked_add(offset).and_then(|begin| usize::try_from(begin).ok());
            let range = begin.and_then(|begin| Some(begin..begin.checked_add(bytes)?));
            let Some(range) = range.filter(|range| range.end <= self.bytes.len() && offset.is_multiple_of(alignment))
            else {
                let expected = format!("the {bytes} bytes of {} within the file", info.name);
                return self.wrong(expected, format!("offset {offset} of {}", self.bytes.len()));
            };
            tensors.insert(info.name.clone(), Placed { info, bytes: range });
        }
        Ok((metadata, tensors))
    }

    fn info(&mut self) -> Result<(TensorInfo, u64), GgufError> {
        let name = self.text("a tensor's name")?;
        let n_dims = self.u32("dimensions")? as usize;
        if n_dims > MAX_DIMS {
            return self.wrong(format!("at most {MAX_DIMS} dimensions of {name}"), n_dims.to_string());
        }
        let mut shape = vec![];
        let mut elements = 1usize;
        for _ in 0..n_dims {
            let dim = self.u64("a dimension")?;
            let dim = usize::try_from(dim).ok().filter(|dim| elements.checked_mul(*dim).is_some_and(|n| n < 1 << 60));
            let Some(dim) = dim else { return self.wrong(format!("a size of {name} that a machine can hold"), "more") };
            elements *= dim.max(1);
            shape.insert(0, dim);
        }
        let id = self.u32("a format")?;
        let Some(format) = BlockType::from_id(id) else {
            let known: Vec<&str> = BlockType::ALL.iter().map(|format| format.name()).collect();
            return self.wrong(format!("{name} in one of {}", known.join(", ")), format!("ggml's type {id}"));
        };
        let offset = self.u64("an offset")?;
        Ok((TensorInfo { name, shape, format }, offset))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs;

    use super::super::Writer;
    use super::*;

    fn example(path: &Path) -> Vec<u8> {
        let metadata = [
            ("general.architecture".to_owned(), Value::Text("llama".into())),
            ("llama.block_count".to_owned(), Value::U32(2)),
            ("tokenizer.ggml.tokens".to_owned(), Value::texts(["a", "b", "ü"])),
            ("tokenizer.ggml.token_type".to_owned(), Value::i32s([1, 2, -3])),
            ("x.small".to_owned(), Value::F64(1e-300)),
        ];
        let tensors =
            vec![TensorInfo::new("norm", [5], BlockType::F32), TensorInfo::new("weight", [3, 64], BlockType::Q4_0)];
        let mut writer = Writer::create(path, &metadata, tensors).unwrap();
        writer.tensor("norm", &[1.0, 2.0, 3.0, 4.0, 5.0]).unwrap();
        writer.tensor("weight", &(0..192).map(|i| i as f32 - 90.0).collect::<Vec<_>>()).unwrap();
        writer.finish().unwrap();
        fs::read(path).unwrap()
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        example(&path);
        let file = Gguf::open(&path).unwrap();
        assert_eq!(file.metadata()["llama.block_count"].as_u64(), Some(2));
        assert_eq!(file.metadata()["tokenizer.ggml.tokens"].as_array().unwrap()[2].as_text(), Some("ü"));
        assert_eq!(file.metadata()["x.small"].as_f64(), Some(1e-300));
        assert_eq!(file.info("weight").unwrap().shape, [3, 64]);
        assert_eq!(file.values("norm").unwrap(), [1.0, 2.0, 3.0, 4.0, 5.0]);
        let weight = file.values("weight").unwrap();
        assert!(weight.iter().enumerate().all(|(i, x)| (x - (i as f32 - 90.0)).abs() < 9.0), "{weight:?}");
        assert!(file.values("wieght").unwrap_err().to_string().contains("no tensor wieght"));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing else is left");
    }

    #[test]
    fn a_cut_or_a_changed_byte_is_an_error_or_another_file_but_no_crash() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = example(&dir.path().join("m.gguf"));
        let torn = dir.path().join("torn.gguf");
        // What follows the last block only fills up.
        for n in 1..bytes.len() - 20 {
            fs::write(&torn, &bytes[..n]).unwrap();
            assert!(Gguf::open(&torn).is_err(), "cut at {n}");
        }
        for i in 0..300 {
            for flip in [1u8, 0x80, 0xff] {
                let mut changed = bytes.clone();
                changed[i] ^= flip;
                fs::write(&torn, &changed).unwrap();
                if let Ok(file) = Gguf::open(&torn) {
                    for name in file.tensors().map(|info| info.name.clone()).collect::<Vec<_>>() {
                        assert_eq!(file.values(&name).unwrap().len(), file.info(&name).unwrap().elements());
                    }
                }
            }
        }
    }

    #[test]
    fn a_writer_takes_what_was_announced_and_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        let tensors =
            || vec![TensorInfo::new("a", [2, 32], BlockType::Q8_0), TensorInfo::new("b", [1], BlockType::F32)];
        let create = || Writer::create(&path, &[], tensors()).unwrap();
        for (result, says) in [
            (create().tensor("b", &[0.0]), "expected 64 values of a"),
            (create().tensor("a", &[f32::INFINITY; 64]), "got inf at 0"),
            (create().finish(), "got the end"),
            (Writer::create(&path, &[], vec![TensorInfo::new("a", [33], BlockType::Q8_0)]).map(drop), "multiple of 32"),
        ] {
            let error = result.unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
