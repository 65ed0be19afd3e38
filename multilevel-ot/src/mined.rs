use std::sync::Arc;

use serde::Deserialize;

use crate::answer::Pair;
use crate::chunks::{Part, Sequence};
use crate::loss::{Evaluation, Objective, aligner, mean_of_sequences};
use crate::top::heaviest;
use crate::vocabulary::edits;
use crate::{Error, Nearest, Result, Scalar, Vocabulary};

/// Constants of [`MinEd`].
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MinEdSettings {
    /// Weight of `ce`.
    pub ce_weight: f64,
    /// Weight of `kl`.
    pub distillation_weight: f64,
    /// Temperature of both sides in `kl`.
    pub temperature: f64,
    /// How many of the teacher's tokens are carried over at a position.
    pub k: usize,
}

impl Default for MinEdSettings {
    fn default() -> Self {
        Self {
            ce_weight: 0.9,
            distillation_weight: 0.1,
            temperature: 1.0,
            k: 10,
        }
    }
}

/// Minimum edit distance alignment (MinED, FuseLLM, arXiv:2401.10491): cross entropy, and the divergence (`kl`) from what the
/// teacher expects, its tokens replaced by the student's nearest, where the two cut the text alike, and from the answer's
/// token elsewhere.
///
/// Answers are aligned by dynamic time warping over the edit distances of their tokens. A student's token that is aligned
/// with one teacher's token alone, which is its nearest, takes the `k` heaviest of the teacher's logits there; of two that come
/// to the same token the heavier one counts. `total = ce_weight ce + distillation_weight kl`, means over a sequence's
/// tokens, and over sequences.
#[derive(Debug, Clone)]
pub struct MinEd {
    settings: MinEdSettings,
    student: Arc<Vocabulary>,
    teacher: Arc<Vocabulary>,
    nearest: Arc<Nearest>,
}

impl MinEd {
    /// # Errors
    /// On constants outside their range.
    pub fn new(settings: MinEdSettings, student: Vocabulary, teacher: Vocabulary) -> Result<Self> {
        if settings.k == 0 {
            return Err(Error::Invalid("k must be at least 1".into()));
        }
        Ok(Self {
            settings,
            nearest: Arc::new(Nearest::new(teacher.clone(), &student)),
            student: Arc::new(student),
            teacher: Arc::new(teacher),
        })
    }

    /// The teacher's token that each of the student's stands for, where it is one alone that is mapped to it.
    fn alike(&self, student: &[usize], teacher: &[usize]) -> Vec<Option<usize>> {
        let own: Vec<&[u8]> = student.iter().map(|&t| self.student.get(t)).collect();
        let others: Vec<&[u8]> = teacher.iter().map(|&t| self.teacher.get(t)).collect();
        let mut partners = vec![Vec::new(); student.len()];
        for (i, j) in warp(&own, &others) {
            partners[i].push(j);
        }
        let alone = |(partners, &token): (Vec<usize>, &usize)| match partners[..] {
            [j] => {
                let nearest = self.nearest.get(teacher[j] as u32);
                (nearest == Some(token as u32)).then_some(j)
            }
            _ => None,
        };
        partners.into_iter().zip(student).map(alone).collect()
    }
}

/// The cheapest monotone path through the edit distances of tokens, as pairs of places; none where a side is empty.
fn warp(a: &[&[u8]], b: &[&[u8]]) -> Vec<(usize, usize)> {
    let (n, m) = (a.len(), b.len());
    if n == 0 || m == 0 {
        return Vec::new();
    }
    let mut cost = vec![0usize; n * m];
    for i in 0..n {
        for j in 0..m {
            let before = [
                (i > 0 && j > 0).then(|| cost[(i - 1) * m + j - 1]),
                (i > 0).then(|| cost[(i - 1) * m + j]),
                (j > 0).then(|| cost[i * m + j - 1]),
            ];
            let before = before.into_iter().flatten().min().unwrap_or(0);
            cost[i * m + j] = before + edits(a[i], b[j]);
        }
    }
    let (mut i, mut j) = (n - 1, m - 1);
    let mut path = vec![(i, j)];
    while i > 0 || j > 0 {
        // Of equal ways back the diagonal one, then along the teacher.
        let ways = [(1, 1), (0, 1), (1, 0)];
        let possible = ways.into_iter().filter(|&(di, dj)| di <= i && dj <= j);
        let best = possible.min_by_key(|&(di, dj)| cost[(i - di) * m + j - dj]);
        let Some((di, dj)) = best else { break };
        (i, j) = (i - di, j - dj);
        path.push((i, j));
    }
    path.reverse();
    path
}

