//! `bench compress`: what compressed models cost and how fast they are.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use firebox_compress::quantize::{Ranges, nearest};
use firebox_compress::{Matrix, ScalarFormat};
use firebox_models::transformer::packed::{matrix_shape, to_matrix};
use firebox_models::transformer::{Transformer, TransformerConfig, hf::Family, presets};
use firebox_tensor::device::Backend;
use firebox_train::TrainError;
use firebox_train::generate::{Sampling, generate};
use firebox_train::model_io::{load, parameters, to_host};
use firebox_train::observe::memory;
use firebox_train::quantized::{Weights, save};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::machine::Machine;
use crate::stats::{Spread, bytes, number, times};
use crate::table::Table;

/// Name, format of the linear layers, format of embedding and head.
const VARIANTS: [(&str, &str, &str); 4] = [
    ("f32", "", ""),
    ("int8", "int8-channel", "int8-channel"),
    ("int4", "int4", "int8-channel"),
    ("nf4", "nf4", "int8-channel"),
];

/// Tokens before the clock starts, and timed ones.
const WARM: usize = 8;

/// What one process measured.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Measured {
    tokens_per_s: f64,
    /// Resident after the last token.
    rss_bytes: u64,
    /// The most that was resident, loading included.
    peak_bytes: u64,
}

/// One way to store the model.
#[derive(Serialize)]
struct Row {
    name: String,
    file_bytes: u64,
    tokens_per_s: Spread,
    /// Per round, over that of f32.
    ratio: Spread,
    rss_bytes: u64,
    peak_bytes: u64,
}

/// The results.
#[derive(Serialize)]
pub struct Report {
    model: String,
    params: usize,
    /// What measured.
    pub machine: Machine,
    /// Compute threads of each process.
    pub threads: usize,
    rounds: usize,
    rows: Vec<Row>,
}

/// Tokens per second of greedy generation, one sequence, from the same random model in f32 and quantized: a process each, in turns.
///
/// # Errors
/// [`Error`]: models that cannot be written, or a process that dies.
pub fn speed(own: &Path, folder: &Path, threads: usize, rounds: usize, quick: bool) -> Result<Report> {
    let name = "gpt2";
    // PANIC: a preset of this name is built in.
    let preset = presets::named(name).expect("the preset gpt2");
    let config = match quick {
        true => TransformerConfig {
            vocab_size: 512,
            d_model: 128,
            n_heads: 4,
            n_kv_heads: 4,
            head_dim: 32,
            d_ff: 256,
            n_layers: 2,
            context: 128,
            ..preset
        },
        false => TransformerConfig { context: 256, ..preset },
    };
    make(&config, folder)?;
    let tokens = if quick { 16 } else { 100 };
    let mut measured: Vec<Vec<Measured>> = vec![vec![]; VARIANTS.len()];
    for round in 0..rounds {
        for ((name, ..), measured) in VARIANTS.iter().zip(&mut measured) {
            let one = child(own, &folder.join(name), threads, tokens)?;
            eprintln!(
                "    round {}: {name} {} tokens/s, {}",
                round + 1,
                number(one.tokens_per_s),
                bytes(one.rss_bytes)
            );
            measured.push(one);
        }
    }
    let rows = VARIANTS.iter().zip(&measured).map(|((name, ..), of)| {
        let path = folder.join(name).join("model.safetensors");
        Ok(Row {
            name: (*name).to_owned(),
            file_bytes: std::fs::metadata(&path).map_err(Error::io("read", &path))?.len(),
            tokens_per_s: Spread::of(of.iter().map(|m| m.tokens_per_s)),
            ratio: Spread::of(of.iter().zip(&measured[0]).map(|(m, full)| m.tokens_per_s / full.tokens_per_s)),
            rss_bytes: of.iter().map(|m| m.rss_bytes).max().unwrap_or(0),
            peak_bytes: of.iter().map(|m| m.peak_bytes).max().unwrap_or(0),
        })
    });
    let rows = rows.collect::<Result<Vec<_>>>()?;
    Ok(Report { model: name.into(), params: config.num_params(), machine: Machine::here(), threads, rounds, rows })
}

