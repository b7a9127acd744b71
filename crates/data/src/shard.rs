//! Token shards: files of tokens that are mapped into memory.
//!
//! ```text
//! 0   "FBTOKENS"
//! 8   version, u32
//! 12  bytes per token, u32: 2 or 4
//! 16  tokens, u64
//! 24  documents that start here, u64
//! 32  CRC-32C of all that follows the header, u32
//! 36  CRC-32C of the 36 bytes before, u32
//! 40  zeros
//! 64  the tokens, then zeros to a multiple of 8
//!     the start of each document, u64, counted in tokens from the first of this shard
//! ```
//!
//! All numbers are little-endian. A shard is a slice of one stream: documents may cross from one into the next.

use crate::error::DataError;
use memmap2::Mmap;
use rayon::prelude::*;
use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

#[cfg(target_endian = "big")]
compile_error!("token shards are mapped as little-endian numbers");

const MAGIC: &[u8; 8] = b"FBTOKENS";
const VERSION: u32 = 1;
const HEADER: usize = 64;
/// Tokens per shard: 200 or 400 MB, large enough to be few and small enough to copy and check one by one.
pub(crate) const SHARD_TOKENS: u64 = 100_000_000;

/// What the manifest of a cache remembers of a shard.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct ShardInfo {
    pub(crate) tokens: u64,
    pub(crate) documents: u64,
    pub(crate) crc32c: u32,
}

/// Path of a shard of a stream.
fn shard_path(dir: &Path, stream: &str, number: usize) -> PathBuf {
    dir.join(format!("{stream}-{number:05}.tokens"))
}

/// Writes a stream of tokens as shards.
pub(crate) struct StreamWriter {
    dir: PathBuf,
    stream: String,
    wide: bool,
    shard_tokens: u64,
    current: Option<ShardWriter>,
    done: Vec<ShardInfo>,
    pub(crate) tokens: u64,
    pub(crate) documents: u64,
}

struct ShardWriter {
    path: PathBuf,
    file: BufWriter<File>,
    tokens: u64,
    starts: Vec<u64>,
    crc: u32,
}

impl StreamWriter {
    /// `vocab_size` decides the width: 65,536 tokens fit two bytes.
    pub(crate) fn new(dir: &Path, stream: &str, vocab_size: usize, shard_tokens: u64) -> Self {
        Self {
            dir: dir.to_owned(),
            stream: stream.to_owned(),
            wide: vocab_size > 1 << 16,
            shard_tokens,
            current: None,
            done: Vec::new(),
            tokens: 0,
            documents: 0,
        }
    }

    /// Appends tokens; `starts_document` marks the first of them.
    pub(crate) fn append(&mut self, tokens: &[u32], starts_document: bool) -> Result<(), DataError> {
        let mut rest = tokens;
        let mut start = starts_document && !tokens.is_empty();
        self.documents += u64::from(start);
        self.tokens += tokens.len() as u64;
        while !rest.is_empty() {
            let shard = match &mut self.current {
                Some(shard) => shard,
                None => self.current.insert(ShardWriter::create(shard_path(&self.dir, &self.stream, self.done.len()))?),
            };
            if std::mem::take(&mut start) {
                shard.starts.push(shard.tokens);
            }
            let room = (self.shard_tokens - shard.tokens) as usize;
            let (now, later) = rest.split_at(rest.len().min(room));
            shard.write(now, self.wide)?;
            rest = later;
            if shard.tokens == self.shard_tokens {
                self.end_shard()?;
            }
        }
        Ok(())
    }

    fn end_shard(&mut self) -> Result<(), DataError> {
        if let Some(shard) = self.current.take() {
            self.done.push(shard.finish(self.wide)?);
        }
        Ok(())
    }

    pub(crate) fn finish(mut self) -> Result<Vec<ShardInfo>, DataError> {
        self.end_shard()?;
        Ok(self.done)
    }
}

