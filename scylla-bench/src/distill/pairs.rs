//! Answers as both sides read them: each with its own tokens, behind a prompt of its own, over the same bytes.

use std::collections::HashSet;
use std::ops::Range;

use multilevel_ot::bytes::{Offsets, token_offsets};
use rand::SeedableRng;
use rand::rngs::StdRng;
use scylla_core::text::{Message, Tokenizer};
use scylla_core::train::graph::PackedRows;
use sha2::{Digest, Sha256};

use super::experiment::PairSpec;
use crate::data::conversations::Conversation;
use crate::data::documents::{Content, Counts, DataSpec, hash_of_messages, hex, read};
use crate::{Error, Result};

/// One side's tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Side {
    /// Prompt and answer.
    pub tokens: Vec<u32>,
    /// Where the answer lies, behind one token at least.
    pub answer: Range<usize>,
}

impl Side {
    /// The answer's tokens.
    pub fn said(&self) -> &[u32] {
        &self.tokens[self.answer.clone()]
    }
}

/// An answer, by student and teacher.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// Its file and place there.
    pub name: String,
    /// Bytes of the answer.
    pub bytes: usize,
    /// The student's tokens.
    pub student: Side,
    /// The teacher's.
    pub teacher: Side,
    /// Texts that count as right answers; none of a piece of a text.
    pub right: Vec<String>,
    /// Where each token lies in the answer's bytes, the student's and the teacher's; a token that ends it has none.
    pub offsets: (Offsets, Offsets),
}

/// All pairs of some files.
#[derive(Debug, Clone, Default)]
pub struct Pairs {
    /// In the order of the files.
    pub all: Vec<Pair>,
    /// What became of the documents.
    pub counts: Counts,
    /// Pairs that are longer than is taken.
    pub long: usize,
    /// The first few that could not be used, with the reason.
    pub failures: Vec<String>,
    /// Sha256 over both sides' tokens.
    pub hash: String,
    /// Sha256 over the teacher's.
    pub taught: String,
    /// Hashes of the texts and questions that were taken.
    pub documents: HashSet<[u8; 32]>,
}

/// Reads documents, in the order of their hashes, and tokenises them for both. Texts and questions whose hash is in `but` are left
/// out; of the rest at most `count` pairs are made, where it is not 0.
///
/// # Errors
/// If a file cannot be read, no pair is left, or there are fewer conversations than are to be shown.
pub fn pairs_of(
    spec: &DataSpec,
    how: &PairSpec,
    count: usize,
    but: &HashSet<[u8; 32]>,
    (student, teacher): (&Tokenizer, &Tokenizer),
    on_read: &mut dyn FnMut(usize, u64),
) -> Result<Pairs> {
    let mut contents = Vec::new();
    // What both sides make of a document comes later; these tokens tell whether it holds an evaluation prompt, and how long it is.
    let bare = |content: &Content| {
        let tokens = match content {
            Content::Text(text) => teacher.encode_bare(text)?,
            Content::Talk(talk) => {
                let said = talk.messages.iter().map(|m| format!("{}\n", m.content));
                teacher.encode_bare(&said.collect::<String>())?
            }
        };
        let mask = vec![true; tokens.len()];
        Ok((tokens, mask))
    };
    let documents = read(
        spec,
        teacher,
        &bare,
        true,
        &mut |content: &Content| contents.push(content.clone()),
        on_read,
    )?;
    let mut found = Pairs {
        counts: documents.counts.clone(),
        failures: documents.failures.clone(),
        ..Pairs::default()
    };
    let names: Vec<String> = documents.all.into_iter().map(|d| d.name).collect();
    let talks: Vec<(usize, &[Message])> = contents
        .iter()
        .enumerate()
        .filter_map(|(i, content)| Some((i, talk(content)?)))
        .collect();
    if !talks.is_empty() && how.shots >= talks.len() {
        return Err(Error::Experiment(format!(
            "pairs.shots {}: part `{}` holds {} conversations, that which is asked included",
            how.shots,
            spec.part,
            talks.len()
        )));
    }
    let maker = Maker {
        how,
        student,
        teacher,
        talks,
    };
    let (mut hash, mut taught) = (Sha256::new(), Sha256::new());
    for (i, (name, content)) in names.iter().zip(&contents).enumerate() {
        if count > 0 && found.all.len() >= count {
            break;
        }
        let own = asked_hash(content);
        if but.contains(&own) {
            continue;
        }
        found.documents.insert(own);
        for pair in maker.pairs(name, content, i) {
            match pair {
                Ok(pair) if maker.is_long(&pair) => found.long += 1,
                Ok(pair) => {
                    let bytes = |side: &Side| -> Vec<u8> {
                        let start = (side.answer.start as u64).to_le_bytes();
                        let tokens = side.tokens.iter().flat_map(|t| t.to_le_bytes());
                        tokens.chain(start).collect()
                    };
                    hash.update(bytes(&pair.student));
                    hash.update(bytes(&pair.teacher));
                    taught.update(bytes(&pair.teacher));
                    found.all.push(pair);
                }
                Err(e) => {
                    found.counts.failed += 1;
                    if found.failures.len() < 5 {
                        found.failures.push(format!("{name}: {e}"));
                    }
                }
            }
        }
    }
    if count > 0 {
        found.all.truncate(count);
    }
    (found.hash, found.taught) = (hex(hash), hex(taught));
    match found.all.is_empty() {
        false => Ok(found),
        true => {
            let first = found.failures.first();
            let first = first.map_or(String::new(), |f| format!("; the first failure: {f}"));
            Err(Error::Experiment(format!(
                "no answer in part `{}`: {} documents taken that were not learned from, {} answers too long for pairs.longest {}{first}",
                spec.part,
                found.documents.len(),
                found.long,
                how.longest
            )))
        }
    }
}

