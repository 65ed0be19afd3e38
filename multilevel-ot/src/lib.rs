//! Cross-tokenizer distillation by optimal transport (MultiLevelOT, arXiv:2412.14528).
//!
//! Aligners implement [`scylla_core::plugin::Aligner`]: a differentiable loss between a teacher's and a student's
//! answer logits over different vocabularies. This crate never decodes. It holds its error type; no aligner is
//! implemented yet.

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
