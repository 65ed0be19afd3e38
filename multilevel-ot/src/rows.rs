//! Softmax of an answer's rows at several temperatures, and the gradient through them.

use scylla_core::kernels::softmax::{Sums, accumulate, combine, sums};

use crate::answer::Side;
use crate::parallel::{by_row, threads};
use crate::{Error, Result, Scalar};

/// Exponentials at `scale`, which serve the temperature `1 / scale` and, squared, half of it.
#[derive(Debug, Clone, Copy)]
struct Pass {
    scale: f64,
    /// Places in the list of temperatures.
    single: Option<usize>,
    square: Option<usize>,
}

/// Rows of one sequence with what their softmax divides by.
#[derive(Debug, Clone)]
pub(crate) struct Rows<'a, F> {
    pub(crate) x: Vec<&'a [F]>,
    temperatures: Vec<f64>,
    passes: Vec<Pass>,
    /// By row and temperature: what exponentials are relative to, and their sum.
    sums: Vec<(F, F)>,
}

/// The fewest passes over different temperatures.
fn passes(temperatures: &[f64]) -> Vec<Pass> {
    let mut left: Vec<usize> = (0..temperatures.len()).collect();
    left.sort_by(|&a, &b| temperatures[a].total_cmp(&temperatures[b]));
    let mut passes = Vec::new();
    while !left.is_empty() {
        let low = left.remove(0);
        let twice = left
            .iter()
            .position(|&i| temperatures[i] == 2.0 * temperatures[low]);
        passes.push(match twice.map(|at| left.remove(at)) {
            Some(high) => Pass {
                scale: 1.0 / temperatures[high],
                single: Some(high),
                square: Some(low),
            },
            None => Pass {
                scale: 1.0 / temperatures[low],
                single: Some(low),
                square: None,
            },
        });
    }
    passes
}

impl<'a, F: Scalar> Rows<'a, F> {
    /// Reads rows `s` of sequence `b`. Where `mass` is given, the probabilities of the first so many rows at that one of the
    /// temperatures are added to it.
    ///
    /// # Errors
    /// On logits that are NaN or infinite, and rows without a finite one.
    pub(crate) fn read(
        side: &Side<'a, F>,
        b: usize,
        rows: &[usize],
        temperatures: &[f64],
        mut mass: Option<(f64, usize, &mut [F])>,
    ) -> Result<Self> {
        let mut distinct: Vec<f64> = Vec::new();
        for &t in temperatures {
            if !(t > 0.0 && t.is_finite()) {
                return Err(Error::Invalid(format!(
                    "temperature {t} must be finite and above 0"
                )));
            }
            if !distinct.contains(&t) {
                distinct.push(t);
            }
        }
        let mut found = Self {
            x: Vec::with_capacity(rows.len()),
            passes: passes(&distinct),
            sums: Vec::with_capacity(rows.len() * distinct.len()),
            temperatures: distinct,
        };
        let (passes, kinds) = (&found.passes, found.temperatures.len());
        let threads = threads(side.batch, rows.len() * side.vocab);
        let of_row = |(): &mut (), row: usize, _: Option<&mut [F]>| {
            let x = side.row(b, rows[row]);
            let mut of = vec![(F::zero(), F::zero()); kinds];
            for pass in passes {
                let sums: Sums<F> = sums(x, F::of(pass.scale));
                if !sums.sum.is_finite() {
                    return Err(Error::Invalid(format!(
                        "{} logits of row [{b}, {}] hold NaN or infinity, or nothing finite",
                        side.name, rows[row]
                    )));
                }
                for (place, sum) in [(pass.single, sums.sum), (pass.square, sums.squares)] {
                    if let Some(place) = place {
                        of[place] = (sums.reference, sum);
                    }
                }
            }
            Ok((x, of))
        };
        for one in by_row(rows, 0, None, threads, || (), of_row) {
            let (x, of) = one?;
            found.x.push(x);
            found.sums.extend(of);
        }
        if let Some((temperature, first, mass)) = &mut mass {
            found.add_mass(*temperature, *first, mass, threads);
        }
        Ok(found)
    }

    /// Probabilities of the first so many rows, added to `mass`, each thread's share of the tokens in the order of the rows.
    fn add_mass(&self, temperature: f64, first: usize, mass: &mut [F], threads: usize) {
        let share = mass.len().div_ceil(threads.max(1)).max(1);
        let add = |from: usize, mass: &mut [F]| {
            for row in 0..first.min(self.len()) {
                let (reference, sum) = self.sum(row, temperature);
                let x = &self.x[row][from..from + mass.len()];
                let (scale, factor) = (F::of(1.0 / temperature), F::one() / sum);
                accumulate(x, reference, scale, factor, mass);
            }
        };
        std::thread::scope(|scope| {
            let mut shares = mass.chunks_mut(share).enumerate();
            let own = shares.next();
            for (i, mass) in shares {
                let add = &add;
                scope.spawn(move || add(i * share, mass));
            }
            if let Some((_, mass)) = own {
                add(0, mass);
            }
        });
    }

