//! Tables of CSV, whose errors name file and line.

use std::path::Path;

use serde::de::DeserializeOwned;

use crate::{Error, Result};

/// What is wrong with a line of a file.
pub(crate) fn at_line(path: &Path, line: u64, what: impl std::fmt::Display) -> Error {
    Error::file(path, format!("line {line}: {what}"))
}

/// The rows of a table and their lines; `columns` are those that it must have, in `header` as it is meant. Lines that begin with
/// `#` are comments, a byte order mark is none of it.
///
/// # Errors
/// With the line, if a column is missing or a row is not of the kind.
pub(crate) fn rows<T: DeserializeOwned>(
    path: &Path,
    text: &str,
    columns: &[&str],
    header: &str,
) -> Result<Vec<(u64, T)>> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut reader = csv::ReaderBuilder::new()
        .trim(csv::Trim::All)
        .comment(Some(b'#'))
        .from_reader(text.as_bytes());
    let found = reader.headers().map_err(|e| at_line(path, 1, e))?.clone();
    for name in columns {
        if !found.iter().any(|found| found == *name) {
            let found: Vec<&str> = found.iter().collect();
            let what = format!(
                "no column `{name}`; a header of {header} is meant, found {}",
                found.join(",")
            );
            return Err(at_line(path, 1, what));
        }
    }
    let mut all = Vec::new();
    let mut record = csv::StringRecord::new();
    loop {
        let before = reader.position().line();
        match reader.read_record(&mut record) {
            Ok(false) => return Ok(all),
            Ok(true) => {}
            Err(e) => return Err(at_line(path, before, e)),
        }
        let line = record.position().map_or(before, csv::Position::line);
        let row = record.deserialize(Some(&found)).map_err(|e| {
            let csv::ErrorKind::Deserialize { err, .. } = e.kind() else {
                return at_line(path, line, e);
            };
            match err.field().and_then(|f| found.get(f as usize)) {
                Some(column) => at_line(path, line, format!("{column}: {}", err.kind())),
                None => at_line(path, line, err.kind()),
            }
        })?;
        all.push((line, row));
    }
}
