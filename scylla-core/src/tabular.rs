//! Targets and drafts made of tables of probabilities, for tests and proofs.

use std::sync::Arc;

use crate::draw;
use crate::plugin::{
    Committed, DraftModel, Forward, Matrix, Request, Slot, Step, TargetModel, TargetRows,
    TargetShape,
};
use crate::sampling::{Sampling, argmax};
use crate::tree::{Drawing, Tree};
use crate::{Error, Result};

/// A law: the next-token distribution `[V]` after a sequence.
pub type Law = Arc<dyn Fn(&[u32]) -> Vec<f64> + Send + Sync>;

/// Committed tokens, and pending rows with their parents.
type Sequence = (Vec<u32>, Vec<(u32, Option<usize>)>);

/// A target whose distribution is a function of the tokens so far.
pub struct TableTarget {
    law: Law,
    shape: TargetShape,
    slots: Vec<Option<Sequence>>,
}

impl TableTarget {
    /// A target over `vocab` tokens that holds `context` positions.
    pub fn new(vocab: usize, context: usize, law: Law) -> Self {
        Self {
            law,
            shape: TargetShape {
                vocab,
                hidden: 0,
                layers: 0,
                context,
            },
            slots: Vec::new(),
        }
    }

    fn slot(&mut self, slot: Slot) -> Result<&mut Sequence> {
        match self.slots.get_mut(slot) {
            Some(Some(state)) => Ok(state),
            _ => Err(Error::Invalid(format!("slot {slot} is not open"))),
        }
    }
}

fn lost(what: &str, index: usize) -> Error {
    Error::Invalid(format!("{what} {index} does not exist"))
}

impl TargetModel for TableTarget {
    fn open(&mut self, slot: Slot) -> Result<()> {
        self.slots.resize(self.slots.len().max(slot + 1), None);
        self.slots[slot] = Some((Vec::new(), Vec::new()));
        Ok(())
    }

    fn close(&mut self, slot: Slot) {
        if let Some(state) = self.slots.get_mut(slot) {
            *state = None;
        }
    }

    fn forward(&mut self, step: &Step<'_>) -> Result<Forward> {
        let vocab = self.shape.vocab;
        let law = Arc::clone(&self.law);
        let mut logits = Vec::new();
        for rows in &step.slots {
            let (committed, pending) = self.slot(rows.slot)?;
            let first = pending.len();
            for (i, &token) in rows.tokens.iter().enumerate() {
                let parent = match rows.parents {
                    [] => i.checked_sub(1).map(|above| first + above),
                    parents => *parents.get(i).ok_or_else(|| lost("parent of row", i))?,
                };
                if parent.is_some_and(|parent| parent >= pending.len()) {
                    return Err(lost("parent of row", i));
                }
                pending.push((token, parent));
            }
            let wanted = rows.want.of(rows.tokens.len())?;
            let mut values = Vec::new();
            for row in wanted {
                let mut path = Vec::new();
                let mut at = Some(first + row);
                while let Some(i) = at {
                    path.push(pending[i].0);
                    at = pending[i].1;
                }
                let before: Vec<u32> = committed
                    .iter()
                    .copied()
                    .chain(path.into_iter().rev())
                    .collect();
                let row = law(&before);
                if row.len() != vocab {
                    return Err(Error::Invalid(format!(
                        "the law has {} tokens after {before:?}, expected {vocab}",
                        row.len()
                    )));
                }
                values.extend(row.into_iter().map(|p| p.ln() as f32));
            }
            logits.push(Matrix::host(values, vocab));
        }
        Ok(Forward {
            logits,
            taps: step.slots.iter().map(|_| Vec::new()).collect(),
        })
    }

    fn commit(&mut self, slot: Slot, path: &[usize]) -> Result<()> {
        let (committed, pending) = self.slot(slot)?;
        for &row in path {
            committed.push(pending.get(row).ok_or_else(|| lost("row", row))?.0);
        }
        pending.clear();
        Ok(())
    }

    fn shape(&self) -> TargetShape {
        self.shape.clone()
    }
}

/// The rows of a tree under a law, exact in f64; what a rule sees in a proof.
pub struct TableRows<'a> {
    /// The law.
    pub law: &'a Law,
    /// Tokens before the root.
    pub history: &'a [u32],
    /// The tree.
    pub tree: &'a Tree,
}

impl TableRows<'_> {
    fn at(&self, node: usize) -> Vec<f64> {
        let path = self.tree.tokens_to(node);
        (self.law)(&[self.history, &path].concat())
    }
}

impl TargetRows for TableRows<'_> {
    fn argmax(&self, nodes: &[usize]) -> Result<Vec<u32>> {
        let best = |&node: &usize| {
            let row: Vec<f32> = self.at(node).iter().map(|&p| p as f32).collect();
            argmax(&row)
        };
        nodes.iter().map(best).collect()
    }

    fn row(&self, node: usize, out: &mut Vec<f64>) -> Result<()> {
        *out = self.at(node);
        Ok(())
    }
}

/// A draft whose q is a function of the tokens so far. It expands breadth first within the budget.
pub struct TableDraft {
    law: Law,
    drawing: Drawing,
    /// Children of each node by its depth; beyond the list, the budget's width. The budget limits both.
    pub widths: Vec<usize>,
    /// Target id of each draft id, where the law is over ids of its own.
    pub draft_to_target: Option<Arc<[u32]>>,
    slots: Vec<Vec<u32>>,
}

impl TableDraft {
    /// A draft that draws children this way.
    pub fn new(law: Law, drawing: Drawing) -> Self {
        Self {
            law,
            drawing,
            widths: Vec::new(),
            draft_to_target: None,
            slots: Vec::new(),
        }
    }

    /// Grows a tree (`before` ends with the root).
    fn grow(&self, before: &[u32], request: &mut Request<'_>) -> Result<Tree> {
        let budget = request.budget;
        let mut tree = Tree::root(request.root);
        tree.drawing = self.drawing;
        tree.draft_to_target.clone_from(&self.draft_to_target);
        let width = |level| {
            let listed = self.widths.get(level).copied().unwrap_or(budget.width);
            listed.min(budget.width)
        };
        let widths: Vec<usize> = (0..budget.levels()).map(width).collect();
        let mut q = |path: &[u32]| Ok((self.law)(&[before, &path[1..]].concat()).into());
        draw::grow(&mut tree, &widths, budget.total, &mut q, request.chance)?;
        Ok(tree)
    }
}

impl DraftModel for TableDraft {
    fn drawing(&self, _sampling: &Sampling) -> Drawing {
        self.drawing
    }

    fn open(&mut self, slot: Slot) -> Result<()> {
        self.slots
            .resize(self.slots.len().max(slot + 1), Vec::new());
        self.slots[slot].clear();
        Ok(())
    }

    fn close(&mut self, slot: Slot) {
        if let Some(tokens) = self.slots.get_mut(slot) {
            tokens.clear();
        }
    }

    fn observe(&mut self, committed: &[Committed<'_>]) -> Result<()> {
        for c in committed {
            let tokens = self.slots.get_mut(c.slot);
            tokens
                .ok_or_else(|| lost("slot", c.slot))?
                .extend_from_slice(c.tokens);
        }
        Ok(())
    }

    fn propose(&mut self, requests: &mut [Request<'_>]) -> Result<Vec<Tree>> {
        requests
            .iter_mut()
            .map(|r| {
                let before = self.slots.get(r.slot).filter(|tokens| !tokens.is_empty());
                self.grow(before.ok_or_else(|| lost("slot", r.slot))?, r)
            })
            .collect()
    }
}
