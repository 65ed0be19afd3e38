//! The model or method that proposes.

use super::{Chance, Matrix, Slot, Tap};
use crate::Result;
use crate::sampling::Sampling;
use crate::tree::{Budget, Drawing, Tree};

/// What became final in a slot since the draft last heard of it.
///
/// Tokens run one ahead of features: the root of the next tree is known before it is forwarded. Feature `i` of
/// a sequence belongs with token `i + 1`.
#[derive(Debug, Clone)]
pub struct Committed<'a> {
    /// Where.
    pub slot: Slot,
    /// Newly final tokens, in order.
    pub tokens: &'a [u32],
    /// Rows of `taps` that were kept, in order: the newly forwarded positions.
    pub path: &'a [usize],
    /// One matrix per tap of [`DraftModel::taps`].
    pub taps: &'a [Matrix],
}

/// What is asked of a draft for one slot.
pub struct Request<'a> {
    /// Where.
    pub slot: Slot,
    /// The last committed token, root of the tree.
    pub root: u32,
    /// Limits of the tree.
    pub budget: Budget,
    /// The transform that p passes through; q must pass through the same.
    pub sampling: &'a Sampling,
    /// The slot's random stream.
    pub chance: &'a mut dyn Chance,
}

/// The model or method that proposes.
pub trait DraftModel {
    /// Hidden states it wants with each committed position.
    fn taps(&self) -> Vec<Tap> {
        Vec::new()
    }
    /// How its trees are drawn under a sampling setting; decides which rules are exact for it.
    fn drawing(&self, sampling: &Sampling) -> Drawing;
    /// Starts an empty sequence in a slot.
    fn open(&mut self, slot: Slot) -> Result<()>;
    /// Ends it; closing a slot that is not open does nothing.
    fn close(&mut self, slot: Slot);
    /// Learns what became final.
    fn observe(&mut self, committed: &[Committed<'_>]) -> Result<()>;
    /// Proposes one tree per request, within its budget, rooted at its root.
    fn propose(&mut self, requests: &mut [Request<'_>]) -> Result<Vec<Tree>>;
}
