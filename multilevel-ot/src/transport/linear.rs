use microlp::{ComparisonOp, OptimizationDirection, SolveOutcome};

use super::Problem;
use crate::{Error, Result, Scalar};

/// A plan of least cost.
#[derive(Debug, Clone, PartialEq)]
pub struct Exact {
    /// `<P, C>`
    pub cost: f64,
    /// `[N, M]`; also the gradient of the cost where the plan is the only one.
    pub plan: Vec<f64>,
}

/// The least `<P, C>` of all plans, by linear programming: for problems of up to some thousand entries.
///
/// # Errors
/// On a broken problem.
pub fn exact<F: Scalar>(problem: &Problem<'_, F>) -> Result<Exact> {
    problem.check(1.0)?;
    let (n, m) = (problem.a.len(), problem.b.len());
    let mut program = microlp::Problem::new(OptimizationDirection::Minimize);
    let costs = problem.cost.iter();
    let vars: Vec<_> = costs
        .map(|&c| program.add_var(c.wide(), (0.0, f64::INFINITY)))
        .collect();
    for i in 0..n {
        let row: Vec<_> = (0..m).map(|j| (vars[i * m + j], 1.0)).collect();
        program.add_constraint(&row[..], ComparisonOp::Eq, problem.a[i].wide());
    }
    // One of the columns follows from the others.
    for j in 1..m {
        let column: Vec<_> = (0..n).map(|i| (vars[i * m + j], 1.0)).collect();
        program.add_constraint(&column[..], ComparisonOp::Eq, problem.b[j].wide());
    }
    match program.solve() {
        Ok(SolveOutcome::Solution(solution)) => Ok(Exact {
            cost: solution.objective(),
            plan: vars.iter().map(|&v| solution[v]).collect(),
        }),
        Ok(SolveOutcome::Interrupted(_)) => {
            Err(Error::Invalid("exact transport was interrupted".into()))
        }
        Err(e) => Err(Error::Invalid(format!("exact transport: {e}"))),
    }
}
