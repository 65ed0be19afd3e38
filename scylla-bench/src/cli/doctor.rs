//! `scylla doctor`

use std::sync::atomic::AtomicBool;

use clap::Args;

use super::{ModelOptions, open_session, print_json, print_text, say};
use crate::doctor::{BUDGET, Report, doctor};
use crate::experiment::{Experiment, Override};
use crate::{Registry, Result};

#[derive(Args)]
pub(super) struct Doctor {
    /// The draft's target: `default`, a directory, a GGUF file, or a hub id
    #[arg(long, default_value = "default")]
    target: String,
    /// The draft: eagle2, eagle3, hass or scylla, with the directory of its weights behind a colon
    #[arg(long, value_name = "NAME:DIR")]
    draft: String,
    /// Override any field of the experiment: budget.total=60, prompts.set=mine.jsonl, run.max_new_tokens=128
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelOptions,
}

impl Doctor {
    pub(super) fn run(self, registry: &Registry, stop: &AtomicBool) -> Result<()> {
        let mut overrides = self.model.with(&self.target, &self.draft);
        overrides.push(Override::new("prompts.part", "dev"));
        overrides.push(Override::new("prompts.per_task", 2));
        overrides.push(Override::new("run.max_new_tokens", 64));
        for (key, value) in [
            ("total", BUDGET.total),
            ("width", BUDGET.width),
            ("depth", BUDGET.depth),
        ] {
            overrides.push(Override::number(&format!("budget.{key}"), value as u64));
        }
        overrides.extend(Override::parse_all(&self.set)?);
        let experiment = Experiment::from_overrides(&overrides)?;
        let mut session = open_session(&experiment)?;
        let report = doctor(registry, &experiment, &mut session, stop, &mut |what| {
            say(what)
        })?;
        match self.json {
            true => print_json(&report),
            false => print_text(&text(&report)),
        }
    }
}

/// The report in words.
fn text(report: &Report) -> String {
    let mut text = match &report.refused {
        Some(reason) => format!("the draft cannot be read as given: {reason}\n"),
        None => format!(
            "tau {:.3} as given, on {} prompts and {} tokens\n",
            report.tau, report.prompts, report.tokens
        ),
    };
    text += &format!(
        "of others on the same prompts: untrained {:.3}, random tokens {:.3}, n-gram {:.3}\nverdict: {}\n",
        report.scale.untrained, report.scale.random, report.scale.ngram, report.verdict
    );
    for f in &report.findings {
        let undone = match (f.tau_if_undone, f.gain) {
            (Some(tau), Some((gain, error))) => {
                format!("tau {tau:.3} instead ({gain:+.3} a place, standard error {error:.3})")
            }
            _ if f.check.starts_with("files") => match f.suspect {
                true => "differs".into(),
                false => "as it should be, or not known".into(),
            },
            _ => "cannot be read so".into(),
        };
        text += &format!(
            "  {:<22} found: {}\n  {:<22} instead: {}\n  {:<22} {undone}\n",
            f.check, f.found, "", f.expected, ""
        );
    }
    text
}