impl Objective for MinEd {
    fn parts(&self) -> Vec<(&'static str, f64)> {
        vec![
            ("ce", self.settings.ce_weight),
            ("kl", self.settings.distillation_weight),
        ]
    }

    fn evaluate<F: Scalar>(
        &self,
        pair: &Pair<'_, F>,
        weights: &[f64],
        gradient: Option<&mut [F]>,
    ) -> Result<Evaluation> {
        let temperature = self.settings.temperature;
        if self.settings.k > pair.teacher.vocab {
            return Err(Error::Invalid(format!(
                "k = {} is more than the {} tokens of the teacher",
                self.settings.k, pair.teacher.vocab
            )));
        }
        mean_of_sequences(pair, gradient, |b, share, mut gradient| {
            let s = Sequence::read(pair, b, temperature, temperature)?;
            let ce = s.cross_entropy(weights[0] * share, gradient.as_deref_mut());
            let alike = self.alike(&s.answer.tokens, &s.teacher_answer.tokens);
            let each = 1.0 / s.answer.tokens.len().max(1) as f64;
            let factor = F::of(weights[1] * share * each);
            let of_row = |row: usize, part: Option<Part<'_, F>>| {
                let (token, alike) = (s.answer.tokens[row], alike[row]);
                let mut target: Vec<(usize, F)> = Vec::new();
                let row_of_teacher = alike.map(|j| s.teacher.x[j]);
                for t in row_of_teacher
                    .into_iter()
                    .flat_map(|x| heaviest(x, self.settings.k))
                {
                    let id = self.nearest.get(t as u32).map(|id| id as usize);
                    let Some(id) = id.filter(|id| *id < pair.student.vocab) else {
                        continue;
                    };
                    if target.iter().all(|(known, _)| *known != id) {
                        let x = row_of_teacher.map_or(F::zero(), |x| x[t]);
                        target.push((id, x / F::of(temperature)));
                    }
                }
                if target.is_empty() {
                    target.push((token, F::zero()));
                }
                let max = target.iter().map(|t| t.1).fold(F::neg_infinity(), F::max);
                let total = max + target.iter().map(|t| (t.1 - max).exp()).sum::<F>().ln();
                let mut terms = Vec::with_capacity(target.len());
                let mut part = part;
                for &(id, x) in &target {
                    let log = x - total;
                    let expected = log.exp();
                    if expected > F::zero() {
                        let below = log - s.student.log_probability(row, temperature, id);
                        terms.push(each * (expected * below).wide());
                    }
                    if let Some(part) = &mut part {
                        let out = s.out(part, row);
                        out[id] = out[id] - factor * expected / F::of(temperature);
                    }
                }
                if let Some(part) = &mut part {
                    let out = s.out(part, row);
                    s.student
                        .add_probabilities(row, temperature, factor / F::of(temperature), out);
                }
                terms
            };
            let found = s.by_row(gradient, of_row);
            let kl = found.into_iter().flatten().fold(0.0, |kl, of| kl + of);
            let mapped = alike.iter().flatten().count();
            Ok(Evaluation {
                parts: vec![ce, kl],
                notes: vec![("mapped", mapped as f64 * each)],
            })
        })
    }
}

aligner!(MinEd, offsets: false);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_warp_along_the_least_edits() {
        let side = |tokens: &[&'static str]| -> Vec<&'static [u8]> {
            tokens.iter().map(|t| t.as_bytes()).collect()
        };
        // hou costs 2 beside house and 3 beside the; se costs 3 beside house.
        let path = warp(&side(&["the", "hou", "se"]), &side(&["the", "house"]));
        assert_eq!(path, [(0, 0), (1, 1), (2, 1)]);
        assert_eq!(warp(&side(&["a"]), &[]), []);
    }

    #[test]
    fn only_a_token_aligned_with_one_that_it_is_the_nearest_to_is_alike() {
        let vocabulary = crate::vocabulary::tests::vocabulary;
        let student = vocabulary(&["", "the", "hou", "se", "cats"]);
        let teacher = vocabulary(&["", "the", "house", "cat", "ca", "ts"]);
        let mined = MinEd::new(MinEdSettings::default(), student, teacher).expect("settings");
        // the | hou se | cats against the | house | cat: house's nearest is hou, cat's is cats.
        let alike = mined.alike(&[1, 2, 3, 4], &[1, 2, 3]);
        assert_eq!(alike, [Some(0), Some(1), None, Some(2)]);
        // Two of the teacher's for one of the student's.
        assert_eq!(mined.alike(&[1, 4], &[1, 4, 5]), [Some(0), None]);
    }
}
