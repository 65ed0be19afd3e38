//! How much to draft.

use super::Price;
use crate::engine::Step;
use crate::policy::{Acceptance, Costs};
use crate::tree::Budget;

/// A request that may draft in the next step.
#[derive(Debug, Clone, Copy)]
pub struct Drafting<'a> {
    /// What the request allows, what is left of its limits considered.
    pub most: Budget,
    /// Committed tokens that its rows see.
    pub positions: usize,
    /// How its own recent trees fared, by depth.
    pub acceptance: &'a Acceptance,
}

/// What is known when a step begins.
#[derive(Debug, Clone, Copy)]
pub struct Outlook<'a> {
    /// The requests that decode in it.
    pub requests: &'a [Drafting<'a>],
    /// Rows of prompts that run in the same forward.
    pub prompt_rows: usize,
    /// How recent trees of all requests fared, by depth.
    pub acceptance: &'a Acceptance,
    /// What steps cost, by phase, as measured until now.
    pub costs: &'a Costs,
}

/// Chooses how much each request drafts in the next step.
///
/// A budget of its own for each; `total` 1 means that nothing is drafted. More than a request allows is cut to that. A
/// choice that depends on a request alone leaves its tokens what they are in any company, whatever the temperature; one
/// that depends on the batch or on time does so at temperature 0, and at others in law.
///
/// ```
/// use scylla_core::plugin::{BudgetPolicy, Outlook};
/// use scylla_core::tree::Budget;
///
/// /// Drafts as long as at most so many rows pass the weights in all.
/// struct AtMost(usize);
///
/// impl BudgetPolicy for AtMost {
///     fn budgets(&mut self, outlook: &Outlook<'_>) -> Vec<Budget> {
///         let each = self.0.saturating_sub(outlook.prompt_rows) / outlook.requests.len().max(1);
///         outlook.requests.iter().map(|r| r.most.within(each, each)).collect()
///     }
/// }
///
/// # use scylla_core::{plugin::Drafting, policy::{Acceptance, Costs}};
/// # let (acceptance, costs) = (Acceptance::default(), Costs::default());
/// # let one = Drafting { most: Budget::chain(7), positions: 10, acceptance: &acceptance };
/// # let requests = [one; 4];
/// let outlook = Outlook { requests: &requests, prompt_rows: 0, acceptance: &acceptance, costs: &costs };
/// assert_eq!(AtMost(16).budgets(&outlook)[0].total, 4);
/// assert_eq!(AtMost(4).budgets(&outlook)[0], Budget::OFF);
/// ```
pub trait BudgetPolicy: Send {
    /// One budget for each request of the outlook, in its order.
    fn budgets(&mut self, outlook: &Outlook<'_>) -> Vec<Budget>;
    /// What drafting costs, behind the budgets of the same outlook, where that is known: drafts that heed it choose levels and nodes
    /// themselves within what a request allows, as long as its budget allows any.
    fn price(&self) -> Option<&Price> {
        None
    }
    /// Learns what a step cost and what became of its trees.
    fn observe(&mut self, _step: &Step) {}
}

/// The same policy, borrowed or boxed.
macro_rules! forwarded {
    ($($kind:ty),+) => {$(
        impl<T: BudgetPolicy + ?Sized> BudgetPolicy for $kind {
            fn budgets(&mut self, outlook: &Outlook<'_>) -> Vec<Budget> {
                (**self).budgets(outlook)
            }
            fn price(&self) -> Option<&Price> {
                (**self).price()
            }
            fn observe(&mut self, step: &Step) {
                (**self).observe(step);
            }
        }
    )+};
}

forwarded!(&mut T, Box<T>);
