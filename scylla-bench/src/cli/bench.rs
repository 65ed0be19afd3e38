//! `scylla bench`

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use clap::Args;

use super::{ModelOptions, Progress, print_json, print_text, with_download};
use crate::experiment::Experiment;
use crate::{Error, Registry, Result, Session, bench, table};

#[derive(Args)]
pub(super) struct Bench {
    /// Experiment file; without one, the default comparison runs
    experiment: Option<PathBuf>,
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
        overrides.extend(self.set);
        let experiment = Experiment::load(self.experiment.as_deref(), &overrides)?;
        let mut session = with_download(|p| Session::open(&experiment, p))?;
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
            print_text(&table::summary(&summary))?;
            eprintln!("results in {}", summary.output.display());
        }
        match summary.interrupted {
            true => Err(Error::Interrupted(format!(
                "; what was done is in {}",
                summary.output.display()
            ))),
            false => Ok(()),
        }
    }
}
