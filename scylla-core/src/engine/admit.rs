//! Who gets a slot: admission by memory, and the rows of prompts that begin as an earlier one did.

use super::stream::TextOut;
use super::{Engine, Event, Finish, Live, Output, Request, Waiting, ms_since};
use crate::Result;
use crate::chance::Seeded;
use crate::plugin::{Committed, Slot};
use crate::policy::Acceptance;

/// Tokens that a prompt must share with an earlier sequence before their rows are taken from it.
const WORTH: usize = 8;

/// What became of prompts that began alike.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Prefixes {
    /// Sequences that are kept after their end.
    pub kept: usize,
    /// Rows of theirs.
    pub rows: usize,
    /// Bytes of caches that are taken for them.
    pub bytes: usize,
    /// Requests that found rows.
    pub hits: usize,
    /// Tokens of prompts that were not run again.
    pub reused: usize,
}

/// A sequence that has ended, in the slot it had.
struct Kept {
    slot: Slot,
    tokens: Vec<u32>,
    bytes: usize,
    /// Of whoever was used last the largest.
    used: u64,
}

/// Who holds memory beside the requests in slots.
#[derive(Default)]
pub(super) struct Memory {
    kept: Vec<Kept>,
    /// Bytes that caches of closed slots may hold, the last closed last: it is the next that is opened again.
    spare: Vec<usize>,
    clock: u64,
    hits: usize,
    reused: usize,
}

impl Memory {
    pub(super) fn kept_slots(&self) -> impl Iterator<Item = Slot> + '_ {
        self.kept.iter().map(|k| k.slot)
    }

    fn bytes(&self) -> usize {
        self.kept.iter().map(|k| k.bytes).sum::<usize>() + self.spare.iter().sum::<usize>()
    }

    /// The sequence that was used least recently.
    fn oldest(&self) -> Option<usize> {
        (0..self.kept.len()).min_by_key(|&i| self.kept[i].used)
    }

    /// The same, but the one that shares most with a prompt last.
    fn first_to_go(&self, prompt: &[u32]) -> Option<usize> {
        let shared = |i: usize| common(&self.kept[i].tokens, prompt);
        let best = (0..self.kept.len()).max_by_key(|&i| shared(i));
        let best = best.filter(|&i| shared(i) >= WORTH);
        let others = (0..self.kept.len()).filter(|&i| Some(i) != best);
        others.min_by_key(|&i| self.kept[i].used).or(best)
    }
}

/// Length of what two texts begin with.
fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

