//! What drafts and aligners are told when they are made from their settings in an experiment.

use std::path::{Path, PathBuf};

use multilevel_ot::{Space, Vocabulary};
use scylla_core::model::ModelFiles;
use scylla_core::plugin::TargetShape;
use scylla_core::text::Tokenizer;
use serde::de::DeserializeOwned;

use crate::{Error, Result, Session};

/// What a draft may want to know when it is made.
pub struct DraftContext<'a> {
    /// Sizes of the target.
    pub target: TargetShape,
    /// The draft's weights, where some were given: a directory, a file, or a hub id.
    pub dir: Option<PathBuf>,
    /// Whether the decoder's rule takes trees that are drawn at random.
    pub drawn: bool,
    /// The loaded target.
    pub session: &'a Session,
}

impl DraftContext<'_> {
    /// Sha256 of the target, computed when first asked for.
    ///
    /// # Errors
    /// If its files cannot be read any more.
    pub fn target_hash(&self) -> Result<&str> {
        self.session.target_hash()
    }
}

/// What an aligner may want to know when it is made.
#[derive(Default)]
pub struct AlignerContext {
    /// Tokenizers of student and teacher.
    pub tokenizers: Option<(Tokenizer, Tokenizer)>,
    /// Heads and embeddings of student and teacher, made where they are asked for.
    pub spaces: Option<Spaces>,
}

/// Makes the heads and embeddings of student and teacher.
pub type Spaces = Box<dyn Fn() -> Result<(Space, Space)>>;

impl AlignerContext {
    pub(crate) fn tokenizers(&self, name: &str) -> Result<(&Tokenizer, &Tokenizer)> {
        let missing = || {
            Error::Experiment(format!(
                "aligner `{name}` needs both tokenizers: --student-tokenizer and --teacher-tokenizer"
            ))
        };
        let both = self.tokenizers.as_ref().ok_or_else(missing)?;
        Ok((&both.0, &both.1))
    }

    pub(crate) fn vocabularies(&self, name: &str) -> Result<(Vocabulary, Vocabulary)> {
        let (student, teacher) = self.tokenizers(name)?;
        Ok((Vocabulary::of(student), Vocabulary::of(teacher)))
    }
}

/// The tokenizer of a folder, with a model or without, or of a GGUF file.
///
/// # Errors
/// If there is none.
pub(crate) fn tokenizer_at(path: &Path) -> Result<Tokenizer> {
    if path.is_dir() && path.join("tokenizer.json").is_file() {
        return Ok(Tokenizer::from_dir(path)?);
    }
    let found = Tokenizer::of_model(&ModelFiles::open(path)?)?;
    found.ok_or_else(|| Error::file(path, "holds no tokenizer"))
}

/// Reads the settings that stand beside a name in an experiment.
pub fn parse<T: DeserializeOwned>(what: &str, settings: toml::Table) -> Result<T> {
    T::deserialize(settings).map_err(|e| Error::Experiment(format!("[{what}]: {}", e.message())))
}
