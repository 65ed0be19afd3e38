//! The engine: requests that join and leave at any step, over one target and one draft.
//!
//! A step runs, in one forward of the target, the trees of all requests that decode and the next rows of prompts that have
//! just joined. It is generic over target, draft, rules and budget policy, and knows nothing else. Plain decoding is the
//! same over trees that hold only their root. What belongs to a request is in the request; what goes wrong for one ends it
//! alone; and what it decodes does not depend on its company.

mod admit;
mod cycle;
mod record;
mod request;
mod rows;
mod stream;
mod walk;

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

pub use admit::Prefixes;
pub use record::{Accepted, Cycle, Finish, Output, Phases, Step, Waited, tau};
pub use request::{Request, RequestId};
pub use rows::LogitRows;
pub use walk::{Walk, walk, walk_each};

use admit::Memory;
use request::Settled;
use stream::TextOut;

use crate::chance::Seeded;
use crate::plugin::{
    BudgetPolicy, DraftModel, Rules, Slot, Tap, TargetModel, TargetShape, Verdict,
};
use crate::policy::{Acceptance, Costs, FixedBudget};
use crate::text::Tokenizer;
use crate::tree::Tree;
use crate::{Error, Result};

/// What an engine is made of. Borrowed parts will do (`Box::new(&mut target)`), and are left without open slots.
pub struct Parts<'a> {
    /// The model being accelerated.
    pub target: Box<dyn TargetModel + 'a>,
    /// What proposes; `None` decodes plainly.
    pub draft: Option<Draft<'a>>,
    /// Chooses the rule of requests that name none.
    pub rules: Arc<dyn Rules>,
    /// Chooses how much is drafted, within what requests allow.
    pub policy: Box<dyn BudgetPolicy + 'a>,
    /// Turns ids into text; without one there is none, and no stop strings.
    pub tokenizer: Option<Arc<Tokenizer>>,
}

/// A draft with the name that messages print.
pub struct Draft<'a> {
    /// Its name.
    pub name: String,
    /// The draft.
    pub model: Box<dyn DraftModel + 'a>,
}

impl<'a> Draft<'a> {
    /// A draft under a name.
    pub fn new(name: impl Into<String>, model: impl DraftModel + 'a) -> Self {
        Self {
            name: name.into(),
            model: Box::new(model),
        }
    }
}

impl<'a> Parts<'a> {
    /// A target alone.
    pub fn plain(target: impl TargetModel + 'a, rules: impl Rules + 'static) -> Self {
        Self {
            target: Box::new(target),
            draft: None,
            rules: Arc::new(rules),
            policy: Box::new(FixedBudget),
            tokenizer: None,
        }
    }

    /// A target and a draft, which drafts as much as requests allow.
    pub fn drafted(
        target: impl TargetModel + 'a,
        draft: Draft<'a>,
        rules: impl Rules + 'static,
    ) -> Self {
        Self {
            draft: Some(draft),
            ..Self::plain(target, rules)
        }
    }
}

/// How an engine is run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Sequences decoded side by side at most, 1 to 1000.
    pub batch: usize,
    /// Rows of prompts in one step at most, at least 1: fewer hold up those that decode less, and more run a prompt sooner.
    pub prompt_rows: usize,
    /// Bytes for caches of target and draft; a request that does not fit waits, one that never will is refused. `None` sets
    /// no limit.
    pub memory: Option<usize>,
    /// Sequences whose rows are kept after their end, for prompts that begin alike, which then also take those of sequences
    /// in slots; 0: every prompt is run whole. Of those kept the least recently used go first, and
    /// all of them before a request that fits without them has to wait for memory.
    pub kept: usize,
}

impl Default for Options {
    /// One sequence at a time, prompts in chunks of 128, no limit of memory, nothing kept.
    fn default() -> Self {
        Self {
            batch: 1,
            prompt_rows: 128,
            memory: None,
            kept: 0,
        }
    }
}

