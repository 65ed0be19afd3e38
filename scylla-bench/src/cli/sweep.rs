//! `scylla sweep`

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use clap::{Args, ValueEnum};
use scylla_core::files::{self, read_text};
use serde::Serialize;
use toml::Table;

use super::train::Lines;
use super::{ModelOptions, print_json, print_text, say, with_download};
use crate::experiment::Override;
use crate::sweep::{Axis, Failed, Plan, Summary, gather, script, sweep};
use crate::{Error, Result, Session};

/// Who runs the grid.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Executor {
    /// This program, one group of runs after the other.
    Local,
    /// Nobody yet: an array script is written.
    Slurm,
}

#[derive(Args)]
pub(super) struct Sweep {
    /// Experiment file of training that the grid varies
    #[arg(long, required_unless_present = "gather")]
    config: Option<PathBuf>,
    /// Fields and their values: draft.layers=1,2,4 data.tokens=1e6,4e6 (token budgets, which share a trunk)
    #[arg(long, value_name = "KEY=V,V,..", num_args = 1..)]
    grid: Vec<String>,
    /// Folder for the runs, one folder each
    #[arg(long, required_unless_present = "gather")]
    output: Option<PathBuf>,
    /// Seeds, each a run of its own
    #[arg(long, value_delimiter = ',', default_value = "0")]
    seeds: Vec<u64>,
    /// Share of a budget's steps in which the rate falls
    #[arg(long, default_value_t = 0.2)]
    cooldown: f64,
    /// Override any field of the experiment; `stage.KEY` of every stage
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Who runs it: slurm writes sweep.sh into the output folder, for sbatch
    #[arg(long, value_enum, default_value = "local")]
    executor: Executor,
    /// Run one setting of the grid only, all its budgets: what the tasks of an array are
    #[arg(long, value_name = "N", conflicts_with = "executor")]
    task: Option<usize>,
    /// Read a folder of results, gathered from any number of machines, as one sweep
    #[arg(long, value_name = "DIR", conflicts_with_all = ["config", "grid", "output", "task"])]
    gather: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelOptions,
}

#[derive(Serialize)]
struct Answer {
    runs: Vec<Summary>,
    skipped: usize,
    failed: Vec<Failed>,
    /// The array script, where one was written.
    script: Option<PathBuf>,
}

impl Sweep {
    pub(super) fn run(self, stop: &AtomicBool) -> Result<()> {
        if let Some(dir) = &self.gather {
            let runs = gather(dir)?;
            if runs.is_empty() {
                return Err(Error::file(dir, "holds no run of a sweep that is done"));
            }
            return self.print(Answer {
                runs,
                skipped: 0,
                failed: Vec::new(),
                script: None,
            });
        }
        let (Some(config), Some(output)) = (&self.config, &self.output) else {
            return Err(Error::Experiment("--config and --output are needed".into()));
        };
        let mut plan = self.plan(config)?;
        if let Some(task) = self.task {
            let count = plan.units.len();
            if task >= count {
                return Err(Error::Experiment(format!(
                    "--task {task}: the grid has {count} settings, from 0 on"
                )));
            }
            plan.units = vec![plan.units.swap_remove(task)];
        }
        std::fs::create_dir_all(output).map_err(Error::io(output))?;
        if self.executor == Executor::Slurm {
            return self.write_script(&plan, config, output);
        }
        let Some(first) = plan.runs().next() else {
            return Err(Error::Experiment("a grid of no runs".into()));
        };
        let serving = first.experiment.serving();
        let mut session = with_download(|p| Session::open(&serving, p))?;
        session
            .notes
            .iter()
            .for_each(|note| say(&format!("note: {note}")));
        let mut lines = Lines::new(true);
        let swept = sweep(&plan, output, &mut session, stop, &mut |t| lines.told(t))?;
        let failed = swept.failed.len();
        let left = plan.runs().count() - swept.runs.len();
        self.print(Answer {
            runs: swept.runs,
            skipped: swept.skipped,
            failed: swept.failed,
            script: None,
        })?;
        match failed {
            0 => Ok(()),
            _ => Err(Error::Experiment(format!(
                "{left} runs of the grid are not done; the reasons are above"
            ))),
        }
    }

    fn plan(&self, config: &Path) -> Result<Plan> {
        let table: Table = read_text(config)?
            .parse()
            .map_err(|e| Error::file(config, format!("not TOML: {e}")))?;
        let mut overrides = self.model.overrides();
        overrides.extend(Override::parse_all(&self.set)?);
        let grid: Vec<Axis> = self
            .grid
            .iter()
            .map(|text| Axis::parse(text))
            .collect::<Result<_>>()?;
        Plan::new(&table, &overrides, &grid, &self.seeds, self.cooldown)
    }

    fn write_script(&self, plan: &Plan, config: &Path, output: &Path) -> Result<()> {
        let program = std::env::current_exe().map_err(Error::io(Path::new("this program")))?;
        let path = |p: &Path| p.to_string_lossy().into_owned();
        let mut command = vec![
            path(&program),
            "sweep".into(),
            "--config".into(),
            path(config),
        ];
        if !self.grid.is_empty() {
            command.push("--grid".into());
            command.extend(self.grid.iter().cloned());
        }
        command.extend(["--output".into(), path(output)]);
        let seeds: Vec<String> = self.seeds.iter().map(u64::to_string).collect();
        command.extend(["--seeds".into(), seeds.join(",")]);
        command.extend(["--cooldown".into(), self.cooldown.to_string()]);
        for set in &self.set {
            command.extend(["--set".into(), set.clone()]);
        }
        let model = [
            ("--device", self.model.device.clone()),
            ("--threads", self.model.threads.map(|t| t.to_string())),
            ("--weights", self.model.weights.clone()),
        ];
        for (flag, value) in model {
            command.extend(
                value
                    .into_iter()
                    .flat_map(|value| [flag.to_string(), value]),
            );
        }
        let log = path(&output.join("slurm-%a.log"));
        let to = output.join("sweep.sh");
        files::write(&to, script(plan, &command, &log).as_bytes())?;
        say(&format!("sbatch {} runs the grid", to.display()));
        self.print(Answer {
            runs: Vec::new(),
            skipped: 0,
            failed: Vec::new(),
            script: Some(to),
        })
    }

    fn print(&self, answer: Answer) -> Result<()> {
        if self.json {
            return print_json(&answer);
        }
        let mut text = String::new();
        for s in &answer.runs {
            text += &format!(
                "{:<48} {:>7} D {:>2} {:>12} tokens  loss {:.4}  tau {:.3}\n",
                s.name, s.family, s.layers, s.tokens, s.loss, s.tau.real
            );
        }
        for f in &answer.failed {
            text += &format!("{:<48} failed: {}\n", f.name, f.reason);
        }
        if answer.skipped > 0 {
            text += &format!("{} of them were done before\n", answer.skipped);
        }
        print_text(&text)
    }
}
