//! `scylla distill`

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use clap::Args;

use super::train::{Lines, duration};
use super::{ModelOptions, print_json, print_text, with_download};
use crate::distill::{AnswerScore, DistillExperiment, Distiller, Outcome, Scores, Step, Told};
use crate::experiment::Override;
use crate::{Environment, Registry, Result};

#[derive(Args)]
pub(super) struct Distill {
    /// Experiment file
    #[arg(long)]
    config: PathBuf,
    /// Folder for checkpoint, metrics and the best student
    #[arg(long, required_unless_present = "score", conflicts_with = "score")]
    output: Option<PathBuf>,
    /// Say what the student is worth as it is, and teach it nothing
    #[arg(long, conflicts_with = "resume")]
    score: bool,
    /// Override any field of the experiment
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Go on from the checkpoint in the output folder, or begin where there is none
    #[arg(long)]
    resume: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelOptions,
}

fn said(scores: &Scores) -> String {
    scores.said.map_or(String::new(), |said| {
        format!(
            ", {} answers with F1 {:.3} and Rouge-L {:.3}",
            said.count, said.f1, said.rouge_l
        )
    })
}

fn line(step: &Step, total: u64, left: f64) -> String {
    let parts: Vec<String> = step
        .parts
        .iter()
        .map(|(name, value)| format!("{name} {value:.4}"))
        .collect();
    let mut line = format!(
        "{}/{total}  loss {:.4} ({})  {:.0} tokens/s  {} left",
        step.step,
        step.loss,
        parts.join(", "),
        step.times.map_or(0.0, |t| t.tokens_per_s),
        duration(left)
    );
    if let Some(scores) = step.scores {
        line += &format!(
            "  {:.4} bits a byte, {:.3} of the teacher's next bytes{}",
            scores.bits_per_byte,
            scores.next_byte,
            said(&scores)
        );
    }
    line
}

impl Distill {
    pub(super) fn run(self, registry: &Registry, stop: &AtomicBool) -> Result<()> {
        let mut overrides = self.model.overrides_of("teacher");
        overrides.extend(Override::parse_all(&self.set)?);
        let experiment = DistillExperiment::load(&self.config, &overrides)?;
        let mut lines = Lines::new(false);
        let mut told = |told: Told<'_>| match told {
            Told::Note(note) => lines.line(&note),
            Told::Data(documents, tokens) => lines.data(documents, tokens),
            Told::Step(step, total, left) => {
                let due = step.scores.is_some() || step.step == 1;
                lines.now(&line(step, total, left), due, 10);
            }
        };
        let output = self.output.as_deref().map(|dir| (dir, self.resume));
        let mut distiller =
            with_download(|p| Distiller::new(registry, &experiment, output, p, &mut told))?;
        if self.score {
            let (scores, answers) = distiller.evaluate_each()?;
            return self.print_scores(&scores, &answers, &distiller.environment());
        }
        told(Told::Note(format!("products in {}", distiller.products())));
        let outcome = distiller.run(stop, &mut told)?;
        self.print(&outcome)
    }

    fn print_scores(
        &self,
        scores: &Scores,
        answers: &[AnswerScore],
        environment: &Environment,
    ) -> Result<()> {
        if self.json {
            let mut all = serde_json::to_value(scores)
                .map_err(|e| crate::Error::Experiment(e.to_string()))?;
            all["answers"] = serde_json::json!(answers);
            all["environment"] = serde_json::json!(environment);
            return print_json(&all);
        }
        print_text(&format!(
            "{:.4} bits a byte over {} bytes and {:.3} of the teacher's next bytes{}\n",
            scores.bits_per_byte,
            scores.bytes,
            scores.next_byte,
            said(scores)
        ))
    }

    fn print(&self, outcome: &Outcome) -> Result<()> {
        if self.json {
            return print_json(outcome);
        }
        let scores = outcome.scores;
        print_text(&format!(
            "{} steps, {} tokens: loss {:.4}; at its best, behind step {}, {:.4} bits a byte over {} bytes and {:.3} of the teacher's next bytes{}\n  --target {}\n",
            outcome.steps,
            outcome.tokens,
            outcome.loss,
            outcome.best_step,
            scores.bits_per_byte,
            scores.bytes,
            scores.next_byte,
            said(&scores),
            outcome.best.display()
        ))
    }
}
