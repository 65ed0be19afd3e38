use scylla_core::kernels::softmax::{add_transposed_times, combine, times};

use super::Problem;
use crate::{Error, Result, Scalar};

/// The fixed number of divisions of the paper, with the gradient of `<P, C>` through all of them.
#[derive(Debug, Clone)]
pub struct Scaling<F> {
    epsilon: F,
    /// `exp(-C / epsilon)` `[N, M]`, relative to the least cost, which no plan knows of.
    kernel: Vec<F>,
    /// Factors of rows and columns after each iteration, `[iterations + 1, N]` and `[iterations + 1, M]`; at first 1.
    rows: Vec<Vec<F>>,
    columns: Vec<Vec<F>>,
}

impl<F: Scalar> Scaling<F> {
    /// Divides rows, then columns, `iterations` times.
    ///
    /// # Errors
    /// On a broken problem, an `epsilon` that is not above 0, and where `K` underflows: [`super::sinkhorn`] then still works.
    pub fn run(problem: &Problem<'_, F>, epsilon: f64, iterations: usize) -> Result<Self> {
        problem.check(epsilon)?;
        let (n, m) = (problem.a.len(), problem.b.len());
        // The first division forgets a common factor of K.
        let least = match iterations {
            0 => F::zero(),
            _ => problem.cost.iter().copied().fold(F::infinity(), F::min),
        };
        let mut kernel = vec![F::zero(); n * m];
        let scale = F::of(-1.0 / epsilon);
        combine(
            problem.cost,
            least,
            scale,
            F::one(),
            F::zero(),
            false,
            &mut kernel,
        );
        // What is no normal number any more is nothing.
        let most = least - F::min_positive_value().ln() * F::of(epsilon) * F::of(0.99);
        for (k, &c) in kernel.iter_mut().zip(problem.cost) {
            *k = if c > most { F::zero() } else { *k };
        }
        let mut rows = vec![vec![F::one(); n]];
        let mut columns = vec![vec![F::one(); m]];
        for i in 0..iterations {
            let mut u = vec![F::zero(); n];
            times(&kernel, &columns[i], &mut u);
            for (u, &a) in u.iter_mut().zip(problem.a) {
                *u = a / *u;
            }
            let mut v = vec![F::zero(); m];
            add_transposed_times(&kernel, &u, &mut v);
            for (v, &b) in v.iter_mut().zip(problem.b) {
                *v = b / *v;
            }
            let broken = |x: &&F| !(x.is_finite() && **x > F::zero());
            if let Some(bad) = u.iter().chain(&v).find(broken) {
                return Err(Error::Invalid(format!(
                    "transport in exponential form underflows at epsilon {epsilon} (a factor became {}); the log domain does not",
                    bad.wide()
                )));
            }
            rows.push(u);
            columns.push(v);
        }
        Ok(Self {
            epsilon: F::of(epsilon),
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
        match (self.rows.last(), self.columns.last()) {
            (Some(u), Some(v)) => (u, v),
            _ => (&[], &[]), // never: the first are there from the beginning
        }
    }

    /// `<P, C>` and its gradient with respect to the cost `[N, M]`.
    pub fn value_and_gradient(&self, problem: &Problem<'_, F>) -> (F, Vec<F>) {
        let (u, v) = self.last();
        let (n, m) = (u.len(), v.len());
        let weighted = self.kernel.iter().zip(problem.cost);
        let weighted: Vec<F> = weighted.map(|(&k, &c)| k * c).collect();
        let (mut du, mut dv) = (vec![F::zero(); n], vec![F::zero(); m]);
        times(&weighted, v, &mut du);
        add_transposed_times(&weighted, u, &mut dv);
        let value = u.iter().zip(&du).map(|(&u, &d)| u * d).sum();
        // Every division adds two outer products to the gradient of K; they are summed row by row at the end.
        let (mut left, mut right): (Vec<Vec<F>>, Vec<F>) = (Vec::new(), Vec::new());
        let mut back = vec![F::zero(); n];
        for i in (1..self.rows.len()).rev() {
            let (u, v) = (&self.rows[i], &self.columns[i]);
            // v = b / K^T u
            let ds: Vec<F> = (0..m)
                .map(|j| -dv[j] * v[j] * v[j] / problem.b[j])
                .collect();
            times(&self.kernel, &ds, &mut back);
            // u = a / K v, with the columns of the iteration before.
            let of = |r: usize| -(du[r] + back[r]) * u[r] * u[r] / problem.a[r];
            let dr: Vec<F> = (0..n).map(of).collect();
            dv.fill(F::zero());
            add_transposed_times(&self.kernel, &dr, &mut dv);
            left.push(u.clone());
            right.extend(ds);
            left.push(dr);
            right.extend_from_slice(&self.columns[i - 1]);
            du.fill(F::zero());
        }
        let mut gradient = vec![F::zero(); n * m];
        let mut factors = vec![F::zero(); left.len()];
        for (i, gradient) in gradient.chunks_exact_mut(m).enumerate() {
            for (factor, left) in factors.iter_mut().zip(&left) {
                *factor = left[i];
            }
            add_transposed_times(&right, &factors, gradient);
            let (k, c) = (&self.kernel[i * m..][..m], &problem.cost[i * m..][..m]);
            for j in 0..m {
                // Of K: through the last plan, and through the factors.
                let of_kernel = gradient[j] + u[i] * v[j] * c[j];
                gradient[j] = (u[i] * v[j] - of_kernel / self.epsilon) * k[j];
            }
        }
        (value, gradient)
    }
}
