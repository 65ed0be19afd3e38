//! Token trees: a proposal of drafted tokens with parents.

use std::sync::Arc;

use crate::kernels::probability;
use crate::{Error, Result};

/// Limits of a tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Budget {
    /// Nodes verified, root included.
    pub total: usize,
    /// Children per node.
    pub width: usize,
    /// Expansion steps after level 0: the deepest node is `depth + 1` below the root.
    pub depth: usize,
}

impl Budget {
    /// No drafting: the root alone.
    pub const OFF: Self = Self {
        total: 1,
        width: 1,
        depth: 0,
    };

    /// A chain of `g` tokens.
    pub fn chain(g: usize) -> Self {
        Self {
            total: g + 1,
            width: 1,
            depth: g.saturating_sub(1),
        }
    }

    /// Levels below the root that may be drafted.
    pub fn levels(&self) -> usize {
        if self.total > 1 { self.depth + 1 } else { 0 }
    }

    /// The same, with at most `levels` levels below the root and `total` nodes.
    pub fn within(self, levels: usize, total: usize) -> Self {
        if levels == 0 || total <= 1 || self.total <= 1 {
            return Self::OFF;
        }
        Self {
            total: self.total.min(total),
            width: self.width,
            depth: self.depth.min(levels - 1),
        }
    }

    /// Checks the ranges.
    pub fn check(&self) -> Result<()> {
        let sizes = 1..=4096;
        if !sizes.contains(&self.total) || !sizes.contains(&self.width) || self.depth >= 4096 {
            return Err(Error::Invalid(format!(
                "budget total {} (1..=4096, root included), width {} (1..=4096), depth {} (below 4096)",
                self.total, self.width, self.depth
            )));
        }
        Ok(())
    }
}

/// How the children of a node were chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drawing {
    /// By a rule without chance: each is a point mass, and needs no q.
    Deterministic,
    /// Independent draws from q; the same token may come twice.
    Independent,
    /// Draws from q without replacement.
    WithoutReplacement,
}

impl std::fmt::Display for Drawing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Deterministic => "deterministic",
            Self::Independent => "independent",
            Self::WithoutReplacement => "without replacement",
        })
    }
}

/// A proposal. Node 0 is the root, the last committed token; drafted nodes follow, parents before children,
/// and siblings in the order in which a rule tries them.
#[derive(Debug, Clone, PartialEq)]
pub struct Tree {
    /// `[N]`, the root's first.
    pub tokens: Vec<u32>,
    /// `[N]`, each the index of an earlier node; the root's is 0 and means nothing.
    pub parents: Vec<usize>,
    /// How children were chosen.
    pub drawing: Drawing,
    /// For trees drawn at random, the distribution q that each expanded node's children were drawn from, over
    /// draft ids, after the sampling transform. Empty, or `[N]`.
    pub q: Vec<Option<Arc<[f64]>>>,
    /// Target id of each draft id, where they differ.
    pub draft_to_target: Option<Arc<[u32]>>,
}

impl Tree {
    /// The root alone.
    pub fn root(token: u32) -> Self {
        Self {
            tokens: vec![token],
            parents: vec![0],
            drawing: Drawing::Deterministic,
            q: Vec::new(),
            draft_to_target: None,
        }
    }

    /// A chain of point masses below the root.
    pub fn chain(root: u32, tokens: &[u32]) -> Self {
        let mut tree = Self::root(root);
        for (i, &token) in tokens.iter().enumerate() {
            tree.push(i, token);
        }
        tree
    }

    /// Adds a child and returns its index.
    ///
    /// # Panics
    /// If the parent does not exist.
    pub fn push(&mut self, parent: usize, token: u32) -> usize {
        assert!(parent < self.tokens.len(), "parent {parent} does not exist");
        self.tokens.push(token);
        self.parents.push(parent);
        self.tokens.len() - 1
    }

    /// The tree of the listed nodes only, in that order: how a draft re-ranks or prunes what it drew up.
    ///
    /// # Errors
    /// If children were drawn at random: choosing among them by their value afterwards changes their law, and with
    /// it the law of what is committed. Also if the root is not first, or a node stands without or before its parent.
    pub fn select(&self, nodes: &[usize]) -> Result<Self> {
        if self.drawing != Drawing::Deterministic {
            return match nodes.iter().copied().eq(0..self.len()) {
                true => Ok(self.clone()),
                false => Err(Error::Invalid(format!(
                    "nodes {nodes:?} of a tree of {} drawn {} were to be chosen: what was drawn at random may not be dropped or re-ranked",
                    self.len(),
                    self.drawing
                ))),
            };
        }
        let mut places: Vec<Option<usize>> = vec![None; self.len()];
        let mut tree = Self::root(self.tokens[0]);
        tree.draft_to_target.clone_from(&self.draft_to_target);
        for (i, &node) in nodes.iter().enumerate() {
            let parent = self.parents.get(node).and_then(|&parent| places[parent]);
            match parent {
                None if i == 0 && node == 0 => places[0] = Some(0),
                Some(parent) if node > 0 && places[node].is_none() => {
                    places[node] = Some(tree.push(parent, self.tokens[node]));
                }
                _ => {
                    return Err(Error::Invalid(format!(
                        "node {node} chosen at place {i} without its parent before it"
                    )));
                }
            }
        }
        Ok(tree)
    }

