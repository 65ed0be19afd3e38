//! EAGLE-2's dynamic tree (arXiv:2406.16858, section 4): expand the most probable nodes, keep the most probable.

use scylla_core::Result;
use scylla_core::sampling::Sampling;
use scylla_core::tree::{Budget, Drawing};

use super::{Growth, Level, Shape};

/// Level 0 holds the `width` most probable children of the root; then `depth` times the best `width` nodes of the
/// last level get `width` children each. Of all of them the best `total - 1` are proposed, a node's score being the
/// probability of its path under the draft; those that do not pay for a row are left out. Point masses only: re-ranking what was drawn at random is not exact.
#[derive(Debug, Clone, Copy, Default)]
pub struct Dynamic;

/// Indices of the `n` best scores among nodes `from..`, best first; ties go to the earlier node. Scores are sums without
/// rounding, so two of the same terms are equal.
pub(super) fn best(scores: &[f64], from: usize, n: usize) -> Vec<usize> {
    let mut nodes: Vec<usize> = (from..scores.len()).collect();
    let order = |a: &usize, b: &usize| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b));
    if n < nodes.len() {
        nodes.select_nth_unstable_by(n, order);
        nodes.truncate(n);
    }
    nodes.sort_unstable_by(order);
    nodes
}

impl Shape for Dynamic {
    fn drawing(&self, _: &Sampling) -> Drawing {
        Drawing::Deterministic
    }

    fn grow(&mut self, growth: &mut Growth, level: &mut Level<'_, '_>) -> Result<()> {
        let budget = level.budget();
        // A child behind `total - 1` better siblings is never proposed.
        let width = budget.width.min(budget.total - 1);
        let first = growth.tree.len();
        for (i, node) in std::mem::take(&mut growth.frontier).into_iter().enumerate() {
            for (token, log) in level.top(i, &growth.tree, node, width)? {
                let score = growth.scores[node] + log;
                if score >= growth.least {
                    growth.push(node, token, score, 0);
                }
            }
        }
        if growth.level < budget.depth {
            growth.frontier = best(&growth.scores, first, width);
            // Children score no higher than their parent: below the least score that is kept already, none of
            // them will be proposed.
            if let Some(&least) = best(&growth.scores, 1, budget.total - 1).get(budget.total - 2) {
                let (scores, least) = (&growth.scores, growth.scores[least]);
                growth.frontier.retain(|&node| scores[node] >= least);
            }
        }
        Ok(())
    }

    fn is_ranked(&self, _: Drawing) -> bool {
        true
    }

