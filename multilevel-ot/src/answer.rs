//! What one side said: logits, labels, and which rows predict the answer.

use std::ops::Range;

use crate::{Error, Result, Scalar};

/// A label that belongs to no answer.
pub const IGNORED: i64 = -100;

/// Logits and labels of one side over a batch.
#[derive(Debug, Clone)]
pub(crate) struct Side<'a, F> {
    /// How messages call it.
    pub(crate) name: &'static str,
    /// `[B, S, W]`
    logits: &'a [F],
    /// `[B, S]`
    pub(crate) labels: &'a [i64],
    pub(crate) batch: usize,
    /// Positions.
    pub(crate) seq: usize,
    /// Columns.
    pub(crate) width: usize,
    /// Columns that belong to tokens, at most `width`.
    pub(crate) vocab: usize,
    /// `[B]` by answer tokens.
    pub(crate) offsets: Option<&'a [Vec<(usize, usize)>]>,
}

/// The answer of one sequence.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Answer {
    /// Rows that predict its tokens.
    pub(crate) rows: Vec<usize>,
    /// Its tokens.
    pub(crate) tokens: Vec<usize>,
}

impl<'a, F: Scalar> Side<'a, F> {
    /// # Errors
    /// On sizes that do not fit, and labels that are neither ignored nor tokens.
    pub(crate) fn new(
        name: &'static str,
        logits: &'a [F],
        labels: &'a [i64],
        [batch, seq, width]: [usize; 3],
        vocab: usize,
    ) -> Result<Self> {
        let shape = |what, expected, found| Error::Shape {
            what,
            expected,
            found,
        };
        if logits.len() != batch * seq * width || labels.len() != batch * seq {
            let expected =
                format!("{name} logits [{batch}, {seq}, {width}] and labels [{batch}, {seq}]");
            let found = format!("{} logits, {} labels", logits.len(), labels.len());
            return Err(shape("answers", expected, found));
        }
        if batch == 0 || seq == 0 || vocab == 0 || vocab > width {
            let expected = "at least one text, position and token, and no more tokens than columns";
            let found = format!("{name} logits [{batch}, {seq}, {width}] for {vocab} tokens");
            return Err(shape("answers", expected.into(), found));
        }
        let wrong = |&l: &i64| l != IGNORED && usize::try_from(l).map_or(true, |l| l >= vocab);
        if let Some(at) = labels.iter().position(wrong) {
            return Err(Error::Invalid(format!(
                "{name} label {} at [{}, {}] is neither {IGNORED} nor one of {vocab} tokens",
                labels[at],
                at / seq,
                at % seq
            )));
        }
        Ok(Self {
            name,
            logits,
            labels,
            batch,
            seq,
            width,
            vocab,
            offsets: None,
        })
    }

    /// Logits of a row over the vocabulary.
    pub(crate) fn row(&self, b: usize, s: usize) -> &'a [F] {
        let first = (b * self.seq + s) * self.width;
        &self.logits[first..first + self.vocab]
    }

    pub(crate) fn labels_of(&self, b: usize) -> &'a [i64] {
        &self.labels[b * self.seq..][..self.seq]
    }

    /// The answer of a sequence: every labelled position but the first of all, which no row predicts.
    pub(crate) fn answer(&self, b: usize) -> Answer {
        let labels = self.labels_of(b).iter().enumerate().skip(1);
        let labelled = labels.filter(|(_, l)| **l != IGNORED);
        let (rows, tokens) = labelled.map(|(s, &l)| (s - 1, l as usize)).unzip();
        Answer { rows, tokens }
    }

    /// The answer, where `skip_last` without its last token.
    pub(crate) fn distilled(&self, b: usize, skip_last: bool) -> Answer {
        let mut answer = self.answer(b);
        if skip_last {
            answer.rows.pop();
            answer.tokens.pop();
        }
        answer
    }

    /// The rows that the released code takes for the answer: as many as there are labels, from one before the first
    /// label on.
    ///
    /// # Errors
    /// If they are not all there, as where ignored labels stand between others.
    pub(crate) fn span(&self, b: usize, skip_last: bool) -> Result<Range<usize>> {
        let labels = self.labels_of(b);
        let start = labels.iter().take_while(|&&l| l == IGNORED).count();
        let count = labels.iter().filter(|&&l| l != IGNORED).count();
        let start = start.saturating_sub(1).min(self.seq);
        let end = start + count - usize::from(skip_last && count > 0);
        match end <= self.seq {
            true => Ok(start..end),
            false => Err(Error::Invalid(format!(
                "{} answer {b}: {count} labels from row {start} on end beyond the {} rows",
                self.name, self.seq
            ))),
        }
    }

    /// Byte lengths of an answer's tokens.
    ///
    /// # Errors
    /// Where none were given, or not one a token.
    pub(crate) fn byte_lengths(&self, b: usize, tokens: usize) -> Result<Vec<usize>> {
        let missing = || {
            Error::Invalid(format!(
                "byte offsets of the {}'s answers are needed",
                self.name
            ))
        };
        let offsets = self.offsets.and_then(|o| o.get(b)).ok_or_else(missing)?;
        if offsets.len() != tokens {
            return Err(Error::Shape {
                what: "byte offsets",
                expected: format!(
                    "one for each of the {tokens} tokens of {} answer {b}",
                    self.name
                ),
                found: format!("{}", offsets.len()),
            });
        }
        let mut end = 0;
        for (i, &(from, to)) in offsets.iter().enumerate() {
            if from != end || to < from {
                return Err(Error::Invalid(format!(
                    "{} answer {b}: token {i} covers bytes {from}..{to} where the one before ends at {end}",
                    self.name
                )));
            }
            end = to;
        }
        Ok(offsets.iter().map(|(from, to)| to - from).collect())
    }
}

