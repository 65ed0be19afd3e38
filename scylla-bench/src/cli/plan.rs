//! `scylla plan`

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use clap::{Args, ValueEnum};
use scylla_core::files::{self, read_text};
use scylla_core::tree::Budget;
use serde::{Deserialize, Serialize};

use super::fit::query;
use super::{ModelOptions, Progress, named, open_session, print_json, print_text, say, warn};
use crate::experiment::{Experiment, Override};
use crate::laws::{Band, Laws, Point};
use crate::plan::{
    self, BreakEven, Choice, CostTable, Drafted, Measured, More, Peaks, Planned, Prospects, Shape,
    break_even, choose, context_of, every, export, fit_roofline, from_rates, from_trace, measure,
};
use crate::{Error, Registry, Result};

/// Which draft, tree and budget pay at each batch size on a machine, before anything is trained or run there.
#[derive(Args)]
pub(super) struct Plan {
    /// Measure what steps cost on this machine into a CSV file; where it is begun it goes on
    #[arg(long, value_name = "COSTS.csv")]
    measure: Option<PathBuf>,
    /// Of a machine that is not at hand its datasheet's peaks, operations and bytes a second, as 989e12,3.35e12: with --measure the
    /// least that they allow is written in place of what is measured
    #[arg(long, value_name = "OPERATIONS,BYTES", requires = "measure")]
    datasheet: Option<plan::Datasheet>,
    /// The target whose forwards are measured
    #[arg(long, default_value = "default")]
    target: String,
    /// With --measure: drafts whose levels are measured, `NAME[:DIR]`. With --export: where the engine finds its draft
    #[arg(long, value_name = "DRAFT")]
    draft: Vec<String>,
    /// With --measure: settings of the drafts, as draft.weights=q4
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Samples of every point that is measured
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Costs of a machine: what,batch,rows,context,layers,seconds
    #[arg(long, value_name = "COSTS.csv", required_unless_present = "measure")]
    costs: Option<PathBuf>,
    /// Laws: what `scylla fit --output` wrote. Plans with every family and depth of its runs, at their most tokens
    #[arg(long, value_name = "FIT.json", group = "acceptance")]
    laws: Option<PathBuf>,
    /// Another run that the laws are asked for: family=scylla,layers=4,tokens=8e6; may be said several times
    #[arg(long, value_name = "RUN", requires = "laws")]
    predict: Vec<String>,
    /// Of what the candidates of a node catch together, the share of each by rank: the laws know depths alone
    #[arg(long, value_delimiter = ',', default_values_t = SHARES)]
    ranks: Vec<f64>,
    /// Acceptance by depth of a chain, as 0.7,0.6,0.5; further candidates of a depth behind slashes, as 0.7/0.1,0.6/0.1
    #[arg(long, value_name = "RATES", group = "acceptance")]
    alpha: Option<String>,
    /// A dense trace of a draft (`scylla bench --trace dense`), replayed with each tree; may be said several times, of several drafts
    #[arg(long, value_name = "TRACE", group = "acceptance")]
    trace: Vec<PathBuf>,
    /// Layers of the draft that --alpha or --trace speak of, of several in their order; 0 without a network. The fewest that the
    /// costs know unless said otherwise
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    layers: Vec<usize>,
    /// Only these budgets, total/width/depth, as 2/1/0,5/2/2: then each of them is told, not the best alone
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    budgets: Vec<String>,
    /// Batch sizes
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    batch: Vec<usize>,
    /// Committed positions of each sequence, 128 unless traces say how many their answers have; with --measure several
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    context: Vec<usize>,
    /// Seconds that training took: says after how many generated tokens it has paid
    #[arg(long, value_name = "SECONDS")]
    train_seconds: Option<f64>,
    /// Hours that there are for training: proposes the run to make, by the laws, for the first batch
    #[arg(long, value_name = "HOURS", requires = "train_rate", requires = "laws")]
    train_hours: Option<f64>,
    /// Tokens a second that training does, by family and layers: scylla/1=3100,scylla/2=2400,eagle3/1=1500; the family may be
    /// left out where the laws are of one
    #[arg(long, value_name = "D=RATE,..", value_delimiter = ',')]
    train_rate: Vec<String>,
    /// Where the experiment of the proposed run goes
    #[arg(long, value_name = "EXPERIMENT.toml")]
    output: Option<PathBuf>,
    /// Print an engine's form instead
    #[arg(long, value_enum)]
    export: Option<To>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelOptions,
}

