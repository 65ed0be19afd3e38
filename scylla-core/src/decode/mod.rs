//! The decode loop: propose, forward, accept, commit, over any number of slots.
//!
//! It is generic over target, draft, rule and budget policy, and knows nothing else. Plain decoding is the same
//! loop over trees that hold only their root.

mod record;
mod rows;
mod stream;

use std::ops::ControlFlow;
use std::time::Instant;

pub use record::{Cycle, Finish, Output, Phases, tau};
pub use rows::LogitRows;
use stream::TextOut;

use crate::chance::Seeded;
use crate::plugin::{
    BudgetPolicy, Committed, DraftModel, Forward, Matrix, Request, SlotRows, Step, Tap,
    TargetModel, Verdict, Verifier, Want,
};
use crate::sampling::Sampling;
use crate::text::Tokenizer;
use crate::tree::{Budget, Drawing, Tree};
use crate::{Error, Result};

/// Target, draft, rule and budget policy of one decoder.
pub struct Parts<'a> {
    /// The model being accelerated.
    pub target: &'a mut dyn TargetModel,
    /// What proposes, with the name that messages print; `None` decodes plainly.
    pub draft: Option<(&'a str, &'a mut dyn DraftModel)>,
    /// The acceptance rule.
    pub verifier: &'a dyn Verifier,
    /// The budget of each cycle.
    pub policy: &'a mut dyn BudgetPolicy,
}

/// One sequence to decode.
#[derive(Debug, Clone)]
pub struct Job {
    /// Token ids of the prompt.
    pub prompt: Vec<u32>,
    /// Keys the random stream: the same sequence number draws the same tokens in any batch.
    pub sequence: u64,
}

/// What holds for all sequences of a run.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The transform of p and q.
    pub sampling: Sampling,
    /// Seed of the random streams.
    pub seed: u64,
    /// Limit of new tokens per sequence, at least 1.
    pub max_new_tokens: usize,
    /// Ids that end a sequence; empty to ignore them.
    pub eos: Vec<u32>,
    /// Texts that end a sequence. They need a tokenizer.
    pub stops: Vec<String>,
    /// Sequences decoded side by side, at least 1.
    pub batch: usize,
    /// Accepts rules that are not exact for the draft's trees.
    pub lossy: bool,
    /// Rows of one prefill forward; a sequence's own, so that results do not depend on the batch.
    pub prefill_chunk: usize,
    /// Tokens the tokenizer knows; logits beyond are padding. `None` takes the model's vocabulary.
    pub known_tokens: Option<usize>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            sampling: Sampling::default(),
            seed: 0,
            max_new_tokens: 128,
            eos: Vec::new(),
            stops: Vec::new(),
            batch: 1,
            lossy: false,
            prefill_chunk: 128,
            known_tokens: None,
        }
    }
}

/// What the loop tells while it works.
#[derive(Debug)]
pub enum Event<'a> {
    /// Tokens became final. The text holds whole characters only and may lag behind the ids.
    Tokens {
        /// Index of the job.
        job: usize,
        /// New ids.
        ids: &'a [u32],
        /// New text; empty without a tokenizer.
        text: &'a str,
    },
    /// A sequence ended.
    Finished {
        /// Index of the job.
        job: usize,
        /// Why.
        finish: Finish,
    },
}

/// Decodes all jobs, `settings.batch` at a time, and returns their outputs in order.
///
/// `on_event` may break off (Ctrl-C): sequences that had ended keep their reason, the others keep what they have and
/// finish as [`Finish::Interrupted`]. A job that fails (a prompt that is empty or does not fit, logits that are no numbers)
/// ends alone, as [`Finish::Failed`]; what goes wrong for a whole batch ends that batch, and the next jobs go on.
///
/// # Errors
/// On what concerns every job, before anything is run: settings out of range, or a rule that is not exact for the sampling
/// or for the draft's trees.
pub fn decode(
    parts: &mut Parts<'_>,
    jobs: &[Job],
    settings: &Settings,
    tokenizer: Option<&Tokenizer>,
    on_event: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
) -> Result<Vec<Output>> {
    check(parts, settings, tokenizer)?;
    check_exact(parts, settings, jobs.len())?;
    let mut run = Loop {
        context: parts.target.shape().context,
        vocab: parts.target.shape().vocab,
        taps: parts.draft.as_ref().map_or(Vec::new(), |(_, d)| d.taps()),
        parts,
        settings,
        tokenizer,
        live: Vec::new(),
        outputs: jobs.iter().map(|_| None).collect(),
        broken: false,
    };
    run.all(jobs, on_event);
    let never = |job: &Job| Output::unstarted(job.prompt.len());
    Ok(run
        .outputs
        .into_iter()
        .zip(jobs)
        .map(|(output, job)| output.unwrap_or_else(|| never(job)))
        .collect())
}