impl ShardWriter {
    fn create(path: PathBuf) -> Result<Self, DataError> {
        let file = File::create(&path).map_err(DataError::io("create", &path))?;
        let mut shard =
            Self { file: BufWriter::with_capacity(1 << 20, file), path, tokens: 0, starts: Vec::new(), crc: 0 };
        shard.put(&[0; HEADER])?;
        shard.crc = 0;
        Ok(shard)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), DataError> {
        self.crc = crc32c::crc32c_append(self.crc, bytes);
        self.file.write_all(bytes).map_err(DataError::io("write", &self.path))
    }

    fn write(&mut self, tokens: &[u32], wide: bool) -> Result<(), DataError> {
        self.tokens += tokens.len() as u64;
        if wide {
            return self.put(bytemuck::cast_slice(tokens));
        }
        let narrow: Vec<u16> = tokens.iter().map(|&t| t as u16).collect();
        self.put(bytemuck::cast_slice(&narrow))
    }

    fn finish(mut self, wide: bool) -> Result<ShardInfo, DataError> {
        let width = if wide { 4 } else { 2 };
        let body = self.tokens as usize * width;
        self.put(&[0; 8][..body.next_multiple_of(8) - body])?;
        let starts = std::mem::take(&mut self.starts);
        self.put(bytemuck::cast_slice(&starts))?;
        let info = ShardInfo { tokens: self.tokens, documents: starts.len() as u64, crc32c: self.crc };
        let failed = |e| DataError::io("write", &self.path)(e);
        self.file.seek(SeekFrom::Start(0)).map_err(failed)?;
        self.file.write_all(&header(&info, width as u32)).map_err(failed)?;
        self.file.flush().map_err(failed)?;
        self.file.get_ref().sync_all().map_err(failed)?;
        Ok(info)
    }
}

fn header(info: &ShardInfo, width: u32) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[12..16].copy_from_slice(&width.to_le_bytes());
    header[16..24].copy_from_slice(&info.tokens.to_le_bytes());
    header[24..32].copy_from_slice(&info.documents.to_le_bytes());
    header[32..36].copy_from_slice(&info.crc32c.to_le_bytes());
    let crc = crc32c::crc32c(&header[..36]);
    header[36..40].copy_from_slice(&crc.to_le_bytes());
    header
}

/// CRC-32C of the rest of a file.
fn checksum(file: &mut File) -> std::io::Result<u32> {
    let mut buffer = vec![0; 1 << 20];
    let mut crc = 0;
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(crc),
            got => crc = crc32c::crc32c_append(crc, &buffer[..got]),
        }
    }
}

enum Tokens {
    Narrow(Mmap),
    Wide(Mmap),
    Memory(Vec<u32>),
}

struct Shard {
    tokens: Tokens,
    /// Number of its first token in the stream.
    first: u64,
    count: u64,
    /// Starts of documents, from the first token of the shard.
    starts: Starts,
}

enum Starts {
    /// They stand in the mapped file, from this byte on.
    Mapped(Range<usize>),
    Memory(Vec<u64>),
}

impl Shard {
    /// Checks every byte of a shard, then maps it. The bytes are read rather than looked at through the map, so that
    /// the pages of a large corpus do not count as memory of this process before anyone needs them.
    fn open(path: &Path, first: u64, info: &ShardInfo) -> Result<Self, DataError> {
        let torn = |reason: String| DataError::TornShard { path: path.to_owned(), reason };
        let mut file = File::open(path).map_err(DataError::io("open", path))?;
        let length = file.metadata().map_err(DataError::io("read", path))?.len();
        if length < HEADER as u64 {
            return Err(torn(format!("{length} bytes, less than a header")));
        }
        let mut found = [0; HEADER];
        file.read_exact(&mut found).map_err(DataError::io("read", path))?;
        let width = u32::from_le_bytes(found[12..16].try_into().unwrap_or_default());
        if found != header(info, width) || !matches!(width, 2 | 4) {
            return Err(torn("the header differs from the manifest".into()));
        }
        // From here on the counts are those of the manifest, which has a checksum of its own.
        let body = (info.tokens as u128 * u128::from(width)).next_multiple_of(8);
        let expected = HEADER as u128 + body + 8 * u128::from(info.documents);
        if u128::from(length) != expected {
            return Err(torn(format!("{length} bytes, expected {expected}")));
        }
        let crc = checksum(&mut file).map_err(DataError::io("read", path))?;
        if crc != info.crc32c {
            return Err(torn(format!("checksum {crc:08x}, expected {:08x}", info.crc32c)));
        }
        // SAFETY: the map is read-only, and the shards of a cache are written under another name, renamed once and never
        // written again; truncating one while it is mapped would be an error of whoever does it (SIGBUS).
        let map = unsafe { Mmap::map(&file) }.map_err(DataError::io("map", path))?;
        if map.len() as u64 != length {
            return Err(torn("it changed while it was opened".into()));
        }
        let starts = Starts::Mapped(HEADER + body as usize..map.len());
        let tokens = if width == 2 { Tokens::Narrow(map) } else { Tokens::Wide(map) };
        Ok(Self { tokens, first, count: info.tokens, starts })
    }

