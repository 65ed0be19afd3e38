//! Cost of a forward of m rows on the default model, and of the parts of a cycle beside it.
//!
//! `cargo bench -p scylla-bench`; the default model must be in the cache (`scylla assets fetch`).

mod common;

use std::hint::black_box;

use common::rows;
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use scylla_core::assets::{DEFAULT_MODEL, cache_dir};
use scylla_core::model::{LoadOptions, ModelFiles, WeightForm, load};
use scylla_core::plugin::Want;
use scylla_core::sampling::{Sampling, argmax};

/// Tokens in the cache while forwards are timed.
const CONTEXT: usize = 512;

fn forward(c: &mut Criterion) {
    let path = cache_dir().map(|cache| DEFAULT_MODEL.path(&cache));
    let Some(path) = path.ok().filter(|p| p.is_file()) else {
        eprintln!("skipped: the default model is not in the cache");
        return;
    };
    for weights in [
        WeightForm::AsIs,
        WeightForm::Q8_0,
        WeightForm::Bf16,
        WeightForm::F32,
    ] {
        let options = LoadOptions {
            weights,
            ..LoadOptions::default()
        };
        let files = ModelFiles::open(&path).expect("opens");
        let mut model = load(&files, &options).expect("loads").model;
        model.open(0).expect("open");
        let tokens: Vec<u32> = (0..CONTEXT as u32).map(|i| 1000 + i * 7).collect();
        let _ = model.forward(&rows(&tokens, Want::None)).expect("forward");
        model
            .commit(0, &(0..CONTEXT).collect::<Vec<_>>())
            .expect("commit");
        let mut group = c.benchmark_group(format!("forward {weights}"));
        group.sample_size(20);
        for m in [1usize, 2, 4, 8, 16, 32] {
            group.bench_function(BenchmarkId::from_parameter(m), |b| {
                b.iter(|| {
                    let found = model.forward(&rows(&tokens[..m], Want::All));
                    model.commit(0, &[]).expect("drop the rows");
                    found.expect("forward")
                });
            });
        }
    }
}

fn sampling(c: &mut Criterion) {
    let logits: Vec<f32> = (0..152_064)
        .map(|i| ((i as f32 * 0.7311).sin() + (i as f32 * 0.013).cos()) * 6.0)
        .collect();
    let mut group = c.benchmark_group("one row of 152064");
    group.bench_function("argmax", |b| b.iter(|| argmax(black_box(&logits))));
    let mut out = Vec::new();
    for (name, sampling) in [
        (
            "softmax",
            Sampling {
                temperature: 0.8,
                ..Sampling::default()
            },
        ),
        (
            "top-k 50",
            Sampling {
                temperature: 0.8,
                top_k: 50,
                ..Sampling::default()
            },
        ),
        (
            "top-p 0.9",
            Sampling {
                temperature: 0.8,
                top_p: 0.9,
                ..Sampling::default()
            },
        ),
    ] {
        group.bench_function(name, |b| {
            b.iter(|| sampling.distribution(black_box(&logits), logits.len(), &mut out))
        });
    }
}

criterion_group!(benches, forward, sampling);
criterion_main!(benches);
