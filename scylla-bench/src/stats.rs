//! Numbers of a run: acceptance by depth, medians and spreads.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use scylla_core::engine::{Cycle, Output, Phases};
use serde::{Deserialize, Serialize};

/// Median, smallest and largest of repeated measurements.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// The middle value; of an even number, the mean of the middle two.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

/// Summarises measurements; `None` when there is none.
pub fn spread(values: &[f64]) -> Option<Spread> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (&min, &max) = (sorted.first()?, sorted.last()?);
    let n = sorted.len();
    let median = (sorted[(n - 1) / 2] + sorted[n / 2]) / 2.0;
    Some(Spread { median, min, max })
}

/// The middle value; 0 of none.
pub fn median(values: &[f64]) -> f64 {
    spread(values).map_or(0.0, |of| of.median)
}

/// A value and an interval that holds it with 95 % confidence.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// Of all that was measured.
    pub value: f64,
    /// The lower end.
    pub low: f64,
    /// The upper end.
    pub high: f64,
}

/// Resamples of a bootstrap.
const RESAMPLES: usize = 2000;

/// A statistic of `n` units (prompts), and the middle 95 % of its values over resamples of them, drawn with replacement:
/// the percentile bootstrap. The draws are the same every time. `None` without a unit, or where it has no value.
pub fn interval(n: usize, statistic: impl Fn(&[usize]) -> f64) -> Option<Interval> {
    if n == 0 {
        return None;
    }
    let value = statistic(&(0..n).collect::<Vec<_>>());
    let mut rng = StdRng::seed_from_u64(0);
    let mut resample = || -> Vec<usize> { (0..n).map(|_| rng.random_range(0..n)).collect() };
    let mut values: Vec<f64> = (0..RESAMPLES).map(|_| statistic(&resample())).collect();
    values.retain(|v| v.is_finite());
    values.sort_by(f64::total_cmp);
    let at = |share: f64| quantile(&values, share);
    let (low, high) = (at(0.025)?, at(0.975)?);
    value.is_finite().then_some(Interval { value, low, high })
}

/// The value below which a share of sorted ones lies, between the two nearest in proportion.
pub(crate) fn quantile(sorted: &[f64], share: f64) -> Option<f64> {
    let place = share * sorted.len().checked_sub(1)? as f64;
    let (low, high) = (
        sorted[place.floor() as usize],
        sorted[place.ceil() as usize],
    );
    Some(low + (high - low) * place.fract())
}

/// Median and upper quantiles of a time that users wait for.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Quantiles {
    /// Half are below it.
    pub median: f64,
    /// 95 % are below it.
    pub p95: f64,
    /// 99 % are below it.
    pub p99: f64,
}

/// Summarises times; `None` when there is none.
pub fn quantiles(values: &[f64]) -> Option<Quantiles> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    Some(Quantiles {
        median: quantile(&sorted, 0.5)?,
        p95: quantile(&sorted, 0.95)?,
        p99: quantile(&sorted, 0.99)?,
    })
}

/// Acceptance rate of each depth given that the depth above it was accepted; `None` where nothing was offered.
///
/// Offered means that the tree had a node that deep. Of a cycle that ended its sequence only the accepted depths
/// count: what was cut off was neither accepted nor rejected.
pub fn alpha<'a>(cycles: impl Iterator<Item = &'a Cycle>) -> Vec<Option<f64>> {
    let mut counts = AlphaCounts::default();
    cycles.for_each(|c| counts.add(c));
    counts.rates()
}

/// What [`alpha`] counts: how often each depth was offered, and how often accepted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AlphaCounts(Vec<(u64, u64)>);

impl AlphaCounts {
    /// Counts a cycle.
    pub fn add(&mut self, c: &Cycle) {
        if self.0.len() < c.depth {
            self.0.resize(c.depth, (0, 0));
        }
        for (depth, (tried, accepted)) in self.0.iter_mut().enumerate() {
            if c.accepted < depth || c.depth <= depth || (c.cut && c.accepted == depth) {
                break;
            }
            *tried += 1;
            *accepted += u64::from(c.accepted > depth);
        }
    }

    /// The rates.
    pub fn rates(&self) -> Vec<Option<f64>> {
        let rate =
            |&(tried, accepted): &(u64, u64)| (tried > 0).then(|| accepted as f64 / tried as f64);
        self.0.iter().map(rate).collect()
    }
}

