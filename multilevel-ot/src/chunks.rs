//! What losses over groups of tokens share: a sequence with its rows on both sides, cut where both have covered the same
//! bytes, and gradients of its probabilities.

use crate::Result;
use crate::Scalar;
use crate::answer::{Answer, Pair};
use crate::bytes::{Group, groups};
use crate::rows::Rows;

/// One sequence of both sides.
pub(crate) struct Sequence<'a, F> {
    pub(crate) student: Rows<'a, F>,
    pub(crate) teacher: Rows<'a, F>,
    pub(crate) answer: Answer,
    pub(crate) teacher_answer: Answer,
    width: usize,
}

impl<'a, F: Scalar> Sequence<'a, F> {
    /// Reads the rows of sequence `b`, at temperature 1 too: the same list on both sides, so that equal logits give bit for
    /// bit equal probabilities.
    pub(crate) fn read(
        pair: &Pair<'a, F>,
        b: usize,
        student_temperature: f64,
        teacher_temperature: f64,
    ) -> Result<Self> {
        let (answer, teacher_answer) = (pair.student.answer(b), pair.teacher.answer(b));
        let (own, other) = ([1.0, student_temperature], [1.0, teacher_temperature]);
        Ok(Self {
            student: Rows::read(&pair.student, b, &answer.rows, &own, None)?,
            teacher: Rows::read(&pair.teacher, b, &teacher_answer.rows, &other, None)?,
            answer,
            teacher_answer,
            width: pair.student.width,
        })
    }

    /// Groups of answer tokens that cover the same bytes; none where one side has no answer.
    pub(crate) fn groups(&self, pair: &Pair<'_, F>, b: usize) -> Result<Vec<Group>> {
        let (s, t) = (self.answer.tokens.len(), self.teacher_answer.tokens.len());
        if s == 0 || t == 0 {
            return Ok(Vec::new());
        }
        let found = groups(
            &pair.student.byte_lengths(b, s)?,
            &pair.teacher.byte_lengths(b, t)?,
        )?;
        let whole = |g: &Group| !g.student.is_empty() && !g.teacher.is_empty();
        Ok(found.into_iter().filter(whole).collect())
    }

    /// Where a row's gradient stands.
    pub(crate) fn out<'g>(&self, gradient: &'g mut [F], row: usize) -> &'g mut [F] {
        &mut gradient[self.answer.rows[row] * self.width..][..self.student.x[row].len()]
    }

    /// Adds the gradient of `factor log p(token)` of a row.
    pub(crate) fn add_log(
        &self,
        gradient: &mut [F],
        row: usize,
        temperature: f64,
        token: usize,
        factor: F,
    ) {
        let slope = factor / F::of(temperature);
        let out = self.out(gradient, row);
        self.student
            .add_probabilities(row, temperature, -slope, out);
        out[token] = out[token] + slope;
    }

    /// Adds the gradient of what has `upstream` with respect to the probabilities `q` of a row, `factor` times.
    pub(crate) fn add_through(
        &self,
        gradient: &mut [F],
        row: usize,
        temperature: f64,
        (q, upstream): (&[F], &[F]),
        factor: F,
    ) {
        let mean = crate::scalar::dot(q, upstream);
        let slope = factor / F::of(temperature);
        let out = self.out(gradient, row);
        for ((out, &q), &u) in out.iter_mut().zip(q).zip(upstream) {
            *out = *out + slope * q * (u - mean);
        }
    }

    /// The mean cross entropy of the answer, and its gradient.
    pub(crate) fn cross_entropy(&self, weight: f64, mut gradient: Option<&mut [F]>) -> f64 {
        let tokens = &self.answer.tokens;
        let share = 1.0 / tokens.len().max(1) as f64;
        let mut ce = 0.0;
        for (row, &token) in tokens.iter().enumerate() {
            ce -= share * self.student.log_probability(row, 1.0, token).wide();
            if let Some(gradient) = gradient.as_deref_mut() {
                self.add_log(gradient, row, 1.0, token, F::of(-weight * share));
            }
        }
        ce
    }
}
