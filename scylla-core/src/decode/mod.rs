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
use crate::tree::{Budget, Tree};
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
/// `on_event` may break off (Ctrl-C): sequences keep what they have, and finish as [`Finish::Interrupted`].
///
/// # Errors
/// On settings out of range, a prompt that is empty or does not fit, a rule that is not exact for the draft,
/// and whatever the parts report.
pub fn decode(
    parts: &mut Parts<'_>,
    jobs: &[Job],
    settings: &Settings,
    tokenizer: Option<&Tokenizer>,
    on_event: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
) -> Result<Vec<Output>> {
    let taps = check(parts, jobs, settings, tokenizer)?;
    let mut run = Loop {
        context: parts.target.shape().context,
        vocab: parts.target.shape().vocab,
        parts,
        settings,
        tokenizer,
        taps,
        live: Vec::new(),
    };
    let mut outputs: Vec<Option<Output>> = jobs.iter().map(|_| None).collect();
    let result = run.all(jobs, &mut outputs, on_event);
    for live in std::mem::take(&mut run.live) {
        run.close(live, Finish::Interrupted, &mut outputs);
    }
    result?;
    let never = |job: &Job| Output::unstarted(job.prompt.len());
    Ok(outputs
        .into_iter()
        .zip(jobs)
        .map(|(output, job)| output.unwrap_or_else(|| never(job)))
        .collect())
}

/// Checks everything that can be known before the first forward; returns the draft's taps.
fn check(
    parts: &Parts<'_>,
    jobs: &[Job],
    settings: &Settings,
    tokenizer: Option<&Tokenizer>,
) -> Result<Vec<Tap>> {
    settings.sampling.check()?;
    let shape = parts.target.shape();
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
    for (i, job) in jobs.iter().enumerate() {
        if job.prompt.is_empty() {
            return invalid(format!("prompt {i} is empty"));
        }
        if job.prompt.len() >= shape.context {
            return invalid(format!(
                "prompt {i} has {} tokens; the context of {} leaves no room for an answer",
                job.prompt.len(),
                shape.context
            ));
        }
        if let Some(token) = job.prompt.iter().find(|&&t| t as usize >= shape.vocab) {
            return invalid(format!(
                "prompt {i} holds token {token}, outside the vocabulary of {}",
                shape.vocab
            ));
        }
    }
    Ok(parts.draft.as_ref().map_or(Vec::new(), |(_, d)| d.taps()))
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
}

type OnEvent<'e> = dyn FnMut(Event<'_>) -> ControlFlow<()> + 'e;

