//! What every draft that reads the target's hidden states does: pairing features with tokens, keeping committed rows,
//! and feeding its own states back while a tree grows.
//!
//! Row `i` of a sequence pairs feature `f_i` with token `x_{i+1}` at draft position `i`; a node of depth `d` below a
//! root at position `n` is forwarded at `n + d - 1` with the state of its parent as feature (the root's children: the
//! state of the last committed row).

use std::collections::HashMap;

use scylla_core::model::{CpuStack, Rows};
use scylla_core::plugin::{Committed, Slot, Tap};
use scylla_core::{Error, Result};

use super::{Ids, NODES, Network, Nodes};

/// One network: from (feature, token) rows to states, and from states to logits. `M` rows, `F` values of the
/// target's features, `H` of the state that recurs.
pub trait Body: Send {
    /// Hidden states of the target that make up a feature, side by side.
    fn taps(&self) -> &[Tap];
    /// `F`.
    fn feature_width(&self) -> usize;
    /// `H`.
    fn hidden(&self) -> usize;
    /// The ids it proposes among.
    fn ids(&self) -> &Ids;
    /// Bytes of weights that one step reads.
    fn step_bytes(&self) -> usize;
    /// Its decoder layers.
    fn stack(&mut self) -> &mut CpuStack;
    /// Brings target features `[M, F]` to the width that recurs, `[M, H]`.
    fn project(&mut self, features: &[f32], out: &mut Vec<f32>) -> Result<()>;
    /// Runs rows, features `[M, H]` beside tokens `[M]`, and writes the states that recur `[M, H]`.
    fn run(
        &mut self,
        rows: &[Rows<'_>],
        features: &[f32],
        tokens: &[u32],
        out: &mut Vec<f32>,
    ) -> Result<()>;
    /// Writes the logits `[M, V_d]` of states `[M, H]`.
    fn logits(&mut self, states: &[f32], out: &mut Vec<f32>) -> Result<()>;
}

/// Rows that wait for one forward: enough to be worth it, few enough to be no memory.
const CHUNK: usize = 64;

#[derive(Default)]
struct Sequence {
    /// Whether the first token, which belongs to no row, went by.
    begun: bool,
    /// Rows in the cache.
    committed: usize,
    /// Features `[., F]` and tokens that wait; features may be one ahead.
    features: Vec<f32>,
    tokens: Vec<u32>,
    /// State of the last committed row `[H]`; empty before the first.
    last: Vec<f32>,
    /// States of the nodes of the tree that grows `[., H]`.
    nodes: Vec<f32>,
}

/// A feature draft's network over any number of slots.
pub struct Feature<B> {
    body: B,
    /// Positions a slot holds beside nodes.
    positions: usize,
    notes: Vec<String>,
    slots: HashMap<Slot, Sequence>,
    features: Vec<f32>,
    projected: Vec<f32>,
    states: Vec<f32>,
    tokens: Vec<u32>,
}

impl<B: Body> Feature<B> {
    /// A network whose stack holds `positions` committed rows and [`NODES`] nodes.
    pub fn new(body: B, positions: usize) -> Self {
        Self {
            body,
            positions,
            notes: Vec::new(),
            slots: HashMap::new(),
            features: Vec::new(),
            projected: Vec::new(),
            states: Vec::new(),
            tokens: Vec::new(),
        }
    }

    /// The same, with what the user should know of its files.
    pub fn noting(self, notes: Vec<String>) -> Self {
        Self { notes, ..self }
    }

    /// State of a slot's last committed row `[H]`, and those of the nodes forwarded since `[., H]`.
    pub fn states(&self, slot: Slot) -> Option<(&[f32], &[f32])> {
        let s = self.slots.get(&slot)?;
        Some((&s.last, &s.nodes))
    }

    fn sequence(&mut self, slot: Slot) -> Result<&mut Sequence> {
        let closed = || Error::Invalid(format!("slot {slot} is not open"));
        self.slots.get_mut(&slot).ok_or_else(closed)
    }