/// Of the five first candidates of the shipped EAGLE-3 draft, on the default model's dev prompts; the fifth by the trend of the
/// others.
const SHARES: [f64; 5] = [0.66, 0.18, 0.08, 0.05, 0.03];
/// Positions unless said otherwise.
const CONTEXT: usize = 128;
const BATCHES: [usize; 6] = [1, 2, 4, 8, 16, 32];

#[derive(Clone, Copy, ValueEnum)]
enum To {
    Scylla,
    Vllm,
    Sglang,
    #[value(name = "llama.cpp")]
    LlamaCpp,
}

impl From<To> for plan::Engine {
    fn from(to: To) -> Self {
        match to {
            To::Scylla => Self::Scylla,
            To::Vllm => Self::Vllm,
            To::Sglang => Self::Sglang,
            To::LlamaCpp => Self::LlamaCpp,
        }
    }
}

#[derive(Serialize)]
struct Answer {
    #[serde(flatten)]
    planned: Planned,
    /// Where budgets were named, all that was compared.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    cells: Vec<Choice>,
    more: Vec<More>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    break_even: Vec<BreakEven>,
    #[serde(skip_serializing_if = "Option::is_none")]
    roofline: Option<Peaks>,
    context: usize,
    about: Vec<String>,
}

fn bad(message: String) -> Error {
    Error::Experiment(message)
}

/// Rates as they are written.
fn rates(text: &str) -> Result<Vec<Vec<Band>>> {
    let rate = |part: &str| {
        let value: f64 = part.trim().parse().map_err(|_| {
            bad(format!(
                "--alpha {text}: `{part}` is no number; 0.7,0.6,0.5 is meant"
            ))
        })?;
        match (0.0..=1.0).contains(&value) {
            true => Ok(Band::exactly(value)),
            false => Err(bad(format!(
                "--alpha {text}: {value} is no rate from 0 to 1"
            ))),
        }
    };
    let all: Vec<Vec<Band>> = text
        .split(',')
        .map(|depth| depth.split('/').map(rate).collect())
        .collect::<Result<_>>()?;
    for depth in &all {
        let sum: f64 = depth.iter().map(|r| r.value).sum();
        if sum > 1.0 + 1e-9 {
            return Err(bad(format!(
                "--alpha {text}: candidates of a depth are accepted in {sum} of cases, more than 1"
            )));
        }
    }
    Ok(all)
}

/// Budgets as they are written.
fn budget(text: &str) -> Result<Budget> {
    let parts: Option<Vec<usize>> = text.split('/').map(|part| part.parse().ok()).collect();
    match parts.as_deref() {
        Some(&[total, width, depth]) if total > 1 && width > 0 => Ok(Budget {
            total,
            width,
            depth,
        }),
        _ => Err(bad(format!(
            "--budgets {text}: 5/2/2 is meant, nodes with the root, children of each, and expansion steps after level 0"
        ))),
    }
}

/// The runs of a file of laws.
#[derive(Deserialize)]
struct Fitted {
    points: Vec<Point>,
}

fn read_laws(path: &Path) -> Result<Laws> {
    let text = read_text(path)?;
    let fitted: Fitted = serde_json::from_str(&text)
        .map_err(|e| Error::file(path, format!("not what `scylla fit --output` writes: {e}")))?;
    for point in &fitted.points {
        point
            .check()
            .map_err(|message| Error::file(path, message))?;
    }
    Laws::fit(fitted.points)
}

