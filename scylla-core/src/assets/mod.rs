//! Models by name: the pinned default, hub ids, and local paths.

mod default_model;
mod hub;

use std::io::Read;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

pub use default_model::{DEFAULT_MODEL, DefaultModel};
pub use hub::fetch as fetch_hub;

use crate::{Error, Result};

/// Told bytes done, and in all where known.
pub type OnProgress<'a> = &'a mut dyn FnMut(u64, Option<u64>);

/// Whether downloads are switched off: `SCYLLA_OFFLINE` or `HF_HUB_OFFLINE` set to something but 0.
pub fn offline() -> bool {
    let on = |key: &str| std::env::var(key).is_ok_and(|v| !v.is_empty() && v != "0");
    on("SCYLLA_OFFLINE") || on("HF_HUB_OFFLINE")
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

/// Sha256 of a file, in hex.
pub fn hash_file(path: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    update(&mut hash, path)?;
    Ok(hex(&hash.finalize()))
}

/// Sha256 that names a model: of its GGUF file, or of config and weight files of its directory in order of name.
pub fn hash_model(path: &Path) -> Result<String> {
    if path.is_file() {
        return hash_file(path);
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(Error::io(path))? {
        let file = entry.map_err(Error::io(path))?.path();
        let name = file
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if name == "config.json" || name.ends_with(".safetensors") {
            files.push(file);
        }
    }
    files.sort();
    let mut hash = Sha256::new();
    for file in files {
        update(&mut hash, &file)?;
    }
    Ok(hex(&hash.finalize()))
}

fn update(hash: &mut Sha256, path: &Path) -> Result<()> {
    let mut file = std::fs::File::open(path).map_err(Error::io(path))?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(Error::io(path))? {
            0 => return Ok(()),
            n => hash.update(&buffer[..n]),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Writes a file whole or not at all: to a temporary file beside it, then renamed.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    use std::io::Write;
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let mut file = tempfile::NamedTempFile::new_in(dir).map_err(Error::io(path))?;
    file.write_all(bytes).map_err(Error::io(path))?;
    file.flush().map_err(Error::io(path))?;
    file.persist(path).map_err(|e| Error::io(path)(e.error))?;
    Ok(())
}
