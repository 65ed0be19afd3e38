//! What a draft could have proposed: recorded once, any smaller tree can be chosen from it without the draft.
//!
//! Which nodes an EAGLE-2 tree expands depends on its width: the ten best of a level need not hold the two that a tree of
//! width 2 would have gone on from. So the trees of all widths grow side by side over one store of children, each node asked
//! about once. What fewer nodes or levels would have kept is among what these keep: scores fall along a path, so that a
//! smaller total only expands less. Beside them the path of the target's own text is asked about, which is all that a tree of
//! fixed shape is ever followed along.

use std::collections::BTreeSet;

use scylla_core::plugin::{Candidates, Request};
use scylla_core::tree::{Budget, Drawing, Tree};
use scylla_core::{Error, Result};

use super::dynamic::best;
use super::{Dynamic, Growth, Level, Logits, Scored, Shape, Source, TreeDraft};
use crate::network::Nodes;

/// A node's token where it is not known, and nothing depends on it.
const UNKNOWN: u32 = u32::MAX;

/// Candidates in the place of a network.
#[derive(Clone, Copy)]
pub(super) struct Known<'a> {
    candidates: &'a Candidates,
    /// Whether nodes off the candidates get children without a token, as in shapes that do not depend on scores.
    fixed: bool,
}

impl Known<'_> {
    /// As [`Level::top`].
    pub(super) fn top(&self, tree: &Tree, node: usize, k: usize) -> Result<Vec<(u32, f64)>> {
        let c = self.candidates;
        let place = c.at(&tree.tokens_to(node)[1..]);
        let children = place.and_then(|place| c.children[place].clone());
        let mut top = match children {
            Some(children) => children
                .take(k)
                .map(|child| (c.tokens[child], c.logs[child]))
                .collect(),
            None if self.fixed => Vec::new(),
            None => {
                return Err(Error::Invalid(
                    "the candidates do not hold the children of a node that this tree expands"
                        .into(),
                ));
            }
        };
        if self.fixed {
            top.resize(k.min(c.most), (UNKNOWN, 0.0));
        }
        Ok(top)
    }
}

/// The tree that a draft would have proposed, from its candidates: of the very nodes, where the budget is none larger than
/// what they were asked for. Of a shape whose `fixed` form does not depend on scores, children that the target's text does not
/// come by are there without their token.
///
/// # Errors
/// If the candidates do not hold what the tree needs, or its children are drawn at random.
pub fn regrow(
    shape: &mut dyn Shape,
    fixed: bool,
    candidates: &Candidates,
    request: &mut Request<'_>,
) -> Result<Scored> {
    let mut growth = Growth::of_points(request.root);
    if request.budget.levels() == 0 {
        growth.frontier.clear();
    }
    while !growth.frontier.is_empty() {
        let mut level = Level {
            source: Source::Known(Known { candidates, fixed }),
            request,
        };
        shape.grow(&mut growth, &mut level)?;
        growth.level += 1;
    }
    let nodes = shape.chosen(&growth, request.budget);
    Ok(Scored {
        tree: growth.tree.select(&nodes)?,
        scores: nodes.iter().map(|&n| growth.scores[n]).collect(),
    })
}

/// The trees of all widths on their way.
struct Widths(Vec<(Budget, Growth)>);

impl Widths {
    fn new(root: u32, budget: Budget) -> Self {
        let widths = 1..=budget.width.min(budget.total - 1);
        let of = |width| (Budget { width, ..budget }, Growth::of_points(root));
        Self(widths.map(of).collect())
    }

    /// Lets each take its level from the candidates; returns the candidates that it goes on from.
    fn grow(
        &mut self,
        candidates: &Candidates,
        request: &mut Request<'_>,
    ) -> Result<BTreeSet<usize>> {
        let mut next = BTreeSet::new();
        for (budget, growth) in &mut self.0 {
            if growth.frontier.is_empty() {
                continue;
            }
            let mut request = Request {
                slot: request.slot,
                root: request.root,
                budget: *budget,
                sampling: request.sampling,
                chance: &mut *request.chance,
            };
            let known = Known {
                candidates,
                fixed: false,
            };
            let mut level = Level {
                source: Source::Known(known),
                request: &mut request,
            };
            Dynamic.grow(growth, &mut level)?;
            growth.level += 1;
            for &node in &growth.frontier {
                next.extend(candidates.at(&growth.tree.tokens_to(node)[1..]));
            }
        }
        Ok(next)
    }

