//! The comparison of decoders: the same prompts, interleaved in one run, on a loaded target.

mod converse;
mod rows;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use scylla_core::engine::{Output, Step};
use scylla_core::files;
use scylla_core::policy::StepTimes;
use scylla_core::text::ChatTemplate;
use serde::{Deserialize, Serialize};

use crate::environment::{Environment, peak_resident};
use crate::experiment::{self, BudgetSpec, Experiment, TraceKind};
use crate::prompts::{self, Prompt};
use crate::registry::Registry;
use crate::runs::{self, CycleRow, StepRow};
use crate::session::{Composed, Session};
use crate::stats::{Interval, Quantiles, Spread};
use crate::trace::{Recorder, Writer};
use crate::{Error, Result};
use converse::{Talk, converse, opening, warm_up};

/// What a comparison found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Version of the form of a run's files ([`runs::VERSION`]).
    pub format: u32,
    /// Where.
    pub environment: Environment,
    /// Memory of the process.
    pub memory: Memory,
    /// By batch, one row per decoder and task, then one over all tasks (`task` = `all`).
    pub rows: Vec<Row>,
    /// Where the results were written.
    pub output: PathBuf,
    /// Whether the user broke off; the rows then hold what was done.
    pub interrupted: bool,
    /// Turns that could not be decoded. No row counts them, or what came after them, for any decoder.
    pub skipped: Vec<Skipped>,
    /// Files that could not be written, with the reason.
    #[serde(skip)]
    pub unwritten: Vec<String>,
}

/// A turn that could not be decoded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// The prompt's id.
    pub prompt: String,
    /// Which of its turns, from 0 on.
    pub turn: usize,
    /// The draft, where it concerns one decoder.
    pub draft: Option<String>,
    /// Why.
    pub reason: String,
}

impl std::fmt::Display for Skipped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "prompt `{}`, turn {}", self.prompt, self.turn + 1)?;
        if let Some(draft) = &self.draft {
            write!(f, ", draft {draft}")?;
        }
        write!(f, ": {}", self.reason)
    }
}

/// Memory of the process against what it must hold.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Memory {
    /// Largest resident size; absent where the system does not tell.
    pub peak_bytes: Option<u64>,
    /// Bytes of weights.
    pub weight_bytes: u64,
    /// Bytes of cache for the longest sequence, in every slot.
    pub cache_bytes: u64,
    /// Peak over weights and cache of the target; not said where drafts have weights too.
    pub ratio: Option<f64>,
}

/// One decoder on one task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// The target.
    pub target: String,
    /// The draft.
    pub draft: String,
    /// The rule.
    pub rule: String,
    /// Limits of the trees.
    pub budget: BudgetSpec,
    /// Sequences side by side, at most.
    pub batch: usize,
    /// Conversations that began in a second; 0: another began when one ended.
    pub rate: f64,
    /// The task.
    pub task: String,
    /// Temperature.
    pub temperature: f64,
    /// Prompts (conversations).
    pub prompts: usize,
    /// New tokens in one repeat.
    pub tokens: usize,
    /// Mean tokens per cycle, bonus included.
    pub tau: Option<f64>,
    /// Mean nodes verified per cycle, root included.
    pub nodes: Option<f64>,
    /// What steps cost here, where budgets went by it.
    pub times: Option<StepTimes>,
    /// Acceptance by depth given the depth above.
    pub alpha: Vec<Option<f64>>,
    /// Decoding speed over repeats.
    pub tokens_per_s: Option<Spread>,
    /// Over plain decoding in the same repeat.
    pub speedup: Option<Spread>,
    /// The speed-up over all repeats with its uncertainty over prompts.
    pub speedup_interval: Option<Interval>,
    /// Tokens of all sequences in a second of the whole run, prompts included, over repeats; only where a run was of this
    /// task alone.
    pub throughput: Option<Spread>,
    /// Steps in which as many sequences decode as the batch has, and no prompt is read.
    pub full: Option<FullSteps>,
    /// Milliseconds from its arrival, or where none is set from when a slot was free, to a request's first token.
    pub first_token_ms: Option<Quantiles>,
    /// Milliseconds a token after the first, as a request sees it.
    pub token_ms: Option<Quantiles>,
    /// Speed of the prefill over repeats, in prompt tokens per second.
    pub prefill_per_s: Option<Spread>,
    /// Share of decoding time by phase.
    pub time_share: TimeShare,
    /// At temperature 0: sequences of the first repeat whose ids are those of plain decoding, of how many.
    pub identical: Option<(usize, usize)>,
}

