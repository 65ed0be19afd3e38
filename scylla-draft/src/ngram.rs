//! Prompt lookup: proposes what followed the last few tokens earlier in the same sequence.

use std::collections::HashMap;

use scylla_core::plugin::{Committed, DraftModel, Request, Slot};
use scylla_core::sampling::Sampling;
use scylla_core::tree::{Drawing, Tree};
use scylla_core::{Error, Result};

/// Prompt-lookup drafting over prompt and output (as in Saxena's prompt lookup decoding and LLMA,
/// arXiv:2304.04487). Point masses, so it needs no q and is exact under any rule for deterministic trees.
///
/// The longest earlier match of the last `longest..=shortest` tokens proposes its continuation, the latest
/// occurrence first. With a budget wider than 1, further continuations branch off where they differ.
#[derive(Debug, Clone)]
pub struct Ngram {
    shortest: usize,
    longest: usize,
    slots: HashMap<Slot, History>,
}

/// Tokens of one sequence, and where each `shortest`-gram occurred.
#[derive(Debug, Clone, Default)]
struct History {
    tokens: Vec<u32>,
    /// Positions just after each occurrence of a `shortest`-gram, ascending, by its hash.
    after: HashMap<u64, Vec<u32>>,
}

/// Occurrences looked at in one proposal: enough to find the longest match, bounded for repetitive texts.
const LOOKED_AT: usize = 256;

impl Ngram {
    /// Matches of `shortest..=longest` tokens.
    ///
    /// # Errors
    /// If `shortest` is 0 or above `longest`.
    pub fn new(shortest: usize, longest: usize) -> Result<Self> {
        if shortest == 0 || shortest > longest {
            return Err(Error::Invalid(format!(
                "n-gram lengths {shortest}..={longest}: the shortest must be at least 1 and at most the longest"
            )));
        }
        Ok(Self {
            shortest,
            longest,
            slots: HashMap::new(),
        })
    }
}

/// FNV-1a over token ids; collisions cost a comparison, never a wrong match.
fn hash(tokens: &[u32]) -> u64 {
    tokens.iter().fold(0xcbf2_9ce4_8422_2325, |h, &t| {
        (h ^ u64::from(t)).wrapping_mul(0x0100_0000_01b3)
    })
}

impl History {
    fn push(&mut self, token: u32, n: usize) {
        self.tokens.push(token);
        let len = self.tokens.len();
        if len >= n {
            let key = hash(&self.tokens[len - n..]);
            self.after.entry(key).or_default().push(len as u32);
        }
    }

    /// Starts of continuations of the last tokens: longer matches first, then later ones.
    fn continuations(&self, shortest: usize, longest: usize, count: usize) -> Vec<usize> {
        let len = self.tokens.len();
        if len < shortest {
            return Vec::new();
        }
        let suffix = &self.tokens[len - shortest..];
        let Some(after) = self.after.get(&hash(suffix)) else {
            return Vec::new();
        };
        let mut found: Vec<(usize, usize)> = after
            .iter()
            .rev()
            .take(LOOKED_AT)
            .map(|&at| at as usize)
            .filter(|&at| at < len && self.tokens[at - shortest..at] == *suffix)
            .map(|at| (self.matched(at, longest), at))
            .collect();
        found.sort_by(|a, b| b.cmp(a));
        found.truncate(count);
        found.into_iter().map(|(_, at)| at).collect()
    }

    /// Tokens before `at` that equal the last tokens, at most `longest`.
    fn matched(&self, at: usize, longest: usize) -> usize {
        let len = self.tokens.len();
        (1..=longest.min(at))
            .take_while(|&i| self.tokens[at - i] == self.tokens[len - i])
            .count()
    }
}

impl DraftModel for Ngram {
    fn drawing(&self, _sampling: &Sampling) -> Drawing {
        Drawing::Deterministic
    }

    fn open(&mut self, slot: Slot) -> Result<()> {
        self.slots.insert(slot, History::default());
        Ok(())
    }

    fn close(&mut self, slot: Slot) {
        self.slots.remove(&slot);
    }

