//! `scylla plan`

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use clap::{Args, ValueEnum};
use scylla_core::files::{self, read_text};
use serde::{Deserialize, Serialize};

use super::fit::query;
use super::{ModelOptions, Progress, open_session, print_json, print_text, say, warn};
use crate::experiment::{Experiment, Override};
use crate::laws::{Band, Laws, Point, Query};
use crate::plan::{
    self, BreakEven, Choice, CostTable, Drafted, Measured, Peaks, Planned, Shape, break_even,
    choose, export, fit_roofline, from_rates, from_trace, measure,
};
use crate::{Error, Registry, Result};

/// Which draft, tree and budget pay at each batch size on a machine, before anything is trained or run there.
#[derive(Args)]
pub(super) struct Plan {
    /// Measure what steps cost on this machine into a CSV file; where it is begun it goes on
    #[arg(long, value_name = "COSTS.csv")]
    measure: Option<PathBuf>,
    /// The target whose forwards are measured
    #[arg(long, default_value = "default")]
    target: String,
    /// With --measure: drafts whose levels are measured, NAME[:DIR]. With --export: where the engine finds its draft
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
    /// A dense trace of a draft (`scylla bench --trace dense`), replayed with each tree
    #[arg(long, value_name = "TRACE", group = "acceptance")]
    trace: Option<PathBuf>,
    /// Layers of the draft that --alpha or --trace speak of; 0 without a network. The fewest that the costs know unless said otherwise
    #[arg(long)]
    layers: Option<usize>,
    /// Batch sizes
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    batch: Vec<usize>,
    /// Committed positions of each sequence; with --measure several
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

/// What another run of training would bring.
#[derive(Serialize)]
struct More {
    what: &'static str,
    family: String,
    layers: usize,
    tokens: f64,
    choice: Choice,
}

#[derive(Serialize)]
struct Answer {
    #[serde(flatten)]
    planned: Planned,
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
            true => Ok(Band {
                value,
                low: value,
                high: value,
            }),
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

/// The runs of a file of laws.
#[derive(Deserialize)]
struct Fitted {
    points: Vec<Point>,
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

