//! The sampling transform: from logits to the distribution that tokens are drawn from.

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
        let best = argmax(inside)?;
        let max = f64::from(inside[best as usize]);
        if !max.is_finite() {
            return Err(Error::Invalid(format!("the largest logit is {max}")));
        }
        out.clear();
        out.resize(logits.len(), 0.0);
        if self.is_greedy() {
            out[best as usize] = 1.0;
            return Ok(());
        }
        for (p, &logit) in out.iter_mut().zip(inside) {
            *p = ((f64::from(logit) - max) / self.temperature).exp();
        }
        if self.top_k > 0 && self.top_k < inside.len() {
            keep_top_k(&mut out[..inside.len()], self.top_k);
        }
        if self.top_p < 1.0 {
            keep_top_p(out, self.top_p);
        }
        if self.min_p > 0.0 {
            // The largest weight is exactly 1 here.
            for p in out.iter_mut() {
                if *p < self.min_p {
                    *p = 0.0;
                }
            }
        }
        let sum: f64 = out.iter().sum();
        for p in out.iter_mut() {
            *p /= sum;
        }
        Ok(())
    }
}

/// The index of the largest value; ties go to the lowest.
///
/// # Errors
/// If a value is NaN, or there is none.
pub fn argmax(values: &[f32]) -> Result<u32> {
    let mut best = f32::NEG_INFINITY;
    let mut nan = false;
    for &v in values {
        nan |= v.is_nan();
        best = best.max(v);
    }
    if nan {
        return Err(Error::Invalid("the model returned NaN logits".into()));
    }
    match values.iter().position(|&v| v == best) {
        Some(i) => Ok(i as u32),
        None => Err(Error::Invalid("the model returned no logits".into())),
    }
}

/// Keeps the k largest; of those equal to the smallest kept, the lowest ids.
fn keep_top_k(p: &mut [f64], k: usize) {
    let mut values = p.to_vec();
    let (_, &mut threshold, _) = values.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
    let mut room = k - p.iter().filter(|&&v| v > threshold).count();
    for v in p.iter_mut() {
        if *v < threshold {
            *v = 0.0;
        } else if *v == threshold {
            if room == 0 {
                *v = 0.0;
            } else {
                room -= 1;
            }
        }
    }
}

/// Keeps the smallest set of largest weights that holds the share `share` of the mass, by partition, not by sorting.
fn keep_top_p(p: &mut [f64], share: f64) {
    let mut candidates: Vec<f64> = p.iter().copied().filter(|&v| v > 0.0).collect();
    let mut wanted = share * candidates.iter().sum::<f64>();
    // Invariant: everything above the candidates is kept and already subtracted from `wanted`.
    let (threshold, needed) = loop {
        let pivot = candidates[candidates.len() / 2];
        let above: f64 = candidates.iter().filter(|&&v| v > pivot).sum();
        let equal = candidates.iter().filter(|&&v| v == pivot).count();
        if above >= wanted {
            candidates.retain(|&v| v > pivot);
            continue;
        }
        let missing = wanted - above;
        if pivot * equal as f64 >= missing {
            let needed = ((missing / pivot).ceil() as usize).clamp(1, equal);
            break (pivot, needed);
        }
        let below: Vec<f64> = candidates.iter().copied().filter(|&v| v < pivot).collect();
        if below.is_empty() {
            break (pivot, equal); // rounding: the whole support
        }
        wanted = missing - pivot * equal as f64;
        candidates = below;
    };
    let mut room = needed;
    for v in p.iter_mut() {
        if *v < threshold {
            *v = 0.0;
        } else if *v == threshold {
            if room == 0 {
                *v = 0.0;
            } else {
                room -= 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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
