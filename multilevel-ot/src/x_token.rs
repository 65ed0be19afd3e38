use std::sync::Arc;

use serde::Deserialize;

use crate::answer::Pair;
use crate::bytes::Group;
use crate::chunks::{Part, Sequence};
use crate::loss::{Evaluation, Objective, aligner, mean_of_sequences};
use crate::sorted::Scratch;
use crate::top::heaviest;
use crate::{Error, Projection, Result, Scalar};

/// Which of X-Token's two losses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub enum XTokenLoss {
    /// Divergence from the student's distribution projected on the teacher's tokens.
    #[default]
    #[serde(rename = "p-kl")]
    PKl,
    /// Divergence over tokens that the projection pairs, sorted distance over the others.
    #[serde(rename = "h-kl")]
    HKl,
}

/// Constants of [`XToken`].
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct XTokenSettings {
    /// Which loss.
    pub loss: XTokenLoss,
    /// Weight of `ce`.
    pub ce_weight: f64,
    /// Weight of what is distilled.
    pub distillation_weight: f64,
    /// Temperature of both sides; what is distilled is multiplied by its square.
    pub temperature: f64,
    /// How many of the teacher's tokens a sequence is compared on (P-KL): those with the largest logits.
    pub topk: usize,
    /// Least weight of a token's heaviest entry that makes a pair (H-KL).
    pub common: f64,
}

impl Default for XTokenSettings {
    fn default() -> Self {
        Self {
            loss: XTokenLoss::PKl,
            ce_weight: 1.0,
            distillation_weight: 1.0,
            temperature: 1.0,
            topk: 8192,
            common: 0.6,
        }
    }
}

/// X-Token (arXiv:2605.21699): the student's probabilities carried to the teacher's tokens by a sparse projection, and the
/// divergence of the teacher's from them over each group of tokens that covers the same bytes.
///
/// `total = ce_weight ce + distillation_weight (p_kl)` or `... (h_kl + uld)`. A group's distribution is the mean over the rows
/// that predict its tokens: of probabilities on the student's side of P-KL, of their logarithms elsewhere. Means over a
/// sequence's groups, and over sequences. The formulas are those of the authors' released code, without its scaling of one
/// loss by the other.
#[derive(Debug, Clone)]
pub struct XToken {
    settings: XTokenSettings,
    projection: Arc<Projection>,
    /// The student's and the teacher's ids of common tokens.
    pairs: Arc<Vec<(usize, usize)>>,
}

impl XToken {
    /// With a projection of the student's tokens on the teacher's.
    ///
    /// # Errors
    /// On constants outside their range.
    pub fn new(settings: XTokenSettings, projection: Projection) -> Result<Self> {
        if !(settings.temperature > 0.0 && settings.temperature.is_finite()) || settings.topk == 0 {
            return Err(Error::Invalid(format!(
                "temperature {} must be finite and above 0, topk {} at least 1",
                settings.temperature, settings.topk
            )));
        }
        // One student's token for each of the teacher's: the heaviest, of equal ones the first.
        let mut best: std::collections::BTreeMap<u32, (f32, usize)> = Default::default();
        for s in 0..projection.len() {
            let entries = projection.get(s).iter();
            let heaviest = entries.fold(None, |best: Option<(u32, f32)>, &(t, w)| match best {
                Some((_, most)) if most >= w => best,
                _ => Some((t, w)),
            });
            let Some((t, w)) = heaviest.filter(|(_, w)| f64::from(*w) >= settings.common) else {
                continue;
            };
            let known = best.entry(t).or_insert((w, s));
            if w > known.0 {
                *known = (w, s);
            }
        }
        let pairs = best
            .into_iter()
            .map(|(t, (_, s))| (s, t as usize))
            .collect();
        Ok(Self {
            settings,
            projection: Arc::new(projection),
            pairs: Arc::new(pairs),
        })
    }

