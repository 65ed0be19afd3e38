//! Documents packed into lines of equal length, in an order that a seed decides: a stream that goes on where it stopped.

use std::ops::Range;

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use scylla_core::train::graph::PackedRows;
use serde::{Deserialize, Serialize};

use super::documents::Document;
use crate::{Error, Result};

/// Where a stream stands: everything behind follows from it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// How often all documents were gone through.
    pub epoch: u64,
    /// Which document of the epoch is next.
    pub document: usize,
    /// Its first token that was not given out.
    pub offset: usize,
}

/// Lines of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lines {
    /// Which rows belong together.
    pub rows: PackedRows,
    /// Tokens `[M]`; what fills a line up is 0.
    pub tokens: Vec<u32>,
    /// Rows that are trained on.
    pub mask: Vec<bool>,
    /// Which documents they are of, pieces of one document each for itself.
    pub of: Vec<usize>,
    /// Where each piece begins in its document.
    pub from: Vec<usize>,
}

/// Packs documents into lines of `length` tokens, shuffled anew for each epoch.
///
/// A document longer than a line is cut; a text is cut where a line ends, a conversation begins a new line instead if it fits
/// one. Pieces shorter than two tokens teach nothing and are left out.
pub struct Stream<'a> {
    documents: &'a [Document],
    length: usize,
    seed: u64,
    order: Vec<u32>,
    ordered: Option<u64>,
    at: Position,
}

impl<'a> Stream<'a> {
    /// A stream that goes on from a position.
    ///
    /// # Errors
    /// If there is nothing to train on, or the position is none of this data.
    pub fn new(documents: &'a [Document], length: usize, seed: u64, at: Position) -> Result<Self> {
        if length < 2 {
            return Err(Error::Experiment(format!(
                "train.length {length}: expected at least 2"
            )));
        }
        if !documents.iter().any(|d| d.mask.contains(&true)) {
            return Err(Error::Experiment(
                "no token of the data is trained on: all masks are empty".into(),
            ));
        }
        let within = at.offset > 0;
        if at.document > documents.len() || within && at.document == documents.len() {
            return Err(Error::Experiment(format!(
                "document {} of {} is where training stopped",
                at.document,
                documents.len()
            )));
        }
        Ok(Self {
            documents,
            length,
            seed,
            order: Vec::new(),
            ordered: None,
            at,
        })
    }

    /// Where it stands.
    pub fn position(&self) -> Position {
        self.at
    }

    /// The next document, or the rest of it.
    fn next(&mut self) -> usize {
        if self.at.document >= self.documents.len() {
            self.at = Position {
                epoch: self.at.epoch + 1,
                ..Position::default()
            };
        }
        if self.ordered != Some(self.at.epoch) {
            self.order = (0..self.documents.len() as u32).collect();
            let mut seeds = StdRng::seed_from_u64(self.seed);
            let key = (0..=self.at.epoch)
                .map(|_| seeds.random::<u64>())
                .last()
                .unwrap_or(self.seed);
            self.order.shuffle(&mut StdRng::seed_from_u64(key));
            self.ordered = Some(self.at.epoch);
        }
        self.order[self.at.document] as usize
    }

    /// The next lines.
    pub fn lines(&mut self, count: usize) -> Result<Lines> {
        let length = self.length;
        let mut tokens = Vec::with_capacity(count * length);
        let mut mask = Vec::with_capacity(count * length);
        let mut ranges: Vec<Range<usize>> = Vec::new();
        let (mut of, mut from): (Vec<usize>, Vec<usize>) = (Vec::new(), Vec::new());
        for line in 0..count {
            let end = (line + 1) * length;
            while tokens.len() < end {
                let room = end - tokens.len();
                let index = self.next();
                let document = &self.documents[index];
                let Some(rest) = document.tokens.len().checked_sub(self.at.offset) else {
                    return Err(Error::Experiment(format!(
                        "token {} of {}, which has {}: the data are not those that training stopped in",
                        self.at.offset,
                        document.name,
                        document.tokens.len()
                    )));
                };
                let text = document.mask.iter().all(|&m| m);
                // A line holds a text's beginning, or a conversation whole.
                let fits = rest <= room || text || (rest > length && room == length);
                if (!fits || room < 2) && room < length {
                    break;
                }
                let taken = rest.min(room);
                if taken >= 2 {
                    let piece = self.at.offset..self.at.offset + taken;
                    let first = tokens.len();
                    tokens.extend_from_slice(&document.tokens[piece.clone()]);
                    mask.extend_from_slice(&document.mask[piece]);
                    ranges.push(first..tokens.len());
                    of.push(index);
                    from.push(self.at.offset);
                }
                if taken == rest {
                    self.at.document += 1;
                    self.at.offset = 0;
                } else {
                    self.at.offset += taken;
                }
            }
            if tokens.len() < end {
                ranges.push(tokens.len()..end);
                of.push(usize::MAX);
                from.push(0);
                tokens.resize(end, 0);
                mask.resize(end, false);
            }
        }
        Ok(Lines {
            rows: PackedRows::new(count, length, ranges)?,
            tokens,
            mask,
            of,
            from,
        })
    }
}