/// What a step tells.
#[derive(Debug, Clone)]
pub enum Event {
    /// Tokens became final. The text holds whole characters only and may lag behind the ids.
    Tokens {
        /// Whose.
        request: RequestId,
        /// New ids.
        ids: Vec<u32>,
        /// New text; empty without a tokenizer.
        text: String,
    },
    /// What was proposed and accepted, where the request asked for it.
    Cycle {
        /// Whose.
        request: RequestId,
        /// The proposal.
        tree: Tree,
        /// What the rule said of it; tokens beyond a limit are in it, and not in [`Event::Tokens`].
        verdict: Verdict,
    },
    /// A request ended.
    Finished {
        /// Which.
        request: RequestId,
        /// What became of it.
        output: Output,
    },
    /// The step's record; the last event of every step that ran anything.
    Step(Step),
}

/// A request that waits for a slot.
struct Waiting {
    id: RequestId,
    request: Request,
    settled: Settled,
    /// Bytes of caches it comes to need.
    bytes: usize,
    since: Instant,
}

/// A request in a slot.
struct Live {
    id: RequestId,
    request: Request,
    settled: Settled,
    slot: Slot,
    /// Prompt and new tokens. In decoding the last is the root of the next tree.
    tokens: Vec<u32>,
    /// Rows of them that the target holds.
    rows: usize,
    /// Tokens that the draft was told.
    told: usize,
    chance: Seeded,
    text: TextOut,
    output: Output,
    acceptance: Acceptance,
    bytes: usize,
    since: Instant,
    /// How it ended; it leaves its slot at the end of the step.
    ending: Option<Result<Finish>>,
}

impl Live {
    fn root(&self) -> u32 {
        self.tokens[self.tokens.len() - 1]
    }

    /// Whether its prompt is done.
    fn decodes(&self) -> bool {
        self.rows >= self.request.prompt.len()
    }

    fn fail(&mut self, error: Error) {
        self.ending.get_or_insert(Err(error));
    }
}

fn ms_since(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// Decodes any number of requests over one target and one draft.
///
/// ```
/// use scylla_core::engine::{Draft, Engine, Event, Options, Parts, Request};
/// use scylla_core::tabular::{Law, TableDraft, TableTarget};
/// use scylla_core::tree::Drawing;
/// # use scylla_core::plugin::{Chance, TargetRows, Verdict, Verifier};
/// # #[derive(Clone)]
/// # struct Greedy;
/// # impl Verifier for Greedy {
/// #     fn name(&self) -> &str { "greedy" }
/// #     fn exact_for(&self, _: Drawing, _: usize, s: &scylla_core::sampling::Sampling) -> bool { s.is_greedy() }
/// #     fn verify(&self, t: &scylla_core::tree::Tree, rows: &dyn TargetRows, _: &mut dyn Chance) -> scylla_core::Result<Verdict> {
/// #         let (mut at, mut path) = (0, Vec::new());
/// #         loop {
/// #             let best = rows.argmax(&[at])?[0];
/// #             match t.children(at).find(|&c| t.tokens[c] == best) {
/// #                 Some(next) => { path.push(next); at = next; }
/// #                 None => return Ok(Verdict { path, bonus: best }),
/// #             }
/// #         }
/// #     }
/// # }
/// // A target that counts up modulo 5, and a draft that knows it.
/// let law: Law = std::sync::Arc::new(|t: &[u32]| (0..5).map(|i| f64::from(i == (t[t.len() - 1] + 1) % 5)).collect());
/// let target = TableTarget::new(5, 64, law.clone());
/// let draft = Draft::new("table", TableDraft::new(law, Drawing::Deterministic));
/// let mut engine = Engine::new(Parts::drafted(target, draft, Greedy), Options { batch: 2, ..Options::default() })?;
/// for first in [0, 3] {
///     engine.submit(Request { prompt: vec![first], max_new_tokens: 6, ..Request::default() })?;
/// }
/// while !engine.is_idle() {
///     for event in engine.step() {
///         if let Event::Finished { request, output } = event {
///             println!("{request:?}: {:?} in {} cycles", output.ids, output.cycles.len());
///         }
///     }
/// }
/// # Ok::<(), scylla_core::Error>(())
/// ```
pub struct Engine<'a> {
    parts: Parts<'a>,
    options: Options,
    shape: TargetShape,
    taps: Vec<Tap>,
    waiting: VecDeque<Waiting>,
    /// In the order in which they came.
    live: Vec<Live>,
    memory: Memory,
    measured: Measured,
    events: Vec<Event>,
    next: u64,
}