fn talk(content: &Content) -> Option<&[Message]> {
    match content {
        Content::Talk(talk) => Some(&talk.messages),
        Content::Text(_) => None,
    }
}

/// What tells a text, or a question whatever its answer.
fn asked_hash(content: &Content) -> [u8; 32] {
    match talk(content).and_then(answered) {
        None => content.hash(),
        Some((before, _)) => hash_of_messages(before),
    }
}

/// Up to the last answer.
fn answered(messages: &[Message]) -> Option<(&[Message], &str)> {
    let last = messages.iter().rposition(|m| m.role == "assistant")?;
    Some((&messages[..last], &messages[last].content))
}

struct Maker<'a> {
    how: &'a PairSpec,
    student: &'a Tokenizer,
    teacher: &'a Tokenizer,
    /// All conversations, by their number among the documents; some of them stand before the teacher's question.
    talks: Vec<(usize, &'a [Message])>,
}

impl Maker<'_> {
    fn is_long(&self, pair: &Pair) -> bool {
        let longest = pair.student.tokens.len().max(pair.teacher.tokens.len());
        longest > self.how.longest
    }

    fn pairs(&self, name: &str, content: &Content, number: usize) -> Vec<Result<Pair>> {
        match content {
            Content::Text(text) => {
                let most = match self.how.pieces {
                    0 => usize::MAX,
                    some => some,
                };
                let all = pieces(text, self.how.bytes).into_iter().enumerate();
                all.take(most)
                    .map(|(i, piece)| self.text(format!("{name}, piece {}", i + 1), piece))
                    .collect()
            }
            Content::Talk(talk) => vec![self.answer(name, talk, number)],
        }
    }

    /// A piece of a text, behind nothing but the beginning of a text.
    fn text(&self, name: String, text: &str) -> Result<Pair> {
        let side = |tokenizer: &Tokenizer| -> Result<(Vec<u32>, Vec<u32>)> {
            let none = || {
                Error::Experiment(
                    "the tokenizer has no token that begins a text, nor one that ends it".into(),
                )
            };
            let begin = tokenizer.beginning().ok_or_else(none)?;
            Ok((vec![begin], tokenizer.encode_bare(text)?))
        };
        self.pair(name, side(self.student)?, side(self.teacher)?)
    }

    /// The last answer of a conversation, each side behind its own prompt, and with the token by which it ends, unless it was
    /// broken off.
    fn answer(&self, name: &str, talk: &Conversation, number: usize) -> Result<Pair> {
        let none = || Error::Experiment("the assistant says nothing in it".into());
        let (before, answer) = answered(&talk.messages).ok_or_else(none)?;
        let side = |tokenizer: &Tokenizer, before: &[Message]| -> Result<(Vec<u32>, Vec<u32>)> {
            let (prompt, end) = prompt(tokenizer, before, answer)?;
            let mut said = tokenizer.encode_bare(answer)?;
            // What was broken off does not end there.
            said.extend(end.filter(|_| !talk.cut));
            Ok((prompt, said))
        };
        // What the system says comes first.
        let system = before.iter().take_while(|m| m.role == "system").count();
        let (system, asked) = before.split_at(system);
        let shots = self.shots(number, asked)?;
        let shown = [system, &shots[..], asked].concat();
        let (own, other) = (side(self.student, before)?, side(self.teacher, &shown)?);
        let mut pair = self.pair(name.to_string(), own, other)?;
        pair.right = [answer.to_string()]
            .into_iter()
            .chain(talk.others.clone())
            .collect();
        Ok(pair)
    }

    /// Questions and answers of other conversations, none of which asks the same.
    fn shots(&self, number: usize, asked: &[Message]) -> Result<Vec<Message>> {
        if self.how.shots == 0 {
            return Ok(Vec::new());
        }
        let mut random = StdRng::seed_from_u64(number as u64);
        let order = rand::seq::index::sample(&mut random, self.talks.len(), self.talks.len());
        let others = order.into_iter().filter_map(|i| {
            let (at, messages) = self.talks[i];
            let talk: Vec<Message> = messages
                .iter()
                .filter(|m| m.role != "system")
                .cloned()
                .collect();
            let (before, answer) = answered(&talk).filter(|(b, _)| at != number && *b != asked)?;
            Some([before, &[Message::assistant(answer)]].concat())
        });
        let shots: Vec<Vec<Message>> = others.take(self.how.shots).collect();
        match shots.len() == self.how.shots {
            true => Ok(shots.concat()),
            false => Err(Error::Experiment(format!(
                "pairs.shots {}: {} other conversations have an answer and ask something else",
                self.how.shots,
                shots.len()
            ))),
        }
    }

    fn pair(
        &self,
        name: String,
        own: (Vec<u32>, Vec<u32>),
        other: (Vec<u32>, Vec<u32>),
    ) -> Result<Pair> {
        let offsets = token_offsets((self.student, &own.1), (self.teacher, &other.1))
            .map_err(|e| Error::Core(e.into()))?;
        // White space around it that one side alone has, or writes otherwise, is no part of it.
        let bytes = offsets.0.iter().map(|&(_, to)| to).max().unwrap_or(0);
        let side = |(mut tokens, said): (Vec<u32>, Vec<u32>)| -> Result<Side> {
            if tokens.is_empty() || said.is_empty() {
                return Err(Error::Experiment(
                    "an answer needs tokens, and one before them".into(),
                ));
            }
            let start = tokens.len();
            tokens.extend(said);
            let answer = start..tokens.len();
            Ok(Side { tokens, answer })
        };
        Ok(Pair {
            name,
            bytes,
            right: Vec::new(),
            student: side(own)?,
            teacher: side(other)?,
            offsets,
        })
    }
}

