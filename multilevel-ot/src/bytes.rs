//! Groups of tokens that cover the same bytes in two tokenizations of one text.

use std::ops::Range;

use crate::{Error, Result};

/// Tokens of both sides that cover the same bytes; none could be cut into two such groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// Tokens of the student.
    pub student: Range<usize>,
    /// Tokens of the teacher.
    pub teacher: Range<usize>,
}

/// Cuts two tokenizations of the same bytes into the smallest groups whose ends coincide, as ALM (arXiv:2503.20083) and
/// GOLD do. Arguments are the bytes of each token; one without any, as a BOS, joins the group that begins there.
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
