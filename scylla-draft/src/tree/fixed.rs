//! Trees whose shape does not depend on what the draft says: static trees, chains, and trees drawn at random.

use std::sync::Arc;

use scylla_core::sampling::Sampling;
use scylla_core::tree::{Budget, Drawing};
use scylla_core::{Error, Result, draw};

use super::{Growth, Level, Shape, optimal};

/// A shape: nodes in breadth-first order below a root, each with its rank among its siblings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StaticTree {
    /// `[N]`; the root's is 0 and means nothing.
    pub parents: Vec<usize>,
    /// Rank of each node among its siblings, 0 for the most probable or the first drawn `[N]`.
    pub ranks: Vec<usize>,
    children: Vec<Vec<usize>>,
}

/// The tree of EAGLE-1 (arXiv:2401.15077): 25 drafted nodes, by the ranks on the path to each.
pub const EAGLE1: [&[usize]; 25] = [
    &[0],
    &[1],
    &[2],
    &[3],
    &[0, 0],
    &[0, 1],
    &[0, 2],
    &[1, 0],
    &[1, 1],
    &[2, 0],
    &[2, 1],
    &[3, 0],
    &[0, 0, 0],
    &[0, 0, 1],
    &[0, 0, 2],
    &[0, 1, 0],
    &[0, 1, 1],
    &[0, 2, 0],
    &[0, 2, 1],
    &[1, 0, 0],
    &[0, 0, 0, 0],
    &[0, 0, 0, 1],
    &[0, 0, 0, 2],
    &[0, 0, 0, 0, 0],
    &[0, 0, 0, 0, 1],
];

impl StaticTree {
    /// The root alone.
    pub fn root() -> Self {
        Self {
            parents: vec![0],
            ranks: vec![0],
            children: vec![Vec::new()],
        }
    }

    /// Adds a node below `parent` and returns it.
    pub fn push(&mut self, parent: usize, rank: usize) -> usize {
        let node = self.parents.len();
        self.parents.push(parent);
        self.ranks.push(rank);
        self.children.push(Vec::new());
        self.children[parent].push(node);
        node
    }

    /// Nodes, root included.
    pub fn len(&self) -> usize {
        self.parents.len()
    }

    /// Whether it holds its root alone.
    pub fn is_empty(&self) -> bool {
        self.len() <= 1
    }

    /// Children of a node, by rank.
    pub fn children(&self, node: usize) -> &[usize] {
        &self.children[node]
    }

    /// A tree from the ranks on the path to each node, as EAGLE-1's choices are written.
    ///
    /// # Errors
    /// If a path is empty or comes twice, or its beginning is no node.
    pub fn from_paths<P: AsRef<[usize]>>(paths: &[P]) -> Result<Self> {
        let mut sorted: Vec<&[usize]> = paths.iter().map(AsRef::as_ref).collect();
        sorted.sort_by(|a, b| a.len().cmp(&b.len()).then(a.cmp(b)));
        let mut tree = Self::root();
        let mut known: Vec<(&[usize], usize)> = vec![(&[], 0)];
        for path in sorted {
            let bad = |why: &str| Error::Invalid(format!("static tree: path {path:?} {why}"));
            let (&rank, above) = path.split_last().ok_or_else(|| bad("is the root's"))?;
            if known.iter().any(|(p, _)| *p == path) {
                return Err(bad("comes twice"));
            }
            let parent = known.iter().find(|(p, _)| *p == above);
            let (_, parent) = parent.ok_or_else(|| bad("has no parent in the tree"))?;
            let node = tree.push(*parent, rank);
            known.push((path, node));
        }
        Ok(tree)
    }

    /// The paths of its nodes, root excluded.
    pub fn paths(&self) -> Vec<Vec<usize>> {
        let mut paths: Vec<Vec<usize>> = vec![Vec::new()];
        for node in 1..self.len() {
            let mut path = paths[self.parents[node]].clone();
            path.push(self.ranks[node]);
            paths.push(path);
        }
        paths.remove(0);
        paths
    }

    /// A tree with `widths[d]` children for every node of depth `d`, the last width repeated, as far as the budget goes.
    pub fn from_widths(widths: &[usize], budget: Budget) -> Self {
        let mut tree = Self::root();
        let mut frontier = vec![0];
        for depth in 0..budget.levels() {
            let width = widths.get(depth).or(widths.last()).copied().unwrap_or(0);
            let mut next = Vec::new();
            for node in frontier {
                let room = budget.total - tree.len();
                for rank in 0..width.min(budget.width).min(room) {
                    next.push(tree.push(node, rank));
                }
            }
            frontier = next;
        }
        tree
    }

    /// What of it lies within a budget: nodes in order, as long as there is room.
    pub fn within(&self, budget: Budget) -> Self {
        let mut tree = Self::root();
        let mut places: Vec<Option<usize>> = vec![Some(0)];
        let mut depths = vec![0];
        for node in 1..self.len() {
            let depth = depths[self.parents[node]] + 1;
            depths.push(depth);
            let fits = tree.len() < budget.total
                && depth <= budget.levels()
                && self.ranks[node] < budget.width;
            let parent = places[self.parents[node]].filter(|_| fits);
            places.push(parent.map(|parent| tree.push(parent, self.ranks[node])));
        }
        tree
    }

    /// Whether each node's children have the ranks 0, 1, 2 and so on, as draws in order have.
    pub fn is_dense(&self) -> bool {
        let dense = |c: &Vec<usize>| c.iter().enumerate().all(|(i, &n)| self.ranks[n] == i);
        self.children.iter().all(dense)
    }
}

