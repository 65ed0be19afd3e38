//! Cost of alignment losses with their gradients, one thread: 512 tokens, vocabularies of 152,064 and 49,152, k = 50, f32.
//!
//! `cargo bench -p scylla-bench --bench align [WORDS]`. The limit is the time in which one thread reads both tensors of
//! logits four times, measured in turn with the losses. `benches/align_torch.py` does the same work with PyTorch.

#[path = "common/mod.rs"]
mod common;

use std::hint::black_box;

use candle_core::{DType, Device, Tensor, Var};
use common::{asked_for, median, seconds};
use multilevel_ot::{Matching, MultiLevelOt, Uld};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use scylla_core::train::{AlignContext, Aligner, AnswerLogits};

const TEACHER: usize = 152_064;
const STUDENT: usize = 49_152;
const TOKENS: usize = 512;
const ROUNDS: usize = 7;

/// Logits as a language model's: the log of a power law over shuffled tokens, with noise at each position.
fn logits(tokens: usize, vocab: usize, seed: u64) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut base: Vec<f32> = (1..=vocab).map(|r| -1.2 * (r as f32).ln()).collect();
    base.shuffle(&mut rng);
    let mut noise = || (0..3).map(|_| rng.random::<f32>()).sum::<f32>() * 2.0 - 3.0;
    let rows = (0..=tokens).flat_map(|_| base.clone());
    rows.map(|b| b + 1.5 * noise()).collect()
}

fn answers(tokens: usize, vocab: usize, seed: u64) -> AnswerLogits {
    // One row more than there are tokens: the last predicts nothing.
    let seq = tokens + 1;
    let logits = Tensor::from_vec(logits(tokens, vocab, seed), (1, seq, vocab), &Device::Cpu);
    let mut labels = vec![-100i64];
    labels.extend((0..tokens as i64).map(|i| i * 7919 % vocab as i64));
    AnswerLogits {
        logits: logits.expect("logits"),
        labels: Tensor::from_vec(labels, (1, seq), &Device::Cpu).expect("labels"),
        vocab,
        tokens: None,
        offsets: None,
        hidden: None,
    }
}

fn read(answers: &AnswerLogits) -> f32 {
    let (storage, _) = answers.logits.storage_and_layout();
    let candle_core::Storage::Cpu(storage) = &*storage else {
        return 0.0;
    };
    let values = storage.as_slice::<f32>().expect("f32");
    let mut lanes = [0u32; 64];
    for chunk in values.as_chunks::<64>().0 {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane ^= v.to_bits();
        }
    }
    f32::from_bits(lanes.iter().fold(0, |a, b| a ^ b))
}

struct Case {
    teacher: AnswerLogits,
    student: AnswerLogits,
    logits: Var,
}

impl Case {
    fn new(tokens: usize, teacher: usize, student: usize) -> Self {
        let mut answers_of_student = answers(tokens, student, 2);
        let logits = Var::from_tensor(&answers_of_student.logits).expect("variable");
        answers_of_student.logits = logits.as_tensor().clone();
        Self {
            teacher: answers(tokens, teacher, 1),
            student: answers_of_student,
            logits,
        }
    }

    fn step(&self, aligner: &dyn Aligner) {
        let loss = aligner.loss(&self.teacher, &self.student, &AlignContext::default());
        let gradient = loss.expect("loss").gradient.expect("a gradient");
        assert_eq!(gradient.dtype(), DType::F32);
        black_box(gradient);
    }

    fn backward(&self, aligner: &dyn Aligner) {
        let loss = aligner.loss(&self.teacher, &self.student, &AlignContext::default());
        let gradients = loss.expect("loss").total.backward().expect("backward");
        black_box(gradients.get(&self.logits).expect("of the logits"));
    }

    fn read_four_times(&self) {
        for _ in 0..4 {
            black_box(read(&self.teacher) + read(&self.student));
        }
    }
}

fn main() {
    let aligners: Vec<(&str, Box<dyn Aligner>)> = vec![
        ("multilevel-ot", Box::new(MultiLevelOt::paper())),
        (
            "multilevel-ot assignment",
            Box::new(MultiLevelOt {
                matching: Matching::Assignment,
                ..MultiLevelOt::paper()
            }),
        ),
        (
            "multilevel-ot reference-code",
            Box::new(MultiLevelOt::reference_code()),
        ),
        ("uld", Box::new(Uld::default())),
    ];
    let asked: Vec<_> = aligners.iter().filter(|(n, _)| asked_for(n)).collect();
    println!(
        "{TOKENS} tokens, {TEACHER} x {STUDENT}: milliseconds with gradient, and times the reading of both four times; then \
         what a value costs with half the tokens, and with half the vocabularies"
    );
    let case = Case::new(TOKENS, TEACHER, STUDENT);
    let halves = [
        Case::new(TOKENS / 2, TEACHER, STUDENT),
        Case::new(TOKENS, TEACHER / 2, STUDENT / 2),
    ];
    let mut reads = Vec::new();
    let mut times = vec![Vec::new(); asked.len()];
    let mut half_times = vec![[Vec::new(), Vec::new()]; asked.len()];
    let mut backwards = Vec::new();
    for _ in 0..ROUNDS {
        reads.push(seconds(|| case.read_four_times()));
        for (((_, aligner), times), half_times) in asked.iter().zip(&mut times).zip(&mut half_times)
        {
            times.push(seconds(|| case.step(aligner.as_ref())));
            for (case, times) in halves.iter().zip(half_times) {
                times.push(seconds(|| case.step(aligner.as_ref())));
            }
        }
        if let Some((_, aligner)) = asked.first() {
            backwards.push(seconds(|| case.backward(aligner.as_ref())));
        }
    }
    let over = |times: &[f64], others: &[f64]| -> f64 {
        median(times.iter().zip(others).map(|(t, o)| t / o).collect())
    };
    let bytes = (4 * (TOKENS + 1) * (TEACHER + STUDENT) * 4) as f64;
    let limit = median(reads.clone());
    let speed = bytes / limit / 1e9;
    println!(
        "  {:<30} {:8.1}   ({speed:.1} GB/s)",
        "reading",
        limit * 1e3
    );
    for (((name, _), times), halves) in asked.iter().zip(&times).zip(&half_times) {
        let [tokens, vocabularies] = [0, 1].map(|i| 2.0 * over(&halves[i], times));
        println!(
            "  {name:<30} {:8.1} {:6.2} x    {tokens:.2} {vocabularies:.2}",
            median(times.clone()) * 1e3,
            over(times, &reads)
        );
    }
    if let Some((name, _)) = asked.first() {
        let name = format!("{name}, backward()");
        println!(
            "  {name:<30} {:8.1} {:6.2} x",
            median(backwards.clone()) * 1e3,
            over(&backwards, &reads)
        );
    }
}
