//! Answers by the target itself: what a draft learns best from is what its target says (arXiv:2401.15077, arXiv:2503.01840).
//!
//! Conversations go through the engine side by side, each turn behind the target's own answers to the ones before. What is
//! done is appended at once, so that a run that is broken off goes on where it stopped.

use std::collections::{HashMap, HashSet};
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use scylla_core::engine::{Event, Finish, Output, RequestId};
use scylla_core::files::read_text;
use scylla_core::text::Message;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::conversations::{self, Conversation};
use crate::experiment::Experiment;
use crate::session::{Session, engine, request};
use crate::{Error, Registry, Result};

/// What became of the conversations: `read = written + skipped + failed`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Regenerated {
    /// Conversations in the input.
    pub read: usize,
    /// Answered and written in this run.
    pub written: usize,
    /// Answered in an earlier run.
    pub skipped: usize,
    /// Not answered; the reasons were told.
    pub failed: usize,
    /// New tokens.
    pub tokens: u64,
    /// Seconds of this run.
    pub seconds: f64,
    /// New tokens a second.
    pub tokens_per_s: f64,
    /// Answers that the limit of tokens cut off.
    pub cut: usize,
}

/// A conversation on its way.
struct Talk {
    id: String,
    /// What the user says, turn by turn, and the system before.
    asked: Vec<Message>,
    said: Vec<Message>,
    finishes: Vec<Finish>,
    number: u64,
}

impl Talk {
    fn new(from: Conversation, number: usize) -> Self {
        let asked = from
            .messages
            .into_iter()
            .filter(|m| m.role != "assistant")
            .collect();
        Self {
            id: from.id,
            asked,
            said: Vec::new(),
            finishes: Vec::new(),
            number: number as u64,
        }
    }

    /// Says the user's next turn; false where there is none.
    fn ask(&mut self) -> bool {
        let spoken = self.said.iter().filter(|m| m.role != "assistant").count();
        let mut rest = self.asked[spoken..].iter();
        let mut any = false;
        for message in rest.by_ref() {
            self.said.push(message.clone());
            if message.role == "user" {
                any = true;
                break;
            }
        }
        any
    }

    fn row(&self) -> Value {
        let message = |m: &Message| json!({"role": m.role, "content": m.content});
        json!({
            "id": self.id,
            "messages": self.said.iter().map(message).collect::<Vec<_>>(),
            "finishes": self.finishes,
        })
    }
}

/// Ids of rows that are whole; a torn last line is cut off.
fn done(path: &Path) -> Result<HashSet<String>> {
    if !path.exists() {
        return Ok(HashSet::new());
    }
    let text = read_text(path)?;
    let whole = text.rfind('\n').map_or(0, |at| at + 1);
    let mut found = HashSet::new();
    for (i, line) in text[..whole]
        .lines()
        .enumerate()
        .filter(|(_, l)| !l.trim().is_empty())
    {
        let row: Value = serde_json::from_str(line).map_err(|e| {
            Error::file(
                path,
                format!("line {}: {e}: no file of this command's", i + 1),
            )
        })?;
        let ours = row.get("finishes").is_some() && row.get("messages").is_some();
        let Some(id) = row.get("id").and_then(Value::as_str).filter(|_| ours) else {
            return Err(Error::file(
                path,
                format!("line {}: no file of this command's", i + 1),
            ));
        };
        found.insert(id.to_string());
    }
    // Only what this command had begun to write is cut off.
    const BEGINS: &str = "{\"finishes\"";
    let torn = &text[whole..];
    if !torn.is_empty() && !torn.starts_with(BEGINS) && !BEGINS.starts_with(torn) {
        return Err(Error::file(
            path,
            "ends in a line that is not this command's: nothing was changed",
        ));
    }
    if whole < text.len() {
        let file = std::fs::OpenOptions::new()
            .write(true)
            .open(path)
            .map_err(Error::io(path))?;
        file.set_len(whole as u64).map_err(Error::io(path))?;
    }
    Ok(found)
}

