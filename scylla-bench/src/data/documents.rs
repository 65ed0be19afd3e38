//! Documents to train on: texts, rows with a text, and conversations, as tokens with the rows that are trained on.
//!
//! Which part a document belongs to follows from the hash of its text, so that a file may grow or be cut without one moving
//! from train to test. Documents that hold an evaluation prompt, whole or by thirteen tokens in a row, are left out.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use scylla_core::files::read_text;
use scylla_core::text::{Message, Tokenizer};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::conversations::{self, Conversation};
use super::parquet;
use crate::prompts;
use crate::tasks;
use crate::{Error, Result};

/// Where data comes from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataSpec {
    /// Files, or folders whose files are read in the order of their names. `.txt` and `.md` hold texts, `.jsonl`,
    /// `.json`, `.csv` and `.parquet` rows: of a `text` each, or conversations.
    pub files: Vec<PathBuf>,
    /// The line that parts the documents of a text file.
    pub separator: String,
    /// `train`, `dev`, `test` or `all`.
    pub part: String,
    /// Tokens to read at most; 0: all there are.
    pub tokens: u64,
    /// Conversations train on the assistant's answers; with this on all tokens, as texts do.
    pub whole: bool,
    /// Prompt sets whose prompts must not be in the data.
    pub keep_out: Vec<String>,
    /// A folder of features (`scylla data features`) to train on, in place of files and of the target's pass.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub features: Option<PathBuf>,
}

impl Default for DataSpec {
    fn default() -> Self {
        Self {
            files: Vec::new(),
            separator: "<|endoftext|>".into(),
            part: "train".into(),
            tokens: 0,
            whole: false,
            keep_out: vec![prompts::CORE.into()],
            features: None,
        }
    }
}

impl DataSpec {
    /// Checks what can be known without a file.
    ///
    /// # Errors
    /// Names what is wrong.
    pub fn check(&self) -> Result<()> {
        match (self.files.is_empty(), &self.features) {
            (true, None) => {
                return Err(Error::Experiment(
                    "data.files names no file to train on, nor data.features a folder".into(),
                ));
            }
            (false, Some(_)) => {
                return Err(Error::Experiment(
                    "data.files and data.features are both given: one of them (files = [])".into(),
                ));
            }
            (true, Some(_)) if self.part != "train" || self.tokens > 0 || self.whole => {
                return Err(Error::Experiment(
                    "data.part, data.tokens and data.whole were settled when the features were computed".into(),
                ));
            }
            _ => {}
        }
        if !["train", "dev", "test", "all"].contains(&self.part.as_str()) {
            let known = ["train", "dev", "test", "all"];
            return Err(scylla_core::Error::unknown("part of the data", &self.part, known).into());
        }
        Ok(())
    }
}

/// A document as a file holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// Text.
    Text(String),
    /// A conversation.
    Talk(Conversation),
}

impl Content {
    /// Its hash.
    pub fn hash(&self) -> [u8; 32] {
        match self {
            Self::Text(text) => Sha256::digest(text.as_bytes()).into(),
            Self::Talk(talk) => hash_of_messages(&talk.messages),
        }
    }
}

/// The hash of what was said.
pub(crate) fn hash_of_messages(messages: &[Message]) -> [u8; 32] {
    let mut hash = Sha256::new();
    for m in messages {
        hash.update(m.role.as_bytes());
        hash.update([0]);
        hash.update(m.content.as_bytes());
        hash.update([0]);
    }
    hash.finalize().into()
}

/// Of 256 documents two are dev and two are test.
pub fn part_of(hash: &[u8; 32]) -> &'static str {
    match hash[0] {
        0..=1 => "dev",
        2..=3 => "test",
        _ => "train",
    }
}

/// A document as it is trained on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// Its file and place there.
    pub name: String,
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// Tokens that the target says, and are trained on; in a text all.
    pub mask: Vec<bool>,
}

