//! Trees as an experiment file names them.

use scylla_core::tree::Drawing;
use scylla_core::{Error, Result};
use serde::{Deserialize, Serialize};

use super::{Auto, Dynamic, EAGLE1, Fixed, Growing, Shape, StaticTree};

/// The kinds of trees.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TreeKind {
    /// EAGLE-2's: grown and re-ranked by the draft's own probabilities.
    #[default]
    Dynamic,
    /// `dynamic` for greedy text, `widths` for sampled.
    Auto,
    /// The shape of `paths`; without any, EAGLE-1's.
    Static,
    /// One child per node.
    Chain,
    /// `widths` children per level.
    Widths,
    /// The best static tree for `alpha`.
    Optimal,
}

/// How children are chosen when text is sampled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Draws {
    /// The most probable.
    Deterministic,
    /// Independent draws.
    Independent,
    /// Draws without replacement.
    WithoutReplacement,
}

impl From<Draws> for Drawing {
    fn from(draws: Draws) -> Self {
        match draws {
            Draws::Deterministic => Self::Deterministic,
            Draws::Independent => Self::Independent,
            Draws::WithoutReplacement => Self::WithoutReplacement,
        }
    }
}

/// The tree of a draft. Whatever the shape, the budget cuts it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TreeSettings {
    /// Its kind.
    pub tree: TreeKind,
    /// How children are chosen when text is sampled; greedy text always takes the most probable. Where nothing is said:
    /// deterministic for dynamic trees and with `early_stop`, else without replacement.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drawing: Option<Draws>,
    /// For static trees, the ranks on the path to each node.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub paths: Vec<Vec<usize>>,
    /// Children per node, level by level; the last one is repeated. Without any, the budget's width.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub widths: Vec<usize>,
    /// For optimal trees, acceptance by depth and rank.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub alpha: Vec<Vec<f64>>,
    /// Stops drafting when another level's expected gain is below its measured cost. For deterministic children only;
    /// as it goes by the clock, a sampled text then depends on the machine's mood (its law does not).
    pub early_stop: bool,
}

impl TreeSettings {
    /// The shape meant.
    ///
    /// # Errors
    /// If settings contradict one another.
    pub fn shape(&self) -> Result<Box<dyn Shape>> {
        let bad = |message: String| Err(Error::Invalid(message));
        let given = [
            ("paths", TreeKind::Static, self.paths.is_empty()),
            ("widths", TreeKind::Widths, self.widths.is_empty()),
            ("alpha", TreeKind::Optimal, self.alpha.is_empty()),
        ];
        for (key, kind, absent) in given {
            if !absent && self.tree != kind {
                return bad(format!(
                    "`{key}` belongs to tree {kind:?}; the draft's tree is {:?}",
                    self.tree
                ));
            }
        }
        let random = Draws::WithoutReplacement;
        let drawing = match (self.tree, self.drawing) {
            (TreeKind::Dynamic, Some(draws)) if draws != Draws::Deterministic => {
                return bad(format!(
                    "a dynamic tree re-ranks its children, so they may not be drawn at random ({draws:?})"
                ));
            }
            (TreeKind::Dynamic, _) => Draws::Deterministic,
            (_, None) if self.early_stop => Draws::Deterministic,
            (_, draws) => draws.unwrap_or(random),
        };
        if self.early_stop && drawing != Draws::Deterministic {
            return bad(format!(
                "early_stop is for deterministic children; drawing is {drawing:?}"
            ));
        }
        let growing = match self.tree {
            TreeKind::Dynamic => return Ok(Box::new(Dynamic)),
            TreeKind::Auto if drawing == Draws::Deterministic => return Ok(Box::new(Dynamic)),
            TreeKind::Auto => return Ok(Box::new(Auto::new(drawing.into())?)),
            TreeKind::Chain => Growing::Widths(vec![1]),
            TreeKind::Static if self.paths.is_empty() => {
                Growing::Static(StaticTree::from_paths(&EAGLE1)?)
            }
            TreeKind::Static => Growing::Static(StaticTree::from_paths(&self.paths)?),
            TreeKind::Widths if self.widths.is_empty() => Growing::Widths(vec![usize::MAX]),
            TreeKind::Widths if self.widths.contains(&0) => {
                return bad("widths: a level of no children ends the tree; leave it out".into());
            }
            TreeKind::Widths => Growing::Widths(self.widths.clone()),
            TreeKind::Optimal => Growing::Optimal(self.rates()?),
        };
        Ok(Box::new(Fixed::new(growing, drawing.into())?))
    }

    fn rates(&self) -> Result<Vec<Vec<f64>>> {
        let bad = |message: String| Err(Error::Invalid(message));
        if self.alpha.is_empty() {
            return bad("an optimal tree needs alpha, the acceptance by depth and rank".into());
        }
        for (depth, row) in self.alpha.iter().enumerate() {
            if row.iter().any(|a| !(0.0..=1.0).contains(a)) {
                return bad(format!(
                    "alpha at depth {depth} is {row:?}; each rank's share must lie in 0..=1"
                ));
            }
        }
        Ok(self.alpha.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_contradict_are_refused_naming_both() {
        let all = TreeSettings::default();
        let refused = |s: TreeSettings| s.shape().map(|_| ()).expect_err("refused").to_string();
        let error = refused(TreeSettings {
            drawing: Some(Draws::Independent),
            ..all.clone()
        });
        assert!(
            error.contains("dynamic") && error.contains("Independent"),
            "{error}"
        );
        let error = refused(TreeSettings {
            tree: TreeKind::Chain,
            widths: vec![2],
            ..all.clone()
        });
        assert!(
            error.contains("`widths`") && error.contains("Chain"),
            "{error}"
        );
        let error = refused(TreeSettings {
            tree: TreeKind::Widths,
            drawing: Some(Draws::WithoutReplacement),
            early_stop: true,
            ..all.clone()
        });
        assert!(error.contains("early_stop"), "{error}");
        let error = refused(TreeSettings {
            tree: TreeKind::Optimal,
            alpha: vec![vec![0.7, 1.6]],
            ..all
        });
        assert!(error.contains("depth 0"), "{error}");
    }
}
