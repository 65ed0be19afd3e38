//! Recording: the target decodes on its own, and at every token of its answer the draft is asked for its candidates.

use std::fs::File;
use std::io::{Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use scylla_core::chance::Seeded;
use scylla_core::engine::{Engine, Options, Parts, Walk, decode};
use scylla_core::plugin::{
    Candidates, Committed, DraftModel, Matrix, Request, SlotRows, Step, TargetModel, Want,
};
use scylla_core::text::Message;
use scylla_verify::Auto;

use super::{FORMAT, Header, Line, Place, PlaceLine, Text, VERSION, rounded};
use crate::bench::Skipped;
use crate::experiment::Experiment;
use crate::prompts::Prompt;
use crate::session::Session;
use crate::train::SLOT;
use crate::{Error, Result};

/// Writes a trace text by text. One that cannot be written whole is taken back, and those before it stay.
pub struct Writer {
    to: File,
    path: PathBuf,
    /// Bytes of the header and of whole texts.
    whole: u64,
    /// Texts that were written.
    pub texts: usize,
    buffer: Vec<u8>,
}

impl Writer {
    /// Begins a trace.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn new(path: &Path, header: Header) -> Result<Self> {
        let mut writer = Self {
            to: File::create(path).map_err(Error::io(path))?,
            path: path.to_path_buf(),
            whole: 0,
            texts: 0,
            buffer: Vec::new(),
        };
        writer.line(&Line::<PlaceLine>::Trace(header))?;
        writer.flush()?;
        Ok(writer)
    }

    fn line(&mut self, line: &Line<PlaceLine>) -> Result<()> {
        let whole = |e: serde_json::Error| Error::Experiment(e.to_string());
        serde_json::to_writer(&mut self.buffer, line).map_err(whole)?;
        self.buffer.push(b'\n');
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        let written = self
            .to
            .write_all(&self.buffer)
            .and_then(|()| self.to.flush());
        let bytes = self.buffer.len() as u64;
        self.buffer.clear();
        if let Err(e) = written {
            // What does not fit is taken back; where even that fails, a reader meets a line that ends in its middle.
            let _ = self.to.set_len(self.whole);
            let _ = self.to.seek(std::io::SeekFrom::Start(self.whole));
            return Err(Error::file(
                &self.path,
                format!("{e}; the {} texts before are whole in it", self.texts),
            ));
        }
        self.whole += bytes;
        Ok(())
    }

    /// Writes a text with its places.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn text(&mut self, text: Text, places: &[Place]) -> Result<()> {
        self.line(&Line::Text(text))?;
        for place in places {
            self.line(&Line::Place(PlaceLine::of(place)))?;
        }
        self.flush()?;
        self.texts += 1;
        Ok(())
    }
}

/// What texts are recorded with.
pub struct Recorder<'a> {
    /// The target.
    pub session: &'a mut Session,
    /// The draft.
    pub draft: &'a mut Box<dyn DraftModel>,
    /// Its name.
    pub name: String,
    /// Its budget, sampling and limits.
    pub spec: &'a Experiment,
}

