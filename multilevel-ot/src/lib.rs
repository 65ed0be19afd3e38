//! Cross-tokenizer distillation by optimal transport (MultiLevelOT, arXiv:2412.14528), and what it is compared with.
//!
//! Aligners implement [`scylla_core::train::Aligner`]: a differentiable loss between a teacher's and a student's answers
//! over different vocabularies, one file each. Losses over logits are computed on plain numbers, in the student's precision,
//! with gradients written out; the parts of a loss carry their names and weights. This crate never decodes.

mod alm;
mod answer;
pub mod bytes;
mod chunks;
mod cross_entropy;
mod dskd;
mod gold;
mod loss;
mod matching;
mod mined;
mod multilevel_ot;
mod parallel;
mod reference_code;
mod rows;
mod scalar;
mod settings;
mod sorted;
mod top;
pub mod transport;
mod uld;
mod vocabulary;
mod x_token;

pub use alm::Alm;
pub use answer::IGNORED;
pub use cross_entropy::CrossEntropy;
pub use dskd::{Dskd, DskdSettings, Space};
pub use gold::{Gold, GoldSettings};
pub use mined::{MinEd, MinEdSettings};
pub use scalar::Scalar;
pub use settings::{Matching, Mode, MultiLevelOt, SinkhornForm};
pub use uld::Uld;
pub use vocabulary::{Nearest, Projection, Vocabulary, edits};
pub use x_token::{XToken, XTokenLoss, XTokenSettings};

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
    /// An error of candle.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// An error of the core crate.
    #[error(transparent)]
    Core(#[from] scylla_core::Error),
}

impl From<Error> for scylla_core::Error {
    fn from(e: Error) -> Self {
        match e {
            Error::Core(e) => e,
            Error::Candle(e) => e.into(),
            other => Self::Invalid(other.to_string()),
        }
    }
}