/// Share of visits to a node of depth `d` (the root's 0) in which its child of rank `r` was the one accepted, of those
/// in which it had such a child. Cycles that ended their sequence count as in [`alpha`].
///
/// Where the tree hung on the draft's own probabilities, a rank was offered only when it looked promising, and its
/// rate is that of such cases.
pub fn alpha_by_rank<'a>(cycles: impl Iterator<Item = &'a Cycle>) -> Vec<Vec<f64>> {
    // By depth and rank: how often offered, how often accepted.
    let mut counts: Vec<Vec<(usize, usize)>> = Vec::new();
    for c in cycles {
        for (depth, &children) in c.offered.iter().enumerate() {
            let rank = c.ranks.get(depth).copied();
            if rank.is_none() && c.cut {
                continue;
            }
            if counts.len() <= depth {
                counts.resize(depth + 1, Vec::new());
            }
            let row = &mut counts[depth];
            row.resize(row.len().max(children), (0, 0));
            for (r, (offered, accepted)) in row.iter_mut().take(children).enumerate() {
                *offered += 1;
                *accepted += usize::from(rank == Some(r));
            }
        }
    }
    let rate = |(offered, accepted): (usize, usize)| accepted as f64 / offered as f64;
    let rates = counts.into_iter().map(|row| row.into_iter().map(rate));
    let mut rates: Vec<Vec<f64>> = rates.map(Iterator::collect).collect();
    while rates.last().is_some_and(Vec::is_empty) {
        rates.pop();
    }
    rates
}

/// Pearson's statistic and its degrees of freedom over cells (expected, seen) of `n` draws: those expected at least five
/// times, and all others as one cell, which joins the rarest where it is expected fewer times. `None` where that leaves a
/// single cell.
pub fn pearson(cells: impl Iterator<Item = (f64, f64)>, n: f64) -> Option<(f64, usize)> {
    let mut cells: Vec<(f64, f64)> = cells.filter(|(expected, _)| *expected >= 5.0).collect();
    let sums = |(e, s): (f64, f64), cell: &(f64, f64)| (e + cell.0, s + cell.1);
    let (expected, seen) = cells.iter().fold((0.0, 0.0), sums);
    let others = (n - expected, n - seen);
    let rarest = cells.iter_mut().min_by(|a, b| a.0.total_cmp(&b.0));
    match rarest {
        Some(rarest) if others.0 < 5.0 => *rarest = sums(*rarest, &others),
        _ => cells.push(others),
    }
    let term = |&(expected, seen): &(f64, f64)| (seen - expected).powi(2) / expected;
    (cells.len() > 1).then(|| (cells.iter().map(term).sum(), cells.len() - 1))
}

/// Probability that a chi-square variable with `degrees` degrees of freedom is at least `x`.
pub fn chi_square_tail(x: f64, degrees: usize) -> f64 {
    if x.is_nan() || degrees == 0 {
        return f64::NAN;
    }
    match x {
        _ if x <= 0.0 => 1.0,
        _ if x.is_infinite() => 0.0,
        _ => gamma_tail(degrees as f64 / 2.0, x / 2.0),
    }
}

/// The regularised upper incomplete gamma function Q(a, x): its series below a + 1, its continued fraction above.
fn gamma_tail(a: f64, x: f64) -> f64 {
    let front = (a * x.ln() - x - ln_gamma(a)).exp();
    if x < a + 1.0 {
        let (mut term, mut sum, mut n) = (1.0 / a, 1.0 / a, a);
        while term > sum * 1e-16 {
            n += 1.0;
            term *= x / n;
            sum += term;
        }
        return (1.0 - front * sum).clamp(0.0, 1.0);
    }
    // Lentz's method; no denominator vanishes for x > a.
    let mut b = x + 1.0 - a;
    let (mut c, mut d) = (1e300, 1.0 / b);
    let mut fraction = d;
    for i in 1..100_000 {
        let k = f64::from(i);
        let numerator = -k * (k - a);
        b += 2.0;
        d = 1.0 / (numerator * d + b);
        c = b + numerator / c;
        fraction *= c * d;
        if (c * d - 1.0).abs() < 1e-15 {
            break;
        }
    }
    (front * fraction).clamp(0.0, 1.0)
}

/// The logarithm of the gamma function, for positive values: Stirling's series after the recurrence has brought the
/// value above 15.
fn ln_gamma(mut x: f64) -> f64 {
    let mut shift = 0.0;
    while x < 15.0 {
        shift += x.ln();
        x += 1.0;
    }
    let square = x * x;
    let series = (1.0 / 12.0
        - (1.0 / 360.0 - (1.0 / 1260.0 - 1.0 / (1680.0 * square)) / square) / square)
        / x;
    (x - 0.5) * x.ln() - x + 0.5 * (2.0 * std::f64::consts::PI).ln() + series - shift
}

/// Sums over sequences.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Totals {
    /// New tokens, the first of each sequence included.
    pub tokens: usize,
    /// Tokens committed in cycles.
    pub decoded: usize,
    /// Cycles.
    pub cycles: usize,
    /// Nodes verified in them, roots included.
    pub nodes: usize,
    /// Tokens of prompts that were run.
    pub prompt_tokens: usize,
    /// Time.
    pub ms: Phases,
}

impl Totals {
    /// Adds a sequence.
    pub fn add(&mut self, output: &Output) {
        self.tokens += output.ids.len();
        self.prompt_tokens += output.prompt_tokens - output.reused_tokens;
        self.cycles += output.cycles.len();
        self.nodes += output.cycles.iter().map(|c| c.nodes).sum::<usize>();
        self.decoded += output.cycles.iter().map(|c| c.committed).sum::<usize>();
        self.ms.add(&output.ms);
    }

