//! The rows of a comparison, out of what was decoded.

use std::collections::BTreeMap;

use scylla_core::engine::Output;

use super::{Done, FullSteps, Row, TimeShare, Wall};
use crate::experiment::Experiment;
use crate::prompts::Prompt;
use crate::session::Composed;
use crate::stats::{Interval, Totals, alpha, interval, quantiles, spread};

/// By batch, one row per decoder and task, then one over all tasks.
pub(super) fn rows(
    specs: &[Experiment],
    decoders: &[Composed],
    prompts: &[Prompt],
    done: &[Done],
    walls: &[Wall],
) -> Vec<Row> {
    let mut tasks: Vec<&str> = prompts.iter().map(|p| p.category.as_str()).collect();
    tasks.sort_unstable();
    tasks.dedup();
    if tasks != ["all"] {
        tasks.push("all");
    }
    let mut batches: Vec<usize> = Vec::new();
    for wall in walls {
        if !batches.contains(&wall.batch) {
            batches.push(wall.batch);
        }
    }
    if batches.is_empty() {
        batches = specs.first().map_or(Vec::new(), |s| s.run.batches());
    }
    let mut rows = Vec::new();
    for batch in batches {
        let walls: Vec<&Wall> = walls.iter().filter(|w| w.batch == batch).collect();
        for &task in &tasks {
            let of_task = |d: &&Done| task == "all" || prompts[d.prompt].category == task;
            let here = done.iter().filter(|d| d.batch == batch);
            let here: Vec<&Done> = here.filter(of_task).collect();
            for (index, (spec, composed)) in specs.iter().zip(decoders).enumerate() {
                rows.push(row(spec, composed, (batch, task, index), &here, &walls));
            }
        }
    }
    rows
}

fn row(
    spec: &Experiment,
    composed: &Composed,
    (batch, task, index): (usize, &str, usize),
    here: &[&Done],
    walls: &[&Wall],
) -> Row {
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
        a.nodes += t.nodes;
        a.ms.add(&t.ms);
        a
    });
    let first = own.values().next().copied().unwrap_or_default();
    let outputs = || mine.iter().flat_map(|d| &d.turns);
    let cycles = outputs().flat_map(|o| &o.cycles);
    let share = |ms: f64| {
        if all.ms.decode() > 0.0 {
            ms / all.ms.decode()
        } else {
            0.0
        }
    };
    Row {
        target: spec.target.model.clone(),
        draft: composed.name.clone(),
        rule: composed.rule.name().into(),
        budget: spec.budget.clone(),
        batch,
        rate: spec.run.rate,
        task: task.into(),
        temperature: spec.sampling.temperature,
        prompts: mine
            .iter()
            .filter(|d| d.repeat == 0 && !d.turns.is_empty())
            .count(),
        tokens: first.tokens,
        tau: all.tau(),
        nodes: all.nodes(),
        times: composed.times.clone(),
        alpha: alpha(cycles),
        tokens_per_s: spread(&speeds),
        speedup: spread(&ratios),
        speedup_interval: speedup(here, index),
        throughput: spread(&throughput(task, index, &own, walls)),
        full: full(task, batch, index, walls),
        first_token_ms: quantiles(
            &outputs()
                .filter_map(|o| first_token(o, spec.run.rate))
                .collect::<Vec<_>>(),
        ),
        token_ms: quantiles(
            &outputs()
                .filter_map(|o| o.ms_per_token())
                .collect::<Vec<_>>(),
        ),
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
            .find(|p| p.decoder == 0 && p.repeat == 0 && (p.prompt, p.copy) == (d.prompt, d.copy));
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

/// Milliseconds to the first token: from the arrival where one was set, else from when there was a slot.
fn first_token(output: &Output, rate: f64) -> Option<f64> {
    let waited = output.waited;
    let since = if rate > 0.0 { 0.0 } else { waited.slot };
    Some(waited.first? - since)
}

/// Tokens a second of the whole run, by repeat, where runs were of this task alone.
fn throughput(
    task: &str,
    index: usize,
    own: &BTreeMap<usize, Totals>,
    walls: &[&Wall],
) -> Vec<f64> {
    let of_task = |w: &&&Wall| task == "all" || w.task.as_deref() == Some(task);
    let walls = || walls.iter().filter(|w| w.decoder == index).filter(of_task);
    let rate = |(repeat, totals): (&usize, &Totals)| {
        let ms: f64 = walls().filter(|w| w.repeat == *repeat).map(|w| w.ms).sum();
        (ms > 0.0).then(|| totals.tokens as f64 / ms * 1e3)
    };
    own.iter().filter_map(rate).collect()
}

/// Steps in which all of a batch decodes, of runs of this task alone.
fn full(task: &str, batch: usize, index: usize, walls: &[&Wall]) -> Option<FullSteps> {
    let of_task = |w: &&&Wall| task == "all" || w.task.as_deref() == Some(task);
    let mine = walls.iter().filter(|w| w.decoder == index).filter(of_task);
    // Tokens and milliseconds by repeat.
    let mut repeats: BTreeMap<usize, (usize, f64)> = BTreeMap::new();
    let (mut steps, mut rows, mut positions, mut tokens) = (0, 0, 0, 0);
    for wall in mine {
        let all = wall.steps.iter();
        for step in all.filter(|s| s.batch == batch && s.prompts == 0) {
            let committed: usize = step.requests.iter().map(|r| r.accepted + 1).sum();
            steps += 1;
            rows += step.rows;
            positions += step.positions;
            tokens += committed;
            let repeat = repeats.entry(wall.repeat).or_default();
            repeat.0 += committed;
            repeat.1 += step.ms.decode();
        }
    }
    let speeds = repeats.values().filter(|(_, ms)| *ms > 0.0);
    let speeds: Vec<f64> = speeds
        .map(|&(tokens, ms)| tokens as f64 / ms * 1e3)
        .collect();
    let sequences = (steps * batch) as f64;
    Some(FullSteps {
        steps,
        tau: tokens as f64 / sequences,
        nodes: rows as f64 / sequences,
        context: positions as f64 / rows as f64,
        tokens_per_s: spread(&speeds)?,
    })
}

/// Speed over plain decoding's, of all repeats together, with its uncertainty over prompts.
fn speedup(here: &[&Done], index: usize) -> Option<Interval> {
    let mut by_prompt: BTreeMap<usize, [Totals; 2]> = BTreeMap::new();
    for d in here {
        for (side, decoder) in [index, 0].into_iter().enumerate() {
            if d.decoder == decoder {
                let totals = &mut by_prompt.entry(d.prompt).or_default()[side];
                d.turns.iter().for_each(|output| totals.add(output));
            }
        }
    }
    let prompts: Vec<[Totals; 2]> = by_prompt.into_values().collect();
    interval(prompts.len(), |chosen| {
        let speed = |side: usize| {
            let of = |&i: &usize| {
                (
                    prompts[i][side].decoded as f64,
                    prompts[i][side].ms.decode(),
                )
            };
            let (tokens, ms) = chosen
                .iter()
                .map(of)
                .fold((0.0, 0.0), |a, b| (a.0 + b.0, a.1 + b.1));
            tokens / ms
        };
        speed(0) / speed(1)
    })
}
