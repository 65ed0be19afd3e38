//! EAGLE-2's dynamic tree (arXiv:2406.16858, section 4): expand the most probable nodes, keep the most probable.

use scylla_core::Result;
use scylla_core::sampling::Sampling;
use scylla_core::tree::{Budget, Drawing};

use super::{Growth, Level, Shape};

/// Level 0 holds the `width` most probable children of the root; then `depth` times the best `width` nodes of the
/// last level get `width` children each. Of all of them the best `total - 1` are proposed, a node's score being the
/// probability of its path under the draft. Point masses only: re-ranking what was drawn at random is not exact.
#[derive(Debug, Clone, Copy, Default)]
pub struct Dynamic;

/// Indices of the `n` best scores among nodes `from..`, best first; ties go to the earlier node.
fn best(scores: &[f64], from: usize, n: usize) -> Vec<usize> {
    let mut nodes: Vec<usize> = (from..scores.len()).collect();
    nodes.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    nodes.truncate(n);
    nodes
}

impl Shape for Dynamic {
    fn drawing(&self, _: &Sampling) -> Drawing {
        Drawing::Deterministic
    }

    fn grow(&mut self, growth: &mut Growth, level: &mut Level<'_, '_>) -> Result<()> {
        let budget = level.budget();
        let first = growth.tree.len();
        for (i, node) in std::mem::take(&mut growth.frontier).into_iter().enumerate() {
            for (token, log) in level.top(i, &growth.tree, node, budget.width)? {
                growth.push(node, token, growth.scores[node] + log, 0);
            }
        }
        if growth.level < budget.depth {
            growth.frontier = best(&growth.scores, first, budget.width);
            // Children score no higher than their parent: below the least score that is kept already, none of
            // them will be proposed.
            if let Some(&least) = best(&growth.scores, 1, budget.total - 1).get(budget.total - 2) {
                let least = growth.scores[least];
                growth.frontier.retain(|&node| growth.scores[node] >= least);
            }
        }
        Ok(())
    }

    fn chosen(&self, growth: &Growth, budget: Budget) -> Vec<usize> {
        let mut nodes = best(&growth.scores, 1, budget.total.saturating_sub(1));
        nodes.push(0);
        nodes.sort_unstable();
        nodes
    }
}
