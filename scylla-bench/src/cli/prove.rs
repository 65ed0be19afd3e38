//! `scylla prove`

use std::path::PathBuf;

use clap::Args;
use scylla_core::sampling::Sampling;
use serde::Serialize;

use super::{print_json, print_text};
use crate::prove::{Proposals, load};
use crate::{Registry, Result, experiment};

#[derive(Args)]
pub(super) struct Prove {
    /// Acceptance rule by name
    #[arg(long)]
    rule: String,
    /// File of cases: tables of p and q, and the trees to draw
    #[arg(long, value_name = "CASES.json")]
    case: PathBuf,
    /// Setting of the rule, or `proposal` (chain, deterministic-tree, rrs-without-replacement, specinfer)
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Answer {
    rule: String,
    cases: Vec<Found>,
}

#[derive(Serialize)]
struct Found {
    name: String,
    law: Vec<Outcome>,
    expected_committed: f64,
    tv_to_target: f64,
    branches: usize,
}

#[derive(Serialize)]
struct Outcome {
    tokens: Vec<u32>,
    prob: f64,
}

impl Prove {
    pub(super) fn run(self, registry: &Registry) -> Result<()> {
        let mut settings = toml::Table::new();
        for text in &self.set {
            experiment::set(&mut settings, text)?;
        }
        let proposals = match settings.remove("proposal") {
            Some(name) => name.as_str().unwrap_or_default().parse()?,
            None => Proposals::of_rule(&self.rule),
        };
        let sampling = Sampling {
            temperature: 1.0,
            ..Sampling::default()
        };
        let rule = registry.make_rule(&self.rule, &sampling, 1, settings)?;
        let mut cases = Vec::new();
        for case in load(&self.case)? {
            let proof = case.prove(rule.as_ref(), proposals)?;
            let outcome = |(tokens, prob)| Outcome { tokens, prob };
            cases.push(Found {
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
            "{:<28} {:>12} {:>14} {:>10}  {rule}\n",
            "case", "tokens/cycle", "tv to target", "branches"
        );
        for c in &cases {
            let (e, tv) = (c.expected_committed, c.tv_to_target);
            text.push_str(&format!(
                "{:<28} {e:>12.6} {tv:>14.3e} {:>10}\n",
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
}
