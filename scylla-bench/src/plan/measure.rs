//! Measuring what steps cost here, sample by sample into a file that another run goes on with.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use scylla_core::engine::{Event, Options, Step as Stepped};
use scylla_core::files::read_text;
use scylla_core::plugin::{SlotRows, Step, Want};
use scylla_core::tree::Budget;

use super::roofline::Shapes;
use super::table::{Cost, HEADER, SHAPES, What, costs};
use crate::costs::{draft_hash, tokens};
use crate::drafts::{config_of, shipped};
use crate::experiment::{BudgetSpec, Experiment, Named};
use crate::stats::median;
use crate::{Error, Registry, Result, Session};

/// Rows of each sequence in forwards, and rows of all sequences at most.
pub(super) const ROWS: [usize; 11] = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48];
pub(super) const MOST_ROWS: usize = 256;
/// Widths and levels that drafting is timed with.
pub(super) const WIDTHS: [usize; 3] = [1, 2, 4];
const LEVELS: [usize; 2] = [1, 3];
/// Rows that all between is noted under: it hardly depends on them.
const BETWEEN: usize = 4;
/// Positions of each sequence while cycles are timed, at most: what all but the target's forward takes hardly depends on them, and
/// reading prompts takes most of the time here.
const POSITIONS: usize = 64;
/// Cycles of an engine's run; the first warms up.
const CYCLES: usize = 5;

/// What is measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// Sequences side by side.
    pub batches: Vec<usize>,
    /// Positions committed beforehand.
    pub contexts: Vec<usize>,
    /// Samples of every point.
    pub rounds: usize,
}

/// Where a sample belongs.
type Place = (What, usize, usize, usize, usize);

fn place(c: &Cost) -> Place {
    (c.what, c.batch, c.rows, c.context, c.layers)
}

/// A file of costs that grows.
pub(super) struct File<'a> {
    path: &'a Path,
    out: std::fs::File,
    samples: BTreeMap<Place, usize>,
}

impl<'a> File<'a> {
    /// Opens what was measured before, of the same machine and models, or begins.
    pub(super) fn open(path: &'a Path, about: &str, shapes: &str) -> Result<Self> {
        let mut samples: BTreeMap<Place, usize> = BTreeMap::new();
        let known = path.exists().then(|| read_text(path)).transpose()?;
        let mut kept = format!("# {about}\n# {SHAPES}{shapes}\n{HEADER}\n");
        if let Some(text) = known.filter(|text| !text.is_empty()) {
            let (found, said) = costs(path, &text)?;
            if said.first().map(String::as_str) != Some(about) {
                return Err(Error::file(
                    path,
                    format!(
                        "was measured elsewhere ({}), not with {about}: name another file",
                        said.first().map_or("it does not say where", |s| s)
                    ),
                ));
            }
            for c in &found {
                kept += &line(c);
                *samples.entry(place(c)).or_default() += 1;
            }
        }
        // A line that was cut off goes.
        scylla_core::files::write(path, kept.as_bytes())?;
        let out = OpenOptions::new().append(true).open(path);
        Ok(Self {
            path,
            out: out.map_err(Error::io(path))?,
            samples,
        })
    }

    fn count(&self, place: Place) -> usize {
        self.samples.get(&place).copied().unwrap_or(0)
    }

    /// Adds what it does not hold yet.
    pub(super) fn add_new(&mut self, cost: &Cost) -> Result<()> {
        match self.count(place(cost)) {
            0 => self.add(cost),
            _ => Ok(()),
        }
    }

    fn add(&mut self, cost: &Cost) -> Result<()> {
        *self.samples.entry(place(cost)).or_default() += 1;
        let text = line(cost);
        self.out
            .write_all(text.as_bytes())
            .map_err(Error::io(self.path))
    }
}

fn line(c: &Cost) -> String {
    let what = match c.what {
        What::Forward => "forward",
        What::Draft => "draft",
        What::Between => "between",
    };
    format!(
        "{what},{},{},{},{},{}\n",
        c.batch, c.rows, c.context, c.layers, c.seconds
    )
}

fn stopped(stop: &AtomicBool, path: &Path) -> Result<()> {
    match stop.load(Ordering::Relaxed) {
        true => Err(Error::Interrupted(format!(
            "; {} holds what was measured, and the same command goes on",
            path.display()
        ))),
        false => Ok(()),
    }
}

