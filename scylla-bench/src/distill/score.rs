//! What a student is worth: bits per byte of answers it has not learned from, and how often it expects the teacher's next byte.

use std::collections::HashMap;

use multilevel_ot::bytes::Offsets;
use scylla_core::text::Tokenizer;
use serde::{Deserialize, Serialize};

use super::pairs::Pair;
use crate::tasks;

/// Scores over some answers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// Bits that the student needs for a byte of the answers. What ends an answer is not counted.
    pub bits_per_byte: f64,
    /// Of the places where both sides' tokens begin, the share at which both hold the same byte most probable.
    pub next_byte: f64,
    /// Bytes.
    pub bytes: usize,
    /// Such places.
    pub places: usize,
    /// Of what the student says itself, where there are right answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub said: Option<Said>,
}

/// What an answer adds to them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AnswerScore {
    /// Its file and place there.
    pub name: String,
    /// Bits that the student needs for it.
    pub bits: f64,
    /// Bytes.
    pub bytes: usize,
    /// Places at which both sides expect the same byte.
    pub same: usize,
    /// Such places in all.
    pub places: usize,
    /// Of what the student says itself, where there is a right answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub said: Option<Said>,
}

/// What a student's own answers are worth: means over them, each against the right answer that is nearest to it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Said {
    /// Answers.
    pub count: usize,
    /// F1 over words.
    pub f1: f64,
    /// Rouge-L.
    pub rouge_l: f64,
    /// Rouge-LSum.
    pub rouge_lsum: f64,
}

impl Said {
    /// Of a text and its right answers.
    pub(super) fn of(text: &str, right: &[String]) -> Self {
        Self {
            count: 1,
            f1: tasks::f1(text, right),
            rouge_l: tasks::rouge_l(text, right),
            rouge_lsum: tasks::rouge_lsum(text, right),
        }
    }

    /// Of several; `None` of none.
    fn mean<'a>(all: impl Iterator<Item = &'a Self>) -> Option<Self> {
        let mut sums = Self::default();
        for one in all {
            sums.count += one.count;
            sums.f1 += one.f1;
            sums.rouge_l += one.rouge_l;
            sums.rouge_lsum += one.rouge_lsum;
        }
        let mean = |sum: f64| sum / sums.count as f64;
        (sums.count > 0).then(|| Self {
            count: sums.count,
            f1: mean(sums.f1),
            rouge_l: mean(sums.rouge_l),
            rouge_lsum: mean(sums.rouge_lsum),
        })
    }
}

/// First bytes of a vocabulary's tokens, and how many each has.
pub(super) struct FirstBytes(Vec<Option<(u8, usize)>>);

impl FirstBytes {
    pub(super) fn of(tokenizer: &Tokenizer) -> Self {
        let first = |id| {
            let bytes = tokenizer.token_bytes(id)?;
            Some((*bytes.first()?, bytes.len()))
        };
        Self((0..tokenizer.size() as u32).map(first).collect())
    }

    /// The byte that most probably comes next by a row of logits; ties go to the lower one.
    fn next(&self, logits: &[f32]) -> u8 {
        let known = &logits[..self.0.len().min(logits.len())];
        let most = known.iter().fold(f32::NEG_INFINITY, |m, &v| m.max(v));
        let mut mass = [0.0f64; 256];
        for (&logit, byte) in known.iter().zip(&self.0) {
            if let Some((byte, _)) = byte {
                mass[usize::from(*byte)] += f64::from(logit - most).exp();
            }
        }
        let best = (0..=255u8).max_by(|&a, &b| {
            let of = |byte: u8| mass[usize::from(byte)];
            of(a).total_cmp(&of(b)).then(b.cmp(&a))
        });
        best.unwrap_or(0)
    }
}