/// Checks the settings.
fn check(parts: &Parts<'_>, settings: &Settings, tokenizer: Option<&Tokenizer>) -> Result<()> {
    settings.sampling.check()?;
    let invalid = |message: String| Err(Error::Invalid(message));
    if settings.batch == 0 || settings.max_new_tokens == 0 || settings.prefill_chunk == 0 {
        return invalid(format!(
            "batch {}, max_new_tokens {} and prefill_chunk {} must each be at least 1",
            settings.batch, settings.max_new_tokens, settings.prefill_chunk
        ));
    }
    if !settings.stops.is_empty() && tokenizer.is_none() {
        return invalid("stop strings need a tokenizer".into());
    }
    if settings.stops.iter().any(String::is_empty) {
        return invalid("a stop string is empty".into());
    }
    let (known, vocab) = (settings.known_tokens, parts.target.shape().vocab);
    if known.is_some_and(|known| known == 0 || known > vocab) {
        return invalid(format!("{known:?} known tokens of a vocabulary of {vocab}"));
    }
    Ok(())
}

/// Checks that the rule is exact where nothing is drafted, which is so for the first token of every answer, and for
/// the trees that the draft will propose.
fn check_exact(parts: &mut Parts<'_>, settings: &Settings, jobs: usize) -> Result<()> {
    let budget = parts.policy.budget(settings.batch.min(jobs.max(1)));
    budget.check()?;
    if settings.lossy {
        return Ok(());
    }
    let (rule, sampling) = (parts.verifier, &settings.sampling);
    let drawings = [
        Drawing::Deterministic,
        Drawing::Independent,
        Drawing::WithoutReplacement,
    ];
    if !drawings.iter().any(|&d| rule.exact_for(d, 0, sampling)) {
        return Err(Error::NotSampling {
            rule: rule.name().into(),
            temperature: sampling.temperature,
        });
    }
    match &parts.draft {
        Some((name, draft)) if budget.levels() > 0 => {
            let drawing = draft.drawing(sampling);
            check_width(rule, name, drawing, budget.width, sampling)
        }
        _ => Ok(()),
    }
}

fn check_width(
    rule: &dyn Verifier,
    draft: &str,
    drawing: Drawing,
    width: usize,
    sampling: &Sampling,
) -> Result<()> {
    match rule.exact_for(drawing, width, sampling) {
        true => Ok(()),
        false => Err(not_exact(
            rule,
            draft,
            format!("trees of width {width} ({drawing})"),
        )),
    }
}

fn not_exact(rule: &dyn Verifier, draft: &str, proposals: String) -> Error {
    Error::NotExact {
        rule: rule.name().into(),
        draft: draft.into(),
        proposals,
    }
}

/// A sequence in a slot.
struct Live {
    job: usize,
    slot: usize,
    /// Prompt and new tokens; the last is the root of the next tree.
    tokens: Vec<u32>,
    chance: Seeded,
    text: TextOut,
    output: Output,
}

struct Loop<'a, 'p> {
    parts: &'a mut Parts<'p>,
    settings: &'a Settings,
    tokenizer: Option<&'a Tokenizer>,
    context: usize,
    vocab: usize,
    taps: Vec<Tap>,
    live: Vec<Live>,
    /// By job.
    outputs: Vec<Option<Output>>,
    /// Whether the caller broke off.
    broken: bool,
}

type OnEvent<'e> = dyn FnMut(Event<'_>) -> ControlFlow<()> + 'e;

/// How a sequence ended.
type Ending = Result<Finish>;

