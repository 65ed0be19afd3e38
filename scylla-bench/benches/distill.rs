//! A step of distillation across tokenizers, the teacher's pass and the loss apart, beside the same in PyTorch.
//!
//! `SCYLLA_VOCABULARY=DIR cargo bench --bench distill [-- WORDS]` runs the losses whose titles hold all the words: the default model teaches a Llama of 4 layers of 256
//! with the tokenizer in DIR (`cargo xtask data vocabulary gpt2 DIR`), over this project's own documents. `SCYLLA_TORCH` names a Python that has torch:
//! `peers/pytorch/distill.py` then takes turns with it, step by step, in f32 and bf16, eager and compiled, with as many answers of the step's mean length, which need no
//! padding there, and is held against at its best. `SCYLLA_THREADS` sets the threads of both, `SCYLLA_ROUNDS` (5) how often they take turns. Medians.

mod common;

use std::path::Path;
use std::sync::atomic::AtomicBool;

use common::torch::Peer;
use common::{asked_for, median};
use scylla_bench::distill::{DistillExperiment, Distiller, StepTimes, Told};
use scylla_bench::{Error, Registry, Result};
use scylla_core::kernels::keep_freed_memory;
use serde_json::json;

/// Title, the peer's name for the loss, and the aligner.
const CASES: [(&str, &str, &str); 3] = [
    (
        "MultiLevelOT, released",
        "released",
        "{ name = 'multilevel-ot', mode = 'reference-code' }",
    ),
    (
        "MultiLevelOT, published",
        "published",
        "{ name = 'multilevel-ot' }",
    ),
    ("ULD", "uld", "{ name = 'uld' }"),
];
/// What the peer is tried in.
const FORMS: [(&str, bool); 4] = [
    ("f32", false),
    ("f32", true),
    ("bf16", false),
    ("bf16", true),
];
const ANSWERS: usize = 8;

/// Seconds of a step, of its loss, and how they were had.
#[derive(Default)]
struct Found {
    form: String,
    step: Vec<f64>,
    loss: Vec<f64>,
}

impl Found {
    fn median(&self) -> f64 {
        match self.step.is_empty() {
            true => f64::MAX,
            false => median(self.step.clone()),
        }
    }
}

/// This project's documents as texts.
fn texts(dir: &Path) -> Result<std::path::PathBuf> {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs");
    let mut all = String::new();
    let mut paths: Vec<_> = std::fs::read_dir(&docs)
        .map_err(Error::io(&docs))?
        .filter_map(|e| Some(e.ok()?.path()))
        .filter(|p| p.extension().is_some_and(|e| e == "md"))
        .collect();
    paths.sort();
    for path in paths {
        all += &std::fs::read_to_string(&path).map_err(Error::io(&path))?;
        all += "\n<|endoftext|>\n";
    }
    let path = dir.join("texts.txt");
    std::fs::write(&path, all).map_err(Error::io(&path))?;
    Ok(path)
}

fn experiment(
    aligner: &str,
    vocabulary: &str,
    texts: &Path,
    steps: usize,
) -> Result<DistillExperiment> {
    let threads = std::env::var("SCYLLA_THREADS").unwrap_or("0".into());
    let table = format!(
        "student = {{ tokenizer = '{vocabulary}' }}\naligner = {aligner}\ndata = {{ files = ['{}'] }}\n\
         pairs = {{ bytes = 1024 }}\ntrain = {{ batch = {ANSWERS}, steps = {steps} }}\nevaluate = {{ every = 0, count = 1 }}\n\
         run = {{ threads = {threads} }}",
        texts.display()
    );
    DistillExperiment::from_table(table.parse().expect("TOML"), &[])
}

fn main() -> Result<()> {
    let Some(vocabulary) = std::env::var("SCYLLA_VOCABULARY").ok() else {
        println!("SCYLLA_VOCABULARY names no folder with a tokenizer: nothing is measured");
        return Ok(());
    };
    let rounds: usize = std::env::var("SCYLLA_ROUNDS")
        .ok()
        .and_then(|r| r.parse().ok())
        .unwrap_or(5);
    keep_freed_memory();
    let here = std::env::temp_dir().join(format!("scylla-distill-{}", std::process::id()));
    std::fs::create_dir_all(&here).map_err(Error::io(&here))?;
    let texts = texts(&here)?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = std::env::var("SCYLLA_THREADS").ok();
    let threads = threads.and_then(|t| t.parse().ok()).unwrap_or(cores);
    let mut peer = Peer::start("distill.py", threads);
    for (title, name, aligner) in CASES.into_iter().filter(|(title, ..)| asked_for(title)) {
        // The first step warms up.
        let experiment = experiment(aligner, &vocabulary, &texts, rounds + 1)?;
        let out = here.join(name);
        let registry = Registry::default();
        let mut distiller = Distiller::new(
            &registry,
            &experiment,
            Some((&out, false)),
            &mut |_| {},
            &mut |_| {},
        )?;
        let mut own: Vec<StepTimes> = Vec::new();
        let mut others: Vec<Found> = FORMS
            .iter()
            .map(|(form, compiled)| Found {
                form: format!("{form}{}", if *compiled { ", compiled" } else { "" }),
                ..Found::default()
            })
            .collect();
        let (mut tokens, mut before) = (0, 0);
        let mut told = |told: Told<'_>| {
            let Told::Step(step, ..) = told else { return };
            tokens = (step.tokens - before) as usize / ANSWERS;
            before = step.tokens;
            if step.step == 1 {
                return;
            }
            own.extend(step.times);
            let Some(peer) = &mut peer else { return };
            let best = others.iter().map(Found::median).fold(f64::MAX, f64::min);
            for ((form, compiled), found) in FORMS.into_iter().zip(&mut others) {
                // A form that was far behind twice, or does not run here, is not waited for again.
                let far = found.step.len() > 1 && found.median() > 2.0 * best;
                if far || (own.len() > 1 && found.step.is_empty()) {
                    continue;
                }
                let lengths = vec![tokens; ANSWERS];
                let said = peer.ask(&json!({
                    "loss": name, "form": form, "compile": compiled, "teacher": lengths, "student": lengths
                }));
                match (said["step"].as_f64(), said["loss"].as_f64()) {
                    (Some(step), Some(loss)) => {
                        found.step.push(step);
                        found.loss.push(loss);
                    }
                    _ => println!("  PyTorch {}: {}", found.form, said["failed"]),
                }
            }
        };
        distiller.run(&AtomicBool::new(false), &mut told)?;
        let of = |part: fn(&StepTimes) -> f64| median(own.iter().map(part).collect()) / 1e3;
        let loss = of(|t| t.aligner_ms);
        let step = of(|t| t.teacher_ms + t.aligner_ms + t.student_ms);
        println!(
            "{title:<24} {ANSWERS} answers of {tokens} tokens: step {:.0} ms, of it the teacher {:.0} ms, the loss {:.0} ms ({:.0} %)",
            step * 1e3,
            of(|t| t.teacher_ms) * 1e3,
            loss * 1e3,
            100.0 * loss / step
        );
        for found in others.iter().filter(|f| !f.step.is_empty()) {
            let (their_step, their_loss) = (found.median(), median(found.loss.clone()));
            println!(
                "    PyTorch {:<16} step {:.0} ms, {:.2} x; loss {:.0} ms, {:.2} x",
                found.form,
                their_step * 1e3,
                their_step / step,
                their_loss * 1e3,
                their_loss / loss
            );
        }
    }
    std::fs::remove_dir_all(&here).map_err(Error::io(&here))
}
