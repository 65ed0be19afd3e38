//! What can go wrong, with what to do about it.

use std::path::{Path, PathBuf};

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or directory could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file was read and is not what it should be.
    #[error("{path}: {message}")]
    File {
        /// The file.
        path: PathBuf,
        /// What was expected and found.
        message: String,
    },
    /// A tensor is missing or has another shape or type.
    #[error("{path}: tensor `{tensor}`: expected {expected}, found {found}")]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// What was expected.
        expected: String,
        /// What is there.
        found: String,
    },
    /// Something this version does not do.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// A value outside its range.
    #[error("{0}")]
    Invalid(String),
    /// A name that is not known, with the known ones.
    #[error("unknown {what} `{name}`; known: {known}")]
    Unknown {
        /// What kind of thing was named.
        what: &'static str,
        /// The name.
        name: String,
        /// The names there are.
        known: String,
    },
    /// A draft's proposals cannot be verified exactly by the rule.
    #[error(
        "rule `{rule}` is not exact for {proposals} as draft `{draft}` proposes them; choose another rule or say lossy = true"
    )]
    NotExact {
        /// The rule.
        rule: String,
        /// The draft.
        draft: String,
        /// How its trees are drawn.
        proposals: String,
    },
    /// A rule that would change the law even where nothing is drafted.
    #[error(
        "rule `{rule}` does not sample at temperature {temperature}: even without a draft, and for the first token of every answer, \
         it would decode otherwise than the target; choose another rule (`auto` chooses one) or say lossy = true"
    )]
    NotSampling {
        /// The rule.
        rule: String,
        /// The temperature asked for.
        temperature: f64,
    },
    /// Something could not be fetched.
    #[error("{0}")]
    Fetch(String),
    /// candle's own error.
    #[error("{}", without_trace(.0))]
    Candle(#[from] candle_core::Error),
}

/// What a candle error says, without the stack trace that it carries where RUST_BACKTRACE is set.
fn without_trace(error: &candle_core::Error) -> String {
    use candle_core::Error as E;
    match error {
        E::WithBacktrace { inner, .. } => without_trace(inner),
        E::WithPath { inner, path } => format!("{}: {}", path.display(), without_trace(inner)),
        E::Context { inner, context } => format!("{context}: {}", without_trace(inner)),
        other => other.to_string(),
    }
}

impl Error {
    /// For `map_err` on file operations.
    pub fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Io {
            path: path.to_path_buf(),
            source,
        }
    }

    /// A file that is not what it should be.
    pub fn file(path: &Path, message: impl Into<String>) -> Self {
        Self::File {
            path: path.to_path_buf(),
            message: message.into(),
        }
    }

    /// An unknown name among known ones.
    pub fn unknown<'a>(
        what: &'static str,
        name: &str,
        known: impl IntoIterator<Item = &'a str>,
    ) -> Self {
        Self::Unknown {
            what,
            name: name.to_string(),
            known: known.into_iter().collect::<Vec<_>>().join(", "),
        }
    }
}

/// A result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;
