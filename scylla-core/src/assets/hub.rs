//! Models from the Hugging Face hub, through its own cache.

use std::path::{Path, PathBuf};

use hf_hub::api::sync::{Api, ApiBuilder, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};

use super::{OnProgress, Progress, offline};
use crate::model::shards_of;
use crate::{Error, Result};

/// Whether a name has the form `owner/name` or `owner/name@revision`; a revision is a branch, a tag, a commit, or a
/// reference such as `refs/pr/1`.
pub(super) fn is_id(spec: &str) -> bool {
    let (id, revision) = spec.split_once('@').unwrap_or((spec, "main"));
    let word = |w: &str| {
        let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        !w.is_empty() && !w.starts_with('.') && w.chars().all(fits)
    };
    id.split('/').count() == 2 && id.split('/').all(word) && revision.split('/').all(word)
}

/// Whether a revision is a commit, and not a name for one.
fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_hexdigit())
}

/// The folder of the hub's cache, as huggingface_hub finds it.
fn cache_root() -> Result<PathBuf> {
    let given = |key: &str| {
        std::env::var_os(key).filter(|v| !v.is_empty()).map(|v| {
            match v.to_str().and_then(|v| v.strip_prefix("~/")) {
                Some(rest) => dirs::home_dir().unwrap_or_default().join(rest),
                None => PathBuf::from(v),
            }
        })
    };
    let direct = given("HF_HUB_CACHE").or_else(|| given("HUGGINGFACE_HUB_CACHE"));
    let home = || given("HF_HOME").map(|home| home.join("hub"));
    let usual = || {
        let caches = given("XDG_CACHE_HOME").or_else(|| Some(dirs::home_dir()?.join(".cache")));
        Some(caches?.join("huggingface").join("hub"))
    };
    direct.or_else(home).or_else(usual).ok_or_else(|| {
        Error::Fetch("no folder for the hub's cache is known; set HF_HUB_CACHE or HF_HOME".into())
    })
}

/// Lists the shards of a model that is stored in several.
const INDEX: &str = "model.safetensors.index.json";
/// Holds all weights of another.
const SINGLE: &str = "model.safetensors";

struct Bar<'a, 'b> {
    on_progress: &'a mut OnProgress<'b>,
    done: u64,
    total: u64,
}

impl hf_hub::api::Progress for Bar<'_, '_> {
    fn init(&mut self, size: usize, _filename: &str) {
        self.total = size as u64;
        self.done = 0;
    }
    fn update(&mut self, size: usize) {
        self.done += size as u64;
        (self.on_progress)(Progress::Bytes(self.done, Some(self.total)));
    }
    fn finish(&mut self) {}
}

/// Where files come from: the cache alone, or cache and network.
struct Hub {
    /// The model's folder in the cache.
    folder: PathBuf,
    revision: String,
    api: Option<Api>,
    id: String,
}

impl Hub {
    /// The commit that the cache has for the revision: as a reference says, or the revision itself.
    fn commit(&self) -> Option<String> {
        let reference = std::fs::read_to_string(self.folder.join("refs").join(&self.revision));
        match reference {
            Ok(commit) => Some(commit.trim().to_string()).filter(|c| is_id(&format!("a/{c}"))),
            Err(_) => {
                let snapshot = self.folder.join("snapshots").join(&self.revision);
                snapshot.is_dir().then(|| self.revision.clone())
            }
        }
    }

    fn cached(&self, file: &str) -> Option<PathBuf> {
        let path = self
            .folder
            .join("snapshots")
            .join(self.commit()?)
            .join(file);
        path.exists().then_some(path)
    }

    /// Whether huggingface_hub has noted that the model has no such file.
    fn known_absent(&self, file: &str) -> bool {
        let noted = |commit| {
            self.folder
                .join(".no_exist")
                .join(commit)
                .join(file)
                .exists()
        };
        self.commit().is_some_and(noted)
    }

    /// Notes the same for the next start; that it cannot be written down costs a request, and nothing else.
    fn note_absent(&self, file: &str) {
        if let Some(commit) = self.commit().filter(|c| is_commit(c)) {
            let folder = self.folder.join(".no_exist").join(commit);
            let made = std::fs::create_dir_all(&folder);
            let _ = made.and_then(|()| std::fs::write(folder.join(file), ""));
        }
    }

    /// The model at a revision, over the network. Where the cache has a commit it stays with that, so that files of two
    /// commits are never mixed.
    fn network(&self) -> Option<ApiRepo> {
        let revision = self
            .commit()
            .filter(|c| is_commit(c))
            .unwrap_or_else(|| self.revision.clone());
        let repo = Repo::with_revision(self.id.clone(), RepoType::Model, revision);
        self.api.as_ref().map(|api| api.repo(repo))
    }

