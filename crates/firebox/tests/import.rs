//! `firebox import`: folders and files that others wrote, whole and broken.
#![allow(clippy::unwrap_used)]

mod common;

use common::Lab;
use serde_json::json;

/// A Llama of one layer with zeros for weights.
const CONFIG: &str = r#"{"model_type": "llama", "vocab_size": 7, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 8, "tie_word_embeddings": true, "rms_norm_eps": 1e-5}"#;

fn tensors() -> Vec<(String, Vec<usize>)> {
    let layer = |name: &str| format!("model.layers.0.{name}.weight");
    let square = ["q_proj", "k_proj", "v_proj", "o_proj"].map(|name| (layer(&format!("self_attn.{name}")), vec![4, 4]));
    let norms = [layer("input_layernorm"), layer("post_attention_layernorm"), "model.norm.weight".into()];
    let mut all = vec![("model.embed_tokens.weight".to_owned(), vec![7, 4])];
    all.extend(square);
    all.extend(norms.map(|name| (name, vec![4])));
    all.extend(["gate_proj", "up_proj"].map(|name| (layer(&format!("mlp.{name}")), vec![6, 4])));
    all.push((layer("mlp.down_proj"), vec![4, 6]));
    all
}

/// A safetensors file with zeros.
fn file(tensors: &[(String, Vec<usize>)]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, shape) in tensors {
        let begin = end;
        end += 4 * shape.iter().product::<usize>();
        header.insert(name.clone(), json!({ "dtype": "F32", "shape": shape, "data_offsets": [begin, end] }));
    }
    let text = serde_json::Value::from(header).to_string();
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes(), &vec![0; end]].concat()
}

#[test]
fn a_folder_comes_in() {
    let lab = Lab::new(1);
    lab.write("llama/config.json", CONFIG);
    lab.write("llama/model.safetensors", file(&tensors()));
    lab.call(&["import", "llama", "--out", "mine", "--dtype", "bf16"]).succeeded();
    let config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(lab.path("mine/config.json")).unwrap()).unwrap();
    assert_eq!((&config["torch_dtype"], &config["hidden_size"]), (&json!("bfloat16"), &json!(4)));
    lab.call(&["logits", "mine", "--ids", "1,2", "--out", "l.safetensors"]).succeeded();
    lab.call(&["import", "llama", "--out", "mine"]).failed(2, &["mine exists already"]);
    lab.call(&["import", "llama", "--out", "other", "--dtype", "int8"]).failed(2, &["int8", "bf16"]);
}