/// Measures forwards, and of each decoder (the first decodes plainly) its levels and all between, into a file: round by round,
/// all points in each, so that a slow minute falls on all of them. What the file has already is not measured again.
///
/// # Errors
/// If the file is of another machine, a model cannot run, or the user stops it; the file then holds what was measured.
pub fn measure(
    registry: &Registry,
    session: &mut Session,
    decoders: &[Experiment],
    plan: &Measured,
    path: &Path,
    stop: &AtomicBool,
    told: &mut dyn FnMut(usize, usize),
) -> Result<()> {
    let environment = session.environment()?;
    let drafted = decoders.get(1..).unwrap_or_default();
    told_apart(drafted)?;
    let drafts: Vec<&Named> = drafted.iter().map(|d| &d.draft).collect();
    let hashes: Vec<String> = drafts
        .iter()
        .map(|d| draft_hash(d))
        .collect::<Result<_>>()?;
    let about =
        serde_json::json!({ "environment": environment, "drafts": drafts, "hashes": hashes })
            .to_string();
    let shapes = serde_json::to_string(&Shapes::of(session))
        .map_err(|e| Error::Experiment(e.to_string()))?;
    let mut file = File::open(path, &about, &shapes)?;
    let context = plan.contexts.first().copied().unwrap_or(64);
    for round in 0..plan.rounds {
        for &context in &plan.contexts {
            for &batch in &plan.batches {
                stopped(stop, path)?;
                forwards(session, batch, context, round, &mut file)?;
            }
        }
        for (i, decoder) in decoders.iter().enumerate() {
            for &batch in &plan.batches {
                stopped(stop, path)?;
                let mut place = Measuring {
                    registry,
                    session,
                    batch,
                    context,
                    round,
                    file: &mut file,
                };
                match i {
                    0 => place.plain(decoder)?,
                    _ => place.drafted(decoder)?,
                }
            }
        }
        told(round + 1, plan.rounds);
    }
    Ok(())
}

/// Refuses drafts that a table cannot tell apart.
pub(super) fn told_apart(drafts: &[Experiment]) -> Result<()> {
    let mut depths: Vec<usize> = drafts.iter().map(layers).collect();
    depths.sort_unstable();
    match depths.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(same) => Err(Error::Experiment(format!(
            "two drafts of {} layers: a table tells drafts apart by their layers, so measure each into a file of its own",
            same[0]
        ))),
        None => Ok(()),
    }
}

/// Forwards of all numbers of rows at a batch and context.
fn forwards(
    session: &mut Session,
    batch: usize,
    context: usize,
    round: usize,
    file: &mut File<'_>,
) -> Result<()> {
    let room = session.target.model.shape().context;
    let sizes = ROWS.into_iter();
    let sizes =
        sizes.filter(|&rows| rows == 1 || (batch * rows <= MOST_ROWS && context + rows <= room));
    let sizes: Vec<usize> = sizes
        .filter(|&rows| file.count((What::Forward, batch, rows, context, 0)) <= round)
        .collect();
    if sizes.is_empty() {
        return Ok(());
    }
    if context + 1 > room {
        return Err(Error::Experiment(format!(
            "a context of {context} does not fit: the target holds {room} positions; --context asks for fewer"
        )));
    }
    let ids = tokens(session, context.max(ROWS[ROWS.len() - 1]));
    let model = &mut session.target.model;
    let mut found = Vec::new();
    let mut body = || -> Result<()> {
        for slot in 0..batch {
            if slot > 0 && model.fork(0, slot, context)? {
                continue;
            }
            model.open(slot)?;
            // In pieces: a prompt as a whole takes memory for all its rows.
            for piece in ids[..context].chunks(128) {
                let step = Step {
                    slots: vec![SlotRows {
                        slot,
                        tokens: piece,
                        parents: &[],
                        want: Want::None,
                    }],
                    taps: &[],
                };
                let done = model.forward(&step)?;
                model.recycle(done);
                model.commit(slot, &(0..piece.len()).collect::<Vec<_>>())?;
            }
        }
        // Behind prompts as behind others: each size comes first in turn, and behind its like, as decoding has it.
        for i in 0..sizes.len() {
            let rows = sizes[(i + round) % sizes.len()];
            let step = Step {
                slots: (0..batch)
                    .map(|slot| SlotRows {
                        slot,
                        tokens: &ids[..rows],
                        parents: &[],
                        want: Want::All,
                    })
                    .collect(),
                taps: &[],
            };
            for counts in [false, true] {
                let begun = Instant::now();
                let done = model.forward(&step)?;
                if let Some(logits) = done.logits.first() {
                    // On a device this waits until it is done.
                    std::hint::black_box(logits.row(0)?);
                }
                if counts {
                    found.push((rows, begun.elapsed().as_secs_f64()));
                }
                model.recycle(done);
                for slot in 0..batch {
                    model.commit(slot, &[])?;
                }
            }
        }
        Ok(())
    };
    let done = body();
    for slot in 0..batch {
        session.target.model.close(slot);
    }
    done?;
    for (rows, seconds) in found {
        file.add(&Cost {
            what: What::Forward,
            batch,
            rows,
            context,
            layers: 0,
            seconds,
        })?;
    }
    Ok(())
}

/// Seconds of a step beside proposing and the forward.
fn rest(step: &Stepped) -> f64 {
    (step.ms.propose - step.proposing_ms + step.ms.accept + step.ms.commit) / 1e3
}

/// What cycles of a batch are measured with.
struct Measuring<'a, 'f> {
    registry: &'a Registry,
    session: &'a mut Session,
    batch: usize,
    context: usize,
    round: usize,
    file: &'a mut File<'f>,
}

