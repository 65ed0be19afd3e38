//! A training step of each recipe on SmolLM2's shapes, its target's pass apart, beside the same in PyTorch.
//!
//! `cargo bench --bench train [-- WORDS]` runs the recipes and forms whose titles hold all the words. `SCYLLA_TORCH` names a Python that has torch:
//! `peers/pytorch/train.py` then takes turns with it, in f32 and bf16, eager and compiled, and is held against at its best.
//! `SCYLLA_THREADS` sets the threads of both, `SCYLLA_ROUNDS` (5) how often they take turns. Batches are 4 lines of 512 rows;
//! medians, and the multiply-adds of the draft's part as a share of what the processor does on registers.

mod common;

use common::torch::Peer;
use common::{asked_for, median, seconds};
use scylla_bench::data::packing::Lines;
use scylla_bench::train::{Learner, Taught, TrainExperiment, compute, teach};
use scylla_bench::{Result, Session};
use scylla_core::kernels::{Operand, ProductForm, keep_freed_memory, multiply_adds};
use scylla_core::train::graph::PackedRows;
use scylla_draft::recipe::TrainHost;
use serde_json::json;

const LINES: usize = 4;
const LENGTH: usize = 512;
const ROWS: usize = LINES * LENGTH;

/// Title, the peer's name for it, and the experiment.
const CASES: [(&str, &str, &str); 4] = [
    (
        "EAGLE-2, D = 1",
        "eagle2-1",
        "draft = { name = 'eagle2' }\nloss = { noise = 0.0 }",
    ),
    (
        "Scylla, D = 2",
        "scylla-2",
        "draft = { name = 'scylla', layers = 2 }\nloss = { noise = 0.0 }",
    ),
    (
        "Scylla, D = 4",
        "scylla-4",
        "draft = { name = 'scylla', layers = 4 }\nloss = { noise = 0.0 }",
    ),
    (
        "EAGLE-3, 3 steps",
        "eagle3-3",
        "draft = { name = 'eagle3', vocab = 8192 }\nloss = { unroll = 3, normalise = 'mask' }",
    ),
];

fn experiment(of: &str) -> TrainExperiment {
    let stage = "[[stage]]\nname = 'train'\nsteps = 10\ndata = { files = ['-'] }";
    let threads = std::env::var("SCYLLA_THREADS").unwrap_or("0".into());
    let table = format!("{of}\nrun = {{ threads = {threads} }}\n{stage}").parse();
    TrainExperiment::from_table(table.expect("TOML"), &[]).expect("an experiment")
}

/// Text that no document would hold, whose rows all count.
fn lines() -> Lines {
    let token = |i: usize| ((i * 7919 + i * i % 104_729) % 49_000) as u32;
    Lines {
        rows: PackedRows::lines(LINES, LENGTH).expect("rows"),
        tokens: (0..ROWS).map(token).collect(),
        mask: vec![true; ROWS],
        of: (0..LINES).collect(),
        from: vec![0; LINES],
    }
}

/// Multiply-adds of the draft's part: three products of each weight a row and step, of frozen heads two, and the teacher's.
fn work(learner: &Learner, case: &str, vocab: usize, hidden: usize) -> f64 {
    let weights: usize = learner
        .parameters
        .iter()
        .filter(|(n, _)| n.as_str() != "lm_head.weight")
        .map(|(_, m)| m.rows() * m.columns)
        .sum();
    let head = learner
        .parameters
        .get("lm_head.weight")
        .map_or(0, |m| m.rows() * m.columns);
    let steps = if case.starts_with("eagle3") { 3 } else { 1 };
    let frozen = if head == 0 { 3 } else { 1 };
    (ROWS * (steps * 3 * (weights + head) + frozen * vocab * hidden)) as f64
}