#[test]
fn bad_folders() {
    let lab = Lab::new(1);
    let good = file(&tensors());
    let header = u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let folder = |name: &str, config: &str, bytes: &[u8]| {
        lab.write(&format!("{name}/config.json"), config);
        lab.write(&format!("{name}/model.safetensors"), bytes);
    };
    folder("cut-header", CONFIG, &good[..header / 2]);
    folder("cut-data", CONFIG, &good[..good.len() - 3]);
    folder("petabytes", CONFIG, &[&(1u64 << 60).to_le_bytes()[..], &good[8..]].concat());
    let huge = [("model.norm.weight".to_owned(), vec![1 << 30, 1 << 22])];
    let text =
        json!({ &huge[0].0: { "dtype": "F32", "shape": huge[0].1, "data_offsets": [0, 1u64 << 54] } }).to_string();
    folder("huge-tensor", CONFIG, &[&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat());
    folder("unknown", &CONFIG.replace("llama", "mamba"), &good);
    folder(
        "yarn",
        &CONFIG.replace(
            "\"rms_norm_eps\"",
            "\"rope_scaling\": {\"rope_type\": \"yarn\", \"factor\": 4}, \"rms_norm_eps\"",
        ),
        &good,
    );
    folder("endless", &CONFIG.replace("\"num_hidden_layers\": 1", "\"num_hidden_layers\": 2000000000"), &good);
    folder("long", &CONFIG.replace("\"max_position_embeddings\": 8", "\"max_position_embeddings\": 2000000000"), &good);
    let mut wrong = tensors();
    wrong[0].1 = vec![8, 4];
    wrong[1].0 = "model.layers.0.self_attn.query.weight".into();
    folder("wrong", CONFIG, &file(&wrong));
    folder("untied", &CONFIG.replace("true", "false"), &good);
    lab.write("no-tensors/config.json", CONFIG);
    lab.write("no-config/model.safetensors", &good);
    let index = |name: &str, file: &str| {
        lab.write(&format!("{name}/config.json"), CONFIG);
        let map = json!({ "weight_map": { "model.norm.weight": file } });
        lab.write(&format!("{name}/model.safetensors.index.json"), map.to_string());
    };
    index("outside", "../cut-data/model.safetensors");
    index("absolute", "/etc/passwd");
    index("no-shard", "model-00001-of-00002.safetensors");
    lab.write("text.gguf", "no GGUF at all");
    lab.write("old.gguf", b"GGUF\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00");
    let known = ["gpt2", "llama", "mistral", "qwen2", "qwen3"];
    let cases: &[(&str, &[&str])] = &[
        ("cut-header", &["model.safetensors", "header"]),
        ("cut-data", &["model.safetensors", "bytes of tensors"]),
        ("petabytes", &["model.safetensors", "1152921504606846976 bytes"]),
        ("huge-tensor", &["model.safetensors"]),
        ("unknown", &[&["mamba"][..], &known].concat()),
        ("yarn", &["yarn", "default, linear or llama3"]),
        ("endless", &["n_layers", "2000000000", "at most 16384"]),
        ("long", &["context", "2000000000", "at most"]),
        ("wrong", &["1 missing", "q_proj", "query", "1 of another shape", "[7, 4]", "[8, 4]"]),
        ("untied", &["1 missing: `lm_head.weight`"]),
        ("no-tensors", &["model.safetensors or model.safetensors.index.json"]),
        ("no-config", &["no-config"]),
        ("outside", &["../cut-data/model.safetensors", "nothing was opened"]),
        ("absolute", &["/etc/passwd", "nothing was opened"]),
        ("no-shard", &["model-00001-of-00002.safetensors"]),
        ("text.gguf", &["text.gguf", "GGUF"]),
        ("old.gguf", &["old.gguf", "version 2 or 3"]),
        ("absent", &["absent"]),
        ("absent.gguf", &["absent.gguf"]),
    ];
    for (source, words) in cases {
        lab.call(&["import", source, "--out", "out"]).failed(2, words);
        lab.call(&["logits", source, "--ids", "1", "--out", "l.safetensors"]).failed(2, words);
    }
    assert!(!lab.path("out").exists());
}

#[cfg(not(feature = "hub"))]
#[test]
fn without_the_hub_a_name_is_refused() {
    Lab::new(1).call(&["import", "hf:owner/name", "--out", "out"]).failed(2, &["hub", "a folder or a .gguf file"]);
}

#[cfg(feature = "hub")]
mod hub {
    use std::collections::BTreeMap;
    use std::io::{BufRead as _, BufReader, Write as _};
    use std::net::{TcpListener, TcpStream};

    use super::*;

    /// How a server fails.
    #[derive(Clone, Copy, PartialEq)]
    enum Fault {
        None,
        /// It ends the connection within `model.safetensors`.
        HangsUp,
        /// It says that the file is shorter than it is.
        Shortens,
        /// What it answers is no list of files.
        Talks,
    }

    /// Serves a repository as the hub does, and returns its address: the list of files, and parts of files.
    fn serve(files: BTreeMap<String, Vec<u8>>, fault: Fault) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                // A client that goes away is no matter.
                drop(answer(&mut stream.unwrap(), &files, fault));
            }
        });
        address
    }

    fn answer(stream: &mut TcpStream, files: &BTreeMap<String, Vec<u8>>, fault: Fault) -> std::io::Result<()> {
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        let request = lines.next().unwrap_or(Ok(String::new()))?;
        let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
        let mut range = None;
        for line in lines {
            let line = line?.to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            if let Some(bytes) = line.strip_prefix("range: bytes=") {
                let (first, last) = bytes.split_once('-').unwrap();
                range = Some((first.parse::<usize>().unwrap(), last.parse::<usize>().ok()));
            }
        }
        let mut reply = |status: &str, headers: &str, body: &[u8]| {
            let length = body.len();
            write!(stream, "HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n")?;
            let hangs_up = fault == Fault::HangsUp && path.ends_with("/model.safetensors") && length > 100;
            stream.write_all(if hangs_up { &body[..100] } else { body })
        };
        if path.starts_with("/api/models/owner/name") {
            if fault == Fault::Talks {
                return reply("200 OK", "content-type: text/html\r\n", b"<html>Log in</html>");
            }
            assert!(path.ends_with("?blobs=true"), "the sizes are asked for: {path}");
            let siblings: Vec<_> =
                files.iter().map(|(name, bytes)| json!({ "rfilename": name, "size": bytes.len() })).collect();
            let info = json!({ "siblings": siblings, "sha": "c0ffee" });
            return reply("200 OK", "content-type: application/json\r\n", info.to_string().as_bytes());
        }
        let file = path.strip_prefix("/owner/name/resolve/main/").and_then(|name| Some((name, files.get(name)?)));
        let Some((name, bytes)) = file else { return reply("404 Not Found", "", b"Repository not found") };
        let bytes = if fault == Fault::Shortens { &bytes[..bytes.len() - 3] } else { bytes };
        let about = format!("etag: \"{name}\"\r\nx-repo-commit: c0ffee\r\naccept-ranges: bytes\r\n");
        match range {
            Some((first, last)) => {
                let last = last.unwrap_or(bytes.len() - 1).min(bytes.len() - 1);
                let about = format!("{about}content-range: bytes {first}-{last}/{}\r\n", bytes.len());
                reply("206 Partial Content", &about, &bytes[first..=last])
            }
            None => reply("200 OK", &about, bytes),
        }
    }

    fn files() -> BTreeMap<String, Vec<u8>> {
        let files =
            [("config.json", CONFIG.into()), ("model.safetensors", file(&tensors())), ("README.md", b"#".into())];
        files.map(|(name, bytes): (&str, Vec<u8>)| (name.to_owned(), bytes)).into()
    }

    /// `firebox import SOURCE --out OUT` from this server.
    fn import(lab: &Lab, source: &str, out: &str, endpoint: &str) -> common::Ended {
        let mut command = lab.firebox(&["import", source, "--out", out]);
        command.env("HF_ENDPOINT", endpoint).env("HF_HOME", lab.path("home")).env_remove("HF_TOKEN");
        common::Ended::new(command.output().unwrap(), source.into())
    }

    #[test]
    fn a_repository_is_fetched_by_its_name() {
        let lab = Lab::new(1);
        let endpoint = serve(files(), Fault::None);
        import(&lab, "hf:owner/name", "mine", &endpoint).succeeded();
        lab.call(&["logits", "mine", "--ids", "1,2", "--out", "l.safetensors"]).succeeded();
        assert!(lab.path("home/hub/models--owner--name").is_dir(), "the cache of the hub's other clients");
        import(&lab, "hf:owner/other", "other", &endpoint).failed(2, &["hf:owner/other", "404"]);
        import(&lab, "hf:../name", "other", &endpoint).failed(2, &["hf:OWNER/NAME"]);
        // Nobody listens there.
        import(&lab, "hf:owner/third", "other", "http://127.0.0.1:9")
            .failed(2, &["hf:owner/third", "copy the repository's files"]);
        let pickled: [(String, Vec<u8>); 2] =
            [("config.json".to_owned(), CONFIG.into()), ("pytorch_model.bin".to_owned(), vec![1])];
        let ended = import(&lab, "hf:owner/name", "other", &serve(pickled.into(), Fault::None));
        ended.failed(2, &["config.json with model.safetensors", "pytorch_model.bin"]);
        let ended = import(&lab, "hf:owner/name", "other", &serve(files(), Fault::Talks));
        ended.failed(2, &["the list of files of hf:owner/name", "HF_ENDPOINT"]);
        assert!(!lab.path("other").exists(), "nothing is left half-written");
    }

    #[test]
    fn a_download_that_breaks_off_is_an_error_and_goes_on_the_next_time() {
        let lab = Lab::new(1);
        import(&lab, "hf:owner/name", "mine", &serve(files(), Fault::HangsUp))
            .failed(2, &["model.safetensors of hf:owner/name"]);
        assert!(!lab.path("mine").exists());
        import(&lab, "hf:owner/name", "mine", &serve(files(), Fault::None)).succeeded();
        lab.call(&["logits", "mine", "--ids", "1,2", "--out", "l.safetensors"]).succeeded();
    }

    #[test]
    fn a_file_of_another_length_does_not_stay() {
        let lab = Lab::new(1);
        for _ in 0..2 {
            import(&lab, "hf:owner/name", "mine", &serve(files(), Fault::Shortens)).failed(2, &["bytes, got", "again"]);
        }
        assert!(!lab.path("mine").exists());
        import(&lab, "hf:owner/name", "mine", &serve(files(), Fault::None)).succeeded();
    }
}
