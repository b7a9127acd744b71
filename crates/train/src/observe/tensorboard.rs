//! TensorBoard event files, written without TensorFlow: `tensorboard --logdir RUN`.
//!
//! A file is a sequence of TFRecords, each a protobuf message `Event`
//! (<https://github.com/tensorflow/tensorboard/blob/master/tensorboard/compat/proto/event.proto>):
//!
//! ```text
//! u64 length | u32 masked crc32c of the length | the message | u32 masked crc32c of the message      (little endian)
//! ```
//!
//! Only a dozen fields are ever needed, so the messages are encoded by hand. Steps become scalars under `train/`,
//! `speed/` and `memory/`, evaluations under `validation/`, samples go to the text tab.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::{Event, ObserveError, Observer};

/// Writes one event file per start of a run.
///
/// A resumed run marks its first step as a restart, which makes TensorBoard forget what earlier files say about that
/// step and later ones.
#[derive(Debug, Default)]
pub struct TensorBoard {
    open: Option<(PathBuf, File)>,
}

impl TensorBoard {
    /// An observer that opens its file at [`Event::RunStarted`].
    pub fn new() -> Self {
        Self::default()
    }

    fn write(&mut self, step: u64, content: &Content<'_>) -> Result<(), ObserveError> {
        let Some((path, file)) = &mut self.open else { return Ok(()) };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
        // One write for a whole record: a file that is being read never ends within one by our doing.
        file.write_all(&record(&event(now, step, content))).map_err(ObserveError::write(path))
    }
}

impl Observer for TensorBoard {
    fn on_event(&mut self, event: &Event<'_>) -> Result<(), ObserveError> {
        match event {
            Event::RunStarted(info) => {
                fs::create_dir_all(&info.dir).map_err(ObserveError::write(&info.dir))?;
                let path = start_file(&info.dir, info.start_step == 0)?;
                let file = File::create_new(&path).map_err(ObserveError::write(&path))?;
                self.open = Some((path, file));
                self.write(0, &Content::FileVersion)?;
                let first = if info.start_step == 0 { 0 } else { info.start_step + 1 };
                self.write(first, &Content::Restart)
            }
            Event::Step(record) => {
                let always = [
                    ("train/loss", record.loss),
                    ("train/learning_rate", record.lr),
                    ("train/gradient_norm", record.grad_norm),
                    ("speed/tokens_per_s", record.tokens_per_s),
                    ("speed/mfu", record.mfu),
                    ("memory/resident_bytes", record.memory_bytes as f64),
                ];
                let noise = record.noise_scale_rows.map(|rows| ("train/noise_scale_rows", rows));
                let load = record.expert_load.map(|load| ("train/expert_load", load));
                let ranks = record.ranks.into_iter().flat_map(|ranks| {
                    let sent = [("ranks/bytes_sent", ranks.bytes_sent as f64), ("ranks/idle", ranks.idle)];
                    let overlap = ranks.overlap.map(|overlap| ("ranks/overlap", overlap));
                    let bubble = ranks.bubble.map(|bubble| ("ranks/bubble", bubble));
                    sent.into_iter().chain(overlap).chain(bubble)
                });
                let scalars: Vec<_> = always.into_iter().chain(noise).chain(load).chain(ranks).collect();
                self.write(record.step, &Content::Scalars(&scalars))
            }
            Event::Evaluated(record) => {
                let names: Vec<String> = record.metrics.keys().map(|name| format!("validation/{name}")).collect();
                let bits = (record.val_bpb > 0.0).then_some(("validation/bits_per_byte", record.val_bpb));
                let raw = [("validation/loss", record.val_loss)].into_iter().chain(bits);
                let metrics = names.iter().map(String::as_str).zip(record.metrics.values().copied());
                let average = record.val_loss_average.map(|loss| ("validation/loss_of_average", loss));
                let sparsity = record.sparsity.map(|share| ("validation/sparsity", share));
                let scalars: Vec<_> = raw.chain(average).chain(sparsity).chain(metrics).collect();
                self.write(record.step, &Content::Scalars(&scalars))
            }
            Event::Sampled { step, text } => self.write(*step, &Content::Text("sample", text)),
            Event::Finished(_) => {
                self.open = None;
                Ok(())
            }
            Event::Pictured { .. } | Event::Timeline { .. } | Event::CheckpointSaved { .. } | Event::Skipped { .. } => {
                Ok(())
            }
        }
    }
}