/// What an engine has learned by running.
#[derive(Debug, Clone)]
pub struct Measured {
    /// Steps run.
    pub steps: u64,
    /// How recent trees of all requests fared, by depth.
    pub acceptance: Acceptance,
    /// What steps cost, by phase.
    pub costs: Costs,
}

impl Default for Measured {
    fn default() -> Self {
        Self {
            steps: 0,
            // Of all requests together there is more to remember than of one.
            acceptance: Acceptance::remembering(300.0),
            costs: Costs::default(),
        }
    }
}

impl<'a> Engine<'a> {
    /// An engine without requests.
    ///
    /// # Errors
    /// If an option is out of range.
    pub fn new(parts: Parts<'a>, options: Options) -> Result<Self> {
        let most = 1000 - options.batch.min(1000);
        if !(1..=1000).contains(&options.batch) || options.kept > most || options.prompt_rows == 0 {
            return Err(Error::Invalid(format!(
                "batch {} must be 1 to 1000, with the {} sequences kept at most 1000, and prompt_rows {} at least 1",
                options.batch, options.kept, options.prompt_rows
            )));
        }
        let mut parts = parts;
        if options.memory.is_some() {
            // What an engine before this one left is counted nowhere.
            parts.target.trim();
            if let Some(draft) = &mut parts.draft {
                draft.model.trim();
            }
        }
        Ok(Self {
            shape: parts.target.shape(),
            taps: parts.draft.as_ref().map_or(Vec::new(), |d| d.model.taps()),
            parts,
            options,
            waiting: VecDeque::new(),
            live: Vec::new(),
            memory: Memory::default(),
            measured: Measured::default(),
            events: Vec::new(),
            next: 0,
        })
    }

    /// Settles how a request would be decoded: limits and settings, the rule, and whether that is exact.
    fn settle(&self, request: &Request) -> Result<Settled> {
        request.check(self.shape.vocab, self.parts.tokenizer.is_some())?;
        request.settle(&*self.parts.rules, self.parts.draft.as_ref())
    }

    /// Checks all of a request but its prompt, and names the rule that it would be decoded with.
    ///
    /// # Errors
    /// If a setting is out of range, or the rule is not exact for the sampling or for the draft's trees.
    pub fn check(&self, request: &Request) -> Result<String> {
        Ok(self.settle(request)?.rule.name().to_string())
    }

    /// Takes a request, which joins at the next step that has a slot and memory for it.
    ///
    /// # Errors
    /// As [`Engine::check`]; if the prompt is empty, holds tokens that do not exist or leaves no room for an answer; or if
    /// it needs more memory than there is in all. Nothing is run before.
    pub fn submit(&mut self, request: Request) -> Result<RequestId> {
        let id = RequestId(self.next);
        self.next += 1;
        let settled = self.settle(&request)?;
        request.check_prompt(self.shape.context, self.shape.vocab)?;
        let bytes = self.bytes_of(&request);
        if let Some(limit) = self.options.memory.filter(|&limit| bytes > limit) {
            return Err(Error::Invalid(format!(
                "the request needs {bytes} bytes of caches ({} tokens of prompt and {} new ones at most), of {limit} in all",
                request.prompt.len(),
                request.max_new_tokens
            )));
        }
        self.waiting.push_back(Waiting {
            id,
            request,
            settled,
            bytes,
            since: Instant::now(),
        });
        Ok(id)
    }