/// Places in an answer's bytes at which a side's tokens begin, and the byte that it expects there. A token that begins with what is
/// no part of the answer begins at none.
pub(super) fn expected(
    said: &[u32],
    offsets: &Offsets,
    first: &FirstBytes,
    rows: &[f32],
    width: usize,
) -> HashMap<usize, u8> {
    let tokens = said.iter().zip(offsets).zip(rows.chunks_exact(width));
    let whole = tokens.filter(|((token, (from, to)), _)| {
        let bytes = first.0.get(**token as usize).copied().flatten();
        to > from && bytes.is_some_and(|(_, bytes)| bytes == to - from)
    });
    whole
        .map(|((_, &(from, _)), row)| (from, first.next(row)))
        .collect()
}

/// What an answer is worth: logits `[tokens, width]` of the student before each of its tokens, the first `vocab` columns of which are
/// tokens, and what both sides expect.
pub(super) fn of_answer(
    pair: &Pair,
    (rows, width, vocab): (&[f32], usize, usize),
    (own, teacher): (&HashMap<usize, u8>, &HashMap<usize, u8>),
) -> AnswerScore {
    let said = pair.student.said().iter().zip(&pair.offsets.0);
    let real = said
        .zip(rows.chunks_exact(width))
        .filter(|((_, (from, to)), _)| to > from);
    let bits = real.map(|((&token, _), row)| surprise(&row[..vocab], token as usize));
    let places = own
        .iter()
        .filter_map(|(at, byte)| Some((byte, teacher.get(at)?)));
    AnswerScore {
        name: pair.name.clone(),
        bits: bits.sum(),
        bytes: pair.bytes,
        same: places.clone().filter(|(a, b)| a == b).count(),
        places: places.count(),
        said: None,
    }
}

impl Scores {
    /// Over all answers.
    pub(super) fn over(answers: &[AnswerScore]) -> Self {
        let sum = |of: fn(&AnswerScore) -> usize| answers.iter().map(of).sum::<usize>();
        let (bytes, places) = (sum(|a| a.bytes), sum(|a| a.places));
        let bits: f64 = answers.iter().map(|a| a.bits).sum();
        Self {
            bits_per_byte: bits / bytes.max(1) as f64,
            next_byte: sum(|a| a.same) as f64 / places.max(1) as f64,
            bytes,
            places,
            said: Said::mean(answers.iter().filter_map(|a| a.said.as_ref())),
        }
    }
}

/// `-log2 p(token)`.
fn surprise(logits: &[f32], token: usize) -> f64 {
    let most = logits.iter().fold(f32::NEG_INFINITY, |m, &v| m.max(v));
    let sum: f64 = logits.iter().map(|&v| f64::from(v - most).exp()).sum();
    (sum.ln() - f64::from(logits[token] - most)) / std::f64::consts::LN_2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_logits_take_the_logarithm_of_the_vocabulary() {
        assert!((surprise(&[0.5; 8], 3) - 3.0).abs() < 1e-12);
        assert!((surprise(&[0.0, 1e4], 1)).abs() < 1e-12);
    }

    #[test]
    fn the_next_byte_has_the_mass_of_all_tokens_that_begin_with_it() {
        // Two tokens of `a` outweigh one of `b` that is likelier than either.
        let token = |byte: u8, bytes: usize| Some((byte, bytes));
        let first = FirstBytes(vec![token(b'a', 1), token(b'b', 2), token(b'a', 3), None]);
        assert_eq!(first.next(&[1.0, 1.5, 1.0, 9.0, 9.0]), b'a');
        assert_eq!(first.next(&[1.0, 2.5, 1.0, 9.0]), b'b');
        // The last but one lies half outside of the answer.
        let found = expected(
            &[1, 3, 2, 0],
            &vec![(0, 2), (2, 2), (2, 4), (4, 5)],
            &first,
            &[
                0.0, 9.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 9.0, 0.0, 0.0, 0.0,
            ],
            4,
        );
        assert_eq!(found, HashMap::from([(0, b'b'), (4, b'a')]));
    }
}
