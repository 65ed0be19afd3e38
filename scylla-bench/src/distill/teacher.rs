//! What the teacher says of answers. It reads its own tokens and no others.

use std::path::PathBuf;

use candle_core::Tensor;
use scylla_core::Target;
use scylla_core::assets::{self, OnProgress};
use scylla_core::model::{LoadOptions, Loaded, ModelFiles, TokenLayers};
use scylla_core::plugin::{Matrix, Tap};
use scylla_core::text::Tokenizer;
use scylla_core::train::graph::{Compute, Head};

use super::pairs::{Pair, packed};
use crate::{Error, Result};

/// A model that teaches.
pub struct Teacher {
    loaded: Loaded,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its head, as products take it.
    head: Option<Head>,
    /// What the user should know of its files.
    pub notes: Vec<String>,
    /// Where its files lie.
    pub path: PathBuf,
    /// Sha256 of its files.
    pub hash: String,
}

/// What it makes of some answers: its final states, and where each answer's tokens begin.
pub struct Read {
    pub(super) states: Matrix,
    pub(super) begins: Vec<usize>,
}

impl Teacher {
    /// Loads a model: `default`, a path, or a hub id.
    ///
    /// # Errors
    /// If it cannot be loaded, or has no tokenizer.
    pub fn open(model: &str, options: &LoadOptions, on_progress: OnProgress<'_>) -> Result<Self> {
        let path = assets::resolve(model, on_progress)?;
        let files = ModelFiles::open(&path)?;
        let target = Target::of_files(&files, options)?;
        let Some(tokenizer) = target.tokenizer else {
            return Err(Error::Experiment(format!(
                "the teacher has no tokenizer. {}",
                target.no_tokenizer
            )));
        };
        Ok(Self {
            loaded: target.loaded,
            tokenizer,
            head: None,
            notes: target.notes,
            hash: assets::hash_files(&files.files())?,
            path,
        })
    }

    /// Its model.
    pub fn loaded(&self) -> &Loaded {
        &self.loaded
    }

    /// Its embedding and head.
    pub fn tokens(&self) -> &TokenLayers {
        &self.loaded.tokens
    }

    /// Columns that belong to tokens.
    pub fn known(&self) -> usize {
        self.tokenizer.size().min(self.loaded.config.vocab)
    }

    /// Runs answers behind their prompts.
    ///
    /// # Errors
    /// If one is longer than its context.
    pub fn read(&mut self, pairs: &[&Pair]) -> Result<Read> {
        let (rows, tokens, begins) = packed(pairs.iter().map(|p| &p.teacher))?;
        let mut states = self.loaded.model.states(&tokens, &rows, &[Tap::Final])?;
        let none = || Error::Experiment("the teacher gave no states".into());
        Ok(Read {
            states: states.pop().ok_or_else(none)?,
            begins,
        })
    }

    /// Logits of some rows of its states `[rows, V]`.
    ///
    /// # Errors
    /// If its head does not fit into memory.
    pub fn logits(&mut self, on: &Compute, states: &Matrix, rows: &[usize]) -> Result<Matrix> {
        let head = match &self.head {
            Some(head) => head.clone(),
            None => {
                let all: Vec<u32> = (0..self.loaded.config.vocab as u32).collect();
                let mut weight = Matrix::default();
                self.loaded.tokens.head.rows(&all, &mut weight)?;
                let head = Head::frozen(on, on.bring(&weight)?)?;
                self.head.insert(head).clone()
            }
        };
        let chosen = on.bring(&chosen(states, rows)?)?;
        Ok(head.logits(on, &chosen)?)
    }
}

/// Rows of a matrix.
pub(super) fn chosen(from: &Matrix, rows: &[usize]) -> Result<Matrix> {
    if from.is_on_device() {
        let ids: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
        let all = from.tensor()?;
        let ids = Tensor::from_vec(ids, rows.len(), all.device())?;
        return Ok(Matrix::device(all.index_select(&ids, 0)?)?);
    }
    let (values, width) = (from.values()?, from.columns);
    let row = |&row: &usize| &values[row * width..][..width];
    Ok(Matrix::host(
        rows.iter().flat_map(row).copied().collect(),
        width,
    ))
}
