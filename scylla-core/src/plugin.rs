//! The traits that targets, drafts, rules, aligners and budget policies implement.
//!
//! Each is object safe, batched, and small enough that a table of probabilities can stand in for a model, so
//! that rules are proved on the very code that decodes.

use std::borrow::Cow;
use std::sync::Arc;

use candle_core::Tensor;

use crate::sampling::Sampling;
use crate::tree::{Budget, Drawing, Tree};
use crate::{Error, Result};

/// The place of one sequence in the batch.
pub type Slot = usize;

/// Every random decision of drawing, accepting and sampling.
///
/// In production a counter-based generator; in a proof, a branch over all outcomes.
pub trait Chance {
    /// True with probability `p`, which is clamped to `0..=1`.
    fn coin(&mut self, p: f64) -> bool;
    /// An index with probability proportional to its weight.
    ///
    /// # Errors
    /// If no weight is positive, or one is negative or not finite.
    fn pick(&mut self, weights: &[f64]) -> Result<usize>;
}

/// A hidden state that a target hands out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Tap {
    /// The state that enters layer `i` (0-based; layer 0's is the embedding, layer L's the last output).
    Input(usize),
    /// The last state after the final norm.
    Final,
}

/// Rows of f32 values, on the host or on a device.
#[derive(Debug, Clone)]
pub struct Matrix {
    /// Values per row.
    pub columns: usize,
    data: Data,
}

#[derive(Debug, Clone)]
enum Data {
    /// Values from `first` on, `rows` of them; several matrices may share them.
    Host {
        values: Arc<Vec<f32>>,
        first: usize,
        rows: usize,
    },
    Device(Tensor),
}

impl Matrix {
    /// Rows on the host, one after the other.
    ///
    /// # Panics
    /// If the values are no whole rows of `columns`.
    pub fn host(data: Vec<f32>, columns: usize) -> Self {
        let rows = data.len().checked_div(columns).unwrap_or(0);
        let mut parts = Self::parts(data, columns, &[rows]);
        parts.swap_remove(0)
    }

    /// Matrices of so many rows each, one after the other in the same memory.
    ///
    /// # Panics
    /// If the values are not that many rows of `columns`.
    pub fn parts(data: Vec<f32>, columns: usize, counts: &[usize]) -> Vec<Self> {
        let total: usize = counts.iter().sum();
        assert!(
            columns > 0 && data.len() == total * columns,
            "{} values are not {total} rows of {columns}",
            data.len()
        );
        let values = Arc::new(data);
        let mut next = 0;
        let part = |&rows: &usize| {
            let first = next;
            next += rows * columns;
            let values = Arc::clone(&values);
            Self {
                columns,
                data: Data::Host {
                    values,
                    first,
                    rows,
                },
            }
        };
        counts.iter().map(part).collect()
    }

    /// Rows of a two-dimensional f32 tensor.
    pub fn device(tensor: Tensor) -> Result<Self> {
        let (_, columns) = tensor.dims2()?;
        Ok(Self {
            columns,
            data: Data::Device(tensor),
        })
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        match &self.data {
            Data::Host { rows, .. } => *rows,
            Data::Device(t) => t.dim(0).unwrap_or(0),
        }
    }

    /// One row; only this row leaves a device.
    pub fn row(&self, row: usize) -> Result<Cow<'_, [f32]>> {
        if row >= self.rows() {
            return Err(Error::Invalid(format!("row {row} of {}", self.rows())));
        }
        Ok(match &self.data {
            Data::Host { values, first, .. } => {
                let at = first + row * self.columns;
                Cow::Borrowed(&values[at..at + self.columns])
            }
            Data::Device(t) => Cow::Owned(t.get(row)?.to_vec1()?),
        })
    }

    /// All rows, row-major.
    pub fn all(&self) -> Result<Cow<'_, [f32]>> {
        Ok(match &self.data {
            Data::Host {
                values,
                first,
                rows,
            } => Cow::Borrowed(&values[*first..first + rows * self.columns]),
            Data::Device(t) => Cow::Owned(t.flatten_all()?.to_vec1()?),
        })
    }

    /// The column of the largest value among the first `limit` of each row asked for; ties go to the lowest.
    ///
    /// # Errors
    /// If a row holds NaN, or its largest value is not finite.
    pub fn argmax(&self, rows: &[usize], limit: usize) -> Result<Vec<u32>> {
        rows.iter()
            .map(|&row| crate::sampling::argmax(&self.row(row)?[..limit.min(self.columns)]))
            .collect()
    }

    /// The memory behind the matrix, where it is on the host and no other matrix shares it any more: what it holds may
    /// be more than these rows, and is done with.
    pub fn into_memory(self) -> Option<Vec<f32>> {
        match self.data {
            Data::Host { values, .. } => Arc::try_unwrap(values).ok(),
            Data::Device(_) => None,
        }
    }
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

/// The target's distributions at the nodes of a tree, computed when asked for.
pub trait TargetRows {
    /// The most probable token after each node (ties: the lowest id).
    fn argmax(&self, nodes: &[usize]) -> Result<Vec<u32>>;
    /// Writes the distribution after a node, `[V]`, after the sampling transform, to `out`.
    fn row(&self, node: usize, out: &mut Vec<f64>) -> Result<()>;
}

