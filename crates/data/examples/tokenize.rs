//! Tokenizes text and tells what it took: `cargo run --release -p firebox-data --example tokenize -- PATH...`
//!
//! Options: `--cache DIR` (default: a folder in the system's temporary one), `--tokenizer bpe|char|FILE`, `--vocab N`,
//! `--near` (drop near duplicates).

use firebox_data::{DataConfig, Progress, Source, prepare};
use std::time::Instant;

fn main() {
    if let Err(error) = run() {
        eprintln!("error: {error}");
        std::process::exit(2);
    }
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    let mut config = DataConfig { vocab_size: 8192, ..DataConfig::default() };
    let mut cache = std::env::temp_dir().join("firebox-tokenize");
    let mut paths = Vec::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or_else(|| format!("{argument} needs a value"));
        match argument.as_str() {
            "--cache" => cache = value()?.into(),
            "--tokenizer" => config.tokenizer = value()?,
            "--vocab" => config.vocab_size = value()?.parse()?,
            "--near" => config.near_dedup = Some(0.8),
            _ => paths.push(argument),
        }
    }
    let mut phases: Vec<(&str, Instant)> = Vec::new();
    let mut phase = |name| {
        if phases.last().is_none_or(|(last, _)| *last != name) {
            phases.push((name, Instant::now()));
        }
    };
    phase("list files");
    let data = prepare(&config, &[Source::new(paths)], &cache, &mut |progress| match progress {
        Progress::Hashing { .. } => phase("hash"),
        Progress::Cached => phase("open the cache"),
        Progress::Torn { .. } => phase("clear the torn cache"),
        Progress::Scanning { .. } => phase("scan"),
        Progress::TrainingTokenizer { .. } => phase("train the tokenizer"),
        Progress::Tokenizing { .. } => phase("tokenize"),
        _ => {}
    })?;
    phase("end");
    println!("{}", data.stats);
    let megabytes = data.stats.bytes as f64 / 1e6;
    for pair in phases.windows(2) {
        let seconds = (pair[1].1 - pair[0].1).as_secs_f64();
        println!("{:>20} {seconds:8.2} s {:8.1} MB/s", pair[0].0, megabytes / seconds);
    }
    println!(
        "{:.3} bytes per token, cache in {}",
        data.stats.train_bytes as f64 / data.stats.train_tokens as f64,
        data.dir.display()
    );
    match std::fs::read_to_string("/proc/self/status") {
        Ok(status) => status.lines().filter(|l| l.starts_with("VmHWM")).for_each(|l| println!("{l}")),
        Err(_) => println!("peak memory: not known on this system"),
    }
    Ok(())
}
