//! Least squares with runs that share a trunk, and what is known of a law behind them.
//!
//! A run's measure is its law's value, plus what its trunk (its seed) has of its own, plus a rest: of all that is not the law
//! a share `rho` belongs to the trunk. Given `rho` and the exponents, the coefficients follow by generalised least squares: data
//! and terms are turned so that the errors are independent, and a QR decomposition solves them. `rho` and exponents are looked
//! at on a grid, each point as probable as the data make it (the likelihood with coefficients and variance integrated out, flat
//! in the coefficients and the logarithm of the variance; a half-Cauchy law, Gelman 2006, over the trunks' deviation in units of
//! the rest's). So what few trunks cannot tell widens a band.

use nalgebra::{DMatrix, DVector};
use rand::{Rng, RngExt};
use rand_distr::{ChiSquared, Distribution, StandardNormal};

use super::form::{At, Model};

/// Shares of the variance that a trunk's runs may have in common: the tangent of as many angles, equally far apart, is the
/// trunks' deviation over the rest's.
const SHARES: usize = 12;

fn share(at: usize) -> f64 {
    (at as f64 / SHARES as f64 * std::f64::consts::FRAC_PI_2)
        .sin()
        .powi(2)
}

/// Golden sections of an exponent's range, and rounds over all exponents.
const SECTIONS: usize = 50;
const ROUNDS: usize = 12;
/// Residuals below this share of the values are rounding.
const ROUNDING: f64 = 1e-26;
const LEAST: f64 = 1e-200;

/// Runs in the order of a fit.
pub(super) struct Runs<'a> {
    pub(super) at: &'a [At],
    /// The trunk of each, from 0 on.
    pub(super) trunk: &'a [usize],
}

impl Runs<'_> {
    fn trunks(&self) -> usize {
        self.trunk.iter().max().map_or(0, |last| last + 1)
    }

    /// Runs of each trunk.
    fn sizes(&self) -> Vec<usize> {
        let mut sizes = vec![0; self.trunks()];
        self.trunk.iter().for_each(|&t| sizes[t] += 1);
        sizes
    }

    /// Values whose errors share `rho` within a trunk, as ones whose errors do not.
    fn whiten(&self, rho: f64, values: &mut [f64]) {
        let sizes = self.sizes();
        let mut sums = vec![0.0; sizes.len()];
        for (&trunk, &value) in self.trunk.iter().zip(values.iter()) {
            sums[trunk] += value;
        }
        let scale = (1.0 - rho).sqrt().recip();
        for (&trunk, value) in self.trunk.iter().zip(values) {
            let n = sizes[trunk] as f64;
            let kept = ((1.0 - rho) / (1.0 - rho + n * rho)).sqrt();
            *value = scale * (*value - (1.0 - kept) * sums[trunk] / n);
        }
    }

    /// Logarithm of the determinant of the errors' correlation.
    fn log_determinant(&self, rho: f64) -> f64 {
        let of = |n: usize| {
            let n = n as f64;
            (n - 1.0) * (1.0 - rho).ln() + (1.0 - rho + n * rho).ln()
        };
        self.sizes().into_iter().filter(|&n| n > 0).map(of).sum()
    }
}

/// A law at one `rho` and one set of exponents, decomposed.
struct Cell {
    rho: f64,
    exponents: Vec<f64>,
    q: DMatrix<f64>,
    r: DMatrix<f64>,
    /// Of its posterior weight what does not depend on the data.
    constant: f64,
}

/// A solution at a cell.
pub(super) struct Solution {
    pub(super) rho: f64,
    pub(super) exponents: Vec<f64>,
    pub(super) beta: Vec<f64>,
    /// Residual sum of squares of the turned values.
    pub(super) rss: f64,
    weight: f64,
}

impl Cell {
    /// `None` where the runs do not tell the coefficients apart.
    fn new(model: &Model, runs: &Runs<'_>, rho: f64, exponents: &[f64]) -> Option<Self> {
        let (n, p) = (runs.at.len(), model.width());
        let rows: Vec<Vec<f64>> = runs.at.iter().map(|&at| model.row(at, exponents)).collect();
        let mut x = DMatrix::from_fn(n, p, |i, j| rows[i][j]);
        let size = x.column_iter().map(|c| c.norm()).fold(0.0, f64::max);
        for mut column in x.column_iter_mut() {
            runs.whiten(rho, column.as_mut_slice());
        }
        let decomposed = x.qr();
        let (q, r) = (decomposed.q(), decomposed.r());
        let diagonal: Vec<f64> = (0..p).map(|i| r[(i, i)].abs()).collect();
        if diagonal.iter().any(|&d| d <= 1e-9 * size || !d.is_finite()) {
            return None;
        }
        let logs: f64 = diagonal.iter().map(|d| d.ln()).sum();
        Some(Self {
            rho,
            exponents: exponents.to_vec(),
            q,
            r,
            constant: -0.5 * runs.log_determinant(rho) - logs,
        })
    }

