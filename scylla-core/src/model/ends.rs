//! The ends of a target, embedding and head, which its drafts share.

use std::sync::Arc;

use super::cpu::Held;
use super::stack::Weights;
use super::{LoadOptions, ModelConfig, ModelFiles};
use crate::kernels::{Linear, Weight};
use crate::{Error, Result};

/// A target's embedding and head on the CPU. Cloning shares the weights.
#[derive(Clone)]
pub struct Ends {
    /// V.
    pub vocab: usize,
    /// H.
    pub hidden: usize,
    /// Absent where the head's weight is the embedding.
    table: Option<Arc<Weight>>,
    head: Arc<Linear>,
}

impl Ends {
    /// Reads those of a model's files, for drafts of a target that holds its own elsewhere.
    pub fn open(files: &ModelFiles, options: &LoadOptions) -> Result<Self> {
        Self::read(&Held { files, options }, &files.config)
    }

    /// Reads them with Hugging Face names.
    pub fn read(from: &dyn Weights, c: &ModelConfig) -> Result<Self> {
        let (vocab, hidden) = (c.vocab, c.hidden);
        let table = from.matrix("model.embed_tokens.weight", vocab, hidden)?;
        let (table, head) = match c.tied {
            true => (None, Linear::new(table, None)),
            false => {
                let head = from.linear("lm_head", vocab, hidden, false)?;
                (Some(Arc::new(table)), head)
            }
        };
        Ok(Self {
            vocab,
            hidden,
            table,
            head: Arc::new(head.settled()),
        })
    }

    /// The head `[V, H]`.
    pub fn head(&self) -> &Arc<Linear> {
        &self.head
    }

    /// The embedding `[V, H]`.
    pub fn table(&self) -> &Weight {
        match &self.table {
            Some(table) => table,
            None => &self.head.weights()[0],
        }
    }

    /// Writes the embedding of a token `[H]`.
    pub fn embed(&self, token: u32, out: &mut [f32]) -> Result<()> {
        if token as usize >= self.vocab {
            return Err(Error::Invalid(format!(
                "token {token} outside the vocabulary of {}",
                self.vocab
            )));
        }
        self.table().row(token as usize, out);
        Ok(())
    }

    /// The head's rows of the listed tokens, in that order: a frequency-truncated head (FR-Spec, arXiv:2502.14856).
    ///
    /// # Errors
    /// If an id lies outside the vocabulary.
    pub fn head_rows(&self, ids: &[u32]) -> Result<Linear> {
        if let Some(id) = ids.iter().find(|&&id| id as usize >= self.vocab) {
            return Err(Error::Invalid(format!(
                "token {id} of a truncated head is outside the vocabulary of {}",
                self.vocab
            )));
        }
        Ok(Linear::new(self.head.weights()[0].rows(ids), None).settled())
    }

    /// Bytes of weights held.
    pub fn bytes(&self) -> usize {
        self.weights().map(Weight::bytes).sum()
    }

    /// The weights, each once.
    pub fn weights(&self) -> impl Iterator<Item = &Weight> {
        self.head.weights().iter().chain(self.table.as_deref())
    }
}
