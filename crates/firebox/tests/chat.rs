//! Chat tuning, preference tuning and `firebox chat`, as their users call them.
#![allow(clippy::unwrap_used)]

mod common;

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::Stdio;

use common::{Ended, Lab};
use firebox::data::Tokenizer;

/// A lab with rows and a tokenizer of ASCII.
fn lab() -> Lab {
    let lab = Lab::new(1);
    let text: String = (' '..='~').chain(['\n']).collect();
    Tokenizer::from_chars_of(text.as_bytes()).unwrap().save(lab.path("tokenizer.json")).unwrap();
    let (mut chats, mut pairs) = (String::new(), String::new());
    for i in 0..40u64 {
        let (a, b) = (i % 5, i % 4);
        writeln!(
            chats,
            r#"{{"messages": [{{"role": "user", "content": "{a}+{b}"}}, {{"role": "assistant", "content": "{}"}}]}}"#,
            a + b
        )
        .unwrap();
        writeln!(pairs, r#"{{"prompt": "{a}+{b}", "chosen": "{}", "rejected": "no"}}"#, a + b).unwrap();
    }
    lab.write("chat.jsonl", chats);
    lab.write("pairs.jsonl", pairs);
    lab.write("chat.toml", RECIPE);
    lab
}

const RECIPE: &str = r#"
name = "chat"
[model]
d_model = 32
n_layers = 1
n_heads = 4
n_kv_heads = 2
d_ff = 48
context = 4096
[task]
kind = "chat"
[data]
tokenizer = "tokenizer.json"
val_fraction = 0.1
[optimizer]
lr = 1e-2
[train]
steps = 30
batch_rows = 2
row_tokens = 160
log_every = 1
[eval]
every = 10
sample_tokens = 8
[checkpoint]
every = 10
"#;

fn train(lab: &Lab, out: &str, data: &str, args: &[&str]) -> Ended {
    let start = ["train", "chat.toml", "--data", data, "--out", out];
    lab.call(&[&start[..], args].concat())
}

/// What chat says to lines of input.
fn chat(lab: &Lab, args: &[&str], input: &str) -> Ended {
    let mut command = lab.firebox(&[&["chat"], args].concat());
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    Ended::new(child.wait_with_output().unwrap(), format!("chat {args:?}"))
}

#[test]
fn a_run_learns_answers_and_chats() {
    let lab = lab();
    let first = train(&lab, "run", "chat.jsonl", &[]).succeeded();
    assert!(first.stdout.contains("36 conversations in") && first.stdout.contains("4 held out"), "{}", first.stdout);
    let run = lab.run("run");
    let losses = run.series("val_loss");
    assert!(losses.last().unwrap().1 < losses[0].1, "{losses:?}");
    let sample = std::fs::read_to_string(lab.path("run/samples/step-30.txt")).unwrap();
    assert!(sample.contains('+'), "a held-out question and its answer: {sample}");
    let template = std::fs::read_to_string(lab.path("run/checkpoints/step-30/chat_template.jinja")).unwrap();
    assert!(template.contains("<|im_start|>"), "{template}");

    // Two lines are two answers; the template's end of a turn is not among them. The same question in another conversation has the same answer.
    let greedy = ["run", "--temperature", "0", "--max-tokens", "12"];
    let said = chat(&lab, &greedy, "1+2\n/reset\n\n1+2\n").succeeded();
    let lines: Vec<&str> = said.stdout.lines().collect();
    assert!(lines.len() == 2 && lines[0] == lines[1], "{said:?}");
    assert!(!said.stdout.contains("<|im_end|>"), "{said:?}");
    let system = chat(&lab, &[&greedy[..], &["--system", "Add."]].concat(), "1+2\n").succeeded();
    assert_eq!(system.stdout.lines().count(), 1);
    chat(&lab, &["absent"], "").failed(2, &["absent"]);
    chat(&lab, &["run", "--temperature=-1"], "").failed(2, &["temperature"]);
    chat(&lab, &["run", "--max-tokens", "0"], "").code.filter(|code| *code == 2).unwrap();
    chat(&lab, &["run"], &"x".repeat(5000)).failed(2, &["message", "4096"]);

    // A run that starts from this one keeps its template; it is resumed to the same bits.
    let tune = |out: &str, more: &[&str]| {
        let start = ["finetune", "--from", "run", "--task", "chat", "--data", "chat.jsonl", "--out", out];
        let set = [
            "--set",
            "train.batch_rows=2",
            "--set",
            "train.row_tokens=160",
            "--set",
            "checkpoint.every=2",
            "--set",
            "train.log_every=1",
        ];
        lab.call(&[&start[..], &set[..], more].concat()).succeeded();
        lab.run(out)
    };
    let whole = tune("whole", &["--set", "train.steps=4", "--set", "schedule={ kind = \"constant\" }"]);
    let schedule = ["--set", "schedule={ kind = \"constant\" }"];
    tune("half", &[&["--set", "train.steps=2"][..], &schedule].concat());
    let again = ["train", "--resume", "--data", "chat.jsonl", "--out", "half", "--set", "train.steps=4"];
    lab.call(&again).succeeded();
    for file in ["model.safetensors", "optimizer/adamw.safetensors", "chat_template.jinja"] {
        let [a, b] =
            ["whole", "half"].map(|run| std::fs::read(lab.path(&format!("{run}/checkpoints/step-4/{file}"))).unwrap());
        assert!(a == b, "{file} differs");
    }
    assert_eq!(whole.saved(), [2, 4]);
    lab.call(&["export", "whole", "--format", "hf", "--out", "exported"]).succeeded();
    assert!(lab.path("exported/chat_template.jinja").is_file());
}

#[test]
fn preferences_have_a_reference_in_the_folder() {
    let lab = lab();
    let task = ["--set", "task={ kind = 'preference', beta = 0.5 }"];
    train(&lab, "run", "pairs.jsonl", &task).succeeded();
    let summary = lab.run("run").json("summary.json");
    assert!(summary["metrics"]["accuracy"].as_f64().unwrap() > 0.9, "{summary}");
    assert!(summary["val_loss"].as_f64().unwrap() < 0.6, "{summary}");
    let resumed = ["train", "--resume", "--out", "run", "--set", "train.steps=32", "--data"];
    lab.call(&[&resumed[..], &["pairs.jsonl"]].concat()).succeeded();
    // Other answers are not what the reference is of.
    lab.write("other.jsonl", "{\"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"c\"}\n".repeat(40));
    lab.call(&[&resumed[..], &["other.jsonl"]].concat()).failed(2, &["reference.json", "--out"]);
    lab.write("run/reference.json", "{");
    lab.call(&[&resumed[..], &["pairs.jsonl"]].concat()).failed(2, &["reference.json", "remove"]);
}

#[test]
fn bad_rows_and_templates() {
    let lab = lab();
    lab.write("empty.jsonl", "");
    lab.write("text.txt", "text");
    lab.write("text.jsonl", "{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"text\": \"x\"}\n");
    lab.write("role.jsonl", "{\"messages\": [{\"role\": \"gpt\", \"content\": \"x\"}]}\n");
    lab.write("ask.jsonl", "{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}]}\n");
    lab.write("long.jsonl", format!("{{\"prompt\": \"{}\", \"completion\": \"b\"}}\n", "x".repeat(300)));
    lab.write("umlaut.jsonl", "{\"prompt\": \"ü\", \"completion\": \"b\"}\n");
    lab.write("error.jinja", "{{ raise_exception('roles must alternate') }}");
    lab.write("torn.jinja", "{% for m in messages %}");
    lab.write("vague.jinja", "{% for m in messages %}{{ loop.last }}{{ m.content }}{% endfor %}");
    let cases: [(&str, &str, &[&str]); 17] = [
        ("empty.jsonl", "", &["empty.jsonl", "no row"]),
        ("text.txt", "", &["text.txt", ".jsonl"]),
        ("absent.jsonl", "", &["absent.jsonl"]),
        ("text.jsonl", "", &["text.jsonl:2:", "messages", "completion"]),
        ("role.jsonl", "", &["role.jsonl:1:", "gpt", "assistant"]),
        ("ask.jsonl", "", &["ask.jsonl:1:", "assistant"]),
        ("long.jsonl", "", &["train.row_tokens = 160", "long.jsonl"]),
        ("umlaut.jsonl", "task.template=none", &["umlaut.jsonl:1:", "character"]),
        ("chat.jsonl", "task.template=none", &["chat.jsonl:1:", "template"]),
        ("chat.jsonl", "task.template=absent.jinja", &["absent.jinja"]),
        ("chat.jsonl", "task.template=error.jinja", &["error.jinja", "roles must alternate"]),
        ("chat.jsonl", "task.template=torn.jinja", &["torn.jinja", "line 1"]),
        ("chat.jsonl", "task.template=vague.jinja", &["vague.jinja", "task.train_on"]),
        ("chat.jsonl", "task.train_on=questions", &["questions", "answers"]),
        ("chat.jsonl", "task.pakking=true", &["pakking", "packing"]),
        ("chat.jsonl", "data.tokenizer=bpe", &["data.tokenizer", "tokenizer.json"]),
        ("chat.jsonl", "task.kind=chatt", &["chatt", "chat"]),
    ];
    for (data, set, words) in cases {
        let set: Vec<&str> = if set.is_empty() { vec![] } else { vec!["--set", set] };
        train(&lab, "none", data, &set).failed(2, words);
    }
    lab.write("same.jsonl", "{\"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"b\"}\n");
    for (data, set, words) in [
        ("chat.jsonl", "", &["chat.jsonl:1:", "chosen"][..]),
        ("same.jsonl", "", &["same.jsonl:1:", "the same"]),
        ("pairs.jsonl", "task.beta=0", &["task.beta", "above 0"]),
        ("pairs.jsonl", "task.label_smoothing=0.7", &["task.label_smoothing", "0.5"]),
        ("pairs.jsonl", "train.z_loss=1e-4", &["train.z_loss"]),
    ] {
        let mut args = vec!["--set", "task={ kind = 'preference' }"];
        if !set.is_empty() {
            args.extend(["--set", set]);
        }
        train(&lab, "none", data, &args).failed(2, words);
    }
    assert!(!lab.path("none").exists(), "nothing was started");
}

/// In a terminal of its own: what it shows, and what is typed.
#[cfg(target_os = "linux")]
mod terminal {
    use std::fs::File;
    use std::io::{Read as _, Write as _};
    use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
    use std::os::unix::process::CommandExt as _;
    use std::process::{Child, Command};
    use std::sync::mpsc::{Receiver, channel};
    use std::time::{Duration, Instant};

    pub struct Terminal {
        child: Child,
        keys: File,
        shown: Receiver<Vec<u8>>,
        pub text: String,
    }

    impl Terminal {
        pub fn new(mut command: Command) -> Self {
            let (mut ours, mut theirs) = (0, 0);
            let none = std::ptr::null_mut();
            // SAFETY: it writes two descriptors, which are then owned by nobody else.
            let done = unsafe { libc::openpty(&mut ours, &mut theirs, none, none.cast(), none.cast()) };
            assert_eq!(done, 0, "openpty");
            // SAFETY: as above.
            let (keys, theirs) = unsafe { (File::from_raw_fd(ours), OwnedFd::from_raw_fd(theirs)) };
            for set in [Command::stdin, Command::stdout, Command::stderr] {
                set(&mut command, theirs.try_clone().unwrap());
            }
            let terminal = theirs.as_raw_fd();
            // SAFETY: both calls are safe between fork and exec; the descriptor is open until the child has it.
            unsafe {
                command.pre_exec(move || {
                    libc::setsid();
                    libc::ioctl(terminal, libc::TIOCSCTTY, 0);
                    Ok(())
                })
            };
            let child = command.spawn().unwrap();
            drop((command, theirs));
            let (send, shown) = channel();
            let mut screen = keys.try_clone().unwrap();
            std::thread::spawn(move || {
                let mut buffer = [0; 4096];
                // It ends with an error when the program is gone.
                while let Ok(n) = screen.read(&mut buffer) {
                    if n == 0 || send.send(buffer[..n].to_vec()).is_err() {
                        break;
                    }
                }
            });
            Self { child, keys, shown, text: String::new() }
        }

        pub fn press(&mut self, keys: &[u8]) {
            self.keys.write_all(keys).unwrap();
        }

        /// Waits until what is shown from now on is enough; all of it.
        #[track_caller]
        pub fn until(&mut self, enough: impl Fn(&str) -> bool) -> String {
            let start = Instant::now();
            self.text.clear();
            while !enough(&self.text) {
                assert!(start.elapsed() < Duration::from_secs(120), "waited for it in: {}", self.text);
                if let Ok(bytes) = self.shown.recv_timeout(Duration::from_millis(50)) {
                    self.text.push_str(&String::from_utf8_lossy(&bytes));
                }
            }
            self.text.clone()
        }

        pub fn end(mut self) -> Option<i32> {
            self.child.wait().unwrap().code()
        }
    }
}

#[cfg(target_os = "linux")]
#[test]
fn ctrl_c_ends_an_answer_and_at_the_prompt_the_conversation() {
    let lab = lab();
    // A model that has learned nothing does not end its answers.
    train(
        &lab,
        "run",
        "chat.jsonl",
        &["--set", "train.steps=1", "--set", "optimizer.lr=1e-9", "--set", "schedule={ kind = 'constant' }"],
    )
    .succeeded();
    let start = || terminal::Terminal::new(lab.firebox(&["chat", "run", "--max-tokens", "3900"]));
    let mut shown = start();
    let begin = shown.until(|text| text.ends_with("> "));
    assert!(begin.contains("Ctrl-C"), "{begin}");
    shown.press(b"tell me a story\n");
    shown.until(|text| text.len() > 100);
    shown.press(b"\x03");
    let answer = shown.until(|text| text.ends_with("\n> "));
    assert!(answer.len() < 3500, "the answer was ended: {} bytes", answer.len());
    let control = |c: char| c.is_control() && !matches!(c, '\n' | '\r' | '\t');
    assert!(!answer.contains(control), "{answer:?}");
    // The conversation goes on.
    shown.press(b"and another\n");
    shown.until(|text| text.len() > 100);
    shown.press(b"\x03");
    shown.until(|text| text.ends_with("\n> "));
    shown.press(b"\x04");
    assert_eq!(shown.end(), Some(0));

    let mut shown = start();
    shown.until(|text| text.ends_with("> "));
    shown.press(b"\x03");
    assert_eq!(shown.end(), Some(0));
}
