//! What losses over groups of tokens share: a sequence with its rows on both sides, cut where both have covered the same
//! bytes, and gradients of its probabilities.

use crate::Result;
use crate::Scalar;
use crate::answer::{Answer, Pair};
use crate::bytes::{Group, groups};
use crate::parallel::{by_row, by_start, threads};
use crate::rows::Rows;

/// One sequence of both sides.
pub(crate) struct Sequence<'a, F> {
    pub(crate) student: Rows<'a, F>,
    pub(crate) teacher: Rows<'a, F>,
    pub(crate) answer: Answer,
    pub(crate) teacher_answer: Answer,
    width: usize,
    /// For what is taken row by row, or group by group.
    threads: usize,
}

/// The gradient of some of a sequence's rows, one after another.
pub(crate) struct Part<'g, F> {
    values: &'g mut [F],
    /// The first of them.
    from: usize,
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
            threads: threads(pair.student.batch, answer.rows.len() * pair.student.vocab),
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

    /// Gives each group, with the gradient of its rows, to `each`; what it makes of them, in order. A sequence alone has several threads.
    pub(crate) fn by_group<S, T: Send>(
        &self,
        groups: &[Group],
        gradient: Option<&mut [F]>,
        scratch: impl Fn() -> S + Sync,
        each: impl Fn(&mut S, &Group, Option<Part<'_, F>>) -> T + Sync,
    ) -> Vec<T> {
        let first = |g: &Group| self.answer.rows[g.student.start];
        let starts: Vec<usize> = groups.iter().map(first).collect();
        let of = |scratch: &mut S, i: usize, values: Option<&mut [F]>| {
            let from = starts[i];
            each(
                scratch,
                &groups[i],
                values.map(|values| Part { values, from }),
            )
        };
        by_start(&starts, self.width, gradient, self.threads, scratch, of)
    }

    /// Gives each row, with its gradient, to `each`, in the same way.
    pub(crate) fn by_row<T: Send>(
        &self,
        gradient: Option<&mut [F]>,
        each: impl Fn(usize, Option<Part<'_, F>>) -> T + Sync,
    ) -> Vec<T> {
        let rows = &self.answer.rows;
        let of = |(): &mut (), row: usize, values: Option<&mut [F]>| {
            let from = rows[row];
            each(row, values.map(|values| Part { values, from }))
        };
        by_row(rows, self.width, gradient, self.threads, || (), of)
    }

    /// Where a row's gradient stands.
    pub(crate) fn out<'g>(&self, part: &'g mut Part<'_, F>, row: usize) -> &'g mut [F] {
        let at = (self.answer.rows[row] - part.from) * self.width;
        &mut part.values[at..][..self.student.x[row].len()]
    }

    /// Adds the gradient of `factor log p(token)` of a row.
    pub(crate) fn add_log(
        &self,
        part: &mut Part<'_, F>,
        row: usize,
        temperature: f64,
        token: usize,
        factor: F,
    ) {
        let slope = factor / F::of(temperature);
        let out = self.out(part, row);
        self.student
            .add_probabilities(row, temperature, -slope, out);
        out[token] = out[token] + slope;
    }

    /// Adds the gradient of what has `upstream` with respect to the probabilities `q` of a row, `factor` times.
    pub(crate) fn add_through(
        &self,
        part: &mut Part<'_, F>,
        row: usize,
        temperature: f64,
        (q, upstream): (&[F], &[F]),
        factor: F,
    ) {
        let mean = crate::scalar::dot(q, upstream);
        let slope = factor / F::of(temperature);
        let out = self.out(part, row);
        for ((out, &q), &u) in out.iter_mut().zip(q).zip(upstream) {
            *out = *out + slope * q * (u - mean);
        }
    }

    /// The mean cross entropy of the answer, and its gradient.
    pub(crate) fn cross_entropy(&self, weight: f64, gradient: Option<&mut [F]>) -> f64 {
        let tokens = &self.answer.tokens;
        let share = 1.0 / tokens.len().max(1) as f64;
        let of_row = |row: usize, part: Option<Part<'_, F>>| {
            let token = tokens[row];
            if let Some(mut part) = part {
                self.add_log(&mut part, row, 1.0, token, F::of(-weight * share));
            }
            share * self.student.log_probability(row, 1.0, token).wide()
        };
        let logs = self.by_row(gradient, of_row);
        logs.into_iter().fold(0.0, |ce, log| ce - log)
    }
}