impl Recorder<'_> {
    /// The first line of the trace.
    ///
    /// # Errors
    /// If the text is sampled: a trace follows the target's most probable tokens.
    pub fn header(&self) -> Result<Header> {
        if !self.spec.sampling.is_greedy() {
            return Err(Error::Experiment(format!(
                "a dense trace is of greedy text; sampling.temperature is {}",
                self.spec.sampling.temperature
            )));
        }
        Ok(Header {
            format: FORMAT.into(),
            version: VERSION,
            target: self.spec.target.model.clone(),
            draft: self.name.clone(),
            dir: self.spec.draft.dir.clone(),
            budget: self.spec.budget.limits().into(),
            repetition_penalty: self.spec.sampling.repetition_penalty,
            environment: self.session.environment()?,
        })
    }

    /// Records the turns of prompts; one that cannot be decoded ends its conversation and is named. `told` hears of each
    /// conversation.
    ///
    /// # Errors
    /// If target or draft fail, the trace cannot be written, or the user breaks off.
    pub fn run(
        &mut self,
        prompts: &[Prompt],
        writer: &mut Writer,
        stop: &AtomicBool,
        told: &mut dyn FnMut(),
    ) -> Result<Vec<Skipped>> {
        let mut skipped = Vec::new();
        for prompt in prompts {
            let system = prompt.system.iter().map(Message::system);
            let mut messages: Vec<Message> = system.collect();
            for (turn, asked) in prompt.turns.iter().enumerate() {
                if stop.load(Ordering::Relaxed) {
                    return Err(Error::Interrupted(format!(
                        "; {} texts of the trace are in {}",
                        writer.texts,
                        writer.path.display()
                    )));
                }
                messages.push(Message::user(asked));
                let said = match self.answer(&messages) {
                    Ok(said) => said,
                    Err(e) => {
                        skipped.push(Skipped {
                            prompt: prompt.id.clone(),
                            turn,
                            draft: None,
                            reason: e.to_string(),
                        });
                        break;
                    }
                };
                let (ids, answer, text) = said;
                messages.push(Message::assistant(&text));
                if answer.is_empty() {
                    continue;
                }
                let (places, most) = match self.places(&ids, &answer) {
                    Ok(found) => found,
                    // Where a draft has no candidates at all there is nothing to go on with.
                    Err(e) if writer.texts == 0 => return Err(e),
                    Err(e) => {
                        skipped.push(Skipped {
                            prompt: prompt.id.clone(),
                            turn,
                            draft: Some(self.name.clone()),
                            reason: format!("not traced: {e}"),
                        });
                        break;
                    }
                };
                let text = Text {
                    prompt: prompt.id.clone(),
                    task: prompt.category.clone(),
                    turn,
                    prompt_tokens: ids.len(),
                    answer,
                    max_new_tokens: self.spec.run.max_new_tokens,
                    context: self.session.target.model.shape().context,
                    most,
                };
                writer.text(text, &places)?;
            }
            told();
        }
        Ok(skipped)
    }

    /// The ids of a conversation, the target's own answer, and its text.
    fn answer(&mut self, messages: &[Message]) -> Result<(Vec<u32>, Vec<u32>, String)> {
        let ids = self.session.prompt(messages, &self.spec.prompts)?;
        self.session.wording.check_length(&ids)?;
        let run = &self.spec.run;
        let request = scylla_core::engine::Request {
            prompt: ids.clone(),
            sampling: self.spec.sampling.clone(),
            seed: run.seed,
            max_new_tokens: run.max_new_tokens,
            eos: match run.ignore_eos {
                true => Vec::new(),
                false => self.session.eos.clone(),
            },
            stops: run.stop.clone(),
            known_tokens: Some(self.session.known_tokens()),
            ..Default::default()
        };
        let parts = Parts {
            tokenizer: self.session.tokenizer.clone(),
            ..Parts::plain(&mut self.session.target.model, Auto)
        };
        let mut engine = Engine::new(parts, Options::default())?;
        let outputs = decode(&mut engine, vec![request], &mut |_| {
            std::ops::ControlFlow::Continue(())
        });
        match outputs.into_iter().next() {
            Some(output) => match output.failed {
                Some(reason) => Err(Error::Experiment(reason)),
                None => Ok((ids, output.ids, output.text)),
            },
            None => Err(Error::Experiment("nothing was decoded".into())),
        }
    }

    /// The candidates at every place of an answer, and how many tokens the draft can propose.
    fn places(&mut self, prompt: &[u32], answer: &[u32]) -> Result<(Vec<Place>, usize)> {
        self.draft.open(SLOT)?;
        let opened = self.session.target.model.open(SLOT);
        let found = match opened {
            Ok(()) => self.places_in(prompt, answer),
            Err(e) => Err(e.into()),
        };
        self.session.target.model.close(SLOT);
        self.draft.close(SLOT);
        found
    }

    fn places_in(&mut self, prompt: &[u32], answer: &[u32]) -> Result<(Vec<Place>, usize)> {
        let known = self.session.known_tokens();
        let target = &mut self.session.target.model;
        let text = [prompt, answer].concat();
        let along = Walk {
            text: &text,
            prompt: prompt.len(),
            budget: self.spec.budget.limits(),
            max_new_tokens: self.spec.run.max_new_tokens,
            context: target.shape().context,
        };
        let taps = self.draft.taps();
        let mut first = 0;
        for tokens in prompt.chunks(self.spec.run.prompt_rows) {
            let mut forward = target.forward(&Step {
                slots: vec![SlotRows {
                    slot: SLOT,
                    tokens,
                    parents: &[],
                    want: Want::None,
                }],
                taps: &taps,
            })?;
            let path: Vec<usize> = (0..tokens.len()).collect();
            target.commit(SLOT, &path)?;
            let last = first + tokens.len();
            // Tokens run one ahead of states.
            let told = match last == prompt.len() {
                true => &text[first..=last],
                false => &text[first..last],
            };
            first = last;
            self.draft.observe(&[Committed {
                slot: SLOT,
                tokens: told,
                path: &path,
                taps: &forward.taps.remove(0),
            }])?;
        }
        let (mut places, mut most) = (Vec::new(), 1);
        for root in prompt.len()..text.len() - 1 {
            let budget = along.budget_at(root);
            let candidates = match budget.levels() {
                0 => Candidates::root(text[root], 1),
                _ => {
                    let mut chance = Seeded::new(self.spec.run.seed, 0);
                    self.draft.candidates(
                        &mut Request {
                            slot: SLOT,
                            root: text[root],
                            budget,
                            sampling: &self.spec.sampling,
                            chance: &mut chance,
                        },
                        &text[root + 1..],
                    )?
                }
            };
            most = most.max(candidates.most);
            let (place, taps) = judged(target, root - prompt.len(), candidates, &taps, known)?;
            if budget.levels() > 0 {
                places.push(place);
            }
            self.draft.observe(&[Committed {
                slot: SLOT,
                tokens: &text[root + 1..root + 2],
                path: &[0],
                taps: &taps,
            }])?;
        }
        Ok((places, most))
    }
}

