//! Streams documents out of files, in parts of bounded size, so that neither a large file nor a large document is ever
//! whole in memory.

use crate::error::DataError;
use crate::files::{Compression, CorpusFile, Format};
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::ops::ControlFlow;
use std::path::Path;

/// A longer document comes in several parts of about this many bytes, cut after a line where there is one. It bounds
/// the memory of a document, and is what one thread encodes at a time; the cut costs a token or two per MiB.
pub const PART_BYTES: usize = 1 << 20;

/// A longer line of a .jsonl file is refused rather than taken into memory.
const MAX_JSON_LINE: u64 = 1 << 30;

/// A document, or a part of a long one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Which source the document is of.
    pub source: usize,
    /// True for the first part of its document.
    pub first: bool,
    /// True for the last part of its document.
    pub last: bool,
    /// Its bytes, as they are in the file: nothing is normalized, and they need not be UTF-8.
    pub bytes: Vec<u8>,
}

/// Reads all documents of the files, in order, and calls `each` for every part, until it breaks.
///
/// `max_bytes` caps the bytes of each source: the document that crosses it is cut at a character and is the source's last.
///
/// # Errors
/// When a file cannot be opened, read, decompressed or parsed, or lacks the text field or column.
pub fn read_documents(
    files: &[CorpusFile],
    max_bytes: Option<u64>,
    each: &mut dyn FnMut(Part) -> ControlFlow<()>,
) -> Result<(), DataError> {
    let mut left = max_bytes.unwrap_or(u64::MAX);
    let mut source = None;
    for file in files {
        if source != Some(file.source) {
            source = Some(file.source);
            left = max_bytes.unwrap_or(u64::MAX);
        }
        if left == 0 {
            continue;
        }
        let mut emit = Emit { source: file.source, left: &mut left, stopped: false, inside: false, each };
        match file.format {
            Format::Plain => plain(file, &mut emit)?,
            Format::Jsonl => jsonl(file, &mut emit)?,
            Format::Parquet => crate::parquet_file::read(file, &mut emit)?,
        }
        if emit.stopped {
            return Ok(());
        }
    }
    Ok(())
}

/// Hands out parts, applies the cap on bytes and remembers whether to go on.
pub(crate) struct Emit<'a> {
    source: usize,
    left: &'a mut u64,
    stopped: bool,
    inside: bool,
    each: &'a mut dyn FnMut(Part) -> ControlFlow<()>,
}

impl Emit<'_> {
    /// A part of a document; says whether to go on with this source.
    fn part(&mut self, mut bytes: Vec<u8>, mut last: bool) -> ControlFlow<()> {
        if bytes.len() as u64 >= *self.left {
            bytes.truncate(char_boundary(&bytes, *self.left as usize));
            *self.left = 0;
            last = true;
        } else {
            *self.left -= bytes.len() as u64;
        }
        let first = !std::mem::replace(&mut self.inside, !last);
        if (self.each)(Part { source: self.source, first, last, bytes }).is_break() {
            self.stopped = true;
            return ControlFlow::Break(());
        }
        if *self.left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    /// A whole document that is in memory.
    pub(crate) fn document(&mut self, mut bytes: Vec<u8>) -> ControlFlow<()> {
        while bytes.len() > PART_BYTES {
            let rest = bytes.split_off(cut(&bytes));
            self.part(std::mem::replace(&mut bytes, rest), false)?;
        }
        self.part(bytes, true)
    }
}

/// Where to end a part: after the last line end of its second half, else between two characters.
fn cut(bytes: &[u8]) -> usize {
    let half = PART_BYTES / 2;
    match bytes[half..PART_BYTES].iter().rposition(|&b| b == b'\n') {
        Some(line_end) => half + line_end + 1,
        None => char_boundary(bytes, PART_BYTES),
    }
}

/// The last boundary of a UTF-8 character at or before `at`, or `at` itself where the bytes are not UTF-8.
pub(crate) fn char_boundary(bytes: &[u8], at: usize) -> usize {
    if at >= bytes.len() {
        return bytes.len();
    }
    let boundary = (at.saturating_sub(3)..=at).rev().find(|&i| bytes[i] & 0xc0 != 0x80);
    boundary.unwrap_or(at)
}

