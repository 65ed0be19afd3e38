//! Reading and writing files as the users of a command line expect it.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// How a Git LFS pointer begins: what a clone without `git lfs` holds in a large file's place.
const LFS: &[u8] = b"version https://git-lfs";

/// Refuses a file whose first bytes are a Git LFS pointer.
///
/// # Errors
/// Names the file and how to fetch it.
pub fn refuse_pointer(path: &Path, head: &[u8]) -> Result<()> {
    match head.starts_with(LFS) {
        true => Err(Error::file(
            path,
            "a Git LFS pointer, not the file itself; fetch it with `git lfs pull` in its repository, or download it from the hub",
        )),
        false => Ok(()),
    }
}

/// The first bytes of a file, at most `n`.
pub(crate) fn head(path: &Path, n: u64) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(Error::io(path))?;
    let mut head = Vec::new();
    let read = file.take(n).read_to_end(&mut head);
    read.map_err(Error::io(path))?;
    Ok(head)
}

/// Reads a text file. A byte order mark of UTF-8 is no part of the text.
///
/// # Errors
/// If it cannot be read, is a Git LFS pointer, or is not UTF-8 (with the place).
pub fn read_text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    refuse_pointer(path, &bytes)?;
    if bytes.starts_with(&[0xFF, 0xFE]) || bytes.starts_with(&[0xFE, 0xFF]) {
        return Err(Error::file(path, "UTF-16 text; save it as UTF-8"));
    }
    let text = String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        Error::file(path, format!("not UTF-8 from byte {at} on"))
    })?;
    Ok(match text.strip_prefix('\u{FEFF}') {
        Some(rest) => rest.to_string(),
        None => text,
    })
}

/// Reads a JSON file.
///
/// # Errors
/// As [`read_text`]; and if it is not JSON, with the place. `what` says what was expected.
pub fn read_json(path: &Path, what: &str) -> Result<serde_json::Value> {
    parse_json(&read_text(path)?, path, what)
}

/// Parses the text of a JSON file.
///
/// # Errors
/// If it is not JSON, with the place. `what` says what was expected.
pub fn parse_json(text: &str, path: &Path, what: &str) -> Result<serde_json::Value> {
    serde_json::from_str(text).map_err(|e| Error::file(path, format!("not {what}: {e}")))
}

/// Where bytes for a path go.
enum Destination {
    /// A regular file, there or not yet: replaced whole.
    File(PathBuf),
    /// A pipe or a device: written into.
    Stream(PathBuf),
}

/// Follows links, so that what they point to is written and they stay.
fn destination(path: &Path) -> Result<Destination> {
    match std::fs::metadata(path) {
        Ok(found) if found.is_dir() => Err(Error::file(path, "a directory, not a file")),
        Ok(found) if !found.is_file() => Ok(Destination::Stream(path.to_path_buf())),
        Ok(_) => {
            let real = std::fs::canonicalize(path).map_err(Error::io(path))?;
            Ok(Destination::File(real))
        }
        // Nothing there yet, perhaps behind links.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let mut at = path.to_path_buf();
            for _ in 0..40 {
                let Ok(next) = std::fs::read_link(&at) else {
                    return Ok(Destination::File(at));
                };
                at = folder(&at).join(next);
            }
            Err(Error::file(path, "too many links"))
        }
        Err(e) => Err(Error::io(path)(e)),
    }
}

fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

/// A file that is written beside its place and moved there when it is whole; dropped before, nothing is left of it.
pub(crate) struct Staged {
    file: tempfile::NamedTempFile,
    path: PathBuf,
}

impl Staged {
    /// Begins a file. Its permissions are those of the file it replaces, or what the user's umask leaves.
    pub(crate) fn new(path: &Path) -> Result<Self> {
        let mut builder = tempfile::Builder::new();
        #[cfg(unix)]
        let builder = {
            use std::os::unix::fs::PermissionsExt;
            builder.permissions(std::fs::Permissions::from_mode(0o666))
        };
        let file = builder.tempfile_in(folder(path)).map_err(Error::io(path))?;
        if let Ok(old) = std::fs::metadata(path) {
            let set = file.as_file().set_permissions(old.permissions());
            set.map_err(Error::io(path))?;
        }
        Ok(Self {
            file,
            path: path.to_path_buf(),
        })
    }

    /// Appends bytes.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(Error::io(&self.path))
    }

    /// Moves it to its place.
    pub(crate) fn keep(mut self) -> Result<()> {
        self.file.flush().map_err(Error::io(&self.path))?;
        let kept = self.file.persist(&self.path);
        kept.map_err(|e| Error::io(&self.path)(e.error))?;
        Ok(())
    }
}

/// Writes a file whole or not at all: to a temporary file beside it, then renamed. A link is followed and stays; a pipe
/// or a device is written into.
///
/// # Errors
/// If it cannot be written; what was there is unchanged then.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    match destination(path)? {
        Destination::File(path) => {
            let mut staged = Staged::new(&path)?;
            staged.write(bytes)?;
            staged.keep()
        }
        Destination::Stream(path) => {
            let opened = OpenOptions::new().write(true).open(&path);
            let mut stream = opened.map_err(Error::io(&path))?;
            let written = stream.write_all(bytes).and_then(|()| stream.flush());
            written.map_err(Error::io(&path))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_order_mark_is_no_part_of_a_text_and_other_encodings_are_named() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("t");
        let read = |bytes: &[u8]| {
            std::fs::write(&path, bytes).expect("write");
            read_text(&path).map_err(|e| e.to_string())
        };
        assert_eq!(read(b"\xEF\xBB\xBFa\n").as_deref(), Ok("a\n"));
        assert!(
            read(b"\xFF\xFEa\0")
                .expect_err("refused")
                .contains("UTF-16")
        );
        assert!(
            read(b"ab\xFF")
                .expect_err("refused")
                .contains("from byte 2")
        );
        let pointer = read(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n");
        assert!(pointer.expect_err("refused").contains("git lfs pull"));
    }

    #[cfg(unix)]
    #[test]
    fn links_stay_and_what_they_point_to_is_written() {
        use std::os::unix::fs::symlink;
        let dir = tempfile::tempdir().expect("dir");
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir(at("real")).expect("create");
        std::fs::write(at("real/file"), "old").expect("write");
        symlink("real/file", at("link")).expect("link");
        symlink("link", at("chain")).expect("link");
        symlink("real/new", at("dangling")).expect("link");
        for (link, real) in [
            ("link", "real/file"),
            ("chain", "real/file"),
            ("dangling", "real/new"),
        ] {
            write(&at(link), link.as_bytes()).expect("written");
            let found = std::fs::symlink_metadata(at(link)).expect("there");
            assert!(found.is_symlink(), "{link}");
            assert_eq!(std::fs::read(at(real)).expect("read"), link.as_bytes());
        }
        symlink("loop", at("loop")).expect("link");
        assert!(write(&at("loop"), b"x").is_err());
        assert!(write(&at("real"), b"x").is_err(), "a directory");
        write(Path::new("/dev/null"), b"x").expect("a device");
    }

    #[cfg(unix)]
    #[test]
    fn a_file_that_is_replaced_keeps_its_permissions() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("f");
        std::fs::write(&path, "old").expect("write");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).expect("set");
        write(&path, b"new").expect("written");
        let mode = std::fs::metadata(&path)
            .expect("there")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o640);
        assert_eq!(std::fs::read(&path).expect("read"), b"new");
    }
}