/// Ranks and probabilities of candidates under the target, and its states of the root, which is committed.
fn judged(
    target: &mut Box<dyn TargetModel>,
    at: usize,
    candidates: Candidates,
    taps: &[scylla_core::plugin::Tap],
    known: usize,
) -> Result<(Place, Vec<Matrix>)> {
    let c = &candidates;
    // The root, and every node with children.
    let inner = |n: &usize| *n == 0 || c.children[*n].as_ref().is_some_and(|c| !c.is_empty());
    let nodes: Vec<usize> = (0..c.tokens.len()).filter(inner).collect();
    let mut parents: Vec<Option<usize>> = vec![None; nodes.len()];
    for (row, &node) in nodes.iter().enumerate() {
        let children = c.children[node].clone().unwrap_or(0..0);
        for (below, _) in nodes
            .iter()
            .enumerate()
            .filter(|(_, n)| children.contains(n))
        {
            parents[below] = Some(row);
        }
    }
    let tokens: Vec<u32> = nodes.iter().map(|&n| c.tokens[n]).collect();
    let mut forward = target.forward(&Step {
        slots: vec![SlotRows {
            slot: SLOT,
            tokens: &tokens,
            parents: &parents,
            want: Want::All,
        }],
        taps,
    })?;
    let logits = forward.logits.remove(0);
    let (mut ranks, mut p) = (vec![0; c.tokens.len()], vec![1.0; c.tokens.len()]);
    for (row, &node) in nodes.iter().enumerate() {
        let children = c.children[node].clone().unwrap_or(0..0);
        if children.is_empty() {
            continue;
        }
        let row = logits.row(row)?;
        let row = &row[..known.min(row.len())];
        let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = row.iter().map(|&l| f64::from(l - most).exp()).sum();
        for child in children {
            let token = c.tokens[child] as usize;
            let Some(&logit) = row.get(token) else {
                continue;
            };
            // Ties go to the lower id.
            let before = |(id, &l): (usize, &f32)| l > logit || (l == logit && id < token);
            ranks[child] = row
                .iter()
                .enumerate()
                .filter(|&other| before(other))
                .count() as u32;
            p[child] = rounded(f64::from(logit - most).exp() / sum);
        }
    }
    target.commit(SLOT, &[0])?;
    let place = Place {
        at,
        candidates,
        ranks,
        p,
    };
    Ok((place, forward.taps.remove(0)))
}
