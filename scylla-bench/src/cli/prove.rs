//! `scylla prove`

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;
use scylla_core::plugin::Verifier;
use scylla_core::sampling::Sampling;
use serde::Serialize;

use super::{ModelOptions, Progress, open_session, print_json, print_text, say};
use crate::cases::{Case, Proposals, Watch, load};
use crate::chi_square::{Found, Setup};
use crate::experiment::{Experiment, Override};
use crate::{Error, Registry, Result};

#[derive(Args)]
#[command(group = clap::ArgGroup::new("on").required(true))]
pub(super) struct Prove {
    /// Acceptance rule by name
    #[arg(long)]
    rule: String,
    /// File of cases: tables of p and q, and the trees to draw
    #[arg(long, group = "on", value_name = "CASES.json")]
    case: Option<PathBuf>,
    /// Instead of cases, a model: chi-square of the first two tokens of many cycles on fixed prefixes
    #[arg(long, group = "on", value_name = "DIR|ID")]
    target: Option<String>,
    /// Cycles to run: on each prefix with --target (20000 unless said otherwise), on each case to measure beside the
    /// proof (none unless asked for)
    #[arg(long)]
    cycles: Option<usize>,
    /// Instead of a proof, with --case: test so many cycles of each case, and bound the distance from the target's law
    #[arg(long, value_name = "CYCLES")]
    sample: Option<usize>,
    /// Enumerate however many trees there are
    #[arg(long)]
    exhaustive: bool,
    /// Prefixes, with --target; taken as they are
    #[arg(long)]
    prefix: Vec<String>,
    /// With --target
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    temperature: f64,
    /// With --target
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    top_p: f64,
    /// Seed of the random stream
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Setting of the rule, or `proposal` (chain, deterministic-tree, rrs-without-replacement, specinfer)
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelOptions,
}

/// What is continued unless the user says otherwise.
const PREFIXES: [&str; 2] = [
    "The old lighthouse keeper climbed the stairs every evening and",
    "Dear editor, I read your article about the new bridge, and",
];

#[derive(Serialize)]
struct OnModel {
    target: String,
    temperature: f64,
    top_p: f64,
    tests: Vec<OnPrefix>,
}

#[derive(Serialize)]
struct OnPrefix {
    prefix: String,
    #[serde(flatten)]
    found: Found,
}

#[derive(Serialize)]
struct Answer {
    rule: String,
    cases: Vec<Proved>,
}

#[derive(Serialize)]
struct Proved {
    name: String,
    law: Vec<Outcome>,
    expected_committed: f64,
    tv_to_target: f64,
    branches: usize,
    /// Where the case was sampled: how far its law may be from the target's all the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    sampled: Option<Bound>,
    /// Mean over --cycles cycles.
    #[serde(skip_serializing_if = "Option::is_none")]
    measured_committed: Option<f64>,
}

#[derive(Serialize)]
struct Bound {
    cycles: usize,
    confidence: f64,
    tv_at_most: f64,
    chi_square: Option<f64>,
    degrees: Option<usize>,
    p_value: Option<f64>,
}

/// Trees that are enumerated unless more are asked for: some minutes.
const MOST_TREES: f64 = 2e6;

#[derive(Serialize)]
struct Outcome {
    tokens: Vec<u32>,
    prob: f64,
}

