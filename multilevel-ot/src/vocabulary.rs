//! Vocabularies side by side: which tokens of one are tokens of the other, or nearest to one, or made of some.

use std::collections::HashMap;
use std::sync::Mutex;

use scylla_core::text::Tokenizer;

use crate::{Error, Result};

/// Bytes of each token of a tokenizer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Vocabulary {
    /// By id; none for special tokens.
    pub bytes: Vec<Vec<u8>>,
    /// Ids that end a text; those of two vocabularies match in their order.
    pub ends: Vec<u32>,
}

impl Vocabulary {
    /// The vocabulary of a tokenizer.
    pub fn of(tokenizer: &Tokenizer) -> Self {
        let ids = 0..tokenizer.size() as u32;
        let bytes = ids.map(|id| tokenizer.token_bytes(id).unwrap_or_default().to_vec());
        Self {
            bytes: bytes.collect(),
            ends: tokenizer.eos().to_vec(),
        }
    }

    /// Bytes of a token; none for one outside the vocabulary.
    pub fn get(&self, id: usize) -> &[u8] {
        self.bytes.get(id).map_or(&[], Vec::as_slice)
    }

    /// Ids by bytes; of several the lowest.
    fn ids(&self) -> HashMap<&[u8], u32> {
        let tokens = self.bytes.iter().enumerate().rev();
        let some = tokens.filter(|(_, bytes)| !bytes.is_empty());
        some.map(|(id, bytes)| (bytes.as_slice(), id as u32))
            .collect()
    }

    /// For each token the one of `other` with the same bytes, or that ends a text as it does.
    pub fn exact(&self, other: &Self) -> Vec<Option<u32>> {
        let ids = other.ids();
        let of = |bytes: &Vec<u8>| ids.get(bytes.as_slice()).copied();
        let mut map: Vec<Option<u32>> = self.bytes.iter().map(of).collect();
        for (&own, &end) in self.ends.iter().zip(&other.ends) {
            if let Some(place) = map.get_mut(own as usize) {
                *place = Some(end);
            }
        }
        map
    }
}

/// Tokens of one vocabulary by the nearest of another: that with the same bytes, else the first of least edit distance.
#[derive(Debug)]
pub struct Nearest {
    from: Vocabulary,
    exact: Vec<Option<u32>>,
    /// Tokens of the other vocabulary by their length.
    by_length: Vec<Vec<(u32, Vec<u8>)>>,
    /// What was found so far: a search passes over most of the vocabulary, and few tokens are ever asked for.
    found: Mutex<HashMap<u32, Option<u32>>>,
}

impl Nearest {
    /// Maps tokens of `from` to such of `to`.
    pub fn new(from: Vocabulary, to: &Vocabulary) -> Self {
        let mut by_length = Vec::new();
        for (id, bytes) in to.bytes.iter().enumerate().filter(|(_, b)| !b.is_empty()) {
            if by_length.len() <= bytes.len() {
                by_length.resize(bytes.len() + 1, Vec::new());
            }
            by_length[bytes.len()].push((id as u32, bytes.clone()));
        }
        Self {
            exact: from.exact(to),
            from,
            by_length,
            found: Mutex::default(),
        }
    }

    /// The nearest token; `None` for special tokens without counterpart.
    pub fn get(&self, token: u32) -> Option<u32> {
        if let Some(exact) = self.exact.get(token as usize).copied().flatten() {
            return Some(exact);
        }
        let bytes = self.from.get(token as usize);
        if bytes.is_empty() {
            return None;
        }
        // Whoever panicked before left what was found.
        let known = |map: &Mutex<HashMap<u32, Option<u32>>>| {
            let map = map.lock().unwrap_or_else(|e| e.into_inner());
            map.get(&token).copied()
        };
        if let Some(found) = known(&self.found) {
            return found;
        }
        let found = self.search(bytes);
        let mut all = self.found.lock().unwrap_or_else(|e| e.into_inner());
        all.insert(token, found);
        found
    }