    /// Nodes, root included.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether nothing was drafted.
    pub fn is_empty(&self) -> bool {
        self.len() <= 1
    }

    /// The children of a node in the order a rule tries them.
    pub fn children(&self, node: usize) -> impl Iterator<Item = usize> + '_ {
        (node + 1..self.len()).filter(move |&i| self.parents[i] == node)
    }

    /// Depth of each node below the root `[N]`.
    pub fn depths(&self) -> Vec<usize> {
        let mut depths = vec![0; self.len()];
        for i in 1..self.len() {
            depths[i] = depths[self.parents[i]] + 1;
        }
        depths
    }

    /// Levels below the root.
    pub fn depth(&self) -> usize {
        self.depths().into_iter().max().unwrap_or(0)
    }

    /// The largest number of children of any node.
    pub fn width(&self) -> usize {
        let mut counts = vec![0; self.len()];
        for &parent in self.parents.iter().skip(1) {
            counts[parent] += 1;
        }
        counts.into_iter().max().unwrap_or(0)
    }

    /// The nodes from the root's child down to `node`; empty for the root.
    pub fn path_to(&self, mut node: usize) -> Vec<usize> {
        let mut path = Vec::new();
        while node != 0 {
            path.push(node);
            node = self.parents[node];
        }
        path.reverse();
        path
    }

    /// The tokens from the root's down to `node`'s.
    pub fn tokens_to(&self, node: usize) -> Vec<u32> {
        let below = self.path_to(node).into_iter().map(|n| self.tokens[n]);
        std::iter::once(self.tokens[0]).chain(below).collect()
    }

    /// The id a token of the draft has in the target.
    pub fn target_id(&self, draft_id: usize) -> Option<u32> {
        match &self.draft_to_target {
            None => u32::try_from(draft_id).ok(),
            Some(map) => map.get(draft_id).copied(),
        }
    }

    /// The id a token of the target has in the draft, where it has one.
    pub fn draft_id(&self, token: u32) -> Option<usize> {
        match &self.draft_to_target {
            None => Some(token as usize),
            Some(map) => map.iter().position(|&id| id == token),
        }
    }

    /// Checks a tree that a draft proposed: root, order, ids, budget, and q where it was drawn at random.
    pub fn check(&self, root: u32, vocab: usize, budget: Budget) -> Result<()> {
        let bad = |message: String| Err(Error::Invalid(format!("draft proposed {message}")));
        if self.tokens.first() != Some(&root) || self.tokens.len() != self.parents.len() {
            return bad(format!(
                "a tree rooted at {:?} with {} parents for {} nodes; expected root {root}",
                self.tokens.first(),
                self.parents.len(),
                self.tokens.len()
            ));
        }
        if self.len() > budget.total {
            return bad(format!(
                "{} nodes in a budget of {}",
                self.len(),
                budget.total
            ));
        }
        for i in 1..self.len() {
            if self.parents[i] >= i {
                return bad(format!("node {i} before its parent {}", self.parents[i]));
            }
            if self.tokens[i] as usize >= vocab {
                return bad(format!(
                    "token {} outside the vocabulary of {vocab}",
                    self.tokens[i]
                ));
            }
        }
        let deepest = self.depth();
        if deepest > budget.levels() {
            return bad(format!(
                "{deepest} levels in a budget of {}",
                budget.levels()
            ));
        }
        let widest = self.width();
        if widest > budget.width {
            return bad(format!(
                "{widest} children of one node in a budget of width {}",
                budget.width
            ));
        }
        if self.drawing != Drawing::Deterministic {
            let mut expanded = self.parents[1..].to_vec();
            expanded.sort_unstable();
            expanded.dedup();
            for node in expanded {
                self.check_q(node, vocab)?;
            }
        }
        Ok(())
    }

    /// Checks the q that a node's children were drawn from, and that they can have been drawn from it.
    fn check_q(&self, node: usize, vocab: usize) -> Result<()> {
        let bad = |message: String| Err(Error::Invalid(format!("draft proposed {message}")));
        let Some(q) = self.q.get(node).and_then(Option::as_ref) else {
            return bad(format!("children of node {node} at random without their q"));
        };
        let (sum, least) = probability::sum_and_least(q);
        let is_law = (sum - 1.0).abs() < 1e-6 && least >= 0.0; // false for NaN
        if !is_law {
            return bad(format!(
                "a q at node {node} that sums to {sum}, not 1, or holds a negative"
            ));
        }
        let known = match &self.draft_to_target {
            Some(map) if map.len() != q.len() => {
                return bad(format!(
                    "a q of {} tokens for a map of {}",
                    q.len(),
                    map.len()
                ));
            }
            Some(map) => map.iter().all(|&id| (id as usize) < vocab),
            None => q.len() <= vocab || q[vocab..].iter().all(|&q| q == 0.0),
        };
        if !known {
            return bad(format!(
                "a q at node {node} with mass outside the vocabulary of {vocab}"
            ));
        }
        let mut earlier: Vec<u32> = Vec::new();
        for child in self.children(node) {
            let token = self.tokens[child];
            if self
                .draft_id(token)
                .is_none_or(|id| q.get(id).is_none_or(|&q| q <= 0.0))
            {
                return bad(format!("token {token} at node {node}, where its q is zero"));
            }
            if self.drawing == Drawing::WithoutReplacement && earlier.contains(&token) {
                return bad(format!(
                    "token {token} twice at node {node} of a tree drawn without replacement"
                ));
            }
            earlier.push(token);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_of_g_tokens_has_total_g_plus_1_and_depth_g_minus_1() {
        let b = Budget::chain(4);
        assert_eq!((b.total, b.width, b.depth, b.levels()), (5, 1, 3, 4));
        assert_eq!(Budget::chain(0).levels(), 0);
        assert_eq!(
            b.within(2, 100),
            Budget {
                total: 5,
                width: 1,
                depth: 1
            }
        );
        assert_eq!(b.within(0, 100), Budget::OFF);
    }

    #[test]
    fn paths_depths_children_and_width_agree() {
        let mut t = Tree::root(9);
        let a = t.push(0, 1);
        let b = t.push(0, 2);
        let c = t.push(a, 1);
        assert_eq!(t.path_to(c), [a, c]);
        assert_eq!(t.tokens_to(c), [9, 1, 1]);
        assert_eq!((t.depths(), t.depth()), (vec![0, 1, 1, 2], 2));
        assert_eq!(t.children(0).collect::<Vec<_>>(), [a, b]);
        assert_eq!(t.width(), 2);
    }

    #[test]
    fn point_masses_may_be_re_ranked_and_random_children_may_not() {
        let mut t = Tree::root(9);
        let a = t.push(0, 1);
        let b = t.push(0, 2);
        let c = t.push(b, 3);
        let chosen = t.select(&[0, b, c]).expect("chosen");
        assert_eq!(
            (chosen.tokens, chosen.parents),
            (vec![9, 2, 3], vec![0, 0, 1])
        );
        assert!(t.select(&[0, c, b]).is_err());
        assert!(t.select(&[b]).is_err());
        t.drawing = Drawing::Independent;
        t.q = vec![Some(vec![0.0, 0.5, 0.5].into()), None, None, None];
        let error = t.select(&[0, b, c]).expect_err("refused").to_string();
        assert!(error.contains("may not be dropped"), "{error}");
        assert!(t.select(&[0, b, a, c]).is_err());
        assert_eq!(t.select(&[0, a, b, c]).expect("all"), t);
    }

    #[test]
    fn a_draft_that_breaks_its_contract_is_told_how() {
        let budget = Budget::chain(2);
        let check = |t: &Tree| {
            t.check(9, 10, budget)
                .err()
                .map(|e| e.to_string())
                .unwrap_or_default()
        };
        assert_eq!(check(&Tree::chain(9, &[1, 2])), "");
        assert!(check(&Tree::chain(8, &[1])).contains("expected root 9"));
        assert!(check(&Tree::chain(9, &[1, 2, 3])).contains("budget of 3"));
        assert!(check(&Tree::chain(9, &[10])).contains("vocabulary of 10"));
        let mut wide = Tree::root(9);
        wide.push(0, 1);
        wide.push(0, 2);
        assert!(check(&wide).contains("budget of width 1"));
        let mut backwards = Tree::chain(9, &[1, 2]);
        backwards.parents[1] = 2;
        assert!(check(&backwards).contains("before its parent"));
        let mut drawn = Tree::chain(9, &[1]);
        drawn.drawing = Drawing::Independent;
        assert!(check(&drawn).contains("without their q"));
        drawn.q = vec![Some(vec![0.4, 0.4].into()), None];
        assert!(check(&drawn).contains("sums to 0.8"));
        drawn.q = vec![Some(vec![1.0, 0.0].into()), None];
        assert!(check(&drawn).contains("where its q is zero"));
        drawn.q = vec![
            Some([vec![0.0, 0.5], vec![0.0; 8], vec![0.5]].concat().into()),
            None,
        ];
        assert!(check(&drawn).contains("mass outside the vocabulary"));
        drawn.q = vec![Some(vec![0.5, f64::NAN].into()), None];
        assert!(check(&drawn).contains("sums to NaN"));
        let budget = Budget { width: 2, ..budget };
        let check = |t: &Tree| t.check(9, 10, budget).expect_err("refused").to_string();
        let mut twice = Tree::root(9);
        twice.push(0, 1);
        twice.push(0, 1);
        twice.drawing = Drawing::WithoutReplacement;
        twice.q = vec![Some(vec![0.0, 1.0].into()), None, None];
        assert!(check(&twice).contains("twice at node 0"));
    }
}