    /// Takes a request back; what it has until now is returned. `None` where it has ended, or never was.
    pub fn cancel(&mut self, id: RequestId) -> Option<Output> {
        if let Some(at) = self.waiting.iter().position(|w| w.id == id) {
            let waiting = self.waiting.remove(at)?;
            let mut output = Output::unstarted(waiting.request.prompt.len());
            output.waited.slot = ms_since(waiting.since);
            output.waited.end = output.waited.slot;
            return Some(output);
        }
        let at = self.live.iter().position(|live| live.id == id)?;
        let live = self.live.remove(at);
        Some(self.close(live, Ok(Finish::Interrupted)))
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.live.is_empty()
    }

    /// Requests in slots, and requests that wait for one.
    pub fn load(&self) -> (usize, usize) {
        (self.live.len(), self.waiting.len())
    }

    /// What was learned until now.
    pub fn measured(&self) -> &Measured {
        &self.measured
    }

    /// Goes on from what an earlier engine of the same parts has learned.
    pub fn resume(&mut self, measured: Measured) {
        self.measured = measured;
    }

    /// Takes a live request out of its slot.
    fn close(&mut self, live: Live, ending: Result<Finish>) -> Output {
        let (finish, failed) = match ending {
            Ok(finish) => (finish, None),
            Err(e) => (Finish::Failed, Some(e.to_string())),
        };
        let mut output = live.output;
        output.finish = finish;
        output.failed = failed;
        output.text = live.text.into_text();
        output.waited.end = ms_since(live.since);
        let rows = live.rows.min(live.tokens.len());
        let tokens = live.tokens;
        self.leave(
            live.slot,
            live.bytes,
            (finish != Finish::Failed).then(|| tokens[..rows].to_vec()),
        );
        output
    }

    /// Ends those that ended in this step.
    fn sweep(&mut self) {
        let mut at = 0;
        while at < self.live.len() {
            match self.live[at].ending.take() {
                None => at += 1,
                Some(ending) => {
                    let live = self.live.remove(at);
                    let request = live.id;
                    let output = self.close(live, ending);
                    self.events.push(Event::Finished { request, output });
                }
            }
        }
    }
}

impl Drop for Engine<'_> {
    /// Parts that were lent have no open slots afterwards.
    fn drop(&mut self) {
        let live = self.live.iter().map(|live| live.slot);
        let slots: Vec<Slot> = live.chain(self.memory.kept_slots()).collect();
        slots.into_iter().for_each(|slot| self.close_slot(slot));
    }
}

/// Decodes requests and returns what became of each, in their order; one that is refused has failed.
///
/// `on_event` may break off (Ctrl-C): what ended in that step keeps its reason and its event, the others keep what they have
/// and finish as [`Finish::Interrupted`].
pub fn decode(
    engine: &mut Engine<'_>,
    requests: Vec<Request>,
    on_event: &mut dyn FnMut(&Event) -> ControlFlow<()>,
) -> Vec<Output> {
    // Ids count up, those of refused requests too.
    let first = engine.next;
    let mut outputs: Vec<Option<Output>> = Vec::with_capacity(requests.len());
    for request in requests {
        let prompt = request.prompt.len();
        let submitted = engine.submit(request);
        let refused = submitted
            .err()
            .map(|e| Output::refused(prompt, e.to_string()));
        outputs.push(refused);
    }
    let mut broken = false;
    while !broken && !engine.is_idle() {
        for event in engine.step() {
            let ended = matches!(event, Event::Finished { .. });
            if !broken || ended {
                broken |= on_event(&event).is_break();
            }
            if let Event::Finished { request, output } = event {
                let place = request.0.checked_sub(first).map(|place| place as usize);
                if let Some(place) = place.and_then(|place| outputs.get_mut(place)) {
                    *place = Some(output);
                }
            }
        }
    }
    let ids = (first..).map(RequestId);
    let rest = outputs.into_iter().zip(ids);
    let whole = rest.map(|(output, id)| output.or_else(|| engine.cancel(id)));
    whole
        .map(|output| output.unwrap_or_else(|| Output::unstarted(0)))
        .collect()
}