impl Prove {
    pub(super) fn run(self, registry: &Registry, stop: &AtomicBool) -> Result<()> {
        let mut settings = toml::Table::new();
        for text in &self.set {
            Override::parse(text)?.apply(&mut settings);
        }
        let proposals = match settings.remove("proposal") {
            Some(name) => name.as_str().unwrap_or_default().parse()?,
            None => Proposals::of_rule(&self.rule),
        };
        let sampling = Sampling {
            temperature: self.temperature,
            top_p: self.top_p,
            ..Sampling::default()
        };
        sampling.check()?;
        let rule = registry.make_rule(&self.rule, &sampling, 1, settings)?;
        if let Some(target) = &self.target {
            return self.on_model(target, rule.as_ref(), proposals, &sampling, stop);
        }
        let path = self.case.clone().unwrap_or_default();
        let all = load(&path)?;
        if self.cycles == Some(0) || self.sample == Some(0) {
            return Err(Error::Experiment(
                "--cycles and --sample must be at least 1".into(),
            ));
        }
        let trees = all.iter().map(|case| case.trees(proposals));
        let trees = trees.collect::<Result<Vec<f64>>>()?;
        let (most, largest) = trees
            .iter()
            .zip(&all)
            .fold((0.0, ""), |(most, name), (&n, case)| match n > most {
                true => (n, &*case.name),
                false => (most, name),
            });
        let total: f64 = trees.iter().sum();
        if self.sample.is_none() {
            say(&format!(
                "{} cases, {total:.0} trees to draw, {most:.0} of them in `{largest}`",
                all.len()
            ));
            if most > MOST_TREES && !self.exhaustive {
                return Err(Error::Experiment(format!(
                    "case `{largest}`: {most:.3e} trees, each to be verified in every way, are beyond reach by enumeration (limit {MOST_TREES:.0e}); \
                     --sample 1000000 tests it with a stated confidence, --exhaustive enumerates all the same"
                )));
            }
        }
        let mut cases = Vec::new();
        let mut progress = Progress::new("proving", false);
        let (mut before, mut broken) = (0.0, None);
        for (case, trees) in all.iter().zip(&trees) {
            let mut watch = |share: f64| {
                let done = (before + share * trees) / total.max(1.0);
                progress.set((done.clamp(0.0, 1.0) * 1000.0) as u64, 1000);
                match stop.load(Ordering::Relaxed) {
                    true => ControlFlow::Break(()),
                    false => ControlFlow::Continue(()),
                }
            };
            match self.one(case, rule.as_ref(), proposals, &mut watch) {
                Ok(proved) => cases.push(proved),
                // What was proved until then is kept.
                Err(Error::Interrupted(where_)) => {
                    broken = Some(where_);
                    break;
                }
                Err(e) => return Err(e),
            }
            before += trees;
        }
        progress.finish();
        let answer = Answer {
            rule: rule.name().to_string(),
            cases,
        };
        match self.json {
            true => print_json(&answer)?,
            false => print_text(&answer.table())?,
        }
        match broken {
            Some(place) => Err(Error::Interrupted(format!(
                "{place}; {} of {} cases were proved",
                answer.cases.len(),
                all.len()
            ))),
            None => Ok(()),
        }
    }

    /// Proves or samples one case.
    fn one(
        &self,
        case: &Case,
        rule: &dyn Verifier,
        proposals: Proposals,
        watch: Watch<'_>,
    ) -> Result<Proved> {
        let measured_committed = match self.cycles {
            Some(cycles) => {
                Some(case.measure(rule, proposals, cycles, self.seed, &mut |_| watch(0.0))?)
            }
            None => None,
        };
        let outcomes = |law: BTreeMap<Vec<u32>, f64>| {
            law.into_iter()
                .map(|(tokens, prob)| Outcome { tokens, prob })
                .collect()
        };
        let name = case.name.clone();
        Ok(match self.sample {
            None => {
                let proof = case.prove(rule, proposals, watch)?;
                Proved {
                    name,
                    law: outcomes(proof.law),
                    expected_committed: proof.expected_committed,
                    tv_to_target: proof.tv_to_target,
                    branches: proof.branches,
                    sampled: None,
                    measured_committed,
                }
            }
            Some(cycles) => {
                let found = case.sample(rule, proposals, cycles, self.seed, watch)?;
                Proved {
                    name,
                    law: outcomes(found.law),
                    expected_committed: found.expected_committed,
                    tv_to_target: found.tv,
                    branches: found.cycles,
                    sampled: Some(Bound {
                        cycles: found.cycles,
                        confidence: found.confidence,
                        tv_at_most: found.tv_at_most,
                        chi_square: found.chi_square,
                        degrees: found.degrees,
                        p_value: found.p_value,
                    }),
                    measured_committed,
                }
            }
        })
    }