impl Loop<'_, '_> {
    fn all(&mut self, jobs: &[Job], on_event: &mut OnEvent<'_>) {
        let mut next = 0;
        while !self.broken && (next < jobs.len() || !self.live.is_empty()) {
            if next < jobs.len() && self.live.len() < self.settings.batch {
                self.start(next, &jobs[next], on_event);
                next += 1;
            } else {
                self.cycle(on_event);
            }
        }
        while let Some(live) = self.live.pop() {
            self.close(live, Finish::Interrupted, None);
        }
    }

    /// Tells the caller, who may break off.
    fn tell(&mut self, event: Event<'_>, on_event: &mut OnEvent<'_>) {
        self.broken |= on_event(event).is_break();
    }

    /// Takes sequences that ended (indices into `live`, ascending) out of their slots.
    fn end(&mut self, ended: Vec<(usize, Ending)>, on_event: &mut OnEvent<'_>) {
        for (index, ending) in ended.into_iter().rev() {
            let live = self.live.remove(index);
            let job = live.job;
            let (finish, failed) = match ending {
                Ok(finish) => (finish, None),
                Err(e) => (Finish::Failed, Some(e.to_string())),
            };
            self.close(live, finish, failed);
            self.tell(Event::Finished { job, finish }, on_event);
        }
    }

    /// Ends all sequences that are being decoded.
    fn end_all(&mut self, error: &Error, on_event: &mut OnEvent<'_>) {
        let message = error.to_string();
        let ending = |i| (i, Err(Error::Invalid(message.clone())));
        self.end((0..self.live.len()).map(ending).collect(), on_event);
    }

    fn close(&mut self, mut live: Live, finish: Finish, failed: Option<String>) {
        self.parts.target.close(live.slot);
        if let Some((_, draft)) = &mut self.parts.draft {
            draft.close(live.slot);
        }
        live.output.finish = finish;
        live.output.failed = failed;
        live.output.text = live.text.into_text();
        self.outputs[live.job] = Some(live.output);
    }

    /// Starts a job; what goes wrong ends it alone.
    fn start(&mut self, job: usize, spec: &Job, on_event: &mut OnEvent<'_>) {
        let opened = self
            .check_job(job, spec)
            .and_then(|()| self.open(job, spec));
        if let Err(e) = opened {
            self.outputs[job] = Some(Output {
                finish: Finish::Failed,
                failed: Some(e.to_string()),
                ..Output::unstarted(spec.prompt.len())
            });
            let finish = Finish::Failed;
            return self.tell(Event::Finished { job, finish }, on_event);
        }
        let index = self.live.len() - 1;
        let ending = match self.first_token(index, spec) {
            Ok(bonus) => self.keep(index, &[bonus], on_event).1.map(Ok),
            Err(e) => Some(Err(e)),
        };
        self.end(ending.map(|e| (index, e)).into_iter().collect(), on_event);
    }

    fn check_job(&self, job: usize, spec: &Job) -> Result<()> {
        let invalid = |message: String| Err(Error::Invalid(message));
        if spec.prompt.is_empty() {
            return invalid(format!("prompt {job} is empty"));
        }
        if spec.prompt.len() >= self.context {
            return invalid(format!(
                "prompt {job} has {} tokens; the context of {} leaves no room for an answer",
                spec.prompt.len(),
                self.context
            ));
        }
        match spec.prompt.iter().find(|&&t| t as usize >= self.vocab) {
            Some(token) => invalid(format!(
                "prompt {job} holds token {token}, outside the vocabulary of {}",
                self.vocab
            )),
            None => Ok(()),
        }
    }

    /// Opens a slot for a job.
    fn open(&mut self, job: usize, spec: &Job) -> Result<()> {
        let used = |slot: &usize| self.live.iter().any(|l| l.slot == *slot);
        let slot = (0..).find(|slot| !used(slot)).unwrap_or(0);
        self.parts.target.open(slot)?;
        if let Some((_, draft)) = &mut self.parts.draft
            && let Err(e) = draft.open(slot)
        {
            self.parts.target.close(slot);
            return Err(e);
        }
        self.live.push(Live {
            job,
            slot,
            tokens: spec.prompt.clone(),
            chance: Seeded::new(self.settings.seed, spec.sequence),
            text: TextOut::new(self.tokenizer, &self.settings.stops),
            output: Output::unstarted(spec.prompt.len()),
        });
        Ok(())
    }

