//! The sampling transform: from logits to the distribution that tokens are drawn from.

use std::cmp::Ordering;

use crate::kernels::probability;
use crate::{Error, Result};

/// How tokens are sampled. The same transform is applied to the target's p and to a draft's q.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sampling {
    /// 0 means greedy.
    pub temperature: f64,
    /// Keeps the k most probable tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the smallest set of most probable tokens that holds this mass.
    pub top_p: f64,
    /// Drops tokens below this share of the most probable one.
    pub min_p: f64,
    /// Divides positive (multiplies negative) logits of tokens that occurred; 1 does nothing.
    pub repetition_penalty: f64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
        }
    }
}

impl Sampling {
    /// Whether the law is a point mass on the largest logit.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// Checks the ranges.
    pub fn check(&self) -> Result<()> {
        let checks = [
            (
                self.temperature >= 0.0 && self.temperature.is_finite(),
                "temperature",
                self.temperature,
                "at least 0",
            ),
            (
                self.top_p > 0.0 && self.top_p <= 1.0,
                "top_p",
                self.top_p,
                "above 0 and at most 1",
            ),
            (
                (0.0..=1.0).contains(&self.min_p),
                "min_p",
                self.min_p,
                "from 0 to 1",
            ),
            (
                self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite(),
                "repetition_penalty",
                self.repetition_penalty,
                "above 0",
            ),
        ];
        match checks.iter().find(|c| !c.0) {
            Some((_, name, value, range)) => Err(Error::Invalid(format!(
                "{name} is {value}; it must be {range}"
            ))),
            None => Ok(()),
        }
    }

    /// Applies the repetition penalty for the tokens of `context` to `logits`.
    pub fn penalise(&self, logits: &mut [f32], context: impl Iterator<Item = u32>) {
        if self.repetition_penalty == 1.0 {
            return;
        }
        let mut seen: Vec<u32> = context.collect();
        seen.sort_unstable();
        seen.dedup();
        let penalty = self.repetition_penalty as f32;
        for token in seen {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = if *logit > 0.0 {
                    *logit / penalty
                } else {
                    *logit * penalty
                };
            }
        }
    }

    /// Writes the distribution of (penalised) `logits` to `out`, f64 `[V]`: temperature, top-k, top-p, min-p, in
    /// that order, ties to the lowest id. Tokens from `limit` on (padding of the vocabulary) get no mass.
    ///
    /// # Errors
    /// If a logit is NaN or +infinite, or all are -infinite.
    pub fn distribution(&self, logits: &[f32], limit: usize, out: &mut Vec<f64>) -> Result<()> {
        let inside = &logits[..limit.min(logits.len())];
        if self.is_greedy() {
            let best = argmax(inside)? as usize;
            out.clear();
            out.resize(logits.len(), 0.0);
            out[best] = 1.0;
            return Ok(());
        }
        let max = finite(best_of(inside)?)?;
        out.resize(logits.len(), 0.0);
        let (row, padding) = out.split_at_mut(inside.len());
        padding.fill(0.0);
        let scale = self.temperature.recip().min(1e300);
        let sum = probability::exponentials(inside, max, scale, row);
        let top_k = (self.top_k > 0 && self.top_k < row.len()).then_some(self.top_k);
        if top_k.is_none() && self.top_p >= 1.0 && self.min_p <= 0.0 {
            probability::scale(row, 1.0 / sum);
            return Ok(());
        }
        // The largest weight is exactly 1 here.
        let mut kept = match top_k {
            Some(k) => largest(row, k),
            None => at_least(row, self.least_kept(sum, row.len())),
        };
        if self.top_p < 1.0 {
            let total = top_k.map_or(sum, |_| mass(&kept));
            kept = nucleus(kept, self.top_p * total);
        }
        kept.retain(|&(weight, _)| weight >= self.min_p);
        let sum = mass(&kept);
        row.fill(0.0);
        for (weight, place) in kept {
            row[place] = weight / sum;
        }
        Ok(())
    }

    /// A weight below which top-p and min-p keep none, of `n` weights with sum `sum`: all below the first bound
    /// together hold less than what top-p may drop.
    fn least_kept(&self, sum: f64, n: usize) -> f64 {
        let by_mass = (1.0 - self.top_p) * sum / n as f64 * (1.0 - 1e-9);
        by_mass.max(self.min_p).max(f64::MIN_POSITIVE)
    }
}

