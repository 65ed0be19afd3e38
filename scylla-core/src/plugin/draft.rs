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
///
/// ```
/// use scylla_core::plugin::{Committed, DraftModel, Request, Slot};
/// use scylla_core::sampling::Sampling;
/// use scylla_core::tree::{Drawing, Tree};
///
/// /// Proposes that the last token is repeated.
/// struct Echo;
///
/// impl DraftModel for Echo {
///     fn drawing(&self, _: &Sampling) -> Drawing {
///         Drawing::Deterministic // point masses: no q is needed
///     }
///     fn open(&mut self, _: Slot) -> scylla_core::Result<()> {
///         Ok(())
///     }
///     fn close(&mut self, _: Slot) {}
///     fn observe(&mut self, _: &[Committed<'_>]) -> scylla_core::Result<()> {
///         Ok(())
///     }
///     fn propose(&mut self, requests: &mut [Request<'_>]) -> scylla_core::Result<Vec<Tree>> {
///         let chain = |r: &mut Request<'_>| {
///             let length = r.budget.levels().min(r.budget.total - 1);
///             Ok(Tree::chain(r.root, &vec![r.root; length]))
///         };
///         requests.iter_mut().map(chain).collect()
///     }
/// }
///
/// # use scylla_core::{chance::Seeded, tree::Budget};
/// let (sampling, mut chance) = (Sampling::default(), Seeded::new(0, 0));
/// let request = Request { slot: 0, root: 7, budget: Budget::chain(2), sampling: &sampling, chance: &mut chance };
/// assert_eq!(Echo.propose(&mut [request])?[0].tokens, [7, 7, 7]);
/// # Ok::<(), scylla_core::Error>(())
/// ```
pub trait DraftModel: Send {
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
    /// Proposes one tree per request, within its budget, rooted at its root. Where it fails for several it is asked again
    /// for each of them alone, so that one slot's error stays its own.
    fn propose(&mut self, requests: &mut [Request<'_>]) -> Result<Vec<Tree>>;
    /// Opens slot `to` as if it had seen these tokens, which slot `from` begins with, and the features of all of them but
    /// the last. False, and nothing is opened, where a draft cannot; one that wants no taps is told the tokens instead.
    fn fork(&mut self, _from: Slot, _to: Slot, _tokens: &[u32]) -> Result<bool> {
        Ok(false)
    }
    /// Bytes that the cache of a slot takes which comes to hold so many positions; 0 where none are counted.
    fn slot_bytes(&self, _positions: usize) -> usize {
        0
    }
    /// Gives back the memory that is kept of slots that were closed.
    fn trim(&mut self) {}
}

/// The same draft, borrowed or boxed.
macro_rules! forwarded {
    ($($kind:ty),+) => {$(
        impl<T: DraftModel + ?Sized> DraftModel for $kind {
            fn taps(&self) -> Vec<Tap> {
                (**self).taps()
            }
            fn drawing(&self, sampling: &Sampling) -> Drawing {
                (**self).drawing(sampling)
            }
            fn open(&mut self, slot: Slot) -> Result<()> {
                (**self).open(slot)
            }
            fn close(&mut self, slot: Slot) {
                (**self).close(slot);
            }
            fn observe(&mut self, committed: &[Committed<'_>]) -> Result<()> {
                (**self).observe(committed)
            }
            fn propose(&mut self, requests: &mut [Request<'_>]) -> Result<Vec<Tree>> {
                (**self).propose(requests)
            }
            fn fork(&mut self, from: Slot, to: Slot, tokens: &[u32]) -> Result<bool> {
                (**self).fork(from, to, tokens)
            }
            fn slot_bytes(&self, positions: usize) -> usize {
                (**self).slot_bytes(positions)
            }
            fn trim(&mut self) {
                (**self).trim();
            }
        }
    )+};
}

forwarded!(&mut T, Box<T>);