    fn measure(
        &self,
        path: &std::path::Path,
        registry: &Registry,
        stop: &AtomicBool,
    ) -> Result<()> {
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
        let mut progress = Progress::new("measuring", false);
        let mut told = |done: usize, all: usize| progress.set(done as u64, all as u64);
        let all = [std::slice::from_ref(&plain), &drafts].concat();
        measure(registry, &mut session, &all, &sizes, path, stop, &mut told)?;
        progress.finish();
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
        let context = self.context.first().copied().unwrap_or(CONTEXT);
        let mut batches = match &self.batch[..] {
            [] => table.batches(),
            some => some.to_vec(),
        };
        batches.sort_unstable();
        batches.dedup();
        let layers = |name: &str| match (self.layers, &table.layers()[..]) {
            (Some(layers), _) => layers,
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
        let mut laws = None;
        let mut drafts = match (&self.laws, &self.alpha, &self.trace) {
            (Some(path), _, _) => {
                let laws = laws.insert(self.read_laws(path)?);
                let queries = self.queries(laws)?;
                let all = queries.iter().map(|q| self.drafted(laws, q));
                let mut all = all.collect::<Result<Vec<_>>>()?;
                if self.predict.is_empty() {
                    self.leave_out_unknown(&mut all, &table, context)?;
                }
                all
            }
            (_, Some(text), _) => vec![Drafted {
                name: name_of(&self.draft).unwrap_or("eagle3").into(),
                layers: layers(name_of(&self.draft).unwrap_or("eagle3")),
                tokens: None,
                shapes: from_rates(&rates(text)?),
            }],
            (_, _, Some(trace)) => {
                let (name, shapes) = from_trace(registry, trace)?;
                vec![Drafted {
                    layers: layers(&name),
                    name,
                    tokens: None,
                    shapes,
                }]
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
        let planned = choose(&table, &drafts, &batches, context)?;
        if let Some(engine) = engine {
            let model = self.draft.first().map_or("DRAFT", |d| dir_of(d));
            let exported = export(&planned, engine, model)?;
            if let Some(flags) = exported.flags {
                say(&format!("flags: {flags}"));
            }
            return print_text(&exported.text);
        }
        let more = match &laws {
            Some(laws) => self.more(laws, &table, &planned, context),
            None => Vec::new(),
        };
        let more = match (&laws, self.train_hours) {
            (Some(laws), Some(hours)) => {
                vec![self.propose(laws, &table, &batches, context, hours)?]
            }
            _ => more,
        };
        let drafting = planned.choices.iter().filter(|c| c.draft.is_some());
        let answer = Answer {
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

    /// Drafts of depths that the costs do not know, of those that nobody asked for by name.
    fn leave_out_unknown(
        &self,
        drafts: &mut Vec<Drafted>,
        table: &CostTable,
        context: usize,
    ) -> Result<()> {
        let known = |d: &Drafted| table.draft(d.layers, 1, 1.0, context).is_some();
        let (kept, others): (Vec<_>, Vec<_>) = drafts.drain(..).partition(known);
        let named: Vec<String> = others
            .iter()
            .map(|d| format!("{} D {}", d.name, d.layers))
            .collect();
        if kept.is_empty() {
            return Err(bad(format!(
                "the costs hold no draft as deep as {}: measure one with scylla plan --measure COSTS.csv --draft NAME:DIR",
                named.join(", ")
            )));
        }
        if !named.is_empty() {
            warn(&format!(
                "left out, as the costs do not know their depth: {}",
                named.join(", ")
            ));
        }
        drafts.extend(kept);
        Ok(())
    }

    fn read_laws(&self, path: &std::path::Path) -> Result<Laws> {
        let text = read_text(path)?;
        let fitted: Fitted = serde_json::from_str(&text).map_err(|e| {
            Error::file(path, format!("not what `scylla fit --output` writes: {e}"))
        })?;
        for point in &fitted.points {
            point
                .check()
                .map_err(|message| Error::file(path, message))?;
        }
        Laws::fit(fitted.points)
    }

    /// The runs that are asked for, or the largest of every family and depth.
    fn queries(&self, laws: &Laws) -> Result<Vec<Query>> {
        if !self.predict.is_empty() {
            return self.predict.iter().map(|text| query(text)).collect();
        }
        let mut all: Vec<Query> = Vec::new();
        for p in laws.points().iter().filter(|p| !p.holdout) {
            let known = all
                .iter_mut()
                .find(|q| q.family == p.family && q.layers == p.layers);
            match known {
                Some(known) => known.tokens = known.tokens.max(p.tokens),
                None => all.push(Query {
                    family: p.family.clone(),
                    layers: p.layers,
                    tokens: p.tokens,
                }),
            }
        }
        Ok(all)
    }

    /// The trees of a run that a law speaks of: its rates by depth, shared out by rank, in a band as wide as tau's.
    fn drafted(&self, laws: &Laws, query: &Query) -> Result<Drafted> {
        let said = laws.predict(query)?;
        if said.alpha.is_empty() {
            return Err(bad(format!(
                "the laws know no acceptance by depth of {}: they were fitted to a table of tau alone; --alpha says it",
                query.family
            )));
        }
        let exactly = |value: f64| Band {
            value,
            low: value,
            high: value,
        };
        let depth = |band: &Band| {
            self.ranks
                .iter()
                .map(|share| exactly(band.value * share))
                .collect()
        };
        let by_depth: Vec<Vec<Band>> = said.alpha.iter().map(depth).collect();
        let mut shapes = from_rates(&by_depth);
        // As much lower and higher as tau is; no tree brings more than its levels.
        let gain = (said.tau - 1.0).max(1e-9);
        let (low, high) = ((said.low - 1.0) / gain, (said.high - 1.0) / gain);
        for shape in &mut shapes {
            let (more, most) = (shape.tau.value - 1.0, shape.budget.levels() as f64);
            shape.tau.low = 1.0 + (more * low).min(more);
            shape.tau.high = 1.0 + (more * high).min(most).max(more);
        }
        Ok(Drafted {
            name: query.family.clone(),
            layers: query.layers,
            tokens: Some(query.tokens),
            shapes,
        })
    }

    /// What ten times the tokens, or a layer more, would bring where drafting pays most.
    fn more(&self, laws: &Laws, table: &CostTable, planned: &Planned, context: usize) -> Vec<More> {
        let gain = |c: &&Choice| c.tokens_per_s.value / c.plain_tokens_per_s;
        let best = planned.choices.iter().filter(|c| c.draft.is_some());
        let best = best.max_by(|a, b| gain(a).total_cmp(&gain(b)));
        let Some((best, family, tokens)) =
            best.and_then(|b| Some((b, b.draft.clone()?, b.tokens?)))
        else {
            return Vec::new();
        };
        let others = [
            ("ten times the tokens", best.layers, 10.0 * tokens),
            ("one layer more", best.layers + 1, tokens),
        ];
        let asked = others.into_iter().filter_map(|(what, layers, tokens)| {
            let query = Query {
                family: family.clone(),
                layers,
                tokens,
            };
            // What neither laws nor costs tell is left out.
            let drafted = self.drafted(laws, &query).ok()?;
            let planned = choose(table, &[drafted], &[best.batch], context).ok()?;
            Some(More {
                what,
                family: family.clone(),
                layers,
                tokens,
                choice: planned.choices.into_iter().next()?,
            })
        });
        asked.collect()
    }
}

impl Plan {
    /// Tokens a second of training, by family and layers.
    fn rates(&self, families: &BTreeSet<&str>) -> Result<Vec<(String, usize, f64)>> {
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

    /// The run that the laws hold for the fastest of those that can be trained in so many hours, at the first batch.
    fn propose(
        &self,
        laws: &Laws,
        table: &CostTable,
        batches: &[usize],
        context: usize,
        hours: f64,
    ) -> Result<More> {
        let families: BTreeSet<&str> = laws.points().iter().map(|p| &*p.family).collect();
        let batch = batches.first().copied().unwrap_or(1);
        let mut best: Option<(Query, Choice)> = None;
        let mut refused = None;
        for (family, layers, rate) in self.rates(&families)? {
            let query = Query {
                family,
                layers,
                tokens: (hours * 3600.0 * rate).max(1.0),
            };
            // A depth that laws, costs or recipes do not know is none to propose.
            let planned = plan::experiment(&query)
                .and_then(|_| self.drafted(laws, &query))
                .and_then(|drafted| choose(table, &[drafted], &[batch], context));
            let speed = |c: &Choice| c.tokens_per_s.value;
            match planned {
                Err(e) => refused = Some(e),
                Ok(planned) => {
                    for choice in planned.choices.into_iter().filter(|c| c.draft.is_some()) {
                        if best.as_ref().is_none_or(|(_, b)| speed(&choice) > speed(b)) {
                            best = Some((query.clone(), choice));
                        }
                    }
                }
            }
        }
        let Some((query, choice)) = best else {
            return Err(refused.unwrap_or_else(|| bad(format!(
                "no run of {hours} hours is expected to be faster than plain decoding at batch {batch}"
            ))));
        };
        if let Some(path) = &self.output {
            files::write(path, plan::experiment(&query)?.as_bytes())?;
        }
        Ok(More {
            what: "to train",
            family: query.family,
            layers: query.layers,
            tokens: query.tokens,
            choice,
        })
    }
}

fn or(given: &[usize], usual: &[usize]) -> Vec<usize> {
    match given {
        [] => usual.to_vec(),
        some => some.to_vec(),
    }
}

fn name_of(drafts: &[String]) -> Option<&str> {
    let first = drafts.first()?;
    Some(first.split_once(':').map_or(first, |(name, _)| name))
}

fn dir_of(draft: &str) -> &str {
    draft.split_once(':').map_or(draft, |(_, dir)| dir)
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
        let widths = r.widths.iter().map(|(b, k)| format!("{k:.1} at {b}"));
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
