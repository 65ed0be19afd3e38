//! A standalone language model as draft (arXiv:2211.17192, 2302.01318): any model that can be a target, with the
//! target's tokenizer.

use std::collections::HashMap;

use scylla_core::plugin::{Committed, Matrix, Slot, SlotRows, Step, Tap, TargetModel, Want};
use scylla_core::{Error, Result};

use super::{Ids, Network, Nodes};

#[derive(Default)]
struct Sequence {
    committed: usize,
    /// Tokens that wait for a forward.
    tokens: Vec<u32>,
    /// Logits after the last committed token; empty before the first.
    last: Matrix,
    /// Whether the sequence has outgrown the model's context; it drafts no more then.
    full: bool,
}

/// A language model that drafts.
pub struct DraftLm {
    model: Box<dyn TargetModel>,
    bytes: usize,
    ids: Ids,
    /// Positions a slot holds, nodes included.
    positions: usize,
    slots: HashMap<Slot, Sequence>,
}

/// Tokens that wait for one forward: enough to be worth it.
const CHUNK: usize = 64;

impl DraftLm {
    /// A draft over `model`, whose weights take `bytes`, for a target of `vocab` tokens of which the tokenizer knows
    /// `known`.
    ///
    /// # Errors
    /// If the model has fewer rows of logits than the tokenizer has tokens.
    pub fn new(
        model: Box<dyn TargetModel>,
        bytes: usize,
        vocab: usize,
        known: usize,
    ) -> Result<Self> {
        let shape = model.shape();
        if shape.vocab < known {
            return Err(Error::Invalid(format!(
                "the draft model has a vocabulary of {}; its target's tokenizer has {known} tokens",
                shape.vocab
            )));
        }
        Ok(Self {
            ids: Ids::same(shape.vocab, known.min(vocab)),
            positions: shape.context,
            model,
            bytes,
            slots: HashMap::new(),
        })
    }

    /// Forwards what waits in these slots, all in one, and keeps the logits after each slot's last token.
    fn catch_up(&mut self, slots: &[Slot]) -> Result<()> {
        let mut rows = Vec::with_capacity(slots.len());
        for &slot in slots {
            self.model.commit(slot, &[])?;
            let s = self.slots.get(&slot).ok_or_else(|| closed(slot))?;
            if !s.tokens.is_empty() {
                rows.push(SlotRows {
                    slot,
                    tokens: &s.tokens,
                    parents: &[],
                    want: Want::Last,
                });
            }
        }
        if rows.is_empty() {
            return Ok(());
        }
        let moved: Vec<(Slot, usize)> = rows.iter().map(|r| (r.slot, r.tokens.len())).collect();
        let found = self.model.forward(&Step {
            slots: rows,
            taps: &[],
        })?;
        for ((slot, count), logits) in moved.into_iter().zip(&found.logits) {
            let path: Vec<usize> = (0..count).collect();
            self.model.commit(slot, &path)?;
            let s = self.slots.get_mut(&slot).ok_or_else(|| closed(slot))?;
            s.committed += count;
            s.tokens.clear();
            s.last.clear();
            s.last.append(&[logits], &[0])?;
        }
        Ok(())
    }
}

fn closed(slot: Slot) -> Error {
    Error::Invalid(format!("slot {slot} is not open"))
}

impl Network for DraftLm {
    fn taps(&self) -> Vec<Tap> {
        Vec::new()
    }

    fn ids(&self) -> &Ids {
        &self.ids
    }

    fn step_bytes(&self) -> usize {
        self.bytes
    }

    fn open(&mut self, slot: Slot) -> Result<()> {
        self.model.open(slot)?;
        self.slots.insert(slot, Sequence::default());
        Ok(())
    }

    fn close(&mut self, slot: Slot) {
        self.model.close(slot);
        self.slots.remove(&slot);
    }

    fn fork(&mut self, from: Slot, to: Slot, tokens: &[u32]) -> Result<bool> {
        let Some(source) = self.slots.get(&from).filter(|s| !s.full) else {
            return Ok(false);
        };
        // At least the last token is run again, which gives the logits after it.
        let rows = source.committed.min(tokens.len().saturating_sub(1));
        if !self.model.fork(from, to, rows)? {
            return Ok(false);
        }
        let sequence = Sequence {
            committed: rows,
            tokens: tokens[rows..].to_vec(),
            ..Sequence::default()
        };
        self.slots.insert(to, sequence);
        Ok(true)
    }

    fn slot_bytes(&self, positions: usize) -> usize {
        self.model.slot_bytes(positions.min(self.positions))
    }

    fn trim(&mut self) {
        self.model.trim();
    }

    fn observe(&mut self, committed: &Committed<'_>) -> Result<()> {
        let slot = committed.slot;
        let s = self.slots.get_mut(&slot).ok_or_else(|| closed(slot))?;
        s.full |= s.committed + s.tokens.len() + committed.tokens.len() > self.positions;
        if s.full {
            return Ok(());
        }
        let columns = self.ids.columns;
        if let Some(token) = committed.tokens.iter().find(|&&t| t as usize >= columns) {
            return Err(Error::Invalid(format!(
                "token {token} is outside the draft model's vocabulary of {columns}"
            )));
        }
        s.tokens.extend_from_slice(committed.tokens);
        match s.tokens.len() >= CHUNK {
            true => self.catch_up(&[slot]),
            false => Ok(()),
        }
    }

    fn room(&self, slot: Slot) -> Option<usize> {
        let s = self.slots.get(&slot).filter(|s| !s.full)?;
        Some(self.positions - s.committed - s.tokens.len())
    }

    fn start(&mut self, slots: &[Slot], logits: &mut Matrix) -> Result<()> {
        self.catch_up(slots)?;
        logits.clear();
        for slot in slots {
            let s = self.slots.get(slot).ok_or_else(|| closed(*slot))?;
            if s.last.rows() == 0 {
                return Err(Error::Invalid(format!(
                    "slot {slot} is asked for a tree before it saw a token"
                )));
            }
            logits.append(&[&s.last], &[0])?;
        }
        Ok(())
    }

    fn expand(&mut self, nodes: &[Nodes<'_>], logits: &mut Matrix) -> Result<()> {
        let rows = nodes.iter().map(|n| SlotRows {
            slot: n.slot,
            tokens: n.tokens,
            parents: n.parents,
            want: Want::All,
        });
        let found = self.model.forward(&Step {
            slots: rows.collect(),
            taps: &[],
        })?;
        logits.clear();
        for rows in &found.logits {
            let all: Vec<usize> = (0..rows.rows()).collect();
            logits.append(&[rows], &all)?;
        }
        self.model.recycle(found);
        Ok(())
    }
}
