//! Safetensors: the header for streaming writes, and hardened reads through a memory map.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::error::CheckpointError;
use super::manifest::check_name;
use super::report::nearest;

// The format is little-endian, and slices of numbers are written and read as they lie in memory.
const _: () = assert!(cfg!(target_endian = "little"), "checkpoints need a little-endian machine");

/// The largest header that is read, as in the safetensors library.
pub(super) const MAX_HEADER: usize = 100_000_000;
/// The header's length, before it: a little-endian `u64`.
const PREFIX: usize = 8;
const INDEX: &str = "model.safetensors.index.json";
/// Where safetensors keeps text about the file; no tensor can have this name.
const METADATA: &str = "__metadata__";

/// Name, shape and element type of a tensor that is about to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// The name, unique in its file.
    pub name: String,
    /// The shape; empty for a single number.
    pub shape: Vec<usize>,
    /// The type of the elements.
    pub dtype: Dtype,
}

impl TensorSpec {
    /// A tensor of `dtype`.
    pub fn new(name: impl Into<String>, shape: impl Into<Vec<usize>>, dtype: Dtype) -> Self {
        Self { name: name.into(), shape: shape.into(), dtype }
    }

    /// A tensor of 32-bit floats.
    pub fn f32(name: impl Into<String>, shape: impl Into<Vec<usize>>) -> Self {
        Self::new(name, shape, Dtype::F32)
    }

    /// The size of the data in bytes; `None` if it overflows or ends within a byte.
    pub fn n_bytes(&self) -> Option<usize> {
        let elements = self.shape.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim))?;
        let bits = elements.checked_mul(self.dtype.bitsize())?;
        bits.is_multiple_of(8).then_some(bits / 8)
    }
}

/// The bytes of `values` as elements of `dtype`: borrowed for F32, rounded to nearest even for F16 and BF16.
///
/// `None` for any other type.
pub fn encode_f32(values: &[f32], dtype: Dtype) -> Option<Cow<'_, [u8]>> {
    Some(match dtype {
        Dtype::F32 => Cow::Borrowed(bytemuck::cast_slice(values)),
        Dtype::F16 => values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
        Dtype::BF16 => values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
        _ => return None,
    })
}

/// Length prefix and header of a file with these tensors, and the size of the whole file.
pub(crate) fn header(
    path: &Path,
    metadata: &BTreeMap<String, String>,
    specs: &[TensorSpec],
) -> Result<(Vec<u8>, u64), CheckpointError> {
    let invalid = |expected: &str, got: String| Err(CheckpointError::invalid("write", path, expected, got));
    // Sorted by name: the same tensors give the same bytes.
    let mut entries = BTreeMap::new();
    let mut offset = 0usize;
    for spec in specs {
        let end = match spec.n_bytes().and_then(|n| offset.checked_add(n)) {
            Some(end) => end,
            None => return invalid("a size in whole bytes that fits in memory", format!("{spec:?}")),
        };
        // PyTorch and NumPy read a tensor in place only if it lies at a multiple of its element's size. The format
        // allows no gaps, so the order must provide for that.
        if !offset.is_multiple_of(spec.dtype.bitsize().div_ceil(8)) {
            return invalid("tensors of wide types before those of narrow ones", format!("{spec:?} at byte {offset}"));
        }
        if spec.name == METADATA {
            return invalid("another name for a tensor", format!("`{METADATA}`, which the format reserves"));
        }
        let info = TensorInfo { dtype: spec.dtype, shape: spec.shape.clone(), data_offsets: (offset, end) };
        if entries.insert(spec.name.as_str(), info).is_some() {
            return invalid("each tensor once", format!("`{}` twice", spec.name));
        }
        offset = end;
    }
    let json =
        |source| CheckpointError::Json { operation: "write", path: path.to_owned(), expected: "a header", source };
    let mut fields = serde_json::Map::new();
    if !metadata.is_empty() {
        fields.insert(METADATA.to_owned(), serde_json::to_value(metadata).map_err(json)?);
    }
    for (name, info) in entries {
        fields.insert(name.to_owned(), serde_json::to_value(info).map_err(json)?);
    }
    let mut text = serde_json::to_vec(&fields).map_err(json)?;
    // Data starts at a multiple of 8, as the format asks.
    text.resize(text.len().next_multiple_of(PREFIX), b' ');
    if text.len() > MAX_HEADER {
        return invalid("a header of at most 100 MB", format!("{} bytes", text.len()));
    }
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut text);
    let size = bytes.len() as u64 + offset as u64;
    Ok((bytes, size))
}

