//! Bookkeeping of slots that every transformer shares: lengths, pending rows, and what each row sees.

use crate::plugin::{SlotRows, Step, Want};
use crate::{Error, Result};

/// One open sequence with its cache.
pub(super) struct SlotState<C> {
    pub(super) cache: C,
    /// Committed positions.
    pub(super) len: usize,
    /// Parents of the rows that wait for a commit.
    pending: Vec<Option<usize>>,
}

/// The slots of a model.
pub(super) struct Slots<C> {
    slots: Vec<Option<SlotState<C>>>,
    /// Positions a slot can hold.
    pub(super) capacity: usize,
}

/// What one row of a step sees: positions `0..contiguous`, then single ones.
pub(super) struct RowView {
    pub(super) position: usize,
    pub(super) contiguous: usize,
    pub(super) scattered: Vec<u32>,
}

impl<C> Slots<C> {
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            slots: Vec::new(),
            capacity,
        }
    }

    pub(super) fn open(&mut self, slot: usize, cache: C) -> Result<()> {
        if slot >= 1024 {
            return Err(Error::Invalid(format!("slot {slot}: at most 1024 slots")));
        }
        while self.slots.len() <= slot {
            self.slots.push(None);
        }
        if self.slots[slot].is_some() {
            return Err(Error::Invalid(format!("slot {slot} is already open")));
        }
        self.slots[slot] = Some(SlotState {
            cache,
            len: 0,
            pending: Vec::new(),
        });
        Ok(())
    }

    pub(super) fn close(&mut self, slot: usize) -> Option<C> {
        self.slots.get_mut(slot)?.take().map(|s| s.cache)
    }

    pub(super) fn get(&mut self, slot: usize) -> Result<&mut SlotState<C>> {
        match self.slots.get_mut(slot) {
            Some(Some(state)) => Ok(state),
            _ => Err(Error::Invalid(format!("slot {slot} is not open"))),
        }
    }

    /// Checks a step and notes its rows as pending; returns what each row sees, slot by slot.
    pub(super) fn begin(&mut self, step: &Step<'_>, vocab: usize) -> Result<Vec<Vec<RowView>>> {
        let capacity = self.capacity;
        for (i, rows) in step.slots.iter().enumerate() {
            let len = self.get(rows.slot)?.len;
            check_rows(rows, len, capacity, vocab)?;
            if step.slots[..i].iter().any(|r| r.slot == rows.slot) {
                return Err(Error::Invalid(format!(
                    "slot {} twice in one step",
                    rows.slot
                )));
            }
        }
        step.slots
            .iter()
            .map(|rows| {
                let state = self.get(rows.slot)?;
                state.pending = match rows.parents {
                    [] => (0..rows.tokens.len()).map(|i| i.checked_sub(1)).collect(),
                    parents => parents.to_vec(),
                };
                Ok(views(&state.pending, state.len))
            })
            .collect()
    }

    /// Checks a path and moves its rows together with `copy(cache, from, to)`.
    pub(super) fn commit(
        &mut self,
        slot: usize,
        path: &[usize],
        mut copy: impl FnMut(&mut C, usize, usize) -> Result<()>,
    ) -> Result<()> {
        let state = self.get(slot)?;
        let mut parent = None;
        for &row in path {
            if state.pending.get(row) != Some(&parent) {
                return Err(Error::Invalid(format!(
                    "commit of slot {slot}: row {row} of {} does not follow {parent:?}",
                    state.pending.len()
                )));
            }
            parent = Some(row);
        }
        for (i, &row) in path.iter().enumerate() {
            if row != i {
                copy(&mut state.cache, state.len + row, state.len + i)?;
            }
        }
        state.len += path.len();
        state.pending.clear();
        Ok(())
    }
}

fn check_rows(rows: &SlotRows<'_>, len: usize, capacity: usize, vocab: usize) -> Result<()> {
    let n = rows.tokens.len();
    if n == 0 {
        return Err(Error::Invalid(format!("slot {}: no rows", rows.slot)));
    }
    if len + n > capacity {
        return Err(Error::Invalid(format!(
            "slot {}: {len} positions and {n} more do not fit a context of {capacity}",
            rows.slot
        )));
    }
    if let Some(token) = rows.tokens.iter().find(|&&t| t as usize >= vocab) {
        return Err(Error::Invalid(format!(
            "token {token} outside the vocabulary of {vocab}"
        )));
    }
    if !rows.parents.is_empty() && rows.parents.len() != n {
        return Err(Error::Invalid(format!(
            "{} parents for {n} rows",
            rows.parents.len()
        )));
    }
    if let Want::Rows(_) = rows.want {
        rows.want.of(n)?;
    }
    match rows
        .parents
        .iter()
        .enumerate()
        .find(|(i, p)| p.is_some_and(|p| p >= *i))
    {
        Some((i, p)) => Err(Error::Invalid(format!("row {i} before its parent {p:?}"))),
        None => Ok(()),
    }
}