    /// The candidates that any of these trees proposes, or that of fewer levels.
    fn proposed(&self, candidates: &Candidates) -> BTreeSet<usize> {
        let mut kept = BTreeSet::new();
        for (budget, growth) in &self.0 {
            let depths = growth.tree.depths();
            for levels in 1..=budget.levels() {
                // Nodes lie level by level.
                let within = depths.partition_point(|&depth| depth <= levels);
                for node in best(&growth.scores[..within], 1, budget.total - 1) {
                    kept.extend(candidates.at(&growth.tree.tokens_to(node)[1..]));
                }
            }
        }
        kept
    }
}

impl TreeDraft {
    /// As [`DraftModel::candidates`](scylla_core::plugin::DraftModel::candidates).
    pub(super) fn all_candidates(
        &mut self,
        request: &mut Request<'_>,
        follows: &[u32],
    ) -> Result<Candidates> {
        let budget = request.budget;
        if !request.sampling.is_greedy() {
            return Err(Error::Invalid(
                "candidates are asked for at temperature 0: nothing is drawn".into(),
            ));
        }
        let ids = self.network.ids();
        let mut found = Candidates::root(request.root, ids.limit);
        let room = self.network.room(request.slot);
        let Some(room) = room.filter(|_| budget.levels() > 0) else {
            found.children[0] = Some(1..1);
            return Ok(found);
        };
        let mut widths = Widths::new(request.root, budget);
        // All of them as one tree, which keeps account of which was forwarded when.
        let mut all = Growth::new(request.root, Drawing::Deterministic, ids, room);
        all.frontier.clear();
        let (mut frontier, mut text) = (vec![0], Some(0));
        self.network.start(&[request.slot], &mut self.logits)?;
        for level in 0..=budget.depth {
            for (row, &node) in frontier.iter().enumerate() {
                let children = self.best_children(row, &all.tree, node, request)?;
                for &(token, log) in &children {
                    all.push(node, token, log, 0);
                }
                found.expand(node, children);
            }
            let mut next = widths.grow(&found, request)?;
            text = match (text, follows.get(level)) {
                (Some(node), Some(&token)) => found.child(node, token),
                _ => None,
            };
            if level == budget.depth {
                break;
            }
            next.extend(text);
            frontier = next.into_iter().collect();
            if frontier.is_empty() {
                break;
            }
            all.frontier.clone_from(&frontier);
            let (tokens, parents) = all.forward();
            if tokens.len() < frontier.len() {
                return Err(Error::Invalid(format!(
                    "the draft has room for {room} nodes of a tree; its candidates within total {}, width {}, depth {} are more",
                    budget.total, budget.width, budget.depth
                )));
            }
            let nodes = [Nodes {
                slot: request.slot,
                tokens: &tokens,
                parents: &parents,
            }];
            self.network.expand(&nodes, &mut self.logits)?;
        }
        Ok(pruned(&found, widths.proposed(&found), follows))
    }

    /// The most probable children of a candidate, whose logits are a row of the last forward.
    fn best_children(
        &mut self,
        row: usize,
        tree: &Tree,
        node: usize,
        request: &mut Request<'_>,
    ) -> Result<Vec<(u32, f64)>> {
        let seen = self.seen.get(&request.slot);
        let mut logits = Logits {
            logits: &self.logits,
            first: 0,
            top: &mut None,
            ids: self.network.ids(),
            seen: seen.map_or(&[], |s| &s.ids[..]),
            scratch: &mut self.scratch,
        };
        logits.top(request.sampling, row, tree, node, request.budget.width)
    }
}

