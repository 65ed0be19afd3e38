//! Cross entropy with the labels of a batch.

use crate::answer::Side;
use crate::rows::Rows;
use crate::{Error, Result, Scalar};

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
        for (row, (&at, &token)) in answer.rows.iter().zip(&answer.tokens).enumerate() {
            sum -= rows.log_probability(row, 1.0, token).wide();
            if let Some(gradient) = &mut gradient {
                let first = (b * side.seq + at) * side.width;
                let out = &mut gradient[first..][..side.vocab];
                rows.add_probabilities(row, 1.0, share, out);
                out[token] = out[token] - share;
            }
        }
    }
    Ok(sum / tokens as f64)
}
