//! The rule for who names none.

use std::sync::Arc;

use scylla_core::plugin::{Rules, Verifier};
use scylla_core::sampling::Sampling;
use scylla_core::tree::Drawing;

use crate::{Chain, Greedy, Traversal};

/// The rule that fits: [`Greedy`] at temperature 0, [`Chain`] for chains, else [`Traversal`].
///
/// ```
/// use scylla_core::plugin::Rules;
/// use scylla_core::sampling::Sampling;
/// use scylla_core::tree::Drawing;
/// use scylla_verify::Auto;
///
/// let name = |width, temperature| {
///     let sampling = Sampling { temperature, ..Sampling::default() };
///     Auto.choose(Drawing::Independent, width, &sampling).name().to_string()
/// };
/// assert_eq!(name(4, 0.0), "greedy");
/// assert_eq!(name(1, 0.7), "chain");
/// assert_eq!(name(4, 0.7), "traversal");
/// ```
#[derive(Debug, Clone, Copy, Default)]
pub struct Auto;

impl Rules for Auto {
    fn choose(&self, _: Drawing, width: usize, sampling: &Sampling) -> Arc<dyn Verifier> {
        match width {
            _ if sampling.is_greedy() => Arc::new(Greedy),
            0 | 1 => Arc::new(Chain),
            _ => Arc::new(Traversal),
        }
    }
}