impl Engine<'_> {
    /// What is kept of sequences that have ended, and what it was good for.
    pub fn prefixes(&self) -> Prefixes {
        let kept = &self.memory.kept;
        Prefixes {
            kept: kept.len(),
            rows: kept.iter().map(|k| k.tokens.len()).sum(),
            bytes: kept.iter().map(|k| k.bytes).sum(),
            hits: self.memory.hits,
            reused: self.memory.reused,
        }
    }

    /// Bytes of caches that requests in slots, kept sequences and closed slots may take.
    pub fn bytes(&self) -> usize {
        self.live.iter().map(|live| live.bytes).sum::<usize>() + self.memory.bytes()
    }

    /// Bytes of caches that a request comes to need at most.
    pub(super) fn bytes_of(&self, request: &Request) -> usize {
        let (context, budget) = (self.shape.context, request.budget);
        let tokens = request.prompt.len().saturating_add(request.max_new_tokens);
        let tokens = tokens.min(context);
        let Some(draft) = &self.parts.draft else {
            return self.parts.target.slot_bytes((tokens + 1).min(context));
        };
        // The target verifies what is proposed; while a tree grows a draft may forward more.
        let verified = (tokens + budget.total).min(context);
        let forwarded = tokens + budget.total.max(budget.width * budget.levels());
        self.parts.target.slot_bytes(verified) + draft.model.slot_bytes(forwarded)
    }

    /// Gives waiting requests slots, in their order, as far as there are slots and memory.
    pub(super) fn admit(&mut self) {
        while self.live.len() < self.options.batch {
            let Some(waiting) = self.waiting.pop_front() else {
                return;
            };
            if !self.make_room(waiting.bytes, &waiting.request.prompt) {
                self.waiting.push_front(waiting);
                return;
            }
            let (request, prompt) = (waiting.id, waiting.request.prompt.len());
            if let Err(e) = self.open(waiting) {
                let output = Output::refused(prompt, e.to_string());
                self.events.push(Event::Finished { request, output });
            }
        }
    }

    /// Whether so many bytes more are within the limit, once kept sequences and closed slots have made room; the sequence
    /// that the prompt goes on from is the last to go.
    fn make_room(&mut self, bytes: usize, prompt: &[u32]) -> bool {
        let Some(limit) = self.options.memory else {
            return true;
        };
        let live: usize = self.live.iter().map(|live| live.bytes).sum();
        if live + bytes > limit {
            return false; // nothing but the end of others helps
        }
        // The cache that was closed last is opened next. One that holds more than is needed would be counted as that.
        if self.memory.spare.last().is_some_and(|&spare| spare > bytes) {
            self.trim();
        }
        let next = |memory: &Memory| memory.spare.last().copied().unwrap_or(0);
        while self.bytes() + bytes - next(&self.memory) > limit {
            if !self.memory.spare.is_empty() {
                self.trim();
            } else if let Some(first) = self.memory.first_to_go(prompt) {
                self.forget(first);
                self.trim();
            } else {
                return false;
            }
        }
        true
    }

    /// Gives back the memory of closed slots.
    fn trim(&mut self) {
        self.parts.target.trim();
        if let Some(draft) = &mut self.parts.draft {
            draft.model.trim();
        }
        self.memory.spare.clear();
    }

    /// Closes the slot of a kept sequence.
    fn forget(&mut self, index: usize) {
        let kept = self.memory.kept.remove(index);
        self.close_slot(kept.slot);
        self.memory.spare.push(kept.bytes);
    }

    pub(super) fn close_slot(&mut self, slot: Slot) {
        self.parts.target.close(slot);
        if let Some(draft) = &mut self.parts.draft {
            draft.model.close(slot);
        }
    }

    /// Closes a slot that was opened in part; no memory of it stays uncounted.
    fn give_up(&mut self, slot: Slot) {
        self.close_slot(slot);
        self.trim();
    }

    /// Opens a slot for a request, with the rows of an earlier prompt where one begins alike.
    fn open(&mut self, waiting: Waiting) -> Result<()> {
        let used = |slot: &usize| {
            let live = self.live.iter().map(|live| live.slot);
            live.chain(self.memory.kept_slots()).any(|s| s == *slot)
        };
        let slot = (0..).find(|slot| !used(slot)).unwrap_or(0);
        let prompt = &waiting.request.prompt;
        let reused = match self.fork(slot, prompt)? {
            0 => {
                self.parts.target.open(slot)?;
                if let Some(draft) = &mut self.parts.draft
                    && let Err(e) = draft.model.open(slot)
                {
                    self.give_up(slot);
                    return Err(e);
                }
                0
            }
            reused => reused,
        };
        let spare = self.memory.spare.pop().unwrap_or(0);
        let mut output = Output::unstarted(prompt.len());
        output.waited.slot = ms_since(waiting.since);
        // The last token of what is shared is run again: its features belong with the token behind it.
        output.reused_tokens = reused.saturating_sub(1);
        self.live.push(Live {
            id: waiting.id,
            slot,
            tokens: prompt.clone(),
            rows: output.reused_tokens,
            told: reused,
            chance: Seeded::new(waiting.request.seed, waiting.request.sequence),
            text: TextOut::new(self.parts.tokenizer.as_deref(), &waiting.request.stops),
            output,
            acceptance: Acceptance::default(),
            bytes: waiting.bytes.max(spare),
            since: waiting.since,
            request: waiting.request,
            settled: waiting.settled,
            ending: None,
        });
        Ok(())
    }

    /// Opens a slot with what another sequence shares with a prompt; returns the tokens that the draft knows of then, one
    /// more than the target has rows, or 0 where nothing was opened.
    fn fork(&mut self, slot: Slot, prompt: &[u32]) -> Result<usize> {
        if self.options.kept == 0 {
            return Ok(0);
        }
        let kept = self.memory.kept.iter().enumerate();
        let kept = kept.map(|(i, k)| (common(&k.tokens, prompt), k.slot, Some(i)));
        let live = self.live.iter().filter(|live| live.ending.is_none());
        let live = live.map(|live| {
            (
                common(&live.tokens[..live.rows.min(live.tokens.len())], prompt),
                live.slot,
                None,
            )
        });
        let Some((shared, from, index)) = kept.chain(live).max_by_key(|(shared, ..)| *shared)
        else {
            return Ok(0);
        };
        if shared < WORTH {
            return Ok(0);
        }
        match self.parts.target.fork(from, slot, shared - 1) {
            Ok(true) => {}
            Ok(false) => return Ok(0),
            Err(e) => {
                self.give_up(slot);
                return Err(e);
            }
        }
        let known = &prompt[..shared];
        let forked = match &mut self.parts.draft {
            None => Ok(true),
            Some(draft) => match draft.model.fork(from, slot, known) {
                Ok(false) if self.taps.is_empty() => draft.model.open(slot).and_then(|()| {
                    let tokens = Committed {
                        slot,
                        tokens: known,
                        path: &[],
                        taps: &[],
                    };
                    draft.model.observe(&[tokens]).map(|()| true)
                }),
                forked => forked,
            },
        };
        if !matches!(forked, Ok(true)) {
            self.give_up(slot);
            return forked.map(|_| 0);
        }
        self.memory.clock += 1;
        if let Some(index) = index {
            self.memory.kept[index].used = self.memory.clock;
        }
        self.memory.hits += 1;
        self.memory.reused += shared - 1;
        Ok(shared)
    }

    /// Takes a sequence out of its slot; its rows are kept where it gives their tokens, and that is asked for.
    pub(super) fn leave(&mut self, slot: Slot, bytes: usize, tokens: Option<Vec<u32>>) {
        let Some(tokens) = tokens.filter(|t| self.options.kept > 0 && t.len() >= WORTH) else {
            self.close_slot(slot);
            return self.memory.spare.push(bytes);
        };
        // What another one begins with is not kept twice.
        while let Some(shorter) = self
            .memory
            .kept
            .iter()
            .position(|k| tokens.starts_with(&k.tokens))
        {
            self.forget(shorter);
        }
        self.memory.clock += 1;
        self.memory.kept.push(Kept {
            slot,
            tokens,
            bytes,
            used: self.memory.clock,
        });
        while self.memory.kept.len() > self.options.kept {
            match self.memory.oldest() {
                Some(oldest) => self.forget(oldest),
                None => return,
            }
        }
    }
}

impl Live {
    /// Appends tokens until one ends the sequence; returns those that were kept.
    pub(super) fn keep(&mut self, tokens: &[u32], context: usize, told: &mut Vec<Event>) -> usize {
        let mut finish = None;
        let mut kept = 0;
        let mut text = String::new();
        for &token in tokens {
            kept += 1;
            self.tokens.push(token);
            self.output.ids.push(token);
            if self.request.eos.contains(&token) {
                finish = Some(Finish::Eos);
            } else if self.text.push(token, &mut text) {
                finish = Some(Finish::Stop);
            } else if self.output.ids.len() >= self.request.max_new_tokens {
                finish = Some(Finish::Length);
            } else if self.tokens.len() >= context {
                finish = Some(Finish::Context);
            }
            if finish.is_some() {
                self.text.flush(&mut text);
                break;
            }
        }
        if self.output.waited.first.is_none() {
            self.output.waited.first = Some(ms_since(self.since));
        }
        self.ending = finish.map(Ok);
        let (request, ids) = (self.id, tokens[..kept].to_vec());
        told.push(Event::Tokens { request, ids, text });
        kept
    }
}