/// What became of what was read.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Documents read, of all parts.
    pub read: usize,
    /// Documents taken.
    pub written: usize,
    /// Documents left out: of another part, or behind the limit of tokens.
    pub skipped: usize,
    /// Documents that could not be used.
    pub failed: usize,
    /// Of those left out: for an evaluation prompt in them.
    pub overlapping: usize,
    /// Tokens taken, and those of them that are trained on.
    pub tokens: u64,
    /// See above.
    pub masked: u64,
}

/// All documents of a specification.
#[derive(Debug, Clone, Default)]
pub struct Documents {
    /// In the order of the files.
    pub all: Vec<Document>,
    /// What became of what was read.
    pub counts: Counts,
    /// The first few that could not be used, with the reason.
    pub failures: Vec<String>,
    /// Sha256 over what was taken: data that changed is another.
    pub hash: String,
}

impl Documents {
    /// Takes a document, or counts why not.
    fn take(
        &mut self,
        name: &str,
        one: Tokenised,
        all_rows: bool,
        hash: &[u8; 32],
        whole: &mut Sha256,
    ) {
        let counts = &mut self.counts;
        match one {
            Err(e) => {
                counts.failed += 1;
                if self.failures.len() < 5 {
                    self.failures.push(format!("{name}: {e}"));
                }
            }
            Ok((tokens, ..)) if tokens.len() < 2 => counts.failed += 1,
            Ok((.., true)) => {
                counts.skipped += 1;
                counts.overlapping += 1;
            }
            Ok((tokens, mut mask, false)) => {
                if all_rows {
                    mask.fill(true);
                }
                counts.written += 1;
                counts.tokens += tokens.len() as u64;
                counts.masked += mask.iter().filter(|&&m| m).count() as u64;
                whole.update(hash);
                tokens.iter().for_each(|t| whole.update(t.to_le_bytes()));
                mask.iter().for_each(|&m| whole.update([u8::from(m)]));
                let name = name.to_string();
                self.all.push(Document { name, tokens, mask });
            }
        }
    }
}

/// The files meant: folders are their files, by name.
fn files_of(spec: &DataSpec) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for path in &spec.files {
        if !path.is_dir() {
            all.push(path.clone());
            continue;
        }
        let entries = std::fs::read_dir(path).map_err(Error::io(path))?;
        let mut found = entries
            .map(|e| Ok(e.map_err(Error::io(path))?.path()))
            .collect::<Result<Vec<_>>>()?;
        // Tables stand beside data for many reasons: they are read where they are named.
        found.retain(|p| kind_of(p).is_some_and(|kind| kind != Kind::Csv));
        if found.is_empty() {
            return Err(Error::file(
                path,
                "holds no .txt, .md, .jsonl, .json or .parquet file",
            ));
        }
        found.sort();
        all.extend(found);
    }
    Ok(all)
}

/// What a file holds.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Text,
    Rows,
    Parquet,
    Csv,
}

/// What a file holds by its name; `None`: nothing that is read.
fn kind_of(path: &Path) -> Option<Kind> {
    match path.extension()?.to_str()? {
        "jsonl" | "json" => Some(Kind::Rows),
        "txt" | "md" => Some(Kind::Text),
        "csv" => Some(Kind::Csv),
        _ if parquet::is(path) => Some(Kind::Parquet),
        _ => None,
    }
}

/// The documents of a file, each with its place.
///
/// # Errors
/// If the file cannot be read, or is in no known form.
pub fn contents(path: &Path, separator: &str) -> Result<Vec<(String, Content)>> {
    let name = path.display();
    let Some(kind) = kind_of(path) else {
        return Err(Error::file(
            path,
            "expected a file .txt, .md, .jsonl, .json, .csv or .parquet",
        ));
    };
    match kind {
        Kind::Parquet => return placed_rows(parquet::rows(path)?, path),
        Kind::Csv => return placed_rows(conversations::csv_rows(path)?, path),
        Kind::Text | Kind::Rows => {}
    }
    let text = read_text(path)?;
    if kind == Kind::Rows {
        return rows_of(&text, path);
    }
    let mut found = Vec::new();
    let mut document = String::new();
    let mut close = |document: &mut String| {
        let text = std::mem::take(document);
        if !text.trim().is_empty() {
            found.push((
                format!("{name}, document {}", found.len() + 1),
                Content::Text(text.trim().to_string()),
            ));
        }
    };
    for line in text.split_inclusive('\n') {
        match !separator.is_empty() && line.trim_end() == separator {
            true => close(&mut document),
            false => document.push_str(line),
        }
    }
    close(&mut document);
    Ok(found)
}

