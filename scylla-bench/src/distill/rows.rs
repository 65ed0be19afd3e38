//! Rows of answers as a loss gets them.

use candle_core::{Device, Tensor};
use multilevel_ot::IGNORED;
use scylla_core::plugin::Matrix;
use scylla_core::train::AnswerLogits;

use super::cache::Cache;
use super::pairs::Side;
use super::teacher::chosen;
use crate::Result;

/// Rows of some answers of one side, each from the one before its first token on: as many of each, the last repeated.
pub(super) struct Rows<'a> {
    sides: Vec<&'a Side>,
    /// `[B * S]`
    pub(super) rows: Vec<usize>,
    /// S.
    length: usize,
}

impl<'a> Rows<'a> {
    pub(super) fn of(sides: impl Iterator<Item = &'a Side>, begins: &[usize]) -> Self {
        let sides: Vec<&Side> = sides.collect();
        let length = 1 + sides.iter().map(|s| s.answer.len()).max().unwrap_or(0);
        let of = |(side, &begin): (&&Side, &usize)| {
            let (first, last) = (side.answer.start - 1, side.answer.end - 1);
            (0..length).map(move |i| begin + (first + i).min(last))
        };
        let rows = sides.iter().zip(begins).flat_map(of).collect();
        Self {
            sides,
            rows,
            length,
        }
    }

    /// Rows before each token of an answer.
    pub(super) fn before(side: &Side, begin: usize) -> Vec<usize> {
        side.answer.clone().map(|at| begin + at - 1).collect()
    }

    /// The same rows out of a cache: logits, and hidden states where they are kept.
    pub(super) fn kept(
        &self,
        cache: &Cache,
        answers: &[usize],
    ) -> Result<(Matrix, Option<Matrix>)> {
        let (mut logits, mut states) = (Vec::new(), Vec::new());
        for &answer in answers {
            let (said, hidden) = cache.said(answer)?;
            let rows = self.within(&said);
            logits.push(chosen(&said, &rows)?);
            if let Some(hidden) = hidden {
                states.push(chosen(&hidden, &rows)?);
            }
        }
        let states = match states.is_empty() {
            true => None,
            false => Some(Matrix::joined(states)?),
        };
        Ok((Matrix::joined(logits)?, states))
    }

    /// Hidden states of the same rows out of a cache.
    pub(super) fn kept_states(&self, cache: &Cache, answers: &[usize]) -> Result<Matrix> {
        let of = |&answer: &usize| {
            let states = cache.states(answer)?;
            chosen(&states, &self.within(&states))
        };
        let states: Vec<Matrix> = answers.iter().map(of).collect::<Result<_>>()?;
        Ok(Matrix::joined(states)?)
    }

    /// Rows of one answer, as many as all have.
    fn within(&self, of: &Matrix) -> Vec<usize> {
        let last = of.rows() - 1;
        (0..self.length).map(|i| i.min(last)).collect()
    }

    /// Logits `[B, S, W]` of these rows with their labels and tokens.
    pub(super) fn answers(&self, logits: Tensor, vocab: usize) -> Result<AnswerLogits> {
        let shape = (self.sides.len(), self.length);
        let (mut labels, mut tokens) = (Vec::new(), Vec::new());
        for side in &self.sides {
            let said = side.said();
            for i in 0..self.length {
                let label = i.checked_sub(1).and_then(|i| said.get(i));
                labels.push(label.map_or(IGNORED, |&t| i64::from(t)));
                let at = (side.answer.start - 1 + i).min(side.tokens.len() - 1);
                tokens.push(i64::from(side.tokens[at]));
            }
        }
        Ok(AnswerLogits {
            logits,
            labels: Tensor::from_vec(labels, shape, &Device::Cpu)?,
            vocab,
            tokens: Some(Tensor::from_vec(tokens, shape, &Device::Cpu)?),
            offsets: None,
            hidden: None,
        })
    }

    /// The values of rows, without a copy where they are on the host, and their shape.
    pub(super) fn values(&self, m: Matrix) -> Result<(Vec<f32>, (usize, usize, usize))> {
        let shape = (self.sides.len(), self.length, m.columns);
        let values = match m.is_on_device() {
            true => m.all()?.into_owned(),
            false => m.into_values()?,
        };
        Ok((values, shape))
    }

    pub(super) fn tensor(&self, m: Matrix) -> Result<Tensor> {
        let (values, shape) = self.values(m)?;
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    }
}
