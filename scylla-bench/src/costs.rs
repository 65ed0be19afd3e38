//! What a step costs on this machine: measured once, forwards for each target and the rest for each draft, and kept.
//!
//! Budgets that nobody gave go by it ([`crate::experiment::PolicyKind::Auto`]): how many rows pay is a matter of the
//! processor, whose eight rows cost 1.7 times one, or 3.6 times.

use std::path::PathBuf;
use std::time::Instant;

use scylla_core::assets::{cache_dir, hash_files};
use scylla_core::engine::{Event, Options, Request, Step};
use scylla_core::files::{self, read_text};
use scylla_core::plugin::{SlotRows, Step as Rows, Want};
use scylla_core::policy::{AdaptiveBudget, FixedBudget, StepTimes, cut};
use scylla_core::tree::Budget;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::drafts::shipped;
use crate::environment::Environment;
use crate::experiment::{Experiment, Named, PolicyKind};
use crate::registry::Registry;
use crate::session::{Composed, Session};
use crate::stats::median;
use crate::{Error, Result};

/// Version of the files; others are measured again.
const VERSION: u32 = 4;
/// Rows of forwards that are measured.
const ROWS: [usize; 12] = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, MOST];
const MOST: usize = 64;
/// Tokens in the cache meanwhile.
const CONTEXT: usize = 64;
/// Rounds of every size at most, and the seconds after which no further one begins: the least of many is what a quiet machine takes.
const ROUNDS: usize = 50;
const SECONDS: f64 = 2.0;
/// What drafting must promise above plain decoding. What was measured once is off by some hundredths later, and with contexts
/// of other lengths.
const MARGIN: f64 = 0.03;

/// What forwards of a target cost belongs to: another machine, build or target has other costs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Forwards {
    version: u32,
    environment: Environment,
    /// Rows of the largest forward that was to be measured.
    rows: usize,
}

/// What the rest of a step belongs to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Drafted {
    version: u32,
    environment: Environment,
    draft: Named,
    /// Sha256 of the draft's files.
    draft_hash: String,
    limits: Budget,
    /// Sampled text may get trees of another kind, and of rows that are distributions.
    greedy: bool,
    /// Requests side by side that it is measured for as well.
    side_by_side: usize,
}

/// A file: what was measured, and what it belongs to.
#[derive(Serialize, Deserialize)]
struct Kept<K, T> {
    of: K,
    ms: T,
}

/// Lets an `auto` policy of a decoder go by the costs of this machine: those that are kept, else they are measured and kept.
///
/// # Errors
/// If the target or the draft cannot run.
pub(crate) fn settle(
    registry: &Registry,
    session: &mut Session,
    experiment: &Experiment,
    composed: &mut Composed,
) -> Result<()> {
    if experiment.budget.policy != PolicyKind::Auto || composed.draft.is_none() {
        return Ok(());
    }
    let limits = experiment.budget.limits();
    let side_by_side = experiment.run.batches().into_iter().max().unwrap_or(1);
    let rows = limits.total.saturating_mul(side_by_side).min(MOST);
    let (version, environment) = (VERSION, session.environment()?);
    let drafted = Drafted {
        version,
        environment: environment.clone(),
        draft: experiment.draft.clone(),
        draft_hash: draft_hash(&experiment.draft)?,
        limits,
        greedy: experiment.sampling.is_greedy(),
        side_by_side,
    };
    let forwards = Forwards {
        version,
        environment,
        rows,
    };
    let forward = known(forwards, || measure_forwards(session, rows))?;
    let (propose, others, several) = known(drafted, || {
        measure_steps(registry, session, experiment, limits, side_by_side)
    })?;
    let times = StepTimes {
        forward,
        propose,
        several,
        others,
    };
    // A context too short to measure in: the limits are the budget.
    if !times.is_sound() {
        return Ok(());
    }
    composed.policy = Box::new(AdaptiveBudget {
        margin: MARGIN,
        times: Some(times.clone()),
        ..AdaptiveBudget::default()
    });
    composed.times = Some(times);
    Ok(())
}

