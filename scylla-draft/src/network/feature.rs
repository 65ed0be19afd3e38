//! What every draft that reads the target's hidden states does: pairing features with tokens, keeping committed rows,
//! and feeding its own states back while a tree grows.
//!
//! Row `i` of a sequence pairs feature `f_i` with token `x_{i+1}` at draft position `i`; a node of depth `d` below a
//! root at position `n` is forwarded at `n + d - 1` with the state of its parent as feature (the root's children: the
//! state of the last committed row).

use std::collections::HashMap;

use scylla_core::model::{Stack, StackRows};
use scylla_core::plugin::{Committed, Matrix, Slot, Tap};
use scylla_core::{Error, Result};

use super::{Ids, NODES, Network, Nodes};

/// One network: from (feature, token) rows to states, and from states to logits, where its executor keeps them. `M`
/// rows, `F` values of the target's features, `H` of the state that recurs.
///
/// ```
/// use scylla_core::model::{Stack, StackRows, WeightMatrix};
/// use scylla_core::plugin::{Matrix, Tap};
/// use scylla_draft::network::{Body, Feature, Ids};
/// use std::sync::Arc;
///
/// /// The target's last state through a stack of its own, and the target's head.
/// struct Plain {
///     hidden: usize,
///     stack: Box<dyn Stack>,
///     head: Arc<dyn WeightMatrix>,
///     ids: Ids,
/// }
///
/// impl Body for Plain {
///     fn taps(&self) -> &[Tap] {
///         &[Tap::Final]
///     }
///     fn feature_width(&self) -> usize {
///         self.hidden
///     }
///     fn ids(&self) -> &Ids {
///         &self.ids
///     }
///     fn step_bytes(&self) -> usize {
///         0
///     }
///     fn stack(&mut self) -> &mut dyn Stack {
///         &mut *self.stack
///     }
///     fn stack_bytes(&self, positions: usize) -> usize {
///         self.stack.slot_bytes(positions)
///     }
///     fn project(&mut self, features: &mut Matrix, out: &mut Matrix) -> scylla_core::Result<()> {
///         std::mem::swap(features, out);
///         Ok(())
///     }
///     fn run(&mut self, rows: &[StackRows<'_>], features: &Matrix, _: &[u32], out: &mut Matrix) -> scylla_core::Result<()> {
///         out.copy_of(features);
///         self.stack.forward(rows, out, None, &mut |_, _| {})
///     }
///     fn logits(&mut self, states: &Matrix, out: &mut Matrix) -> scylla_core::Result<()> {
///         self.head.multiply(states, out)
///     }
/// }
///
/// /// Pairing features with tokens, caches and feeding states back are the same for all.
/// fn network(body: Plain, context: usize) -> Feature<Plain> {
///     Feature::new(body, context)
/// }
/// ```
pub trait Body: Send {
    /// Hidden states of the target that make up a feature, side by side.
    fn taps(&self) -> &[Tap];
    /// `F`.
    fn feature_width(&self) -> usize;
    /// The ids it proposes among.
    fn ids(&self) -> &Ids;
    /// Bytes of weights that one step reads.
    fn step_bytes(&self) -> usize;
    /// Its decoder layers.
    fn stack(&mut self) -> &mut dyn Stack;
    /// Bytes that the cache of a slot takes which comes to hold so many positions.
    fn stack_bytes(&self, positions: usize) -> usize;
    /// Brings target features `[M, F]` to the width that recurs, `[M, H]`; the features are used up.
    fn project(&mut self, features: &mut Matrix, out: &mut Matrix) -> Result<()>;
    /// Runs rows, features `[M, H]` beside tokens `[M]`, and writes the states that recur `[M, H]`.
    fn run(
        &mut self,
        rows: &[StackRows<'_>],
        features: &Matrix,
        tokens: &[u32],
        out: &mut Matrix,
    ) -> Result<()>;
    /// Writes the logits `[M, V_d]` of states `[M, H]`.
    fn logits(&mut self, states: &Matrix, out: &mut Matrix) -> Result<()>;
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
    features: Matrix,
    tokens: Vec<u32>,
    /// State of the last committed row, then those of the nodes of the tree that grows `[., H]`; none before the first.
    states: Matrix,
    /// Token of the last committed row, before the first that which belongs to none; then those of the nodes.
    seen: Vec<u32>,
}

/// A feature draft's network over any number of slots.
pub struct Feature<B> {
    body: B,
    /// Positions a slot holds beside nodes.
    positions: usize,
    /// Whether a row gets the token before its own.
    delayed: bool,
    notes: Vec<String>,
    slots: HashMap<Slot, Sequence>,
    features: Matrix,
    projected: Matrix,
    states: Matrix,
    tokens: Vec<u32>,
}

impl<B: Body> Feature<B> {
    /// A network whose stack holds `positions` committed rows and [`NODES`] nodes.
    pub fn new(body: B, positions: usize) -> Self {
        Self {
            body,
            positions,
            delayed: false,
            notes: Vec::new(),
            slots: HashMap::new(),
            features: Matrix::default(),
            projected: Matrix::default(),
            states: Matrix::default(),
            tokens: Vec::new(),
        }
    }

