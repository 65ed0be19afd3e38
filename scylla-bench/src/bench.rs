//! The comparison of decoders: the same prompts, interleaved in one run, on a loaded target.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use scylla_core::decode::{Cycle, Job, Output};
use scylla_core::files;
use scylla_core::text::{ChatTemplate, Message, Tokenizer};
use serde::Serialize;

use crate::environment::{Environment, peak_resident};
use crate::experiment::{BudgetSpec, Experiment};
use crate::prompts::{self, Prompt};
use crate::registry::Registry;
use crate::session::{Decoder, Session};
use crate::stats::{Spread, Totals, alpha, spread};
use crate::{Error, Result};

/// What a comparison found.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// Where.
    pub environment: Environment,
    /// Memory of the process.
    pub memory: Memory,
    /// One row per decoder and task, then one over all tasks (`task` = `all`).
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
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
#[derive(Debug, Clone, Serialize)]
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
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// The target.
    pub target: String,
    /// The draft.
    pub draft: String,
    /// The rule.
    pub rule: String,
    /// Limits of the trees.
    pub budget: BudgetSpec,
    /// Sequences side by side.
    pub batch: usize,
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
    /// Acceptance by depth given the depth above.
    pub alpha: Vec<Option<f64>>,
    /// Decoding speed over repeats.
    pub tokens_per_s: Option<Spread>,
    /// Over plain decoding in the same repeat.
    pub speedup: Option<Spread>,
    /// Speed of the prefill over repeats, in prompt tokens per second.
    pub prefill_per_s: Option<Spread>,
    /// Share of decoding time by phase.
    pub time_share: TimeShare,
    /// At temperature 0: sequences of the first repeat whose ids are those of plain decoding, of how many.
    pub identical: Option<(usize, usize)>,
}

/// Share of decoding time by phase.
#[derive(Debug, Clone, Copy, Default, Serialize)]
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