    /// P-KL of one group on the teacher's `tokens`, whose places are in `place`; `upstream` gets the gradient with respect to
    /// the mean of the student's probabilities.
    fn p_kl<F: Scalar>(
        &self,
        s: &Sequence<'_, F>,
        group: &Group,
        tokens: &[usize],
        place: &[u32],
        upstream: &mut [F],
    ) -> F {
        let temperature = self.settings.temperature;
        let count = F::of(group.student.len() as f64);
        let mut mean = vec![F::zero(); upstream.len()];
        for row in group.student.clone() {
            s.student
                .add_probabilities(row, temperature, F::one() / count, &mut mean);
        }
        let mut projected = vec![F::zero(); tokens.len()];
        let entries = |token: usize| {
            let known = self.projection.get(token).iter();
            known
                .filter_map(|&(t, w)| Some((*place.get(t as usize)? as usize, F::of(f64::from(w)))))
        };
        let entries = |token: usize| entries(token).filter(|(at, _)| *at < tokens.len());
        for (token, &q) in mean.iter().enumerate() {
            for (at, w) in entries(token) {
                projected[at] = projected[at] + w * q;
            }
        }
        // The teacher's softmax is over these tokens alone.
        let mut logs = vec![F::zero(); tokens.len()];
        let rows = F::of(group.teacher.len() as f64);
        for row in group.teacher.clone() {
            let all: Vec<F> = tokens
                .iter()
                .map(|&j| s.teacher.log_probability(row, temperature, j))
                .collect();
            let max = all.iter().copied().fold(F::neg_infinity(), F::max);
            let total = max + all.iter().map(|&l| (l - max).exp()).sum::<F>().ln();
            for (log, l) in logs.iter_mut().zip(all) {
                *log = *log + (l - total) / rows;
            }
        }
        // The student's mass on these tokens is made 1; a token that no other is spread over keeps the least share there is.
        let total: F = projected.iter().copied().sum();
        let least = F::of(1e-10);
        let (mut value, mut along) = (F::zero(), F::zero());
        let mut slopes = Vec::with_capacity(tokens.len());
        for (&log, &r) in logs.iter().zip(&projected) {
            let (p, q) = (log.exp(), r / total);
            if p > F::zero() {
                value = value + p * (log - (q + least).ln());
            }
            let slope = -p / (q + least);
            along = along + slope * q;
            slopes.push(slope);
        }
        slopes
            .iter_mut()
            .for_each(|slope| *slope = (*slope - along) / total);
        for (token, out) in upstream.iter_mut().enumerate() {
            *out = entries(token).map(|(at, w)| w * slopes[at]).sum();
        }
        value
    }
}

impl Objective for XToken {
    fn parts(&self) -> Vec<(&'static str, f64)> {
        let s = &self.settings;
        let weight = s.distillation_weight * s.temperature * s.temperature;
        match s.loss {
            XTokenLoss::PKl => vec![("ce", s.ce_weight), ("p_kl", weight)],
            XTokenLoss::HKl => vec![("ce", s.ce_weight), ("h_kl", weight), ("uld", weight)],
        }
    }