/// Sha256 of a draft's files; empty without files.
pub(crate) fn draft_hash(draft: &Named) -> Result<String> {
    let Some(dir) = draft.dir.clone().or_else(|| shipped(&draft.name)) else {
        return Ok(String::new());
    };
    if !dir.is_dir() {
        return Ok(hash_files(&[dir])?);
    }
    let entries = std::fs::read_dir(&dir).map_err(Error::io(&dir))?;
    let mut files: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
    files.retain(|file| file.is_file());
    files.sort();
    Ok(hash_files(&files)?)
}

/// What is kept of the same, else what is measured, which is then kept. Where nothing can be written it is measured again
/// the next time.
fn known<K, T>(of: K, measure: impl FnOnce() -> Result<T>) -> Result<T>
where
    K: PartialEq + Serialize + DeserializeOwned,
    T: Serialize + DeserializeOwned,
{
    let text = serde_json::to_string(&of).map_err(|e| Error::Experiment(e.to_string()))?;
    let name: String = Sha256::digest(text)[..12]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let dir = cache_dir()?.join("costs");
    let path = dir.join(name + ".json");
    let found = read_text(&path).ok();
    let found = found.and_then(|text| serde_json::from_str::<Kept<K, T>>(&text).ok());
    if let Some(kept) = found.filter(|kept| kept.of == of) {
        return Ok(kept.ms);
    }
    let kept = Kept { of, ms: measure()? };
    if let Ok(text) = serde_json::to_string_pretty(&kept) {
        let _ = std::fs::create_dir_all(dir);
        let _ = files::write(&path, text.as_bytes());
    }
    Ok(kept.ms)
}

/// Ids that a target knows, the same after every eight: what drafts by repetition propose from.
pub(crate) fn tokens(session: &Session, count: usize) -> Vec<u32> {
    let known = session.known_tokens().max(1);
    (0..count)
        .map(|i| ((i % 8 * 97 + 11) % known) as u32)
        .collect()
}

/// Least milliseconds of the target's forward by rows, up to the first size that holds `most`: what else a machine does comes
/// and goes, and would make one row of a small model look dear. Single rows are timed behind their like, as plain decoding
/// has them, others between single ones, as drafts that propose now and then have them.
fn measure_forwards(session: &mut Session, most: usize) -> Result<Vec<(usize, f64)>> {
    let room = session.target.model.shape().context;
    let context = CONTEXT.min(room / 2).max(1);
    let enough = ROWS.iter().position(|&rows| rows >= most);
    let sizes = &ROWS[..enough.map_or(ROWS.len(), |at| at + 1)];
    let sizes: Vec<usize> = sizes
        .iter()
        .copied()
        .filter(|&rows| context + rows <= room)
        .collect();
    let ids = tokens(session, context.max(ROWS[ROWS.len() - 1]));
    let model = &mut session.target.model;
    let rows = |count: usize| Rows {
        slots: vec![SlotRows {
            slot: 0,
            tokens: &ids[..count],
            parents: &[],
            want: Want::All,
        }],
        taps: &[],
    };
    model.open(0)?;
    let mut run = || -> Result<Vec<Vec<f64>>> {
        let filled = model.forward(&rows(context))?;
        model.recycle(filled);
        model.commit(0, &(0..context).collect::<Vec<_>>())?;
        let mut all = vec![Vec::new(); sizes.len()];
        let begun = Instant::now();
        let mut timed = |count: usize| -> Result<f64> {
            let one = Instant::now();
            let done = model.forward(&rows(count))?;
            if let Some(logits) = done.logits.first() {
                // On a device this waits until it is done.
                std::hint::black_box(logits.row(0)?);
            }
            let ms = one.elapsed().as_secs_f64() * 1e3;
            model.recycle(done);
            model.commit(0, &[])?;
            Ok(ms)
        };
        for round in 0..ROUNDS {
            timed(1)?;
            for (&size, all) in sizes.iter().zip(&mut all) {
                all.push(match size {
                    1 => timed(1)?.min(timed(1)?),
                    // What it does to the single row behind it is its own cost.
                    _ => timed(size)? + timed(1)?,
                });
            }
            if round > 1 && begun.elapsed().as_secs_f64() > SECONDS {
                break;
            }
        }
        Ok(all)
    };
    let all = run();
    model.close(0);
    let least = |ms: Vec<f64>| ms.into_iter().fold(f64::INFINITY, f64::min);
    let mut least: Vec<f64> = all?.into_iter().map(least).collect();
    if let Some((&mut one, more)) = least.split_first_mut() {
        more.iter_mut().for_each(|ms| *ms = (*ms - one).max(one));
    }
    Ok(sizes.into_iter().zip(least).collect())
}