/// Whether a row is a text, and not one with its summary.
fn is_text(row: &serde_json::Value) -> bool {
    let task = row.as_object().and_then(tasks::of_row);
    row.get("text").is_some_and(serde_json::Value::is_string) && task.is_none()
}

/// The documents of rows, each with its place.
fn placed_rows(
    rows: Vec<(String, serde_json::Value)>,
    path: &Path,
) -> Result<Vec<(String, Content)>> {
    let name = path.display();
    if !rows.first().is_some_and(|(_, row)| is_text(row)) {
        let talk =
            |c: conversations::Conversation| (format!("{name}, id {}", c.id), Content::Talk(c));
        return Ok(conversations::of_rows(rows, path)?
            .into_iter()
            .map(talk)
            .collect());
    }
    let text = |(place, row): (String, serde_json::Value)| match row.get("text") {
        Some(serde_json::Value::String(text)) => {
            Ok((format!("{name}, {place}"), Content::Text(text.clone())))
        }
        _ => Err(Error::file(
            path,
            format!("{place}: no `text`, as the rows before it have"),
        )),
    };
    rows.into_iter().map(text).collect()
}

/// Rows of a `text` each, or conversations.
fn rows_of(text: &str, path: &Path) -> Result<Vec<(String, Content)>> {
    let first = text
        .lines()
        .find(|l| !l.trim().is_empty())
        .unwrap_or_default();
    let row: serde_json::Value = serde_json::from_str(first).unwrap_or_default();
    if !is_text(&row) {
        let place = |c: conversations::Conversation| {
            (format!("{}, id {}", path.display(), c.id), Content::Talk(c))
        };
        return Ok(conversations::parse(text, path)?
            .into_iter()
            .map(place)
            .collect());
    }
    let mut found = Vec::new();
    for (i, line) in text
        .lines()
        .enumerate()
        .filter(|(_, l)| !l.trim().is_empty())
    {
        let row: serde_json::Value = serde_json::from_str(line)
            .map_err(|e| Error::file(path, format!("line {}: {e}", i + 1)))?;
        let Some(text) = row.get("text").and_then(|t| t.as_str()) else {
            return Err(Error::file(
                path,
                format!("line {}: no `text`, as the rows before it have", i + 1),
            ));
        };
        found.push((
            format!("{}, line {}", path.display(), i + 1),
            Content::Text(text.to_string()),
        ));
    }
    Ok(found)
}

/// Tokens of a conversation through the chat template, with those that the assistant says: its words and the token that ends
/// them. What stands around them is tokenised apart from them, as when they are generated.
///
/// # Errors
/// If there is no template, or it writes what was said before otherwise once more is said.
pub fn tokens_of_talk(
    messages: &[Message],
    tokenizer: &Tokenizer,
) -> Result<(Vec<u32>, Vec<bool>)> {
    let Some(template) = tokenizer.template() else {
        return Err(Error::Experiment(
            "this model has no chat template, and so no conversations can be trained on; texts can"
                .into(),
        ));
    };
    let (mut tokens, mut mask) = (Vec::new(), Vec::new());
    let mut before = String::new();
    for (i, _) in messages
        .iter()
        .enumerate()
        .filter(|(_, m)| m.role == "assistant")
    {
        let (open, closed) = (
            template.render(&messages[..i])?,
            template.render_closed(&messages[..=i])?,
        );
        let (Some(asked), Some(said)) = (open.strip_prefix(&before), closed.strip_prefix(&open))
        else {
            return Err(Error::Experiment(format!(
                "the chat template writes what stands before message {} otherwise when more is said",
                i + 1
            )));
        };
        let asked = tokenizer.encode_plain(asked)?;
        mask.resize(mask.len() + asked.len(), false);
        tokens.extend(asked);
        let said = tokenizer.encode_plain(said)?;
        let end = said.iter().position(|id| tokenizer.eos().contains(id));
        let counts = end.map_or(said.len(), |end| end + 1);
        mask.extend((0..said.len()).map(|i| i < counts));
        tokens.extend(said);
        before = closed;
    }
    match mask.contains(&true) {
        true => Ok((tokens, mask)),
        false => Err(Error::Experiment("the assistant says nothing in it".into())),
    }
}