/// Where a fixed shape comes from.
#[derive(Debug, Clone, PartialEq)]
pub enum Growing {
    /// A tree as it is, cut to the budget.
    Static(StaticTree),
    /// Children per level, see [`StaticTree::from_widths`].
    Widths(Vec<usize>),
    /// The budget's best for acceptance by depth and rank, see [`optimal()`].
    Optimal(Vec<Vec<f64>>),
}

/// Grows a shape that is known before the draft is asked, so its children may be drawn at random.
pub struct Fixed {
    growing: Growing,
    drawing: Drawing,
    /// The trees of the budgets met so far, latest first.
    trees: Vec<(Budget, Arc<StaticTree>)>,
}

impl Fixed {
    /// # Errors
    /// If children shall be drawn at random, and siblings are not the first draws.
    pub fn new(growing: Growing, drawing: Drawing) -> Result<Self> {
        if let Growing::Static(tree) = &growing
            && drawing != Drawing::Deterministic
            && !tree.is_dense()
        {
            return Err(Error::Invalid(
                "static tree: children drawn at random must have the ranks 0, 1, 2, ... below each node".into(),
            ));
        }
        Ok(Self {
            growing,
            drawing,
            trees: Vec::new(),
        })
    }

    fn tree(&mut self, budget: Budget) -> Arc<StaticTree> {
        if let Some((_, tree)) = self.trees.iter().find(|(b, _)| *b == budget) {
            return Arc::clone(tree);
        }
        let tree = Arc::new(match &self.growing {
            Growing::Static(tree) => tree.within(budget),
            Growing::Widths(widths) => StaticTree::from_widths(widths, budget),
            Growing::Optimal(alpha) => optimal(alpha, budget),
        });
        self.trees.insert(0, (budget, Arc::clone(&tree)));
        self.trees.truncate(32);
        tree
    }
}

impl Shape for Fixed {
    fn drawing(&self, _: &Sampling) -> Drawing {
        self.drawing
    }

    fn grow(&mut self, growth: &mut Growth, level: &mut Level<'_, '_>) -> Result<()> {
        let shape = self.tree(level.budget());
        let mut next = Vec::new();
        for (i, node) in std::mem::take(&mut growth.frontier).into_iter().enumerate() {
            let children = shape.children(growth.places[node]);
            let wanted = children.iter().map(|&c| shape.ranks[c] + 1).max();
            let Some(wanted) = wanted else { continue };
            if growth.tree.drawing == Drawing::Deterministic {
                let top = level.top(i, &growth.tree, node, wanted)?;
                for &place in children {
                    if let Some(&(token, log)) = top.get(shape.ranks[place]) {
                        let score = growth.scores[node] + log;
                        next.push(growth.push(node, token, score, place));
                    }
                }
                continue;
            }
            let q = level.q(i, &growth.tree, node)?;
            let chance = &mut *level.request.chance;
            let drawn = draw::expand(&mut growth.tree, node, wanted, q, chance)?;
            for (&node, &place) in drawn.iter().zip(children) {
                growth.scores.push(0.0);
                growth.places.push(place);
                next.push(node);
            }
        }
        next.retain(|&node| !shape.children(growth.places[node]).is_empty());
        growth.frontier = next;
        Ok(())
    }

    fn chosen(&self, growth: &Growth, _: Budget) -> Vec<usize> {
        (0..growth.tree.len()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_make_the_tree_they_name() {
        let tree = StaticTree::from_paths(&EAGLE1).expect("EAGLE-1");
        assert_eq!((tree.len(), tree.children(0).len()), (26, 4));
        assert!(tree.is_dense());
        let mut paths: Vec<Vec<usize>> = EAGLE1.iter().map(|p| p.to_vec()).collect();
        paths.sort_by(|a, b| a.len().cmp(&b.len()).then(a.cmp(b)));
        assert_eq!(tree.paths(), paths);
        for (paths, word) in [
            (vec![vec![0], vec![1, 0]], "[1, 0] has no parent"),
            (vec![vec![0], vec![0]], "[0] comes twice"),
            (vec![vec![]], "is the root's"),
        ] {
            let error = StaticTree::from_paths(&paths).expect_err(word).to_string();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn a_budget_cuts_whole_branches() {
        let tree = StaticTree::from_paths(&EAGLE1).expect("EAGLE-1");
        let budget = |total, width, depth| Budget {
            total,
            width,
            depth,
        };
        assert_eq!(tree.within(budget(26, 4, 4)), tree);
        let narrow = tree.within(budget(26, 1, 4)).paths();
        assert_eq!(
            narrow,
            [vec![0], vec![0; 2], vec![0; 3], vec![0; 4], vec![0; 5]]
        );
        assert_eq!(tree.within(budget(26, 4, 0)).len(), 5);
        assert_eq!(tree.within(budget(8, 4, 4)).paths(), tree.paths()[..7]);
        assert_eq!(StaticTree::from_widths(&[3, 2], budget(8, 2, 4)).len(), 8);
        let chain = StaticTree::from_widths(&[1], Budget::chain(4));
        assert_eq!(chain.parents, [0, 0, 1, 2, 3]);
    }

    #[test]
    fn random_children_take_the_first_ranks() {
        let gap = StaticTree::from_paths(&[[1]]).expect("a gap");
        assert!(Fixed::new(Growing::Static(gap.clone()), Drawing::Deterministic).is_ok());
        assert!(Fixed::new(Growing::Static(gap), Drawing::Independent).is_err());
    }
}
