//! Bookkeeping of slots that every transformer shares: lengths, waiting rows, and what each row sees.

use super::executor::outside;
use crate::plugin::{Slot, Step};
use crate::{Error, Result};

/// Rows to run in one slot; what they hold is passed beside.
#[derive(Debug, Clone, Copy)]
pub struct StackRows<'a> {
    /// Where.
    pub slot: Slot,
    /// How many.
    pub count: usize,
    /// For each the waiting row it follows, as [`crate::plugin::SlotRows::parents`] says.
    pub parents: &'a [Option<usize>],
}

/// A row that waits for a commit.
#[derive(Debug, Clone, Copy)]
struct Waiting {
    parent: Option<usize>,
    /// Waiting rows above it.
    depth: usize,
    /// Waiting rows `0..run` are the first ones of its path, hence contiguous in the cache.
    run: usize,
}

/// One open sequence with its cache.
pub(super) struct SlotState<C> {
    pub(super) cache: C,
    /// Committed positions.
    len: usize,
    waiting: Vec<Waiting>,
}

/// The slots of a model.
pub(super) struct Slots<C> {
    slots: Vec<Option<SlotState<C>>>,
    /// Positions a slot can hold.
    pub(super) capacity: usize,
}

/// Where one row lies, and what it sees: places `0..contiguous` of the cache, then single ones.
pub(super) struct RowView {
    /// Its place in the cache.
    pub(super) at: usize,
    /// Its position in the sequence.
    pub(super) position: usize,
    pub(super) contiguous: usize,
    pub(super) scattered: Vec<u32>,
}

impl RowView {
    /// Where a window of so many positions begins: the first place of the contiguous ones that is seen, and how many of
    /// the single ones are not. Distance is counted along positions.
    pub(super) fn since(&self, window: Option<usize>) -> (usize, usize) {
        let first = window.map_or(0, |window| (self.position + 1).saturating_sub(window));
        (
            first.min(self.contiguous),
            first.saturating_sub(self.contiguous),
        )
    }
}

