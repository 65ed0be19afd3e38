//! `scylla inspect tau`

use std::sync::atomic::AtomicBool;

use clap::Args;
use scylla_core::engine::Cycle;
use serde::Serialize;

use super::{ModelOptions, open_session, print_json, print_text};
use crate::experiment::{Experiment, Override};
use crate::train::{Tester, TrainExperiment};
use crate::{Error, Registry, Result};

#[derive(Args)]
pub(super) struct Tau {
    /// The draft's target: `default`, a directory, a GGUF file, or a hub id
    #[arg(long, default_value = "default")]
    target: String,
    /// Draft by name, with the directory of its weights behind a colon
    #[arg(long, value_name = "NAME[:DIR]")]
    draft: String,
    /// New tokens to decode, about: prompts are answered again and again, each time with other draws
    #[arg(long, default_value_t = 2000)]
    tokens: usize,
    /// Override any field of the experiment: sampling.temperature=1, budget.total=20, prompts.part=test
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelOptions,
}

/// A number with its standard error over answers.
#[derive(Debug, Clone, Copy, Serialize)]
struct Measured {
    tau: f64,
    error: f64,
    tokens: usize,
    cycles: usize,
}

impl Measured {
    /// Of a ratio of sums: tokens over cycles, by answers, which are independent.
    fn of(answers: &[Vec<Cycle>]) -> Self {
        let count = |cycles: &Vec<Cycle>| {
            let tokens: usize = cycles.iter().map(|c| c.committed).sum();
            (tokens as f64, cycles.len() as f64)
        };
        let each: Vec<(f64, f64)> = answers
            .iter()
            .filter(|c| !c.is_empty())
            .map(count)
            .collect();
        let (tokens, cycles) = each
            .iter()
            .fold((0.0, 0.0), |(a, b), (t, c)| (a + t, b + c));
        let tau = tokens / cycles;
        let n = each.len() as f64;
        let squares: f64 = each.iter().map(|(t, c)| (t - tau * c).powi(2)).sum();
        Self {
            tau,
            error: (squares * n / (n - 1.0)).sqrt() / cycles,
            tokens: tokens as usize,
            cycles: cycles as usize,
        }
    }
}

#[derive(Serialize)]
struct Report {
    simulated: Measured,
    real: Measured,
    /// Answers whose cycles are the same in both.
    same: usize,
    answers: usize,
}

impl Tau {
    pub(super) fn run(self, registry: &Registry, stop: &AtomicBool) -> Result<()> {
        let mut overrides = self.model.with(&self.target, &self.draft);
        overrides.push(Override::new("prompts.part", "dev"));
        overrides.extend(Override::parse_all(&self.set)?);
        let experiment = Experiment::from_overrides(&overrides)?;
        let mut session = open_session(&experiment)?;
        let mut composed = session.compose(registry, &experiment)?;
        let Some(draft) = &mut composed.draft else {
            return Err(Error::Experiment(
                "plain decoding proposes nothing: tau is 1".into(),
            ));
        };
        let checked = TrainExperiment::checking(&experiment);
        let mut tester = Tester::new(&mut session, &checked, stop)?;
        let (mut simulated, mut real) = (Vec::new(), Vec::new());
        let mut tokens = 0;
        for round in 0.. {
            if round > 0 || !experiment.sampling.is_greedy() {
                tester.sampled(
                    &mut session,
                    experiment.sampling.clone(),
                    experiment.run.seed + round,
                    stop,
                )?;
            }
            simulated.extend(tester.simulated(&mut session, draft, stop)?);
            // Decoding draws for itself: the same draws would say nothing.
            tester.reseed(experiment.run.seed + round + (1 << 32));
            real.extend(tester.real(&mut session, draft, stop)?);
            tokens += tester
                .answers
                .iter()
                .map(|a| a.text.len() - a.prompt)
                .sum::<usize>();
            if tokens >= self.tokens || experiment.sampling.is_greedy() {
                break;
            }
        }
        let pairs = simulated.iter().zip(&real);
        let bare = |c: &Cycle| (c.nodes, c.accepted, c.committed);
        let report = Report {
            same: pairs
                .filter(|(a, b)| a.iter().map(bare).eq(b.iter().map(bare)))
                .count(),
            answers: simulated.len(),
            simulated: Measured::of(&simulated),
            real: Measured::of(&real),
        };
        if self.json {
            return print_json(&report);
        }
        let line = |name: &str, m: Measured| {
            format!(
                "{name}: tau {:.4} (standard error {:.4}), {} tokens in {} cycles\n",
                m.tau, m.error, m.tokens, m.cycles
            )
        };
        print_text(&format!(
            "{}{}{} of {} answers have the same cycles in both\n",
            line("walked along the target's own answers", report.simulated),
            line("decoded with the draft", report.real),
            report.same,
            report.answers
        ))
    }
}