/// The bytes of a file, decompressed.
fn open(file: &CorpusFile) -> Result<Box<dyn BufRead>, DataError> {
    let raw = File::open(&file.path).map_err(DataError::io("open", &file.path))?;
    Ok(match file.compression {
        Compression::None => Box::new(BufReader::with_capacity(1 << 18, raw)),
        Compression::Gzip => Box::new(BufReader::with_capacity(
            1 << 18,
            flate2::bufread::MultiGzDecoder::new(BufReader::with_capacity(1 << 16, raw)),
        )),
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::new(raw).map_err(DataError::io("open", &file.path))?;
            // Files of `zstd --long=31` are common for corpora; the window is memory that the writer asked for.
            decoder.window_log_max(31).map_err(DataError::io("open", &file.path))?;
            Box::new(BufReader::with_capacity(1 << 18, decoder))
        }
    })
}

fn read_error(file: &CorpusFile, source: std::io::Error) -> DataError {
    let format = match file.compression {
        Compression::None => return DataError::Io { operation: "read", path: file.path.clone(), source },
        Compression::Gzip => "gzip",
        Compression::Zstd => "zstd",
    };
    DataError::Damaged { path: file.path.clone(), format, reason: source.to_string() }
}

fn plain(file: &CorpusFile, emit: &mut Emit<'_>) -> Result<(), DataError> {
    let mut reader = open(file)?;
    let mut pending = Vec::new();
    loop {
        let wanted = (PART_BYTES + 1 - pending.len()) as u64;
        let got = (&mut reader).take(wanted).read_to_end(&mut pending).map_err(|e| read_error(file, e))?;
        if (got as u64) < wanted {
            let _ = emit.part(pending, true);
            return Ok(());
        }
        let rest = pending.split_off(cut(&pending));
        if emit.part(std::mem::replace(&mut pending, rest), false).is_break() {
            return Ok(());
        }
    }
}

fn jsonl(file: &CorpusFile, emit: &mut Emit<'_>) -> Result<(), DataError> {
    lines(file, &mut |line, number| Ok(emit.document(text_of(line, &file.text_field, &file.path, number)?)))
}

/// What is done with a line and its number, from 1; it says whether to go on.
type EachLine<'a> = dyn FnMut(&[u8], u64) -> Result<ControlFlow<()>, DataError> + 'a;

/// Calls `each` with every line that is not blank, until it breaks.
pub(crate) fn lines(file: &CorpusFile, each: &mut EachLine<'_>) -> Result<(), DataError> {
    let mut reader = open(file)?;
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        let got = (&mut reader).take(MAX_JSON_LINE).read_until(b'\n', &mut line).map_err(|e| read_error(file, e))?;
        if got == 0 {
            break;
        }
        if got as u64 == MAX_JSON_LINE && line.last() != Some(&b'\n') {
            let reason = format!("longer than {MAX_JSON_LINE} bytes");
            return Err(DataError::BadJsonLine { path: file.path.clone(), line: number, reason });
        }
        if line.trim_ascii().is_empty() {
            continue;
        }
        if each(&line, number)?.is_break() {
            break;
        }
    }
    Ok(())
}

/// The text field of a JSON object.
fn text_of(line: &[u8], field: &str, path: &Path, number: u64) -> Result<Vec<u8>, DataError> {
    let mut parser = serde_json::Deserializer::from_slice(line);
    let found = ObjectSeed { field }.deserialize(&mut parser).and_then(|found| parser.end().map(|()| found));
    match found {
        Ok(Found { text: Some(text), .. }) => Ok(text),
        Ok(Found { text: None, keys }) => Err(DataError::MissingField {
            path: path.to_owned(),
            line: number,
            field: field.to_owned(),
            found: if keys.is_empty() { "none".into() } else { keys.join(", ") },
        }),
        Err(e) => Err(DataError::BadJsonLine { path: path.to_owned(), line: number, reason: e.to_string() }),
    }
}

/// What a JSON object was found to hold.
struct Found {
    text: Option<Vec<u8>>,
    /// The names of the other fields, the first few, for the error.
    keys: Vec<String>,
}

/// Takes one field of an object as bytes and skips the others without building them.
struct ObjectSeed<'a> {
    field: &'a str,
}

impl<'de> DeserializeSeed<'de> for ObjectSeed<'_> {
    type Value = Found;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Found, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for ObjectSeed<'_> {
    type Value = Found;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object such as {\"text\": \"...\"}")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Found, A::Error> {
        let mut found = Found { text: None, keys: Vec::new() };
        while let Some(key) = map.next_key::<String>()? {
            if key == self.field {
                found.text = Some(map.next_value_seed(TextSeed)?);
            } else {
                map.next_value::<IgnoredAny>()?;
                if found.keys.len() < 20 {
                    found.keys.push(key);
                }
            }
        }
        Ok(found)
    }
}

/// A JSON string as bytes: serde_json checks UTF-8 for `str` alone, so bytes that are not UTF-8 come through as they are.
struct TextSeed;