impl<C> Slots<C> {
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            slots: Vec::new(),
            capacity,
        }
    }

    /// Opens a slot that is not open yet, with a cache that is made only then.
    pub(super) fn open(&mut self, slot: usize, cache: impl FnOnce() -> Result<C>) -> Result<()> {
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
            cache: cache()?,
            len: 0,
            waiting: Vec::new(),
        });
        Ok(())
    }

    /// Opens slot `to` with the first `count` committed rows of slot `from`: `cache` is made, and `copy(to, from)` copies
    /// them.
    pub(super) fn fork(
        &mut self,
        [from, to]: [usize; 2],
        count: usize,
        cache: impl FnOnce() -> Result<C>,
        copy: impl FnOnce(&mut C, &C) -> Result<()>,
    ) -> Result<()> {
        let len = self.get(from)?.len;
        if count > len {
            return Err(Error::Invalid(format!(
                "slot {to}: {count} rows of slot {from}, which has {len}"
            )));
        }
        self.open(to, cache)?;
        let mut opened = self.slots[to].take();
        let copied = match (&mut opened, self.cache(from)) {
            (Some(opened), Some(from)) => copy(&mut opened.cache, from),
            _ => Ok(()),
        };
        copied?;
        if let Some(opened) = &mut opened {
            opened.len = count;
        }
        self.slots[to] = opened;
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

    /// The cache of a slot that is open.
    pub(super) fn cache(&self, slot: usize) -> Option<&C> {
        self.slots.get(slot)?.as_ref().map(|s| &s.cache)
    }

    /// Checks rows and notes them as waiting, after those that wait already; returns what each of them sees, slot
    /// by slot.
    pub(super) fn begin(&mut self, rows: &[StackRows<'_>]) -> Result<Vec<Vec<RowView>>> {
        let capacity = self.capacity;
        for (i, r) in rows.iter().enumerate() {
            let state = self.get(r.slot)?;
            check_rows(r, state.len, state.waiting.len(), capacity)?;
            if rows[..i].iter().any(|other| other.slot == r.slot) {
                return Err(Error::Invalid(format!("slot {} twice in one step", r.slot)));
            }
        }
        rows.iter().map(|r| Ok(self.get(r.slot)?.wait(r))).collect()
    }

    /// Checks a path and moves its rows together with `copy(cache, moves)`, each from one place to an earlier one, in
    /// order; the others are dropped.
    pub(super) fn commit(
        &mut self,
        slot: usize,
        path: &[usize],
        mut copy: impl FnMut(&mut C, &[(usize, usize)]) -> Result<()>,
    ) -> Result<()> {
        let state = self.get(slot)?;
        let mut parent = None;
        for &row in path {
            if state.waiting.get(row).map(|w| w.parent) != Some(parent) {
                return Err(Error::Invalid(format!(
                    "commit of slot {slot}: row {row} of {} does not follow {parent:?}",
                    state.waiting.len()
                )));
            }
            parent = Some(row);
        }
        let len = state.len;
        let moved = path.iter().enumerate().filter(|(i, row)| i != *row);
        let moves: Vec<_> = moved.map(|(i, row)| (len + row, len + i)).collect();
        if !moves.is_empty() {
            copy(&mut state.cache, &moves)?;
        }
        state.len += path.len();
        state.waiting.clear();
        Ok(())
    }
}

impl<C> SlotState<C> {
    fn wait(&mut self, rows: &StackRows<'_>) -> Vec<RowView> {
        let first = self.waiting.len();
        for i in 0..rows.count {
            let parent = match rows.parents {
                [] if i == 0 => None,
                [] => Some(first + i - 1),
                parents => parents[i],
            };
            let row = first + i;
            let (depth, run) = match parent {
                None => (0, usize::from(row == 0)),
                Some(p) => {
                    let above = self.waiting[p];
                    let whole = above.run == p + 1 && row == p + 1;
                    (above.depth + 1, if whole { row + 1 } else { above.run })
                }
            };
            self.waiting.push(Waiting { parent, depth, run });
        }
        (first..self.waiting.len())
            .map(|row| self.view(row))
            .collect()
    }

    fn view(&self, row: usize) -> RowView {
        let Waiting { depth, run, .. } = self.waiting[row];
        let mut scattered = Vec::with_capacity(depth + 1 - run);
        let mut above = Some(row);
        while scattered.len() < depth + 1 - run {
            let Some(row) = above else { break };
            scattered.push((self.len + row) as u32);
            above = self.waiting[row].parent;
        }
        scattered.reverse();
        RowView {
            at: self.len + row,
            position: self.len + depth,
            contiguous: self.len + run,
            scattered,
        }
    }
}

fn check_rows(rows: &StackRows<'_>, len: usize, waiting: usize, capacity: usize) -> Result<()> {
    let n = rows.count;
    let bad = |message: String| Err(Error::Invalid(message));
    if n == 0 {
        return bad(format!("slot {}: no rows", rows.slot));
    }
    if len + waiting + n > capacity {
        return bad(format!(
            "slot {}: {} positions and {n} more do not fit a context of {capacity}",
            rows.slot,
            len + waiting
        ));
    }
    if !rows.parents.is_empty() && rows.parents.len() != n {
        return bad(format!("{} parents for {n} rows", rows.parents.len()));
    }
    let after = |(i, p): &(usize, &Option<usize>)| p.is_some_and(|p| p >= waiting + i);
    match rows.parents.iter().enumerate().find(after) {
        Some((i, p)) => bad(format!("row {} before its parent {p:?}", waiting + i)),
        None => Ok(()),
    }
}

/// Refuses tokens that a vocabulary does not have.
pub(super) fn check_tokens(tokens: &[u32], vocab: usize) -> Result<()> {
    match tokens.iter().find(|&&t| t as usize >= vocab) {
        Some(&token) => Err(outside(token, vocab)),
        None => Ok(()),
    }
}

/// The rows of a step, its tokens and wanted rows checked.
pub(super) fn rows_of<'a>(step: &Step<'a>, vocab: usize) -> Result<Vec<StackRows<'a>>> {
    let rows = step.slots.iter().map(|s| {
        check_tokens(s.tokens, vocab)?;
        s.want.of(s.tokens.len())?;
        Ok(StackRows {
            slot: s.slot,
            count: s.tokens.len(),
            parents: s.parents,
        })
    });
    rows.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugin::{SlotRows, Want};

    type Seen = (usize, usize, Vec<u32>);

    /// Position, contiguous and scattered places of rows added one batch after the other behind `len` positions.
    fn seen(len: usize, batches: &[&[Option<usize>]]) -> Vec<Seen> {
        let mut slots = Slots::new(64);
        slots.open(0, || Ok(())).expect("open");
        let begin = |slots: &mut Slots<()>, count, parents| {
            let rows = StackRows {
                slot: 0,
                count,
                parents,
            };
            slots.begin(&[rows]).expect("begin").remove(0)
        };
        if len > 0 {
            begin(&mut slots, len, &[]);
            let all: Vec<usize> = (0..len).collect();
            slots.commit(0, &all, |_, _| Ok(())).expect("commit");
        }
        let views = batches
            .iter()
            .flat_map(|parents| begin(&mut slots, parents.len(), parents));
        views
            .enumerate()
            .map(|(i, v)| {
                assert_eq!(v.at, len + i);
                (v.position, v.contiguous, v.scattered)
            })
            .collect()
    }

    #[test]
    fn a_chain_is_contiguous_and_branches_are_scattered() {
        let chain = seen(5, &[&[None, Some(0), Some(1)]]);
        assert_eq!(chain, [(5, 6, vec![]), (6, 7, vec![]), (7, 8, vec![])]);
        //      0
        //    1   2
        //    3   4
        let tree = [None, Some(0), Some(0), Some(1), Some(2)];
        let expected = [
            (5, 6, vec![]),
            (6, 7, vec![]),
            (6, 6, vec![7]),
            (7, 7, vec![8]),
            (7, 6, vec![7, 9]),
        ];
        assert_eq!(seen(5, &[&tree]), expected);
        // The same, level by level.
        assert_eq!(seen(5, &[&tree[..1], &tree[1..3], &tree[3..]]), expected);
        let forest = seen(0, &[&[None, None, Some(1)]]);
        assert_eq!(
            forest,
            [(0, 1, vec![]), (0, 0, vec![1]), (1, 0, vec![1, 2])]
        );
    }

    #[test]
    fn a_commit_must_follow_parents() {
        let mut slots = Slots::new(10);
        slots.open(0, || Ok(())).expect("open");
        let parents = [None, Some(0), Some(0)];
        let rows = StackRows {
            slot: 0,
            count: 3,
            parents: &parents,
        };
        slots.begin(&[rows]).expect("begin");
        assert!(slots.commit(0, &[0, 3], |_, _| Ok(())).is_err());
        assert!(slots.commit(0, &[1], |_, _| Ok(())).is_err());
        let mut moved = Vec::new();
        slots
            .commit(0, &[0, 2], |_, moves| {
                moved.extend_from_slice(moves);
                Ok(())
            })
            .expect("commit");
        assert_eq!(moved, [(2, 1)]);
        assert_eq!(slots.get(0).expect("open").len, 2);
    }

    #[test]
    fn steps_that_do_not_fit_are_refused() {
        let mut slots = Slots::new(4);
        slots.open(0, || Ok(())).expect("open");
        assert!(slots.open(0, || Ok(())).is_err());
        let mut refused = |slot, count, parents: &[Option<usize>]| {
            let rows = StackRows {
                slot,
                count,
                parents,
            };
            let error = slots.begin(&[rows]).map(|_| ()).expect_err("refused");
            error.to_string()
        };
        assert!(refused(1, 1, &[]).contains("not open"));
        assert!(refused(0, 0, &[]).contains("no rows"));
        assert!(refused(0, 5, &[]).contains("context of 4"));
        assert!(refused(0, 2, &[None]).contains("1 parents for 2 rows"));
        assert!(refused(0, 2, &[None, Some(1)]).contains("before its parent"));
        let refused = |tokens: &[u32], want| {
            let rows = SlotRows {
                slot: 0,
                tokens,
                parents: &[],
                want,
            };
            let step = Step {
                slots: vec![rows],
                taps: &[],
            };
            rows_of(&step, 10)
                .map(|_| ())
                .expect_err("refused")
                .to_string()
        };
        assert!(refused(&[10], Want::None).contains("vocabulary of 10"));
        assert!(refused(&[1, 2], Want::Rows(&[0, 2])).contains("row 2 of 2"));
    }
}