    fn search(&self, bytes: &[u8]) -> Option<u32> {
        let mut best: Option<(usize, u32)> = None;
        // Lengths that differ by d are at least d edits apart.
        for apart in 0..self.by_length.len().max(bytes.len()) {
            if best.is_some_and(|(distance, _)| distance < apart) {
                break;
            }
            let lengths = [bytes.len().checked_sub(apart), Some(bytes.len() + apart)];
            let lengths = lengths
                .into_iter()
                .flatten()
                .take(if apart == 0 { 1 } else { 2 });
            for (id, other) in lengths.filter_map(|n| self.by_length.get(n)).flatten() {
                let distance = edits(bytes, other);
                if best.is_none_or(|b| (distance, *id) < b) {
                    best = Some((distance, *id));
                }
            }
        }
        best.map(|(_, id)| id)
    }
}

/// Levenshtein distance of bytes.
pub fn edits(a: &[u8], b: &[u8]) -> usize {
    strsim::generic_levenshtein(&a.to_vec(), &b.to_vec())
}

/// A sparse map of distributions over one vocabulary to such over another: for each token those it is spread over, with
/// weights that sum to 1.
#[derive(Debug, Clone, PartialEq)]
pub struct Projection {
    /// Where each token's entries end.
    ends: Vec<usize>,
    entries: Vec<(u32, f32)>,
}

impl Projection {
    /// Pieces that a token is spread over at most.
    const PIECES: usize = 4;

    /// From `from` to `to`: a token that both have to itself, another to the pieces that `tokenize` makes of its bytes, with
    /// weights `0.9 * 0.1^i`, of which the first four are kept (X-Token, arXiv:2605.21699). Special tokens without
    /// counterpart go nowhere.
    ///
    /// # Errors
    /// If `tokenize` names a token outside `to`.
    pub fn new(
        from: &Vocabulary,
        to: &Vocabulary,
        tokenize: impl Fn(&[u8]) -> Vec<u32>,
    ) -> Result<Self> {
        let exact = from.exact(to);
        let mut all = Self {
            ends: Vec::with_capacity(from.bytes.len()),
            entries: Vec::new(),
        };
        for (bytes, exact) in from.bytes.iter().zip(exact) {
            let first = all.entries.len();
            match exact {
                Some(id) => all.entries.push((id, 1.0)),
                None if bytes.is_empty() => {}
                None => {
                    let pieces = tokenize(bytes).into_iter().take(Self::PIECES);
                    let mut weight = 0.9;
                    for id in pieces {
                        let own = &mut all.entries;
                        match own[first..].iter_mut().find(|(known, _)| *known == id) {
                            Some((_, sum)) => *sum += weight,
                            None => own.push((id, weight)),
                        }
                        weight *= 0.1;
                    }
                }
            }
            let own = &mut all.entries[first..];
            if let Some((id, _)) = own.iter().find(|(id, _)| *id as usize >= to.bytes.len()) {
                return Err(Error::Invalid(format!(
                    "piece {id} is outside the vocabulary of {}",
                    to.bytes.len()
                )));
            }
            let total: f32 = own.iter().map(|(_, w)| w).sum();
            own.iter_mut().for_each(|(_, w)| *w /= total);
            all.ends.push(all.entries.len());
        }
        Ok(all)
    }

    /// From one tokenizer to another.
    ///
    /// # Errors
    /// Of the tokenizer.
    pub fn between(from: &Tokenizer, to: &Tokenizer) -> Result<Self> {
        let vocabulary = Vocabulary::of(to);
        let ids = vocabulary.ids();
        let longest = vocabulary.bytes.iter().map(Vec::len).max().unwrap_or(0);
        let tokenize = |bytes: &[u8]| {
            // What is no text, or comes back as another one, is cut into the longest tokens there are.
            let text = std::str::from_utf8(bytes).ok();
            let pieces = text.and_then(|text| to.encode_plain(text).ok());
            let same = |pieces: &Vec<u32>| {
                let spelled = pieces
                    .iter()
                    .map(|&id| to.token_bytes(id).unwrap_or_default());
                spelled.collect::<Vec<_>>().concat() == bytes
            };
            pieces
                .filter(same)
                .unwrap_or_else(|| longest_first(bytes, &ids, longest))
        };
        Self::new(&Vocabulary::of(from), &vocabulary, tokenize)
    }