    /// Of values that are turned already, `[n]`.
    fn solve(&self, turned: &DVector<f64>) -> Option<Solution> {
        let along = self.q.tr_mul(turned);
        let rss = (turned - &self.q * &along).norm_squared();
        let rss = rss.max(ROUNDING * turned.norm_squared()).max(LEAST);
        let beta = self.r.solve_upper_triangular(&along)?;
        let degrees = (turned.len() - along.len()) as f64;
        Some(Solution {
            rho: self.rho,
            exponents: self.exponents.clone(),
            beta: beta.as_slice().to_vec(),
            rss,
            weight: self.constant - 0.5 * degrees * rss.ln(),
        })
    }
}

/// Hears of a draw: coefficients, exponents, and what a new run is off by.
pub(super) type OnDrawn<'a> = &'a mut dyn FnMut(&[f64], &[f64], f64);

/// A model over runs, decomposed at all shares and exponents.
pub(super) struct Solver<'a> {
    model: &'a Model,
    runs: Runs<'a>,
    /// Cells of each share.
    cells: Vec<(f64, Vec<Cell>)>,
}

/// All combinations of a value of each grid.
fn combinations(grids: &[&[f64]]) -> Vec<Vec<f64>> {
    let start = vec![Vec::new()];
    grids.iter().fold(start, |all, grid| {
        let with = |one: &Vec<f64>| {
            let one = one.clone();
            grid.iter()
                .map(move |&value| [one.clone(), vec![value]].concat())
        };
        all.iter().flat_map(with).collect()
    })
}

impl<'a> Solver<'a> {
    /// `None` where there are not more runs than the model has coefficients and exponents, or runs do not tell them apart.
    pub(super) fn new(model: &'a Model, runs: Runs<'a>) -> Option<Self> {
        let free = model.width() + model.grids().len();
        if runs.at.len() <= free {
            return None;
        }
        // One run a trunk tells nothing of what a trunk's runs share, and needs nothing of it.
        let alone = runs.sizes().iter().all(|&n| n < 2);
        let shares = (0..if alone { 1 } else { SHARES }).map(share);
        let exponents = combinations(&model.grids());
        let cells = shares.map(|rho| {
            let cells = exponents.iter();
            let cells = cells.filter_map(|e| Cell::new(model, &runs, rho, e));
            (rho, cells.collect::<Vec<_>>())
        });
        let cells: Vec<_> = cells.collect();
        let some = cells.iter().any(|(_, cells)| !cells.is_empty());
        some.then_some(Self { model, runs, cells })
    }

    fn turned(&self, rho: f64, y: &[f64]) -> DVector<f64> {
        let mut turned = y.to_vec();
        self.runs.whiten(rho, &mut turned);
        DVector::from_vec(turned)
    }

