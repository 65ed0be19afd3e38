//! The student's tokens that are matched with the teacher's heaviest: the best one-to-one matching.

use pathfinding::kuhn_munkres::kuhn_munkres_min;
use pathfinding::matrix::Matrix;

use crate::{Error, Result};

/// An assignment of rows to columns.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Assignment {
    /// The column of each row, all different.
    pub(crate) columns: Vec<usize>,
    /// Their costs, summed.
    pub(crate) cost: f64,
    /// What each row is worth: no column costs it less than this beside what the column is worth.
    pub(crate) rows: Vec<f64>,
}

/// The cheapest assignment of `n` rows to as many of the columns, of `cost` `[n, m]`, `n <= m`.
///
/// # Errors
/// If there are fewer columns than rows, or a cost is not finite.
pub(crate) fn assign(cost: &[f64], n: usize) -> Result<Assignment> {
    let m = cost.len().checked_div(n).unwrap_or(0);
    if n == 0 || m < n || cost.len() != n * m {
        return Err(Error::Shape {
            what: "assignment",
            expected: "at least one row and as many columns".into(),
            found: format!("{n} rows, {} costs", cost.len()),
        });
    }
    let largest = cost.iter().fold(1e-30f64, |a, c| a.max(c.abs()));
    if !largest.is_finite() || cost.iter().any(|c| c.is_nan()) {
        return Err(Error::Invalid("assignment: a cost is not finite".into()));
    }
    // Whole numbers, so that comparisons are exact; the sum of n of them stays in range.
    let unit = (i64::MAX / 8) as f64 / (n as f64 * largest);
    let unit = unit.min((1u64 << 50) as f64 / largest);
    let whole: Vec<i64> = cost.iter().map(|c| (c * unit).round() as i64).collect();
    let matrix =
        Matrix::from_vec(n, m, whole).map_err(|e| Error::Invalid(format!("assignment: {e}")))?;
    let (_, columns) = kuhn_munkres_min(&matrix);
    Ok(Assignment {
        cost: columns
            .iter()
            .enumerate()
            .map(|(i, &j)| cost[i * m + j])
            .sum(),
        rows: worth(cost, m, &columns),
        columns,
    })
}

/// Dual values of the rows: those of columns are the shortest paths by which a column could be freed, 0 at most.
fn worth(cost: &[f64], m: usize, columns: &[usize]) -> Vec<f64> {
    let mut column = vec![0.0f64; m];
    for _ in 0..columns.len() {
        let mut changed = false;
        for (i, &own) in columns.iter().enumerate() {
            let row = &cost[i * m..][..m];
            for j in 0..m {
                let through = row[j] - row[own] + column[own];
                // What is less by rounding alone would go round in circles.
                if through < column[j] - 1e-12 {
                    column[j] = through;
                    changed = true;
                }
            }
        }
        if !changed {
            break;
        }
    }
    columns
        .iter()
        .enumerate()
        .map(|(i, &own)| cost[i * m + own] - column[own])
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The least cost by trying all.
    fn least(cost: &[f64], m: usize, row: usize, used: u32) -> f64 {
        if row * m == cost.len() {
            return 0.0;
        }
        let free = (0..m).filter(|j| used & (1 << j) == 0);
        free.map(|j| cost[row * m + j] + least(cost, m, row + 1, used | (1 << j)))
            .fold(f64::INFINITY, f64::min)
    }

    proptest! {
        #[test]
        fn an_assignment_is_the_cheapest_and_its_duals_prove_it(
            (n, m, cost) in (1usize..6, 0usize..3).prop_flat_map(|(n, more)| {
                (Just(n), Just(n + more), prop::collection::vec(0.0f64..2.0, n * (n + more)))
            })
        ) {
            let found = assign(&cost, n).expect("solves");
            prop_assert!((found.cost - least(&cost, m, 0, 0)).abs() < 1e-9);
            let mut columns = found.columns.clone();
            columns.sort_unstable();
            columns.dedup();
            prop_assert_eq!(columns.len(), n);
            // Weak duality with the best columns' values for these rows.
            let column = |j: usize| (0..n).map(|i| cost[i * m + j] - found.rows[i]).fold(0.0, f64::min);
            let bound: f64 = found.rows.iter().sum::<f64>() + (0..m).map(column).sum::<f64>();
            prop_assert!((bound - found.cost).abs() < 1e-9, "{} {}", bound, found.cost);
        }
    }

    #[test]
    fn broken_costs_are_refused() {
        assert!(assign(&[0.0, f64::NAN], 1).is_err());
        assert!(assign(&[0.0, 1.0], 2).is_err());
        assert!(assign(&[], 0).is_err());
        assert_eq!(assign(&[0.0; 4], 2).expect("solves").cost, 0.0);
    }
}