impl Lines {
    /// Names of the documents that a batch holds, each once.
    pub fn names<'a>(&self, documents: &'a [Document]) -> Vec<&'a str> {
        let mut names: Vec<&str> = Vec::new();
        for document in self.of.iter().filter_map(|&i| documents.get(i)) {
            if !names.contains(&document.name.as_str()) {
                names.push(&document.name);
            }
        }
        names
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Every token of every document is another.
    fn documents(sizes: &[(usize, bool)]) -> Vec<Document> {
        let mut next = 1;
        let mut one = |(i, &(size, text)): (usize, &(usize, bool))| {
            let tokens: Vec<u32> = (next..next + size as u32).collect();
            next += size as u32;
            Document {
                name: format!("document {i}"),
                mask: (0..size).map(|t| text || t > 0).collect(),
                tokens,
            }
        };
        sizes.iter().enumerate().map(&mut one).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        /// However it is cut into batches, or broken off and gone on with, the stream is the same; and in an epoch every
        /// token comes once, those alone in a piece aside.
        #[test]
        fn a_stream_is_the_same_however_it_is_taken(
            sizes in prop::collection::vec((2usize..40, any::<bool>()), 1..12),
            length in 2usize..30,
            seed in 0u64..1000,
            cuts in prop::collection::vec(1usize..4, 1..6),
        ) {
            let all = documents(&sizes);
            let total: usize = cuts.iter().sum();
            let whole = Stream::new(&all, length, seed, Position::default()).expect("stream").lines(total).expect("lines");
            let (mut tokens, mut mask, mut at) = (Vec::new(), Vec::new(), Position::default());
            for cut in cuts {
                let mut stream = Stream::new(&all, length, seed, at).expect("goes on");
                let lines = stream.lines(cut).expect("lines");
                prop_assert_eq!(lines.rows.count(), cut * length);
                tokens.extend(lines.tokens);
                mask.extend(lines.mask);
                at = stream.position();
            }
            prop_assert_eq!(&tokens, &whole.tokens);
            prop_assert_eq!(&mask, &whole.mask);
            for range in whole.rows.documents.iter() {
                let piece = &whole.tokens[range.clone()];
                prop_assert!(piece.iter().all(|&t| t == 0) || piece.windows(2).all(|w| w[1] == w[0] + 1));
            }
            // Enough lines for an epoch.
            let mut stream = Stream::new(&all, length, seed, Position::default()).expect("stream");
            let mut found = Vec::new();
            while stream.position().epoch == 0 && stream.position().document < all.len() {
                found.extend(stream.lines(1).expect("line").tokens);
            }
            let first_epoch: usize = sizes.iter().map(|(s, _)| s).sum();
            let mut once: Vec<u32> = found.into_iter().filter(|&t| t > 0).collect();
            once.sort_unstable();
            let twice = once.windows(2).filter(|w| w[0] == w[1]).count();
            let pieces = first_epoch / (length - 1).max(1) + all.len();
            prop_assert!(once.len() - twice + 2 * pieces >= first_epoch, "{} of {first_epoch} tokens", once.len());
        }
    }

    #[test]
    fn epochs_have_orders_of_their_own() {
        let all = documents(&[(4, true); 30]);
        let mut stream = Stream::new(&all, 4, 1, Position::default()).expect("stream");
        let (first, second) = (
            stream.lines(30).expect("lines").tokens,
            stream.lines(30).expect("lines").tokens,
        );
        assert_ne!(first, second);
        let sorted = |mut v: Vec<u32>| {
            v.sort_unstable();
            v
        };
        assert_eq!(sorted(first), sorted(second));
    }

    #[test]
    fn data_without_anything_to_train_on_is_refused() {
        let mut all = documents(&[(4, false)]);
        all[0].mask.fill(false);
        assert!(Stream::new(&all, 4, 1, Position::default()).is_err());
        assert!(Stream::new(&[], 4, 1, Position::default()).is_err());
        assert!(Stream::new(&documents(&[(4, true)]), 1, 1, Position::default()).is_err());
    }
}
