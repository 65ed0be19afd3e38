//! A drafting step and a whole tree on the default model, beside the limit: the weight bytes that must be read over the
//! bandwidth measured in the same run. Networks are random; the cost does not depend on what they say.
//!
//! `cargo bench --bench draft`; `SCYLLA_THREADS` sets the threads.

mod common;

use std::sync::Arc;

use common::{best, memory, read_rate};
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use scylla_core::assets::{DEFAULT_MODEL, cache_dir};
use scylla_core::chance::Seeded;
use scylla_core::kernels::Pool;
use scylla_core::model::{LoadOptions, Loaded, ModelFiles, WeightForm, load};
use scylla_core::plugin::{Committed, DraftModel, Matrix, Request};
use scylla_core::sampling::Sampling;
use scylla_core::tree::Budget;
use scylla_draft::network::{self, DraftHost, Network, Nodes};
use scylla_draft::tree::{TreeDraft, TreeSettings};
use scylla_tests::{Tiny, TinyDraft};
use serde_json::json;

const CONTEXT: usize = 512;
const ROWS: usize = 10;

fn target() -> Loaded {
    let threads = std::env::var("SCYLLA_THREADS").ok();
    let options = LoadOptions {
        threads: threads.and_then(|t| t.parse().ok()).unwrap_or(0),
        ..LoadOptions::default()
    };
    let cache = cache_dir().expect("a cache directory");
    let path = DEFAULT_MODEL
        .fetch(&cache, &mut |_| {})
        .expect("the default model");
    load(&ModelFiles::open(&path).expect("opens"), &options).expect("loads")
}

fn host(target: &Loaded, weights: WeightForm, head: Option<Vec<u32>>) -> DraftHost {
    DraftHost {
        weights,
        head: head.map(Into::into),
        ..DraftHost::of(target)
    }
}

/// Bytes per second that all threads read together, the best of a few passes.
fn bandwidth(pool: &Pool) -> f64 {
    let data = memory();
    best(&std::array::from_fn::<_, 8, _>(|_| read_rate(pool, &data)))
}

/// A network with a sequence of `CONTEXT` positions behind it in slot 0.
fn filled<N: Network>(mut network: N, hidden: usize) -> N {
    let taps: Vec<Matrix> = network
        .taps()
        .iter()
        .map(|_| {
            let values = (0..CONTEXT * hidden).map(|i| (i as f32 * 0.7311).sin());
            Matrix::host(values.collect(), hidden)
        })
        .collect();
    let tokens: Vec<u32> = (0..=CONTEXT as u32).map(|i| 1000 + i * 7).collect();
    let path: Vec<usize> = (0..CONTEXT).collect();
    let committed = Committed {
        slot: 0,
        tokens: &tokens,
        path: &path,
        taps: &taps,
    };
    network.open(0).expect("open");
    network.observe(&committed).expect("observe");
    network
}

fn limit(name: &str, bytes: usize, steps: usize, pool: &Arc<Pool>) {
    let rate = bandwidth(pool);
    let ms = (bytes * steps) as f64 / rate * 1e3;
    println!(
        "{name}: limit {ms:.3} ms ({steps} x {:.2} MB at {:.1} GB/s, {} threads)",
        bytes as f64 / 1e6,
        rate / 1e9,
        pool.threads()
    );
}

/// One forward of ten nodes, and a tree of 60 nodes, width 10 and depth 5: at most five forwards behind the root's logits.
fn bench<N: Network + 'static>(
    c: &mut Criterion,
    name: &str,
    target: &Loaded,
    load: impl Fn() -> N,
) {
    let hidden = target.config.hidden;
    let pool = target.executor.pool().expect("on the CPU");
    let mut network = filled(load(), hidden);
    let mut logits = Matrix::default();
    let tokens: Vec<u32> = (0..ROWS as u32).map(|i| 2000 + i).collect();
    let bytes = network.step_bytes();
    limit(name, bytes, 1, pool);
    let mut group = c.benchmark_group("draft step");
    group.sample_size(20);
    group.bench_function(BenchmarkId::new(name, ROWS), |b| {
        b.iter(|| {
            // Drops the nodes and gives the root's logits: one row of the head more.
            network.start(&[0], &mut logits).expect("start");
            let nodes = Nodes {
                slot: 0,
                tokens: &tokens,
                parents: &[None; ROWS],
            };
            network.expand(&[nodes], &mut logits).expect("expand");
        });
    });
    group.finish();
    let budget = Budget {
        total: 60,
        width: 10,
        depth: 5,
    };
    limit(name, bytes, budget.depth, pool);
    let mut draft =
        TreeDraft::new(filled(load(), hidden), &TreeSettings::default()).expect("draft");
    let sampling = Sampling::default();
    let mut group = c.benchmark_group("draft tree");
    group.sample_size(20);
    group.bench_function(BenchmarkId::new(name, budget.total), |b| {
        b.iter(|| {
            let request = Request {
                slot: 0,
                root: 1000 + CONTEXT as u32 * 7,
                budget,
                sampling: &sampling,
                chance: &mut Seeded::new(0, 0),
            };
            draft.propose(&mut [request]).expect("propose")
        });
    });
    group.finish();
}

fn drafts(c: &mut Criterion) {
    let target = target();
    let t = &target.config;
    let layer = &t.layers[0];
    let tiny = Tiny {
        family: "llama",
        window: None,
        vocab: t.vocab,
        hidden: t.hidden,
        ffn: layer.ffn,
        layers: t.layers.len(),
        heads: layer.heads,
        kv_heads: layer.kv_heads,
        head_dim: layer.head_dim,
        tied: true,
        seed: 0,
    };
    let dir = tempfile::tempdir().expect("dir");
    let at = |name: &str| dir.path().join(name);
    TinyDraft::new(&tiny, "eagle3", json!({"draft_vocab_size": 8192}), 1).write(&at("eagle3"));
    TinyDraft::new(&tiny, "eagle", json!({}), 1).write(&at("eagle2"));
    for weights in [WeightForm::F32, WeightForm::Q8_0] {
        let name = format!("eagle3 8192 {weights}");
        bench(c, &name, &target, || {
            network::eagle3(&at("eagle3"), None, &host(&target, weights, None)).expect("loads")
        });
    }
    for (head, ids) in [
        ("whole head", None),
        ("8192 ids", Some((0..8192).collect::<Vec<u32>>())),
    ] {
        bench(c, &format!("eagle2 {head} q8_0"), &target, || {
            let host = host(&target, WeightForm::Q8_0, ids.clone());
            network::eagle(&at("eagle2"), &host).expect("loads")
        });
    }
}

criterion_group!(benches, drafts);
criterion_main!(benches);