impl Measuring<'_, '_> {
    fn has(&self, rows: usize, layers: usize) -> bool {
        let place = (What::Between, self.batch, rows, self.context, layers);
        self.file.count(place) > self.round
    }

    fn add(&mut self, what: What, rows: usize, layers: usize, seconds: f64) -> Result<()> {
        self.file.add(&Cost {
            what,
            batch: self.batch,
            rows,
            context: self.context,
            layers,
            seconds: seconds.max(0.0),
        })
    }

    /// What plain decoding takes beside its forwards.
    fn plain(&mut self, decoder: &Experiment) -> Result<()> {
        if self.has(1, 0) {
            return Ok(());
        }
        let steps = self.run(decoder, Budget::OFF)?;
        let rest: Vec<f64> = steps.iter().map(rest).collect();
        self.add(What::Between, 1, 0, median(&rest))
    }

    /// Levels of a draft, and all between: cycles of two depths are run, and what they differ by is levels.
    fn drafted(&mut self, decoder: &Experiment) -> Result<()> {
        let layers = layers(decoder);
        if self.has(BETWEEN, layers) {
            return Ok(());
        }
        let (mut levels, mut beside) = (Vec::new(), Vec::new());
        let deepest = LEVELS[1];
        let fits = |width: &usize| *width == 1 || self.batch * (1 + width * deepest) <= MOST_ROWS;
        let widths: Vec<usize> = WIDTHS.into_iter().filter(fits).collect();
        for &width in &widths {
            let (mut proposing, mut others) = (Vec::new(), Vec::new());
            for levels in LEVELS {
                let budget = Budget {
                    total: 1 + width * levels,
                    width,
                    depth: levels - 1,
                };
                let steps = self.run(decoder, budget)?;
                let of =
                    |f: fn(&Stepped) -> f64| median(&steps.iter().map(f).collect::<Vec<f64>>());
                proposing.push(of(|s| s.proposing_ms / 1e3));
                others.push(of(rest));
            }
            let apart = (LEVELS[1] - LEVELS[0]) as f64;
            levels.push(((proposing[1] - proposing[0]) / apart).max(0.0));
            // What proposing takes beside its first level: catching up with what was committed.
            let first = if layers > 0 { levels[0] } else { 0.0 };
            let caught = (proposing[0] - first).max(0.0);
            beside.extend(others.iter().map(|rest| rest + caught));
        }
        if layers > 0 {
            for (&rows, &seconds) in widths.iter().zip(&levels) {
                self.add(What::Draft, rows, layers, seconds)?;
            }
        }
        // Without a network it stands beside plain decoding's, of one row.
        if layers == 0 {
            self.add(What::Between, 2, layers, median(&beside))?;
        }
        // Last, as it says that the rest is there.
        self.add(What::Between, BETWEEN, layers, median(&beside))
    }

    /// Cycles with one budget, but for the first: those in which all sequences decode.
    fn run(&mut self, decoder: &Experiment, budget: Budget) -> Result<Vec<Stepped>> {
        let mut experiment = decoder.clone();
        experiment.budget = BudgetSpec::from(budget);
        let session = &mut *self.session;
        let mut composed = session.compose(self.registry, &experiment)?;
        let prompt = tokens(session, self.context.min(POSITIONS));
        let requests: Vec<_> = (0..self.batch as u64)
            .map(|sequence| {
                let mut one = session.request(&experiment, &composed, prompt.clone(), sequence);
                one.eos.clear();
                one.stops.clear();
                one.max_new_tokens = CYCLES * (budget.levels() + 1);
                one
            })
            .collect();
        // All prompts in one forward, so that all sequences decode side by side from the first cycle on.
        let options = Options {
            batch: self.batch,
            prompt_rows: self.batch * prompt.len(),
            ..Options::default()
        };
        let mut engine = session.engine(&mut composed, options)?;
        for request in requests {
            engine.submit(request)?;
        }
        let mut steps = Vec::new();
        while !engine.is_idle() {
            for event in engine.step() {
                match event {
                    Event::Step(s) if s.batch == self.batch && s.prompts == 0 => steps.push(s),
                    Event::Finished { output, .. } => {
                        if let Some(failed) = output.failed {
                            return Err(Error::Experiment(failed));
                        }
                    }
                    _ => {}
                }
            }
        }
        let steps: Vec<Stepped> = steps.into_iter().skip(1).take(CYCLES).collect();
        match steps.is_empty() {
            true => Err(Error::Experiment(format!(
                "{} sequences with {} positions each do not decode side by side here",
                self.batch,
                prompt.len()
            ))),
            false => Ok(steps),
        }
    }
}

/// Layers of a draft's network, as its files say; 0 without files.
pub(super) fn layers(draft: &Experiment) -> usize {
    let dir = draft
        .draft
        .dir
        .clone()
        .or_else(|| shipped(&draft.draft.name));
    let Some(dir) = dir else { return 0 };
    let config = config_of(&dir);
    let own = [&config["transformer_layer_config"], &config];
    let layers = own
        .into_iter()
        .find_map(|c| c["num_hidden_layers"].as_u64());
    layers.map_or(1, |l| l as usize)
}