impl Report {
    /// The table, in Markdown.
    pub fn markdown(&self) -> String {
        let mut table = Table::new(["", "tokens/s", "of f32", "file", "resident", "peak"]);
        for row in &self.rows {
            table.row([
                row.name.clone(),
                number(row.tokens_per_s.median),
                times(row.ratio.median),
                bytes(row.file_bytes),
                bytes(row.rss_bytes),
                bytes(row.peak_bytes),
            ]);
        }
        format!(
            "{} with random weights, {} parameters: greedy generation of one sequence on {} threads, medians of {} rounds in turns. The quantized models have \
             embedding and head in int8.\n\n{table}",
            self.model, self.params, self.threads, self.rounds
        )
    }
}

/// Writes the model in every variant that is not there.
fn make(config: &TransformerConfig, folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    if VARIANTS.iter().all(|(name, ..)| folder.join(name).is_dir()) {
        return Ok(());
    }
    let model = Transformer::new(config, 1337, &Backend::NdArray.device()?)?;
    let values: BTreeMap<String, _> = parameters(&model).into_iter().collect();
    drop(model);
    let entries = Family::of(config).entries(config);
    for (name, linear, table) in VARIANTS {
        let dir = folder.join(name);
        if dir.is_dir() {
            continue;
        }
        eprintln!("    writing {}", dir.display());
        let format = |param: &str| match param {
            _ if linear.is_empty() => None,
            "embed.weight" | "head.weight" => Some(table),
            _ if param.starts_with("blocks.") => Some(linear),
            _ => None,
        };
        let parsed = entries.iter().filter(|entry| entry.shape.len() > 1).filter_map(|entry| {
            let format = format(&entry.param)?.parse::<ScalarFormat>().map_err(TrainError::from);
            Some(format.map(|format| (entry.param.clone(), format)))
        });
        let formats = parsed.collect::<std::result::Result<BTreeMap<_, _>, _>>().map_err(Box::new)?;
        let weights = |param: &str| {
            let full = to_host(values[param].clone());
            let Some(&format) = formats.get(param) else { return Ok(Weights::Full(full)) };
            let shape = entries.iter().find(|entry| entry.param == param).map_or(&[][..], |entry| &entry.shape);
            let [rows, cols] = matrix_shape(param, shape).unwrap_or_default();
            let matrix = Matrix::new(rows, cols, to_matrix(param, shape, full))?;
            Ok(Weights::Quantized(nearest(&matrix, format, Ranges::Absmax)?))
        };
        save(&dir, config, &formats, None, weights).map_err(Box::new)?;
    }
    Ok(())
}

fn child(own: &Path, model: &Path, threads: usize, tokens: usize) -> Result<Measured> {
    let mut command = Command::new(own);
    command.arg("speed-of").arg(model).args([threads.to_string(), tokens.to_string()]);
    let spawn = |source| Error::Spawn {
        what: "this program".into(),
        program: own.to_owned(),
        source,
        advice: "build it again",
    };
    let output = command.output().map_err(spawn)?;
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(text.trim()).map_err(|_| Error::Protocol {
        expected: "a measurement",
        got: format!("{}{}", text.trim(), String::from_utf8_lossy(&output.stderr).trim()),
    })
}

/// The process that generates from the model in `dir`, and prints what it measured.
///
/// # Errors
/// A model that cannot be opened.
pub fn speed_of(dir: &Path, threads: usize, tokens: usize) -> Result<()> {
    firebox_tensor::threads::init(threads)?;
    let model = load(dir, &Backend::NdArray.device()?).map_err(Box::new)?.model;
    let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
    let mut seen = 0;
    let mut started = Instant::now();
    let count = |_| {
        seen += 1;
        if seen == WARM {
            started = Instant::now();
        }
        true
    };
    generate(&model, &[1, 2, 3, 4], WARM + tokens, &greedy, None, count).map_err(Box::new)?;
    let measured = Measured {
        tokens_per_s: tokens as f64 / started.elapsed().as_secs_f64(),
        rss_bytes: memory::current_bytes(),
        peak_bytes: memory::peak_bytes(),
    };
    let json = serde_json::to_string(&measured).map_err(|source| Error::Json { what: "a measurement", source })?;
    println!("{json}");
    Ok(())
}
