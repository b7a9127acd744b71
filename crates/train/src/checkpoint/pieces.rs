//! Tensor files in pieces: what several ranks write at once, and what is hashed at once.
//!
//! The cut depends on the tensors alone, so that every rank finds the same one, and any number of ranks writes the same bytes under the same manifest.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Seek as _, SeekFrom, Write as _};
use std::ops::Range;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use super::error::CheckpointError;
use super::tensors::{TensorSpec, header};

/// Writes and hashes go in portions of this size: large enough for the disk, small enough to be still in the cache when the hash has read it.
pub(super) const PORTION: usize = 1 << 20;

/// Pieces are at most so many bytes, unless a single tensor is larger.
const MOST: u64 = 64 << 20;
/// And at least so many.
const LEAST: u64 = 4 << 10;
/// Between these bounds a file is cut into so many.
const COUNT: u64 = 64;

/// The SHA-256 of a piece.
pub(crate) type Hash = [u8; 32];

/// How a safetensors file is cut into pieces, each of some tensors that follow one another.
#[derive(Debug, Clone)]
pub(crate) struct TensorPlan {
    path: PathBuf,
    header: Vec<u8>,
    specs: Vec<TensorSpec>,
    pieces: Vec<Piece>,
}

#[derive(Debug, Clone)]
struct Piece {
    units: Range<usize>,
    tensors: Range<usize>,
    /// Bytes of the file.
    bytes: Range<u64>,
}

impl TensorPlan {
    /// The file `path` with the tensors `specs`. `units` are the numbers of tensors that are never cut apart, in order; they add up to all.
    ///
    /// # Errors
    /// If names repeat, a type narrower than the next tensor's would misalign that, or there are too many bytes.
    pub fn new(
        path: impl Into<PathBuf>,
        metadata: &BTreeMap<String, String>,
        specs: Vec<TensorSpec>,
        units: impl IntoIterator<Item = usize>,
    ) -> Result<Self, CheckpointError> {
        let path = path.into();
        let (header, size) = header(&path, metadata, &specs)?;
        let wanted = (size / COUNT).clamp(LEAST, MOST);
        // The header is part of the first piece.
        let mut pieces = vec![];
        let (mut piece, mut end) = (Piece { units: 0..0, tensors: 0..0, bytes: 0..header.len() as u64 }, 0);
        for (i, unit) in units.into_iter().enumerate() {
            if piece.bytes.end - piece.bytes.start >= wanted {
                let next = Piece { units: i..i, tensors: end..end, bytes: piece.bytes.end..piece.bytes.end };
                pieces.push(std::mem::replace(&mut piece, next));
            }
            piece.units.end = i + 1;
            let bytes: usize = specs[end..end + unit].iter().filter_map(TensorSpec::n_bytes).sum();
            end += unit;
            piece.tensors.end = end;
            piece.bytes.end += bytes as u64;
        }
        pieces.push(piece);
        Ok(Self { path, header, specs, pieces })
    }

    /// Which units each piece has.
    pub fn pieces(&self) -> impl ExactSizeIterator<Item = Range<usize>> + '_ {
        self.pieces.iter().map(|piece| piece.units.clone())
    }

    /// Bytes of the file.
    pub(super) fn size(&self) -> u64 {
        self.pieces.last().map_or(0, |piece| piece.bytes.end)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Sizes in bytes of the pieces.
    pub(super) fn sizes(&self) -> impl Iterator<Item = u64> + '_ {
        self.pieces.iter().map(|piece| piece.bytes.end - piece.bytes.start)
    }
}

/// One who writes pieces of a file that exists.
#[derive(Debug)]
pub(crate) struct PieceWriter<'a> {
    plan: &'a TensorPlan,
    file: File,
}

impl<'a> PieceWriter<'a> {
    /// Opens the file.
    ///
    /// # Errors
    /// If the rank that creates it has not, or the disk is not the same.
    pub fn open(plan: &'a TensorPlan) -> Result<Self, CheckpointError> {
        let file = OpenOptions::new().write(true).open(&plan.path).map_err(CheckpointError::open(
            "write",
            &plan.path,
            "a file that another rank has created: all ranks need the same disk",
        ))?;
        Ok(Self { plan, file })
    }