/// Both sides of a batch.
#[derive(Debug, Clone)]
pub(crate) struct Pair<'a, F> {
    pub(crate) teacher: Side<'a, F>,
    pub(crate) student: Side<'a, F>,
}

impl<'a, F: Scalar> Pair<'a, F> {
    /// # Errors
    /// If the batches differ in size, or no position of the student's is labelled.
    pub(crate) fn new(teacher: Side<'a, F>, student: Side<'a, F>) -> Result<Self> {
        if teacher.batch != student.batch {
            return Err(Error::Shape {
                what: "batch",
                expected: format!("{} texts as the teacher's", teacher.batch),
                found: format!("{} of the student", student.batch),
            });
        }
        for side in [&teacher, &student] {
            if side.labels.iter().all(|&l| l == IGNORED) {
                return Err(Error::Invalid(format!(
                    "every {} label is {IGNORED}: there is no answer to learn from",
                    side.name
                )));
            }
        }
        Ok(Self { teacher, student })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_precede_the_tokens_they_predict() {
        let labels = [
            -100, -100, 3, 1, -100, 2, /**/ 1, -100, -100, -100, -100, -100,
        ];
        let logits = [0.0f64; 2 * 6 * 4];
        let side = Side::new("student", &logits, &labels, [2, 6, 4], 4).expect("fits");
        let expected = Answer {
            rows: vec![1, 2, 4],
            tokens: vec![3, 1, 2],
        };
        assert_eq!(side.answer(0), expected);
        assert_eq!(side.answer(1), Answer::default());
        // The released code counts the labels and takes so many rows, wherever they stand.
        assert_eq!(side.span(0, false).expect("fits"), 1..4);
        assert_eq!(side.span(0, true).expect("fits"), 1..3);
        assert_eq!(side.span(1, false).expect("fits"), 0..1);
    }

    #[test]
    fn broken_answers_are_refused_by_name() {
        let logits = [0.0f64; 12];
        let refused = |labels: &[i64], shape, vocab, what: &str| {
            let error = Side::new("teacher", &logits, labels, shape, vocab).expect_err(what);
            assert!(error.to_string().contains(what), "{error}");
        };
        refused(&[0, 4, 0], [1, 3, 4], 4, "label 4 at [0, 1]");
        refused(&[0, 3, 0], [1, 3, 4], 3, "one of 3 tokens");
        refused(&[0, 0, -1], [1, 3, 4], 4, "label -1 at [0, 2]");
        refused(&[0, 0], [1, 3, 4], 4, "labels [1, 3]");
        refused(&[0, 0, 0], [1, 3, 4], 5, "5 tokens");
        let side = |labels| Side::new("teacher", &logits, labels, [1, 3, 4], 4).expect("fits");
        let all = Pair::new(side(&[0, 1, 2]), side(&[-100; 3])).expect_err("refused");
        assert!(all.to_string().contains("no answer"), "{all}");
    }
}
