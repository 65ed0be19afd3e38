//! Models from the Hugging Face hub, through its own cache.

use std::path::{Path, PathBuf};

use hf_hub::api::Progress;
use hf_hub::api::sync::{ApiBuilder, ApiRepo};
use hf_hub::{Cache, CacheRepo, Repo, RepoType};

use super::{OnProgress, offline};
use crate::{Error, Result};

/// Whether a name has the form `owner/name` or `owner/name@revision`.
pub(super) fn is_id(spec: &str) -> bool {
    let (id, revision) = spec.split_once('@').unwrap_or((spec, "main"));
    let word = |w: &str| {
        let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        !w.is_empty() && !w.starts_with('.') && w.chars().all(fits)
    };
    id.split('/').count() == 2 && id.split('/').all(word) && word(revision)
}

/// Lists the shards of a model that is stored in several.
const INDEX: &str = "model.safetensors.index.json";

struct Bar<'a, 'b> {
    on_progress: &'a mut OnProgress<'b>,
    done: u64,
    total: u64,
}

impl Progress for Bar<'_, '_> {
    fn init(&mut self, size: usize, _filename: &str) {
        self.total = size as u64;
        self.done = 0;
    }
    fn update(&mut self, size: usize) {
        self.done += size as u64;
        (self.on_progress)(self.done, Some(self.total));
    }
    fn finish(&mut self) {}
}

/// Where files come from: the cache alone, or cache and network.
struct Hub {
    cache: CacheRepo,
    network: Option<ApiRepo>,
    id: String,
}

impl Hub {
    /// A file out of the cache or the network; `None` where neither has it.
    fn find(&self, file: &str, on_progress: &mut OnProgress<'_>) -> Result<Option<PathBuf>> {
        if let Some(path) = self.cache.get(file) {
            return Ok(Some(path));
        }
        let Some(network) = &self.network else {
            return Ok(None);
        };
        let bar = Bar {
            on_progress,
            done: 0,
            total: 0,
        };
        match network.download_with_progress(file, bar) {
            Ok(path) => Ok(Some(path)),
            Err(e) if is_missing(&e) => Ok(None),
            Err(e) => Err(Error::Fetch(format!(
                "{file} of {} could not be fetched: {e}; check the network, HF_ENDPOINT, and HF_TOKEN where access is gated",
                self.id
            ))),
        }
    }

    /// A file that must be there.
    fn get(&self, file: &str, on_progress: &mut OnProgress<'_>) -> Result<PathBuf> {
        let missing = match self.network {
            Some(_) => format!("the hub has no {file} of {}; check the id", self.id),
            None => format!(
                "{file} of {} is not in the hub cache, and downloads are switched off",
                self.id
            ),
        };
        self.find(file, on_progress)?
            .ok_or_else(|| Error::Fetch(missing))
    }
}

/// Whether the hub answered that there is no such file.
fn is_missing(e: &hf_hub::api::sync::ApiError) -> bool {
    matches!(e, hf_hub::api::sync::ApiError::RequestError(e) if e.to_string().ends_with("404"))
}

/// Fetches configuration, tokenizer and weights of a model and returns their directory.
///
/// Honours `HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE`.
pub fn fetch(spec: &str, mut on_progress: OnProgress<'_>) -> Result<PathBuf> {
    let (id, revision) = spec.split_once('@').unwrap_or((spec, "main"));
    let repo = Repo::with_revision(id.into(), RepoType::Model, revision.into());
    let network = if offline() {
        None
    } else {
        let mut builder = ApiBuilder::from_env().with_progress(false);
        if let Ok(token) = std::env::var("HF_TOKEN") {
            builder = builder.with_token(Some(token));
        }
        let api = builder
            .build()
            .map_err(|e| Error::Fetch(format!("hub: {e}")))?;
        Some(api.repo(repo.clone()))
    };
    let hub = Hub {
        cache: Cache::from_env().repo(repo),
        network,
        id: id.into(),
    };
    let config = hub.get("config.json", &mut on_progress)?;
    let dir = config.parent().unwrap_or(Path::new(".")).to_path_buf();
    let optional = [
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
    ];
    for file in optional {
        // Not every model has each of them; a missing tokenizer is reported where one is needed.
        hub.find(file, &mut on_progress)?;
    }
    if hub.find("model.safetensors", &mut on_progress)?.is_some() {
        return Ok(dir);
    }
    let listing = match (hub.find(INDEX, &mut on_progress)?, &hub.network) {
        (None, Some(_)) => {
            return Err(Error::Fetch(format!(
                "the hub has no model.safetensors of {id}, in one file or in shards; pickled weights (*.bin) are not read"
            )));
        }
        _ => hub.get(INDEX, &mut on_progress)?,
    };
    for shard in crate::model::shard_names(&listing)? {
        hub.get(&shard, &mut on_progress)?;
    }
    Ok(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_told_from_paths() {
        for id in ["a/b", "HuggingFaceTB/SmolLM2-135M-Instruct", "a/b@v1.0"] {
            assert!(is_id(id), "{id}");
        }
        for other in ["a", "./a", "/a/b", "a/b/c", "a/", "../b", "a b/c"] {
            assert!(!is_id(other), "{other}");
        }
    }
}