/// Steps in which as many sequences decode as a batch has, and no prompt is read: decoding side by side, and nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct FullSteps {
    /// Their number, in all repeats.
    pub steps: usize,
    /// Mean tokens of a sequence, bonus included; those beyond a sequence's end are counted too.
    pub tau: f64,
    /// Mean nodes of a sequence, root included.
    pub nodes: f64,
    /// Committed positions that a node sees on average, but for its tree.
    pub context: f64,
    /// Tokens of all sequences in a second of theirs, over repeats.
    pub tokens_per_s: Spread,
}

/// Share of decoding time by phase.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct TimeShare {
    /// The draft.
    pub propose: f64,
    /// The target.
    pub forward: f64,
    /// The rule.
    pub accept: f64,
    /// Keeping rows, text.
    pub commit: f64,
}

/// What one decoder made of one conversation in one repeat: one output per turn.
struct Done {
    batch: usize,
    decoder: usize,
    repeat: usize,
    prompt: usize,
    /// Which of several conversations about this prompt, in one batch.
    copy: usize,
    turns: Vec<Output>,
}

/// One run of conversations side by side.
struct Wall {
    batch: usize,
    decoder: usize,
    repeat: usize,
    /// The one task of all of them.
    task: Option<String>,
    ms: f64,
    steps: Vec<Step>,
}

/// Told what is being done: units done, units in all.
pub type OnStep<'a> = &'a mut dyn FnMut(usize, usize);

/// Runs a comparison and writes its results.
pub fn run(
    registry: &Registry,
    experiment: &Experiment,
    session: &mut Session,
    stop: &AtomicBool,
    on_step: OnStep<'_>,
) -> Result<Summary> {
    let specs = experiment.decoders()?;
    let run = &experiment.run;
    let mut decoders = Vec::new();
    for spec in &specs {
        if run.trace == TraceKind::Dense && !spec.sampling.is_greedy() {
            return Err(Error::Experiment(format!(
                "a dense trace is of greedy text; sampling.temperature is {}",
                spec.sampling.temperature
            )));
        }
        let mut composed = session.compose(registry, spec)?;
        // What can be refused is refused before anything is paid for.
        let request = session.request(spec, &composed, Vec::new(), 0);
        let engine = session.engine(&mut composed, run.options(1))?;
        engine.check(&request)?;
        drop(engine);
        decoders.push(composed);
    }
    let prompts = prompts::select(prompts::load(&experiment.prompts.set)?, &experiment.prompts)?;
    let (prompts, mut skipped) = fitting(session, experiment, prompts)?;
    // Made before the work, so that an output that cannot be written is known in time.
    let output = output_dir(&run.output)?;
    for (spec, composed) in specs.iter().zip(&mut decoders) {
        session.settle(registry, spec, composed)?;
    }
    let environment = session.environment()?;
    let batches = run.batches();
    let groups: Vec<Vec<Vec<Talk>>> = batches.iter().map(|&b| groups(&prompts, b, run)).collect();
    let (mut done, mut walls) = (Vec::new(), Vec::new());
    let units: usize = groups.iter().map(Vec::len).sum();
    let traced: Vec<usize> = match run.trace {
        TraceKind::Light => Vec::new(),
        TraceKind::Dense => (0..specs.len())
            .filter(|&d| decoders[d].draft.is_some())
            .collect(),
    };
    let total = run.repeats * units * decoders.len() + traced.len() * prompts.len();
    let mut finished = 0;
    let seed = (run.seed % decoders.len().max(1) as u64) as usize;
    // Pages and caches are warmed by short sequences that are not counted.
    let most = batches.iter().copied().max().unwrap_or(1);
    warm_up(session, &mut decoders[0], experiment, &prompts, most)?;
    'repeats: for repeat in 0..run.repeats {
        for (g, (&batch, group)) in batches
            .iter()
            .zip(&groups)
            .flat_map(|(b, groups)| groups.iter().map(move |g| (b, g)))
            .enumerate()
        {
            let whole = (done.len(), walls.len());
            for turn in 0..decoders.len() {
                // Each decoder goes first in turn, so that none is always the one after another's heat; runs of other seeds go on.
                let d = (turn + repeat + g + seed) % decoders.len();
                let told = converse(
                    session,
                    &mut decoders[d],
                    &specs[d],
                    batch,
                    group,
                    &prompts,
                    repeat,
                    stop,
                )?;
                let Some(told) = told else {
                    // Compared is what every decoder has done, if there is any.
                    if whole.0 > 0 {
                        done.truncate(whole.0);
                        walls.truncate(whole.1);
                    }
                    break 'repeats;
                };
                for one in told.skipped {
                    if !skipped.contains(&one) {
                        skipped.push(one);
                    }
                }
                walls.push(Wall {
                    batch,
                    decoder: d,
                    repeat,
                    task: only_task(group, &prompts),
                    ms: told.ms,
                    steps: told.steps,
                });
                done.extend(group.iter().zip(told.outputs).map(|(talk, turns)| Done {
                    batch,
                    decoder: d,
                    repeat,
                    prompt: talk.prompt,
                    copy: talk.copy,
                    turns,
                }));
                finished += 1;
                on_step(finished, total);
            }
        }
    }
    cut_to_the_shortest(&mut done);
    let mut unwritten = Vec::new();
    for d in traced {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let path = output.join(format!("dense-{d}.jsonl"));
        let mut told = || {
            finished += 1;
            on_step(finished, total);
        };
        match record(
            session,
            &mut decoders[d],
            &specs[d],
            &prompts,
            &path,
            stop,
            &mut told,
        ) {
            Ok(more) => skipped.extend(more),
            Err(Error::Interrupted(_)) => break,
            Err(e) => unwritten.push(e.to_string()),
        }
    }
    let mut resolved = experiment.clone();
    let template = session.tokenizer.as_ref().and_then(|t| t.template());
    if template.is_some_and(ChatTemplate::uses_date) {
        // The same prompts again, whatever day it is then.
        resolved.prompts.date = session.date.to_string();
    }
    let mut summary = Summary {
        format: runs::VERSION,
        memory: memory(session, &specs, most, &done),
        environment,
        rows: rows::rows(&specs, &decoders, &prompts, &done, &walls),
        interrupted: stop.load(Ordering::Relaxed),
        skipped,
        unwritten,
        output,
    };
    let files = write(&summary, &resolved, &prompts, &done, &walls);
    summary.unwritten.extend(files);
    Ok(summary)
}

