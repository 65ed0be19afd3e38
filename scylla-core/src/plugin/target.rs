//! The language model being accelerated.

use super::{Matrix, Slot};
use crate::{Error, Result};

/// A hidden state that a target hands out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Tap {
    /// The state that enters layer `i` (0-based; layer 0's is the embedding, layer L's the last output).
    Input(usize),
    /// The last state after the final norm.
    Final,
}

/// Rows whose logits are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want<'a> {
    /// None: rows that only fill the cache.
    None,
    /// The last row.
    Last,
    /// All of them.
    All,
    /// These rows, in this order.
    Rows(&'a [usize]),
}

impl Want<'_> {
    /// The rows meant, of `n`.
    ///
    /// # Errors
    /// If one lies beyond them.
    pub fn of(&self, n: usize) -> Result<Vec<usize>> {
        match *self {
            Self::None => Ok(Vec::new()),
            Self::Last => Ok((n.saturating_sub(1)..n).collect()),
            Self::All => Ok((0..n).collect()),
            Self::Rows(rows) => match rows.iter().find(|&&row| row >= n) {
                Some(row) => Err(Error::Invalid(format!("logits of row {row} of {n}"))),
                None => Ok(rows.to_vec()),
            },
        }
    }
}

/// Rows to append to one slot.
#[derive(Debug, Clone)]
pub struct SlotRows<'a> {
    /// Where.
    pub slot: Slot,
    /// The tokens `[N]`.
    pub tokens: &'a [u32],
    /// For each row the earlier row it follows, counted over all rows of the slot that wait for a commit (those of
    /// earlier forwards first); `None` follows the last committed position. An empty list means a chain behind that
    /// position. Positions follow from it: committed length plus depth.
    pub parents: &'a [Option<usize>],
    /// Logits to return.
    pub want: Want<'a>,
}

/// One forward pass over any number of slots.
#[derive(Debug, Clone)]
pub struct Step<'a> {
    /// The rows, slot by slot; a slot appears at most once.
    pub slots: Vec<SlotRows<'a>>,
    /// Hidden states to return, for every row.
    pub taps: &'a [Tap],
}

/// What a forward pass returns: one entry per slot of the step, in its order.
#[derive(Debug, Clone)]
pub struct Forward {
    /// Logits `[rows asked for, V]`.
    pub logits: Vec<Matrix>,
    /// For each slot one matrix `[N, H]` per tap.
    pub taps: Vec<Vec<Matrix>>,
}

/// The language model being accelerated.
///
/// A slot holds committed positions; `forward` appends rows after them and after rows that wait already (so a tree
/// may be run level by level), and `commit` keeps some of those rows.
pub trait TargetModel {
    /// Starts an empty sequence in a slot.
    fn open(&mut self, slot: Slot) -> Result<()>;
    /// Ends it; closing a slot that is not open does nothing.
    fn close(&mut self, slot: Slot);
    /// Runs rows through the model. They stay in the cache until the next `commit` of their slot.
    fn forward(&mut self, step: &Step<'_>) -> Result<Forward>;
    /// Keeps the waiting rows that are listed (a path from a first row, in order) and drops the rest.
    fn commit(&mut self, slot: Slot, path: &[usize]) -> Result<()>;
    /// Sizes that drafts and the loop need.
    fn shape(&self) -> TargetShape;
    /// Takes back what a forward handed out, when nobody needs it any more: its memory may serve the next one.
    fn recycle(&mut self, _: Forward) {}
}

/// Sizes of a target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetShape {
    /// V of the logits.
    pub vocab: usize,
    /// H of the taps.
    pub hidden: usize,
    /// L.
    pub layers: usize,
    /// Positions a slot can hold.
    pub context: usize,
}
