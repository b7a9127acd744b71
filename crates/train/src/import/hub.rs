//! Repositories of the Hugging Face hub.

use std::path::PathBuf;

use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};

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

/// Fetches what a model needs into the hub's cache, unless it is there, and gives its folder.
pub fn fetch(name: &str) -> Result<PathBuf, TrainError> {
    let (plain, revision) = name.split_once('@').unwrap_or((name, "main"));
    let word = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
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
    let info = repo.info().map_err(failed("the list of files"))?;
    let files: Vec<&str> = info.siblings.iter().map(|file| file.rfilename.as_str()).collect();
    let get = |file: &str| repo_get(&repo, file).map_err(failed(file));
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

fn repo_get(repo: &ApiRepo, file: &str) -> Result<PathBuf, ApiError> {
    repo.get(file)
}