    fn chosen(&self, growth: &Growth, budget: Budget) -> Vec<usize> {
        let mut nodes = best(&growth.scores, 1, budget.total.saturating_sub(1));
        nodes.push(0);
        nodes.sort_unstable();
        nodes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use scylla_core::chance::Seeded;
    use scylla_core::plugin::{Candidates, DraftModel, Price, Request};
    use scylla_core::tree::Tree;

    use super::*;
    use crate::tree::table::{Table, VOCAB, logits};
    use crate::tree::{TreeDraft, TreeSettings};

    /// EAGLE-2's tree as the paper says it, nothing left out: (tokens below the root, score) of what is proposed.
    fn naive(seed: u64, budget: Budget) -> Vec<(Vec<u32>, f64)> {
        let children = |(path, score): &(Vec<u32>, f64)| -> Vec<(Vec<u32>, f64)> {
            let row = logits(path, seed);
            let sum: f64 = row.iter().map(|&v| f64::from(v).exp()).sum();
            let mut order: Vec<usize> = (0..VOCAB).collect();
            order.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
            order.truncate(budget.width);
            let child = |&i: &usize| {
                let longer = [&path[..], &[i as u32]].concat();
                let log = Candidates::counted(f64::from(row[i]) - sum.ln());
                (longer, score + log)
            };
            order.iter().map(child).collect()
        };
        let best = |nodes: &[(Vec<u32>, f64)], n: usize| -> Vec<usize> {
            let mut order: Vec<usize> = (0..nodes.len()).collect();
            order.sort_by(|&a, &b| nodes[b].1.total_cmp(&nodes[a].1).then(a.cmp(&b)));
            order.truncate(n);
            order
        };
        let mut all = children(&(Vec::new(), 0.0));
        let mut frontier = all.clone();
        for _ in 0..budget.depth {
            let level: Vec<_> = frontier.iter().flat_map(children).collect();
            frontier = best(&level, budget.width)
                .into_iter()
                .map(|i| level[i].clone())
                .collect();
            all.extend(level);
        }
        let mut kept = best(&all, budget.total - 1);
        kept.sort_unstable();
        kept.into_iter().map(|i| all[i].clone()).collect()
    }

    proptest! {
        #[test]
        fn at_a_price_the_nodes_that_pay_are_the_best_of_those_without_one(
            seed in 0u64..100_000, total in 2usize..30, width in 1usize..9, depth in 0usize..5,
            rows in prop::collection::vec(0.0f64..0.3, 1..8),
        ) {
            let budget = Budget { total, width, depth };
            let sampling = Sampling::default();
            let rows: Vec<f64> = rows.iter().scan(0.0, |sum, r| { *sum += r; Some(*sum) }).collect();
            let price = Price { rows, level: 0.0 };
            let grow = |price: &Price| {
                let mut draft = TreeDraft::new(Table::new(seed), &TreeSettings::default()).expect("draft");
                draft.price(price);
                draft.open(0).expect("open");
                let request = Request { slot: 0, root: 3, budget, sampling: &sampling, chance: &mut Seeded::new(0, 0) };
                draft.propose(&mut [request]).expect("propose").remove(0)
            };
            let (all, kept) = (grow(&Price::default()), grow(&price));
            prop_assert!(kept.check(3, VOCAB, budget).is_ok());
            // Scores of all nodes there could be, by path.
            let scores = naive(seed, budget);
            let of = |path: &[u32]| scores.iter().find(|(p, _)| p[..] == *path).map(|s| s.1);
            let probability = |tree: &Tree, n: usize| of(&tree.tokens_to(n)[1..]).map(f64::exp);
            let mut best: Vec<f64> = (1..all.len()).filter_map(|n| probability(&all, n)).collect();
            best.sort_by(|a, b| b.total_cmp(a));
            prop_assert_eq!(best.len(), all.len() - 1);
            let worth = price.paying(best.iter().copied());
            let sum: f64 = best[..worth].iter().sum();
            let found: Vec<f64> = (1..kept.len()).filter_map(|n| probability(&kept, n)).collect();
            // Levels that are not expected to pay are not drafted, so there may be fewer, never worse ones.
            prop_assert_eq!(found.len(), kept.len() - 1);
            prop_assert!(found.len() <= worth);
            prop_assert!(found.iter().sum::<f64>() <= sum + 1e-6);
            prop_assert!(found.iter().all(|&p| p >= price.least() - 1e-6));
        }

        #[test]
        fn leaving_out_hopeless_nodes_does_not_change_the_tree(
            seed in 0u64..100_000, total in 2usize..30, width in 1usize..9, depth in 0usize..5,
        ) {
            let budget = Budget { total, width, depth };
            let mut draft = TreeDraft::new(Table::new(seed), &TreeSettings::default()).expect("draft");
            draft.open(0).expect("open");
            let sampling = Sampling::default();
            let request = Request { slot: 0, root: 3, budget, sampling: &sampling, chance: &mut Seeded::new(0, 0) };
            let found = draft.propose_scored(&mut [request]).expect("propose").remove(0);
            let expected = naive(seed, budget);
            let mut scores: Vec<f64> = found.scores[1..].to_vec();
            let mut wanted: Vec<f64> = expected.iter().map(|e| e.1).collect();
            scores.sort_by(f64::total_cmp);
            wanted.sort_by(f64::total_cmp);
            prop_assert_eq!(scores.len(), wanted.len());
            for (a, b) in scores.iter().zip(&wanted) {
                prop_assert!((a - b).abs() < 1e-5, "{:?} for {:?}", scores, wanted);
            }
            // Where no two scores are as good as equal, the very nodes.
            if wanted.windows(2).all(|w| w[1] - w[0] > 1e-5) {
                let paths: Vec<Vec<u32>> = (1..found.tree.len()).map(|n| found.tree.tokens_to(n)[1..].to_vec()).collect();
                prop_assert_eq!(paths, expected.into_iter().map(|e| e.0).collect::<Vec<_>>());
            }
        }
    }
}
