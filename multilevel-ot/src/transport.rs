//! Entropic optimal transport between two finite sets (Sinkhorn; Cuturi 2013, arXiv:1306.0895).
//!
//! Mass `a` `[N]` is moved to `b` `[M]` at a cost `[N, M]`, row-major. The plan minimises `<P, C> + epsilon sum P log P`
//! among those with marginals `a` and `b`, and is `P_ij = exp((f_i + g_j - C_ij) / epsilon)`.
//!
//! Two ways lead there. [`sinkhorn`] works on the potentials `f` and `g` themselves: finite at any epsilon, at two
//! exponentials an entry and iteration. [`Scaling`] is the paper's form, `K = exp(-C / epsilon)` and its rows and columns
//! divided in turn a fixed number of times: one exponential an entry in all, until `K` underflows. Both are the same
//! numbers, so gradients are those of [`Scaling`], unrolled; of a converged value the gradient is the plan itself
//! ([`Solution::plan`]), by the envelope theorem.

use num_traits::Float;

use crate::{Error, Result};

/// What is moved, where, at what cost.
#[derive(Debug, Clone, Copy)]
pub struct Problem<'a, F> {
    /// `[N, M]`
    pub cost: &'a [F],
    /// Mass at each source, `[N]`, above 0.
    pub a: &'a [F],
    /// Mass at each target, `[M]`, above 0, with the same sum.
    pub b: &'a [F],
}

/// When to stop.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Stop {
    /// After so many pairs of updates.
    After(usize),
    /// When the row sums are off by no more than this in all, or after so many pairs of updates.
    Error(f64, usize),
}

/// How [`sinkhorn`] works.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// Weight of the entropy, in units of the cost.
    pub epsilon: f64,
    /// When to stop.
    pub stop: Stop,
    /// Begins at the largest cost and comes down to `epsilon` by this factor at a time, which takes fewer updates where
    /// `epsilon` is small; 1 begins at `epsilon`.
    pub scaling: f64,
}

/// What was found.
#[derive(Debug, Clone, PartialEq)]
pub struct Solution<F> {
    /// Potentials.
    pub f: Vec<F>,
    /// Potentials.
    pub g: Vec<F>,
    /// `[N, M]`
    pub plan: Vec<F>,
    /// `<P, C>`
    pub cost: F,
    /// `<P, C> + epsilon sum P log P`
    pub regularized: F,
    /// How much the row sums are off, summed; those of columns are exact.
    pub error: F,
    /// Pairs of updates.
    pub iterations: usize,
}

fn real<F: Float>(x: f64) -> F {
    F::from(x).unwrap_or_else(F::nan)
}

fn sum<F: Float>(values: impl Iterator<Item = F>) -> F {
    values.fold(F::zero(), |a, b| a + b)
}

