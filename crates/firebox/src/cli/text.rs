//! `firebox generate` and `logits`: what a checkpoint can do.

use std::collections::HashMap;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use clap::Args;
use firebox::data::Tokenizer;
use firebox::models::TokenBatch;
use firebox::train::generate::{Sampling, check_ids, generate as continue_text};
use firebox::train::model_io::{Loaded, load, to_host};
use firebox::train::{TrainError, prompt_ids};

use super::{CliError, DeviceArgs};

/// A model to use.
#[derive(Args)]
pub struct ModelArgs {
    /// Run, checkpoint, folder with Hugging Face's config.json and model.safetensors, or .gguf file.
    checkpoint: PathBuf,
    #[command(flatten)]
    device: DeviceArgs,
}

impl ModelArgs {
    fn load(&self) -> Result<Loaded, CliError> {
        Ok(load(&self.checkpoint, &self.device()?)?)
    }

    pub fn path(&self) -> &Path {
        &self.checkpoint
    }

    pub fn device(&self) -> Result<Device, CliError> {
        Ok(self.device.backend.device()?)
    }

    pub fn load_with_tokenizer(&self) -> Result<(firebox::models::transformer::Transformer, Tokenizer), CliError> {
        let Loaded { model, tokenizer } = self.load()?;
        match tokenizer {
            Some(tokenizer) => Ok((model, tokenizer)),
            None => {
                let expected = "a tokenizer.json beside the model".into();
                let got = format!("none in {}", self.checkpoint.display());
                Err(TrainError::Input { what: "checkpoint", expected, got }.into())
            }
        }
    }
}

#[derive(Args)]
pub struct GenerateArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Start of the text.
    #[arg(long, default_value = "")]
    prompt: String,
    /// Tokens to write at most.
    #[arg(long, default_value_t = 256)]
    max_tokens: usize,
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// How the next token is chosen.
#[derive(Args)]
pub struct SamplingArgs {
    /// 0 takes the most likely token each time.
    #[arg(long, default_value_t = 0.8)]
    temperature: f64,
    /// Choose among the so many most likely tokens; 0: all.
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Choose among the most likely tokens that together have this probability.
    #[arg(long, default_value_t = 0.95)]
    top_p: f64,
    /// Above 1: makes tokens that occurred less likely.
    #[arg(long, default_value_t = 1.0)]
    repetition_penalty: f64,
    /// The same seed gives the same text.
    #[arg(long, default_value_t = 1337)]
    seed: u64,
}

impl SamplingArgs {
    pub fn sampling(&self) -> Sampling {
        let &Self { temperature, top_k, top_p, repetition_penalty, seed } = self;
        Sampling { temperature, top_k, top_p, repetition_penalty, seed }
    }
}

pub fn generate(args: GenerateArgs) -> Result<(), CliError> {
    let (model, tokenizer) = args.model.load_with_tokenizer()?;
    let sampling = args.sampling.sampling();
    let prompt = prompt_ids(&tokenizer, args.prompt.as_bytes())?;
    let mut out = Stream::new(std::io::stdout().lock());
    out.push(args.prompt.as_bytes());
    let stop = tokenizer.eot().map(|id| id as i32);
    continue_text(&model, &prompt, args.max_tokens, &sampling, stop, |id| out.push(&tokenizer.decode(&[id as u32])))?;
    out.finish().map_err(CliError::Output)
}

/// Writes bytes as they come, but never half a character.
pub struct Stream<W: Write + IsTerminal> {
    out: W,
    pending: Vec<u8>,
    error: Option<std::io::Error>,
}

impl<W: Write + IsTerminal> Stream<W> {
    pub fn new(out: W) -> Self {
        Self { out, pending: vec![], error: None }
    }

    /// False once it cannot be written.
    pub fn push(&mut self, bytes: &[u8]) -> bool {
        self.pending.extend_from_slice(bytes);
        let whole = match std::str::from_utf8(&self.pending) {
            Ok(text) => text.len(),
            // An error without a length is a character that is not complete yet.
            Err(e) if e.error_len().is_none() => e.valid_up_to(),
            Err(_) => self.pending.len(),
        };
        let ready: Vec<u8> = self.pending.drain(..whole).collect();
        let text = String::from_utf8_lossy(&ready);
        let result = self.out.write_all(self.safe(&text).as_bytes()).and_then(|()| self.out.flush());
        self.error = result.err();
        self.error.is_none()
    }

    /// Control characters of a model's text must not reach a terminal.
    fn safe(&self, text: &str) -> String {
        if !self.out.is_terminal() {
            return text.into();
        }
        text.chars().map(|c| if c.is_control() && !matches!(c, '\n' | '\t') { '\u{fffd}' } else { c }).collect()
    }

    /// A half character at the end, and a line break.
    pub fn finish(mut self) -> std::io::Result<()> {
        if let Some(error) = self.error.take() {
            return Err(error);
        }
        self.out.write_all(String::from_utf8_lossy(&self.pending).as_bytes())?;
        self.out.write_all(b"\n")
    }
}

#[derive(Args)]
pub struct LogitsArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Token ids, separated by commas.
    #[arg(long, value_delimiter = ',', required = true)]
    ids: Vec<i32>,
    /// The safetensors file to write.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

pub fn logits(args: LogitsArgs) -> Result<(), CliError> {
    let model = args.model.load()?.model;
    check_ids(&model, &args.ids)?;
    let (n, context) = (args.ids.len(), model.config().context);
    if n > context {
        let expected = format!("at most the context of {context} tokens");
        return Err(TrainError::Input { what: "--ids", expected, got: n.to_string() }.into());
    }
    let v = model.config().vocab_size;
    let batch = TokenBatch::plain(1, n, args.ids, vec![-100; n]);
    let values = to_host(model.logits(&batch));
    write_tensor(&args.out, &values, vec![n, v])?;
    println!("{}: logits [{n}, {v}]", args.out.display());
    Ok(())
}

fn write_tensor(path: &Path, values: &[f32], shape: Vec<usize>) -> Result<(), CliError> {
    let io = |operation| move |source| TrainError::Io { operation, path: path.into(), source };
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let invalid = |e: safetensors::SafeTensorError| std::io::Error::other(e.to_string());
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape, &bytes)
        .map_err(invalid)
        .map_err(io("write"))?;
    let file = safetensors::serialize(HashMap::from([("logits".to_string(), view)]), None)
        .map_err(invalid)
        .map_err(io("write"))?;
    let aside = path.with_extension("tmp");
    std::fs::write(&aside, file).and_then(|()| std::fs::rename(&aside, path)).map_err(io("write"))?;
    Ok(())
}