/// Tokens in a row by which a document is known to hold an evaluation prompt.
const GRAM: usize = 13;

/// What evaluation prompts are known by.
struct KeptOut {
    grams: HashSet<[u32; GRAM]>,
    /// Prompts that are shorter, whole.
    short: Vec<Vec<u32>>,
}

impl KeptOut {
    fn new(sets: &[String], tokenizer: &Tokenizer) -> Result<Self> {
        let mut known = Self {
            grams: HashSet::new(),
            short: Vec::new(),
        };
        for set in sets {
            for prompt in prompts::load(set)? {
                for turn in &prompt.turns {
                    let ids = tokenizer.encode_plain(turn)?;
                    if ids.len() < GRAM {
                        known.short.push(ids);
                        continue;
                    }
                    known.grams.extend(grams(&ids));
                }
            }
        }
        Ok(known)
    }

    /// Whether a document holds one: thirteen of its tokens, or, of a shorter prompt, is it.
    fn meets(&self, tokens: &[u32], content: &Content, tokenizer: &Tokenizer) -> bool {
        if grams(tokens).any(|gram| self.grams.contains(&gram)) {
            return true;
        }
        let is = |text: &str| {
            let ids = tokenizer.encode_plain(text).unwrap_or_default();
            !ids.is_empty() && self.short.contains(&ids)
        };
        match content {
            Content::Text(text) => text.len() < 200 && is(text),
            Content::Talk(talk) => talk
                .messages
                .iter()
                .any(|m| m.role == "user" && m.content.len() < 200 && is(&m.content)),
        }
    }
}

fn grams(ids: &[u32]) -> impl Iterator<Item = [u32; GRAM]> + '_ {
    ids.windows(GRAM).filter_map(|w| w.first_chunk().copied())
}

/// A document's tokens, and whether it holds an evaluation prompt.
type Tokenised = Result<(Vec<u32>, Vec<bool>, bool)>;

/// How a document becomes tokens, with those that are trained on.
pub type Tokenise<'a> = &'a (dyn Fn(&Content) -> Result<(Vec<u32>, Vec<bool>)> + Sync);

/// As a model's drafts are trained on them: texts whole, conversations through its chat template.
fn as_trained(content: &Content, tokenizer: &Tokenizer) -> Result<(Vec<u32>, Vec<bool>)> {
    match content {
        Content::Text(text) => {
            let ids = tokenizer.encode(text)?;
            let mask = vec![true; ids.len()];
            Ok((ids, mask))
        }
        Content::Talk(talk) => tokens_of_talk(&talk.messages, tokenizer),
    }
}

fn tokenised(
    content: &Content,
    tokenizer: &Tokenizer,
    tokenise: Tokenise<'_>,
    kept_out: &KeptOut,
) -> Tokenised {
    let (tokens, mask) = tokenise(content)?;
    let meets = kept_out.meets(&tokens, content, tokenizer);
    Ok((tokens, mask, meets))
}

/// Documents that are tokenised together, on all cores: what is read does not depend on them.
const TOGETHER: usize = 512;