impl Plan {
    pub(super) fn run(self, registry: &Registry, stop: &AtomicBool) -> Result<()> {
        let positive = |x: Option<f64>| x.is_none_or(|x| x.is_finite() && x > 0.0);
        if !positive(self.train_seconds) || !positive(self.train_hours) {
            return Err(bad("--train-seconds and --train-hours are above 0".into()));
        }
        let shared: f64 = self.ranks.iter().sum();
        if shared.is_nan() || shared > 1.0 + 1e-9 || self.ranks.iter().any(|&share| share < 0.0) {
            return Err(bad(
                "--ranks are shares, 0.66,0.18,0.08: together 1 at most".into(),
            ));
        }
        if self.batch.contains(&0) || self.context.contains(&0) || self.rounds == 0 {
            return Err(bad("batches, contexts and rounds are 1 at least".into()));
        }
        match &self.measure {
            Some(path) => self.measure(path, registry, stop),
            None => self.plan(registry),
        }
    }

    fn measure(&self, path: &Path, registry: &Registry, stop: &AtomicBool) -> Result<()> {
        let more = Override::parse_all(&self.set)?;
        let of = |draft: &str| {
            let mut all = self.model.with(&self.target, draft);
            if draft != crate::PLAIN {
                all.extend(more.iter().cloned());
            }
            Experiment::from_overrides(&all)
        };
        let plain = of(crate::PLAIN)?;
        let drafts: Vec<Experiment> = self.draft.iter().map(|d| of(d)).collect::<Result<_>>()?;
        let mut session = open_session(&plain)?;
        let sizes = Measured {
            batches: or(&self.batch, &BATCHES),
            contexts: or(&self.context, &[CONTEXT, 4 * CONTEXT]),
            rounds: self.rounds,
        };
        if let Some(sheet) = self.datasheet {
            plan::from_datasheet(&session, &drafts, sheet, &sizes, path)?;
            return self.told(path, &sizes);
        }
        let mut progress = Progress::new("measuring", false);
        let mut told = |done: usize, all: usize| progress.set(done as u64, all as u64);
        let all = [std::slice::from_ref(&plain), &drafts].concat();
        measure(registry, &mut session, &all, &sizes, path, stop, &mut told)?;
        progress.finish();
        self.told(path, &sizes)
    }

    /// Says what a file of costs holds.
    fn told(&self, path: &Path, sizes: &Measured) -> Result<()> {
        let table = CostTable::read(path)?;
        let context = sizes.contexts[0];
        let mut text = String::new();
        for batch in table.batches() {
            let ms = |rows: f64| table.forward(batch, rows, context).map_or(0.0, |s| s * 1e3);
            text += &format!(
                "batch {batch:>3}: forward of 1, 2, 4, 8 rows each {:.2}, {:.2}, {:.2}, {:.2} ms",
                ms(1.0),
                ms(2.0),
                ms(4.0),
                ms(8.0)
            );
            for layers in table.layers() {
                let level = table.draft(layers, batch, 1.0, context);
                text += &format!(
                    "; D {layers}: level {:.2} ms, beside {:.2} ms",
                    level.map_or(0.0, |s| s * 1e3),
                    table.between(layers, batch, 4.0, context) * 1e3
                );
            }
            text.push('\n');
        }
        match self.json {
            true => print_json(&serde_json::json!({ "costs": path, "rounds": self.rounds })),
            false => print_text(&text),
        }
    }

