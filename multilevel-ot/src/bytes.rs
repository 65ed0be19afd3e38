//! Groups of tokens that cover the same bytes in two tokenizations of one text.

use std::ops::Range;

use scylla_core::text::Tokenizer;

use crate::{Error, Result};

/// Offsets of each token within its answer, by side.
pub type Offsets = Vec<(usize, usize)>;

/// Where the tokens of two tokenizations of one answer lie in its bytes, the student's and the teacher's. Arguments are the
/// bytes of each token, none for special ones. White space around the answer that only one side has, as the space that
/// SentencePiece puts first or the line break of a chat template, belongs to no byte of it.
///
/// # Errors
/// If the two are different texts.
pub fn offsets(student: &[&[u8]], teacher: &[&[u8]]) -> Result<(Offsets, Offsets)> {
    let [own, other] = [student.concat(), teacher.concat()];
    if own == other {
        return Ok((
            within(student, 0..own.len()),
            within(teacher, 0..other.len()),
        ));
    }
    let [core, others] = [core(&own), core(&other)];
    if own[core.clone()] == other[others.clone()] {
        return Ok((within(student, core), within(teacher, others)));
    }
    let differs = own[core.clone()].iter().zip(&other[others.clone()]);
    let at = differs.take_while(|(a, b)| a == b).count();
    let shown = |text: &[u8], from: usize| {
        let text = &text[(from + at).saturating_sub(10).max(from)..];
        String::from_utf8_lossy(&text[..text.len().min(30)]).into_owned()
    };
    Err(Error::Invalid(format!(
        "student and teacher did not write the same answer: they differ from byte {at} on, `{}` and `{}`",
        shown(&own, core.start),
        shown(&other, others.start)
    )))
}

/// The same of ids, by the bytes that their tokenizers keep: a character may be split between tokens, and special tokens
/// have no bytes. Where one side has no answer, no token has a place.
///
/// # Errors
/// If the two are different texts.
pub fn token_offsets(
    (student, own): (&Tokenizer, &[u32]),
    (teacher, others): (&Tokenizer, &[u32]),
) -> Result<(Offsets, Offsets)> {
    if own.is_empty() || others.is_empty() {
        return Ok((vec![(0, 0); own.len()], vec![(0, 0); others.len()]));
    }
    let own: Vec<&[u8]> = own.iter().map(|&id| bytes(student, id)).collect();
    let others: Vec<&[u8]> = others.iter().map(|&id| bytes(teacher, id)).collect();
    offsets(&own, &others)
}

fn bytes(tokenizer: &Tokenizer, id: u32) -> &[u8] {
    tokenizer.token_bytes(id).unwrap_or_default()
}

/// What is left without the white space around it.
fn core(text: &[u8]) -> Range<usize> {
    let start = text.len() - text.trim_ascii_start().len();
    start..text.trim_ascii_end().len().max(start)
}

/// Offsets of tokens relative to a range of their bytes; what lies outside is cut off.
fn within(tokens: &[&[u8]], range: Range<usize>) -> Offsets {
    let mut at = 0;
    let place = |token: &&[u8]| {
        let inside = |at: usize| at.clamp(range.start, range.end) - range.start;
        let from = inside(at);
        at += token.len();
        (from, inside(at))
    };
    tokens.iter().map(place).collect()
}

/// Tokens of both sides that cover the same bytes; none could be cut into two such groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// Tokens of the student.
    pub student: Range<usize>,
    /// Tokens of the teacher.
    pub teacher: Range<usize>,
}

/// Cuts two tokenizations of the same bytes into the smallest groups whose ends coincide, as ALM (arXiv:2503.20083) and
/// GOLD do. Arguments are the bytes of each token. One without any, as a BOS, joins the group that begins there; those at
/// the end of both sides, as an EOS, are a group of their own, and at the end of one side belong to its last group.
///
/// # Errors
/// If the two cover different numbers of bytes.
pub fn groups(student: &[usize], teacher: &[usize]) -> Result<Vec<Group>> {
    let (all, others) = (student.iter().sum::<usize>(), teacher.iter().sum::<usize>());
    if all != others {
        return Err(Error::Invalid(format!(
            "the student's tokens cover {all} bytes, the teacher's {others}: not the same text"
        )));
    }
    let ends = [student, teacher].map(|side| side.iter().rev().take_while(|&&b| b == 0).count());
    if all > 0 && ends.iter().all(|&end| end > 0) {
        let [s, t] = [student.len() - ends[0], teacher.len() - ends[1]];
        let mut found = groups(&student[..s], &teacher[..t])?;
        found.push(Group {
            student: s..student.len(),
            teacher: t..teacher.len(),
        });
        return Ok(found);
    }
    let mut groups = Vec::new();
    let (mut s, mut t) = (0, 0);
    while s < student.len() || t < teacher.len() {
        let (first_s, first_t) = (s, t);
        let (mut here, mut there) = (0, 0);
        // The side that is behind takes its next token, until both have come equally far.
        loop {
            match (here <= there && s < student.len(), t < teacher.len()) {
                (true, _) => {
                    here += student[s];
                    s += 1;
                }
                (false, true) => {
                    there += teacher[t];
                    t += 1;
                }
                (false, false) => break, // the rest of the student has no bytes left to match
            }
            if here == there && here > 0 {
                break;
            }
        }
        (s, t) = (past_empty_end(student, s), past_empty_end(teacher, t));
        groups.push(Group {
            student: first_s..s,
            teacher: first_t..t,
        });
    }
    Ok(groups)
}

