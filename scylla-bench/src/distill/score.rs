//! What a student is worth: bits per byte of answers it has not learned from, and how often it expects the teacher's next byte.

use std::collections::BTreeMap;

use multilevel_ot::bytes::Offsets;
use scylla_core::kernels::probability::{exponentials, largest};
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
pub(super) struct FirstBytes {
    of: Vec<Option<(u8, usize)>>,
    /// The tokens that begin with each byte.
    groups: Vec<(u8, Vec<u32>)>,
}

impl FirstBytes {
    pub(super) fn of(tokenizer: &Tokenizer) -> Self {
        let first = |id| {
            let bytes = tokenizer.token_bytes(id)?;
            Some((*bytes.first()?, bytes.len()))
        };
        Self::new((0..tokenizer.size() as u32).map(first).collect())
    }

    fn new(of: Vec<Option<(u8, usize)>>) -> Self {
        let mut groups: BTreeMap<u8, Vec<u32>> = BTreeMap::new();
        for (id, byte) in of.iter().enumerate() {
            if let Some((byte, _)) = byte {
                groups.entry(*byte).or_default().push(id as u32);
            }
        }
        Self {
            of,
            groups: groups.into_iter().collect(),
        }
    }

    /// What tells it from that of another tokenizer.
    pub(super) fn hashed(&self) -> Vec<u8> {
        let of = self.of.iter().flat_map(|token| {
            let (byte, bytes) = token.unwrap_or((0, 0));
            [u64::from(byte), bytes as u64]
        });
        of.flat_map(u64::to_le_bytes).collect()
    }

    /// The byte that most probably comes next by a row of logits; ties go to the lower one. `scratch` is overwritten.
    fn next(&self, logits: &[f32], scratch: &mut Vec<f64>) -> u8 {
        mass(&logits[..self.of.len().min(logits.len())], scratch);
        let of = |ids: &[u32]| -> f64 {
            let known = ids.iter().filter_map(|&id| scratch.get(id as usize));
            known.sum()
        };
        let mut best = (0, f64::NEG_INFINITY);
        for (byte, ids) in &self.groups {
            let mass = of(ids);
            if mass > best.1 {
                best = (*byte, mass);
            }
        }
        best.0
    }
}

/// Exponentials of a row's logits, relative to the largest; that one, and their sum.
fn mass(logits: &[f32], out: &mut Vec<f64>) -> (f64, f64) {
    let most = f64::from(largest(logits));
    out.resize(logits.len(), 0.0);
    (most, exponentials(logits, most, 1.0, out))
}

/// What `each` makes of so many things, in order, on several threads; each has scratch memory of its own.
fn on_threads<T: Send>(
    count: usize,
    threads: usize,
    each: impl Fn(usize, &mut Vec<f64>) -> T + Sync,
) -> Vec<T> {
    let share = count.div_ceil(threads.max(1)).max(1);
    let each = &each;
    let some = |first: usize| {
        let mut scratch = Vec::new();
        let all = first..(first + share).min(count);
        all.map(|i| each(i, &mut scratch)).collect::<Vec<T>>()
    };
    std::thread::scope(|scope| {
        let starts = (0..count).step_by(share);
        let running: Vec<_> = starts
            .map(|first| scope.spawn(move || some(first)))
            .collect();
        let joined = running.into_iter().flat_map(|one| match one.join() {
            Ok(found) => found,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        joined.collect()
    })
}

/// Places in an answer's bytes at which a side's tokens begin, and the byte that it expects there. A token that begins with what is
/// no part of the answer begins at none.
pub(super) fn expected(
    said: &[u32],
    offsets: &Offsets,
    first: &FirstBytes,
    (rows, width): (&[f32], usize),
    threads: usize,
) -> BTreeMap<usize, u8> {
    let whole = |i: &usize| {
        let (from, to) = offsets[*i];
        let bytes = first.of.get(said[*i] as usize).copied().flatten();
        to > from && bytes.is_some_and(|(_, bytes)| bytes == to - from)
    };
    let places: Vec<usize> = (0..said.len().min(offsets.len())).filter(whole).collect();
    let next = |i: usize, scratch: &mut Vec<f64>| {
        let row = &rows[places[i] * width..][..width];
        (offsets[places[i]].0, first.next(row, scratch))
    };
    let found = on_threads(places.len(), threads, next);
    found.into_iter().collect()
}

/// What an answer is worth: logits `[tokens, width]` of the student before each of its tokens, the first `vocab` columns of which are
/// tokens, and what both sides expect.
pub(super) fn of_answer(
    pair: &Pair,
    (rows, width, vocab): (&[f32], usize, usize),
    (own, teacher): (&BTreeMap<usize, u8>, &BTreeMap<usize, u8>),
    threads: usize,
) -> AnswerScore {
    let (said, offsets) = (pair.student.said(), &pair.offsets.0);
    let bits = on_threads(said.len(), threads, |i, scratch| {
        let (from, to) = offsets[i];
        match to > from {
            true => surprise(&rows[i * width..][..vocab], said[i] as usize, scratch),
            false => 0.0,
        }
    });
    let places = own
        .iter()
        .filter_map(|(at, byte)| Some((byte, teacher.get(at)?)));
    AnswerScore {
        name: pair.name.clone(),
        bits: bits.iter().sum(),
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

/// `-log2 p(token)`. `scratch` is overwritten.
fn surprise(logits: &[f32], token: usize, scratch: &mut Vec<f64>) -> f64 {
    let (most, sum) = mass(logits, scratch);
    (sum.ln() - (f64::from(logits[token]) - most)) / std::f64::consts::LN_2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_logits_take_the_logarithm_of_the_vocabulary() {
        let scratch = &mut Vec::new();
        assert!((surprise(&[0.5; 8], 3, scratch) - 3.0).abs() < 1e-12);
        assert!((surprise(&[0.0, 1e4], 1, scratch)).abs() < 1e-12);
    }

    #[test]
    fn the_next_byte_has_the_mass_of_all_tokens_that_begin_with_it() {
        // Two tokens of `a` outweigh one of `b` that is likelier than either.
        let token = |byte: u8, bytes: usize| Some((byte, bytes));
        let tokens = vec![token(b'a', 1), token(b'b', 2), token(b'a', 3), None];
        let (first, scratch) = (FirstBytes::new(tokens), &mut Vec::new());
        assert_eq!(first.next(&[1.0, 1.5, 1.0, 9.0, 9.0], scratch), b'a');
        assert_eq!(first.next(&[1.0, 2.5, 1.0, 9.0], scratch), b'b');
        // The last but one lies half outside of the answer.
        let rows = [
            0.0, 9.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 9.0, 0.0, 0.0, 0.0,
        ];
        for threads in 1..4 {
            let offsets = vec![(0, 2), (2, 2), (2, 4), (4, 5)];
            let found = expected(&[1, 3, 2, 0], &offsets, &first, (&rows, 4), threads);
            assert_eq!(found, BTreeMap::from([(0, b'b'), (4, b'a')]));
        }
    }
}