    fn observe(&mut self, committed: &[Committed<'_>]) -> Result<()> {
        for c in committed {
            let history = self
                .slots
                .get_mut(&c.slot)
                .ok_or_else(|| Error::Invalid(format!("slot {} is not open", c.slot)))?;
            for &token in c.tokens {
                history.push(token, self.shortest);
            }
        }
        Ok(())
    }

    fn propose(&mut self, requests: &mut [Request<'_>]) -> Result<Vec<Tree>> {
        let grow = |r: &Request<'_>| {
            let mut tree = Tree::root(r.root);
            let Some(history) = self.slots.get(&r.slot) else {
                return tree;
            };
            for start in history.continuations(self.shortest, self.longest, r.budget.width) {
                let mut node = 0;
                for &token in history.tokens[start..].iter().take(r.budget.levels()) {
                    let known = tree
                        .children(node)
                        .find(|&child| tree.tokens[child] == token);
                    node = match known {
                        Some(child) => child,
                        None if tree.len() < r.budget.total => tree.push(node, token),
                        None => return tree,
                    };
                }
            }
            tree
        };
        Ok(requests.iter().map(grow).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use scylla_core::chance::Seeded;
    use scylla_core::tree::Budget;

    fn propose(tokens: &[u32], budget: Budget) -> Tree {
        let mut draft = Ngram::new(1, 3).expect("lengths");
        draft.open(0).expect("open");
        draft
            .observe(&[Committed {
                slot: 0,
                tokens,
                path: &[],
                taps: &[],
            }])
            .expect("observe");
        let sampling = Sampling::default();
        let root = tokens[tokens.len() - 1];
        let mut chance = Seeded::new(0, 0);
        let request = Request {
            slot: 0,
            root,
            budget,
            sampling: &sampling,
            chance: &mut chance,
        };
        draft.propose(&mut [request]).expect("propose").remove(0)
    }

    #[test]
    fn the_longest_match_wins_over_the_latest() {
        // 1 2 3 occurs once; a bare 3 occurs later.
        let tree = propose(&[1, 2, 3, 7, 8, 3, 9, 1, 2, 3], Budget::chain(2));
        assert_eq!(tree.tokens, [3, 7, 8]);
    }

    #[test]
    fn of_equal_matches_the_latest_wins_and_others_branch_off() {
        let tokens = [5, 1, 6, 2, 5, 1, 7, 2, 5, 1];
        assert_eq!(propose(&tokens, Budget::chain(2)).tokens, [1, 7, 2]);
        let tree = propose(
            &tokens,
            Budget {
                total: 10,
                width: 2,
                depth: 1,
            },
        );
        assert_eq!(tree.tokens, [1, 7, 2, 6, 2]);
        assert_eq!(tree.parents, [0, 0, 1, 0, 3]);
    }

    #[test]
    fn without_a_match_the_root_stands_alone() {
        assert!(propose(&[1, 2, 3], Budget::chain(5)).is_empty());
        assert!(propose(&[1], Budget::chain(5)).is_empty());
    }

    #[test]
    fn lengths_out_of_order_are_refused() {
        assert!(Ngram::new(0, 2).is_err());
        assert!(Ngram::new(3, 2).is_err());
    }

    proptest! {
        #[test]
        fn trees_keep_the_budget_and_repeat_what_was_seen(
            tokens in prop::collection::vec(0u32..4, 1..80), total in 1usize..20, width in 1usize..4, depth in 0usize..6,
        ) {
            let budget = Budget { total, width, depth };
            let tree = propose(&tokens, budget);
            prop_assert!(tree.check(tokens[tokens.len() - 1], 4, budget).is_ok());
            prop_assert!(tree.width() <= width);
            for node in 1..tree.len() {
                let path: Vec<u32> = std::iter::once(tree.tokens[0])
                    .chain(tree.path_to(node).into_iter().map(|n| tree.tokens[n]))
                    .collect();
                prop_assert!(tokens.windows(path.len()).any(|w| w == path));
            }
        }
    }
}