impl<F: Float> Problem<'_, F> {
    /// # Errors
    /// On sizes that do not fit, costs that are not finite, marginals that are not above 0 or differ in sum, and an
    /// `epsilon` that is not above 0.
    fn check(&self, epsilon: f64) -> Result<()> {
        let (n, m) = (self.a.len(), self.b.len());
        if n == 0 || m == 0 || self.cost.len() != n * m {
            return Err(Error::Shape {
                what: "transport cost",
                expected: format!("{n} x {m}, neither 0"),
                found: format!("{} values", self.cost.len()),
            });
        }
        if let Some(i) = self.cost.iter().position(|c| !c.is_finite()) {
            return Err(Error::Invalid(format!(
                "transport cost [{}, {}] is not finite",
                i / m,
                i % m
            )));
        }
        for (name, marginal) in [("source", self.a), ("target", self.b)] {
            if let Some(i) = marginal
                .iter()
                .position(|&v| !(v > F::zero() && v.is_finite()))
            {
                return Err(Error::Invalid(format!(
                    "mass of {name} {i} must be finite and above 0"
                )));
            }
        }
        let (a, b) = (sum(self.a.iter().copied()), sum(self.b.iter().copied()));
        let close = real::<F>(1e3) * F::epsilon() * a.max(b);
        if (a - b).abs() > close {
            return Err(Error::Invalid(format!(
                "masses differ: {} at the sources, {} at the targets",
                a.to_f64().unwrap_or(f64::NAN),
                b.to_f64().unwrap_or(f64::NAN)
            )));
        }
        match epsilon > 0.0 && epsilon.is_finite() {
            true => Ok(()),
            false => Err(Error::Invalid(format!(
                "epsilon {epsilon} must be finite and above 0"
            ))),
        }
    }

    fn rows(&self) -> impl Iterator<Item = &[F]> {
        self.cost.chunks_exact(self.b.len())
    }

    /// The plan of two potentials, and what is known of it.
    fn solution(&self, f: Vec<F>, g: Vec<F>, epsilon: F, iterations: usize) -> Solution<F> {
        let mut plan = Vec::with_capacity(self.cost.len());
        let (mut cost, mut error) = (F::zero(), F::zero());
        for ((row, &f), &a) in self.rows().zip(&f).zip(self.a) {
            let first = plan.len();
            plan.extend(
                row.iter()
                    .zip(&g)
                    .map(|(&c, &g)| ((f + g - c) / epsilon).exp()),
            );
            cost = cost + sum(plan[first..].iter().zip(row).map(|(&p, &c)| p * c));
            error = error + (sum(plan[first..].iter().copied()) - a).abs();
        }
        let dot = |x: &[F], y: &[F]| sum(x.iter().zip(y).map(|(&x, &y)| x * y));
        Solution {
            regularized: dot(self.a, &f) + dot(self.b, &g),
            f,
            g,
            plan,
            cost,
            error,
            iterations,
        }
    }
}

/// Solves a problem in the log domain.
///
/// # Errors
/// On a broken problem, an `epsilon` that is not above 0, and a `scaling` outside `(0, 1]`.
pub fn sinkhorn<F: Float>(problem: &Problem<'_, F>, settings: &Settings) -> Result<Solution<F>> {
    problem.check(settings.epsilon)?;
    if !(settings.scaling > 0.0 && settings.scaling <= 1.0) {
        return Err(Error::Invalid(format!(
            "scaling {} must be above 0 and at most 1",
            settings.scaling
        )));
    }
    let (n, m) = (problem.a.len(), problem.b.len());
    let mut state = Potentials {
        f: vec![F::zero(); n],
        g: vec![F::zero(); m],
        largest: vec![F::zero(); m],
        total: vec![F::zero(); m],
    };
    if settings.scaling < 1.0 {
        let largest = problem.cost.iter().fold(F::zero(), |a, c| a.max(c.abs()));
        let mut epsilon = largest.to_f64().unwrap_or(0.0);
        while epsilon > settings.epsilon {
            state.update(problem, real(epsilon));
            epsilon *= settings.scaling;
        }
    }
    let epsilon = real(settings.epsilon);
    let (tolerance, most) = match settings.stop {
        Stop::After(n) => (f64::NEG_INFINITY, n),
        Stop::Error(tolerance, most) => (tolerance, most),
    };
    let mut iterations = 0;
    while iterations < most {
        let off = state.update(problem, epsilon);
        iterations += 1;
        // Of the plan before this update; the next is never further off.
        if iterations > 1 && off <= real(tolerance) {
            break;
        }
    }
    Ok(problem.solution(state.f, state.g, epsilon, iterations))
}

struct Potentials<F> {
    f: Vec<F>,
    g: Vec<F>,
    /// Of each column: the largest exponent, and the sum of exponentials over it.
    largest: Vec<F>,
    total: Vec<F>,
}

