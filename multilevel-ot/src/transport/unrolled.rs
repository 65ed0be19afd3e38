use super::{Potentials, Problem};
use crate::{Result, Scalar};

/// `<P, C>` after a fixed number of iterations in the log domain, and its gradient with respect to the cost `[N, M]` through
/// all of them: what [`super::Scaling`] computes, at any epsilon, at four exponentials an entry and iteration.
///
/// # Errors
/// On a broken problem, and an `epsilon` that is not above 0.
pub fn unrolled<F: Scalar>(
    problem: &Problem<'_, F>,
    epsilon: f64,
    iterations: usize,
) -> Result<(F, Vec<F>)> {
    problem.check(epsilon)?;
    let epsilon = F::of(epsilon);
    let (n, m) = (problem.a.len(), problem.b.len());
    let mut state = Potentials::new(n, m);
    let mut history = vec![(state.f.clone(), state.g.clone())];
    for _ in 0..iterations {
        state.update(problem, epsilon);
        history.push((state.f.clone(), state.g.clone()));
    }
    let plan = |f: &[F], g: &[F], i: usize, j: usize| {
        ((f[i] + g[j] - problem.cost[i * m + j]) / epsilon).exp()
    };
    let mut value = F::zero();
    let mut gradient = vec![F::zero(); n * m];
    let (mut df, mut dg) = (vec![F::zero(); n], vec![F::zero(); m]);
    for i in 0..n {
        for j in 0..m {
            let (p, c) = (plan(&state.f, &state.g, i, j), problem.cost[i * m + j]);
            let slope = p * c / epsilon;
            value = value + p * c;
            gradient[i * m + j] = p - slope;
            df[i] = df[i] + slope;
            dg[j] = dg[j] + slope;
        }
    }
    for step in (1..history.len()).rev() {
        let ((f, g), before) = (&history[step], &history[step - 1].1);
        // Each g answers for the f, by the share each has in its sum.
        for i in 0..n {
            for j in 0..m {
                let share = dg[j] * plan(f, g, i, j) / problem.b[j];
                gradient[i * m + j] = gradient[i * m + j] + share;
                df[i] = df[i] - share;
            }
        }
        // And each f for the g of the iteration before.
        dg.fill(F::zero());
        for i in 0..n {
            for j in 0..m {
                let share = df[i] * plan(f, before, i, j) / problem.a[i];
                gradient[i * m + j] = gradient[i * m + j] + share;
                dg[j] = dg[j] - share;
            }
        }
        df.fill(F::zero());
    }
    Ok((value, gradient))
}