    fn starts(&self) -> &[u64] {
        match (&self.starts, &self.tokens) {
            (Starts::Mapped(range), Tokens::Narrow(map) | Tokens::Wide(map)) => {
                bytemuck::cast_slice(&map[range.clone()])
            }
            (Starts::Memory(starts), _) => starts,
            (Starts::Mapped(_), Tokens::Memory(_)) => &[],
        }
    }

    /// Calls `each` for the tokens of a range, counted from the first of the shard.
    fn each(&self, range: Range<usize>, mut each: impl FnMut(u32)) {
        let bytes = |width: usize| HEADER + range.start * width..HEADER + range.end * width;
        match &self.tokens {
            Tokens::Narrow(map) => {
                bytemuck::cast_slice::<u8, u16>(&map[bytes(2)]).iter().for_each(|&t| each(u32::from(t)));
            }
            Tokens::Wide(map) => bytemuck::cast_slice::<u8, u32>(&map[bytes(4)]).iter().for_each(|&t| each(t)),
            Tokens::Memory(tokens) => tokens[range].iter().for_each(|&t| each(t)),
        }
    }
}

/// A stream of tokens with the starts of its documents: mapped shards, or tokens in memory.
pub struct TokenStream {
    shards: Vec<Shard>,
    len: u64,
    documents: u64,
}

impl std::fmt::Debug for TokenStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { shards, len, documents } = self;
        write!(f, "TokenStream {{ {len} tokens of {documents} documents in {} shards }}", shards.len())
    }
}

impl TokenStream {
    /// Opens the shards of a stream and checks their checksums, on all threads.
    pub(crate) fn open(dir: &Path, stream: &str, infos: &[ShardInfo]) -> Result<Self, DataError> {
        let mut first = 0u64;
        let mut jobs = Vec::with_capacity(infos.len());
        for (number, info) in infos.iter().enumerate() {
            jobs.push((shard_path(dir, stream, number), first, info));
            first = first.saturating_add(info.tokens);
        }
        let shards = jobs
            .into_par_iter()
            .map(|(path, first, info)| Shard::open(&path, first, info))
            .collect::<Result<_, _>>()?;
        Ok(Self { shards, len: first, documents: infos.iter().map(|i| i.documents).sum() })
    }

    /// A stream in memory of the given documents, separators included: for tests and for data made by a program.
    pub fn from_documents<T: AsRef<[u32]>>(documents: &[T]) -> Self {
        let mut tokens = Vec::new();
        let mut starts = Vec::new();
        for document in documents.iter().map(AsRef::as_ref).filter(|d| !d.is_empty()) {
            starts.push(tokens.len() as u64);
            tokens.extend_from_slice(document);
        }
        let (len, documents) = (tokens.len() as u64, starts.len() as u64);
        let shard = Shard { tokens: Tokens::Memory(tokens), first: 0, count: len, starts: Starts::Memory(starts) };
        Self { shards: vec![shard], len, documents }
    }

    /// Tokens in the stream.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True when there is no token.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Documents that start in the stream.
    pub fn documents(&self) -> u64 {
        self.documents
    }