    fn all(&self, y: &[f64]) -> Vec<(Solution, &Cell)> {
        let of = |(rho, cells): &'_ (f64, Vec<Cell>)| -> Vec<(Solution, usize)> {
            let turned = self.turned(*rho, y);
            let solved = cells.iter().enumerate();
            solved
                .filter_map(|(i, cell)| Some((cell.solve(&turned)?, i)))
                .collect()
        };
        let all = self.cells.iter();
        all.flat_map(|part| of(part).into_iter().map(|(s, i)| (s, &part.1[i])))
            .collect()
    }

    /// The most probable share and exponents, exponents between those of the grid, and the coefficients there.
    pub(super) fn best(&self, y: &[f64]) -> Option<Solution> {
        let all = self.all(y);
        let (best, _) = all
            .into_iter()
            .max_by(|(a, _), (b, _)| a.weight.total_cmp(&b.weight))?;
        let (rho, turned) = (best.rho, self.turned(best.rho, y));
        let at =
            |exponents: &[f64]| Cell::new(self.model, &self.runs, rho, exponents)?.solve(&turned);
        let grids = self.model.grids();
        // The least squares among exponents, from the grid's best on: one after the other, golden sections between neighbours.
        let mut exponents = best.exponents.clone();
        let mut found = best;
        for _ in 0..ROUNDS * usize::from(!grids.is_empty()) {
            let before = found.rss;
            for (i, grid) in grids.iter().enumerate() {
                let mut probe = |value: f64| {
                    exponents[i] = value;
                    at(&exponents).map_or(f64::INFINITY, |s| s.rss)
                };
                let value = golden(&mut probe, grid, found.exponents[i]);
                exponents[i] = value;
                match at(&exponents) {
                    Some(better) if better.rss <= found.rss => found = better,
                    _ => exponents[i] = found.exponents[i],
                }
            }
            if before - found.rss <= 1e-12 * before {
                break;
            }
        }
        Some(found)
    }

    /// The least -2 x log-likelihood over the trunks' shares, at a solution's exponents.
    pub(super) fn deviance(&self, solution: &Solution, y: &[f64]) -> f64 {
        let n = self.runs.at.len() as f64;
        let of = |rho: f64| {
            let cell = Cell::new(self.model, &self.runs, rho, &solution.exponents)?;
            let variance = cell.solve(&self.turned(rho, y))?.rss / n;
            let fit = n * ((2.0 * std::f64::consts::PI * variance).ln() + 1.0);
            Some(fit + self.runs.log_determinant(rho))
        };
        let all = self.cells.iter().filter_map(|(rho, _)| of(*rho));
        all.fold(f64::INFINITY, f64::min)
    }

    /// What is free: coefficients, exponents, the variance, and the trunks' share of it where runs tell it.
    pub(super) fn freedom(&self) -> usize {
        self.model.width() + self.model.grids().len() + 1 + usize::from(self.cells.len() > 1)
    }

    /// Draws of what the runs leave possible; new runs are of a trunk of their own.
    pub(super) fn draw(&self, y: &[f64], draws: usize, rng: &mut impl Rng, told: OnDrawn<'_>) {
        let all = self.all(y);
        let most = all.iter().map(|(s, _)| s.weight);
        let most = most.fold(f64::NEG_INFINITY, f64::max);
        let mut sum = 0.0;
        let summed: Vec<f64> = all
            .iter()
            .map(|(s, _)| {
                sum += (s.weight - most).exp();
                sum
            })
            .collect();
        let degrees = (y.len() - self.model.width()) as f64;
        let Ok(chi) = ChiSquared::new(degrees) else {
            return;
        };
        for _ in 0..draws {
            let at = rng.random_range(0.0..1.0) * sum;
            let Some((solution, cell)) = all.get(summed.partition_point(|&s| s < at)) else {
                continue;
            };
            let sigma = (solution.rss / chi.sample(rng)).sqrt();
            let p = solution.beta.len();
            let z = DVector::from_fn(p, |_, _| -> f64 { StandardNormal.sample(rng) });
            let Some(off) = cell.r.solve_upper_triangular(&z) else {
                continue;
            };
            let beta = solution.beta.iter().zip(off.iter());
            let beta: Vec<f64> = beta.map(|(b, o)| b + sigma * o).collect();
            // Of a trunk of its own and a rest: together the whole variance.
            let own: f64 = StandardNormal.sample(rng);
            told(&beta, &solution.exponents, sigma * own);
        }
    }
}

/// The least of a function around the grid's value next to `start`, between that value's neighbours.
fn golden(f: &mut impl FnMut(f64) -> f64, grid: &[f64], start: f64) -> f64 {
    let at = grid.partition_point(|&g| g < start);
    let low = grid[at.saturating_sub(1).min(grid.len() - 1)];
    let high = grid[(at + 1).min(grid.len() - 1)];
    let ratio = (5f64.sqrt() - 1.0) / 2.0;
    let (mut a, mut b) = (low, high);
    let (mut c, mut d) = (b - ratio * (b - a), a + ratio * (b - a));
    let (mut fc, mut fd) = (f(c), f(d));
    for _ in 0..SECTIONS {
        if fc < fd {
            (b, d, fd) = (d, c, fc);
            c = b - ratio * (b - a);
            fc = f(c);
        } else {
            (a, c, fc) = (c, d, fd);
            d = a + ratio * (b - a);
            fd = f(d);
        }
    }
    let middle = f64::midpoint(a, b);
    // A least at an end, or none better than where it began.
    [low, high, start, middle]
        .into_iter()
        .map(|value| (f(value), value))
        .min_by(|x, y| x.0.total_cmp(&y.0))
        .map_or(start, |(_, value)| value)
}