    pub(crate) fn len(&self) -> usize {
        self.x.len()
    }

    /// What exponentials are relative to, and their sum; NaN for a temperature that was not read.
    fn sum(&self, row: usize, temperature: f64) -> (F, F) {
        let place = self.temperatures.iter().position(|&t| t == temperature);
        let unread = (F::nan(), F::nan());
        place.map_or(unread, |p| self.sums[row * self.temperatures.len() + p])
    }

    /// `log p(j)`
    pub(crate) fn log_probability(&self, row: usize, temperature: f64, j: usize) -> F {
        let (reference, sum) = self.sum(row, temperature);
        (self.x[row][j] - reference) / F::of(temperature) - sum.ln()
    }

    /// `p(j)`
    pub(crate) fn probability(&self, row: usize, temperature: f64, j: usize) -> F {
        let (reference, sum) = self.sum(row, temperature);
        ((self.x[row][j] - reference) / F::of(temperature)).exp() / sum
    }

    /// Probabilities of some tokens in each row, `[rows, tokens]`.
    pub(crate) fn gather(&self, temperature: f64, tokens: &[usize]) -> Vec<F> {
        let of_row = |row| {
            tokens
                .iter()
                .map(move |&j| self.probability(row, temperature, j))
        };
        (0..self.len()).flat_map(of_row).collect()
    }

    /// All probabilities of a row, in place of what is in `out`.
    pub(crate) fn probabilities(&self, row: usize, temperature: f64, out: &mut Vec<F>) {
        out.clear();
        out.resize(self.x[row].len(), F::zero());
        self.add_probabilities(row, temperature, F::one(), out);
    }

    /// All probabilities of a row, added to `out` `factor` times.
    pub(crate) fn add_probabilities(&self, row: usize, temperature: f64, factor: F, out: &mut [F]) {
        let (reference, sum) = self.sum(row, temperature);
        accumulate(
            self.x[row],
            reference,
            F::of(1.0 / temperature),
            factor / sum,
            out,
        );
    }

    /// `sum_c factor_c p_c` over the temperatures of `factors`, added to `out` where `add`: what is dense in a gradient.
    pub(crate) fn combine(&self, row: usize, factors: &[(f64, F)], mut add: bool, out: &mut [F]) {
        let factor = |place: usize| -> F {
            let temperature = self.temperatures[place];
            let asked = factors.iter().filter(|(t, _)| *t == temperature);
            asked.map(|(_, f)| *f).sum::<F>() / self.sum(row, temperature).1
        };
        for pass in &self.passes {
            let of = |place: Option<usize>| place.map_or(F::zero(), factor);
            let (single, square) = (of(pass.single), of(pass.square));
            if add && single == F::zero() && square == F::zero() {
                continue;
            }
            let (reference, _) = self.sum(row, 1.0 / pass.scale);
            combine(
                self.x[row],
                reference,
                F::of(pass.scale),
                single,
                square,
                add,
                out,
            );
            add = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_temperature_and_its_half_share_a_pass() {
        let scales = |t: &[f64]| -> Vec<f64> { passes(t).iter().map(|p| p.scale).collect() };
        assert_eq!(scales(&[1.0, 2.0]), [0.5]);
        assert_eq!(scales(&[2.0, 1.0, 4.0]), [0.5, 0.25]);
        assert_eq!(scales(&[3.0, 1.0]), [1.0, 1.0 / 3.0]);
    }

    #[test]
    fn probabilities_and_their_combinations_agree_with_the_definition() {
        let logits: Vec<f64> = (0..3 * 40).map(|i| ((i * 37) % 23) as f64 * 0.3).collect();
        let labels = [0; 3];
        let side = Side::new("student", &logits, &labels, [1, 3, 40], 37).expect("fits");
        let mut mass = vec![0.0; 37];
        let rows = Rows::read(
            &side,
            0,
            &[0, 2],
            &[1.0, 2.0, 0.7],
            Some((2.0, 2, &mut mass)),
        );
        let rows = rows.expect("finite");
        let p = |s: usize, t: f64, j: usize| {
            let row = &logits[s * 40..][..37];
            (row[j] / t).exp() / row.iter().map(|x| (x / t).exp()).sum::<f64>()
        };
        let mut out = vec![0.5; 37];
        rows.combine(
            1,
            &[(1.0, 2.0), (0.7, -1.0), (2.0, 3.0), (1.0, 1.0)],
            true,
            &mut out,
        );
        for j in 0..37 {
            for t in [1.0, 2.0, 0.7] {
                assert!((rows.probability(1, t, j) - p(2, t, j)).abs() < 1e-14);
                assert!((rows.log_probability(0, t, j) - p(0, t, j).ln()).abs() < 1e-12);
            }
            assert!((mass[j] - p(0, 2.0, j) - p(2, 2.0, j)).abs() < 1e-14);
            let expected = 0.5 + 3.0 * p(2, 1.0, j) - p(2, 0.7, j) + 3.0 * p(2, 2.0, j);
            assert!((out[j] - expected).abs() < 1e-13);
        }
    }
}
