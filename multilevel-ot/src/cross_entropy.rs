//! Cross entropy with the labels of a batch, alone or within other losses.

use scylla_core::train::{AlignContext, AlignLoss, AlignNeeds, Aligner, AnswerLogits};
use serde::Deserialize;

use crate::answer::{Pair, Side};
use crate::loss::{self, Evaluation, Objective};
use crate::parallel::{by_row, threads};
use crate::rows::Rows;
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

/// The mean cross entropy over all labels of a batch, and its gradient where `weight` is not 0.
pub(crate) fn mean_cross_entropy<F: Scalar>(
    side: &Side<'_, F>,
    weight: f64,
    mut gradient: Option<&mut [F]>,
) -> Result<f64> {
    let answers: Vec<_> = (0..side.batch).map(|b| side.answer(b)).collect();
    let tokens: usize = answers.iter().map(|a| a.tokens.len()).sum();
    if tokens == 0 {
        return Err(Error::Invalid(format!(
            "no row predicts a {} label",
            side.name
        )));
    }
    let share = F::of(weight / tokens as f64);
    let mut sum = 0.0;
    for (b, answer) in answers.iter().enumerate() {
        let rows = Rows::read(side, b, &answer.rows, &[1.0], None)?;
        let of_row = |(): &mut (), row: usize, out: Option<&mut [F]>| {
            let token = answer.tokens[row];
            if let Some(out) = out {
                let out = &mut out[..side.vocab];
                rows.add_probabilities(row, 1.0, share, out);
                out[token] = out[token] - share;
            }
            rows.log_probability(row, 1.0, token).wide()
        };
        // Sequences come one after another here, so each has all threads.
        let threads = threads(1, answer.rows.len() * side.vocab);
        let size = side.seq * side.width;
        let own = gradient
            .as_deref_mut()
            .map(|gradient| &mut gradient[b * size..(b + 1) * size]);
        for log in by_row(&answer.rows, side.width, own, threads, || (), of_row) {
            sum -= log;
        }
    }
    Ok(sum / tokens as f64)
}
