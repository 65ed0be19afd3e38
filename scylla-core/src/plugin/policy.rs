//! How much to draft.

use crate::tree::Budget;

/// Chooses the budget of the next cycle.
pub trait BudgetPolicy {
    /// The budget for a batch of `slots` sequences; `total` 1 means no drafting.
    fn budget(&mut self, slots: usize) -> Budget;
    /// Learns how a cycle went: nodes verified (root included) and tokens accepted (bonus excluded).
    fn observe(&mut self, _nodes: usize, _accepted: usize) {}
}

/// The same budget in every cycle.
#[derive(Debug, Clone, Copy)]
pub struct FixedBudget(pub Budget);

impl BudgetPolicy for FixedBudget {
    fn budget(&mut self, _slots: usize) -> Budget {
        self.0
    }
}
