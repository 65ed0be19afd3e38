//! Entropic optimal transport between two finite sets (Sinkhorn; Cuturi 2013, arXiv:1306.0895).
//!
//! Mass `a` `[N]` is moved to `b` `[M]` at a cost `[N, M]`, row-major. The plan minimises `<P, C> + epsilon sum P log P`
//! among those with marginals `a` and `b`, and is `P_ij = exp((f_i + g_j - C_ij) / epsilon)`.
//!
//! Two ways lead there. [`sinkhorn`] works on the potentials `f` and `g` themselves: finite at any epsilon, at two
//! exponentials an entry and iteration. [`Scaling`] is the paper's form, `K = exp(-C / epsilon)` and its rows and columns
//! divided in turn a fixed number of times: one exponential an entry in all, until `K` underflows. Both are the same
//! numbers, and both have their gradient through all iterations ([`value_and_gradient`]); of a converged value the gradient
//! is the plan itself ([`Solution::plan`]), by the envelope theorem. [`exact`] solves small problems without entropy.

mod linear;
mod scaling;
mod unrolled;

pub use linear::{Exact, exact};
pub use scaling::Scaling;
pub use unrolled::unrolled;

use crate::scalar::dot;
use crate::{Error, Result, Scalar};

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

impl<F: Scalar> Problem<'_, F> {
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
        let (a, b) = (
            self.a.iter().copied().sum::<F>(),
            self.b.iter().copied().sum::<F>(),
        );
        let close = F::of(1e3) * F::epsilon() * a.max(b);
        if (a - b).abs() > close {
            return Err(Error::Invalid(format!(
                "masses differ: {} at the sources, {} at the targets",
                a.wide(),
                b.wide()
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
            cost = cost + dot(&plan[first..], row);
            error = error + (plan[first..].iter().copied().sum::<F>() - a).abs();
        }
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
pub fn sinkhorn<F: Scalar>(problem: &Problem<'_, F>, settings: &Settings) -> Result<Solution<F>> {
    problem.check(settings.epsilon)?;
    if !(settings.scaling > 0.0 && settings.scaling <= 1.0) {
        return Err(Error::Invalid(format!(
            "scaling {} must be above 0 and at most 1",
            settings.scaling
        )));
    }
    let (n, m) = (problem.a.len(), problem.b.len());
    let mut state = Potentials::new(n, m);
    if settings.scaling < 1.0 {
        let largest = problem.cost.iter().fold(F::zero(), |a, c| a.max(c.abs()));
        let mut epsilon = largest.wide();
        while epsilon > settings.epsilon {
            state.update(problem, F::of(epsilon));
            epsilon *= settings.scaling;
        }
    }
    let epsilon = F::of(settings.epsilon);
    let (tolerance, most) = match settings.stop {
        Stop::After(n) => (f64::NEG_INFINITY, n),
        Stop::Error(tolerance, most) => (tolerance, most),
    };
    let mut iterations = 0;
    while iterations < most {
        let off = state.update(problem, epsilon);
        iterations += 1;
        // Of the plan before this update; the next is never further off.
        if iterations > 1 && off <= F::of(tolerance) {
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

impl<F: Scalar> Potentials<F> {
    fn new(n: usize, m: usize) -> Self {
        Self {
            f: vec![F::zero(); n],
            g: vec![F::zero(); m],
            largest: vec![F::zero(); m],
            total: vec![F::zero(); m],
        }
    }

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
            let terms = row.iter().zip(&self.g);
            let total: F = terms.map(|x| (exponent(x) - largest).exp()).sum();
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

/// Solves several problems, which share the cores.
///
/// # Errors
/// Of the first problem that has one.
pub fn sinkhorn_batch<F: Scalar>(
    problems: &[Problem<'_, F>],
    settings: &Settings,
) -> Result<Vec<Solution<F>>> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let each = problems.len().div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        let solve = |chunk: &[Problem<'_, F>]| -> Vec<Result<Solution<F>>> {
            chunk.iter().map(|p| sinkhorn(p, settings)).collect()
        };
        let chunks = problems.chunks(each);
        let running: Vec<_> = chunks.map(|c| scope.spawn(move || solve(c))).collect();
        let mut found = Vec::with_capacity(problems.len());
        for chunk in running {
            match chunk.join() {
                Ok(solutions) => found.extend(solutions),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        found.into_iter().collect()
    })
}

/// `<P, C>` after a fixed number of iterations and its gradient with respect to the cost `[N, M]`, through all of them: in
/// the paper's form, or, where that underflows, by the same iterations in the log domain.
///
/// # Errors
/// On a broken problem, and an `epsilon` that is not above 0.
pub fn value_and_gradient<F: Scalar>(
    problem: &Problem<'_, F>,
    epsilon: f64,
    iterations: usize,
) -> Result<(F, Vec<F>)> {
    problem.check(epsilon)?;
    match Scaling::run(problem, epsilon, iterations) {
        Ok(run) => Ok(run.value_and_gradient(problem)),
        Err(_) => unrolled(problem, epsilon, iterations),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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
            let (exact, room) = (exact(&p).expect("solves").cost, ((a.len() * b.len()) as f64).ln());
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
        fn both_forms_have_the_same_value_and_gradient((cost, a, b) in problems(), n in 0usize..12) {
            let p = Problem { cost: &cost, a: &a, b: &b };
            let (value, gradient) = Scaling::run(&p, 0.2, n).expect("runs").value_and_gradient(&p);
            let (other, others) = unrolled(&p, 0.2, n).expect("runs");
            prop_assert!((value - other).abs() < 1e-12, "{value} {other}");
            for (x, y) in gradient.iter().zip(&others) {
                prop_assert!((x - y).abs() < 1e-10, "{x} {y}");
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
            (vec![0.3f64, 0.9, 0.1], vec![1.0f64], vec![0.2f64, 0.3, 0.5]),
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
    fn where_divisions_underflow_the_value_and_gradient_come_from_the_log_domain() {
        let cost = [0.0f32, 1.5, 1.0, 0.2];
        let p = Problem {
            cost: &cost,
            a: &[1.0, 1.0],
            b: &[1.0, 1.0],
        };
        assert!(Scaling::run(&p, 1e-3, 20).is_err());
        let (value, gradient) = value_and_gradient(&p, 1e-3, 20).expect("solves");
        assert!((value - 0.2).abs() < 1e-5, "{value}");
        for (g, expected) in gradient.iter().zip([1.0, 0.0, 0.0, 1.0]) {
            assert!((g - expected).abs() < 1e-4, "{gradient:?}");
        }
    }

    #[test]
    fn a_batch_is_solved_as_its_problems_are() {
        let costs: Vec<Vec<f64>> = (0..7)
            .map(|i| {
                (0..12)
                    .map(|j| ((i * 5 + j * 7) % 11) as f64 / 7.0)
                    .collect()
            })
            .collect();
        let problem = |cost| Problem {
            cost,
            a: &[0.25, 0.25, 0.5],
            b: &[0.1, 0.2, 0.3, 0.4],
        };
        let problems: Vec<_> = costs.iter().map(|c| problem(c)).collect();
        let alone: Vec<_> = problems
            .iter()
            .map(|p| sinkhorn(p, &converged(0.1)).expect("solves"))
            .collect();
        assert_eq!(
            sinkhorn_batch(&problems, &converged(0.1)).expect("solves"),
            alone
        );
        let broken = [problems[0], problem(&costs[0][..3])];
        assert!(sinkhorn_batch(&broken, &converged(0.1)).is_err());
        assert!(
            sinkhorn_batch::<f64>(&[], &converged(0.1))
                .expect("solves")
                .is_empty()
        );
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