/// What is proposed by any tree, lies on the text's path, or was asked about: of each node the children up to the last of
/// these.
fn pruned(found: &Candidates, proposed: BTreeSet<usize>, follows: &[u32]) -> Candidates {
    let mut needed = proposed;
    let mut at = 0;
    for &token in follows {
        let Some(next) = found.child(at, token) else {
            break;
        };
        needed.insert(next);
        at = next;
    }
    let asked = |&node: &usize| found.children[node].is_some();
    needed.extend((1..found.tokens.len()).filter(asked));
    let mut kept = Candidates::root(found.tokens[0], found.most);
    let mut queue = std::collections::VecDeque::from([(0, 0)]);
    while let Some((old, new)) = queue.pop_front() {
        let Some(children) = found.children[old].clone() else {
            continue;
        };
        let last = needed.range(children.clone()).next_back();
        let children = children.start..last.map_or(children.start, |last| last + 1);
        let first = kept.tokens.len();
        let child = |c: usize| (found.tokens[c], found.logs[c]);
        kept.expand(new, children.clone().map(child));
        queue.extend(children.enumerate().map(|(i, old)| (old, first + i)));
    }
    kept
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use scylla_core::chance::Seeded;
    use scylla_core::plugin::DraftModel;
    use scylla_core::sampling::Sampling;

    use super::*;
    use crate::tree::table::{Table, VOCAB};
    use crate::tree::{TreeKind, TreeSettings};

    fn ask<T>(budget: Budget, of: impl FnOnce(&mut Request<'_>) -> Result<T>) -> Result<T> {
        let (sampling, chance) = (Sampling::default(), &mut Seeded::new(0, 0));
        of(&mut Request {
            slot: 0,
            root: 3,
            budget,
            sampling: &sampling,
            chance,
        })
    }

    /// Tokens of a text that a tree holds below its root.
    fn along(tree: &Tree, text: &[u32]) -> usize {
        let (mut at, mut count) = (0, 0);
        for &token in text {
            let Some(next) = tree.children(at).find(|&c| tree.tokens[c] == token) else {
                break;
            };
            (at, count) = (next, count + 1);
        }
        count
    }

    fn settings(kind: u8) -> TreeSettings {
        TreeSettings {
            tree: match kind {
                0 => TreeKind::Dynamic,
                1 => TreeKind::Chain,
                2 => TreeKind::Static,
                3 => TreeKind::Widths,
                _ => TreeKind::Optimal,
            },
            widths: match kind {
                3 => vec![3, 1, 2],
                _ => Vec::new(),
            },
            alpha: match kind {
                4.. => vec![vec![0.5, 0.2, 0.1], vec![0.4, 0.3]],
                _ => Vec::new(),
            },
            ..TreeSettings::default()
        }
    }

    proptest! {
        /// Whatever is asked for within the limits that were recorded: a dynamic tree node by node, another by its size and
        /// by what it holds of the text.
        #[test]
        fn a_tree_regrown_from_candidates_is_the_one_that_the_draft_proposes(
            seed in 0u64..100_000,
            (total, width, depth) in (2usize..40, 1usize..9, 0usize..5),
            (less_total, less_width, less_depth) in (0usize..40, 0usize..8, 0usize..5),
            text in prop::collection::vec(0..VOCAB as u32, 0..7),
            likely in any::<bool>(),
            kind in 0u8..5,
        ) {
            let most = Budget { total, width, depth };
            let budget = Budget {
                total: total.saturating_sub(less_total).max(1),
                width: width.saturating_sub(less_width).max(1),
                depth: depth.saturating_sub(less_depth),
            };
            let mut draft = TreeDraft::new(Table::new(seed), &settings(kind)).expect("draft");
            draft.open(0).expect("open");
            // A text as the draft holds it probable, or any other.
            let text = match likely {
                true => {
                    let chain = TreeSettings { tree: TreeKind::Chain, ..TreeSettings::default() };
                    let mut chain = TreeDraft::new(Table::new(seed), &chain).expect("draft");
                    chain.open(0).expect("open");
                    ask(Budget::chain(6), |r| chain.propose(std::slice::from_mut(r))).expect("a chain").remove(0).tokens.split_off(1)
                }
                false => text,
            };
            let found = ask(most, |r| draft.candidates(r, &text)).expect("candidates");
            prop_assert!(found.logs.iter().all(|&l| l == Candidates::counted(l)));
            let expected = ask(budget, |r| draft.propose_scored(std::slice::from_mut(r))).expect("a tree").remove(0);
            let mut shape = settings(kind).shape().expect("a shape");
            let again = ask(budget, |r| regrow(&mut *shape, kind != 0, &found, r)).expect("regrown");
            if kind == 0 {
                prop_assert_eq!(&again, &expected);
            }
            prop_assert_eq!(&again.tree.parents, &expected.tree.parents);
            prop_assert_eq!(along(&again.tree, &text), along(&expected.tree, &text));
        }
    }

    #[test]
    fn a_tree_of_more_than_was_recorded_is_refused() {
        let mut draft = TreeDraft::new(Table::new(1), &settings(0)).expect("draft");
        draft.open(0).expect("open");
        let budget = |depth| Budget {
            total: 30,
            width: 3,
            depth,
        };
        let found = ask(budget(0), |r| draft.candidates(r, &[])).expect("candidates");
        let mut shape = settings(0).shape().expect("a shape");
        let error = ask(budget(2), |r| regrow(&mut *shape, false, &found, r));
        assert!(
            error
                .expect_err("refused")
                .to_string()
                .contains("do not hold")
        );
    }
}