/// Tokens without bytes at the very end belong to the last group.
fn past_empty_end(tokens: &[usize], at: usize) -> usize {
    match tokens[at..].iter().all(|&bytes| bytes == 0) {
        true => tokens.len(),
        false => at,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(student: &[usize], teacher: &[usize]) -> Vec<(Range<usize>, Range<usize>)> {
        let found = groups(student, teacher).expect("same text");
        found.into_iter().map(|g| (g.student, g.teacher)).collect()
    }

    #[test]
    fn tokens_without_bytes_join_a_group_on_either_side() {
        // A BOS of the student, one of the teacher, an end token of the student.
        assert_eq!(of(&[0, 3, 2], &[3, 2]), [(0..2, 0..1), (2..3, 1..2)]);
        assert_eq!(of(&[3, 2], &[0, 3, 2]), [(0..1, 0..2), (1..2, 2..3)]);
        assert_eq!(of(&[3, 2, 0], &[3, 2]), [(0..1, 0..1), (1..3, 1..2)]);
        assert_eq!(of(&[], &[]), []);
        // End tokens of both predict the end after the same bytes.
        let ends = [(0..1, 0..2), (1..2, 2..4)];
        assert_eq!(of(&[3, 0], &[2, 1, 0, 0]), ends);
        assert_eq!(of(&[0], &[0, 0]), [(0..1, 0..2)]);
    }

    #[test]
    fn offsets_are_those_of_the_answer_without_the_space_that_one_side_has() {
        let of = |student: &[&str], teacher: &[&str]| {
            let bytes = |side: &[&str]| side.iter().map(|t| t.as_bytes().to_vec()).collect();
            let [s, t]: [Vec<Vec<u8>>; 2] = [bytes(student), bytes(teacher)];
            let s: Vec<&[u8]> = s.iter().map(Vec::as_slice).collect();
            let t: Vec<&[u8]> = t.iter().map(Vec::as_slice).collect();
            offsets(&s, &t)
        };
        let (s, t) = of(&[" Par", "is", ""], &["Paris", "", "\n"]).expect("one answer");
        assert_eq!(s, [(0, 3), (3, 5), (5, 5)]);
        assert_eq!(t, [(0, 5), (5, 5), (5, 5)]);
        // A space that both have is a byte like any other.
        let (s, t) = of(&[" ", "a"], &[" a"]).expect("one answer");
        assert_eq!((s, t), (vec![(0, 1), (1, 2)], vec![(0, 2)]));
        let error = of(&["Paris"], &["Pa", "lermo"])
            .expect_err("refused")
            .to_string();
        assert!(
            error.contains("byte 2") && error.contains("Palermo"),
            "{error}"
        );
        assert_eq!(of(&["", ""], &[]).expect("nothing").0, [(0, 0), (0, 0)]);
    }

    #[test]
    fn a_character_split_on_one_side_is_one_group() {
        // Four bytes of one character, token by token, beside a single token.
        assert_eq!(of(&[1, 1, 2, 5], &[4, 5]), [(0..3, 0..1), (3..4, 1..2)]);
    }

    #[test]
    fn different_texts_are_refused() {
        let error = groups(&[3, 2], &[4]).expect_err("refused").to_string();
        assert!(error.contains("5 bytes") && error.contains('4'), "{error}");
    }

    proptest! {
        #[test]
        fn groups_are_the_smallest_that_partition_both_sides(
            student in prop::collection::vec(1usize..5, 0..20), cuts in prop::collection::vec(any::<bool>(), 100),
        ) {
            // The teacher cuts the same bytes elsewhere.
            let bytes: usize = student.iter().sum();
            let mut teacher = Vec::new();
            let mut length = 0;
            for (at, &cut) in (1..=bytes).zip(&cuts) {
                length += 1;
                if at == bytes || cut {
                    teacher.push(std::mem::take(&mut length));
                }
            }
            let found = groups(&student, &teacher).expect("same text");
            let (mut s, mut t) = (0, 0);
            for g in &found {
                prop_assert_eq!((g.student.start, g.teacher.start), (s, t));
                (s, t) = (g.student.end, g.teacher.end);
                let ends = |lens: &[usize]| -> Vec<usize> {
                    lens.iter().scan(0, |sum, &n| { *sum += n; Some(*sum) }).collect()
                };
                let (a, b) = (ends(&student[g.student.clone()]), ends(&teacher[g.teacher.clone()]));
                prop_assert_eq!(a.last(), b.last());
                let shared = a.iter().filter(|end| b.contains(end)).count();
                prop_assert_eq!(shared, 1, "{:?} could be cut", g);
            }
            prop_assert_eq!((s, t), (student.len(), teacher.len()));
        }
    }
}