/// Bytes of a mapped file after which those that were read are given back.
const PART: usize = 4 << 20;

/// One mapped file.
struct Shard {
    path: PathBuf,
    map: Mmap,
    /// Where the tensors' bytes begin.
    start: usize,
    metadata: Metadata,
}

impl Shard {
    /// Gives back the memory of these bytes; reading them again reads the file again.
    fn release(&self, offset: usize, len: usize) {
        #[cfg(unix)]
        // SAFETY: the map is of a file and only read, so that its pages come back as they were. Where the system refuses, they stay.
        let _ = unsafe { self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, offset, len) };
        #[cfg(not(unix))]
        let _ = (offset, len);
    }

    fn open(path: &Path) -> Result<Self, CheckpointError> {
        let file = File::open(path).map_err(CheckpointError::open("open", path, "a safetensors file"))?;
        let found = file.metadata().map_err(CheckpointError::io("open", path))?;
        if !found.is_file() {
            return Err(CheckpointError::WrongKind {
                path: path.to_owned(),
                expected: "a safetensors file".into(),
                got: "something that is no file".into(),
            });
        }
        if found.len() < PREFIX as u64 {
            return Err(CheckpointError::torn(path, "a safetensors header", format!("{} bytes", found.len())));
        }
        // SAFETY: the map is only read. A file that another process changes or truncates while it is mapped would break
        // it; Firebox never changes a file in place, and the module's documentation asks the same of everyone else.
        let map = unsafe { Mmap::map(&file) }.map_err(CheckpointError::io("map", path))?;
        let (start, metadata) = read_header(path, &map)?;
        Ok(Self { path: path.to_owned(), map, start, metadata })
    }
}

/// The checks that `safetensors::SafeTensors::deserialize` does, without its unchecked sum of header and data lengths.
fn read_header(path: &Path, file: &[u8]) -> Result<(usize, Metadata), CheckpointError> {
    let Some((prefix, rest)) = file.split_first_chunk::<PREFIX>() else {
        return Err(CheckpointError::torn(path, "a safetensors header", format!("{} bytes", file.len())));
    };
    let length = u64::from_le_bytes(*prefix);
    let limit = rest.len().min(MAX_HEADER);
    let text =
        usize::try_from(length).ok().filter(|&n| n <= MAX_HEADER).and_then(|n| rest.get(..n)).ok_or_else(|| {
            CheckpointError::torn(
                path,
                format!("a safetensors header of at most {limit} bytes"),
                format!("{length} bytes"),
            )
        })?;
    // Deserializing checks that the offsets have no gap or overlap and agree with shape and type, without overflow.
    let metadata: Metadata = serde_json::from_slice(text)
        .map_err(|error| CheckpointError::torn(path, "a valid safetensors header", error.to_string()))?;
    let data = rest.len() - text.len();
    if metadata.data_len() != data {
        return Err(CheckpointError::torn(
            path,
            format!("{} bytes of tensors", metadata.data_len()),
            format!("{data} bytes"),
        ));
    }
    Ok((PREFIX + text.len(), metadata))
}

/// Tensors in a safetensors file, or in several that an index names, read through memory maps.
pub struct TensorFile {
    path: PathBuf,
    shards: Vec<Shard>,
    index: BTreeMap<String, Place>,
    values: Option<Values>,
}

/// Where a tensor is.
enum Place {
    /// In the shard of this number, under this name.
    Shard(usize, String),
    /// In a file of another kind, which only gives values of this shape.
    Values(Vec<usize>),
}

/// The values of a tensor of a file of another kind, or why there are none.
pub(crate) type Values = Box<dyn Fn(&str) -> Result<Vec<f32>, String> + Send + Sync>;

impl std::fmt::Debug for TensorFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TensorFile({}, {} tensors in {} files)", self.path.display(), self.index.len(), self.shards.len())
    }
}

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

