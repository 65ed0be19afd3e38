//! A step of distillation across tokenizers, the teacher's pass and the loss apart, beside the same in PyTorch.
//!
//! `SCYLLA_VOCABULARY=DIR cargo bench --bench distill [-- WORDS]` runs the losses whose titles hold all the words: the default model teaches a Llama of 4 layers of 256
//! with the tokenizer in DIR (`cargo xtask data vocabulary gpt2 DIR`), over this project's own documents. `SCYLLA_TORCH` names a Python that has torch:
//! `peers/pytorch/distill.py` then takes turns with it, step by step and with answers of the same lengths, in f32 and bf16, eager and compiled, each behind a step that is not
//! counted. `SCYLLA_THREADS` sets the threads of both, `SCYLLA_ROUNDS` (5) how often they take turns. Medians; ratios are medians of those step by step.

mod common;

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use common::torch::Peer;
use common::{asked_for, median};
use scylla_bench::distill::{DistillExperiment, Distiller, StepTimes, Told};
use scylla_bench::{Error, Registry, Result};
use scylla_core::kernels::keep_freed_memory;
use scylla_core::text::Tokenizer;
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

/// Seconds of a step and of its loss, and how often those of ours they are.
#[derive(Default)]
struct Found {
    form: String,
    times: Vec<[f64; 2]>,
    ratios: Vec<[f64; 2]>,
}

/// Of pairs, the median of one.
fn middle(of: &[[f64; 2]], which: usize) -> f64 {
    match of.is_empty() {
        true => f64::MAX,
        false => median(of.iter().map(|pair| pair[which]).collect()),
    }
}

/// This project's documents as texts, and one that is none of them to check on.
fn texts(dir: &Path) -> Result<[PathBuf; 2]> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let docs = root.join("docs");
    let mut all = String::new();
    let mut paths: Vec<PathBuf> = std::fs::read_dir(&docs)
        .map_err(Error::io(&docs))?
        .filter_map(|e| Some(e.ok()?.path()))
        .filter(|p| p.extension().is_some_and(|e| e == "md"))
        .collect();
    paths.sort();
    for path in paths {
        all += &std::fs::read_to_string(&path).map_err(Error::io(&path))?;
        all += "\n<|endoftext|>\n";
    }
    let text = dir.join("texts.txt");
    std::fs::write(&text, all).map_err(Error::io(&text))?;
    Ok([text, root.join("README.md")])
}

fn experiment(
    aligner: &str,
    vocabulary: &str,
    [texts, checked]: &[PathBuf; 2],
    steps: usize,
) -> Result<DistillExperiment> {
    let threads = std::env::var("SCYLLA_THREADS").unwrap_or("0".into());
    let table = format!(
        "student = {{ tokenizer = '{vocabulary}' }}\naligner = {aligner}\ndata = {{ files = ['{}'], part = 'all' }}\n\
         pairs = {{ bytes = 1024 }}\ntrain = {{ batch = {ANSWERS}, steps = {steps} }}\n\
         evaluate = {{ every = 0, count = 1, files = ['{}'] }}\nrun = {{ threads = {threads} }}",
        texts.display(),
        checked.display()
    );
    DistillExperiment::from_table(table.parse().expect("TOML"), &[])
}

/// Seconds of a whole step.
fn whole(times: &StepTimes) -> f64 {
    (times.teacher_ms + times.aligner_ms + times.student_ms) / 1e3
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
    let vocab = Tokenizer::from_dir(Path::new(&vocabulary))?.size();
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
        let lengths: Vec<Vec<[usize; 2]>> = (0..=rounds as u64)
            .map(|step| distiller.lengths(step))
            .collect();
        let mut told = |told: Told<'_>| {
            let Told::Step(step, ..) = told else { return };
            let (Some(times), true) = (step.times, step.step > 1) else {
                return;
            };
            own.push(times);
            let Some(peer) = &mut peer else { return };
            let side = |which: usize| -> Vec<usize> {
                let of = &lengths[step.step as usize - 1];
                of.iter().map(|pair| pair[which]).collect()
            };
            let best = others.iter().map(|f| middle(&f.ratios, 0));
            let best = best.fold(f64::MAX, f64::min);
            for ((form, compiled), found) in FORMS.into_iter().zip(&mut others) {
                // A form that was far behind twice, or does not run here, is not waited for again.
                let far = found.ratios.len() > 1 && middle(&found.ratios, 0) > 2.0 * best;
                if far || (own.len() > 1 && found.times.is_empty()) {
                    continue;
                }
                let said = peer.ask(&json!({
                    "loss": name, "form": form, "compile": compiled, "vocab": vocab, "student": side(0), "teacher": side(1)
                }));
                match (said["step"].as_f64(), said["loss"].as_f64()) {
                    (Some(step), Some(loss)) => {
                        let ours = [whole(&times), times.aligner_ms / 1e3];
                        found.times.push([step, loss]);
                        found.ratios.push([step / ours[0], loss / ours[1]]);
                    }
                    _ => println!("  PyTorch {}: {}", found.form, said["failed"]),
                }
            }
        };
        distiller.run(&AtomicBool::new(false), &mut told)?;
        let of = |part: fn(&StepTimes) -> f64| median(own.iter().map(part).collect());
        let (step, loss) = (of(whole), of(|t| t.aligner_ms) / 1e3);
        let tokens: usize = lengths.iter().flatten().map(|pair| pair[0]).sum();
        println!(
            "{title:<24} {ANSWERS} answers of {} tokens: step {:.0} ms, of it the teacher {:.0} ms, the loss {:.0} ms ({:.0} %)",
            tokens / (lengths.len() * ANSWERS),
            step * 1e3,
            of(|t| t.teacher_ms),
            loss * 1e3,
            100.0 * loss / step
        );
        for found in others.iter().filter(|f| !f.times.is_empty()) {
            println!(
                "    PyTorch {:<16} step {:.0} ms, {:.2} x; loss {:.0} ms, {:.2} x ({} steps)",
                found.form,
                middle(&found.times, 0) * 1e3,
                middle(&found.ratios, 0),
                middle(&found.times, 1) * 1e3,
                middle(&found.ratios, 1),
                found.times.len()
            );
        }
    }
    std::fs::remove_dir_all(&here).map_err(Error::io(&here))
}
