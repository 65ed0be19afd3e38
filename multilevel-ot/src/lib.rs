//! Cross-tokenizer distillation by optimal transport (MultiLevelOT, arXiv:2412.14528).
//!
//! Aligners will implement [`scylla_core::plugin::Aligner`]: a differentiable loss between a teacher's and a student's
//! answer logits over different vocabularies. This crate never decodes. It holds what aligners stand on: entropic optimal
//! transport with its gradients, and groups of tokens that cover the same bytes. No aligner is implemented yet.

pub mod bytes;
pub mod transport;

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// An error of an alignment loss.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Inputs whose shapes do not fit together.
    #[error("{what}: expected {expected}, found {found}")]
    Shape {
        /// The input.
        what: &'static str,
        /// Expected shape.
        expected: String,
        /// Shape found.
        found: String,
    },
    /// A value outside its range.
    #[error("{0}")]
    Invalid(String),
    /// An error of the core crate.
    #[error(transparent)]
    Core(#[from] scylla_core::Error),
}