impl<F: Float> Potentials<F> {
    /// Makes rows fit, then columns; returns by how much the row sums were off before.
    fn update(&mut self, problem: &Problem<'_, F>, epsilon: F) -> F {
        let mut off = F::zero();
        for ((row, f), &a) in problem.rows().zip(&mut self.f).zip(problem.a) {
            let exponent = |(&c, &g): (&F, &F)| (g - c) / epsilon;
            let largest = row
                .iter()
                .zip(&self.g)
                .map(exponent)
                .fold(F::neg_infinity(), F::max);
            let total = sum(row
                .iter()
                .zip(&self.g)
                .map(|x| (exponent(x) - largest).exp()));
            let new = epsilon * (a.ln() - largest - total.ln());
            off = off + a * (((*f - new) / epsilon).exp() - F::one()).abs();
            *f = new;
        }
        self.largest.fill(F::neg_infinity());
        self.total.fill(F::zero());
        for (row, &f) in problem.rows().zip(&self.f) {
            for (largest, &c) in self.largest.iter_mut().zip(row) {
                *largest = largest.max((f - c) / epsilon);
            }
        }
        for (row, &f) in problem.rows().zip(&self.f) {
            for ((total, &largest), &c) in self.total.iter_mut().zip(&self.largest).zip(row) {
                *total = *total + ((f - c) / epsilon - largest).exp();
            }
        }
        let columns = self.largest.iter().zip(&self.total).zip(problem.b);
        for (g, ((&largest, &total), &b)) in self.g.iter_mut().zip(columns) {
            *g = epsilon * (b.ln() - largest - total.ln());
        }
        off
    }
}

/// The fixed number of divisions of the paper, with the gradient of `<P, C>` through all of them.
#[derive(Debug, Clone)]
pub struct Scaling<F> {
    epsilon: F,
    /// `exp(-C / epsilon)` `[N, M]`
    kernel: Vec<F>,
    /// Factors of rows and columns after each iteration, `[iterations + 1, N]` and `[iterations + 1, M]`; at first 1.
    rows: Vec<Vec<F>>,
    columns: Vec<Vec<F>>,
}

impl<F: Float> Scaling<F> {
    /// Divides rows, then columns, `iterations` times.
    ///
    /// # Errors
    /// On a broken problem, an `epsilon` that is not above 0, and where `K` underflows: [`sinkhorn`] then still works.
    pub fn run(problem: &Problem<'_, F>, epsilon: f64, iterations: usize) -> Result<Self> {
        problem.check(epsilon)?;
        let (n, m) = (problem.a.len(), problem.b.len());
        let small = real::<F>(epsilon);
        let kernel: Vec<F> = problem.cost.iter().map(|&c| (-c / small).exp()).collect();
        let mut rows = vec![vec![F::one(); n]];
        let mut columns = vec![vec![F::one(); m]];
        for i in 0..iterations {
            let mut u = Vec::with_capacity(n);
            let mut sums = vec![F::zero(); m];
            for (k, &a) in kernel.chunks_exact(m).zip(problem.a) {
                let factor = a / sum(k.iter().zip(&columns[i]).map(|(&k, &v)| k * v));
                for (sum, &k) in sums.iter_mut().zip(k) {
                    *sum = *sum + k * factor;
                }
                u.push(factor);
            }
            let v: Vec<F> = problem.b.iter().zip(&sums).map(|(&b, &s)| b / s).collect();
            if let Some(bad) = u
                .iter()
                .chain(&v)
                .find(|x| !(x.is_finite() && **x > F::zero()))
            {
                return Err(Error::Invalid(format!(
                    "transport in exponential form underflows at epsilon {epsilon} (a factor became {}); the log domain does not",
                    bad.to_f64().unwrap_or(f64::NAN)
                )));
            }
            rows.push(u);
            columns.push(v);
        }
        Ok(Self {
            epsilon: small,
            kernel,
            rows,
            columns,
        })
    }

    /// The plan `[N, M]`.
    pub fn plan(&self) -> Vec<F> {
        let (u, v) = self.last();
        let rows = self.kernel.chunks_exact(v.len()).zip(u);
        rows.flat_map(|(k, &u)| k.iter().zip(v).map(move |(&k, &v)| u * k * v))
            .collect()
    }

    fn last(&self) -> (&[F], &[F]) {
        let none: (&[F], &[F]) = (&[], &[]);
        match (self.rows.last(), self.columns.last()) {
            (Some(u), Some(v)) => (u, v),
            _ => none, // never: the first are there from the beginning
        }
    }