    /// Runs the prompt and samples the first token, which belongs to no cycle.
    fn first_token(&mut self, index: usize, spec: &Job) -> Result<u32> {
        let begun = Instant::now();
        let bonus = self.prefill(self.live[index].slot, index, &spec.prompt)?;
        self.live[index].output.ms.prefill = begun.elapsed().as_secs_f64() * 1e3;
        Ok(bonus)
    }

    fn prefill(&mut self, slot: usize, index: usize, prompt: &[u32]) -> Result<u32> {
        let chunks = prompt.chunks(self.settings.prefill_chunk);
        let last = chunks.len() - 1;
        for (i, chunk) in chunks.enumerate() {
            let want = if i == last { Want::Last } else { Want::None };
            let forward = self.parts.target.forward(&Step {
                slots: vec![SlotRows {
                    slot,
                    tokens: chunk,
                    parents: &[],
                    want,
                }],
                taps: &self.taps,
            })?;
            let path: Vec<usize> = (0..chunk.len()).collect();
            self.parts.target.commit(slot, &path)?;
            let mut tokens = chunk.to_vec();
            if i == last {
                let live = &mut self.live[index];
                live.chance.at(prompt.len());
                let tree = Tree::root(chunk[chunk.len() - 1]);
                let rows = LogitRows {
                    logits: forward.logits.first().ok_or_else(no_logits)?,
                    tree: &tree,
                    history: &prompt[..prompt.len() - 1],
                    sampling: &self.settings.sampling,
                    known: self.settings.known_tokens.unwrap_or(self.vocab),
                    best: Default::default(),
                };
                let verdict = self.parts.verifier.verify(&tree, &rows, &mut live.chance)?;
                verdict.check(&tree, self.vocab)?;
                tokens.push(verdict.bonus);
            }
            self.observe(
                slot,
                &tokens,
                &path,
                forward.taps.first().map_or(&[], |t| t),
            )?;
            if i == last {
                return Ok(tokens[tokens.len() - 1]);
            }
        }
        Err(Error::Invalid("the prompt is empty".into()))
    }

    fn observe(
        &mut self,
        slot: usize,
        tokens: &[u32],
        path: &[usize],
        taps: &[Matrix],
    ) -> Result<()> {
        match &mut self.parts.draft {
            Some((_, draft)) => draft.observe(&[Committed {
                slot,
                tokens,
                path,
                taps,
            }]),
            None => Ok(()),
        }
    }

    /// One cycle of all live sequences.
    fn cycle(&mut self, on_event: &mut OnEvent<'_>) {
        let mut clock = Instant::now();
        let mut lap = || {
            let now = Instant::now();
            let whole = now.duration_since(std::mem::replace(&mut clock, now));
            whole.as_secs_f64() * 1e3
        };
        let mut ms = Phases::default();
        let trees = match self.propose() {
            Ok(trees) => self.good(trees, on_event),
            Err(e) => return self.end_all(&e, on_event),
        };
        ms.propose = lap();
        if self.live.is_empty() {
            return;
        }
        let forward = match self.forward(&trees) {
            Ok(forward) => forward,
            Err(e) => return self.end_all(&e, on_event),
        };
        ms.forward = lap();
        let verdicts = self.accept(&trees, &forward);
        ms.accept = lap();
        let mut ended = Vec::new();
        let mut observe_ms = 0.0;
        for (i, (tree, verdict)) in trees.iter().zip(verdicts).enumerate() {
            let done = verdict.and_then(|verdict| {
                let mut path = vec![0];
                path.extend(&verdict.path);
                let slot = self.live[i].slot;
                self.parts.target.commit(slot, &path)?;
                let mut tokens: Vec<u32> = verdict.path.iter().map(|&n| tree.tokens[n]).collect();
                tokens.push(verdict.bonus);
                ms.commit += lap();
                self.observe(slot, &tokens, &path, forward.taps.get(i).map_or(&[], |t| t))?;
                observe_ms += lap();
                Ok((verdict, tokens))
            });
            let ending = match done {
                Ok((verdict, tokens)) => self.record(i, tree, &verdict, &tokens, on_event).map(Ok),
                Err(e) => Some(Err(e)),
            };
            ended.extend(ending.map(|ending| (i, ending)));
        }
        self.parts.target.recycle(forward);
        ms.commit += lap();
        ms.propose += observe_ms;
        let ms = ms.shared(self.live.len());
        let failed = |i: usize| ended.iter().any(|(at, ending)| *at == i && ending.is_err());
        for (i, live) in self.live.iter_mut().enumerate() {
            live.output.ms.add(&ms);
            // One that failed has no record of this cycle.
            let cycle = live.output.cycles.last_mut().filter(|_| !failed(i));
            if let Some(cycle) = cycle {
                cycle.ms = ms;
            }
        }
        self.end(ended, on_event);
    }