    /// The chi-square test on a model.
    fn on_model(
        &self,
        target: &str,
        rule: &dyn Verifier,
        proposals: Proposals,
        sampling: &Sampling,
        stop: &AtomicBool,
    ) -> Result<()> {
        let cycles = self.cycles.unwrap_or(20_000);
        if cycles < 1000 || sampling.is_greedy() {
            return Err(Error::Experiment(format!(
                "a test of a law needs a temperature above 0 and at least 1000 cycles, not {} and {}",
                self.temperature, cycles
            )));
        }
        let mut overrides = self.model.overrides();
        overrides.push(Override::new("target.model", target));
        let experiment = Experiment::from_overrides(&overrides)?;
        let mut session = open_session(&experiment)?;
        let known = session.tokenizer()?.size();
        let prefixes: Vec<String> = match self.prefix.is_empty() {
            true => PREFIXES.map(String::from).to_vec(),
            false => self.prefix.clone(),
        };
        let total = (cycles * prefixes.len()) as u64;
        let mut progress = Progress::new("proving", false);
        let (mut tests, mut broken) = (Vec::new(), None);
        for (i, prefix) in prefixes.into_iter().enumerate() {
            let ids = session.tokenizer()?.encode(&prefix)?;
            let model = session.target.model.as_mut();
            let mut setup = Setup::new(model, &ids, known, sampling)?;
            let mut on_cycle = |done: usize| {
                progress.set((i * cycles + done) as u64, total);
                match stop.load(Ordering::Relaxed) {
                    true => ControlFlow::Break(()),
                    false => ControlFlow::Continue(()),
                }
            };
            match setup.test(rule, proposals, cycles, self.seed, &mut on_cycle) {
                Ok(found) => tests.push(OnPrefix { prefix, found }),
                Err(Error::Interrupted(place)) => {
                    broken = Some(place);
                    break;
                }
                Err(e) => return Err(e),
            }
        }
        progress.finish();
        let answer = OnModel {
            target: session.target_hash()?.to_string(),
            temperature: self.temperature,
            top_p: self.top_p,
            tests,
        };
        let mut text = String::new();
        for test in &answer.tests {
            let f = &test.found;
            text.push_str(&format!(
                "{:<24} {} cycles, tau {:.4}, chi-square {:.1} with {} degrees, p = {:.4}  {:?}\n",
                f.rule, f.cycles, f.tau, f.chi_square, f.degrees, f.p_value, test.prefix
            ));
        }
        match self.json {
            true => print_json(&answer)?,
            false => print_text(&text)?,
        }
        match broken {
            Some(place) => Err(Error::Interrupted(format!(
                "{place}; what was tested before is above"
            ))),
            None => Ok(()),
        }
    }
}

impl Answer {
    fn table(&self) -> String {
        let mut text = format!(
            "{:<28} {:>12} {:>12} {:>14} {:>10}  {}\n",
            "case", "tokens/cycle", "measured", "tv to target", "branches", self.rule
        );
        for c in &self.cases {
            let (e, tv) = (c.expected_committed, c.tv_to_target);
            let measured = c.measured_committed;
            let measured = measured.map_or("-".into(), |m| format!("{m:.4}"));
            let bound = c.sampled.as_ref().map_or(String::new(), |s| {
                let p = s.p_value.map_or("-".into(), |p| format!("{p:.4}"));
                let percent = s.confidence * 100.0;
                format!(
                    "  sampled: at most {:.4} with {percent} % confidence, p = {p}",
                    s.tv_at_most
                )
            });
            text.push_str(&format!(
                "{:<28} {e:>12.6} {measured:>12} {tv:>14.3e} {:>10}{bound}\n",
                c.name, c.branches
            ));
        }
        if self.cases.is_empty() || self.cases.iter().any(|c| c.sampled.is_some()) {
            return text;
        }
        let worst = self
            .cases
            .iter()
            .map(|c| c.tv_to_target)
            .fold(0.0, f64::max);
        text.push_str(&match worst <= 1e-9 {
            true => format!("exact on these cases: total variation at most {worst:.1e}\n"),
            false => format!("NOT exact: total variation up to {worst:.3e}\n"),
        });
        text
    }
}
