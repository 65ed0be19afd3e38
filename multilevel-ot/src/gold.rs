use std::sync::Arc;

use serde::Deserialize;

use crate::answer::{Answer, Pair};
use crate::bytes::Group;
use crate::chunks::{Part, Sequence};
use crate::loss::{Evaluation, Objective, aligner, mean_of_sequences};
use crate::rows::Rows;
use crate::sorted::Scratch;
use crate::{Error, Result, Scalar, Vocabulary};

/// Constants of [`Gold`].
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GoldSettings {
    /// Compares tokens that both vocabularies have by divergence, and sorts the others alone.
    pub hybrid: bool,
    /// The student's share in the mixture that the divergence is measured from: 0 is forward KL, 1 reverse.
    pub beta: f64,
    /// Weight of `ce`.
    pub ce_weight: f64,
    /// Weight of what is distilled.
    pub distillation_weight: f64,
    /// Weights of `jsd` and `uld` within that; by default the share of the teacher's tokens that are matched, and the rest.
    pub matched_weight: Option<f64>,
    /// See `matched_weight`; both or neither.
    pub unmatched_weight: Option<f64>,
    /// Temperature of the student's logits.
    pub student_temperature: f64,
    /// Temperature of the teacher's logits.
    pub teacher_temperature: f64,
}

impl Default for GoldSettings {
    fn default() -> Self {
        Self {
            hybrid: false,
            beta: 0.5,
            ce_weight: 0.0,
            distillation_weight: 1.0,
            matched_weight: None,
            unmatched_weight: None,
            student_temperature: 1.0,
            teacher_temperature: 1.0,
        }
    }
}

/// General Online Logit Distillation (GOLD, Hugging Face TRL): distances between what both sides expect of each group of
/// tokens that covers the same bytes. A group's distribution is that of its last token, times the probabilities of the tokens
/// before it ("bayesian"); on text that both cut alike this is ULD.
///
/// `total = ce_weight ce + distillation_weight (uld)`, or, hybrid, `... (matched_weight jsd + unmatched_weight uld)`: the
/// generalised Jensen-Shannon divergence over tokens that both vocabularies have, and the sorted distance over the others.
/// Means over a sequence's groups, and over sequences.
#[derive(Debug, Clone)]
pub struct Gold {
    settings: GoldSettings,
    matched: Arc<Matched>,
}

/// Tokens by whether both vocabularies have them.
#[derive(Debug, Default)]
struct Matched {
    /// The student's and the teacher's id.
    pairs: Vec<(usize, usize)>,
    /// The student's others.
    student: Vec<usize>,
    /// The teacher's others.
    teacher: Vec<usize>,
}

impl Gold {
    /// # Errors
    /// On constants outside their range, and hybrid without vocabularies (the student's and the teacher's).
    pub fn new(
        settings: GoldSettings,
        vocabularies: Option<(&Vocabulary, &Vocabulary)>,
    ) -> Result<Self> {
        if !(0.0..=1.0).contains(&settings.beta) {
            return Err(Error::Invalid(format!(
                "beta {} must be from 0 to 1",
                settings.beta
            )));
        }
        if settings.matched_weight.is_some() != settings.unmatched_weight.is_some() {
            return Err(Error::Invalid(
                "matched_weight and unmatched_weight go together".into(),
            ));
        }
        let matched = match (settings.hybrid, vocabularies) {
            (false, _) => Matched::default(),
            (true, Some((student, teacher))) => Matched::new(student, teacher),
            (true, None) => {
                return Err(Error::Invalid(
                    "hybrid needs the vocabularies of student and teacher".into(),
                ));
            }
        };
        Ok(Self {
            settings,
            matched: Arc::new(matched),
        })
    }

    /// Weights of `jsd` and `uld`.
    fn shares(&self) -> (f64, f64) {
        let s = &self.settings;
        match (s.hybrid, s.matched_weight, s.unmatched_weight) {
            (false, ..) => (0.0, 1.0),
            (true, Some(matched), Some(unmatched)) => (matched, unmatched),
            _ => {
                let (both, other) = (self.matched.pairs.len(), self.matched.teacher.len());
                let matched = both as f64 / (both + other).max(1) as f64;
                (matched, 1.0 - matched)
            }
        }
    }
}

impl Matched {
    fn new(student: &Vocabulary, teacher: &Vocabulary) -> Self {
        let mut matched = Self::default();
        let mut taken = vec![false; teacher.bytes.len()];
        for (id, other) in student.exact(teacher).into_iter().enumerate() {
            let free = |t: &u32| taken.get(*t as usize) == Some(&false);
            match other.filter(free) {
                Some(t) => {
                    taken[t as usize] = true;
                    matched.pairs.push((id, t as usize));
                }
                None => matched.student.push(id),
            }
        }
        matched.teacher = (0..taken.len()).filter(|&t| !taken[t]).collect();
        matched
    }

    fn check(&self, student: usize, teacher: usize) -> Result<()> {
        let (s, t) = (
            self.pairs.len() + self.student.len(),
            self.pairs.len() + self.teacher.len(),
        );
        match s <= student && t <= teacher {
            true => Ok(()),
            false => Err(Error::Shape {
                what: "vocabularies",
                expected: format!(
                    "at most {student} tokens of the student, {teacher} of the teacher, as logits have"
                ),
                found: format!("{s} and {t}"),
            }),
        }
    }
}

