//! Draft models: what proposes tokens for a target to verify.
//!
//! One file per draft. A draft never verifies, and never runs a whole decode.

mod ngram;

pub use ngram::Ngram;