/// The largest logit, checked to be a number.
fn best_of(values: &[f32]) -> Result<f32> {
    let best = probability::largest(values);
    if best.is_nan() {
        return Err(Error::Invalid("the model returned NaN logits".into()));
    }
    match values.is_empty() {
        true => Err(Error::Invalid("the model returned no logits".into())),
        false => Ok(best),
    }
}

fn finite(max: f32) -> Result<f64> {
    match max.is_finite() {
        true => Ok(f64::from(max)),
        false => Err(Error::Invalid(format!("the largest logit is {max}"))),
    }
}

/// The index of the largest value; ties go to the lowest.
///
/// # Errors
/// If a value is NaN, the largest is not finite, or there is none: as [`Sampling::distribution`] refuses them.
pub fn argmax(values: &[f32]) -> Result<u32> {
    let best = best_of(values)?;
    finite(best)?;
    let mut at = 0;
    // A block at a time: comparing a whole block without branches is many times faster than stopping early.
    for block in values.chunks(256) {
        if block.iter().fold(false, |found, &v| found | (v == best)) {
            at += block.iter().position(|&v| v == best).unwrap_or(0);
            break;
        }
        at += block.len();
    }
    Ok(at as u32)
}

/// The `k` most probable of the first `limit` tokens with their log-probabilities (temperature 1), the most probable
/// first; ties go to the lowest id. To about 1e-6: for choosing among tokens, not for drawing them.
///
/// # Errors
/// If a logit is NaN or +infinite, or all are -infinite.
pub fn top_log_probabilities(logits: &[f32], limit: usize, k: usize) -> Result<Vec<(usize, f64)>> {
    let inside = &logits[..limit.min(logits.len())];
    let best = best_of(inside)?;
    let log_sum = finite(best)? + probability::log_sum(inside, best);
    let mut top = match k {
        0 => Vec::new(),
        k if k < inside.len() => largest(inside, k),
        _ => at_least(inside, f32::NEG_INFINITY),
    };
    top.sort_unstable_by(falling);
    let log = |(logit, i)| (i, f64::from(logit) - log_sum);
    Ok(top.into_iter().map(log).collect())
}

/// A weight, or a logit, and its place.
type Placed<T = f64> = (T, usize);

/// The larger first, of equal ones the lower place; neither is NaN.
fn falling<T: PartialOrd>(a: &Placed<T>, b: &Placed<T>) -> Ordering {
    let values = b.0.partial_cmp(&a.0).unwrap_or(Ordering::Equal);
    values.then(a.1.cmp(&b.1))
}

fn mass(weights: &[Placed]) -> f64 {
    weights.iter().map(|w| w.0).sum()
}

/// Values at least `threshold`, in order.
fn at_least<T: Copy + PartialOrd>(p: &[T], threshold: T) -> Vec<Placed<T>> {
    let mut found = Vec::new();
    for (b, block) in p.chunks(64).enumerate() {
        // Without a branch per value: in most blocks there is none.
        if block.iter().fold(false, |any, &v| any | (v >= threshold)) {
            let places = block.iter().enumerate().filter(|(_, v)| **v >= threshold);
            found.extend(places.map(|(i, &v)| (v, b * 64 + i)));
        }
    }
    found
}

