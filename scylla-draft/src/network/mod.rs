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