    /// The shards that a range touches, each with the range inside it.
    fn pieces(&self, range: &Range<u64>) -> impl Iterator<Item = (&Shard, Range<usize>)> {
        let Range { start, end } = *range;
        let from = self.shards.partition_point(|s| s.first + s.count <= start);
        self.shards[from..].iter().take_while(move |s| s.first < end).map(move |s| {
            let local = start.max(s.first) - s.first..end.min(s.first + s.count) - s.first;
            (s, local.start as usize..local.end as usize)
        })
    }

    /// The tokens of a range.
    ///
    /// # Panics
    /// When the range ends after the stream.
    pub fn tokens(&self, range: Range<u64>) -> Vec<u32> {
        assert!(range.start <= range.end && range.end <= self.len, "tokens {range:?} of {}", self.len);
        let mut out = Vec::with_capacity((range.end - range.start) as usize);
        self.pieces(&range).for_each(|(shard, local)| shard.each(local, |t| out.push(t)));
        out
    }

    /// Where documents start inside a range, in order.
    pub fn document_starts(&self, range: Range<u64>) -> Vec<u64> {
        let mut out = Vec::new();
        for (shard, local) in self.pieces(&range) {
            let starts = shard.starts();
            let from = starts.partition_point(|&s| s < local.start as u64);
            out.extend(starts[from..].iter().take_while(|&&s| s < local.end as u64).map(|&s| s + shard.first));
        }
        out
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn shards_hold_what_was_appended(
            documents in prop::collection::vec(prop::collection::vec(0u32..70_000, 1..40), 1..20),
            shard_tokens in 1u64..50,
            wide: bool,
        ) {
            let documents: Vec<Vec<u32>> =
                documents.into_iter().map(|d| d.into_iter().map(|t| if wide { t } else { t % 65_536 }).collect()).collect();
            let dir = tempfile::tempdir().unwrap();
            let vocab_size = if wide { 70_000 } else { 65_536 };
            let mut writer = StreamWriter::new(dir.path(), "s", vocab_size, shard_tokens);
            for d in &documents {
                let (a, b) = d.split_at(d.len() / 2);
                writer.append(a, !a.is_empty()).unwrap();
                writer.append(b, a.is_empty()).unwrap();
            }
            let infos = writer.finish().unwrap();
            let mapped = TokenStream::open(dir.path(), "s", &infos).unwrap();
            let memory = TokenStream::from_documents(&documents);
            prop_assert_eq!((mapped.len(), mapped.documents()), (memory.len(), memory.documents()));
            for start in 0..=memory.len() {
                for end in [start, (start + 1).min(memory.len()), (start + 17).min(memory.len()), memory.len()] {
                    prop_assert_eq!(mapped.tokens(start..end), memory.tokens(start..end));
                    prop_assert_eq!(mapped.document_starts(start..end), memory.document_starts(start..end));
                }
            }
        }
    }

    #[test]
    fn every_torn_shard_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = StreamWriter::new(dir.path(), "s", 300, 1000);
        writer.append(&[1, 2, 3, 4, 5], true).unwrap();
        writer.append(&[6, 7], true).unwrap();
        let infos = writer.finish().unwrap();
        let path = shard_path(dir.path(), "s", 0);
        let whole = std::fs::read(&path).unwrap();
        for length in 0..whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            assert!(TokenStream::open(dir.path(), "s", &infos).is_err(), "cut to {length}");
        }
        for byte in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[byte] ^= 1;
            std::fs::write(&path, &flipped).unwrap();
            assert!(TokenStream::open(dir.path(), "s", &infos).is_err(), "flipped {byte}");
        }
        std::fs::write(&path, &whole).unwrap();
        assert_eq!(TokenStream::open(dir.path(), "s", &infos).unwrap().tokens(0..7), [1, 2, 3, 4, 5, 6, 7]);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_an_error_with_a_hint() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/dev/full", shard_path(dir.path(), "s", 0)).unwrap();
        let mut writer = StreamWriter::new(dir.path(), "s", 300, 1 << 40);
        let written = writer.append(&vec![7; 3 << 20], true).and_then(|()| writer.finish());
        let error = written.unwrap_err().to_string();
        assert!(error.contains("free some space"), "{error}");
    }
}