/// Writes the dense trace of one decoder's draft.
fn record(
    session: &mut Session,
    decoder: &mut Composed,
    spec: &Experiment,
    prompts: &[Prompt],
    path: &Path,
    stop: &AtomicBool,
    told: &mut dyn FnMut(),
) -> Result<Vec<Skipped>> {
    let Some(draft) = &mut decoder.draft else {
        return Ok(Vec::new());
    };
    let mut recorder = Recorder {
        session,
        draft,
        name: decoder.name.clone(),
        spec,
    };
    let mut writer = Writer::new(path, recorder.header()?)?;
    let done = recorder.run(prompts, &mut writer, stop, told);
    if done.is_err() && writer.texts == 0 {
        // There is nothing in it.
        let _ = std::fs::remove_file(path);
    }
    done
}

/// The task of all conversations of a group, where it is one.
fn only_task(group: &[Talk], prompts: &[Prompt]) -> Option<String> {
    let first = &prompts[group.first()?.prompt].category;
    let same = |talk: &Talk| prompts[talk.prompt].category == *first;
    group.iter().all(same).then(|| first.clone())
}

/// Conversations that are run side by side. One at a time each is a run of its own, so that decoders take turns often;
/// several at a time all are one run. Where batches are compared each is there as often as keeps the batch full for a while.
fn groups(prompts: &[Prompt], batch: usize, run: &experiment::Run) -> Vec<Vec<Talk>> {
    let mut order: Vec<usize> = (0..prompts.len()).collect();
    let one = |prompt| Talk { prompt, copy: 0 };
    if batch == 1 && run.rate == 0.0 {
        order.sort_by_key(|&i| &prompts[i].category);
        return order.into_iter().map(|prompt| vec![one(prompt)]).collect();
    }
    let copies = match run.batches.is_empty() {
        true => 1,
        false => (run.per_slot * batch).div_ceil(prompts.len().max(1)).max(1),
    };
    let copy = |copy| (0..prompts.len()).map(move |prompt| Talk { prompt, copy });
    vec![(0..copies).flat_map(copy).collect()]
}

/// The prompts whose first turn leaves room for an answer, and the others with the reason.
fn fitting(
    session: &Session,
    experiment: &Experiment,
    prompts: Vec<Prompt>,
) -> Result<(Vec<Prompt>, Vec<Skipped>)> {
    let (mut fit, mut skipped) = (Vec::new(), Vec::new());
    // Without a tokenizer or a template nothing can be decoded at all.
    session.tokenizer()?;
    for prompt in prompts {
        let first = session.prompt(&opening(&prompt), &experiment.prompts);
        match first.and_then(|ids| session.wording.check_length(&ids)) {
            Ok(()) => fit.push(prompt),
            Err(e) => skipped.push(Skipped {
                prompt: prompt.id,
                turn: 0,
                draft: None,
                reason: e.to_string(),
            }),
        }
    }
    match (fit.is_empty(), skipped.first()) {
        (true, Some(first)) => Err(Error::Experiment(format!(
            "none of the {} prompts can be decoded; {first}",
            skipped.len()
        ))),
        _ => Ok((fit, skipped)),
    }
}

