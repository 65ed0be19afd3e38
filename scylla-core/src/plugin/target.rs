//! The language model being accelerated.

use super::{Matrix, PackedRows, Slot};
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
///
/// ```
/// use scylla_core::plugin::{Forward, Matrix, Slot, Step, TargetModel, TargetShape};
///
/// /// Four tokens, always the same logits. It holds no state, so that opening and keeping rows is nothing to it.
/// struct Loaded(Vec<f32>);
///
/// impl TargetModel for Loaded {
///     fn open(&mut self, _: Slot) -> scylla_core::Result<()> {
///         Ok(())
///     }
///     fn close(&mut self, _: Slot) {}
///     fn forward(&mut self, step: &Step<'_>) -> scylla_core::Result<Forward> {
///         let rows = |n: usize| Matrix::host(self.0.repeat(n), self.0.len());
///         let wanted = step.slots.iter().map(|s| Ok(rows(s.want.of(s.tokens.len())?.len())));
///         let logits = wanted.collect::<scylla_core::Result<_>>()?;
///         Ok(Forward { logits, taps: vec![Vec::new(); step.slots.len()] })
///     }
///     fn commit(&mut self, _: Slot, _: &[usize]) -> scylla_core::Result<()> {
///         Ok(())
///     }
///     fn shape(&self) -> TargetShape {
///         TargetShape { vocab: self.0.len(), hidden: 0, layers: 0, context: 64 }
///     }
/// }
///
/// use scylla_core::engine::{Engine, Options, Parts, Request, decode};
/// # #[derive(Clone)]
/// # struct Best;
/// # impl scylla_core::plugin::Verifier for Best {
/// #     fn name(&self) -> &str { "best" }
/// #     fn exact_for(&self, _: scylla_core::tree::Drawing, _: usize, s: &scylla_core::sampling::Sampling) -> bool { s.is_greedy() }
/// #     fn verify(&self, _: &scylla_core::tree::Tree, rows: &dyn scylla_core::plugin::TargetRows,
/// #         _: &mut dyn scylla_core::plugin::Chance) -> scylla_core::Result<scylla_core::plugin::Verdict> {
/// #         Ok(scylla_core::plugin::Verdict { path: Vec::new(), bonus: rows.argmax(&[0])?[0] })
/// #     }
/// # }
/// # let greedy = Best;
/// let parts = Parts::plain(Loaded(vec![0.0, 3.0, 1.0, 2.0]), greedy);
/// let mut engine = Engine::new(parts, Options::default())?;
/// let request = Request { prompt: vec![0], max_new_tokens: 3, ..Request::default() };
/// let outputs = decode(&mut engine, vec![request], &mut |_| std::ops::ControlFlow::Continue(()));
/// assert_eq!(outputs[0].ids, [1, 1, 1]);
/// # Ok::<(), scylla_core::Error>(())
/// ```
pub trait TargetModel: Send {
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
    /// Opens slot `to` with the first `count` committed rows of slot `from`, which stays as it is. False, and nothing is
    /// opened, where a model cannot.
    fn fork(&mut self, _from: Slot, _to: Slot, _count: usize) -> Result<bool> {
        Ok(false)
    }
    /// Bytes that the cache of a slot takes which comes to hold so many positions; 0 where none are counted.
    fn slot_bytes(&self, _positions: usize) -> usize {
        0
    }
    /// Gives back the memory that is kept of slots that were closed.
    fn trim(&mut self) {}
    /// States of packed rows `[M, H]`, one matrix for each tap: documents none of which sees another, and of which nothing is
    /// kept. What training learns from. The values may round otherwise than those of [`TargetModel::forward`], in favour of
    /// speed; so nothing that is served is measured with them.
    ///
    /// As it stands here each document takes a slot, from 0 on, which must not be open.
    ///
    /// # Errors
    /// If there are not as many tokens as rows, a document is longer than the context, or a tap is none of the model's.
    fn states(&mut self, tokens: &[u32], rows: &PackedRows, taps: &[Tap]) -> Result<Vec<Matrix>> {
        states_in_slots(self, tokens, rows, taps)
    }
}

/// Documents that run at a time, and rows.
const DOCUMENTS: usize = 256;
const ROWS: usize = 2048;

fn states_in_slots<T: TargetModel + ?Sized>(
    target: &mut T,
    tokens: &[u32],
    rows: &PackedRows,
    taps: &[Tap],
) -> Result<Vec<Matrix>> {
    rows.check(tokens.len())?;
    let documents = &rows.documents;
    let mut pieces: Vec<Vec<Matrix>> = vec![Vec::new(); taps.len()];
    let mut first = 0;
    while first < documents.len() {
        let start = documents[first].start;
        let fits = |end: &usize| *end - first < DOCUMENTS && documents[*end].end - start <= ROWS;
        let end = (first + 1..documents.len()).take_while(fits).last();
        let end = end.map_or(first + 1, |last| last + 1);
        let slot = |(slot, d): (usize, &std::ops::Range<usize>)| SlotRows {
            slot,
            tokens: &tokens[d.clone()],
            parents: &[],
            want: Want::None,
        };
        let slots: Vec<_> = documents[first..end].iter().enumerate().map(slot).collect();
        let count = slots.len();
        let mut opened = 0;
        let found = (0..count)
            .try_for_each(|slot| {
                target.open(slot)?;
                opened = slot + 1;
                Ok(())
            })
            .and_then(|()| target.forward(&Step { slots, taps }));
        (0..opened).for_each(|slot| target.close(slot));
        for found in found?.taps {
            pieces.iter_mut().zip(found).for_each(|(p, f)| p.push(f));
        }
        first = end;
    }
    pieces.into_iter().map(Matrix::joined).collect()
}

/// The same model, borrowed or boxed.
macro_rules! forwarded {
    ($($kind:ty),+) => {$(
        impl<T: TargetModel + ?Sized> TargetModel for $kind {
            fn open(&mut self, slot: Slot) -> Result<()> {
                (**self).open(slot)
            }
            fn close(&mut self, slot: Slot) {
                (**self).close(slot);
            }
            fn forward(&mut self, step: &Step<'_>) -> Result<Forward> {
                (**self).forward(step)
            }
            fn commit(&mut self, slot: Slot, path: &[usize]) -> Result<()> {
                (**self).commit(slot, path)
            }
            fn shape(&self) -> TargetShape {
                (**self).shape()
            }
            fn recycle(&mut self, forward: Forward) {
                (**self).recycle(forward);
            }
            fn fork(&mut self, from: Slot, to: Slot, count: usize) -> Result<bool> {
                (**self).fork(from, to, count)
            }
            fn slot_bytes(&self, positions: usize) -> usize {
                (**self).slot_bytes(positions)
            }
            fn trim(&mut self) {
                (**self).trim();
            }
            fn states(
                &mut self,
                tokens: &[u32],
                rows: &PackedRows,
                taps: &[Tap],
            ) -> Result<Vec<Matrix>> {
                (**self).states(tokens, rows, taps)
            }
        }
    )+};
}

forwarded!(&mut T, Box<T>);

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
