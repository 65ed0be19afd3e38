//! How much to draft: what the request asks for, nothing, by a table of batch sizes, or what measured costs and
//! acceptance make of it.

mod adaptive;
mod known;
mod measured;

pub use adaptive::{AdaptiveBudget, cut};
pub use known::StepTimes;
pub use measured::{Acceptance, Costs, Curve, Line};

use crate::plugin::{BudgetPolicy, Outlook};
use crate::tree::Budget;
use crate::{Error, Result};

/// What each request allows, in every step.
#[derive(Debug, Clone, Copy, Default)]
pub struct FixedBudget;

impl BudgetPolicy for FixedBudget {
    fn budgets(&mut self, outlook: &Outlook<'_>) -> Vec<Budget> {
        outlook.requests.iter().map(|r| r.most).collect()
    }
}

/// No drafting: plain decoding, whatever the requests allow.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoDrafting;

impl BudgetPolicy for NoDrafting {
    fn budgets(&mut self, outlook: &Outlook<'_>) -> Vec<Budget> {
        vec![Budget::OFF; outlook.requests.len()]
    }
}

/// A budget for each size of the batch, as a planner makes it for one machine.
#[derive(Debug, Clone)]
pub struct BudgetTable {
    /// Smallest batch and its budget, ascending.
    rows: Vec<(usize, Budget)>,
}

impl BudgetTable {
    /// A table of the smallest batch that each budget is for. Below the first nothing is drafted.
    ///
    /// # Errors
    /// If there is no row, the batches do not rise, or a budget is out of range.
    pub fn new(rows: Vec<(usize, Budget)>) -> Result<Self> {
        if rows.is_empty() || rows.windows(2).any(|w| w[0].0 >= w[1].0) {
            let batches: Vec<usize> = rows.iter().map(|(batch, _)| *batch).collect();
            return Err(Error::Invalid(format!(
                "a table of budgets needs batches that rise, not {batches:?}"
            )));
        }
        rows.iter().try_for_each(|(_, budget)| budget.check())?;
        Ok(Self { rows })
    }

    /// The budget for a batch.
    pub fn of(&self, batch: usize) -> Budget {
        let row = self.rows.iter().rev().find(|(least, _)| *least <= batch);
        row.map_or(Budget::OFF, |(_, budget)| *budget)
    }

    /// The most that any batch drafts.
    pub fn most(&self) -> Budget {
        let most = |a: Budget, (_, b): &(usize, Budget)| Budget {
            total: a.total.max(b.total),
            width: a.width.max(b.width),
            depth: a.depth.max(b.depth),
        };
        self.rows.iter().fold(Budget::OFF, most)
    }
}

impl BudgetPolicy for BudgetTable {
    fn budgets(&mut self, outlook: &Outlook<'_>) -> Vec<Budget> {
        vec![self.of(outlook.requests.len()); outlook.requests.len()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_gives_each_batch_the_row_it_has_reached() {
        let table = BudgetTable::new(vec![
            (1, Budget::chain(7)),
            (4, Budget::chain(2)),
            (8, Budget::OFF),
        ]);
        let table = table.expect("a table");
        let totals: Vec<usize> = [1, 3, 4, 7, 8, 100]
            .iter()
            .map(|&b| table.of(b).total)
            .collect();
        assert_eq!(totals, [8, 8, 3, 3, 1, 1]);
        assert_eq!(table.most(), Budget::chain(7));
        assert!(BudgetTable::new(vec![(2, Budget::OFF), (2, Budget::OFF)]).is_err());
        assert!(BudgetTable::new(Vec::new()).is_err());
    }
}