    fn plan(&self, registry: &Registry) -> Result<()> {
        let Some(path) = &self.costs else {
            return Err(bad("--costs is needed".into()));
        };
        let table = CostTable::read(path)?;
        let context = match self.context.first() {
            Some(&asked) => asked,
            None => context_of(&self.trace)?.unwrap_or(CONTEXT),
        };
        let mut batches = match &self.batch[..] {
            [] => table.batches(),
            some => some.to_vec(),
        };
        batches.sort_unstable();
        batches.dedup();
        let only: Vec<Budget> = self
            .budgets
            .iter()
            .map(|b| budget(b))
            .collect::<Result<_>>()?;
        let layers = |index: usize, name: &str| match (self.layers.get(index), &table.layers()[..])
        {
            (Some(&layers), _) => layers,
            // They propose what the text repeats.
            _ if ["ngram", "suffix"].contains(&name) => 0,
            (None, []) => {
                warn(
                    "the costs hold no draft: drafting is taken to cost nothing; scylla plan --measure with --draft measures one",
                );
                0
            }
            (None, [first, rest @ ..]) => {
                if !rest.is_empty() {
                    warn(&format!(
                        "the costs know drafts of {:?} layers: taken for one of {first}; --layers says otherwise",
                        table.layers()
                    ));
                }
                *first
            }
        };
        let laws = self.laws.as_deref().map(read_laws).transpose()?;
        let prospects = laws.as_ref().map(|laws| Prospects {
            laws,
            table: &table,
            ranks: &self.ranks,
            context,
        });
        let mut drafts = match (&prospects, &self.alpha, &self.trace[..]) {
            (Some(prospects), _, _) if self.predict.is_empty() => {
                let (drafts, left_out) = prospects.largest()?;
                if !left_out.is_empty() {
                    let names = left_out.join(", ");
                    warn(&format!(
                        "left out, as the costs do not know their depth: {names}"
                    ));
                }
                drafts
            }
            (Some(prospects), _, _) => {
                let queries = self.predict.iter().map(|text| query(text));
                queries
                    .map(|q| prospects.drafted(&q?))
                    .collect::<Result<_>>()?
            }
            (_, Some(text), _) => {
                let name = self.draft.first().map_or("eagle3", |d| named(d).0);
                vec![Drafted {
                    name: name.into(),
                    layers: layers(0, name),
                    tokens: None,
                    shapes: from_rates(&rates(text)?),
                }]
            }
            (_, _, traces @ [_, ..]) => {
                let mut drafts = Vec::new();
                for (i, trace) in traces.iter().enumerate() {
                    let (name, shapes) = from_trace(registry, trace, &only)?;
                    drafts.push(Drafted {
                        layers: layers(i, &name),
                        name,
                        tokens: None,
                        shapes,
                    });
                }
                drafts
            }
            _ => {
                return Err(bad(
                    "what is accepted? --laws FIT.json, --alpha 0.7,0.6,0.5 or --trace TRACE says it".into(),
                ));
            }
        };
        let engine = self.export.map(plan::Engine::from);
        if engine.is_some_and(plan::Engine::chains) {
            let chain = |s: &Shape| s.budget.width == 1;
            drafts.iter_mut().for_each(|d| d.shapes.retain(chain));
        }
        if !only.is_empty() {
            let named = |s: &Shape| only.contains(&s.budget);
            drafts.iter_mut().for_each(|d| d.shapes.retain(named));
            if let Some(without) = drafts.iter().find(|d| d.shapes.is_empty()) {
                return Err(bad(format!(
                    "--budgets: what is known of {} says nothing of such trees",
                    without.name
                )));
            }
        }
        let planned = choose(&table, &drafts, &batches, context)?;
        if let Some(engine) = engine {
            let first = self.draft.first().map(|d| named(d));
            let model = first.map_or("DRAFT", |(name, dir)| dir.unwrap_or(name));
            let exported = export(&planned, engine, model)?;
            if let Some(flags) = exported.flags {
                say(&format!("flags: {flags}"));
            }
            return print_text(&exported.text);
        }
        let more = match (&prospects, self.train_hours) {
            (Some(prospects), Some(hours)) => {
                let batch = batches.first().copied().unwrap_or(1);
                let best = prospects.best(&self.rates(prospects.laws)?, hours, batch)?;
                if let Some(path) = &self.output {
                    files::write(path, plan::experiment(&best.query())?.as_bytes())?;
                }
                vec![best]
            }
            (Some(prospects), None) => prospects.more(&planned),
            (None, _) => Vec::new(),
        };
        let drafting = planned.choices.iter().filter(|c| c.draft.is_some());
        let mut cells = Vec::new();
        if !only.is_empty() {
            for &batch in &batches {
                cells.extend(every(&table, &drafts, batch, context)?);
            }
        }
        let answer = Answer {
            cells,
            break_even: match self.train_seconds {
                Some(seconds) => drafting.map(|c| break_even(c, seconds)).collect(),
                None => Vec::new(),
            },
            roofline: table
                .shapes()
                .and_then(|s| fit_roofline(&table, &s, &batches, context)),
            planned,
            more,
            context,
            about: table.about.clone(),
        };
        match self.json {
            true => print_json(&answer),
            false => print_text(&text(&answer)),
        }
    }