fn all_tokenised(
    contents: &[&Content],
    tokenizer: &Tokenizer,
    tokenise: Tokenise<'_>,
    kept_out: &KeptOut,
) -> Vec<Tokenised> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let next = std::sync::atomic::AtomicUsize::new(0);
    let place = || std::sync::Mutex::new(None);
    let found: Vec<std::sync::Mutex<Option<Tokenised>>> =
        contents.iter().map(|_| place()).collect();
    std::thread::scope(|scope| {
        for _ in 0..cores.min(contents.len()) {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    let Some(content) = contents.get(i) else {
                        break;
                    };
                    let one = tokenised(content, tokenizer, tokenise, kept_out);
                    *found[i].lock().unwrap_or_else(|e| e.into_inner()) = Some(one);
                }
            });
        }
    });
    let one = |place: std::sync::Mutex<Option<Tokenised>>| {
        let taken = place.into_inner().unwrap_or_else(|e| e.into_inner());
        taken.unwrap_or_else(|| Err(Error::Experiment("it was not tokenised".into())))
    };
    found.into_iter().map(one).collect()
}

/// A hash, as it is written.
pub(crate) fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

/// Reads what a specification names. `on_read(documents, tokens)` is told now and then.
///
/// # Errors
/// If a file cannot be read or is in no known form, or nothing is left to train on.
pub fn load(
    spec: &DataSpec,
    tokenizer: &Tokenizer,
    on_read: &mut dyn FnMut(usize, u64),
) -> Result<Documents> {
    let tokenise = |content: &Content| as_trained(content, tokenizer);
    read(spec, tokenizer, &tokenise, false, &mut |_| {}, on_read)
}

/// The same by another way to tokens, told each document as it is when it is taken; where that is asked for in the order of their
/// hashes, so that a part of them is of all files.
///
/// # Errors
/// As [`load`].
pub fn read(
    spec: &DataSpec,
    tokenizer: &Tokenizer,
    tokenise: Tokenise<'_>,
    by_hash: bool,
    on_taken: &mut dyn FnMut(&Content),
    on_read: &mut dyn FnMut(usize, u64),
) -> Result<Documents> {
    spec.check()?;
    let kept_out = KeptOut::new(&spec.keep_out, tokenizer)?;
    let mut found = Documents::default();
    let mut seen = HashSet::new();
    let mut whole = Sha256::new();
    let mut wanted = Vec::new();
    let files = files_of(spec)?;
    for (i, path) in files.iter().enumerate() {
        for (name, content) in contents(path, &spec.separator)? {
            let hash = content.hash();
            found.counts.read += 1;
            let other = spec.part != "all" && part_of(&hash) != spec.part;
            // The same document twice teaches it by heart.
            if other || !seen.insert(hash) {
                found.counts.skipped += 1;
                continue;
            }
            wanted.push((name, content, hash));
        }
        if by_hash && i + 1 < files.len() {
            continue;
        }
        if by_hash {
            wanted.sort_by_key(|(.., hash)| *hash);
        }
        for some in wanted.chunks(TOGETHER) {
            let enough = |c: &Counts| spec.tokens > 0 && c.tokens >= spec.tokens;
            if enough(&found.counts) {
                found.counts.skipped += some.len();
                continue;
            }
            let some_contents: Vec<&Content> = some.iter().map(|(_, content, _)| content).collect();
            let all = all_tokenised(&some_contents, tokenizer, tokenise, &kept_out);
            for ((name, content, hash), one) in some.iter().zip(all) {
                if enough(&found.counts) {
                    found.counts.skipped += 1;
                    continue;
                }
                let before = found.all.len();
                found.take(name, one, spec.whole, hash, &mut whole);
                if found.all.len() > before {
                    on_taken(content);
                }
            }
            on_read(found.counts.written, found.counts.tokens);
        }
        wanted.clear();
    }
    whole.update(found.counts.tokens.to_le_bytes());
    found.hash = hex(whole);
    if found.all.is_empty() {
        let c = &found.counts;
        let first = found
            .failures
            .first()
            .map_or(String::new(), |f| format!("; the first failure: {f}"));
        return Err(Error::Experiment(format!(
            "nothing to train on in part `{}`: {} documents read, {} left out ({} for an evaluation prompt), {} failed{first}",
            spec.part, c.read, c.skipped, c.overlapping, c.failed
        )));
    }
    Ok(found)
}