fn main() -> Result<()> {
    let rounds: usize = std::env::var("SCYLLA_ROUNDS")
        .ok()
        .and_then(|r| r.parse().ok())
        .unwrap_or(5);
    keep_freed_memory();
    let first = experiment(CASES[0].2);
    let mut session = Session::open(&first.serving(), &mut |_| {})?;
    let threads = session.options.thread_count();
    let mut peer = Peer::start("train.py", threads);
    let pool = std::sync::Arc::clone(session.target.executor.pool().expect("kernels"));
    println!("{threads} threads, batches of {ROWS} rows; medians of {rounds} rounds of 3 steps");
    for (title, case, of) in CASES {
        let experiment = experiment(of);
        for form in [ProductForm::F32, ProductForm::fastest()] {
            let on = compute(&session, Some(form))?;
            if !asked_for(&format!("{title}, {}", on.name())) {
                continue;
            }
            let host = TrainHost::new(&on, &session.target.tokens)?;
            let ids = case.starts_with("eagle3").then(|| (0..8192).collect());
            let mut learner = Learner::begin(&experiment, &session, &host, ids)?;
            let taps = learner.taps();
            learner.fed_by(&taps)?;
            let (mut target, mut draft, mut peaks) = (Vec::new(), Vec::new(), Vec::new());
            let mut others: Vec<(String, Vec<f64>, Vec<f64>)> = Vec::new();
            for round in 0..=rounds {
                for _ in 0..3 {
                    let mut taught: Option<Taught> = None;
                    let pass = seconds(|| {
                        taught =
                            Some(teach(&mut session.target.model, lines(), &taps).expect("target"))
                    });
                    let step = seconds(|| {
                        let (_, grads) = learner
                            .learn(taught.as_ref().expect("taught"), 0)
                            .expect("loss");
                        learner
                            .step(&experiment.stage[0].optimizer, 1e-4, &grads)
                            .expect("step");
                    });
                    // The first round warms up.
                    if round > 0 {
                        target.push(pass);
                        draft.push(step);
                        let operand = if form == ProductForm::F32 {
                            Operand::F32
                        } else {
                            Operand::Bf16
                        };
                        peaks.push(multiply_adds(&pool, operand));
                    }
                }
                let forms = [
                    ("f32", false),
                    ("f32", true),
                    ("bf16", false),
                    ("bf16", true),
                ];
                for (i, (peer_form, compiled)) in forms.into_iter().enumerate() {
                    let Some(peer) = &mut peer else { break };
                    // A form that was far behind twice is not waited for again.
                    let best = others
                        .iter()
                        .map(|(_, d, _)| median(d.clone()))
                        .fold(f64::MAX, f64::min);
                    if round > 1
                        && others
                            .get(i)
                            .is_some_and(|(_, d, _)| median(d.clone()) > 2.0 * best)
                    {
                        continue;
                    }
                    let found = peer.ask(&json!({
                        "case": case, "form": peer_form, "compile": compiled, "steps": 3
                    }));
                    if others.len() <= i {
                        let name =
                            format!("{peer_form}{}", if compiled { ", compiled" } else { "" });
                        others.push((name, Vec::new(), Vec::new()));
                    }
                    match (found["draft"].as_f64(), found["target"].as_f64()) {
                        (Some(draft), Some(target)) => {
                            others[i].1.push(draft);
                            others[i].2.push(target);
                        }
                        _ => {
                            if round == 0 {
                                println!("  PyTorch {}: {}", others[i].0, found["failed"]);
                            }
                            others[i].1.push(f64::MAX);
                            others[i].2.push(f64::MAX);
                        }
                    }
                }
            }
            let (d, t) = (median(draft), median(target));
            let rate = |s: f64| ROWS as f64 / s;
            let share = work(
                &learner,
                case,
                session.target.config.vocab,
                session.target.config.hidden,
            ) / d
                / median(peaks);
            print!(
                "{title:<18}{:<24} draft {:>6.0} tokens/s ({:.2} of {}), whole {:>6.0} tokens/s (target {:.0} ms, draft {:.0} ms)",
                on.name(),
                rate(d),
                share,
                if form == ProductForm::F32 {
                    "f32 peak"
                } else {
                    "AVX-512 bf16 peak"
                },
                rate(d + t),
                t * 1e3,
                d * 1e3
            );
            let of = |times: &[f64]| median(times.to_vec());
            let best = others.iter().min_by(|a, b| of(&a.1).total_cmp(&of(&b.1)));
            let whole = others
                .iter()
                .map(|o| of(&o.1) + of(&o.2))
                .fold(f64::MAX, f64::min);
            if let Some((name, times, _)) = best {
                print!(
                    "; PyTorch {name}: draft {:.0} tokens/s, {:.2} x; whole {:.0} tokens/s, {:.2} x",
                    rate(of(times)),
                    of(times) / d,
                    rate(whole),
                    whole / (d + t)
                );
            }
            println!();
            for (name, draft, target) in &others {
                println!(
                    "    PyTorch {name:<16} draft {:.0} ms, target {:.0} ms",
                    of(draft) * 1e3,
                    of(target) * 1e3
                );
            }
            if form == ProductForm::fastest() {
                break;
            }
        }
    }
    Ok(())
}