/// What one decoder made of one prompt in one repeat: one output per turn.
struct Done {
    decoder: usize,
    repeat: usize,
    prompt: usize,
    turns: Vec<Output>,
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
    let mut decoders = Vec::new();
    for spec in &specs {
        decoders.push(session.decoder(registry, spec)?);
    }
    for (decoder, spec) in decoders.iter_mut().zip(&specs) {
        // What can be refused is refused before anything is paid for.
        let settings = session.settings(spec);
        session.decode(decoder, &[], &settings, &mut |_| ControlFlow::Continue(()))?;
    }
    let prompts = prompts::select(prompts::load(&experiment.prompts.set)?, &experiment.prompts)?;
    let (prompts, mut skipped) = fitting(session, experiment, prompts)?;
    // Made before the work, so that an output that cannot be written is known in time.
    let output = output_dir(&experiment.run.output)?;
    let groups: Vec<Vec<usize>> = groups(&prompts, experiment.run.batch);
    let environment = session.environment()?;
    let mut done = Vec::new();
    let total = experiment.run.repeats * groups.len() * decoders.len();
    // Pages and caches are warmed by a short sequence that is not counted.
    warm_up(session, &mut decoders[0], experiment, &prompts[0])?;
    'repeats: for repeat in 0..experiment.run.repeats {
        for (g, group) in groups.iter().enumerate() {
            let whole = done.len();
            for turn in 0..decoders.len() {
                // Each decoder goes first in turn, so that none is always the one after another's heat.
                let d = (turn + repeat + g) % decoders.len();
                let finished =
                    converse(session, &mut decoders[d], &specs[d], group, &prompts, stop)?;
                let Some((outputs, failed)) = finished else {
                    // Compared is what every decoder has done, if there is any.
                    if whole > 0 {
                        done.truncate(whole);
                    }
                    break 'repeats;
                };
                for one in failed {
                    if !skipped.contains(&one) {
                        skipped.push(one);
                    }
                }
                done.extend(group.iter().zip(outputs).map(|(&prompt, turns)| Done {
                    decoder: d,
                    repeat,
                    prompt,
                    turns,
                }));
                on_step(
                    (repeat * groups.len() + g) * decoders.len() + turn + 1,
                    total,
                );
            }
        }
    }
    cut_to_the_shortest(&mut done);
    let mut resolved = experiment.clone();
    let template = session.tokenizer.as_ref().and_then(Tokenizer::template);
    if template.is_some_and(ChatTemplate::uses_date) {
        // The same prompts again, whatever day it is then.
        resolved.prompts.date = session.date.to_string();
    }
    let mut summary = Summary {
        memory: memory(session, &specs, &done),
        environment,
        rows: rows(&specs, &decoders, &prompts, &done),
        interrupted: stop.load(Ordering::Relaxed),
        skipped,
        unwritten: Vec::new(),
        output,
    };
    summary.unwritten = write(&summary, &resolved, &prompts, &done);
    Ok(summary)
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
        match first.and_then(|ids| session.check_length(&ids)) {
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

/// What stands before the first answer.
fn opening(prompt: &Prompt) -> Vec<Message> {
    let system = prompt.system.iter().map(|text| Message {
        role: "system",
        content: text.clone(),
    });
    system
        .chain(prompt.turns.first().map(|t| user(t)))
        .collect()
}

/// Prompts of one task side by side, `batch` at a time.
fn groups(prompts: &[Prompt], batch: usize) -> Vec<Vec<usize>> {
    let mut by_task: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (i, p) in prompts.iter().enumerate() {
        by_task.entry(&p.category).or_default().push(i);
    }
    by_task
        .values()
        .flat_map(|list| list.chunks(batch).map(<[usize]>::to_vec))
        .collect()
}

fn warm_up(
    session: &mut Session,
    decoder: &mut Decoder,
    experiment: &Experiment,
    prompt: &Prompt,
) -> Result<()> {
    let ids = session.prompt(&opening(prompt), &experiment.prompts)?;
    let mut settings = session.settings(experiment);
    settings.max_new_tokens = settings.max_new_tokens.min(8);
    let job = Job {
        prompt: ids,
        sequence: 0,
    };
    session.decode(decoder, &[job], &settings, &mut |_| {
        ControlFlow::Continue(())
    })?;
    Ok(())
}

fn user(text: &str) -> Message {
    Message {
        role: "user",
        content: text.into(),
    }
}

/// The turns that were decoded, by prompt of a group, and those that could not be.
type Conversations = (Vec<Vec<Output>>, Vec<Skipped>);

/// Decodes all turns of a group of prompts side by side; `None` when the user broke off. A conversation whose turn cannot
/// be decoded ends there, and the others go on.
fn converse(
    session: &mut Session,
    decoder: &mut Decoder,
    experiment: &Experiment,
    group: &[usize],
    prompts: &[Prompt],
    stop: &AtomicBool,
) -> Result<Option<Conversations>> {
    let settings = session.settings(experiment);
    let mut messages: Vec<Vec<Message>> = vec![Vec::new(); group.len()];
    let mut outputs: Vec<Vec<Output>> = vec![Vec::new(); group.len()];
    let mut skipped = Vec::new();
    let turns = group
        .iter()
        .map(|&p| prompts[p].turns.len())
        .max()
        .unwrap_or(0);
    for turn in 0..turns {
        let mut skip = |i: usize, draft: Option<&str>, reason: String| {
            skipped.push(Skipped {
                prompt: prompts[group[i]].id.clone(),
                turn,
                draft: draft.map(str::to_string),
                reason,
            });
        };
        let (mut speaking, mut jobs) = (Vec::new(), Vec::new());
        for (i, &p) in group.iter().enumerate() {
            // One that ended early says no more.
            if prompts[p].turns.len() <= turn || outputs[i].len() < turn {
                continue;
            }
            match turn {
                0 => messages[i] = opening(&prompts[p]),
                _ => messages[i].push(user(&prompts[p].turns[turn])),
            }
            let ids = session.prompt(&messages[i], &experiment.prompts);
            match ids.and_then(|ids| session.check_length(&ids).map(|()| ids)) {
                Ok(prompt) => {
                    let sequence = (p * 64 + turn) as u64;
                    jobs.push(Job { prompt, sequence });
                    speaking.push(i);
                }
                Err(e) => skip(i, None, e.to_string()),
            }
        }
        let told = session.decode(decoder, &jobs, &settings, &mut |_| match stop
            .load(Ordering::Relaxed)
        {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        })?;
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        for (i, output) in speaking.into_iter().zip(told) {
            if let Some(reason) = output.failed {
                skip(i, Some(&decoder.name), reason);
                continue;
            }
            messages[i].push(Message {
                role: "assistant",
                content: output.text.clone(),
            });
            outputs[i].push(output);
        }
    }
    Ok(Some((outputs, skipped)))
}

fn memory(session: &Session, specs: &[Experiment], done: &[Done]) -> Memory {
    let longest = done
        .iter()
        .flat_map(|d| &d.turns)
        .map(|o| o.prompt_tokens + o.ids.len())
        .max();
    let batch = specs.first().map_or(1, |s| s.run.batch);
    let positions = longest.unwrap_or(0) * batch;
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

fn rows(specs: &[Experiment], decoders: &[Decoder], prompts: &[Prompt], done: &[Done]) -> Vec<Row> {
    let mut tasks: Vec<&str> = prompts.iter().map(|p| p.category.as_str()).collect();
    tasks.sort_unstable();
    tasks.dedup();
    if tasks != ["all"] {
        tasks.push("all");
    }
    let mut rows = Vec::new();
    for task in tasks {
        let of_task = |d: &&Done| task == "all" || prompts[d.prompt].category == task;
        let here: Vec<&Done> = done.iter().filter(of_task).collect();
        for (d, (spec, decoder)) in specs.iter().zip(decoders).enumerate() {
            rows.push(row(spec, decoder, task, d, &here));
        }
    }
    rows
}

fn row(spec: &Experiment, decoder: &Decoder, task: &str, index: usize, here: &[&Done]) -> Row {
    let mine: Vec<&Done> = here
        .iter()
        .filter(|d| d.decoder == index)
        .copied()
        .collect();
    let by_repeat = |decoder: usize| {
        let mut totals: BTreeMap<usize, Totals> = BTreeMap::new();
        for d in here.iter().filter(|d| d.decoder == decoder) {
            for output in &d.turns {
                totals.entry(d.repeat).or_default().add(output);
            }
        }
        totals
    };
    let (own, plain) = (by_repeat(index), by_repeat(0));
    let speeds: Vec<f64> = own.values().filter_map(Totals::tokens_per_s).collect();
    let prefill: Vec<f64> = own.values().filter_map(Totals::prefill_per_s).collect();
    let ratios: Vec<f64> = own
        .iter()
        .filter_map(|(repeat, t)| Some(t.tokens_per_s()? / plain.get(repeat)?.tokens_per_s()?))
        .collect();
    let all = own.values().fold(Totals::default(), |mut a, t| {
        a.decoded += t.decoded;
        a.cycles += t.cycles;
        a.ms.add(&t.ms);
        a
    });
    let first = own.values().next().copied().unwrap_or_default();
    let cycles = mine.iter().flat_map(|d| &d.turns).flat_map(|o| &o.cycles);
    let share = |ms: f64| {
        if all.ms.decode() > 0.0 {
            ms / all.ms.decode()
        } else {
            0.0
        }
    };
    Row {
        target: spec.target.model.clone(),
        draft: decoder.name.clone(),
        rule: decoder.verifier.name().into(),
        budget: spec.budget,
        batch: spec.run.batch,
        task: task.into(),
        temperature: spec.sampling.temperature,
        prompts: mine
            .iter()
            .filter(|d| d.repeat == 0 && !d.turns.is_empty())
            .count(),
        tokens: first.tokens,
        tau: all.tau(),
        alpha: alpha(cycles),
        tokens_per_s: spread(&speeds),
        speedup: spread(&ratios),
        prefill_per_s: spread(&prefill),
        time_share: TimeShare {
            propose: share(all.ms.propose),
            forward: share(all.ms.forward),
            accept: share(all.ms.accept),
            commit: share(all.ms.commit),
        },
        identical: spec.sampling.is_greedy().then(|| identical(&mine, here)),
    }
}

/// Turns of the first repeat whose ids are those of plain decoding, and their number.
fn identical(mine: &[&Done], here: &[&Done]) -> (usize, usize) {
    let mut counts = (0, 0);
    for d in mine.iter().filter(|d| d.repeat == 0) {
        let plain = here
            .iter()
            .find(|p| p.decoder == 0 && p.repeat == 0 && p.prompt == d.prompt);
        for (i, output) in d.turns.iter().enumerate() {
            counts.1 += 1;
            let same = plain
                .and_then(|p| p.turns.get(i))
                .is_some_and(|p| p.ids == output.ids);
            counts.0 += usize::from(same);
        }
    }
    counts
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

/// One line of `cycles.jsonl`.
#[derive(Serialize)]
struct Trace<'a> {
    decoder: usize,
    repeat: usize,
    task: &'a str,
    prompt: &'a str,
    turn: usize,
    cycle: usize,
    #[serde(flatten)]
    record: &'a Cycle,
}

/// Writes the files of a run, each for itself; returns those that could not be written, with the reason.
fn write(
    summary: &Summary,
    experiment: &Experiment,
    prompts: &[Prompt],
    done: &[Done],
) -> Vec<String> {
    let whole = |e: serde_json::Error| Error::Experiment(e.to_string());
    let traces = done.iter().flat_map(|d| {
        let task = &prompts[d.prompt];
        let turns = d.turns.iter().enumerate();
        turns.flat_map(move |(turn, output)| {
            let cycles = output.cycles.iter().enumerate();
            cycles.map(move |(cycle, record)| Trace {
                decoder: d.decoder,
                repeat: d.repeat,
                task: &task.category,
                prompt: &task.id,
                turn,
                cycle,
                record,
            })
        })
    });
    let mut lines = Vec::new();
    let traced = traces.into_iter().try_for_each(|trace| {
        serde_json::to_writer(&mut lines, &trace).map_err(whole)?;
        lines.push(b'\n');
        Ok(())
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
        ("cycles.jsonl", traced.map(|()| lines)),
    ];
    let mut unwritten = Vec::new();
    for (name, content) in contents {
        let path = summary.output.join(name);
        let written = content.and_then(|bytes| Ok(files::write(&path, &bytes)?));
        unwritten.extend(written.err().map(|e| e.to_string()));
    }
    unwritten
}
