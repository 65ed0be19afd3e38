//! The rule that accepts.

use std::sync::Arc;

use super::Chance;
use crate::sampling::Sampling;
use crate::tree::{Drawing, Tree};
use crate::{Error, Result};

/// The target's distributions at the nodes of a tree, computed when asked for.
///
/// ```
/// use scylla_core::plugin::TargetRows;
///
/// /// The same distribution after every node.
/// struct Same(Vec<f64>);
///
/// impl TargetRows for Same {
///     fn argmax(&self, nodes: &[usize]) -> scylla_core::Result<Vec<u32>> {
///         let best = (0..self.0.len()).max_by(|&a, &b| self.0[a].total_cmp(&self.0[b]).then(b.cmp(&a)));
///         Ok(vec![best.unwrap_or(0) as u32; nodes.len()])
///     }
///     fn row(&self, _: usize, out: &mut Vec<f64>) -> scylla_core::Result<()> {
///         out.clone_from(&self.0);
///         Ok(())
///     }
/// }
///
/// assert_eq!(Same(vec![0.2, 0.4, 0.4]).argmax(&[0, 5])?, [1, 1]); // ties: the lowest id
/// # Ok::<(), scylla_core::Error>(())
/// ```
pub trait TargetRows {
    /// The most probable token after each node (ties: the lowest id).
    fn argmax(&self, nodes: &[usize]) -> Result<Vec<u32>>;
    /// Writes the distribution after a node, `[V]`, after the sampling transform, to `out`.
    fn row(&self, node: usize, out: &mut Vec<f64>) -> Result<()>;
}

/// What a rule decides about one tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Accepted nodes from the root's child downwards; empty when none is.
    pub path: Vec<usize>,
    /// The token the target adds after them.
    pub bonus: u32,
}

impl Verdict {
    /// Checks that the path is one of the tree, from a child of the root down, and the bonus a token.
    pub fn check(&self, tree: &Tree, vocab: usize) -> Result<()> {
        let mut parent = 0;
        for &node in &self.path {
            if node == 0 || node >= tree.len() || tree.parents[node] != parent {
                return Err(Error::Invalid(format!(
                    "the rule accepted {:?}, which is no path of the tree",
                    self.path
                )));
            }
            parent = node;
        }
        if self.bonus as usize >= vocab {
            return Err(Error::Invalid(format!(
                "the rule's bonus {} is outside the vocabulary of {vocab}",
                self.bonus
            )));
        }
        Ok(())
    }
}

/// An acceptance rule.
///
/// ```
/// use scylla_core::plugin::{Chance, TargetRows, Verdict, Verifier};
/// use scylla_core::sampling::Sampling;
/// use scylla_core::tree::{Drawing, Tree};
///
/// /// Accepts nothing that was drafted, and samples: exact for every tree, and never faster.
/// struct Stubborn;
///
/// impl Verifier for Stubborn {
///     fn name(&self) -> &str {
///         "stubborn"
///     }
///     fn exact_for(&self, _: Drawing, _: usize, _: &Sampling) -> bool {
///         true
///     }
///     fn verify(&self, _: &Tree, rows: &dyn TargetRows, chance: &mut dyn Chance) -> scylla_core::Result<Verdict> {
///         let mut p = Vec::new();
///         rows.row(0, &mut p)?; // after the root; temperature 0 makes it one-hot
///         Ok(Verdict { path: Vec::new(), bonus: chance.pick(&p)? as u32 })
///     }
/// }
/// # use scylla_core::{chance::Seeded, tabular::{Law, TableRows}};
/// # let law: Law = std::sync::Arc::new(|_: &[u32]| vec![0.0, 1.0]);
/// let tree = Tree::chain(0, &[1]);
/// let rows = TableRows { law: &law, history: &[], tree: &tree };
/// let verdict = Stubborn.verify(&tree, &rows, &mut Seeded::new(0, 0))?;
/// assert_eq!((verdict.path.len(), verdict.bonus), (0, 1));
/// # Ok::<(), scylla_core::Error>(())
/// ```
pub trait Verifier: Send + Sync {
    /// Its name, as the registry and messages print it.
    fn name(&self) -> &str;
    /// Whether the committed tokens follow the target's law exactly, for trees drawn this way and with at most `width`
    /// children a node. A width of 0 asks for trees of their root alone, however drawn: plain decoding, and the first
    /// token after every prompt.
    fn exact_for(&self, drawing: Drawing, width: usize, sampling: &Sampling) -> bool;
    /// Accepts a path of the tree and draws the bonus.
    fn verify(
        &self,
        tree: &Tree,
        rows: &dyn TargetRows,
        chance: &mut dyn Chance,
    ) -> Result<Verdict>;
}

/// The same rule, borrowed, boxed or shared.
macro_rules! forwarded {
    ($($kind:ty),+) => {$(
        impl<T: Verifier + ?Sized> Verifier for $kind {
            fn name(&self) -> &str {
                (**self).name()
            }
            fn exact_for(&self, drawing: Drawing, width: usize, sampling: &Sampling) -> bool {
                (**self).exact_for(drawing, width, sampling)
            }
            fn verify(
                &self,
                tree: &Tree,
                rows: &dyn TargetRows,
                chance: &mut dyn Chance,
            ) -> Result<Verdict> {
                (**self).verify(tree, rows, chance)
            }
        }
    )+};
}

forwarded!(&T, Box<T>, Arc<T>);

/// Chooses the rule of a request that names none. A rule chooses itself.
///
/// ```
/// use std::sync::Arc;
///
/// use scylla_core::plugin::{Rules, Verifier};
/// use scylla_core::sampling::Sampling;
/// use scylla_core::tree::Drawing;
///
/// /// One rule for greedy requests, and another for those that sample.
/// struct ByTemperature(Arc<dyn Verifier>, Arc<dyn Verifier>);
///
/// impl Rules for ByTemperature {
///     fn choose(&self, _: Drawing, _: usize, sampling: &Sampling) -> Arc<dyn Verifier> {
///         Arc::clone(if sampling.is_greedy() { &self.0 } else { &self.1 })
///     }
/// }
/// ```
pub trait Rules: Send + Sync {
    /// The rule for trees drawn this way, with at most `width` children a node, under a sampling setting.
    fn choose(&self, drawing: Drawing, width: usize, sampling: &Sampling) -> Arc<dyn Verifier>;
}

impl<V: Verifier + Clone + 'static> Rules for V {
    fn choose(&self, _: Drawing, _: usize, _: &Sampling) -> Arc<dyn Verifier> {
        Arc::new(self.clone())
    }
}