    /// `<P, C>` and its gradient with respect to the cost `[N, M]`.
    pub fn value_and_gradient(&self, problem: &Problem<'_, F>) -> (F, Vec<F>) {
        let (u, v) = self.last();
        let (n, m) = (u.len(), v.len());
        let (mut du, mut dv) = (vec![F::zero(); n], vec![F::zero(); m]);
        let mut value = F::zero();
        for (i, (k, c)) in self.kernel.chunks_exact(m).zip(problem.rows()).enumerate() {
            for j in 0..m {
                let kc = k[j] * c[j];
                value = value + u[i] * kc * v[j];
                du[i] = du[i] + kc * v[j];
                dv[j] = dv[j] + u[i] * kc;
            }
        }
        // Every division adds two outer products to the gradient of K; they are summed entry by entry at the end.
        let mut left: Vec<Vec<F>> = Vec::new();
        let mut right: Vec<Vec<F>> = Vec::new();
        for i in (1..self.rows.len()).rev() {
            let (u, v) = (&self.rows[i], &self.columns[i]);
            // v = b / K^T u
            let ds: Vec<F> = (0..m)
                .map(|j| -dv[j] * v[j] * v[j] / problem.b[j])
                .collect();
            for (k, du) in self.kernel.chunks_exact(m).zip(&mut du) {
                *du = *du + sum(k.iter().zip(&ds).map(|(&k, &d)| k * d));
            }
            left.push(u.clone());
            right.push(ds);
            // u = a / K v, with the columns of the iteration before.
            let dr: Vec<F> = (0..n)
                .map(|r| -du[r] * u[r] * u[r] / problem.a[r])
                .collect();
            dv.fill(F::zero());
            for (k, &dr) in self.kernel.chunks_exact(m).zip(&dr) {
                for (dv, &k) in dv.iter_mut().zip(k) {
                    *dv = *dv + k * dr;
                }
            }
            left.push(dr);
            right.push(self.columns[i - 1].clone());
            du.fill(F::zero());
        }
        let mut gradient = vec![F::zero(); n * m];
        for (i, gradient) in gradient.chunks_exact_mut(m).enumerate() {
            for (l, r) in left.iter().zip(&right) {
                for (d, &r) in gradient.iter_mut().zip(r) {
                    *d = *d + l[i] * r;
                }
            }
            let (k, c) = (
                &self.kernel[i * m..(i + 1) * m],
                &problem.cost[i * m..(i + 1) * m],
            );
            for j in 0..m {
                // Of K: through the last plan, and through the factors.
                let of_kernel = gradient[j] + u[i] * v[j] * c[j];
                gradient[j] = u[i] * k[j] * v[j] - of_kernel * k[j] / self.epsilon;
            }
        }
        (value, gradient)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use microlp::{ComparisonOp, OptimizationDirection, SolveOutcome};
    use proptest::prelude::*;

    /// The least `<P, C>` of all plans, by linear programming.
    fn exact(p: &Problem<'_, f64>) -> f64 {
        let (n, m) = (p.a.len(), p.b.len());
        let mut program = microlp::Problem::new(OptimizationDirection::Minimize);
        let vars: Vec<_> = p
            .cost
            .iter()
            .map(|&c| program.add_var(c, (0.0, f64::INFINITY)))
            .collect();
        for i in 0..n {
            let row: Vec<_> = (0..m).map(|j| (vars[i * m + j], 1.0)).collect();
            program.add_constraint(&row[..], ComparisonOp::Eq, p.a[i]);
        }
        // One of the columns follows from the others.
        for j in 1..m {
            let column: Vec<_> = (0..n).map(|i| (vars[i * m + j], 1.0)).collect();
            program.add_constraint(&column[..], ComparisonOp::Eq, p.b[j]);
        }
        match program.solve().expect("feasible") {
            SolveOutcome::Solution(solution) => solution.objective(),
            SolveOutcome::Interrupted(_) => unreachable!("no limit was set"),
        }
    }

    fn normalized(weights: &[f64]) -> Vec<f64> {
        let total: f64 = weights.iter().sum();
        weights.iter().map(|w| w / total).collect()
    }

    fn converged(epsilon: f64) -> Settings {
        Settings {
            epsilon,
            stop: Stop::Error(1e-10, 100_000),
            scaling: 0.5,
        }
    }

    /// Costs `[n, m]` and marginals.
    fn problems() -> impl Strategy<Value = (Vec<f64>, Vec<f64>, Vec<f64>)> {
        (1usize..7, 1usize..7).prop_flat_map(|(n, m)| {
            let mass = |n| prop::collection::vec(0.1f64..1.0, n).prop_map(|w| normalized(&w));
            (prop::collection::vec(0.0f64..2.0, n * m), mass(n), mass(m))
        })
    }

    fn transposed(cost: &[f64], m: usize) -> Vec<f64> {
        let n = cost.len() / m;
        (0..m)
            .flat_map(|j| (0..n).map(move |i| cost[i * m + j]))
            .collect()
    }

    proptest! {
        #[test]
        fn the_converged_cost_lies_above_the_exact_one_by_no_more_than_the_entropy((cost, a, b) in problems()) {
            let p = Problem { cost: &cost, a: &a, b: &b };
            let (exact, room) = (exact(&p), ((a.len() * b.len()) as f64).ln());
            for epsilon in [0.5, 0.1, 0.02] {
                let found = sinkhorn(&p, &converged(epsilon)).expect("solves");
                // Some problems settle too slowly at the smallest epsilon. Rows that are off move the exact cost by no more
                // than the mass that is off times the largest cost.
                prop_assert!(found.error <= 1e-9 || found.iterations == 100_000, "{}", found.error);
                prop_assert!(found.error <= 1e-2, "{}", found.error);
                let slack = 1e-8 + 2.0 * found.error;
                for (j, &b) in b.iter().enumerate() {
                    let column: f64 = found.plan.iter().skip(j).step_by(p.b.len()).sum();
                    prop_assert!((column - b).abs() < 1e-12);
                }
                prop_assert!(found.cost >= exact - slack, "{} below {exact}", found.cost);
                prop_assert!(found.cost <= exact + epsilon * room + slack);
            }
        }

        #[test]
        fn potentials_and_divisions_are_the_same_iterations((cost, a, b) in problems(), n in 1usize..30) {
            let p = Problem { cost: &cost, a: &a, b: &b };
            let settings = Settings { epsilon: 0.1, stop: Stop::After(n), scaling: 1.0 };
            let plan = Scaling::run(&p, 0.1, n).expect("runs").plan();
            for (x, y) in plan.iter().zip(&sinkhorn(&p, &settings).expect("solves").plan) {
                prop_assert!((x - y).abs() < 1e-12, "{x} {y}");
            }
        }

        #[test]
        fn the_unrolled_gradient_agrees_with_differences((cost, a, b) in problems(), n in 0usize..12) {
            let value = |cost: &[f64]| {
                let p = Problem { cost, a: &a, b: &b };
                Scaling::run(&p, 0.3, n).expect("runs").value_and_gradient(&p)
            };
            let (_, gradient) = value(&cost);
            let scale = gradient.iter().fold(1e-3f64, |m, g| m.max(g.abs()));
            for i in 0..cost.len() {
                let at = |step: f64| {
                    let mut moved = cost.clone();
                    moved[i] += step;
                    value(&moved).0
                };
                // Of fourth order, so that the step may be large beside rounding.
                let h = 1e-3;
                let difference = (8.0 * (at(h) - at(-h)) - (at(2.0 * h) - at(-2.0 * h))) / (12.0 * h);
                prop_assert!((gradient[i] - difference).abs() <= 1e-6 * scale, "{} {difference}", gradient[i]);
            }
        }

        #[test]
        fn the_plan_is_the_gradient_of_the_converged_value((cost, a, b) in problems()) {
            let value = |cost: &[f64]| {
                sinkhorn(&Problem { cost, a: &a, b: &b }, &Settings { stop: Stop::Error(1e-14, 20_000), ..converged(0.3) }).expect("solves")
            };
            let plan = value(&cost).plan;
            for i in 0..cost.len() {
                let at = |step: f64| {
                    let mut moved = cost.clone();
                    moved[i] += step;
                    value(&moved).regularized
                };
                let h = 1e-3;
                let difference = (8.0 * (at(h) - at(-h)) - (at(2.0 * h) - at(-2.0 * h))) / (12.0 * h);
                prop_assert!((plan[i] - difference).abs() < 1e-7, "{} {difference}", plan[i]);
            }
        }

        #[test]
        fn transposing_the_problem_transposes_the_converged_plan((cost, a, b) in problems()) {
            let plan = sinkhorn(&Problem { cost: &cost, a: &a, b: &b }, &converged(0.1)).expect("solves").plan;
            let other = transposed(&cost, b.len());
            let mirrored = sinkhorn(&Problem { cost: &other, a: &b, b: &a }, &converged(0.1)).expect("solves").plan;
            for (x, y) in transposed(&plan, b.len()).iter().zip(&mirrored) {
                prop_assert!((x - y).abs() < 1e-8);
            }
        }
    }

    #[test]
    fn one_point_free_transport_and_a_constant_cost_have_known_plans() {
        for (cost, a, b) in [
            (vec![0.3, 0.9, 0.1], vec![1.0], vec![0.2, 0.3, 0.5]),
            (vec![0.0; 6], vec![0.4, 0.6], vec![0.2, 0.3, 0.5]),
            (vec![7.0; 6], vec![0.4, 0.6], vec![0.2, 0.3, 0.5]),
        ] {
            let p = Problem {
                cost: &cost,
                a: &a,
                b: &b,
            };
            let found = sinkhorn(&p, &converged(0.1)).expect("solves");
            let product = a.iter().flat_map(|a| b.iter().map(move |b| a * b));
            for (x, y) in found.plan.iter().zip(product) {
                assert!((x - y).abs() < 1e-12, "{x} {y}");
            }
        }
    }

    #[test]
    fn the_log_domain_is_finite_in_single_precision_where_divisions_underflow() {
        let cost: Vec<f32> = (0..35).map(|i| 0.5 + (i * 37 % 35) as f32 / 20.0).collect();
        let (a, b) = (vec![0.2f32; 5], vec![1.0f32 / 7.0; 7]);
        let p = Problem {
            cost: &cost,
            a: &a,
            b: &b,
        };
        let found = sinkhorn(
            &p,
            &Settings {
                epsilon: 1e-3,
                stop: Stop::Error(1e-4, 10_000),
                scaling: 0.5,
            },
        );
        let found = found.expect("solves");
        assert!(
            found
                .plan
                .iter()
                .chain([&found.cost])
                .all(|x| x.is_finite())
        );
        assert!(found.error < 1e-3, "{}", found.error);
        let refused = Scaling::run(&p, 1e-3, 20).expect_err("underflows");
        assert!(refused.to_string().contains("underflows"), "{refused}");
    }

    #[test]
    fn broken_problems_are_refused_by_name() {
        let (cost, half) = ([0.1, 0.2, 0.3, 0.4], [0.5, 0.5]);
        let fine = Problem {
            cost: &cost,
            a: &half,
            b: &half,
        };
        let refused = |p: Problem<'_, f64>, settings: Settings, what: &str| {
            let error = sinkhorn(&p, &settings).expect_err(what).to_string();
            assert!(error.contains(what), "{error}");
        };
        refused(
            Problem {
                cost: &cost[..3],
                ..fine
            },
            converged(0.1),
            "2 x 2",
        );
        refused(
            Problem {
                cost: &[0.1, f64::NAN, 0.3, 0.4],
                ..fine
            },
            converged(0.1),
            "[0, 1] is not finite",
        );
        refused(
            Problem {
                a: &[1.0, 0.0],
                ..fine
            },
            converged(0.1),
            "source 1",
        );
        refused(
            Problem {
                b: &[0.5, 0.6],
                ..fine
            },
            converged(0.1),
            "masses differ",
        );
        refused(fine, converged(0.0), "epsilon 0");
        refused(
            fine,
            Settings {
                scaling: 0.0,
                ..converged(0.1)
            },
            "scaling 0",
        );
    }
}