    fn evaluate<F: Scalar>(
        &self,
        pair: &Pair<'_, F>,
        weights: &[f64],
        gradient: Option<&mut [F]>,
    ) -> Result<Evaluation> {
        let (own, others) = (pair.student.vocab, pair.teacher.vocab);
        let reach = (0..self.projection.len())
            .flat_map(|s| self.projection.get(s))
            .map(|(t, _)| *t)
            .max();
        if self.projection.len() > own || reach.is_some_and(|t| t as usize >= others) {
            return Err(Error::Shape {
                what: "projection",
                expected: format!("from {own} tokens to {others}, as logits have"),
                found: format!(
                    "from {} to {:?}",
                    self.projection.len(),
                    reach.map(|t| t + 1)
                ),
            });
        }
        let temperature = self.settings.temperature;
        mean_of_sequences(pair, gradient, |b, share, mut gradient| {
            let s = Sequence::read(pair, b, temperature, temperature)?;
            let groups = s.groups(pair, b)?;
            let mut parts = vec![0.0; weights.len()];
            parts[0] = s.cross_entropy(weights[0] * share, gradient.as_deref_mut());
            let each = 1.0 / groups.len().max(1) as f64;
            let factor = |part: usize| F::of(weights[part] * share * each);
            match self.settings.loss {
                XTokenLoss::PKl => {
                    let mut largest = vec![F::neg_infinity(); others];
                    for row in &s.teacher.x {
                        largest
                            .iter_mut()
                            .zip(*row)
                            .for_each(|(l, &x)| *l = l.max(x));
                    }
                    let tokens = heaviest(&largest, self.settings.topk.min(others));
                    let mut place = vec![u32::MAX; others];
                    tokens
                        .iter()
                        .enumerate()
                        .for_each(|(at, &t)| place[t] = at as u32);
                    let held = || (Vec::new(), vec![F::zero(); own]);
                    let of_group = |held: &mut (Vec<F>, Vec<F>),
                                    group: &Group,
                                    part: Option<Part<'_, F>>| {
                        let (q, upstream) = held;
                        let kl = self.p_kl(&s, group, &tokens, &place, upstream).wide();
                        if let Some(mut part) = part {
                            let factor = factor(1) / F::of(group.student.len() as f64);
                            for row in group.student.clone() {
                                s.student.probabilities(row, temperature, q);
                                s.add_through(&mut part, row, temperature, (q, upstream), factor);
                            }
                        }
                        kl
                    };
                    for kl in s.by_group(&groups, gradient, held, of_group) {
                        parts[1] += each * kl;
                    }
                }
                XTokenLoss::HKl => {
                    let uncommon = Uncommon::new(&self.pairs, own, others);
                    let of_group = |(): &mut (), group: &Group, part: Option<Part<'_, F>>| {
                        let (kl, uld, logs) =
                            self.h_kl(&s, group, &uncommon, factor(1), factor(2), own);
                        let Some(mut part) = part else {
                            return (kl, uld);
                        };
                        // The gradient of sum_j h_j log q_j of each row.
                        let slope = F::one() / F::of(group.student.len() as f64 * temperature);
                        let sum: F = logs.iter().copied().sum();
                        for row in group.student.clone() {
                            let out = s.out(&mut part, row);
                            s.student
                                .add_probabilities(row, temperature, -slope * sum, out);
                            out.iter_mut()
                                .zip(&logs)
                                .for_each(|(o, &h)| *o = *o + slope * h);
                        }
                        (kl, uld)
                    };
                    for (kl, uld) in s.by_group(&groups, gradient, || (), of_group) {
                        parts[1] += each * kl;
                        parts[2] += each * uld;
                    }
                }
            }
            Ok(Evaluation {
                parts,
                notes: vec![("groups", groups.len() as f64)],
            })
        })
    }
}

/// Tokens without a partner.
struct Uncommon {
    student: Vec<usize>,
    teacher: Vec<usize>,
}

impl Uncommon {
    fn new(pairs: &[(usize, usize)], own: usize, others: usize) -> Self {
        let free = |n: usize, taken: &dyn Fn(&(usize, usize)) -> usize| -> Vec<usize> {
            let mut free = vec![true; n];
            pairs.iter().for_each(|pair| free[taken(pair)] = false);
            (0..n).filter(|&i| free[i]).collect()
        };
        Self {
            student: free(own, &|pair| pair.0),
            teacher: free(others, &|pair| pair.1),
        }
    }
}

impl XToken {
    /// H-KL of one group: its two terms, and the weighted gradient with respect to the means of the student's logarithms.
    fn h_kl<F: Scalar>(
        &self,
        s: &Sequence<'_, F>,
        group: &Group,
        uncommon: &Uncommon,
        kl_factor: F,
        uld_factor: F,
        own: usize,
    ) -> (f64, f64, Vec<F>) {
        let temperature = self.settings.temperature;
        let q = |j: usize| -> F {
            let logs = group
                .student
                .clone()
                .map(|row| s.student.log_probability(row, temperature, j));
            logs.sum::<F>() / F::of(group.student.len() as f64)
        };
        let p = |i: usize| -> F {
            let logs = group
                .teacher
                .clone()
                .map(|row| s.teacher.log_probability(row, temperature, i));
            logs.sum::<F>() / F::of(group.teacher.len() as f64)
        };
        let mut logs = vec![F::zero(); own];
        let mut kl = F::zero();
        for &(j, i) in self.pairs.iter() {
            let log = p(i);
            let expected = log.exp();
            if expected > F::zero() {
                kl = kl + expected * (log - q(j));
                logs[j] = -kl_factor * expected;
            }
        }
        let student: Vec<F> = uncommon.student.iter().map(|&j| q(j).exp()).collect();
        let teacher: Vec<F> = uncommon.teacher.iter().map(|&i| p(i).exp()).collect();
        let mut upstream = vec![F::zero(); student.len()];
        let uld = F::distance(&teacher, &student, &mut Scratch::default(), &mut upstream);
        for ((&j, &q), &u) in uncommon.student.iter().zip(&student).zip(&upstream) {
            logs[j] = uld_factor * u * q;
        }
        (kl.wide(), uld.wide(), logs)
    }
}

aligner!(XToken, offsets: true, |_own, needs| { needs.whole_rows = true; });
