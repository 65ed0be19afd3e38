//! Models by name: the pinned default, hub ids, and local paths.

mod default_model;
mod hashes;
mod hub;

use std::path::{Path, PathBuf};

pub use default_model::{DEFAULT_MODEL, DefaultModel};
pub use hashes::{hash_files, hash_model};
pub use hub::fetch as fetch_hub;

use crate::{Error, Result};

/// What is told while something is fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress<'a> {
    /// Bytes done, and in all where known.
    Bytes(u64, Option<u64>),
    /// Something the user should know.
    Note(&'a str),
}

/// Told how a download goes.
pub type OnProgress<'a> = &'a mut dyn FnMut(Progress<'_>);

/// Whether downloads are switched off: `SCYLLA_OFFLINE`, `HF_HUB_OFFLINE` or `TRANSFORMERS_OFFLINE` says 1, on, yes or
/// true, as huggingface_hub reads them.
pub fn offline() -> bool {
    let yes = |v: &str| ["1", "on", "yes", "true"].contains(&v.to_lowercase().as_str());
    let on = |key: &str| std::env::var(key).is_ok_and(|v| yes(v.trim()));
    ["SCYLLA_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"]
        .into_iter()
        .any(on)
}

/// This project's folder for downloads: `SCYLLA_CACHE`, or `scylla` in the user's cache directory.
pub fn cache_dir() -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("SCYLLA_CACHE").filter(|d| !d.is_empty()) {
        return Ok(dir.into());
    }
    match dirs::cache_dir() {
        Some(dir) => Ok(dir.join("scylla")),
        None => Err(Error::Fetch(
            "no cache directory is known; set SCYLLA_CACHE to a folder".into(),
        )),
    }
}

/// Finds a model: `default`, a local path, or a hub id (`owner/name`, `owner/name@revision`), fetched if needed.
pub fn resolve(spec: &str, on_progress: OnProgress<'_>) -> Result<PathBuf> {
    if spec == "default" || spec.eq_ignore_ascii_case(DEFAULT_MODEL.name) {
        return DEFAULT_MODEL.fetch(&cache_dir()?, on_progress);
    }
    let path = Path::new(spec);
    if path.exists() {
        return Ok(path.to_path_buf());
    }
    if hub::is_id(spec) {
        return fetch_hub(spec, on_progress);
    }
    Err(Error::file(
        path,
        "no such file or directory, and no hub id (owner/name); `default` is the pinned default model",
    ))
}
