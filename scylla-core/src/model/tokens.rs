//! What lies between tokens and hidden states: a target's embedding and head, which its drafts share.

use std::sync::Arc;

use super::ModelConfig;
use super::executor::{Executor, Forms, WeightMatrix};
use super::files::Weights;
use crate::plugin::Matrix;
use crate::{Error, Result};

/// Name of the embedding's weight.
pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";
/// Name of the head's weight.
pub(crate) const HEAD: &str = "lm_head.weight";

/// A target's embedding and head. Cloning shares the weights.
#[derive(Clone)]
pub struct TokenLayers {
    /// V.
    pub vocab: usize,
    /// H.
    pub hidden: usize,
    /// `[V, H]`
    pub embedding: Arc<dyn WeightMatrix>,
    /// `[V, H]`; the same where the two are tied.
    pub head: Arc<dyn WeightMatrix>,
    /// Bytes of f32 that the embedding holds beside its weight.
    table: usize,
}

impl TokenLayers {
    /// Reads them with Hugging Face names.
    pub fn read(executor: &dyn Executor, from: &dyn Weights, c: &ModelConfig) -> Result<Self> {
        let shape = [c.vocab, c.hidden];
        let embedding = executor.weight(from, "model.embed_tokens", shape, false)?;
        Ok(Self {
            vocab: c.vocab,
            hidden: c.hidden,
            table: embedding.prepare_rows()?,
            head: match c.tied {
                true => Arc::clone(&embedding),
                false => executor.weight(from, "lm_head", shape, false)?,
            },
            embedding,
        })
    }

    /// Writes the embeddings of tokens `[M, H]`.
    ///
    /// # Errors
    /// If a token is outside the vocabulary.
    pub fn embed(&self, tokens: &[u32], out: &mut Matrix) -> Result<()> {
        self.embedding.rows(tokens, out)
    }

    /// The head's rows of the listed tokens, in that order: a frequency-truncated head (FR-Spec, arXiv:2502.14856).
    ///
    /// # Errors
    /// If an id lies outside the vocabulary.
    pub fn cut_head(&self, ids: &[u32]) -> Result<Arc<dyn WeightMatrix>> {
        if let Some(id) = ids.iter().find(|&&id| id as usize >= self.vocab) {
            return Err(Error::Invalid(format!(
                "token {id} of a truncated head is outside the vocabulary of {}",
                self.vocab
            )));
        }
        self.head.cut(ids)
    }

    /// Adds the bytes of weights held, each weight once.
    pub fn count(&self, forms: &mut Forms) {
        self.head.count(forms);
        if !Arc::ptr_eq(&self.head, &self.embedding) {
            self.embedding.count(forms);
        }
        if self.table > 0 {
            *forms.entry("f32").or_default() += self.table;
        }
    }
}
