//! `firebox chat`: a conversation in the terminal.

use std::io::{BufRead, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, Ordering};

use clap::Args;
use firebox::train::chat::{End, Session};

use super::text::{SamplingArgs, Stream};
use super::{CliError, DeviceArgs};

/// Talk with a model. Ctrl-C ends an answer; at the prompt it ends the conversation, as Ctrl-D does. /reset forgets what was said.
///
/// Where the input is no terminal, each line of it is a message, and the answers are all that is written.
///
/// Examples:
///   firebox chat smollm2
///   firebox chat runs/tuned --system 'Answer in one sentence.' --temperature 0
///   printf 'What is steam?\nAnd ice?\n' | firebox chat smollm2
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub struct ChatArgs {
    /// Run, checkpoint, folder with Hugging Face's config.json and model.safetensors, or .gguf file.
    checkpoint: PathBuf,
    #[command(flatten)]
    device: DeviceArgs,
    /// What the model is told before the conversation.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Tokens of an answer at most.
    #[arg(long, default_value_t = 1024, value_parser = at_least_one)]
    max_tokens: usize,
    #[command(flatten)]
    sampling: SamplingArgs,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| *n > 0).ok_or_else(|| "expected a number of at least 1".to_owned())
}

const HELP: &str = "/reset forgets what was said, /exit or Ctrl-D ends the conversation, Ctrl-C ends an answer";

pub fn run(args: ChatArgs) -> Result<(), CliError> {
    let sampling = args.sampling.sampling();
    sampling.validate()?;
    let mut session = Session::load(&args.checkpoint, args.system, &args.device.backend.device()?)?;
    if session.without_template() {
        eprintln!("{} has no chat template: ChatML takes its place", args.checkpoint.display());
    }
    let terminal = std::io::stdin().is_terminal();
    if terminal {
        eprintln!("{HELP}");
        end_upon_ctrl_c();
    }
    let mut input = std::io::stdin().lock();
    let mut line = vec![];
    loop {
        if terminal {
            print!("> ");
            std::io::stdout().flush().map_err(CliError::Output)?;
        }
        line.clear();
        STATE.store(ASKING, Ordering::SeqCst);
        if input.read_until(b'\n', &mut line).map_err(CliError::Output)? == 0 {
            if terminal {
                println!();
            }
            return Ok(());
        }
        let text = String::from_utf8_lossy(&line);
        match text.trim() {
            "" => continue,
            "/exit" => return Ok(()),
            "/help" => eprintln!("{HELP}"),
            "/reset" => session.reset(),
            message => {
                let mut out = Stream::new(std::io::stdout().lock());
                STATE.store(ANSWERING, Ordering::SeqCst);
                let said = session.answer(message, args.max_tokens, &sampling, |text| {
                    STATE.load(Ordering::SeqCst) == ANSWERING && out.push(text)
                });
                match said {
                    Ok(turn) => {
                        out.finish().map_err(CliError::Output)?;
                        if turn.forgotten > 0 {
                            let what = if turn.forgotten == 1 { "question was" } else { "questions were" };
                            eprintln!("(the context is full: {} earlier {what} forgotten)", turn.forgotten);
                        }
                        if turn.end == End::Full {
                            eprintln!("(the answer was cut after {} tokens)", turn.tokens);
                        }
                    }
                    // Another message may do.
                    Err(error) if terminal && error.is_input() => eprintln!("error: {error}"),
                    Err(error) => return Err(error.into()),
                }
            }
        }
    }
}

/// What Ctrl-C finds.
static STATE: AtomicU8 = AtomicU8::new(ASKING);
const ASKING: u8 = 0;
const ANSWERING: u8 = 1;
const ENOUGH: u8 = 2;

/// Ctrl-C ends an answer, and at the prompt the program: what waits for a line there would not hear of it.
fn end_upon_ctrl_c() {
    let installed = ctrlc::set_handler(|| {
        if STATE.compare_exchange(ANSWERING, ENOUGH, Ordering::SeqCst, Ordering::SeqCst) == Err(ASKING) {
            println!();
            std::process::exit(0);
        }
    });
    if let Err(error) = installed {
        eprintln!("warning: Ctrl-C will end the conversation: {error}");
    }
}