    /// The trees of the sequences whose draft kept its contract; the others end here.
    fn good(&mut self, trees: Vec<Result<Tree>>, on_event: &mut OnEvent<'_>) -> Vec<Tree> {
        let (mut good, mut ended) = (Vec::with_capacity(trees.len()), Vec::new());
        for (i, tree) in trees.into_iter().enumerate() {
            match tree {
                Ok(tree) => good.push(tree),
                Err(e) => ended.push((i, Err(e))),
            }
        }
        self.end(ended, on_event);
        good
    }

    /// Keeps a sequence's new tokens and records its cycle; says why it ended, if it did.
    fn record(
        &mut self,
        index: usize,
        tree: &Tree,
        verdict: &Verdict,
        tokens: &[u32],
        on_event: &mut OnEvent<'_>,
    ) -> Option<Finish> {
        let (kept, finish) = self.keep(index, tokens, on_event);
        let accepted = verdict.path.len().min(kept);
        let (ranks, offered) = among_siblings(tree, &verdict.path[..accepted]);
        self.live[index].output.cycles.push(Cycle {
            nodes: tree.len(),
            depth: tree.depth(),
            accepted,
            committed: kept,
            ranks,
            offered,
            cut: kept < tokens.len() || finish.is_some(),
            ms: Phases::default(), // filled in when the whole cycle is known
        });
        self.parts.policy.observe(tree.len(), verdict.path.len());
        finish
    }

    /// Appends tokens until one ends the sequence; returns how many were kept, and why it ended.
    fn keep(
        &mut self,
        index: usize,
        tokens: &[u32],
        on_event: &mut OnEvent<'_>,
    ) -> (usize, Option<Finish>) {
        let (settings, context) = (self.settings, self.context);
        let live = &mut self.live[index];
        let mut finish = None;
        let mut kept = 0;
        let mut text = String::new();
        for &token in tokens {
            kept += 1;
            live.tokens.push(token);
            live.output.ids.push(token);
            if settings.eos.contains(&token) {
                finish = Some(Finish::Eos);
            } else if live.text.push(token, &mut text) {
                finish = Some(Finish::Stop);
            } else if live.output.ids.len() >= settings.max_new_tokens {
                finish = Some(Finish::Length);
            } else if live.tokens.len() >= context {
                finish = Some(Finish::Context);
            }
            if finish.is_some() {
                live.text.flush(&mut text);
                break;
            }
        }
        let (job, ids, text) = (live.job, &tokens[..kept], &text);
        self.tell(Event::Tokens { job, ids, text }, on_event);
        (kept, finish)
    }