    /// Runs the whole rows that wait in these slots, in one forward, and commits them.
    fn catch_up(&mut self, slots: &[Slot]) -> Result<()> {
        let width = self.body.feature_width();
        self.features.clear();
        self.tokens.clear();
        let mut counts = Vec::with_capacity(slots.len());
        for &slot in slots {
            let closed = || Error::Invalid(format!("slot {slot} is not open"));
            let s = self.slots.get_mut(&slot).ok_or_else(closed)?;
            s.nodes.clear();
            let count = s.tokens.len().min(s.features.len() / width);
            self.features.extend(s.features.drain(..count * width));
            self.tokens.extend(s.tokens.drain(..count));
            self.body.stack().commit(slot, &[])?;
            if count > 0 {
                counts.push((slot, count));
            }
        }
        if counts.is_empty() {
            return Ok(());
        }
        let rows: Vec<Rows<'_>> = counts
            .iter()
            .map(|&(slot, count)| Rows {
                slot,
                count,
                parents: &[],
            })
            .collect();
        self.body.project(&self.features, &mut self.projected)?;
        self.body
            .run(&rows, &self.projected, &self.tokens, &mut self.states)?;
        let hidden = self.body.hidden();
        let mut end = 0;
        for (slot, count) in counts {
            end += count;
            let path: Vec<usize> = (0..count).collect();
            self.body.stack().commit(slot, &path)?;
            let last = self.states[(end - 1) * hidden..end * hidden].to_vec();
            let s = self.sequence(slot)?;
            s.committed += count;
            s.last = last;
        }
        Ok(())
    }
}

impl<B: Body> Network for Feature<B> {
    fn taps(&self) -> Vec<Tap> {
        self.body.taps().to_vec()
    }

    fn notes(&self) -> &[String] {
        &self.notes
    }

    fn ids(&self) -> &Ids {
        self.body.ids()
    }

    fn step_bytes(&self) -> usize {
        self.body.step_bytes()
    }

    fn open(&mut self, slot: Slot) -> Result<()> {
        self.body.stack().open(slot)?;
        self.slots.insert(slot, Sequence::default());
        Ok(())
    }

    fn close(&mut self, slot: Slot) {
        self.body.stack().close(slot);
        self.slots.remove(&slot);
    }

    fn observe(&mut self, committed: &Committed<'_>) -> Result<()> {
        let width = self.body.feature_width();
        let given: usize = committed.taps.iter().map(|t| t.columns).sum();
        if !committed.path.is_empty() && given != width {
            return Err(Error::Invalid(format!(
                "features of {given} values a row; the draft expects {width}"
            )));
        }
        let s = self.sequence(committed.slot)?;
        let values = committed.taps.iter().map(|t| Ok((t.columns, t.all()?)));
        let values = values.collect::<Result<Vec<_>>>()?;
        for &row in committed.path {
            for (columns, values) in &values {
                let feature = values.get(row * columns..(row + 1) * columns);
                let beyond = || Error::Invalid(format!("no features of row {row}"));
                s.features.extend_from_slice(feature.ok_or_else(beyond)?);
            }
        }
        let skipped = usize::from(!s.begun).min(committed.tokens.len());
        s.begun |= skipped > 0;
        s.tokens.extend_from_slice(&committed.tokens[skipped..]);
        if s.tokens.len().min(s.features.len() / width) >= CHUNK {
            self.catch_up(&[committed.slot])?;
        }
        Ok(())
    }

    fn room(&self, slot: Slot) -> Option<usize> {
        let s = self.slots.get(&slot)?;
        (self.positions + NODES).checked_sub(s.committed + s.tokens.len())
    }

    fn start(&mut self, slots: &[Slot], logits: &mut Vec<f32>) -> Result<()> {
        self.catch_up(slots)?;
        self.states.clear();
        for slot in slots {
            let last = &self.slots[slot].last;
            if last.is_empty() {
                return Err(Error::Invalid(format!(
                    "slot {slot} is asked for a tree before it saw a position of its target"
                )));
            }
            self.states.extend_from_slice(last);
        }
        self.body.logits(&self.states, logits)
    }

    fn expand(&mut self, nodes: &[Nodes<'_>], logits: &mut Vec<f32>) -> Result<()> {
        let hidden = self.body.hidden();
        self.features.clear();
        self.tokens.clear();
        for n in nodes {
            self.tokens.extend_from_slice(n.tokens);
            let closed = || Error::Invalid(format!("slot {} is not open", n.slot));
            let s = self.slots.get(&n.slot).ok_or_else(closed)?;
            for parent in n.parents {
                let state = match parent {
                    None => &s.last[..],
                    Some(p) => &s.nodes[p * hidden..(p + 1) * hidden],
                };
                self.features.extend_from_slice(state);
            }
        }
        let rows = nodes.iter().map(|n| Rows {
            slot: n.slot,
            count: n.tokens.len(),
            parents: n.parents,
        });
        let rows: Vec<Rows<'_>> = rows.collect();
        self.body
            .run(&rows, &self.features, &self.tokens, &mut self.states)?;
        let mut first = 0;
        for n in nodes {
            let values = &self.states[first * hidden..(first + n.tokens.len()) * hidden];
            first += n.tokens.len();
            if let Some(s) = self.slots.get_mut(&n.slot) {
                s.nodes.extend_from_slice(values);
            }
        }
        self.body.logits(&self.states, logits)
    }
}

/// Positions of a stack whose slots hold `positions` committed rows.
pub(super) fn capacity(positions: usize) -> usize {
    positions + NODES
}
