//! Text of a sequence as it grows: whole characters only, and nothing that may yet become a stop string.

use crate::text::{TextStream, Tokenizer};

/// The text side of one sequence.
pub(super) struct TextOut {
    stream: Option<TextStream>,
    stops: Vec<String>,
    /// Decoded but not yet told, as it may begin a stop string.
    held: String,
    told: String,
}

impl TextOut {
    pub(super) fn new(tokenizer: Option<&Tokenizer>, stops: &[String]) -> Self {
        Self {
            stream: tokenizer.map(Tokenizer::stream),
            stops: stops.to_vec(),
            held: String::new(),
            told: String::new(),
        }
    }

    /// Appends a token; what may be told goes to `out`. True when a stop string was completed.
    pub(super) fn push(&mut self, token: u32, out: &mut String) -> bool {
        let Some(stream) = &mut self.stream else {
            return false;
        };
        stream.push(token, &mut self.held);
        let found = self
            .stops
            .iter()
            .filter_map(|s| self.held.find(s.as_str()))
            .min();
        if let Some(at) = found {
            self.held.truncate(at);
            self.stream = None; // nothing follows a stop string
            return true;
        }
        let keep = self
            .stops
            .iter()
            .map(|s| overlap(&self.held, s))
            .max()
            .unwrap_or(0);
        self.tell(self.held.len() - keep, out);
        false
    }

    /// Tells what was held back.
    pub(super) fn flush(&mut self, out: &mut String) {
        if let Some(stream) = &mut self.stream {
            stream.finish(&mut self.held);
        }
        self.tell(self.held.len(), out);
    }

    fn tell(&mut self, bytes: usize, out: &mut String) {
        let rest = self.held.split_off(bytes);
        out.push_str(&self.held);
        self.told.push_str(&self.held);
        self.held = rest;
    }

    pub(super) fn into_text(mut self) -> String {
        let mut rest = String::new();
        self.flush(&mut rest);
        self.told
    }
}

/// Length of the longest end of `text` that begins `stop` without completing it.
fn overlap(text: &str, stop: &str) -> usize {
    let starts = stop.char_indices().map(|(at, _)| at).rev();
    starts
        .filter(|&at| at > 0)
        .find(|&at| text.ends_with(&stop[..at]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_possible_beginning_of_a_stop_string_is_held_back() {
        assert_eq!(overlap("abc\n", "\n\n"), 1);
        assert_eq!(overlap("abc", "cab"), 1);
        assert_eq!(overlap("abca", "cab"), 2);
        assert_eq!(overlap("xyz", "cab"), 0);
        assert_eq!(overlap("é", "éa"), 2);
    }
}
