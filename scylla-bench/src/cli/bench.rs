//! `scylla bench`

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use clap::Args;

use super::{ModelOptions, Progress, open_session, print_json, print_text, say, warn};
use crate::experiment::{Experiment, Override, TraceKind};
use crate::{Error, Registry, Result, bench, terminal};

#[derive(Args)]
pub(super) struct Bench {
    /// Experiment file; without one, the default comparison runs
    experiment: Option<PathBuf>,
    /// Sequences side by side, one run for each: 1,2,4,8,16,32
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    batch: Vec<u64>,
    /// Conversations that begin in a second, at random times; without it another begins when one ends
    #[arg(long, value_name = "R", allow_negative_numbers = true)]
    rate: Option<f64>,
    /// `dense` also records what each draft could have proposed, at every place of the target's own text: `scylla replay`
    /// then tells what other budgets and trees would have done
    #[arg(long, value_enum, value_name = "KIND")]
    trace: Option<TraceKind>,
    /// Override any field of the experiment
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelOptions,
}

impl Bench {
    pub(super) fn run(self, registry: &Registry, stop: &AtomicBool) -> Result<()> {
        let mut overrides = self.model.overrides();
        if !self.batch.is_empty() {
            let batches: Vec<i64> = self.batch.iter().map(|&b| b.min(1 << 32) as i64).collect();
            overrides.push(Override::new("run.batches", batches));
        }
        overrides.extend(self.rate.map(|rate| Override::new("run.rate", rate)));
        let kind = self.trace.map(|kind| match kind {
            TraceKind::Dense => "dense",
            TraceKind::Light => "light",
        });
        overrides.extend(kind.map(|kind| Override::new("run.trace", kind)));
        overrides.extend(Override::parse_all(&self.set)?);
        let experiment = Experiment::load(self.experiment.as_deref(), &overrides)?;
        let mut session = open_session(&experiment)?;
        let mut progress = Progress::new("decoding", false);
        let summary = bench::run(
            registry,
            &experiment,
            &mut session,
            stop,
            &mut |done, total| {
                progress.set(done as u64, total as u64);
            },
        );
        progress.finish();
        let summary = summary?;
        if self.json {
            print_json(&summary)?;
        } else {
            print_text(&terminal::summary(&summary))?;
            if summary.unwritten.is_empty() {
                say(&format!("results in {}", summary.output.display()));
            }
        }
        for skipped in &summary.skipped {
            warn(&format!("left out: {skipped}"));
        }
        if !summary.unwritten.is_empty() {
            return Err(Error::Experiment(format!(
                "the summary above was not kept: {}",
                summary.unwritten.join("; ")
            )));
        }
        match summary.interrupted {
            true => Err(Error::Interrupted(format!(
                "; what was done is in {}",
                summary.output.display()
            ))),
            false if summary.rows.iter().all(|row| row.tokens == 0) => Err(Error::Experiment(
                "no prompt could be decoded; the reasons are above".into(),
            )),
            false => Ok(()),
        }
    }
}
