//! Cycles along a text that is known: what a draft would have had accepted, without asking the target again.

use super::record::Cycle;
use crate::Result;
use crate::tree::{Budget, Tree};

/// A text that was decoded, and the limits it was decoded under.
#[derive(Debug, Clone)]
pub struct Walk<'a> {
    /// Prompt and answer.
    pub text: &'a [u32],
    /// Tokens of the prompt; the token behind them came from the prefill and belongs to no cycle.
    pub prompt: usize,
    /// Limits of the trees.
    pub budget: Budget,
    /// The limit of new tokens: trees near it are cut short.
    pub max_new_tokens: usize,
    /// Positions that a slot holds.
    pub context: usize,
}

impl Walk<'_> {
    /// What a tree may have whose root is the token at a place of the text, as an engine asks: a cycle adds the bonus too, so
    /// drafting the last token would be wasted.
    pub fn budget_at(&self, root: usize) -> Budget {
        let left = self.max_new_tokens.saturating_sub(root + 1 - self.prompt);
        let room = self.context.saturating_sub(root + 1);
        self.budget
            .within(left.min(room).saturating_sub(1), room + 1)
    }
}

/// Walks cycles along a text: each proposes a tree at its root, follows the text's own tokens through it as far as they are
/// there, and the next begins where it ended, behind the bonus. `propose(root, budget)` gives the tree whose root is the
/// token at place `root` of the text.
///
/// For text that was decoded at temperature 0 these are the cycles of decoding with the draft itself, exactly; for sampled
/// text, whose tokens are draws of the target's, they are cycles of a rule that accepts wherever the tree holds what the
/// target draws, and so of any rule that is exact for trees of point masses, in law.
///
/// ```
/// use scylla_core::engine::{Walk, walk};
/// use scylla_core::tree::{Budget, Tree};
///
/// // The draft says one token more than the last, twice; the text leaps at 7.
/// let text = [1, 2, 3, 4, 7, 8, 9, 10];
/// let walk_of = Walk { text: &text, prompt: 1, budget: Budget::chain(2), max_new_tokens: 7, context: 64 };
/// let cycles = walk(&walk_of, &mut |root, budget| {
///     let count = budget.levels() as u32;
///     let next: Vec<u32> = (1..=count).map(|i| text[root] + i).collect();
///     Ok(Tree::chain(text[root], &next))
/// })?;
/// // 2 -> 3, 4 and the bonus 7; 7 -> 8, 9 and the bonus 10.
/// assert_eq!(cycles.iter().map(|c| c.committed).collect::<Vec<_>>(), [3, 3]);
/// # Ok::<(), scylla_core::Error>(())
/// ```
///
/// # Errors
/// If a proposal fails.
pub fn walk(
    along: &Walk<'_>,
    propose: &mut dyn FnMut(usize, Budget) -> Result<Tree>,
) -> Result<Vec<Cycle>> {
    let mut cycles = Vec::new();
    walk_each(along, propose, &mut |cycle, _| cycles.push(cycle))?;
    Ok(cycles)
}

/// The same for texts of any length: each cycle is told, with its tree, when it ends.
///
/// # Errors
/// If a proposal fails.
pub fn walk_each(
    along: &Walk<'_>,
    propose: &mut dyn FnMut(usize, Budget) -> Result<Tree>,
    told: &mut dyn FnMut(Cycle, &Tree),
) -> Result<()> {
    let Walk { text, prompt, .. } = *along;
    let (mut root, mut step) = (prompt, 0);
    while root + 1 < text.len() {
        let budget = along.budget_at(root);
        let tree = match budget.levels() {
            0 => Tree::root(text[root]),
            _ => propose(root, budget)?,
        };
        let (mut at, mut accepted) = (0, 0);
        let (mut ranks, mut offered) = (Vec::new(), Vec::new());
        while let Some(&next) = text.get(root + 1 + accepted) {
            let children: Vec<usize> = tree.children(at).collect();
            offered.push(children.len());
            let Some(rank) = children.iter().position(|&c| tree.tokens[c] == next) else {
                break;
            };
            at = children[rank];
            ranks.push(rank);
            accepted += 1;
        }
        let committed = (accepted + 1).min(text.len() - root - 1);
        root += committed;
        let cycle = Cycle {
            step,
            nodes: tree.len(),
            depth: tree.depth(),
            accepted: accepted.min(committed),
            committed,
            ranks,
            offered,
            cut: root + 1 >= text.len(),
        };
        told(cycle, &tree);
        step += 1;
    }
    Ok(())
}