    pub(super) fn new(plan: &'a TensorPlan, file: File) -> Self {
        Self { plan, file }
    }

    /// Writes piece `i`, whose tensors' bytes `data` gives in order, and returns its hash.
    ///
    /// `data` is asked for a tensor only when the one before is written and dropped, so a lazy iterator keeps at most one in memory. An iterator that
    /// cannot go on just ends: that is an error here.
    ///
    /// # Errors
    /// If the bytes do not fit the shapes, there are too few, or the disk fails.
    pub fn write<I>(&mut self, i: usize, data: &mut I) -> Result<Hash, CheckpointError>
    where
        I: Iterator,
        I::Item: AsRef<[u8]>,
    {
        let TensorPlan { path, header, specs, pieces } = self.plan;
        let piece = &pieces[i];
        let io = |source| CheckpointError::io("write", path)(source);
        self.file.seek(SeekFrom::Start(piece.bytes.start)).map_err(io)?;
        let mut file = BufWriter::with_capacity(PORTION, &self.file);
        let mut hasher = Sha256::new();
        let mut write = |bytes: &[u8]| {
            bytes.chunks(PORTION).try_for_each(|portion| {
                hasher.update(portion);
                file.write_all(portion).map_err(io)
            })
        };
        if i == 0 {
            write(header)?;
        }
        for n in piece.tensors.clone() {
            let wrong = |got| CheckpointError::invalid("write", path, format!("the bytes of {:?}", specs[n]), got);
            let bytes = data.next().ok_or_else(|| wrong(format!("the end after {n} of {} tensors", specs.len())))?;
            let bytes = bytes.as_ref();
            if Some(bytes.len()) != specs[n].n_bytes() {
                return Err(wrong(format!("{} bytes", bytes.len())));
            }
            write(bytes)?;
        }
        file.flush().map_err(io)?;
        Ok(hasher.finalize().into())
    }

    /// Flushes what was written to the disk.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn finish(self) -> Result<(), CheckpointError> {
        self.file.sync_all().map_err(CheckpointError::io("flush", &self.plan.path))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn plan(elements: &[usize], units: &[usize]) -> TensorPlan {
        let specs = elements.iter().enumerate().map(|(i, n)| TensorSpec::f32(format!("t{i}"), [*n])).collect();
        TensorPlan::new("file", &BTreeMap::new(), specs, units.iter().copied()).unwrap()
    }

    #[test]
    fn pieces_tile_the_file_and_keep_units_together() {
        for (elements, units) in [
            (&[][..], &[][..]),
            (&[3], &[1]),
            (&[5000, 1, 1, 5000, 5000, 2], &[3, 1, 2]),
            (&[1 << 20, 1 << 20, 7, 1 << 20, 1], &[1, 1, 1, 1, 1]),
        ] {
            let plan = plan(elements, units);
            let mut starts = vec![0];
            starts.extend(units.iter().scan(0, |at, unit| {
                *at += unit;
                Some(*at)
            }));
            let (mut tensor, mut byte) = (0, 0);
            for piece in &plan.pieces {
                assert_eq!((piece.tensors.start, piece.bytes.start), (tensor, byte), "{elements:?}");
                assert!(starts.contains(&piece.tensors.end), "{elements:?}: cut at {}", piece.tensors.end);
                (tensor, byte) = (piece.tensors.end, piece.bytes.end);
            }
            assert_eq!(tensor, elements.len());
            assert_eq!(byte, (plan.header.len() + 4 * elements.iter().sum::<usize>()) as u64);
        }
    }

    #[test]
    fn small_files_have_one_piece_and_large_ones_many() {
        assert_eq!(plan(&[10, 10], &[1, 1]).pieces.len(), 1);
        let many = plan(&[4096; 100], &[1; 100]).pieces.len();
        assert!((30..=64).contains(&many), "{many} pieces");
    }
}