/// Turns that one decoder could not decode in one repeat count for none, so that all are compared on the same ones. A
/// decoder that could decode nothing at all is left out of this: there is nothing to compare it by.
fn cut_to_the_shortest(done: &mut [Done]) {
    let mut works = BTreeSet::new();
    works.extend(
        done.iter()
            .filter(|d| !d.turns.is_empty())
            .map(|d| d.decoder),
    );
    let mut turns: BTreeMap<usize, usize> = BTreeMap::new();
    for d in done.iter().filter(|d| works.contains(&d.decoder)) {
        let least = turns.entry(d.prompt).or_insert(usize::MAX);
        *least = d.turns.len().min(*least);
    }
    for d in done {
        d.turns.truncate(turns.get(&d.prompt).copied().unwrap_or(0));
    }
}

fn memory(session: &Session, specs: &[Experiment], batch: usize, done: &[Done]) -> Memory {
    let longest = done
        .iter()
        .flat_map(|d| &d.turns)
        .map(|o| o.prompt_tokens + o.ids.len())
        .max();
    let kept = specs.first().map_or(0, |s| s.run.kept);
    let positions = longest.unwrap_or(0) * (batch + kept);
    let drafts_weigh = specs.iter().any(|s| s.draft.dir.is_some());
    let weights = session.target.weight_bytes as u64;
    let cache = (session.target.cache_bytes * positions) as u64;
    let peak = peak_resident();
    Memory {
        peak_bytes: peak,
        weight_bytes: weights,
        cache_bytes: cache,
        ratio: peak
            .filter(|_| !drafts_weigh)
            .map(|p| p as f64 / (weights + cache) as f64),
    }
}

/// The folder for results: the one asked for, or the next free `runs/bench-NNN`.
fn output_dir(asked: &Path) -> Result<PathBuf> {
    let dir = if asked.as_os_str().is_empty() {
        let free = |n: &usize| !Path::new(&format!("runs/bench-{n:03}")).exists();
        PathBuf::from(format!("runs/bench-{:03}", (1..).find(free).unwrap_or(1)))
    } else {
        asked.to_path_buf()
    };
    std::fs::create_dir_all(&dir).map_err(Error::io(&dir))?;
    // A folder may exist and still not take a file.
    tempfile::NamedTempFile::new_in(&dir).map_err(Error::io(&dir))?;
    Ok(dir)
}

/// Writes the files of a run, each for itself; returns those that could not be written, with the reason.
fn write(
    summary: &Summary,
    experiment: &Experiment,
    prompts: &[Prompt],
    done: &[Done],
    walls: &[Wall],
) -> Vec<String> {
    let whole = |e: serde_json::Error| Error::Experiment(e.to_string());
    let cycles = done.iter().flat_map(|d| {
        let task = &prompts[d.prompt];
        let turns = d.turns.iter().enumerate();
        turns.flat_map(move |(turn, output)| {
            let cycles = output.cycles.iter().enumerate();
            cycles.map(move |(cycle, record)| CycleRow {
                decoder: d.decoder,
                batch: d.batch,
                repeat: d.repeat,
                task: task.category.clone(),
                prompt: task.id.clone(),
                copy: d.copy,
                turn,
                cycle,
                record: record.clone(),
            })
        })
    });
    let steps = walls.iter().enumerate().flat_map(|(run, wall)| {
        wall.steps.iter().map(move |record| StepRow {
            decoder: wall.decoder,
            slots: wall.batch,
            repeat: wall.repeat,
            run,
            record: record.clone(),
        })
    });
    let contents = [
        (
            "summary.json",
            serde_json::to_vec_pretty(summary).map_err(whole),
        ),
        (
            "experiment.toml",
            experiment.to_toml().map(String::into_bytes),
        ),
        (runs::CYCLES, runs::lines(cycles)),
        (runs::STEPS, runs::lines(steps)),
    ];
    let mut unwritten = Vec::new();
    for (name, content) in contents {
        let path = summary.output.join(name);
        let written = content.and_then(|bytes| Ok(files::write(&path, &bytes)?));
        unwritten.extend(written.err().map(|e| e.to_string()));
    }
    unwritten
}