/// Lets the target of a session answer the conversations of a file, and appends them to `output`. `on_row(done, all, failure)`
/// is told of each.
///
/// # Errors
/// If the input cannot be read, or the output not be written; if broken off (what is done is kept).
pub fn regenerate(
    registry: &Registry,
    session: &mut Session,
    experiment: &Experiment,
    input: &Path,
    output: &Path,
    stop: &AtomicBool,
    on_row: &mut dyn FnMut(usize, usize, Option<&str>),
) -> Result<Regenerated> {
    let begun = Instant::now();
    let all = conversations::read(input)?;
    let same = |p: &Path| std::fs::canonicalize(p).ok();
    if output.exists() && same(input) == same(output) {
        return Err(Error::file(
            output,
            "is the input; answers are written to another file",
        ));
    }
    let known = done(output)?;
    let mut counts = Regenerated {
        read: all.len(),
        ..Regenerated::default()
    };
    let numbered = all.into_iter().enumerate().map(|(i, c)| Talk::new(c, i));
    let mut waiting: Vec<Talk> = numbered.filter(|t| !known.contains(&t.id)).collect();
    counts.skipped = counts.read - waiting.len();
    waiting.reverse();
    let mut file = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(output)
        .map_err(Error::io(output))?;
    let mut composed = session.compose(registry, experiment)?;
    let batch = experiment.run.batch;
    let (target, tokenizer, wording) = (
        &mut session.target,
        session.tokenizer.as_ref(),
        &session.wording,
    );
    let eos = session.eos.clone();
    // Requests are made while the engine holds the target and the draft.
    let plain = request(
        experiment,
        &eos,
        tokenizer.map(|t| &**t),
        &composed,
        Vec::new(),
        0,
    );
    let mut engine = engine(
        target,
        tokenizer,
        &mut composed,
        experiment.run.options(batch),
    )?;
    let mut live: HashMap<RequestId, Talk> = HashMap::new();
    let mut ready: Vec<Talk> = Vec::new();
    loop {
        // As many as there are slots, and one more that is ready when one ends.
        while live.len() <= batch && !stop.load(Ordering::Relaxed) {
            let Some(mut talk) = ready.pop().or_else(|| waiting.pop()) else {
                break;
            };
            talk.ask();
            let ids = wording.prompt(&talk.said, &experiment.prompts);
            let ids = ids.and_then(|ids| wording.check_length(&ids).map(|()| ids));
            let submitted = ids.and_then(|prompt| {
                let sequence = talk.number << 16 | talk.finishes.len() as u64;
                Ok(engine.submit(scylla_core::engine::Request {
                    prompt,
                    sequence,
                    ..plain.clone()
                })?)
            });
            match submitted {
                Ok(id) => {
                    live.insert(id, talk);
                }
                Err(e) => fail(&mut counts, &talk, &e.to_string(), on_row),
            }
        }
        if live.is_empty() || stop.load(Ordering::Relaxed) {
            break;
        }
        for event in engine.step() {
            let Event::Finished {
                request,
                output: answer,
            } = event
            else {
                continue;
            };
            let Some(mut talk) = live.remove(&request) else {
                continue;
            };
            if let Some(reason) = failure(&answer) {
                fail(&mut counts, &talk, &reason, on_row);
                continue;
            }
            counts.tokens += answer.ids.len() as u64;
            counts.cut += usize::from(matches!(answer.finish, Finish::Length | Finish::Context));
            talk.said.push(Message::assistant(answer.text));
            talk.finishes.push(answer.finish);
            let users = |all: &[Message]| all.iter().filter(|m| m.role == "user").count();
            if users(&talk.asked) > users(&talk.said) {
                ready.push(talk);
                continue;
            }
            let line = talk.row().to_string() + "\n";
            file.write_all(line.as_bytes())
                .and_then(|()| file.flush())
                .map_err(Error::io(output))?;
            counts.written += 1;
            on_row(
                counts.written + counts.skipped + counts.failed,
                counts.read,
                None,
            );
        }
    }
    counts.seconds = begun.elapsed().as_secs_f64();
    counts.tokens_per_s = counts.tokens as f64 / counts.seconds;
    match stop.load(Ordering::Relaxed) {
        true => Err(Error::Interrupted(format!(
            "; {} of {} conversations are in {}, the same command goes on",
            counts.written + counts.skipped,
            counts.read,
            output.display()
        ))),
        false => Ok(counts),
    }
}

fn failure(answer: &Output) -> Option<String> {
    match &answer.failed {
        Some(reason) => Some(reason.clone()),
        None if answer.text.trim().is_empty() => Some("the answer is empty".into()),
        None => None,
    }
}

fn fail(
    counts: &mut Regenerated,
    talk: &Talk,
    reason: &str,
    on_row: &mut dyn FnMut(usize, usize, Option<&str>),
) {
    counts.failed += 1;
    let message = format!("`{}`: {reason}", talk.id);
    on_row(
        counts.written + counts.skipped + counts.failed,
        counts.read,
        Some(&message),
    );
}