/// The k largest, `0 < k < len`; of those equal to the smallest kept, the lowest ids.
fn largest<T: Copy + PartialOrd>(p: &[T], k: usize) -> Vec<Placed<T>> {
    // The k-th largest of the maxima of disjoint pieces is at most the k-th largest of all.
    let piece = (p.len() / (4 * k)).max(1);
    let larger = |a: T, b: T| if b > a { b } else { a };
    let maximum = |piece: &[T]| {
        // Sixteen at a time: one chain of comparisons waits for each.
        let mut lanes = [piece[0]; 16];
        let (tiles, rest) = piece.as_chunks::<16>();
        for tile in tiles {
            for (lane, &v) in lanes.iter_mut().zip(tile) {
                *lane = larger(*lane, v);
            }
        }
        let all = lanes.iter().chain(rest).copied();
        (all.fold(piece[0], larger), 0)
    };
    let mut maxima: Vec<Placed<T>> = p.chunks(piece).map(maximum).collect();
    let (_, &mut (bound, _), _) = maxima.select_nth_unstable_by(k - 1, falling);
    let mut found = at_least(p, bound);
    if found.len() > k {
        found.select_nth_unstable_by(k - 1, falling);
        found.truncate(k);
        found.sort_unstable_by_key(|w| w.1);
    }
    found
}

