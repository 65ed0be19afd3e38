//! The comparison of decoders: the same prompts, interleaved in one run, on a loaded target.

use std::collections::BTreeMap;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use scylla_core::assets::write_atomically;
use scylla_core::decode::{Cycle, Job, Output};
use scylla_core::text::Message;
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
    let prompts = prompts::select(prompts::load(&experiment.prompts.set)?, &experiment.prompts)?;
    // Made before the work, so that an output that cannot be written is known in time.
    let output = output_dir(&experiment.run.output)?;
    let groups: Vec<Vec<usize>> = groups(&prompts, experiment.run.batch);
    let mut done = Vec::new();
    let total = experiment.run.repeats * groups.len() * decoders.len();
    // Pages and caches are warmed by a short sequence that is not counted.
    warm_up(session, &mut decoders[0], experiment, &prompts[0])?;
    'repeats: for repeat in 0..experiment.run.repeats {
        for (g, group) in groups.iter().enumerate() {
            for turn in 0..decoders.len() {
                // Each decoder goes first in turn, so that none is always the one after another's heat.
                let d = (turn + repeat + g) % decoders.len();
                let finished =
                    converse(session, &mut decoders[d], &specs[d], group, &prompts, stop)?;
                let Some(outputs) = finished else {
                    break 'repeats;
                };
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
    let summary = Summary {
        memory: memory(session, &specs, &done),
        environment: session.environment.clone(),
        rows: rows(&specs, &decoders, &prompts, &done),
        interrupted: stop.load(Ordering::Relaxed),
        output,
    };
    write(&summary, experiment, &prompts, &done)?;
    Ok(summary)
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
    let ids = session.prompt(&[user(&prompt.turns[0])], experiment.prompts.raw)?;
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

/// Decodes all turns of a group of prompts side by side; `None` when the user broke off.
fn converse(
    session: &mut Session,
    decoder: &mut Decoder,
    experiment: &Experiment,
    group: &[usize],
    prompts: &[Prompt],
    stop: &AtomicBool,
) -> Result<Option<Vec<Vec<Output>>>> {
    let settings = session.settings(experiment);
    let mut messages: Vec<Vec<Message>> = vec![Vec::new(); group.len()];
    let mut outputs: Vec<Vec<Output>> = vec![Vec::new(); group.len()];
    let turns = group
        .iter()
        .map(|&p| prompts[p].turns.len())
        .max()
        .unwrap_or(0);
    for turn in 0..turns {
        let speaking: Vec<usize> = (0..group.len())
            .filter(|&i| prompts[group[i]].turns.len() > turn)
            .collect();
        let mut jobs = Vec::new();
        for &i in &speaking {
            messages[i].push(user(&prompts[group[i]].turns[turn]));
            let prompt = session.prompt(&messages[i], experiment.prompts.raw)?;
            let sequence = (group[i] * 64 + turn) as u64;
            jobs.push(Job { prompt, sequence });
        }
        let told = session.decode(decoder, &jobs, &settings, &mut |_| match stop
            .load(Ordering::Relaxed)
        {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        });
        let in_prompt = |e: Error| match &e {
            Error::Core(scylla_core::Error::Invalid(m)) => {
                let ids: Vec<&str> = speaking
                    .iter()
                    .map(|&i| prompts[group[i]].id.as_str())
                    .collect();
                Error::Experiment(format!("prompts {}: {m}", ids.join(", ")))
            }
            _ => e,
        };
        let told = told.map_err(in_prompt)?;
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        for (&i, output) in speaking.iter().zip(told) {
            messages[i].push(Message {
                role: "assistant",
                content: output.text.clone(),
            });
            outputs[i].push(output);
        }
    }
    Ok(Some(outputs))
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
        prompts: mine.iter().filter(|d| d.repeat == 0).count(),
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

fn write(
    summary: &Summary,
    experiment: &Experiment,
    prompts: &[Prompt],
    done: &[Done],
) -> Result<()> {
    let dir = &summary.output;
    let whole = |e: serde_json::Error| Error::Experiment(e.to_string());
    write_atomically(
        &dir.join("experiment.toml"),
        experiment.to_toml()?.as_bytes(),
    )?;
    let mut lines = Vec::new();
    for d in done {
        for (turn, output) in d.turns.iter().enumerate() {
            for (cycle, record) in output.cycles.iter().enumerate() {
                let trace = Trace {
                    decoder: d.decoder,
                    repeat: d.repeat,
                    task: &prompts[d.prompt].category,
                    prompt: &prompts[d.prompt].id,
                    turn,
                    cycle,
                    record,
                };
                serde_json::to_writer(&mut lines, &trace).map_err(whole)?;
                lines.write_all(b"\n").map_err(Error::io(dir))?;
            }
        }
    }
    write_atomically(&dir.join("cycles.jsonl"), &lines)?;
    let json = serde_json::to_vec_pretty(summary).map_err(whole)?;
    Ok(write_atomically(&dir.join("summary.json"), &json)?)
}