/// Milliseconds of proposing by levels, of all but proposing and the forward, and how many times one request's proposing that of
/// several takes.
type Steps = (Vec<(usize, f64)>, f64, Vec<(usize, f64)>);

fn measure_steps(
    registry: &Registry,
    session: &mut Session,
    experiment: &Experiment,
    limits: Budget,
    side_by_side: usize,
) -> Result<Steps> {
    let mut experiment = experiment.clone();
    // The text repeats itself, so that a hybrid would be sure and pass over its network: levels are what the network takes.
    if experiment.draft.name == "hybrid" {
        let never = toml::Value::Float(f64::MAX);
        experiment.draft.settings.insert("sure".into(), never);
    }
    let experiment = &experiment;
    // A decoder of its own: what it learns of this text is nobody's business.
    let mut composed = session.compose(registry, experiment)?;
    composed.policy = Box::new(FixedBudget);
    let most = limits.levels();
    let mut levels: Vec<usize> = vec![0, 1, 2, 4, most];
    levels.retain(|&l| l <= most);
    levels.dedup();
    let prompt = tokens(
        session,
        CONTEXT.min(session.target.model.shape().context / 2).max(1),
    );
    let (mut propose, mut others) = (vec![Vec::new(); levels.len()], Vec::new());
    // The first round warms up.
    for round in 0..=1 {
        for (&allowed, propose) in levels.iter().zip(&mut propose) {
            let steps = steps(session, &mut composed, experiment, &prompt, (1, allowed))?;
            if round > 0 {
                others.extend(
                    steps
                        .iter()
                        .map(|s| s.ms.propose - s.proposing_ms + s.ms.accept + s.ms.commit),
                );
                let own = steps.iter().filter(|s| s.levels == allowed);
                propose.extend(own.map(|s| s.proposing_ms));
            }
        }
    }
    let mut several = vec![(1, 1.0)];
    if side_by_side > 1 && most > 0 {
        let mut proposing = |requests: usize| -> Result<f64> {
            let of = (requests, most);
            let steps = steps(session, &mut composed, experiment, &prompt, of)?;
            // The first one warms up, and has nothing to catch up with.
            let full = steps.iter().skip(1).filter(|s| s.levels == most);
            Ok(median(&full.map(|s| s.proposing_ms).collect::<Vec<_>>()))
        };
        let (all, one) = (proposing(side_by_side)?, proposing(1)?);
        // No step of all of them, or of a draft that looks things up in no time: nothing to be measured.
        if all > 0.0 && one > 0.0 {
            several.push((side_by_side, (all / one).max(1.0)));
        }
    }
    let propose = levels
        .into_iter()
        .zip(propose)
        .filter(|(_, ms)| !ms.is_empty())
        .map(|(levels, ms)| (levels, median(&ms)))
        .collect();
    Ok((propose, median(&others), several))
}

/// Steps of requests side by side that may draft so many levels: those in which all of them decode.
fn steps(
    session: &mut Session,
    composed: &mut Composed,
    experiment: &Experiment,
    prompt: &[u32],
    (requests, levels): (usize, usize),
) -> Result<Vec<Step>> {
    let mut request = session.request(experiment, composed, prompt.to_vec(), 0);
    request.budget = cut(experiment.budget.limits(), levels);
    request.eos.clear();
    request.stops.clear();
    request.max_new_tokens = 3 * (levels + 1);
    let options = Options {
        batch: requests,
        prompt_rows: requests * prompt.len(),
        ..Options::default()
    };
    let mut engine = session.engine(composed, options)?;
    for sequence in 0..requests as u64 {
        engine.submit(Request {
            sequence,
            ..request.clone()
        })?;
    }
    let mut all = Vec::new();
    while !engine.is_idle() {
        for event in engine.step() {
            match event {
                Event::Step(step) if step.batch == requests && step.prompts == 0 => all.push(step),
                Event::Finished { output, .. } => {
                    if let Some(failed) = output.failed {
                        return Err(Error::Experiment(failed));
                    }
                }
                _ => {}
            }
        }
    }
    Ok(all)
}
