//! The tree that fits how text is sampled.

use scylla_core::Result;
use scylla_core::sampling::Sampling;
use scylla_core::tree::{Budget, Drawing};

use super::{Dynamic, Fixed, Growing, Growth, Level, Shape};

/// [`Dynamic`] for greedy text; for sampled text children drawn at random, as many as the budget is wide.
///
/// A drawn token is accepted with probability sum min(p, q), the most probable one of a draft only with its own p: at
/// temperature 1 twice as often. Both are exact, each under the rules for trees so drawn.
pub struct Auto {
    greedy: Dynamic,
    sampled: Fixed,
}

impl Auto {
    /// With children drawn in some way where text is sampled.
    ///
    /// # Errors
    /// If that is no way to draw them.
    pub fn new(drawing: Drawing) -> Result<Self> {
        Ok(Self {
            greedy: Dynamic,
            sampled: Fixed::new(Growing::Widths(vec![usize::MAX]), drawing)?,
        })
    }
}

impl Shape for Auto {
    fn drawing(&self, sampling: &Sampling) -> Drawing {
        match sampling.is_greedy() {
            true => Drawing::Deterministic,
            false => self.sampled.drawing(sampling),
        }
    }

    fn grow(&mut self, growth: &mut Growth, level: &mut Level<'_, '_>) -> Result<()> {
        match growth.tree.drawing {
            Drawing::Deterministic => self.greedy.grow(growth, level),
            _ => self.sampled.grow(growth, level),
        }
    }

    fn is_ranked(&self, drawing: Drawing) -> bool {
        drawing == Drawing::Deterministic
    }

    fn chosen(&self, growth: &Growth, budget: Budget) -> Vec<usize> {
        match growth.tree.drawing {
            Drawing::Deterministic => self.greedy.chosen(growth, budget),
            _ => self.sampled.chosen(growth, budget),
        }
    }
}

#[cfg(test)]
mod tests {
    use scylla_core::chance::Seeded;
    use scylla_core::plugin::{DraftModel, Request};
    use scylla_core::tree::Tree;

    use super::*;
    use crate::tree::table::Table;
    use crate::tree::{TreeDraft, TreeKind, TreeSettings};

    fn proposed(tree: TreeKind, temperature: f64, budget: Budget) -> Tree {
        let settings = TreeSettings {
            tree,
            ..TreeSettings::default()
        };
        let mut draft = TreeDraft::new(Table::new(3), &settings).expect("a draft");
        draft.open(0).expect("open");
        let sampling = Sampling {
            temperature,
            ..Sampling::default()
        };
        assert_eq!(
            draft.weighs(&sampling),
            draft.drawing(&sampling) == Drawing::Deterministic && tree != TreeKind::Widths
        );
        let request = Request {
            slot: 0,
            root: 1,
            budget,
            sampling: &sampling,
            chance: &mut Seeded::new(7, 0),
        };
        draft.propose(&mut [request]).expect("a tree").remove(0)
    }

    #[test]
    fn greedy_text_gets_the_dynamic_tree_and_sampled_text_the_one_that_is_drawn() {
        for budget in [
            Budget::chain(3),
            Budget {
                total: 7,
                width: 2,
                depth: 2,
            },
        ] {
            let auto = |temperature| proposed(TreeKind::Auto, temperature, budget);
            assert_eq!(auto(0.0), proposed(TreeKind::Dynamic, 0.0, budget));
            let drawn = auto(1.0);
            assert_eq!(drawn, proposed(TreeKind::Widths, 1.0, budget));
            assert_eq!(drawn.drawing, Drawing::WithoutReplacement);
        }
    }

    #[test]
    fn what_is_said_to_be_deterministic_is_dynamic_whatever_the_sampling() {
        let settings = TreeSettings {
            tree: TreeKind::Auto,
            drawing: Some(crate::tree::Draws::Deterministic),
            ..TreeSettings::default()
        };
        let sampled = Sampling {
            temperature: 1.0,
            ..Sampling::default()
        };
        let shape = settings.shape().expect("a shape");
        assert_eq!(shape.drawing(&sampled), Drawing::Deterministic);
    }
}