/// What a side expects of a group: probabilities after its last token but one, and how likely it was to get there.
struct Merged<F> {
    last: Vec<F>,
    before: F,
}

impl<F: Scalar> Merged<F> {
    fn new(
        rows: &Rows<'_, F>,
        answer: &Answer,
        range: std::ops::Range<usize>,
        temperature: f64,
    ) -> Self {
        let last = range.end - 1;
        let mut all = Vec::new();
        rows.probabilities(last, temperature, &mut all);
        let earlier = (range.start..last)
            .map(|row| rows.log_probability(row, temperature, answer.tokens[row]));
        Self {
            before: earlier.sum::<F>().exp(),
            last: all,
        }
    }

    fn at(&self, j: usize) -> F {
        self.before * self.last[j]
    }

    fn of(&self, tokens: &[usize]) -> Vec<F> {
        tokens.iter().map(|&j| self.at(j)).collect()
    }
}

/// Logarithm of a probability, next to nothing taken for nothing.
fn log<F: Scalar>(p: F) -> F {
    p.max(F::min_positive_value()).ln()
}

/// A token's term of the generalised divergence of `q` from `p`, and its slope in `q`.
fn divergence<F: Scalar>(p: F, q: F, beta: F) -> (F, F) {
    if beta == F::zero() {
        return (p * (log(p) - log(q)), -p / q.max(F::min_positive_value()));
    }
    if beta == F::one() {
        return (q * (log(q) - log(p)), log(q) - log(p) + F::one());
    }
    let rest = F::one() - beta;
    let mixed = log(beta * p + rest * q);
    let value = beta * p * (log(p) - mixed) + rest * q * (log(q) - mixed);
    (value, rest * (log(q) - mixed))
}

impl Objective for Gold {
    fn parts(&self) -> Vec<(&'static str, f64)> {
        let (matched, unmatched) = self.shares();
        let weight = self.settings.distillation_weight;
        let mut parts = vec![("ce", self.settings.ce_weight), ("uld", weight * unmatched)];
        if self.settings.hybrid {
            parts.push(("jsd", weight * matched));
        }
        parts
    }

    fn evaluate<F: Scalar>(
        &self,
        pair: &Pair<'_, F>,
        weights: &[f64],
        gradient: Option<&mut [F]>,
    ) -> Result<Evaluation> {
        let settings = &self.settings;
        let (hot, cold) = (settings.student_temperature, settings.teacher_temperature);
        self.matched.check(pair.student.vocab, pair.teacher.vocab)?;
        mean_of_sequences(pair, gradient, |b, share, mut gradient| {
            let s = Sequence::read(pair, b, hot, cold)?;
            let groups = s.groups(pair, b)?;
            let mut parts = vec![
                s.cross_entropy(weights[0] * share, gradient.as_deref_mut()),
                0.0,
            ];
            parts.resize(weights.len(), 0.0);
            let each = 1.0 / groups.len().max(1) as f64;
            let held = || (Scratch::default(), vec![F::zero(); pair.student.vocab]);
            let factor = |part: usize| F::of(weights[part] * share * each);
            let of_group = |held: &mut (Scratch<F>, Vec<F>),
                            group: &Group,
                            own: Option<Part<'_, F>>| {
                let (scratch, upstream) = held;
                let p = Merged::new(&s.teacher, &s.teacher_answer, group.teacher.clone(), cold);
                let q = Merged::new(&s.student, &s.answer, group.student.clone(), hot);
                let uld;
                let mut jsd = 0.0;
                if settings.hybrid {
                    upstream.fill(F::zero());
                    let (own, others) = (q.of(&self.matched.student), p.of(&self.matched.teacher));
                    let mut of_own = vec![F::zero(); own.len()];
                    uld = each * F::distance(&others, &own, scratch, &mut of_own).wide();
                    for (&j, &u) in self.matched.student.iter().zip(&of_own) {
                        upstream[j] = factor(1) * u;
                    }
                    for &(j, i) in &self.matched.pairs {
                        let (value, slope) = divergence(p.at(i), q.at(j), F::of(settings.beta));
                        jsd += each * value.wide();
                        upstream[j] = factor(2) * slope;
                    }
                } else {
                    let scaled =
                        |m: &Merged<F>| m.last.iter().map(|&x| x * m.before).collect::<Vec<F>>();
                    uld = each * F::distance(&scaled(&p), &scaled(&q), scratch, upstream).wide();
                    upstream.iter_mut().for_each(|u| *u = *u * factor(1));
                }
                let Some(mut own) = own else {
                    return (uld, jsd);
                };
                let last = group.student.end - 1;
                s.add_through(&mut own, last, hot, (&q.last, upstream), q.before);
                // The tokens before scale all of it.
                let of_before = q.before * crate::scalar::dot(&q.last, upstream);
                for row in group.student.start..last {
                    s.add_log(&mut own, row, hot, s.answer.tokens[row], of_before);
                }
                (uld, jsd)
            };
            for (uld, jsd) in s.by_group(&groups, gradient, held, of_group) {
                parts[1] += uld;
                if let Some(part) = parts.get_mut(2) {
                    *part += jsd;
                }
            }
            Ok(Evaluation {
                parts,
                notes: vec![("groups", groups.len() as f64)],
            })
        })
    }
}

aligner!(Gold, offsets: true, |_own, needs| { needs.whole_rows = true; });
