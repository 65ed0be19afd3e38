//! `scylla train`

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use clap::Args;

use super::{ModelOptions, print_json, print_text, say, with_download};
use crate::experiment::Override;
use crate::train::{Metrics, Report, Told, TrainExperiment, Trainer};
use crate::{Error, Result, Session};

#[derive(Args)]
pub(super) struct Train {
    /// Experiment file; several are trained side by side, on the same batches of one pass of the target
    #[arg(long, required = true)]
    config: Vec<PathBuf>,
    /// Folder for checkpoint, metrics and the best draft; of several experiments one folder each below it, by the file's name
    #[arg(long)]
    output: PathBuf,
    /// Override any field of the experiments; `stage.KEY` of every stage
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Go on from the checkpoint in the output folder, or begin where there is none
    #[arg(long)]
    resume: bool,
    /// Export and decode with the untrained draft, run one step, and say what the whole would take; nothing is kept
    #[arg(long)]
    dry_run: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelOptions,
}

/// A line for each step on a terminal, overwritten; elsewhere for some of them.
pub(super) struct Lines {
    terminal: bool,
    several: bool,
    said: std::time::Instant,
}

impl Lines {
    pub(super) fn new(several: bool) -> Self {
        Self {
            terminal: std::io::stderr().is_terminal(),
            several,
            said: std::time::Instant::now(),
        }
    }

    pub(super) fn told(&mut self, told: Told<'_>) {
        match told {
            Told::Note(note) => self.line(&note),
            Told::Data(documents, tokens) => self.data(documents, tokens),
            Told::Step(dir, metrics, total, left) => {
                let line = self.step(dir, metrics, total, left);
                let due = metrics.tau.is_some() || metrics.step == 1 || metrics.step == total;
                self.now(&line, due, 10);
            }
        }
    }

    /// What was read until now.
    pub(super) fn data(&mut self, documents: usize, tokens: u64) {
        let line = format!("reading: {documents} documents, {tokens} tokens");
        self.now(&line, false, 5);
    }

    /// A line that the next one takes the place of on a terminal; elsewhere it is said where it is due, or so many seconds
    /// after the last one.
    pub(super) fn now(&mut self, line: &str, due: bool, seconds: u64) {
        if due || (!self.terminal && self.said.elapsed().as_secs() >= seconds) {
            self.line(line);
        } else if self.terminal {
            self.over(line);
        }
    }

    fn step(&self, dir: &Path, m: &Metrics, total: u64, left: f64) -> String {
        let mut line = match self.several {
            true => format!(
                "{}: ",
                dir.file_name().unwrap_or_default().to_string_lossy()
            ),
            false => String::new(),
        };
        let accuracy: Vec<String> = m
            .steps
            .iter()
            .map(|s| format!("{:.2}", s.accuracy))
            .collect();
        line += &format!(
            "{} {}/{total}  loss {:.4}  accuracy {}",
            m.stage,
            m.step,
            m.loss,
            accuracy.join(" "),
        );
        // Metrics without times (`run.times`) have no speed.
        if let Some(times) = m.times {
            line += &format!("  {:.0} tokens/s", times.tokens_per_s);
        }
        line += &format!("  {} left", duration(left));
        if let Some(tau) = m.tau {
            line += &format!("  tau {:.3} simulated, {:.3} real", tau.simulated, tau.real);
        }
        line
    }

    /// A line that stays.
    pub(super) fn line(&mut self, line: &str) {
        if self.terminal {
            eprint!("\r\x1b[K");
        }
        say(line);
        self.said = std::time::Instant::now();
    }

    /// On a terminal; where it cannot be written to there is nobody to tell.
    fn over(&mut self, line: &str) {
        use std::io::Write;
        let cut: String = line.chars().take(150).collect();
        let mut err = std::io::stderr().lock();
        let _ = write!(err, "\r\x1b[K{cut}").and_then(|()| err.flush());
    }
}

/// Seconds as people say them.
pub(super) fn duration(seconds: f64) -> String {
    let s = seconds.max(0.0).round() as u64;
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {:02} s", s / 60, s % 60),
        _ => format!("{} h {:02} min", s / 3600, s / 60 % 60),
    }
}

impl Train {
    /// The experiments, each with its folder.
    fn experiments(&self) -> Result<Vec<(TrainExperiment, PathBuf)>> {
        let mut overrides = self.model.overrides();
        overrides.extend(Override::parse_all(&self.set)?);
        let mut found: Vec<(TrainExperiment, PathBuf)> = Vec::new();
        for path in &self.config {
            let experiment = TrainExperiment::load(path, &overrides)?;
            let dir = match self.config.len() {
                1 => self.output.clone(),
                _ => self.output.join(path.file_stem().unwrap_or_default()),
            };
            if found.iter().any(|(_, other)| *other == dir) {
                return Err(Error::Experiment(format!(
                    "two experiments would be written to {}: give their files different names",
                    dir.display()
                )));
            }
            found.push((experiment, dir));
        }
        Ok(found)
    }

    pub(super) fn run(self, stop: &AtomicBool) -> Result<()> {
        let experiments = self.experiments()?;
        let mut lines = Lines::new(experiments.len() > 1);
        let serving = experiments[0].0.serving();
        let mut session = with_download(|p| Session::open(&serving, p))?;
        session
            .notes
            .iter()
            .for_each(|note| say(&format!("note: {note}")));
        let mut trainer = Trainer::new(&mut session, &experiments, self.resume, stop, &mut |t| {
            lines.told(t)
        })?;
        lines.told(Told::Note(format!("products in {}", trainer.products())));
        let report = match self.dry_run {
            true => trainer.dry_run(stop, &mut |t| lines.told(t))?,
            false => trainer.run(stop, &mut |t| lines.told(t))?,
        };
        self.print(&report)
    }

    fn print(&self, report: &Report) -> Result<()> {
        if self.json {
            return match &report.runs[..] {
                [one] => print_json(one),
                _ => print_json(report),
            };
        }
        let mut text = String::new();
        for run in report.runs.iter().filter(|_| !self.dry_run) {
            text += &format!(
                "{} steps, {} tokens: loss {:.4}, tau {:.3} real ({:.3} simulated) at its best, behind step {}\n  --draft {}\n",
                run.steps,
                run.tokens,
                run.loss,
                run.tau.real,
                run.tau.simulated,
                run.best_step,
                run.draft
            );
            if (run.tau.real - run.tau.simulated).abs() > 1e-9 {
                text += "  the two differ: near ties of the target, where rows depend on their company (on a device), or a defect\n";
            }
        }
        print_text(&text)
    }
}
