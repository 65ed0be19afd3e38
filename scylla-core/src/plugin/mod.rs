//! The traits that targets, drafts, rules and budget policies implement, one file each.
//!
//! Each is object safe, batched, and small enough that a table of probabilities can stand in for a model, so
//! that rules are proved on the very code that decodes.

mod draft;
mod matrix;
mod packed;
mod policy;
mod rule;
mod target;

pub use draft::{Candidates, Committed, DraftModel, Price, Request};
pub use matrix::{Matrix, TopRows};
pub use packed::PackedRows;
pub use policy::{BudgetPolicy, Drafting, Outlook};
pub use rule::{Rules, TargetRows, Verdict, Verifier};
pub use target::{Forward, SlotRows, Step, Tap, TargetModel, TargetShape, Want};

use crate::Result;

/// The place of one sequence in the batch.
pub type Slot = usize;

/// Every random decision of drawing, accepting and sampling.
///
/// In production a counter-based generator; in a proof, a branch over all outcomes.
///
/// ```
/// use scylla_core::chance::{Seeded, enumerate};
/// use scylla_core::plugin::Chance;
///
/// fn heads(chance: &mut dyn Chance) -> scylla_core::Result<usize> {
///     Ok(usize::from(chance.coin(0.5)) + chance.pick(&[1.0, 3.0])?)
/// }
///
/// assert!(heads(&mut Seeded::new(0, 0))? <= 2); // one way it can fall
/// let mut both = 0.0;
/// enumerate(heads, |p, heads| if heads == 2 { both += p })?; // all of them
/// assert_eq!(both, 0.375);
/// # Ok::<(), scylla_core::Error>(())
/// ```
pub trait Chance {
    /// True with probability `p`, which is clamped to `0..=1`.
    fn coin(&mut self, p: f64) -> bool;
    /// An index with probability proportional to its weight.
    ///
    /// # Errors
    /// If no weight is positive, or one is negative or not finite.
    fn pick(&mut self, weights: &[f64]) -> Result<usize>;
}
