//! The models that trees are grown with, one file each.

mod blocks;
mod draft_lm;
mod eagle;
mod eagle3;
mod feature;
mod hass;
mod ids;
mod scylla;

use std::sync::Arc;

use scylla_core::Result;
use scylla_core::model::{Executor, Loaded, TokenLayers, WeightForm};
use scylla_core::plugin::{Committed, Matrix, Slot, Tap, TargetShape};

pub use draft_lm::DraftLm;
pub use eagle::{build as eagle_of, load as eagle};
pub use eagle3::{build as eagle3_of, load as eagle3};
pub use feature::{Body, Feature};
pub use hass::load as hass;
pub use ids::Ids;
pub use scylla::{build as scylla_of, load as scylla};

/// Nodes that a draft's cache has room for beside the target's context; a tree stops growing there.
pub const NODES: usize = 1024;

/// New nodes of one slot's tree.
#[derive(Debug, Clone)]
pub struct Nodes<'a> {
    /// Where.
    pub slot: Slot,
    /// Target ids.
    pub tokens: &'a [u32],
    /// For each the earlier node of this tree it follows, in the order they were forwarded; `None`: the root.
    pub parents: &'a [Option<usize>],
}

/// A model over draft ids that grows trees: committed rows stay in its cache, nodes only while a tree grows.
///
/// ```
/// use scylla_core::plugin::{Committed, DraftModel, Matrix, Request, Slot, Tap};
/// use scylla_draft::network::{Ids, Network, Nodes};
/// use scylla_draft::tree::{TreeDraft, TreeSettings};
///
/// /// Four tokens; after any text the higher id is the more probable.
/// struct Rising(Ids);
///
/// impl Rising {
///     fn rows(n: usize) -> Matrix {
///         Matrix::host([0.0, 1.0, 2.0, 3.0].repeat(n), 4)
///     }
/// }
///
/// impl Network for Rising {
///     fn taps(&self) -> Vec<Tap> {
///         Vec::new()
///     }
///     fn ids(&self) -> &Ids {
///         &self.0
///     }
///     fn step_bytes(&self) -> usize {
///         0
///     }
///     fn open(&mut self, _: Slot) -> scylla_core::Result<()> {
///         Ok(())
///     }
///     fn close(&mut self, _: Slot) {}
///     fn observe(&mut self, _: &Committed<'_>) -> scylla_core::Result<()> {
///         Ok(())
///     }
///     fn room(&self, _: Slot) -> Option<usize> {
///         Some(100)
///     }
///     fn start(&mut self, slots: &[Slot], logits: &mut Matrix) -> scylla_core::Result<()> {
///         *logits = Self::rows(slots.len());
///         Ok(())
///     }
///     fn expand(&mut self, nodes: &[Nodes<'_>], logits: &mut Matrix) -> scylla_core::Result<()> {
///         *logits = Self::rows(nodes.iter().map(|n| n.tokens.len()).sum());
///         Ok(())
///     }
/// }
///
/// // With a shape of trees it is a draft.
/// let mut draft = TreeDraft::new(Rising(Ids::same(4, 4)), &TreeSettings::default())?;
/// draft.open(0)?;
/// # use scylla_core::{chance::Seeded, sampling::Sampling, tree::Budget};
/// # let (sampling, mut chance) = (Sampling::default(), Seeded::new(0, 0));
/// let request = Request { slot: 0, root: 1, budget: Budget { total: 3, width: 2, depth: 0 }, sampling: &sampling, chance: &mut chance };
/// assert_eq!(draft.propose(&mut [request])?[0].tokens, [1, 3, 2]);
/// # Ok::<(), scylla_core::Error>(())
/// ```
pub trait Network: Send {
    /// Hidden states it wants with each committed position.
    fn taps(&self) -> Vec<Tap>;
    /// What the user should know of its files.
    fn notes(&self) -> &[String] {
        &[]
    }
    /// The ids it proposes among.
    fn ids(&self) -> &Ids;
    /// Bytes of weights that one step reads, the head included and embeddings not.
    fn step_bytes(&self) -> usize;
    /// Starts an empty sequence in a slot.
    fn open(&mut self, slot: Slot) -> Result<()>;
    /// Ends it; closing a slot that is not open does nothing.
    fn close(&mut self, slot: Slot);
    /// Opens slot `to` as if it had seen these tokens, which slot `from` begins with, and the features of all of them but
    /// the last. False, and nothing is opened, where it cannot, or `from` knows less.
    fn fork(&mut self, _from: Slot, _to: Slot, _tokens: &[u32]) -> Result<bool> {
        Ok(false)
    }
    /// Bytes that the cache of a slot takes which comes to hold so many positions.
    fn slot_bytes(&self, _positions: usize) -> usize {
        0
    }
    /// Gives back the memory of slots that were closed.
    fn trim(&mut self) {}
    /// Learns what became final.
    fn observe(&mut self, committed: &Committed<'_>) -> Result<()>;
    /// Nodes that may be forwarded while a tree grows in this slot; `None` where its cache has no room for the
    /// sequence any more.
    fn room(&self, slot: Slot) -> Option<usize>;
    /// Drops all nodes, brings the caches up to date in one forward, and writes the logits after the last committed
    /// token of each slot, `[slots, V_d]`, where the network is computed.
    fn start(&mut self, slots: &[Slot], logits: &mut Matrix) -> Result<()>;
    /// Forwards new nodes, all slots at once, and writes the logits after each `[nodes, V_d]`, slot by slot.
    fn expand(&mut self, nodes: &[Nodes<'_>], logits: &mut Matrix) -> Result<()>;
}

/// The target that a draft is made for, what it shares with it, and how it is held.
#[derive(Clone)]
pub struct DraftHost {
    /// What computes the target, and the draft beside it.
    pub executor: Arc<dyn Executor>,
    /// The target's embedding and head.
    pub tokens: TokenLayers,
    /// The target's sizes.
    pub target: TargetShape,
    /// Tokens the tokenizer knows; ids beyond are padding.
    pub known: usize,
    /// Form of the draft's own weights.
    pub weights: WeightForm,
    /// Target ids that the draft may propose, where its head is truncated.
    pub head: Option<Arc<[u32]>>,
}

impl DraftHost {
    /// A loaded target, of whose tokens all are known, for drafts whose weights are held as stored.
    pub fn of(target: &Loaded) -> Self {
        Self {
            executor: Arc::clone(&target.executor),
            tokens: target.tokens.clone(),
            target: target.model.shape(),
            known: target.config.vocab,
            weights: WeightForm::AsIs,
            head: None,
        }
    }
}
