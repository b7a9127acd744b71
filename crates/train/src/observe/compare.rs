//! What general-purpose compressors make of the held-out text: the yardstick for a model's bits per byte.
//!
//! A model that gives a text `b` bits per byte could, with an arithmetic coder, store it in `b / 8` of its size. So its
//! figure compares directly with that of a compressor (Shannon 1948; Delétang et al. 2023, arXiv:2309.10668). The model's own size is
//! not counted, as that of the gzip program isn't.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{ObserveError, files};

/// Sizes of a held-out text, as it is and compressed: `baselines.json`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Baselines {
    /// Bytes of the text.
    pub bytes: u64,
    /// Bytes that gzip makes of it at level 9.
    pub gzip_bytes: u64,
    /// Bytes that xz makes of it at level 9.
    pub xz_bytes: u64,
    /// gzip's bits per byte; 0 for an empty text.
    pub gzip_bpb: f64,
    /// xz's bits per byte; 0 for an empty text.
    pub xz_bpb: f64,
}

impl Baselines {
    /// Writes `baselines.json` into a run folder.
    ///
    /// # Errors
    ///
    /// When the file can't be written.
    pub fn save(&self, run_dir: &Path) -> Result<PathBuf, ObserveError> {
        let path = run_dir.join("baselines.json");
        files::write_json(&path, self)?;
        Ok(path)
    }
}

/// Compresses files one by one, as `gzip -9 FILES` and `xz -9 FILES` do, and adds up. A model whose rows keep documents apart sees each file
/// just so.
///
/// xz is liblzma itself at preset 9 with the program's default checksum, so its size is the program's. gzip is DEFLATE at level 9 by flate2, whose size
/// is within a percent of the program's, plus the 18 bytes of gzip's header and trailer.
///
/// # Errors
///
/// When there is no memory for xz: it takes some 60 MB and ten times the largest file, at most 674 MB.
///
/// # Example
///
/// ```
/// let text = "the cat sat on the mat; ".repeat(1_000);
/// let baselines = firebox_train::observe::compare::gzip_xz([text.into_bytes()])?;
/// assert_eq!(baselines.bytes, 24_000);
/// assert!(baselines.gzip_bpb < 0.2 && baselines.xz_bpb < 0.2);
/// # Ok::<(), std::io::Error>(())
/// ```
pub fn gzip_xz(files: impl IntoIterator<Item = Vec<u8>>) -> io::Result<Baselines> {
    let mut sum = Baselines { bytes: 0, gzip_bytes: 0, xz_bytes: 0, gzip_bpb: 0.0, xz_bpb: 0.0 };
    for file in files.into_iter().filter(|file| !file.is_empty()) {
        let mut gzip = flate2::write::GzEncoder::new(Counter(0), flate2::Compression::best());
        gzip.write_all(&file)?;
        // A dictionary of the file's size finds what the 64 MiB of level 9 would, without clearing them for every file.
        let mut options = liblzma::stream::LzmaOptions::new_preset(9)?;
        options.dict_size((file.len() as u32).clamp(4096, 64 << 20));
        let mut filters = liblzma::stream::Filters::new();
        filters.lzma2(&options);
        let stream = liblzma::stream::Stream::new_stream_encoder(&filters, liblzma::stream::Check::Crc64)?;
        let mut xz = liblzma::write::XzEncoder::new_stream(Counter(0), stream);
        xz.write_all(&file)?;
        sum.bytes += file.len() as u64;
        sum.gzip_bytes += gzip.finish()?.0;
        sum.xz_bytes += xz.finish()?.0;
    }
    if sum.bytes > 0 {
        sum.gzip_bpb = 8.0 * sum.gzip_bytes as f64 / sum.bytes as f64;
        sum.xz_bpb = 8.0 * sum.xz_bytes as f64 / sum.bytes as f64;
    }
    Ok(sum)
}

/// Counts the bytes that are written to it.
struct Counter(u64);

impl Write for Counter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
