use serde::Deserialize;

use crate::answer::{Answer, Pair};
use crate::bytes::Group;
use crate::chunks::{Part, Sequence};
use crate::loss::{Evaluation, Objective, aligner, mean_of_sequences};
use crate::rows::Rows;
use crate::{Error, Result, Scalar};

/// Approximate Likelihood Matching (arXiv:2503.20083): cross entropy, and beside it the binary cross entropy (`alm`) between
/// what both sides give each group of tokens that covers the same bytes, each likelihood raised to `1 / temperature`.
///
/// `total = ce_weight ce + alm_weight alm`, each the mean over a sequence's tokens or groups, and over sequences.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Alm {
    /// Weight of `ce`.
    pub ce_weight: f64,
    /// Weight of `alm`.
    pub alm_weight: f64,
    /// What log likelihoods are divided by.
    pub temperature: f64,
    /// What is taken off them, so that none is 0.
    pub epsilon: f64,
}

impl Default for Alm {
    fn default() -> Self {
        Self {
            ce_weight: 1.0,
            alm_weight: 1.0,
            temperature: 100.0,
            epsilon: 1e-6,
        }
    }
}

/// Log likelihood of some of an answer's tokens.
fn likelihood<F: Scalar>(
    rows: &Rows<'_, F>,
    answer: &Answer,
    range: std::ops::Range<usize>,
) -> f64 {
    range
        .map(|row| rows.log_probability(row, 1.0, answer.tokens[row]).wide())
        .sum()
}

impl Objective for Alm {
    fn parts(&self) -> Vec<(&'static str, f64)> {
        vec![("ce", self.ce_weight), ("alm", self.alm_weight)]
    }

    fn evaluate<F: Scalar>(
        &self,
        pair: &Pair<'_, F>,
        weights: &[f64],
        gradient: Option<&mut [F]>,
    ) -> Result<Evaluation> {
        for (name, value) in [("temperature", self.temperature), ("epsilon", self.epsilon)] {
            if !(value > 0.0 && value.is_finite()) {
                return Err(Error::Invalid(format!(
                    "{name} {value} must be finite and above 0"
                )));
            }
        }
        mean_of_sequences(pair, gradient, |b, share, mut gradient| {
            let s = Sequence::read(pair, b, 1.0, 1.0)?;
            let groups = s.groups(pair, b)?;
            let ce = s.cross_entropy(weights[0] * share, gradient.as_deref_mut());
            let each = 1.0 / groups.len().max(1) as f64;
            let of_group = |(): &mut (), group: &Group, part: Option<Part<'_, F>>| {
                let scaled = |log: f64| log / self.temperature - self.epsilon;
                let a = scaled(likelihood(
                    &s.teacher,
                    &s.teacher_answer,
                    group.teacher.clone(),
                ));
                let c = scaled(likelihood(&s.student, &s.answer, group.student.clone()));
                // 1 - e^x, which cancels where the likelihood is near 1.
                let (other_a, other_c) = (-a.exp_m1(), -c.exp_m1());
                let slope = other_a * c.exp() / other_c - a.exp();
                let factor = F::of(weights[1] * share * each * slope / self.temperature);
                if let Some(mut part) = part {
                    for row in group.student.clone() {
                        s.add_log(&mut part, row, 1.0, s.answer.tokens[row], factor);
                    }
                }
                each * (a.exp() * c + other_a * other_c.ln())
            };
            let found = s.by_group(&groups, gradient, || (), of_group);
            let alm = found.into_iter().fold(0.0, |alm, of| alm - of);
            Ok(Evaluation {
                parts: vec![ce, alm],
                notes: vec![("groups", groups.len() as f64)],
            })
        })
    }
}

aligner!(Alm, offsets: true);
