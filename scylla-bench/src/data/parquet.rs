//! Rows of parquet files, as data sets on the hub are kept, as the JSON rows that they stand for.

use std::fs::File;
use std::path::Path;

use parquet::file::reader::{FileReader, SerializedFileReader};
use serde_json::Value;

use crate::{Error, Result};

/// The rows of a file, each with its place.
///
/// # Errors
/// If it cannot be read, or is none; names the row.
pub(super) fn rows(path: &Path) -> Result<Vec<(String, Value)>> {
    let file = File::open(path).map_err(Error::io(path))?;
    let read = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name(READER.into());
        let reading = thread.spawn_scoped(scope, || rows_of(file, path));
        reading.map(|reading| reading.join())
    });
    match read.map_err(Error::io(path))? {
        Ok(rows) => rows,
        Err(_) => Err(Error::file(
            path,
            "a broken parquet file: its pages are not what their headers say",
        )),
    }
}

/// Name of the thread that reads: the library panics on pages that are broken.
pub(crate) const READER: &str = "parquet";

fn rows_of(file: File, path: &Path) -> Result<Vec<(String, Value)>> {
    let bad = |what: String| Error::file(path, what);
    let reader = SerializedFileReader::new(file)
        .map_err(|e| bad(format!("not a whole parquet file: {e}")))?;
    let all = reader
        .get_row_iter(None)
        .map_err(|e| bad(format!("a parquet file whose rows cannot be read: {e}")))?;
    let mut found = Vec::new();
    for (i, row) in all.enumerate() {
        let place = format!("row {}", i + 1);
        match row {
            Ok(row) => found.push((place, row.to_json_value())),
            Err(e) => return Err(bad(format!("{place}: {e}"))),
        }
    }
    Ok(found)
}

/// Whether a file is one by its name.
pub(super) fn is(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "parquet")
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::data::conversations;
    use crate::data::documents::{Content, contents};

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../tests/fixtures")
            .join(name)
    }

    #[test]
    fn conversations_and_texts_of_any_compression_are_read() {
        let talks = ["talk-snappy.parquet", "talk-zstd.parquet"]
            .map(|name| conversations::read(&fixture(name)).expect("conversations"));
        assert_eq!(talks[0], talks[1]);
        let said: Vec<Vec<(&str, &str)>> = talks[0]
            .iter()
            .map(|c| c.messages.iter().map(|m| (m.role, &*m.content)).collect())
            .collect();
        assert_eq!(
            said[1],
            [
                ("system", "Be brief."),
                ("user", "Name a river."),
                ("assistant", "The Elbe.")
            ]
        );
        assert_eq!(said[2][0].1, "H\u{e9}llo?");
        assert_eq!((said[0].len(), &*talks[0][0].id), (4, "a"));
        let texts = contents(&fixture("texts-gzip.parquet"), "").expect("texts");
        assert_eq!(texts.len(), 40);
        let text = |i: usize| match &texts[i].1 {
            Content::Text(text) => text.clone(),
            Content::Talk(_) => panic!("a conversation"),
        };
        assert_eq!(text(1), "The 1th text, which says so again and again.");
        assert!(texts[39].0.ends_with("row 40"), "{}", texts[39].0);
        assert_eq!(
            contents(&fixture("talk-zstd.parquet"), "")
                .expect("talks")
                .len(),
            3
        );
    }

    #[test]
    fn a_file_that_is_broken_is_an_error_and_nothing_worse() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("x.parquet");
        let mut refused = 0;
        for name in [
            "talk-snappy.parquet",
            "talk-zstd.parquet",
            "texts-gzip.parquet",
        ] {
            let whole = std::fs::read(fixture(name)).expect("read");
            for cut in [0, 3, 8, whole.len() / 2, whole.len() - 1] {
                std::fs::write(&path, &whole[..cut]).expect("written");
                let error = rows(&path).expect_err("cut").to_string();
                assert!(error.contains("parquet"), "{error}");
            }
            for i in 0..whole.len() {
                let mut changed = whole.clone();
                changed[i] ^= 1 << (i % 8);
                std::fs::write(&path, &changed).expect("written");
                refused += usize::from(rows(&path).is_err());
            }
        }
        assert!(refused > 1000, "{refused}");
    }
}