/// The smallest set of largest weights that holds `wanted`, by partition, not by sorting; of equal ones the lowest
/// ids. `left` is in order of places.
fn nucleus(mut left: Vec<Placed>, mut wanted: f64) -> Vec<Placed> {
    let mut kept: Vec<Placed> = Vec::new();
    // Invariant: what is kept stands above all of `left` and was subtracted from `wanted`.
    while !left.is_empty() {
        let pivot = left[left.len() / 2].0;
        let above: f64 = left.iter().map(|c| c.0).filter(|&v| v > pivot).sum();
        if above >= wanted {
            left.retain(|c| c.0 > pivot);
            continue;
        }
        let missing = wanted - above;
        let equal = left.iter().filter(|c| c.0 == pivot).count();
        kept.extend(left.iter().filter(|c| c.0 > pivot));
        if pivot * equal as f64 >= missing {
            let needed = ((missing / pivot).ceil() as usize).clamp(1, equal);
            kept.extend(left.iter().filter(|c| c.0 == pivot).take(needed));
            break;
        }
        kept.extend(left.iter().filter(|c| c.0 == pivot));
        wanted = missing - pivot * equal as f64;
        left.retain(|c| c.0 < pivot);
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_most_probable_come_first_with_their_log_probabilities(
            logits in prop::collection::vec((-6i8..6).prop_map(f32::from), 1..300), limit in 1usize..300, k in 0usize..20,
        ) {
            let found = top_log_probabilities(&logits, limit, k).expect("top");
            let inside = &logits[..limit.min(logits.len())];
            let sum: f64 = inside.iter().map(|&v| f64::from(v).exp()).sum();
            let mut order: Vec<usize> = (0..inside.len()).collect();
            order.sort_by(|&a, &b| inside[b].total_cmp(&inside[a]).then(a.cmp(&b)));
            order.truncate(k);
            prop_assert_eq!(found.iter().map(|f| f.0).collect::<Vec<_>>(), order);
            for (i, log) in found {
                prop_assert!((log - (f64::from(inside[i]) - sum.ln())).abs() < 1e-6 && log <= 0.0);
            }
        }
    }

    /// The transform by sorting, for comparison.
    fn by_sorting(s: &Sampling, logits: &[f32]) -> Vec<f64> {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        let max = f64::from(logits[order[0]]);
        let weight = |i: usize| ((f64::from(logits[i]) - max) / s.temperature).exp();
        let k = if s.top_k == 0 {
            logits.len()
        } else {
            s.top_k.min(logits.len())
        };
        order.truncate(k);
        let mass: f64 = order.iter().map(|&i| weight(i)).sum();
        let mut kept = Vec::new();
        let mut sum = 0.0;
        for &i in &order {
            if sum >= s.top_p * mass && !kept.is_empty() {
                break;
            }
            sum += weight(i);
            kept.push(i);
        }
        kept.retain(|&i| weight(i) >= s.min_p);
        let sum: f64 = kept.iter().map(|&i| weight(i)).sum();
        let mut out = vec![0.0; logits.len()];
        for i in kept {
            out[i] = weight(i) / sum;
        }
        out
    }

    proptest! {
        #[test]
        fn selection_equals_sorting(
            raw in prop::collection::vec(-20i32..20, 1..60),
            temperature in 0.1f64..3.0, top_k in 0usize..20, top_p in 0.01f64..1.0, min_p in 0.0f64..0.5,
        ) {
            // A coarse grid makes ties frequent.
            let logits: Vec<f32> = raw.iter().map(|&v| v as f32 * 0.5).collect();
            let s = Sampling { temperature, top_k, top_p, min_p, ..Default::default() };
            let mut out = Vec::new();
            s.distribution(&logits, logits.len(), &mut out).expect("distribution");
            let expected = by_sorting(&s, &logits);
            for (i, (a, b)) in out.iter().zip(&expected).enumerate() {
                prop_assert!((a - b).abs() < 1e-12, "{i}: {a} for {b}");
            }
            prop_assert!((out.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        }
    }

    #[test]
    fn padded_rows_get_no_mass() {
        let mut out = Vec::new();
        for temperature in [0.0, 1.0] {
            let s = Sampling {
                temperature,
                ..Default::default()
            };
            s.distribution(&[1.0, 2.0, 9.0], 2, &mut out)
                .expect("distribution");
            assert_eq!(out.len(), 3);
            assert_eq!(out[2], 0.0);
            assert!(out[1] > 0.7);
        }
    }

    #[test]
    fn greedy_takes_the_lowest_of_equal_logits() {
        let mut out = Vec::new();
        Sampling::default()
            .distribution(&[1.0, 5.0, 5.0], 3, &mut out)
            .expect("distribution");
        assert_eq!(out, [0.0, 1.0, 0.0]);
    }

    #[test]
    fn broken_logits_are_an_error_not_a_bias() {
        let mut out = Vec::new();
        let s = Sampling {
            temperature: 1.0,
            ..Default::default()
        };
        for bad in [
            &[0.0, f32::NAN][..],
            &[0.0, f32::INFINITY],
            &[f32::NEG_INFINITY; 2],
            &[],
        ] {
            assert!(s.distribution(bad, bad.len(), &mut out).is_err());
        }
        assert!(
            s.distribution(&[f32::NEG_INFINITY, 0.0], 2, &mut out)
                .is_ok()
        );
    }

    #[test]
    fn the_penalty_is_applied_once_per_distinct_token() {
        let s = Sampling {
            repetition_penalty: 2.0,
            ..Default::default()
        };
        let mut logits = [4.0, -4.0, 1.0];
        s.penalise(&mut logits, [0, 0, 1, 7].into_iter());
        assert_eq!(logits, [2.0, -8.0, 1.0]);
    }

    #[test]
    fn settings_outside_their_range_are_named() {
        for (s, word) in [
            (
                Sampling {
                    temperature: -1.0,
                    ..Default::default()
                },
                "temperature",
            ),
            (
                Sampling {
                    temperature: f64::NAN,
                    ..Default::default()
                },
                "temperature",
            ),
            (
                Sampling {
                    top_p: 0.0,
                    ..Default::default()
                },
                "top_p",
            ),
            (
                Sampling {
                    min_p: 2.0,
                    ..Default::default()
                },
                "min_p",
            ),
            (
                Sampling {
                    repetition_penalty: 0.0,
                    ..Default::default()
                },
                "repetition_penalty",
            ),
        ] {
            assert!(s.check().expect_err(word).to_string().contains(word));
        }
        assert!(Sampling::default().check().is_ok());
    }
}