impl TensorFile {
    /// Opens a `.safetensors` file, a `*.safetensors.index.json` of Hugging Face, or a folder that has
    /// `model.safetensors` or `model.safetensors.index.json`.
    ///
    /// # Errors
    ///
    /// If there is no such file, if its header does not agree with its size, or if an index names a file that is not a
    /// plain name in the same folder.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, CheckpointError> {
        let path = path.as_ref();
        if path.is_dir() {
            let single = path.join("model.safetensors");
            return if single.exists() {
                Self::single(&single)
            } else if path.join(INDEX).exists() {
                Self::sharded(&path.join(INDEX))
            } else {
                Err(CheckpointError::Missing {
                    operation: "open the model in",
                    path: path.to_owned(),
                    expected: format!("model.safetensors or {INDEX}"),
                })
            };
        }
        if path.extension().is_some_and(|e| e == "json") { Self::sharded(path) } else { Self::single(path) }
    }

    fn single(path: &Path) -> Result<Self, CheckpointError> {
        let shard = Shard::open(path)?;
        let index =
            shard.metadata.offset_keys().into_iter().map(|name| (name.clone(), Place::Shard(0, name))).collect();
        Ok(Self { path: path.to_owned(), shards: vec![shard], index, values: None })
    }

    /// Tensors of a file of another kind, by name and shape, whose values `values` reads.
    pub(crate) fn of_values(path: &Path, tensors: BTreeMap<String, Vec<usize>>, values: Values) -> Self {
        let index = tensors.into_iter().map(|(name, shape)| (name, Place::Values(shape))).collect();
        Self { path: path.to_owned(), shards: vec![], index, values: Some(values) }
    }

    /// The tensors that have another name, under that.
    pub(crate) fn renamed(self, name: impl Fn(&str) -> Option<String>) -> Self {
        Self { index: self.index.into_iter().filter_map(|(old, place)| Some((name(&old)?, place))).collect(), ..self }
    }

    fn sharded(path: &Path) -> Result<Self, CheckpointError> {
        let file = File::open(path).map_err(CheckpointError::open("open", path, "a safetensors index"))?;
        let mut text = Vec::new();
        file.take(MAX_HEADER as u64 + 1).read_to_end(&mut text).map_err(CheckpointError::io("read", path))?;
        if text.len() > MAX_HEADER {
            return Err(CheckpointError::torn(path, "an index of at most 100 MB", "more"));
        }
        let ShardIndex { weight_map } = serde_json::from_slice(&text).map_err(|source| CheckpointError::Json {
            operation: "read",
            path: path.to_owned(),
            expected: "an index with a weight_map",
            source,
        })?;
        let files: BTreeSet<&str> = weight_map.values().map(String::as_str).collect();
        for &name in &files {
            check_name(path, name)?;
            if name.contains('/') {
                return Err(CheckpointError::UnsafeName {
                    path: path.to_owned(),
                    name: name.to_owned(),
                    reason: "is in another folder",
                });
            }
        }
        let folder = path.parent().unwrap_or(Path::new(""));
        let shards = files.iter().map(|name| Shard::open(&folder.join(name))).collect::<Result<Vec<_>, _>>()?;
        let number: BTreeMap<&str, usize> = files.iter().enumerate().map(|(i, &name)| (name, i)).collect();
        let mut index = BTreeMap::new();
        for (name, file) in &weight_map {
            let shard = number[file.as_str()];
            if shards[shard].metadata.info(name).is_none() {
                return Err(CheckpointError::torn(
                    &shards[shard].path,
                    format!("the tensor `{name}`"),
                    "none of that name",
                ));
            }
            index.insert(name.clone(), Place::Shard(shard, name.clone()));
        }
        Ok(Self { path: path.to_owned(), shards, index, values: None })
    }

    /// The file or index that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The SHA-256 of the files, one after the other, in hexadecimal.
    ///
    /// # Errors
    ///
    /// If a file cannot be read.
    pub(crate) fn sha256(&self) -> Result<String, CheckpointError> {
        let mut hash = Sha256::new();
        if self.shards.is_empty() {
            let mut file = File::open(&self.path).map_err(CheckpointError::io("open", &self.path))?;
            let mut part = vec![0u8; 1 << 20];
            loop {
                let n = file.read(&mut part).map_err(CheckpointError::io("read", &self.path))?;
                if n == 0 {
                    break;
                }
                hash.update(&part[..n]);
            }
        }
        // Pages that were read are given back: the file may be larger than what a run of few trained parameters has of memory.
        for shard in &self.shards {
            for (i, part) in shard.map.chunks(PART).enumerate() {
                hash.update(part);
                shard.release(i * PART, part.len());
            }
        }
        Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
    }

    /// The names, in alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.index.keys().map(String::as_str)
    }

    /// How many tensors there are.
    pub fn len(&self) -> usize {
        self.index.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.index.contains_key(name)
    }

    /// The text that the writer of the file kept beside the tensors. Where several files have the same key, the first
    /// counts.
    pub fn metadata(&self) -> BTreeMap<&str, &str> {
        let texts = self.shards.iter().rev().filter_map(|shard| shard.metadata.metadata().as_ref());
        texts.flatten().map(|(key, value)| (key.as_str(), value.as_str())).collect()
    }

    fn no_tensor(&self, name: &str) -> CheckpointError {
        let nearest = nearest(name, self.names()).map(str::to_owned);
        CheckpointError::NoTensor { path: self.path.clone(), name: name.to_owned(), nearest }
    }

    /// None of one of which there are only values.
    fn find(&self, name: &str) -> Result<Option<(&Shard, &TensorInfo)>, CheckpointError> {
        match self.index.get(name).ok_or_else(|| self.no_tensor(name))? {
            Place::Values(_) => Ok(None),
            Place::Shard(i, own) => {
                let shard = &self.shards[*i];
                Ok(Some((shard, shard.metadata.info(own).ok_or_else(|| self.no_tensor(name))?)))
            }
        }
    }

    /// The shape of a tensor; empty for a single number.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::NoTensor`], with the nearest name.
    pub fn shape(&self, name: &str) -> Result<&[usize], CheckpointError> {
        match self.index.get(name) {
            Some(Place::Values(shape)) => Ok(shape),
            _ => Ok(self.find(name)?.map_or(&[], |(_, info)| &info.shape)),
        }
    }

    /// The type of a tensor's elements.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::NoTensor`], with the nearest name.
    pub fn dtype(&self, name: &str) -> Result<Dtype, CheckpointError> {
        Ok(self.find(name)?.map_or(Dtype::F32, |(_, info)| info.dtype))
    }

    /// The bytes of a tensor as they lie in the file, row-major, little-endian, at any alignment.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::NoTensor`], with the nearest name; [`CheckpointError::WrongKind`] of a file that has blocks and no floats (GGUF).
    pub fn bytes(&self, name: &str) -> Result<&[u8], CheckpointError> {
        let Some((shard, info)) = self.find(name)? else {
            let (path, expected) = (self.path.clone(), "a safetensors file".to_owned());
            return Err(CheckpointError::WrongKind { path, expected, got: "a file of another kind".into() });
        };
        let (from, to) = info.data_offsets;
        // Within the map: `read_header` compared the last offset with the file's size.
        Ok(&shard.map[shard.start + from..shard.start + to])
    }

    /// Gives back the memory in which the file's pages of a tensor lie, once it was copied; reading it again reads the file again.
    pub(crate) fn release(&self, name: &str) {
        if let Ok(Some((shard, info))) = self.find(name) {
            let (from, to) = info.data_offsets;
            shard.release(shard.start + from, to - from);
        }
    }

    /// Checks that [`f32`](Self::f32) can read a tensor.
    pub(crate) fn check_floats(&self, name: &str) -> Result<(), CheckpointError> {
        let Some((shard, info)) = self.find(name)? else { return Ok(()) };
        match info.dtype {
            Dtype::F32 | Dtype::F16 | Dtype::BF16 => Ok(()),
            other => Err(CheckpointError::WrongKind {
                path: shard.path.clone(),
                expected: format!("`{name}` in F32, F16 or BF16"),
                got: format!("{other}"),
            }),
        }
    }

    /// The elements of a tensor as 32-bit floats, row-major. F16 and BF16 convert exactly. The file's pages are given back while they are read: reading
    /// them again reads the file again.
    ///
    /// # Errors
    ///
    /// If there is no such tensor, or its elements are neither F32, F16 nor BF16.
    pub fn f32(&self, name: &str) -> Result<Vec<f32>, CheckpointError> {
        if let (Some(Place::Values(_)), Some(values)) = (self.index.get(name), &self.values) {
            return values(name)
                .map_err(|got| CheckpointError::torn(&self.path, format!("the values of `{name}`"), got));
        }
        self.check_floats(name)?;
        let bytes = self.bytes(name)?;
        let dtype = self.dtype(name)?;
        let width = if dtype == Dtype::F32 { 4 } else { 2 };
        let place = self.find(name)?.map(|(shard, info)| (shard, shard.start + info.data_offsets.0));
        let mut values = Vec::with_capacity(bytes.len() / width);
        for (i, part) in bytes.chunks(PART).enumerate() {
            match dtype {
                Dtype::F16 => values.extend(part.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b).to_f32())),
                Dtype::BF16 => values.extend(part.as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b).to_f32())),
                _ => values.extend(part.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b))),
            }
            if let Some((shard, start)) = place {
                shard.release(start + i * PART, part.len());
            }
        }
        Ok(values)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn file(header: &str, data: usize) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat()
    }

    fn refuse(bytes: &[u8]) -> String {
        match read_header(Path::new("x"), bytes) {
            Err(error @ CheckpointError::Torn { .. }) => error.to_string(),
            Err(error) => panic!("another error: {error}"),
            Ok(_) => panic!("accepted: {:?}", String::from_utf8_lossy(bytes)),
        }
    }

    #[test]
    fn header_lengths_are_not_believed() {
        refuse(b"");
        refuse(&[0; 7]);
        refuse(&[0; 8]); // a header of no bytes is no JSON
        for length in [1, 3, 100_000_001, u64::from(u32::MAX), u64::MAX - 7, u64::MAX] {
            let mut bytes = length.to_le_bytes().to_vec();
            bytes.extend(b"{}"); // two bytes are there
            refuse(&bytes);
        }
        read_header(Path::new("x"), &file("{}", 0)).unwrap();
        refuse(&file("{}", 1));
    }

    #[test]
    fn offsets_are_not_believed() {
        let one = |shape: &str, from: &str, to: &str| {
            format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[{from},{to}]}}}}"#)
        };
        read_header(Path::new("x"), &file(&one("[2]", "0", "8"), 8)).unwrap();
        read_header(Path::new("x"), &file(&one("[]", "0", "4"), 4)).unwrap();
        for (shape, from, to) in [
            ("[2]", "0", "9"),                     // more than the shape
            ("[2]", "0", "16"),                    // beyond the end
            ("[2]", "4", "12"),                    // a gap before
            ("[2]", "8", "0"),                     // backwards
            ("[2]", "-8", "0"),                    // negative
            ("[2]", "0", "18446744073709551616"),  // no 64 bits
            ("[4611686018427387904,4]", "0", "0"), // product 2^64
            ("[4611686018427387904]", "0", "0"),   // bytes 2^64
            ("[2.0]", "0", "8"),
        ] {
            refuse(&file(&one(shape, from, to), 8));
        }
    }

    #[test]
    fn sizes_that_add_up_past_the_end_of_memory_are_refused() {
        // Each tensor alone is within bounds; together with the header they overflow an unchecked sum.
        let each = (1u64 << 61) - 1;
        let mut from = 0u64;
        let mut fields = Vec::new();
        for i in 0..9 {
            let to = from.saturating_add(each);
            fields.push(format!(r#""t{i}":{{"dtype":"U8","shape":[{}],"data_offsets":[{from},{to}]}}"#, to - from));
            from = to;
        }
        assert_eq!(from, u64::MAX);
        refuse(&file(&format!("{{{}}}", fields.join(",")), 8));
    }

    #[test]
    fn writer_header_checks() {
        let check = |specs: &[TensorSpec]| header(Path::new("x"), &BTreeMap::new(), specs).map(|(_, size)| size);
        assert_eq!(check(&[]).unwrap(), 16); // "{}" padded to 8
        for bad in [
            vec![TensorSpec::f32("a", [1]), TensorSpec::f32("a", [1])],
            vec![TensorSpec::f32("__metadata__", [1])],
            vec![TensorSpec::f32("a", [usize::MAX, 2])],
            vec![
                TensorSpec::f32("a", [usize::MAX / 8]),
                TensorSpec::f32("b", [usize::MAX / 8]),
                TensorSpec::f32("c", [usize::MAX / 8]),
            ],
            vec![TensorSpec::new("a", [1], Dtype::BF16), TensorSpec::f32("b", [1])],
            vec![TensorSpec::new("a", [1], Dtype::F4)],
        ] {
            assert!(matches!(check(&bad), Err(CheckpointError::Invalid { .. })), "{bad:?}");
        }
    }
}