    /// Tokens a second of training, by family and layers.
    fn rates(&self, laws: &Laws) -> Result<Vec<(String, usize, f64)>> {
        let families: BTreeSet<&str> = laws.points().iter().map(|p| &*p.family).collect();
        let rate = |text: &String| {
            let wrong = || {
                bad(format!(
                    "--train-rate {text}: scylla/2=2400 is meant, family, layers and tokens a second"
                ))
            };
            let (run, rate) = text.split_once('=').ok_or_else(wrong)?;
            let (family, layers) = match (run.split_once('/'), families.len()) {
                (Some((family, layers)), _) => (family, layers),
                (None, 1) => (families.first().copied().unwrap_or_default(), run),
                (None, _) => {
                    return Err(bad(format!(
                        "--train-rate {text}: of which family? scylla/2=2400 is meant"
                    )));
                }
            };
            let layers: usize = layers.parse().map_err(|_| wrong())?;
            let rate: f64 = rate.parse().map_err(|_| wrong())?;
            match layers > 0 && rate.is_finite() && rate > 0.0 {
                true => Ok((family.to_string(), layers, rate)),
                false => Err(wrong()),
            }
        };
        self.train_rate.iter().map(rate).collect()
    }
}

fn or(given: &[usize], usual: &[usize]) -> Vec<usize> {
    match given {
        [] => usual.to_vec(),
        some => some.to_vec(),
    }
}

fn told(c: &Choice) -> String {
    let gain = c.tokens_per_s.value / c.plain_tokens_per_s;
    let speed = format!(
        "{:.0} tokens/s ({:.0}-{:.0}), {gain:.2} x plain",
        c.tokens_per_s.value, c.tokens_per_s.low, c.tokens_per_s.high
    );
    match &c.draft {
        None => format!("no drafting, {:.0} tokens/s", c.plain_tokens_per_s),
        Some(draft) => format!(
            "{draft} D {}, budget {}/{}/{}, tau {:.2}, {speed}",
            c.layers, c.budget.total, c.budget.width, c.budget.depth, c.tau
        ),
    }
}

fn text(answer: &Answer) -> String {
    let mut text = String::new();
    for choice in &answer.planned.choices {
        text += &format!("batch {:>3}: {}\n", choice.batch, told(choice));
    }
    let choices = &answer.planned.choices;
    text += &match answer.planned.off_from_batch {
        Some(batch) => format!("from batch {batch} on drafting does not pay\n"),
        None if choices.iter().all(|c| c.draft.is_some()) => {
            "drafting pays at every batch that was asked for\n".into()
        }
        None => "drafting pays at the largest batch that was asked for\n".into(),
    };
    for cell in answer.cells.iter().filter(|c| c.draft.is_some()) {
        text += &format!("batch {:>3}, of all: {}\n", cell.batch, told(cell));
    }
    for one in &answer.break_even {
        let tokens = |t: Option<f64>| t.map_or("never".into(), |t| format!("{t:.2e}"));
        text += &format!(
            "batch {:>3}: training has paid after {} generated tokens ({} to {})\n",
            one.batch,
            tokens(one.tokens),
            tokens(one.low),
            tokens(one.high)
        );
    }
    if let Some(r) = &answer.roofline {
        let verified = |batch: usize| {
            let choice = answer.planned.choices.iter().find(|c| c.batch == batch);
            choice.map_or("-".into(), |c| c.budget.total.to_string())
        };
        let widths = r.widths.iter();
        let widths =
            widths.map(|&(b, k)| format!("{k:.1} at {b} (the plan verifies {})", verified(b)));
        let widths: Vec<String> = widths.collect();
        text += &format!(
            "roofline: {:.1} GB/s, {:.0} billion operations/s, off by {:.0} % on average; arithmetic and memory take as long at {} nodes by batch\n",
            r.bytes_per_s / 1e9,
            r.operations_per_s / 1e9,
            r.error * 100.0,
            widths.join(", ")
        );
    }
    for more in &answer.more {
        text += &format!(
            "{} ({} D {}, {:.3e} tokens), batch {}: {}\n",
            more.what,
            more.family,
            more.layers,
            more.tokens,
            more.choice.batch,
            told(&more.choice)
        );
    }
    text
}