    /// Tokens that are mapped.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// What a token is spread over, with weights.
    pub fn get(&self, token: usize) -> &[(u32, f32)] {
        let Some(&end) = self.ends.get(token) else {
            return &[];
        };
        let start = token.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.entries[start..end]
    }
}

fn longest_first(bytes: &[u8], ids: &HashMap<&[u8], u32>, longest: usize) -> Vec<u32> {
    let (mut at, mut pieces) = (0, Vec::new());
    while at < bytes.len() {
        let lengths = (1..=longest.min(bytes.len() - at)).rev();
        let mut known = lengths.filter_map(|n| Some((n, *ids.get(&bytes[at..at + n])?)));
        match known.next() {
            Some((n, id)) => {
                pieces.push(id);
                at += n;
            }
            None => at += 1, // no token for this byte
        }
    }
    pieces
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn vocabulary(tokens: &[&str]) -> Vocabulary {
        Vocabulary {
            bytes: tokens.iter().map(|t| t.as_bytes().to_vec()).collect(),
            ends: vec![0],
        }
    }

    #[test]
    fn tokens_match_by_bytes_and_ends_by_role() {
        let (own, other) = (
            vocabulary(&["", "a", "bc", "", "x"]),
            vocabulary(&["", "x", "a", "a", "b"]),
        );
        let expected = [Some(0), Some(2), None, None, Some(1)];
        assert_eq!(own.exact(&other), expected);
    }

    #[test]
    fn the_nearest_token_is_the_first_of_least_edit_distance() {
        let to = vocabulary(&["", "house", "horse", "mouse", "h", "hourses"]);
        let from = vocabulary(&["", "hours", "zzzzzzzzzzzzzzzzzzzz", "mouse", "ho", ""]);
        let map = Nearest::new(from.clone(), &to);
        for (id, bytes) in from.bytes.iter().enumerate().filter(|(_, b)| !b.is_empty()) {
            let all = to.bytes.iter().enumerate().skip(1);
            let best = all.min_by_key(|(id, other)| (edits(bytes, other), *id));
            assert_eq!(map.get(id as u32), best.map(|(id, _)| id as u32), "{id}");
            assert_eq!(map.get(id as u32), best.map(|(id, _)| id as u32), "{id}");
        }
        assert_eq!((map.get(0), map.get(5), map.get(99)), (Some(0), None, None));
    }

    #[test]
    fn a_projection_spreads_what_is_no_token_over_its_pieces() {
        let from = vocabulary(&["", "2026", "a", "", "aa"]);
        let to = vocabulary(&["", "2", "0", "6", "a"]);
        let ids = to.ids();
        let w = Projection::new(&from, &to, |bytes| longest_first(bytes, &ids, 1)).expect("fits");
        assert_eq!(w.get(2), [(4, 1.0)]);
        assert_eq!(w.get(3), []);
        assert_eq!((w.len(), w.get(7)), (5, &[][..]));
        // 2, 0, 2 and 6: the second 2 adds to the first.
        let total = 0.9 + 0.09 + 0.009 + 0.0009;
        let expected = [(1, 0.909 / total), (2, 0.09 / total), (3, 0.0009 / total)];
        for ((id, weight), (known, expected)) in w.get(1).iter().zip(expected) {
            assert_eq!(*id, known);
            assert!((weight - expected).abs() < 1e-6, "{weight} {expected}");
        }
        assert_eq!(w.get(4).len(), 1);
        for token in [1, 2, 4] {
            let sum: f32 = w.get(token).iter().map(|(_, w)| w).sum();
            assert!((sum - 1.0).abs() < 1e-6);
        }
        assert!(Projection::new(&from, &to, |_| vec![9]).is_err());
    }
}
