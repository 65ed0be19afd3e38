//! What can go wrong around an experiment.

use std::path::{Path, PathBuf};

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An error of a model, a draft, a rule or the loop.
    #[error(transparent)]
    Core(#[from] scylla_core::Error),
    /// An experiment that does not say what it should.
    #[error("experiment: {0}")]
    Experiment(String),
    /// A file that is not what it should be.
    #[error("{path}: {message}")]
    File {
        /// The file.
        path: PathBuf,
        /// What was expected and found.
        message: String,
    },
    /// Broken off by the user.
    #[error("interrupted{0}")]
    Interrupted(String),
}

impl Error {
    /// A file that is not what it should be.
    pub fn file(path: &Path, message: impl Into<String>) -> Self {
        Self::File {
            path: path.to_path_buf(),
            message: message.into(),
        }
    }

    /// For `map_err` on file operations.
    pub fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::file(path, source.to_string())
    }
}

impl From<candle_core::Error> for Error {
    fn from(e: candle_core::Error) -> Self {
        Self::Core(e.into())
    }
}

/// A result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;
