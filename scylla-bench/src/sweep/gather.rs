//! A folder of results, of one machine or gathered from many, as one sweep.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use scylla_core::files::read_text;

use super::{FORMAT, SUMMARY, Summary, VERSION};
use crate::{Error, Result};

/// Folders below one another that are looked into: results of a machine, of a sweep, of a run.
const DEEPEST: usize = 4;

/// The runs that are done in a folder or in folders below it, by name; links are not followed. A run that is there twice, as
/// where folders of several machines overlap, must be the same in both, the machine aside.
///
/// # Errors
/// If the folder or a summary cannot be read, or one run is there with two results.
pub fn gather(dir: &Path) -> Result<Vec<Summary>> {
    let mut found: BTreeMap<String, (Summary, PathBuf)> = BTreeMap::new();
    let mut folders = vec![(dir.to_path_buf(), 0)];
    while let Some((folder, depth)) = folders.pop() {
        let mut below = Vec::new();
        for entry in std::fs::read_dir(&folder).map_err(Error::io(&folder))? {
            let entry = entry.map_err(Error::io(&folder))?;
            let kind = entry.file_type().map_err(Error::io(&entry.path()))?;
            if kind.is_dir() && depth < DEEPEST {
                below.push((entry.path(), depth + 1));
            }
        }
        below.sort();
        folders.extend(below.into_iter().rev());
        let path = folder.join(SUMMARY);
        let Some(summary) = read(&path)? else {
            continue;
        };
        match found.get(&summary.name) {
            Some((other, at)) if !same(other, &summary) => {
                return Err(Error::file(
                    &path,
                    format!(
                        "run `{}` is also in {}, with another result: gather what is of one sweep",
                        summary.name,
                        at.display()
                    ),
                ));
            }
            Some(_) => {}
            None => {
                found.insert(summary.name.clone(), (summary, path));
            }
        }
    }
    Ok(found.into_values().map(|(summary, _)| summary).collect())
}

/// Whether two results are of the same run.
fn same(a: &Summary, b: &Summary) -> bool {
    let key = |s: &Summary| {
        (
            s.family.clone(),
            s.layers,
            s.tokens,
            s.seed,
            s.settings.clone(),
        )
    };
    key(a) == key(b) && a.tau == b.tau
}

/// The summary of a run of a sweep; `None` where there is none, or one of another kind.
pub(super) fn read(path: &Path) -> Result<Option<Summary>> {
    if !path.is_file() {
        return Ok(None);
    }
    let bad = |e: serde_json::Error| Error::file(path, format!("not a summary: {e}"));
    let json: serde_json::Value = serde_json::from_str(&read_text(path)?).map_err(bad)?;
    if json.get("format").and_then(|f| f.as_str()) != Some(FORMAT) {
        return Ok(None);
    }
    let version = json.get("version").and_then(serde_json::Value::as_u64);
    if version.is_none_or(|v| v > VERSION.into()) {
        return Err(Error::file(
            path,
            format!("version {version:?} of {FORMAT}; this program reads up to version {VERSION}"),
        ));
    }
    serde_json::from_value(json).map(Some).map_err(bad)
}