impl Loop<'_, '_> {
    fn all(
        &mut self,
        jobs: &[Job],
        outputs: &mut [Option<Output>],
        on_event: &mut OnEvent<'_>,
    ) -> Result<()> {
        let mut next = 0;
        while next < jobs.len() || !self.live.is_empty() {
            while next < jobs.len() && self.live.len() < self.settings.batch {
                let finish = self.start(next, &jobs[next], on_event)?;
                next += 1;
                if self
                    .end(finish.into_iter().collect(), outputs, on_event)?
                    .is_break()
                {
                    return Ok(());
                }
            }
            if self.live.is_empty() {
                continue;
            }
            let finished = self.cycle(on_event)?;
            if self.end(finished, outputs, on_event)?.is_break() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Takes finished sequences (indices into `live`, ascending) out of their slots.
    fn end(
        &mut self,
        finished: Vec<(usize, Finish)>,
        outputs: &mut [Option<Output>],
        on_event: &mut OnEvent<'_>,
    ) -> Result<ControlFlow<()>> {
        for (index, finish) in finished.into_iter().rev() {
            let live = self.live.remove(index);
            let job = live.job;
            if finish == Finish::Interrupted {
                self.live.push(live); // the caller closes what is left
                return Ok(ControlFlow::Break(()));
            }
            self.close(live, finish, outputs);
            if on_event(Event::Finished { job, finish }).is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    fn close(&mut self, mut live: Live, finish: Finish, outputs: &mut [Option<Output>]) {
        self.parts.target.close(live.slot);
        if let Some((_, draft)) = &mut self.parts.draft {
            draft.close(live.slot);
        }
        live.output.finish = finish;
        live.output.text = live.text.into_text();
        outputs[live.job] = Some(live.output);
    }

    /// Opens a slot, runs the prompt and samples the first token, which belongs to no cycle.
    fn start(
        &mut self,
        job: usize,
        spec: &Job,
        on_event: &mut OnEvent<'_>,
    ) -> Result<Option<(usize, Finish)>> {
        let begun = Instant::now();
        let used = |slot: &usize| self.live.iter().any(|l| l.slot == *slot);
        let slot = (0..).find(|slot| !used(slot)).unwrap_or(0);
        self.parts.target.open(slot)?;
        if let Some((_, draft)) = &mut self.parts.draft
            && let Err(e) = draft.open(slot)
        {
            self.parts.target.close(slot);
            return Err(e);
        }
        // Registered before the prompt runs: an error below still closes the slot.
        self.live.push(Live {
            job,
            slot,
            tokens: spec.prompt.clone(),
            chance: Seeded::new(self.settings.seed, spec.sequence),
            text: TextOut::new(self.tokenizer, &self.settings.stops),
            output: Output::unstarted(spec.prompt.len()),
        });
        let index = self.live.len() - 1;
        let bonus = self.prefill(slot, index, &spec.prompt)?;
        let live = &mut self.live[index];
        live.output.ms.prefill = begun.elapsed().as_secs_f64() * 1e3;
        let (_, finish) = keep(live, &[bonus], self.settings, self.context, on_event)?;
        Ok(finish.map(|finish| (index, finish)))
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
                };
                let verdict = self.parts.verifier.verify(&tree, &rows, &mut live.chance)?;
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

    /// One cycle of all live sequences; returns those that ended, as indices into `live`.
    fn cycle(&mut self, on_event: &mut OnEvent<'_>) -> Result<Vec<(usize, Finish)>> {
        let share = 1e3 / self.live.len() as f64;
        let mut clock = Instant::now();
        let mut lap = || {
            let now = Instant::now();
            let ms = now
                .duration_since(std::mem::replace(&mut clock, now))
                .as_secs_f64()
                * share;
            ms.max(0.0)
        };
        let mut ms = Phases::default();
        let trees = self.propose()?;
        ms.propose = lap();
        let forward = self.forward(&trees)?;
        ms.forward = lap();
        let verdicts = self.accept(&trees, &forward)?;
        ms.accept = lap();
        let mut finished = Vec::new();
        let mut observe_ms = 0.0;
        for (i, (tree, verdict)) in trees.iter().zip(&verdicts).enumerate() {
            let mut path = vec![0];
            path.extend(&verdict.path);
            let slot = self.live[i].slot;
            self.parts.target.commit(slot, &path)?;
            let mut tokens: Vec<u32> = verdict.path.iter().map(|&n| tree.tokens[n]).collect();
            tokens.push(verdict.bonus);
            ms.commit += lap();
            self.observe(slot, &tokens, &path, forward.taps.get(i).map_or(&[], |t| t))?;
            observe_ms += lap();
            let (settings, context) = (self.settings, self.context);
            let live = &mut self.live[i];
            let (kept, finish) = keep(live, &tokens, settings, context, on_event)?;
            let accepted = verdict.path.len().min(kept);
            let (ranks, offered) = among_siblings(tree, &verdict.path[..accepted]);
            live.output.cycles.push(Cycle {
                nodes: tree.len(),
                depth: tree.depth(),
                accepted,
                committed: kept,
                ranks,
                offered,
                cut: kept < tokens.len() || finish.is_some_and(|f| f != Finish::Interrupted),
                ms: Phases::default(), // filled in below, when the whole cycle is known
            });
            self.parts.policy.observe(tree.len(), verdict.path.len());
            finished.extend(finish.map(|finish| (i, finish)));
        }
        self.parts.target.recycle(forward);
        ms.commit += lap();
        ms.propose += observe_ms;
        for live in &mut self.live {
            live.output.ms.add(&ms);
            if let Some(cycle) = live.output.cycles.last_mut() {
                cycle.ms = ms;
            }
        }
        Ok(finished)
    }

    fn propose(&mut self) -> Result<Vec<Tree>> {
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
        let mut trees: Vec<Tree> = self.live.iter().map(|l| Tree::root(l.root())).collect();
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
        let refuse = |drawing: String| {
            Err(Error::NotExact {
                rule: self.parts.verifier.name().into(),
                draft: (*name).into(),
                proposals: drawing,
            })
        };
        let exact = |width| self.parts.verifier.exact_for(drawing, width, sampling);
        if !self.settings.lossy && !exact(wanted.width) {
            return refuse(format!("trees of width {} ({drawing})", wanted.width));
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
            tree.check(self.live[i].root(), self.vocab, budgets[i])?;
            if !self.settings.lossy && !tree.is_empty() && tree.drawing != drawing {
                return refuse(format!("{} trees, declared as {drawing},", tree.drawing));
            }
            trees[i] = tree;
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

    fn accept(&mut self, trees: &[Tree], forward: &Forward) -> Result<Vec<Verdict>> {
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
            };
            let verdict = self.parts.verifier.verify(tree, &rows, &mut live.chance)?;
            verdict.check(tree, self.vocab)?;
            verdicts.push(verdict);
        }
        Ok(verdicts)
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

/// Appends tokens until one ends the sequence; returns how many were kept, and why it ended.
fn keep(
    live: &mut Live,
    tokens: &[u32],
    settings: &Settings,
    context: usize,
    on_event: &mut OnEvent<'_>,
) -> Result<(usize, Option<Finish>)> {
    let mut finish = None;
    let mut kept = 0;
    let mut text = String::new();
    for &token in tokens {
        kept += 1;
        live.tokens.push(token);
        live.output.ids.push(token);
        if settings.eos.contains(&token) {
            finish = Some(Finish::Eos);
        } else if live.text.push(token, &mut text)? {
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
    let told = on_event(Event::Tokens {
        job: live.job,
        ids: &tokens[..kept],
        text: &text,
    });
    if told.is_break() && finish.is_none() {
        finish = Some(Finish::Interrupted);
    }
    Ok((kept, finish))
}

impl Live {
    fn root(&self) -> u32 {
        self.tokens[self.tokens.len() - 1]
    }
}
