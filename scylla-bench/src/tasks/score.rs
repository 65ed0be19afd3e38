//! How an answer is scored against those that count as right: F1 over words as SQuAD's script has it, Rouge-L and Rouge-LSum as the
//! package `rouge-score` has them (without stemming; checked against it, `tests/fixtures/make_rouge_fixtures.py`).

use std::collections::HashMap;

/// The best F1 over words, after capitals, punctuation and articles are taken away (SQuAD, arXiv:1606.05250). Where nothing is left of
/// one side it is 1 if nothing is left of the other.
pub fn f1(said: &str, right: &[String]) -> f64 {
    best(right, |right| {
        let (said, right) = (normalised(said), normalised(right));
        if said.is_empty() || right.is_empty() {
            return f64::from(u8::from(said == right));
        }
        let mut left = counts(right.iter());
        let same = said.iter().filter(|word| take(&mut left, word)).count();
        harmonic(same, said.len(), right.len())
    })
}

/// The best Rouge-L: the longest common subsequence of words, as an F-measure.
pub fn rouge_l(said: &str, right: &[String]) -> f64 {
    best(right, |right| {
        let (said, right) = (words(said), words(right));
        harmonic(common(&right, &said).len(), said.len(), right.len())
    })
}

/// The best Rouge-LSum: of each line of the right answer what any line said has of it, in order, each word as often as both have it.
pub fn rouge_lsum(said: &str, right: &[String]) -> f64 {
    let lines = |text: &str| -> Vec<Vec<String>> {
        let lines = text.split('\n').filter(|line| !line.is_empty());
        lines.map(words).collect()
    };
    best(right, |right| {
        let (said, right) = (lines(said), lines(right));
        let total = |lines: &[Vec<String>]| lines.iter().map(Vec::len).sum::<usize>();
        let mut left = [&said, &right].map(|side| counts(side.iter().flatten()));
        let mut hits = 0;
        for line in &right {
            let mut found: Vec<usize> = said.iter().flat_map(|said| common(line, said)).collect();
            found.sort_unstable();
            found.dedup();
            for at in found {
                let word = &line[at];
                let [said, right] = &mut left;
                if said.get(word).is_some_and(|n| *n > 0) && take(right, word) {
                    take(said, word);
                    hits += 1;
                }
            }
        }
        harmonic(hits, total(&said), total(&right))
    })
}

fn best(right: &[String], of: impl Fn(&str) -> f64) -> f64 {
    right.iter().map(|right| of(right)).fold(0.0, f64::max)
}

/// The harmonic mean of `same / said` and `same / right`; 0 where nothing is the same.
fn harmonic(same: usize, said: usize, right: usize) -> f64 {
    match same {
        0 => 0.0,
        same => {
            let (p, r) = (same as f64 / said as f64, same as f64 / right as f64);
            2.0 * p * r / (p + r)
        }
    }
}

fn counts<'a>(words: impl Iterator<Item = &'a String>) -> HashMap<String, usize> {
    let mut counts = HashMap::new();
    words.for_each(|w| *counts.entry(w.clone()).or_default() += 1);
    counts
}

/// Takes one of a word away, where there is one.
fn take(from: &mut HashMap<String, usize>, word: &str) -> bool {
    match from.get_mut(word) {
        Some(n) if *n > 0 => {
            *n -= 1;
            true
        }
        _ => false,
    }
}

/// Words of small letters and digits, as `rouge-score` cuts them.
fn words(text: &str) -> Vec<String> {
    let small = text.to_lowercase();
    let runs = small.split(|c: char| !c.is_ascii_lowercase() && !c.is_ascii_digit());
    runs.filter(|run| !run.is_empty())
        .map(str::to_string)
        .collect()
}

/// Words as SQuAD's script compares them.
fn normalised(text: &str) -> Vec<String> {
    let small = text.to_lowercase();
    let bare: String = small
        .chars()
        .filter(|c| !c.is_ascii_punctuation())
        .collect();
    let mut kept = String::with_capacity(bare.len());
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut rest = bare.as_str();
    while let Some(first) = rest.chars().next() {
        let end = match is_word(first) {
            true => rest.find(|c| !is_word(c)).unwrap_or(rest.len()),
            false => first.len_utf8(),
        };
        let (run, behind) = rest.split_at(end);
        kept.push_str(if ["a", "an", "the"].contains(&run) {
            " "
        } else {
            run
        });
        rest = behind;
    }
    kept.split_whitespace().map(str::to_string).collect()
}

/// Places in `of` of a longest common subsequence with `with`, the one that `rouge-score` walks back to.
fn common(of: &[String], with: &[String]) -> Vec<usize> {
    let width = with.len() + 1;
    let mut longest = vec![0u32; (of.len() + 1) * width];
    for (i, a) in of.iter().enumerate() {
        for (j, b) in with.iter().enumerate() {
            let at = (i + 1) * width + j + 1;
            longest[at] = match a == b {
                true => longest[at - width - 1] + 1,
                false => longest[at - width].max(longest[at - 1]),
            };
        }
    }
    let (mut i, mut j) = (of.len(), with.len());
    let mut found = Vec::new();
    while i > 0 && j > 0 {
        if of[i - 1] == with[j - 1] {
            found.push(i - 1);
            (i, j) = (i - 1, j - 1);
        } else if longest[i * width + j - 1] > longest[(i - 1) * width + j] {
            j -= 1;
        } else {
            i -= 1;
        }
    }
    found.reverse();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rouge_is_that_of_the_package() {
        let text = include_str!("../../../tests/fixtures/rouge_score.json");
        let cases: Vec<(String, String, f64, f64)> = serde_json::from_str(text).expect("cases");
        assert!(cases.len() > 300);
        for (right, said, l, lsum) in cases {
            let right = [right];
            let found = [rouge_l(&said, &right), rouge_lsum(&said, &right)];
            for (found, expected) in found.iter().zip([l, lsum]) {
                assert!(
                    (found - expected).abs() < 1e-12,
                    "{right:?} {said:?}: {found} for {expected}"
                );
            }
        }
    }

    #[test]
    fn f1_counts_words_without_capitals_punctuation_and_articles() {
        for (said, right, expected) in [
            ("The Elbe.", &["elbe"][..], 1.0),
            ("a river", &["the Elbe river"], 2.0 / 3.0),
            ("nothing", &["the Elbe"], 0.0),
            ("x y y", &["y y z"], 2.0 / 3.0),
            ("one", &["two", "One!"], 1.0),
            ("the", &["a"], 1.0),
            ("", &["x"], 0.0),
            ("don't", &["dont"], 1.0),
            ("a\u{2013}b", &["\u{2013}b"], 1.0),
        ] {
            let right: Vec<String> = right.iter().map(|s| s.to_string()).collect();
            let found = f1(said, &right);
            assert!(
                (found - expected).abs() < 1e-12,
                "{said:?} {right:?}: {found}"
            );
        }
    }
}
