//! Repositories of the Hugging Face hub.

use std::fs;
use std::path::{Path, PathBuf};

use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use serde::Deserialize;

use crate::TrainError;
use crate::model_io::SIDES;

/// Why a repository could not be fetched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// A name that is none.
    #[error("hf:{0}: expected hf:OWNER/NAME, or a name with @REVISION behind it")]
    Name(String),
    /// The network, or a repository that is not there.
    #[error(
        "cannot fetch {file} of hf:{name}: {}; where there is no network, copy the repository's files into a folder and import that",
        one_line(source)
    )]
    Fetch {
        /// The repository.
        name: String,
        /// The file.
        file: String,
        /// Why.
        source: Box<ApiError>,
    },
    /// Something else than the hub's list of files.
    #[error("expected the list of files of hf:{name}, got something else ({reason}): does HF_ENDPOINT name a hub?")]
    List {
        /// The repository.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A file of another length than the hub says.
    #[error("{file} of hf:{name}: expected {expected} bytes, got {got}; it was removed from the cache: fetch it again")]
    Length {
        /// The repository.
        name: String,
        /// The file.
        file: String,
        /// Its bytes on the hub.
        expected: u64,
        /// Those that came.
        got: u64,
    },
    /// A repository without tensors that can be read.
    #[error("hf:{name} has no {expected}; it has {got}")]
    Files {
        /// The repository.
        name: String,
        /// What would work.
        expected: &'static str,
        /// What there is.
        got: String,
    },
}

fn one_line(error: &ApiError) -> String {
    error.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// What the hub says of a repository.
#[derive(Deserialize)]
struct Listed {
    siblings: Vec<File>,
}

#[derive(Deserialize)]
struct File {
    rfilename: String,
    /// Bytes, where the hub was asked for them and says so.
    size: Option<u64>,
}

fn listed(repo: &ApiRepo) -> Result<String, ApiError> {
    let request = repo.info_request().query("blobs", "true");
    Ok(request.call().map_err(Box::new)?.body_mut().read_to_string().map_err(Box::new)?)
}

/// Fetches what a model needs into the hub's cache, unless it is there, and gives its folder.
pub fn fetch(name: &str) -> Result<PathBuf, TrainError> {
    let (plain, revision) = name.split_once('@').unwrap_or((name, "main"));
    let word = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    };
    let parts: Vec<&str> = plain.split('/').collect();
    // Names without an owner are those of the hub's first models.
    if parts.len() > 2 || !parts.iter().all(|part| word(part)) || revision.is_empty() || revision.contains("..") {
        return Err(HubError::Name(name.to_owned()).into());
    }
    let failed = |file: &str| {
        let (name, file) = (name.to_owned(), file.to_owned());
        move |source| HubError::Fetch { name, file, source: Box::new(source) }
    };
    let mut builder = ApiBuilder::from_env();
    if let Some(token) = std::env::var("HF_TOKEN").ok().filter(|token| !token.is_empty()) {
        builder = builder.with_token(Some(token));
    }
    let api = builder.build().map_err(failed("the list of files"))?;
    let repo = api.repo(hf_hub::Repo::with_revision(plain.to_owned(), hf_hub::RepoType::Model, revision.to_owned()));
    let list = listed(&repo).map_err(failed("the list of files"))?;
    let Listed { siblings } = serde_json::from_str(&list)
        .map_err(|error| HubError::List { name: name.to_owned(), reason: error.to_string() })?;
    let files: Vec<&str> = siblings.iter().map(|file| file.rfilename.as_str()).collect();
    let get = |file: &str| -> Result<PathBuf, TrainError> {
        let path = repo.get(file).map_err(failed(file))?;
        let expected = siblings.iter().find(|known| known.rfilename == file).and_then(|known| known.size);
        check_length(&path, expected).map_err(|[expected, got]| {
            let (name, file) = (name.to_owned(), file.to_owned());
            HubError::Length { name, file, expected, got }
        })?;
        Ok(path)
    };
    let has = |file: &str| files.contains(&file);
    let index = "model.safetensors.index.json";
    let wanted = match (has("config.json"), has("model.safetensors"), has(index)) {
        (true, true, _) => vec!["model.safetensors"],
        (true, false, true) => {
            let shards = files.iter().copied();
            let shards = shards
                .filter(|file| file.starts_with("model-") && file.ends_with(".safetensors") && !file.contains('/'));
            shards.chain([index]).collect()
        }
        _ => {
            let mut got: Vec<&str> = files.iter().copied().filter(|file| !file.ends_with(".md")).take(8).collect();
            got.sort_unstable();
            let expected = "config.json with model.safetensors, or with shards and their index";
            return Err(HubError::Files { name: name.to_owned(), expected, got: got.join(", ") }.into());
        }
    };
    for file in wanted.into_iter().chain(["tokenizer.json"]).chain(SIDES).filter(|file| has(file)) {
        get(file)?;
    }
    let config = get("config.json")?;
    Ok(config.parent().map(PathBuf::from).unwrap_or_default())
}

/// A connection that ends early gives a short file, which the client takes for whole. Such a file is removed, with what its name in the cache points to. The error is what was expected, and
/// what came.
fn check_length(path: &Path, expected: Option<u64>) -> Result<(), [u64; 2]> {
    let (Some(expected), Ok(got)) = (expected, fs::metadata(path)) else { return Ok(()) };
    if expected == got.len() {
        return Ok(());
    }
    let target = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    // What cannot be removed is found again the next time.
    drop(fs::remove_file(target));
    drop(fs::remove_file(path));
    Err([expected, got.len()])
}