/// A conversation's tokens up to an answer, and the token that ends the answer, where there is one. Without a chat template messages
/// are lines of text.
fn prompt(
    tokenizer: &Tokenizer,
    before: &[Message],
    answer: &str,
) -> Result<(Vec<u32>, Option<u32>)> {
    let usual = tokenizer.eos().first().copied();
    let Some(template) = tokenizer.template() else {
        let lines: String = before.iter().map(|m| format!("{}\n", m.content)).collect();
        let mut tokens: Vec<u32> = tokenizer.beginning().into_iter().collect();
        tokens.extend(tokenizer.encode_bare(&lines)?);
        return Ok((tokens, usual));
    };
    let open = template.render(before)?;
    let closed = template.render_closed(&[before, &[Message::assistant(answer)]].concat())?;
    // What the answer spells is not what ends it.
    let said = closed.strip_prefix(&open).unwrap_or_default().trim_start();
    let behind = said.strip_prefix(answer.trim()).unwrap_or_default();
    let behind = tokenizer.encode_plain(behind)?;
    let end = behind.into_iter().find(|id| tokenizer.eos().contains(id));
    Ok((tokenizer.encode_plain(&open)?, end.or(usual)))
}

/// Pieces of at most so many bytes, cut behind white space where there is some in their second half.
fn pieces(text: &str, bytes: usize) -> Vec<&str> {
    let mut found = Vec::new();
    let mut rest = text;
    while rest.len() > bytes {
        let most = (0..=bytes).rev().find(|&at| rest.is_char_boundary(at));
        let most = most.filter(|&at| at > 0).unwrap_or(bytes);
        let space = rest[..most].rfind(char::is_whitespace);
        let cut = space.map(|at| at + rest[at..].chars().next().map_or(1, char::len_utf8));
        let (piece, behind) = rest.split_at(cut.filter(|&cut| cut > most / 2).unwrap_or(most));
        found.push(piece);
        rest = behind;
    }
    found.push(rest);
    found.retain(|piece| !piece.trim().is_empty());
    found
}

/// Sequences of one side one behind the other, and where each begins.
///
/// # Errors
/// If there is none.
pub(super) fn packed<'a>(
    sides: impl Iterator<Item = &'a Side>,
) -> Result<(PackedRows, Vec<u32>, Vec<usize>)> {
    let (mut tokens, mut begins, mut documents) = (Vec::new(), Vec::new(), Vec::new());
    for side in sides {
        begins.push(tokens.len());
        tokens.extend_from_slice(&side.tokens);
        documents.push(begins[begins.len() - 1]..tokens.len());
    }
    let rows = PackedRows::new(1, tokens.len(), documents)?;
    Ok((rows, tokens, begins))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_the_text_cut_at_characters_and_behind_white_space() {
        let text = "ein Käse, two words\nund éééééééééééééééééééééééé";
        for bytes in 16..40 {
            let found = pieces(text, bytes);
            assert_eq!(found.concat(), text);
            assert!(found.iter().all(|p| p.len() <= bytes), "{found:?}");
        }
        assert_eq!(pieces("aa bb cc dd ee ff", 16), ["aa bb cc dd ee ", "ff"]);
    }
}