/// What each row sees when `len` positions are committed and row `i` lies at position `len + i` of the cache.
fn views(parents: &[Option<usize>], len: usize) -> Vec<RowView> {
    let mut depths: Vec<usize> = Vec::with_capacity(parents.len());
    // Rows 0..run[i] of the path are rows 0.. of the step themselves, hence contiguous in the cache.
    let mut runs: Vec<usize> = Vec::with_capacity(parents.len());
    for (i, parent) in parents.iter().enumerate() {
        let (depth, run) = match *parent {
            None => (0, usize::from(i == 0)),
            Some(p) if runs[p] == p + 1 && i == p + 1 => (depths[p] + 1, i + 1),
            Some(p) => (depths[p] + 1, runs[p]),
        };
        depths.push(depth);
        runs.push(run);
    }
    (0..parents.len())
        .map(|i| {
            let mut scattered = Vec::with_capacity(depths[i] + 1 - runs[i]);
            let mut at = Some(i);
            while scattered.len() < depths[i] + 1 - runs[i] {
                let Some(row) = at else { break };
                scattered.push((len + row) as u32);
                at = parents[row];
            }
            scattered.reverse();
            RowView {
                position: len + depths[i],
                contiguous: len + runs[i],
                scattered,
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_is_contiguous_and_branches_are_scattered() {
        let chain = views(&[None, Some(0), Some(1)], 5);
        assert!(
            chain
                .iter()
                .enumerate()
                .all(|(i, v)| v.contiguous == 6 + i && v.scattered.is_empty())
        );
        //      0
        //    1   2
        //    3   4
        let tree = views(&[None, Some(0), Some(0), Some(1), Some(2)], 5);
        let seen: Vec<(usize, usize, &[u32])> = tree
            .iter()
            .map(|v| (v.position, v.contiguous, &v.scattered[..]))
            .collect();
        assert_eq!(
            seen,
            [
                (5, 6, &[][..]),
                (6, 7, &[]),
                (6, 6, &[7]),
                (7, 7, &[8]),
                (7, 6, &[7, 9])
            ]
        );
        let forest = views(&[None, None, Some(1)], 0);
        let seen: Vec<(usize, usize, &[u32])> = forest
            .iter()
            .map(|v| (v.position, v.contiguous, &v.scattered[..]))
            .collect();
        assert_eq!(seen, [(0, 1, &[][..]), (0, 0, &[1]), (1, 0, &[1, 2])]);
    }

    #[test]
    fn a_commit_must_follow_parents() {
        let mut slots = Slots::new(10);
        slots.open(0, ()).expect("open");
        let parents = [None, Some(0), Some(0)];
        let rows = SlotRows {
            slot: 0,
            tokens: &[1, 2, 3],
            parents: &parents,
            want: Want::None,
        };
        let step = Step {
            slots: vec![rows],
            taps: &[],
        };
        slots.begin(&step, 10).expect("begin");
        assert!(slots.commit(0, &[0, 3], |_, _, _| Ok(())).is_err());
        assert!(slots.commit(0, &[1], |_, _, _| Ok(())).is_err());
        let mut moved = Vec::new();
        slots
            .commit(0, &[0, 2], |_, a, b| {
                moved.push((a, b));
                Ok(())
            })
            .expect("commit");
        assert_eq!(moved, [(2, 1)]);
        assert_eq!(slots.get(0).expect("open").len, 2);
    }

    #[test]
    fn steps_that_do_not_fit_are_refused() {
        let mut slots = Slots::new(4);
        slots.open(0, ()).expect("open");
        assert!(slots.open(0, ()).is_err());
        let mut refused = |slot, tokens: &[u32], parents: &[Option<usize>]| {
            let rows = SlotRows {
                slot,
                tokens,
                parents,
                want: Want::None,
            };
            let step = Step {
                slots: vec![rows],
                taps: &[],
            };
            slots
                .begin(&step, 10)
                .map(|_| ())
                .expect_err("refused")
                .to_string()
        };
        assert!(refused(1, &[1], &[]).contains("not open"));
        assert!(refused(0, &[], &[]).contains("no rows"));
        assert!(refused(0, &[1; 5], &[]).contains("context of 4"));
        assert!(refused(0, &[10], &[]).contains("vocabulary of 10"));
        assert!(refused(0, &[1, 2], &[None]).contains("1 parents for 2 rows"));
        assert!(refused(0, &[1, 2], &[None, Some(1)]).contains("before its parent"));
        let beyond = SlotRows {
            slot: 0,
            tokens: &[1, 2],
            parents: &[],
            want: Want::Rows(&[0, 2]),
        };
        let step = Step {
            slots: vec![beyond],
            taps: &[],
        };
        let error = slots.begin(&step, 10).map(|_| ()).expect_err("refused");
        assert!(error.to_string().contains("row 2 of 2"));
    }
}