    /// A file out of the cache or the network; `None` where neither has it.
    fn find(&self, file: &str, on_progress: &mut OnProgress<'_>) -> Result<Option<PathBuf>> {
        if let Some(path) = self.cached(file) {
            return Ok(Some(path));
        }
        let Some(network) = self.network() else {
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

    /// A file that not every model has. Where the weights are in the cache, a network that does not answer is no reason to
    /// stop: it is told, and the file taken as not there.
    ///
    /// False where the network did not answer, and need not be asked for others.
    fn find_optional(
        &self,
        file: &str,
        whole: bool,
        on_progress: &mut OnProgress<'_>,
    ) -> Result<bool> {
        if self.known_absent(file) {
            return Ok(true);
        }
        match self.find(file, on_progress) {
            Ok(None) if self.api.is_some() => {
                self.note_absent(file);
                Ok(true)
            }
            Err(e) if whole => {
                let note = format!(
                    "{e}. The cache holds the weights of {}, so it is taken as not there",
                    self.id
                );
                on_progress(Progress::Note(&note));
                Ok(false)
            }
            found => found.map(|_| true),
        }
    }

    /// Whether configuration and weights are in the cache.
    fn is_whole(&self) -> bool {
        let listed = || shards_of(&self.cached(INDEX)?).ok();
        let shards = || listed().is_some_and(|all| all.iter().all(|s| self.cached(s).is_some()));
        self.cached("config.json").is_some() && (self.cached(SINGLE).is_some() || shards())
    }

    /// A file that must be there.
    fn get(&self, file: &str, on_progress: &mut OnProgress<'_>) -> Result<PathBuf> {
        let missing = match self.api {
            Some(_) => format!(
                "the hub has no {file} of {} at {}; check the id",
                self.id, self.revision
            ),
            None => format!(
                "{file} of {} at {} is not in the hub cache ({}), and downloads are switched off",
                self.id,
                self.revision,
                self.folder.display()
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
/// Honours `HF_HUB_CACHE`, `HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE`, and reads a cache that
/// huggingface_hub has filled.
///
/// # Errors
/// If what is needed is neither in the cache nor to be had over the network.
pub fn fetch(spec: &str, mut on_progress: OnProgress<'_>) -> Result<PathBuf> {
    let (id, revision) = spec.split_once('@').unwrap_or((spec, "main"));
    let root = cache_root()?;
    let repo = Repo::with_revision(id.into(), RepoType::Model, revision.into());
    let api = if offline() {
        None
    } else {
        let mut builder = ApiBuilder::from_cache(Cache::new(root.clone())).with_progress(false);
        if let Some(endpoint) = std::env::var("HF_ENDPOINT").ok().filter(|e| !e.is_empty()) {
            builder = builder.with_endpoint(endpoint);
        }
        if let Some(token) = std::env::var("HF_TOKEN").ok().filter(|t| !t.is_empty()) {
            builder = builder.with_token(Some(token));
        }
        let api = builder
            .build()
            .map_err(|e| Error::Fetch(format!("hub: {e}")))?;
        Some(api)
    };
    let hub = Hub {
        folder: root.join(repo.folder_name()),
        revision: revision.into(),
        api,
        id: id.into(),
    };
    let whole = hub.is_whole();
    let config = hub.get("config.json", &mut on_progress)?;
    let dir = config.parent().unwrap_or(Path::new(".")).to_path_buf();
    let optional = [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
        "chat_template.jinja",
        "chat_template.json",
    ];
    for file in optional {
        // Not every model has each of them; a missing tokenizer is reported where one is needed.
        if !hub.find_optional(file, whole, &mut on_progress)? {
            break;
        }
    }
    if whole || hub.find(SINGLE, &mut on_progress)?.is_some() {
        return Ok(dir);
    }
    let listing = match (hub.find(INDEX, &mut on_progress)?, &hub.api) {
        (None, Some(_)) => {
            return Err(Error::Fetch(format!(
                "the hub has no model.safetensors of {id}, in one file or in shards; pickled weights (*.bin) are not read"
            )));
        }
        _ => hub.get(INDEX, &mut on_progress)?,
    };
    for shard in shards_of(&listing)? {
        hub.get(&shard, &mut on_progress)?;
    }
    Ok(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_told_from_paths() {
        for id in [
            "a/b",
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            "a/b@v1.0",
            "a/b@refs/pr/1",
        ] {
            assert!(is_id(id), "{id}");
        }
        for other in [
            "a",
            "./a",
            "/a/b",
            "a/b/c",
            "a/",
            "../b",
            "a b/c",
            "a/b@",
            "a/b@../c",
            "a/b@refs//1",
        ] {
            assert!(!is_id(other), "{other}");
        }
    }
}