impl<'de> DeserializeSeed<'de> for TextSeed {
    type Value = Vec<u8>;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Vec<u8>, D::Error> {
        deserializer.deserialize_option(self)
    }
}

impl<'de> Visitor<'de> for TextSeed {
    type Value = Vec<u8>;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string in the text field")
    }
    fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
        Ok(bytes.to_vec())
    }
    fn visit_str<E>(self, text: &str) -> Result<Vec<u8>, E> {
        Ok(text.as_bytes().to_vec())
    }
    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Vec<u8>, D::Error> {
        deserializer.deserialize_byte_buf(self)
    }
    /// `null` is a document without text, which is dropped and counted.
    fn visit_none<E>(self) -> Result<Vec<u8>, E> {
        Ok(Vec::new())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{Source, list_files};

    fn parts(path: &Path, max_bytes: Option<u64>) -> Result<Vec<Part>, DataError> {
        let files = list_files(&[Source::new([path.to_string_lossy()])], "text")?;
        let mut parts = Vec::new();
        read_documents(&files, max_bytes, &mut |part| {
            parts.push(part);
            ControlFlow::Continue(())
        })?;
        Ok(parts)
    }

    #[test]
    fn a_large_file_comes_in_parts_that_join_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let lines: Vec<u8> = (0..400_000).flat_map(|i| format!("line {i} é\n").into_bytes()).collect();
        let wide: Vec<u8> = "é".repeat(2 * PART_BYTES).into_bytes();
        let binary: Vec<u8> = (0..3 * PART_BYTES).map(|i| 0x80 | (i * 31 % 64) as u8).collect();
        for (name, text) in [
            ("lines.txt", &lines),
            ("wide.txt", &wide),
            ("binary.txt", &binary),
            ("exact.txt", &lines[..PART_BYTES].to_vec()),
        ] {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            let parts = parts(&path, None).unwrap();
            assert_eq!(&parts.iter().flat_map(|p| p.bytes.clone()).collect::<Vec<_>>(), text);
            assert!(parts.iter().all(|p| p.bytes.len() <= PART_BYTES), "{name}");
            assert!(parts[0].first && parts.iter().skip(1).all(|p| !p.first));
            assert!(parts.last().unwrap().last && parts.iter().rev().skip(1).all(|p| !p.last));
            if name == "wide.txt" {
                assert!(parts.iter().all(|p| std::str::from_utf8(&p.bytes).is_ok()), "cut inside a character");
            }
        }
    }

    #[test]
    fn the_cap_cuts_at_a_character_and_ends_the_document() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.txt");
        std::fs::write(&path, "ééééé").unwrap();
        let parts = parts(&path, Some(5)).unwrap();
        assert_eq!(parts.len(), 1);
        assert!(parts[0].first && parts[0].last);
        assert_eq!(parts[0].bytes, "éé".as_bytes());
        let big = dir.path().join("big.txt");
        std::fs::write(&big, "x".repeat(3 * PART_BYTES)).unwrap();
        for cap in [PART_BYTES as u64, PART_BYTES as u64 + 10, 2 * PART_BYTES as u64 - 1] {
            let parts = self::parts(&big, Some(cap)).unwrap();
            assert_eq!(parts.iter().map(|p| p.bytes.len() as u64).sum::<u64>(), cap);
            assert!(parts.last().unwrap().last, "{cap}");
        }
    }

    #[test]
    fn bytes_that_are_not_utf8_survive_json() {
        let line = b"{\"id\": [1, {\"text\": 2}], \"text\": \"a\\n\\u00e9 \xff\xfe\", \"x\": null}\n";
        assert_eq!(text_of(line, "text", Path::new("f"), 1).unwrap(), b"a\n\xc3\xa9 \xff\xfe");
        assert_eq!(text_of(b"{\"text\": null}", "text", Path::new("f"), 1).unwrap(), b"");
    }

    #[test]
    fn bad_lines_are_named() {
        let error = |line: &[u8]| text_of(line, "text", Path::new("f.jsonl"), 7).unwrap_err().to_string();
        assert!(error(b"{\"body\": \"x\", \"id\": 1}").starts_with("f.jsonl:7: no field `text` (there are: body, id)"));
        assert!(error(b"{\"text\": \"x\"").starts_with("f.jsonl:7: not a JSON object"));
        assert!(error(b"[1]").contains("an object such as"), "{}", error(b"[1]"));
        assert!(error(b"{\"text\": 3}").contains("a string in the text field"), "{}", error(b"{\"text\": 3}"));
        assert!(error(b"{\"text\": \"a\"} x").contains("trailing"));
    }
}
