//! Draft models: what proposes tokens for a target to verify.
//!
//! One file per draft. Networks ([`network`]) and the trees they grow ([`tree`]) are apart, so any network may grow any
//! tree. A draft never verifies, and never runs a whole decode.

pub mod checkpoint;
pub mod network;
pub mod recipe;
pub mod tree;

mod hybrid;
mod ngram;
mod suffix;

pub use hybrid::Hybrid;
pub use ngram::Ngram;
pub use suffix::Suffix;