/// A name for a new file: `events.out.tfevents.SECONDS.firebox.PID`. TensorBoard reads the files of a folder in the
/// order of their names, so a file gets a later second than all before it. A new run first removes Firebox's files of
/// the run before, as it starts `metrics.jsonl` anew.
fn start_file(dir: &Path, new_run: bool) -> Result<PathBuf, ObserveError> {
    const PREFIX: &str = "events.out.tfevents.";
    let mut second = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    for entry in fs::read_dir(dir).map_err(ObserveError::read(dir))? {
        let entry = entry.map_err(ObserveError::read(dir))?;
        let name = entry.file_name();
        let mut parts = name.to_str().and_then(|name| name.strip_prefix(PREFIX)).unwrap_or("").split('.');
        let Some(earlier) = parts.next().and_then(|digits| digits.parse::<u64>().ok()) else { continue };
        if new_run && parts.next() == Some("firebox") {
            fs::remove_file(entry.path()).map_err(ObserveError::write(&entry.path()))?;
        } else {
            second = second.max(earlier.saturating_add(1));
        }
    }
    // The host's name is only there to tell machines apart that write into one folder; the process's number does that
    // too, and is nobody's secret when the folder is shared.
    Ok(dir.join(format!("{PREFIX}{second:010}.firebox.{}", std::process::id())))
}

/// What an event can say.
enum Content<'a> {
    FileVersion,
    Restart,
    Scalars(&'a [(&'a str, f64)]),
    Text(&'a str, &'a str),
}

/// The message `Event`: wall_time = 1, step = 2, file_version = 3, summary = 5, session_log = 7.
fn event(wall_time: f64, step: u64, content: &Content<'_>) -> Vec<u8> {
    let mut event = Message::default();
    event.double(1, wall_time);
    event.varint(2, step);
    match content {
        Content::FileVersion => event.bytes(3, b"brain.Event:2"),
        Content::Restart => {
            let mut log = Message::default();
            log.varint(1, 1); // status = START
            event.message(7, &log);
        }
        Content::Scalars(scalars) => {
            let mut summary = Message::default();
            for (tag, number) in *scalars {
                let mut value = Message::default();
                value.bytes(1, tag.as_bytes());
                value.float(2, *number as f32); // simple_value
                summary.message(1, &value);
            }
            event.message(5, &summary);
        }
        Content::Text(tag, text) => {
            let mut summary = Message::default();
            summary.message(1, &text_value(tag, text));
            event.message(5, &summary);
        }
    }
    event.0
}

/// `Summary.Value` for the text plugin: tag = 1, tensor = 8, metadata = 9.
fn text_value(tag: &str, text: &str) -> Message {
    // The plugin renders Markdown; four blanks make a line code, shown as it stands.
    let code: String = text.lines().flat_map(|line| ["    ", line, "\n"]).collect();
    let mut dim = Message::default();
    dim.varint(1, 1); // size
    let mut shape = Message::default();
    shape.message(2, &dim);
    let mut tensor = Message::default();
    tensor.varint(1, 7); // dtype = DT_STRING
    tensor.message(2, &shape);
    tensor.bytes(8, code.as_bytes()); // string_val
    let mut plugin = Message::default();
    plugin.bytes(1, b"text"); // plugin_name
    let mut metadata = Message::default();
    metadata.message(1, &plugin);
    metadata.varint(4, 2); // data_class = DATA_CLASS_TENSOR
    let mut value = Message::default();
    value.bytes(1, tag.as_bytes());
    value.message(8, &tensor);
    value.message(9, &metadata);
    value
}

/// A protobuf message under construction (<https://protobuf.dev/programming-guides/encoding/>).
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn raw_varint(&mut self, mut n: u64) {
        while n >= 0x80 {
            self.0.push(n as u8 | 0x80);
            n >>= 7;
        }
        self.0.push(n as u8);
    }

    /// Field number and wire type: 0 varint, 1 eight bytes, 2 counted bytes, 5 four bytes.
    fn key(&mut self, field: u64, wire_type: u64) {
        self.raw_varint(field << 3 | wire_type);
    }

    fn varint(&mut self, field: u64, n: u64) {
        self.key(field, 0);
        self.raw_varint(n);
    }

    fn double(&mut self, field: u64, x: f64) {
        self.key(field, 1);
        self.0.extend(x.to_le_bytes());
    }

    fn float(&mut self, field: u64, x: f32) {
        self.key(field, 5);
        self.0.extend(x.to_le_bytes());
    }

    fn bytes(&mut self, field: u64, bytes: &[u8]) {
        self.key(field, 2);
        self.raw_varint(bytes.len() as u64);
        self.0.extend(bytes);
    }

    fn message(&mut self, field: u64, message: &Message) {
        self.bytes(field, &message.0);
    }
}

/// A message with TFRecord's framing.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut out = Vec::with_capacity(data.len() + 16);
    out.extend(length);
    out.extend(masked_crc(&length).to_le_bytes());
    out.extend(data);
    out.extend(masked_crc(data).to_le_bytes());
    out
}

/// CRC-32C, rotated and shifted, as TFRecord wants it so that a checksum over data with checksums stays strong.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}