    /// Tokens of cycles over the time of cycles; the prefill and its token are apart.
    pub fn tokens_per_s(&self) -> Option<f64> {
        let ms = self.ms.decode();
        (self.decoded > 0 && ms > 0.0).then(|| self.decoded as f64 / ms * 1e3)
    }

    /// Prompt tokens over the time of the prefill.
    pub fn prefill_per_s(&self) -> Option<f64> {
        (self.ms.prefill > 0.0).then(|| self.prompt_tokens as f64 / self.ms.prefill * 1e3)
    }

    /// Mean tokens per cycle, bonus included.
    pub fn tau(&self) -> Option<f64> {
        (self.cycles > 0).then(|| self.decoded as f64 / self.cycles as f64)
    }

    /// Mean nodes per cycle, root included.
    pub fn nodes(&self) -> Option<f64> {
        (self.cycles > 0).then(|| self.nodes as f64 / self.cycles as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cycle(depth: usize, accepted: usize, cut: bool) -> Cycle {
        Cycle {
            nodes: depth + 1,
            depth,
            accepted,
            committed: accepted + 1,
            ranks: vec![0; accepted],
            offered: (0..=accepted).map(|d| usize::from(d < depth)).collect(),
            cut,
            step: 0,
        }
    }

    #[test]
    fn an_interval_over_units_is_the_same_every_time_and_as_wide_as_they_differ() {
        let values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0];
        let mean = |of: &[usize]| of.iter().map(|&i| values[i]).sum::<f64>() / of.len() as f64;
        let found = interval(values.len(), mean).expect("an interval");
        assert_eq!(Some(found), interval(values.len(), mean));
        assert_eq!(found.value, 4.5);
        // Standard error of the resampled mean: sqrt(5.25 / 8) = 0.81; 1.96 of them to each side, in steps of 1/8.
        assert!(
            (found.low - 2.9).abs() < 0.25 && (found.high - 6.1).abs() < 0.25,
            "{found:?}"
        );
        let same = interval(3, |_| 2.0).expect("an interval");
        assert_eq!((same.low, same.high), (2.0, 2.0));
        assert_eq!(interval(0, |_| 1.0), None);
        assert_eq!(quantiles(&[3.0, 1.0, 2.0]).map(|q| q.median), Some(2.0));
        assert_eq!(quantiles(&[]), None);
    }

    #[test]
    fn acceptance_by_rank_counts_the_visits_that_offered_the_rank() {
        let visit = |offered: &[usize], ranks: &[usize], cut| Cycle {
            offered: offered.to_vec(),
            ranks: ranks.to_vec(),
            ..cycle(2, ranks.len(), cut)
        };
        let cycles = [
            visit(&[3, 2, 0], &[0, 1], false),
            visit(&[3, 0], &[2], false),
            visit(&[1], &[], false),
            visit(&[2], &[], true), // cut off: nothing was tried to the end
        ];
        let found = alpha_by_rank(cycles.iter());
        assert_eq!(found, [vec![1.0 / 3.0, 0.0, 0.5], vec![0.0, 1.0]]);
        assert!(alpha_by_rank([cycle(0, 0, false)].iter()).is_empty());
    }

    #[test]
    fn tails_of_chi_square_agree_with_closed_forms_and_tables() {
        // Two degrees: exp(-x/2). Four: (1 + x/2) exp(-x/2).
        for x in [0.1f64, 1.0, 3.0, 10.0, 50.0] {
            let half = x / 2.0;
            assert!((chi_square_tail(x, 2) - (-half).exp()).abs() < 1e-13);
            assert!((chi_square_tail(x, 4) - (1.0 + half) * (-half).exp()).abs() < 1e-13);
        }
        // 99.9 % points from tables.
        for (degrees, x) in [(1, 10.828), (10, 29.588), (100, 149.449)] {
            let tail = chi_square_tail(x, degrees);
            assert!((tail - 0.001).abs() < 2e-6, "{degrees}: {tail}");
        }
        assert_eq!(
            (chi_square_tail(0.0, 3), chi_square_tail(f64::INFINITY, 3)),
            (1.0, 0.0)
        );
    }

    #[test]
    fn medians_of_even_and_odd_counts() {
        let s = spread(&[3.0, 1.0, 2.0]).expect("some");
        assert_eq!((s.median, s.min, s.max), (2.0, 1.0, 3.0));
        assert_eq!(spread(&[1.0, 2.0]).expect("some").median, 1.5);
        assert_eq!(spread(&[]), None);
    }

    #[test]
    fn alpha_is_conditional_on_the_depth_above() {
        let cycles = [
            cycle(2, 2, false),
            cycle(2, 0, false),
            cycle(2, 1, false),
            cycle(1, 1, false),
            cycle(0, 0, false),
        ];
        let a = alpha(cycles.iter());
        assert_eq!(a, [Some(3.0 / 4.0), Some(1.0 / 2.0)]);
    }

    #[test]
    fn what_a_cut_cycle_never_tried_does_not_count() {
        let cycles = [cycle(2, 2, false), cycle(2, 1, true)];
        assert_eq!(alpha(cycles.iter()), [Some(1.0), Some(1.0)]);
    }
}