/// What a rule decides about one tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Accepted nodes from the root's child downwards; empty when none is.
    pub path: Vec<usize>,
    /// The token the target adds after them.
    pub bonus: u32,
}

impl Verdict {
    /// Checks that the path is one of the tree, from a child of the root down, and the bonus a token.
    pub fn check(&self, tree: &Tree, vocab: usize) -> Result<()> {
        let mut parent = 0;
        for &node in &self.path {
            if node == 0 || node >= tree.len() || tree.parents[node] != parent {
                return Err(Error::Invalid(format!(
                    "the rule accepted {:?}, which is no path of the tree",
                    self.path
                )));
            }
            parent = node;
        }
        if self.bonus as usize >= vocab {
            return Err(Error::Invalid(format!(
                "the rule's bonus {} is outside the vocabulary of {vocab}",
                self.bonus
            )));
        }
        Ok(())
    }
}

/// An acceptance rule.
pub trait Verifier {
    /// Its name, as the registry and messages print it.
    fn name(&self) -> &str;
    /// Whether the committed tokens follow the target's law exactly, for trees drawn this way and with at most `width`
    /// children a node. A width of 0 asks for trees of their root alone, however drawn: plain decoding, and the first
    /// token after every prompt.
    fn exact_for(&self, drawing: Drawing, width: usize, sampling: &Sampling) -> bool;
    /// Accepts a path of the tree and draws the bonus.
    fn verify(
        &self,
        tree: &Tree,
        rows: &dyn TargetRows,
        chance: &mut dyn Chance,
    ) -> Result<Verdict>;
}

/// Logits over a batch of texts whose answers are distilled, of a teacher or a student.
#[derive(Debug, Clone)]
pub struct AnswerLogits {
    /// `[B, S, W]`; row `s` predicts the token at `s + 1`.
    pub logits: Tensor,
    /// `[B, S]` i64: the token at each position, -100 where it is not part of the answer.
    pub labels: Tensor,
    /// How many of the `W` columns belong to tokens; those of a padded vocabulary follow and take no part.
    pub vocab: usize,
    /// Ids of all tokens `[B, S]` i64, where the aligner asked for them.
    pub tokens: Option<Tensor>,
    /// Where each answer token lies in the bytes of its answer, `[B]` by answer tokens, where the aligner asked for it.
    pub offsets: Option<Vec<Vec<(usize, usize)>>>,
    /// Hidden states `[B, S, H]`, where the aligner asked for them.
    pub hidden: Option<Tensor>,
}

/// What an aligner needs beside logits and labels.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AlignNeeds {
    /// Ids of all tokens.
    pub tokens: bool,
    /// Byte offsets of the answers' tokens.
    pub offsets: bool,
    /// Hidden states.
    pub hidden: bool,
}

/// Where in training a loss is asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AlignContext {
    /// Optimizer steps done.
    pub step: usize,
}

/// One term of a loss.
#[derive(Debug, Clone)]
pub struct Part {
    /// ce, had, sl, sd, ...
    pub name: &'static str,
    /// What the total multiplies it by.
    pub weight: f64,
    /// Scalar without its weight, differentiable as the total is.
    pub value: Tensor,
}

/// A loss and its parts.
#[derive(Debug, Clone)]
pub struct AlignLoss {
    /// Scalar, the weighted sum of the parts, differentiable with respect to what the student gave.
    pub total: Tensor,
    /// Its terms.
    pub parts: Vec<Part>,
    /// The total's gradient with respect to the student's logits, where it was computed beside it and those are tracked. It is
    /// what `total.backward()` arrives at by way of two more tensors of its size.
    pub gradient: Option<Tensor>,
    /// What else there is to know, by name: how far a matching may be from the best one, or how many tokens took part.
    pub notes: Vec<(&'static str, f64)>,
}

/// A loss that carries a teacher's knowledge to a student with another tokenizer.
pub trait Aligner {
    /// What it needs beside logits and labels.
    fn needs(&self) -> AlignNeeds;
    /// The loss of the student's answers against the teacher's. Nothing flows into the teacher.
    fn loss(
        &self,
        teacher: &AnswerLogits,
        student: &AnswerLogits,
        context: &AlignContext,
    ) -> Result<AlignLoss>;
    /// Parameters it trains beside the student's.
    fn parameters(&self) -> Vec<candle_core::Var> {
        Vec::new()
    }
}

/// Chooses the budget of the next cycle.
pub trait BudgetPolicy {
    /// The budget for a batch of `slots` sequences; `total` 1 means no drafting.
    fn budget(&mut self, slots: usize) -> Budget;
    /// Learns how a cycle went: nodes verified (root included) and tokens accepted (bonus excluded).
    fn observe(&mut self, _nodes: usize, _accepted: usize) {}
}

/// The same budget in every cycle.
#[derive(Debug, Clone, Copy)]
pub struct Fixed(pub Budget);

impl BudgetPolicy for Fixed {
    fn budget(&mut self, _slots: usize) -> Budget {
        self.0
    }
}
