//! `scylla prove`

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;
use scylla_core::plugin::Verifier;
use scylla_core::sampling::Sampling;
use serde::Serialize;

use super::{ModelOptions, Progress, print_json, print_text, with_download};
use crate::chi_square::{Found, Setup};
use crate::experiment::Experiment;
use crate::prove::{Proposals, load};
use crate::{Error, Registry, Result, Session, experiment};

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
    /// Mean over --cycles cycles.
    #[serde(skip_serializing_if = "Option::is_none")]
    measured_committed: Option<f64>,
}

#[derive(Serialize)]
struct Outcome {
    tokens: Vec<u32>,
    prob: f64,
}

impl Prove {
    pub(super) fn run(self, registry: &Registry, stop: &AtomicBool) -> Result<()> {
        let mut settings = toml::Table::new();
        for text in &self.set {
            experiment::set(&mut settings, text)?;
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
        let mut cases = Vec::new();
        let path = self.case.unwrap_or_default();
        for case in load(&path)? {
            if stop.load(Ordering::Relaxed) {
                return Err(Error::Interrupted(format!(" before case `{}`", case.name)));
            }
            let proof = case.prove(rule.as_ref(), proposals)?;
            let measure = |cycles| case.measure(rule.as_ref(), proposals, cycles, self.seed);
            let measured_committed = match self.cycles {
                Some(0) => {
                    return Err(Error::Experiment("--cycles must be at least 1".into()));
                }
                cycles => cycles.map(measure).transpose()?,
            };
            let outcome = |(tokens, prob)| Outcome { tokens, prob };
            cases.push(Proved {
                measured_committed,
                name: case.name,
                expected_committed: proof.expected_committed,
                tv_to_target: proof.tv_to_target,
                branches: proof.branches,
                law: proof.law.into_iter().map(outcome).collect(),
            });
        }
        let rule = rule.name().to_string();
        if self.json {
            return print_json(&Answer { rule, cases });
        }
        let mut text = format!(
            "{:<28} {:>12} {:>12} {:>14} {:>10}  {rule}\n",
            "case", "tokens/cycle", "measured", "tv to target", "branches"
        );
        for c in &cases {
            let (e, tv) = (c.expected_committed, c.tv_to_target);
            let measured = c.measured_committed;
            let measured = measured.map_or("-".into(), |m| format!("{m:.4}"));
            text.push_str(&format!(
                "{:<28} {e:>12.6} {measured:>12} {tv:>14.3e} {:>10}\n",
                c.name, c.branches
            ));
        }
        let worst = cases.iter().map(|c| c.tv_to_target).fold(0.0, f64::max);
        text.push_str(&match worst <= 1e-9 {
            true => format!("exact on these cases: total variation at most {worst:.1e}\n"),
            false => format!("NOT exact: total variation up to {worst:.3e}\n"),
        });
        print_text(&text)
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
        overrides.push(format!("target.model={target:?}"));
        let experiment = Experiment::from_overrides(&overrides)?;
        let mut session = with_download(|p| Session::open(&experiment, p))?;
        let known = session.tokenizer()?.size();
        let prefixes: Vec<String> = match self.prefix.is_empty() {
            true => PREFIXES.map(String::from).to_vec(),
            false => self.prefix.clone(),
        };
        let total = (cycles * prefixes.len()) as u64;
        let mut progress = Progress::new("proving", false);
        let mut tests = Vec::new();
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
            let found = setup.test(rule, proposals, cycles, self.seed, &mut on_cycle)?;
            tests.push(OnPrefix { prefix, found });
        }
        progress.finish();
        let answer = OnModel {
            target: session.environment.target_hash.clone(),
            temperature: self.temperature,
            top_p: self.top_p,
            tests,
        };
        if self.json {
            return print_json(&answer);
        }
        let mut text = String::new();
        for test in &answer.tests {
            let f = &test.found;
            text.push_str(&format!(
                "{:<24} {} cycles, tau {:.4}, chi-square {:.1} with {} degrees, p = {:.4}  {:?}\n",
                f.rule, f.cycles, f.tau, f.chi_square, f.degrees, f.p_value, test.prefix
            ));
        }
        print_text(&text)
    }
}
