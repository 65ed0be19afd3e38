//! The static tree that commits most, for a budget and acceptance rates by depth and rank (as Sequoia,
//! arXiv:2402.12374, section 3, with rates that may differ by depth).

use scylla_core::tree::Budget;

use super::StaticTree;

/// Rate of a depth and rank; the last depth recorded stands for deeper ones.
fn rate(alpha: &[Vec<f64>], depth: usize, rank: usize) -> f64 {
    let row = alpha.get(depth).or(alpha.last());
    row.and_then(|row| row.get(rank)).copied().unwrap_or(0.0)
}

/// Nodes of an optimal tree at the most.
pub const MOST: usize = 1024;

/// The tree of at most `total` nodes, `width` children per node and `depth + 1` levels with the largest expected
/// number of accepted nodes, where `alpha[d][r]` is the probability that the child of rank `r` of an accepted node of
/// depth `d` is the one accepted. Siblings take the ranks 0, 1, 2, ... without gaps.
///
/// Dynamic programming over subtrees: `O(levels width total^2)`, so a tree has 1024 nodes at the most.
pub fn optimal(alpha: &[Vec<f64>], budget: Budget) -> StaticTree {
    let (width, total) = (budget.width, budget.total.min(MOST));
    let levels = budget.levels().min(total - 1);
    let deepest = alpha.iter().map(Vec::len).max().unwrap_or(0);
    let width = width.min(deepest);
    // best[d][n]: expected accepted nodes of a subtree of n nodes whose root, accepted, has depth d; itself counted.
    // split[d][r][n]: nodes that the child of rank r takes, where ranks r.. share n nodes.
    let mut best = vec![vec![0.0; total + 1]; levels + 1];
    let mut split = vec![vec![vec![0usize; total + 1]; width]; levels];
    best[levels][1..].fill(1.0);
    for depth in (0..levels).rev() {
        let below = best[depth + 1].clone();
        let mut rest = vec![0.0; total + 1];
        for rank in (0..width).rev() {
            let rate = rate(alpha, depth, rank);
            let mut shared = vec![0.0; total + 1];
            for n in 1..=total {
                for take in 1..=n {
                    let value = rate * below[take] + rest[n - take];
                    if value > shared[n] {
                        shared[n] = value;
                        split[depth][rank][n] = take;
                    }
                }
            }
            rest = shared;
        }
        best[depth][1] = 1.0;
        for n in 2..=total {
            best[depth][n] = 1.0 + rest[n - 1];
        }
    }
    let mut tree = StaticTree::root();
    // Breadth first: (node, depth, nodes of its subtree).
    let mut queue = std::collections::VecDeque::from([(0, 0, total)]);
    while let Some((node, depth, nodes)) = queue.pop_front() {
        let mut left = nodes.saturating_sub(1);
        if depth == levels {
            continue;
        }
        for (rank, split) in split[depth].iter().enumerate() {
            let take = split[left];
            if take == 0 {
                break;
            }
            left -= take;
            queue.push_back((tree.push(node, rank), depth + 1, take));
        }
    }
    tree
}

/// Expected tokens per cycle of a tree under such rates, the bonus included.
pub fn expected_tokens(tree: &StaticTree, alpha: &[Vec<f64>]) -> f64 {
    let mut reached = vec![1.0];
    let mut depths = vec![0];
    for node in 1..tree.len() {
        let parent = tree.parents[node];
        reached.push(reached[parent] * rate(alpha, depths[parent], tree.ranks[node]));
        depths.push(depths[parent] + 1);
    }
    reached.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The best value over all trees, by adding one node at a time in every possible way.
    fn exhaustive(alpha: &[Vec<f64>], budget: Budget) -> f64 {
        let mut trees = vec![StaticTree::root()];
        let mut best: f64 = 1.0;
        for _ in 1..budget.total {
            let mut grown: Vec<StaticTree> = Vec::new();
            for tree in &trees {
                let mut depths = vec![0];
                for n in 1..tree.len() {
                    depths.push(depths[tree.parents[n]] + 1);
                }
                for (node, depth) in depths.into_iter().enumerate() {
                    let rank = tree.children(node).len();
                    if depth < budget.levels() && rank < budget.width {
                        let mut next = tree.clone();
                        next.push(node, rank);
                        grown.push(next);
                    }
                }
            }
            let mut seen = std::collections::HashSet::new();
            grown.retain(|t| {
                let mut paths = t.paths();
                paths.sort();
                seen.insert(paths)
            });
            best = grown
                .iter()
                .map(|t| expected_tokens(t, alpha))
                .fold(best, f64::max);
            trees = grown;
        }
        best
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn no_tree_of_the_budget_expects_more(
            alpha in prop::collection::vec(prop::collection::vec(0.0f64..0.5, 1..4), 1..4),
            total in 1usize..7, width in 1usize..4, depth in 0usize..4,
        ) {
            let budget = Budget { total, width, depth };
            let tree = optimal(&alpha, budget);
            prop_assert!(tree.len() <= total && tree.is_dense());
            prop_assert_eq!(tree.within(budget).len(), tree.len());
            let found = expected_tokens(&tree, &alpha);
            prop_assert!((found - exhaustive(&alpha, budget)).abs() < 1e-12);
        }
    }

    #[test]
    fn a_sure_first_child_makes_a_chain_and_even_ones_a_bush() {
        let budget = Budget {
            total: 6,
            width: 4,
            depth: 9,
        };
        assert_eq!(
            optimal(&[vec![0.9, 0.01]], budget).parents,
            [0, 0, 1, 2, 3, 4]
        );
        let bush = optimal(&[vec![0.2; 4]], budget);
        assert_eq!(bush.children(0).len(), 4);
        assert!(optimal(&[], budget).is_empty());
    }
}
