//! Sha256 of files, remembered by what the system says of them, so that a start reads no weights twice.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::cache_dir;
use crate::model::ModelFiles;
use crate::{Error, Result, files};

/// What the system says of a file: when one of these changes, so may its content have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    path: PathBuf,
    size: u64,
    /// Nanoseconds since 1970.
    modified: u128,
    /// The same of the last change of its entry, and the entry's number, where the system has them.
    changed: Option<(i64, i64, u64)>,
}

/// A change so near to now might be followed by another within the clock's step.
const SETTLED: Duration = Duration::from_secs(2);

impl Stamp {
    /// `None` where the system does not say enough, or the file has only just changed.
    fn of(path: &Path) -> Option<Self> {
        let path = std::fs::canonicalize(path).ok()?;
        let found = std::fs::metadata(&path).ok()?;
        let modified = found.modified().ok()?;
        let settled = SystemTime::now().duration_since(modified).ok()? > SETTLED;
        #[cfg(unix)]
        let changed = {
            use std::os::unix::fs::MetadataExt;
            Some((found.ctime(), found.ctime_nsec(), found.ino()))
        };
        #[cfg(not(unix))]
        let changed = None;
        settled.then_some(Self {
            path,
            size: found.len(),
            modified: modified.duration_since(UNIX_EPOCH).ok()?.as_nanos(),
            changed,
        })
    }
}

#[derive(Serialize, Deserialize)]
struct Remembered {
    files: Vec<Stamp>,
    sha256: String,
}

/// Where the hash of these files is remembered.
fn place(stamps: &[Stamp]) -> Option<PathBuf> {
    let mut names = Sha256::new();
    for stamp in stamps {
        names.update(stamp.path.as_os_str().as_encoded_bytes());
        names.update([0]);
    }
    let name = hex(&names.finalize()[..16]);
    Some(cache_dir().ok()?.join("hashes").join(name + ".json"))
}

/// Sha256 of the files' contents one after the other, in hex, remembered by path, size and times.
///
/// # Errors
/// If a file cannot be read.
pub fn hash_files(paths: &[PathBuf]) -> Result<String> {
    let stamps: Option<Vec<Stamp>> = paths.iter().map(|p| Stamp::of(p)).collect();
    let place = stamps.as_deref().and_then(place);
    let known = place.as_ref().and_then(|place| {
        let text = std::fs::read_to_string(place).ok()?;
        serde_json::from_str::<Remembered>(&text).ok()
    });
    if let (Some(known), Some(stamps)) = (known, &stamps)
        && known.files == *stamps
    {
        return Ok(known.sha256);
    }
    let mut hash = Sha256::new();
    for path in paths {
        update(&mut hash, path)?;
    }
    let sha256 = hex(&hash.finalize());
    // Remembered only if nothing changed meanwhile; that it cannot be written down costs time, and nothing else.
    if let (Some(place), Some(stamps)) = (place, stamps)
        && paths
            .iter()
            .map(|p| Stamp::of(p))
            .eq(stamps.iter().cloned().map(Some))
    {
        let remembered = Remembered {
            files: stamps,
            sha256: sha256.clone(),
        };
        let written = place.parent().map(std::fs::create_dir_all);
        if let (Some(Ok(())), Ok(text)) = (written, serde_json::to_vec(&remembered)) {
            let _ = files::write(&place, &text);
        }
    }
    Ok(sha256)
}

/// Sha256 that names a model: of its GGUF file or files, or of its configuration and the weight files that are loaded, in
/// order of name.
///
/// # Errors
/// If a file cannot be read.
pub fn hash_model(files: &ModelFiles) -> Result<String> {
    hash_files(&files.files())
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

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
