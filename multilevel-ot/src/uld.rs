use serde::Deserialize;

use crate::answer::{Answer, Pair};
use crate::cross_entropy::mean_cross_entropy;
use crate::loss::{Evaluation, Objective, aligner, mean_of_sequences};
use crate::parallel::{by_row, threads};
use crate::rows::Rows;
use crate::scalar::dot;
use crate::settings::Mode;
use crate::sorted::Scratch;
use crate::{Result, Scalar};

/// Universal Logit Distillation (arXiv:2402.12030): cross entropy, and beside it the mean distance (`uld`) between the
/// probabilities of both sides at each position, each sorted, the smaller vocabulary padded with zeros.
///
/// `total = ce + distillation_weight uld`. In paper mode parts are means over a sequence's tokens, and those of a batch the
/// mean over its sequences. In mode `reference-code` the cross entropy is the mean over all labels of the batch, and answers
/// are as many rows as there are labels, from one before the first on.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Uld {
    /// Published formula, or released code.
    pub mode: Mode,
    /// Weight of `uld`.
    pub distillation_weight: f64,
    /// Temperature of the student's logits in `uld`.
    pub student_temperature: f64,
    /// Temperature of the teacher's.
    pub teacher_temperature: f64,
    /// Distils all but the last of the student's labels.
    pub skip_student_eos: bool,
    /// Distils from all but the last of the teacher's labels.
    pub skip_teacher_eos: bool,
}

impl Default for Uld {
    fn default() -> Self {
        Self {
            mode: Mode::Paper,
            distillation_weight: 1.5,
            student_temperature: 1.0,
            teacher_temperature: 1.0,
            skip_student_eos: false,
            skip_teacher_eos: false,
        }
    }
}

/// Memory that rows of a thread share.
struct Held<F> {
    scratch: Scratch<F>,
    p: Vec<F>,
    q: Vec<F>,
    upstream: Vec<F>,
}

impl<F: Default> Default for Held<F> {
    fn default() -> Self {
        Self {
            scratch: Scratch::default(),
            p: Vec::new(),
            q: Vec::new(),
            upstream: Vec::new(),
        }
    }
}

impl Uld {
    /// One sequence: the distance, and in paper mode the cross entropy.
    fn sequence<F: Scalar>(
        &self,
        pair: &Pair<'_, F>,
        b: usize,
        weights: [f64; 2],
        gradient: Option<&mut [F]>,
    ) -> Result<Evaluation> {
        let (teacher, student) = (&pair.teacher, &pair.student);
        let paper = self.mode == Mode::Paper;
        let (answer, teacher_rows) = match paper {
            true => (
                student.answer(b),
                teacher.distilled(b, self.skip_teacher_eos).rows,
            ),
            false => {
                let rows = student.span(b, self.skip_student_eos)?.collect();
                let tokens = Vec::new();
                (
                    Answer { rows, tokens },
                    teacher.span(b, self.skip_teacher_eos)?.collect(),
                )
            }
        };
        let (hot, cold) = (self.student_temperature, self.teacher_temperature);
        let s = Rows::read(student, b, &answer.rows, &[1.0, hot], None)?;
        // The same list of temperatures, so that equal logits give bit for bit equal probabilities.
        let t = Rows::read(teacher, b, &teacher_rows, &[1.0, cold], None)?;
        let last = usize::from(paper && self.skip_student_eos);
        let shared = s.len().saturating_sub(last).min(t.len());
        let ce_share = 1.0 / answer.tokens.len().max(1) as f64;
        let share = 1.0 / shared.max(1) as f64;
        let ce_weight = F::of(weights[0] * ce_share);
        let slope = F::of(weights[1] * share / hot);
        let of_row = |held: &mut Held<F>, row: usize, out: Option<&mut [F]>| {
            let Held {
                scratch,
                p,
                q,
                upstream,
            } = held;
            let token = answer.tokens.get(row);
            let (mut ce, mut uld, mut dense) = (0.0, 0.0, F::zero());
            if let Some(&token) = token {
                ce = ce_share * s.log_probability(row, 1.0, token).wide();
            }
            if row < shared {
                upstream.resize(student.vocab, F::zero());
                t.probabilities(row, cold, p);
                s.probabilities(row, hot, q);
                uld = share * F::distance(p, q, scratch, upstream).wide();
                dense = -slope * dot(q, upstream);
            }
            let Some(out) = out else { return (ce, uld) };
            let out = &mut out[..student.vocab];
            if let Some(&token) = token {
                s.add_probabilities(row, 1.0, ce_weight, out);
                out[token] = out[token] - ce_weight;
            }
            if row < shared {
                for ((out, &q), &g) in out.iter_mut().zip(&*q).zip(&*upstream) {
                    *out = *out + q * (slope * g + dense);
                }
            }
            (ce, uld)
        };
        let threads = threads(student.batch, answer.rows.len() * student.vocab);
        let (width, rows) = (student.width, &answer.rows);
        let found = by_row(rows, width, gradient, threads, Held::default, of_row);
        let (mut ce, mut uld) = (0.0, 0.0);
        for (of_ce, of_uld) in found {
            ce -= of_ce;
            uld += of_uld;
        }
        Ok(Evaluation {
            parts: vec![ce, uld],
            notes: Vec::new(),
        })
    }
}

impl Objective for Uld {
    fn parts(&self) -> Vec<(&'static str, f64)> {
        vec![("ce", 1.0), ("uld", self.distillation_weight)]
    }

    fn evaluate<F: Scalar>(
        &self,
        pair: &Pair<'_, F>,
        weights: &[f64],
        mut gradient: Option<&mut [F]>,
    ) -> Result<Evaluation> {
        let paper = self.mode == Mode::Paper;
        let mut found = mean_of_sequences(pair, gradient.as_deref_mut(), |b, share, gradient| {
            self.sequence(pair, b, [weights[0] * share, weights[1] * share], gradient)
        })?;
        if !paper {
            found.parts[0] = mean_cross_entropy(&pair.student, weights[0], gradient)?;
        }
        Ok(found)
    }
}

aligner!(Uld, offsets: false, |own, needs| {
    needs.whole_rows = true;
    // Its cross entropy is a mean over the tokens of a batch.
    needs.whole_batch = own.mode == Mode::ReferenceCode;
});
