//! The traits that targets, drafts, rules and budget policies implement, one file each.
//!
//! Each is object safe, batched, and small enough that a table of probabilities can stand in for a model, so
//! that rules are proved on the very code that decodes.

mod draft;
mod matrix;
mod policy;
mod rule;
mod target;

pub use draft::{Committed, DraftModel, Request};
pub use matrix::{Matrix, TopRows};
pub use policy::{BudgetPolicy, FixedBudget};
pub use rule::{TargetRows, Verdict, Verifier};
pub use target::{Forward, SlotRows, Step, Tap, TargetModel, TargetShape, Want};

use crate::Result;

/// The place of one sequence in the batch.
pub type Slot = usize;

/// Every random decision of drawing, accepting and sampling.
///
/// In production a counter-based generator; in a proof, a branch over all outcomes.
pub trait Chance {
    /// True with probability `p`, which is clamped to `0..=1`.
    fn coin(&mut self, p: f64) -> bool;
    /// An index with probability proportional to its weight.
    ///
    /// # Errors
    /// If no weight is positive, or one is negative or not finite.
    fn pick(&mut self, weights: &[f64]) -> Result<usize>;
}