    /// A tree for each sequence; an inner error is that of one draft's tree.
    fn propose(&mut self) -> Result<Vec<Result<Tree>>> {
        let wanted = self.parts.policy.budget(self.live.len());
        wanted.check()?;
        let budgets: Vec<Budget> = self
            .live
            .iter()
            .map(|live| {
                let left = self.settings.max_new_tokens - live.output.ids.len();
                let room = self.context - live.tokens.len();
                // A cycle adds the bonus too, so drafting the last token would be wasted.
                wanted.within(left.min(room) - 1, room + 1)
            })
            .collect();
        let alone = self.live.iter().map(|l| Ok(Tree::root(l.root())));
        let mut trees: Vec<Result<Tree>> = alone.collect();
        let Some((name, draft)) = &mut self.parts.draft else {
            return Ok(trees);
        };
        let sampling = &self.settings.sampling;
        let drawing = draft.drawing(sampling);
        for live in &mut self.live {
            live.chance.at(live.tokens.len());
        }
        let mut asked = Vec::new();
        let mut requests = Vec::new();
        for (i, (live, &budget)) in self.live.iter_mut().zip(&budgets).enumerate() {
            if budget.levels() > 0 {
                asked.push(i);
                requests.push(Request {
                    slot: live.slot,
                    root: live.root(),
                    budget,
                    sampling,
                    chance: &mut live.chance,
                });
            }
        }
        if requests.is_empty() {
            return Ok(trees);
        }
        let (rule, lossy) = (self.parts.verifier, self.settings.lossy);
        if !lossy {
            // Again: a policy may have changed the width.
            check_width(rule, name, drawing, wanted.width, sampling)?;
        }
        let proposed = draft.propose(&mut requests)?;
        if proposed.len() != asked.len() {
            return Err(Error::Invalid(format!(
                "draft proposed {} trees for {} slots",
                proposed.len(),
                asked.len()
            )));
        }
        drop(requests);
        for (i, tree) in asked.into_iter().zip(proposed) {
            let checked = tree.check(self.live[i].root(), self.vocab, budgets[i]);
            trees[i] = checked.and_then(|()| {
                match !lossy && !tree.is_empty() && tree.drawing != drawing {
                    false => Ok(tree),
                    true => {
                        let found = format!("{} trees, declared as {drawing},", tree.drawing);
                        Err(not_exact(rule, name, found))
                    }
                }
            });
        }
        Ok(trees)
    }

    fn forward(&mut self, trees: &[Tree]) -> Result<Forward> {
        let parents: Vec<Vec<Option<usize>>> = trees
            .iter()
            .map(|t| {
                let above = |i: usize| (i > 0).then(|| t.parents[i]);
                (0..t.len()).map(above).collect()
            })
            .collect();
        let rows = self.live.iter().zip(trees).zip(&parents);
        let forward = self.parts.target.forward(&Step {
            slots: rows
                .map(|((live, tree), parents)| SlotRows {
                    slot: live.slot,
                    tokens: &tree.tokens,
                    parents,
                    want: Want::All,
                })
                .collect(),
            taps: &self.taps,
        })?;
        if forward.logits.len() != trees.len() {
            return Err(no_logits());
        }
        Ok(forward)
    }

    /// What the rule says of each tree; an error is that of one sequence.
    fn accept(&mut self, trees: &[Tree], forward: &Forward) -> Vec<Result<Verdict>> {
        let settings = self.settings;
        let known = settings.known_tokens.unwrap_or(self.vocab);
        let mut verdicts = Vec::with_capacity(trees.len());
        for ((live, tree), logits) in self.live.iter_mut().zip(trees).zip(&forward.logits) {
            if self.parts.draft.is_none() {
                live.chance.at(live.tokens.len());
            }
            let rows = LogitRows {
                logits,
                tree,
                history: &live.tokens[..live.tokens.len() - 1],
                sampling: &settings.sampling,
                known,
                best: Default::default(),
            };
            let verdict = self.parts.verifier.verify(tree, &rows, &mut live.chance);
            verdicts.push(verdict.and_then(|verdict| {
                verdict.check(tree, self.vocab)?;
                Ok(verdict)
            }));
        }
        verdicts
    }
}

/// Rank of each node of a path among its siblings, and how many children the root and each of them has.
fn among_siblings(tree: &Tree, path: &[usize]) -> (Vec<usize>, Vec<usize>) {
    let parent = |node: &usize| tree.parents[*node];
    let rank = |node: &usize| tree.children(parent(node)).take_while(|n| n < node).count();
    let visited = std::iter::once(0).chain(path.iter().copied());
    (
        path.iter().map(rank).collect(),
        visited.map(|node| tree.children(node).count()).collect(),
    )
}

fn no_logits() -> Error {
    Error::Invalid("the target returned fewer logits than were asked for".into())
}

impl Live {
    fn root(&self) -> u32 {
        self.tokens[self.tokens.len() - 1]
    }
}