    /// The same, with what the user should know of its files.
    pub fn noting(self, notes: Vec<String>) -> Self {
        Self { notes, ..self }
    }

    /// The same with features one ahead of their tokens: row `i` pairs feature `f_i` with token `x_i`, and a node its state with
    /// its parent's token. A network that was trained so, by mistake, draws from what it never learned to ignore when it is
    /// fed as it should be.
    pub fn delayed(self) -> Self {
        Self {
            delayed: true,
            ..self
        }
    }

    /// State of a slot's last committed row, then those of the nodes forwarded since `[., H]`.
    pub fn states(&self, slot: Slot) -> Option<&Matrix> {
        Some(&self.slots.get(&slot)?.states)
    }

    /// Runs the whole rows that wait in these slots, in one forward, and commits them.
    fn catch_up(&mut self, slots: &[Slot]) -> Result<()> {
        self.features.clear();
        self.tokens.clear();
        let mut counts = Vec::with_capacity(slots.len());
        for &slot in slots {
            let s = open(&mut self.slots, slot)?;
            let count = s.tokens.len().min(s.features.rows());
            let whole: Vec<usize> = (0..count).collect();
            self.features.append(&[&s.features], &whole)?;
            match self.delayed {
                false => self.tokens.extend_from_slice(&s.tokens[..count]),
                true => {
                    let before = s.seen.iter().take(1).chain(&s.tokens).take(count);
                    self.tokens.extend(before);
                }
            }
            self.body.stack().commit(slot, &[])?;
            match count {
                // Nodes of an earlier tree go, what they followed stays.
                0 => {
                    s.states.keep_first(1)?;
                    s.seen.truncate(1);
                }
                _ => counts.push((slot, count)),
            }
        }
        if counts.is_empty() {
            return Ok(());
        }
        let rows: Vec<StackRows<'_>> = counts
            .iter()
            .map(|&(slot, count)| StackRows {
                slot,
                count,
                parents: &[],
            })
            .collect();
        self.body.project(&mut self.features, &mut self.projected)?;
        self.body
            .run(&rows, &self.projected, &self.tokens, &mut self.states)?;
        let mut end = 0;
        for (slot, count) in counts {
            end += count;
            let path: Vec<usize> = (0..count).collect();
            self.body.stack().commit(slot, &path)?;
            let s = open(&mut self.slots, slot)?;
            // Only now: where the forward fails they still wait, and another one may take them.
            s.features.drop_first(count)?;
            s.seen.clear();
            s.seen.extend(s.tokens.drain(..count).next_back());
            s.committed += count;
            s.states.clear();
            s.states.append(&[&self.states], &[end - 1])?;
        }
        Ok(())
    }
}

/// An open slot.
fn open(slots: &mut HashMap<Slot, Sequence>, slot: Slot) -> Result<&mut Sequence> {
    let closed = || Error::Invalid(format!("slot {slot} is not open"));
    slots.get_mut(&slot).ok_or_else(closed)
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

    fn fork(&mut self, from: Slot, to: Slot, tokens: &[u32]) -> Result<bool> {
        let Some(rows) = tokens.len().checked_sub(1) else {
            return Ok(false);
        };
        if self.slots.get(&from).is_some_and(|s| s.committed < rows) {
            self.catch_up(&[from])?;
        }
        if self.slots.get(&from).is_none_or(|s| s.committed < rows) {
            return Ok(false);
        }
        self.body.stack().fork(from, to, rows)?;
        let sequence = Sequence {
            begun: true,
            committed: rows,
            seen: tokens[rows..].to_vec(),
            ..Sequence::default()
        };
        self.slots.insert(to, sequence);
        Ok(true)
    }

    fn slot_bytes(&self, positions: usize) -> usize {
        self.body
            .stack_bytes(positions.min(capacity(self.positions)))
    }

    fn trim(&mut self) {
        self.body.stack().trim();
    }

    fn observe(&mut self, committed: &Committed<'_>) -> Result<()> {
        let width = self.body.feature_width();
        let given: usize = committed.taps.iter().map(|t| t.columns).sum();
        if !committed.path.is_empty() && given != width {
            return Err(Error::Invalid(format!(
                "features of {given} values a row; the draft expects {width}"
            )));
        }
        let s = open(&mut self.slots, committed.slot)?;
        let taps: Vec<&Matrix> = committed.taps.iter().collect();
        s.features.append(&taps, committed.path)?;
        let skipped = usize::from(!s.begun).min(committed.tokens.len());
        s.seen.extend(&committed.tokens[..skipped]);
        s.begun |= skipped > 0;
        s.tokens.extend_from_slice(&committed.tokens[skipped..]);
        if s.tokens.len().min(s.features.rows()) >= CHUNK {
            self.catch_up(&[committed.slot])?;
        }
        Ok(())
    }

    fn room(&self, slot: Slot) -> Option<usize> {
        let s = self.slots.get(&slot)?;
        (self.positions + NODES).checked_sub(s.committed + s.tokens.len())
    }

    fn start(&mut self, slots: &[Slot], logits: &mut Matrix) -> Result<()> {
        self.catch_up(slots)?;
        self.states.clear();
        for &slot in slots {
            let s = open(&mut self.slots, slot)?;
            if s.states.rows() == 0 {
                return Err(Error::Invalid(format!(
                    "slot {slot} is asked for a tree before it saw a position of its target"
                )));
            }
            self.states.append(&[&s.states], &[0])?;
        }
        self.body.logits(&self.states, logits)
    }

    fn expand(&mut self, nodes: &[Nodes<'_>], logits: &mut Matrix) -> Result<()> {
        self.features.clear();
        self.tokens.clear();
        for n in nodes {
            let s = open(&mut self.slots, n.slot)?;
            // The root's state comes first, then those of the nodes.
            let above = n.parents.iter().map(|p| p.map_or(0, |p| p + 1));
            let above: Vec<usize> = above.collect();
            match self.delayed {
                false => self.tokens.extend_from_slice(n.tokens),
                true => self
                    .tokens
                    .extend(above.iter().filter_map(|&i| s.seen.get(i))),
            }
            s.seen.extend_from_slice(n.tokens);
            self.features.append(&[&s.states], &above)?;
        }
        let rows = nodes.iter().map(|n| StackRows {
            slot: n.slot,
            count: n.tokens.len(),
            parents: n.parents,
        });
        let rows: Vec<StackRows<'_>> = rows.collect();
        self.body
            .run(&rows, &self.features, &self.tokens, &mut self.states)?;
        let mut first = 0;
        for n in nodes {
            let own: Vec<usize> = (first..first + n.tokens.len()).collect();
            first += n.tokens.len();
            let s = open(&mut self.slots, n.slot)?;
            s.states.append(&[&self.states], &own)?;
        }
        self.body.logits(&self.states, logits)
    }
}

/// Positions of a stack whose slots hold `positions` committed rows.
pub(super) fn capacity(positions: usize) -> usize {
    positions + NODES
}
