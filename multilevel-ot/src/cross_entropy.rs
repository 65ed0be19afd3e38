//! Cross entropy with the labels of a batch, alone or within other losses.

use scylla_core::kernels::softmax::{Exponentials, Sums, accumulate, sums};
use scylla_core::train::{AlignContext, AlignLoss, AlignNeeds, Aligner, AnswerLogits};
use serde::Deserialize;

use crate::answer::{Pair, Side};
use crate::loss::{self, Evaluation, Objective};
use crate::parallel::{by_row, threads};
use crate::{Error, Result, Scalar};

/// What a student learns without a teacher, the mean cross entropy over all labels of a batch; of answers that the teacher wrote it is
/// sequence-level distillation (arXiv:1606.07947).
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CrossEntropy {}

impl Objective for CrossEntropy {
    fn parts(&self) -> Vec<(&'static str, f64)> {
        vec![("ce", 1.0)]
    }

    fn evaluate<F: Scalar>(
        &self,
        pair: &Pair<'_, F>,
        weights: &[f64],
        gradient: Option<&mut [F]>,
    ) -> Result<Evaluation> {
        let ce = mean_cross_entropy(&pair.student, weights[0], gradient)?;
        Ok(Evaluation {
            parts: vec![ce],
            notes: Vec::new(),
        })
    }
}

impl Aligner for CrossEntropy {
    fn needs(&self) -> AlignNeeds {
        AlignNeeds {
            alone: true,
            by_token: true,
            ..AlignNeeds::default()
        }
    }

    fn loss(
        &self,
        _: &AnswerLogits,
        student: &AnswerLogits,
        _: &AlignContext,
    ) -> scylla_core::Result<AlignLoss> {
        // It stands in for the teacher, and is not looked at.
        Ok(loss::loss(self, student, student)?)
    }
}

/// The rows of a batch that predict labels, with what their softmax divides by.
pub(crate) struct Predicted<F> {
    /// Among all rows of the batch.
    pub(crate) rows: Vec<usize>,
    /// What each predicts.
    pub(crate) tokens: Vec<usize>,
    sums: Vec<Sums<F>>,
    /// Of the labels' logarithms.
    logs: f64,
}

impl<F: Scalar> Predicted<F> {
    /// # Errors
    /// If there is none; on logits that are NaN or infinite, and rows without a finite one.
    pub(crate) fn new(side: &Side<'_, F>) -> Result<Self> {
        let (mut rows, mut tokens) = (Vec::new(), Vec::new());
        for b in 0..side.batch {
            let answer = side.answer(b);
            rows.extend(answer.rows.iter().map(|row| b * side.seq + row));
            tokens.extend(answer.tokens);
        }
        if tokens.is_empty() {
            return Err(Error::Invalid(format!(
                "no row predicts a {} label",
                side.name
            )));
        }
        let of_row = |(): &mut (), at: usize, _: Option<&mut [F]>| {
            let (b, s) = (rows[at] / side.seq, rows[at] % side.seq);
            let x = side.row(b, s);
            let found = sums(x, F::one());
            match found.sum.is_finite() {
                true => Ok((found, x[tokens[at]] - found.reference - found.sum.ln())),
                false => Err(Error::Invalid(format!(
                    "{} logits of row [{b}, {s}] hold NaN or infinity, or nothing finite",
                    side.name
                ))),
            }
        };
        let threads = threads(1, rows.len() * side.vocab);
        let (mut all, mut logs) = (Vec::with_capacity(rows.len()), 0.0);
        for one in by_row(&rows, 0, None, threads, || (), of_row) {
            let (sums, log) = one?;
            all.push(sums);
            logs += log.wide();
        }
        Ok(Self {
            rows,
            tokens,
            sums: all,
            logs,
        })
    }

    /// The mean over all labels.
    pub(crate) fn mean(&self) -> f64 {
        -self.logs / self.tokens.len() as f64
    }

    /// A row's probabilities times `factor`, as exponentials.
    pub(crate) fn probabilities(&self, at: usize, factor: F) -> Exponentials<F> {
        let Sums { reference, sum, .. } = self.sums[at];
        Exponentials {
            factor: factor / sum,
            reference,
            scale: F::one(),
        }
    }

    /// Adds the gradient of a row's cross entropy `share` times.
    pub(crate) fn add_gradient(&self, side: &Side<'_, F>, at: usize, share: F, out: &mut [F]) {
        let (row, token) = (self.rows[at], self.tokens[at]);
        let x = side.row(row / side.seq, row % side.seq);
        let p = self.probabilities(at, share);
        accumulate(x, p.reference, p.scale, p.factor, out);
        out[token] = out[token] - share;
    }
}

/// The mean cross entropy over all labels of a batch, and its gradient, added to what is there.
pub(crate) fn mean_cross_entropy<F: Scalar>(
    side: &Side<'_, F>,
    weight: f64,
    gradient: Option<&mut [F]>,
) -> Result<f64> {
    let found = Predicted::new(side)?;
    if let Some(gradient) = gradient {
        let share = F::of(weight / found.tokens.len() as f64);
        let of_row = |(): &mut (), at: usize, out: Option<&mut [F]>| {
            if let Some(out) = out {
                found.add_gradient(side, at, share, &mut out[..side.vocab]);
            }
        };
        let threads = threads(1, found.rows.len() * side.vocab);
        by_row(
            &found.rows,
            side.width,
            Some(gradient),
            threads,
            || (),
            of_row,
        );
    }
    Ok(found.mean())
}
