//! `scylla inspect tau`

use std::sync::atomic::AtomicBool;

use clap::Args;
use scylla_core::engine::Cycle;
use scylla_core::plugin::DraftModel;
use serde::Serialize;

use super::{ModelOptions, open_session, print_json, print_text};
use crate::experiment::{Experiment, Override};
use crate::stats::alpha;
use crate::train::{PromptTau, Tester, TrainExperiment};
use crate::{Error, Registry, Result};

#[derive(Args)]
pub(super) struct Tau {
    /// The draft's target: `default`, a directory, a GGUF file, or a hub id
    #[arg(long, default_value = "default")]
    target: String,
    /// Draft by name, with the directory of its weights behind a colon; may be given again, all on the same answers
    #[arg(long, value_name = "NAME[:DIR]", required = true)]
    draft: Vec<String>,
    /// New tokens to decode, about: prompts are answered again and again, each time with other draws
    #[arg(long, default_value_t = 2000)]
    tokens: usize,
    /// Walk along the target's own answers only, without decoding: at temperature 0 on a CPU it is the same number
    #[arg(long)]
    walked: bool,
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

/// Output tokens that one value of [`Report::positions`] covers.
const STRETCH: usize = 32;

/// Tokens and cycles of those that begin in a stretch of the output.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
struct Stretch {
    /// Its first output token.
    from: usize,
    tokens: usize,
    cycles: usize,
}

/// What cycles commit, by where in the output they begin.
fn by_position(answers: &[Vec<Cycle>]) -> Vec<Stretch> {
    let mut all: Vec<Stretch> = Vec::new();
    for cycles in answers {
        let mut at = 0;
        for cycle in cycles {
            let stretch = at / STRETCH;
            while all.len() <= stretch {
                let from = all.len() * STRETCH;
                all.push(Stretch {
                    from,
                    ..Stretch::default()
                });
            }
            all[stretch].tokens += cycle.committed;
            all[stretch].cycles += 1;
            at += cycle.committed;
        }
    }
    all
}

/// What a draft is worth. Where it was only walked, `real` and `same` are missing, and the rest is of the walk; else of decoding.
#[derive(Serialize)]
struct Report {
    draft: String,
    simulated: Measured,
    #[serde(skip_serializing_if = "Option::is_none")]
    real: Option<Measured>,
    /// Answers whose cycles are the same in both.
    #[serde(skip_serializing_if = "Option::is_none")]
    same: Option<usize>,
    answers: usize,
    /// Acceptance by depth given the depth above.
    alpha: Vec<Option<f64>>,
    positions: Vec<Stretch>,
    /// Answer by answer, a prompt once for each time it was answered.
    prompts: Vec<PromptTau>,
}

/// A draft with the cycles of every answer until now.
struct Tested {
    name: String,
    model: Box<dyn DraftModel>,
    simulated: Vec<Vec<Cycle>>,
    real: Vec<Vec<Cycle>>,
}

impl Tested {
    fn report(self, ids: &[String]) -> Report {
        let decoded = !self.real.is_empty();
        let counted = if decoded { &self.real } else { &self.simulated };
        let bare = |c: &Cycle| (c.nodes, c.accepted, c.committed);
        let pairs = self.simulated.iter().zip(&self.real);
        let same = pairs.filter(|(a, b)| a.iter().map(bare).eq(b.iter().map(bare)));
        Report {
            simulated: Measured::of(&self.simulated),
            real: decoded.then(|| Measured::of(&self.real)),
            same: decoded.then(|| same.count()),
            answers: self.simulated.len(),
            alpha: alpha(counted.iter().flatten()),
            positions: by_position(counted),
            prompts: ids
                .iter()
                .zip(counted)
                .map(|(id, c)| PromptTau::of(id, c))
                .collect(),
            draft: self.name,
        }
    }
}

impl Tau {
    pub(super) fn run(self, registry: &Registry, stop: &AtomicBool) -> Result<()> {
        let experiment = |draft: &str| {
            let mut overrides = self.model.with(&self.target, draft);
            overrides.push(Override::new("prompts.part", "dev"));
            overrides.extend(Override::parse_all(&self.set)?);
            Experiment::from_overrides(&overrides)
        };
        let [first, ..] = &self.draft[..] else {
            return Err(Error::Experiment("--draft is needed".into()));
        };
        let shared = experiment(first)?;
        let mut session = open_session(&shared)?;
        let mut drafts = Vec::new();
        for name in &self.draft {
            let composed = session.compose(registry, &experiment(name)?)?;
            let model = composed.draft.ok_or_else(|| {
                Error::Experiment("plain decoding proposes nothing: tau is 1".into())
            })?;
            drafts.push(Tested {
                name: name.clone(),
                model,
                simulated: Vec::new(),
                real: Vec::new(),
            });
        }
        let checked = TrainExperiment::checking(&shared);
        let mut tester = Tester::new(&mut session, &checked, stop)?;
        let (mut ids, mut tokens) = (Vec::new(), 0);
        for round in 0.. {
            let seed = shared.run.seed + round;
            if round > 0 || !shared.sampling.is_greedy() {
                tester.sampled(&mut session, shared.sampling.clone(), seed, stop)?;
            }
            for draft in &mut drafts {
                tester.reseed(seed);
                let walked = tester.simulated(&mut session, &mut draft.model, stop)?;
                draft.simulated.extend(walked);
                if !self.walked {
                    // Decoding draws for itself: the same draws would say nothing.
                    tester.reseed(seed + (1 << 32));
                    let decoded = tester.real(&mut session, &mut draft.model, stop)?;
                    draft.real.extend(decoded);
                }
            }
            for answer in &tester.answers {
                ids.push(answer.id.clone());
                tokens += answer.text.len() - answer.prompt;
            }
            if tokens >= self.tokens || shared.sampling.is_greedy() {
                break;
            }
        }
        let reports: Vec<Report> = drafts.into_iter().map(|d| d.report(&ids)).collect();
        if self.json {
            return match &reports[..] {
                [one] => print_json(one),
                all => print_json(&serde_json::json!({ "drafts": all })),
            };
        }
        let line = |name: &str, m: Measured| {
            format!(
                "{name}: tau {:.4} (standard error {:.4}), {} tokens in {} cycles\n",
                m.tau, m.error, m.tokens, m.cycles
            )
        };
        let mut text = String::new();
        for report in &reports {
            if reports.len() > 1 {
                text += &format!("{}\n", report.draft);
            }
            text += &line("walked along the target's own answers", report.simulated);
            if let (Some(real), Some(same)) = (report.real, report.same) {
                text += &line("decoded with the draft", real);
                text += &format!(
                    "{same} of {} answers have the same cycles in both\n",
                    report.answers
                );
            }
        }
        print_text(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cycle(committed: usize) -> Cycle {
        Cycle {
            step: 0,
            nodes: committed,
            depth: committed,
            accepted: committed - 1,
            committed,
            ranks: Vec::new(),
            offered: Vec::new(),
            cut: false,
        }
    }

    #[test]
    fn cycles_count_where_they_begin() {
        let first: Vec<Cycle> = [30, 1, 4, 2].map(cycle).into();
        let second: Vec<Cycle> = [32, 40].map(cycle).into();
        let of = |from, tokens, cycles| Stretch {
            from,
            tokens,
            cycles,
        };
        // 30 begins at 0, 1 at 30, 4 at 31, 2 at 35; 32 at 0, 40 at 32.
        assert_eq!(by_position(&[first, second]), [of(0, 67, 4), of(32, 42, 2)]);
        assert_eq!(by_position(&[]), []);
    }
}
