//! Cost of a rule per visited row, one thread, on a tree of 60 nodes over a vocabulary of 152,064.
//!
//! `cargo bench -p scylla-bench --bench verify`. With `SCYLLA_DUMP=DIR` the input is written there, for
//! `benches/verify_numpy.py DIR`, which does the same work densely.

use std::cell::Cell;
use std::hint::black_box;
use std::path::Path;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use scylla_bench::Registry;
use scylla_core::chance::Seeded;
use scylla_core::draw;
use scylla_core::engine::LogitRows;
use scylla_core::plugin::{Matrix, TargetRows, Verifier};
use scylla_core::sampling::Sampling;
use scylla_core::tree::{Drawing, Tree};

const VOCAB: usize = 152_064;
const NODES: usize = 60;
/// Children by depth: 1 + 4 + 12 + 24 nodes, and 19 more on the level below.
const TREE: [usize; 6] = [4, 3, 2, 2, 1, 1];
const CHAIN: [usize; 7] = [1; 7];

/// A hash of two numbers in [0, 1).
fn unit(a: u64, b: u64) -> f64 {
    let mut x = a.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ b.wrapping_mul(0xD1B5_4A32_D192_ED03);
    x = (x ^ (x >> 31)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x = (x ^ (x >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    ((x ^ (x >> 32)) >> 11) as f64 / (1u64 << 53) as f64
}

/// Roughly normal logits as a language model's: most of the mass on some dozens of tokens. The draft's are the
/// target's with noise.
fn logits(node: usize, noise: f64) -> Vec<f32> {
    let normal = |a: u64, i: usize| (0..3).map(|k| unit(a + k, i as u64)).sum::<f64>() * 2.0 - 3.0;
    let seed = 1000 * node as u64;
    let value = |i: usize| {
        let likely = if unit(seed + 7, i as u64) < 4e-4 {
            9.0
        } else {
            0.0
        };
        (2.2 * normal(seed, i) + likely + noise * normal(seed + 10, i)) as f32
    };
    (0..VOCAB).map(value).collect()
}

/// Rows with a count of those asked for.
struct Counted<'a> {
    rows: LogitRows<'a>,
    visited: Cell<usize>,
}

impl TargetRows for Counted<'_> {
    fn argmax(&self, nodes: &[usize]) -> scylla_core::Result<Vec<u32>> {
        self.visited.set(self.visited.get() + nodes.len());
        self.rows.argmax(nodes)
    }
    fn row(&self, node: usize, out: &mut Vec<f64>) -> scylla_core::Result<()> {
        self.visited.set(self.visited.get() + 1);
        self.rows.row(node, out)
    }
}

fn grow(drawing: Drawing, widths: &[usize], sampling: &Sampling) -> Tree {
    let mut tree = Tree::root(0);
    tree.drawing = drawing;
    let mut expanded = 0;
    let mut q = |_: &[u32]| {
        let mut q = Vec::new();
        // Nodes are expanded in order, so the count of expansions is the node.
        sampling.distribution(&logits(expanded, 0.8), VOCAB, &mut q)?;
        expanded += 1;
        Ok(q.into())
    };
    let mut chance = Seeded::new(11, 0);
    draw::grow(&mut tree, widths, NODES, &mut q, &mut chance).expect("tree");
    tree
}

/// Time of `count` visited rows.
fn timed(rule: &dyn Verifier, rows: &Counted<'_>, chance: &mut Seeded, count: u64) -> Duration {
    rows.visited.set(0);
    let mut cycles = 0;
    let begun = Instant::now();
    while (rows.visited.get() as u64) < count {
        chance.at(cycles);
        cycles += 1;
        black_box(rule.verify(rows.rows.tree, rows, chance).expect("verdict"));
    }
    begun
        .elapsed()
        .mul_f64(count as f64 / rows.visited.get() as f64)
}

fn dump(dir: &Path, tree: &Tree, target: &[f32]) {
    std::fs::create_dir_all(dir).expect("folder");
    let write = |name: &str, bytes: Vec<u8>| std::fs::write(dir.join(name), bytes).expect("write");
    write(
        "logits.f32",
        target.iter().flat_map(|v| v.to_le_bytes()).collect(),
    );
    let mut draft = Vec::new();
    for node in 0..tree.len() {
        draft.extend(logits(node, 0.8).iter().flat_map(|v| v.to_le_bytes()));
    }
    write("draft.f32", draft);
    let shape = serde_json::json!({"vocab": VOCAB, "tokens": tree.tokens, "parents": tree.parents});
    write("tree.json", shape.to_string().into_bytes());
}

fn rules(c: &mut Criterion) {
    let registry = Registry::default();
    let target: Vec<f32> = (0..NODES).flat_map(|n| logits(n, 0.0)).collect();
    let matrix = Matrix::host(target.clone(), VOCAB);
    let settings = [
        ("temperature 1", 1.0, 1.0),
        ("temperature 0.7, top-p 0.9", 0.7, 0.9),
    ];
    for (name, temperature, top_p) in settings {
        let sampling = Sampling {
            temperature,
            top_p,
            ..Sampling::default()
        };
        let trees = [
            ("chain", grow(Drawing::Independent, &CHAIN, &sampling)),
            (
                "deterministic",
                grow(Drawing::Deterministic, &TREE, &sampling),
            ),
            (
                "without replacement",
                grow(Drawing::WithoutReplacement, &TREE, &sampling),
            ),
            ("independent", grow(Drawing::Independent, &TREE, &sampling)),
        ];
        if let (Some(dir), 1.0) = (std::env::var_os("SCYLLA_DUMP"), temperature) {
            dump(Path::new(&dir), &trees[2].1, &target);
            dump(
                &Path::new(&dir).join("chain"),
                &trees[0].1,
                &target[..8 * VOCAB],
            );
        }
        let mut group = c.benchmark_group(format!("per visited row, {name}"));
        group.sample_size(20);
        for (rule, tree) in [
            ("greedy", 1),
            ("chain", 0),
            ("block", 0),
            ("deterministic-tree", 1),
            ("rrs-without-replacement", 2),
            ("specinfer", 3),
            ("k-seq", 3),
            ("traversal", 2),
        ] {
            let verifier = registry.make_rule(rule, &sampling, 1, toml::Table::new());
            let verifier = verifier.expect("rule");
            let (shape, tree) = &trees[tree];
            let rows = Counted {
                rows: LogitRows {
                    logits: &matrix,
                    tree,
                    history: &[],
                    sampling: &sampling,
                    known: VOCAB,
                    best: Default::default(),
                },
                visited: Cell::new(0),
            };
            let mut chance = Seeded::new(5, 0);
            group.bench_function(format!("{rule}, {shape}"), |b| {
                b.iter_custom(|count| timed(verifier.as_ref(), &rows, &mut chance, count));
            });
        }
        group.finish();
    }
    // Whole calls, as the numpy script times them.
    let sampling = Sampling {
        temperature: 1.0,
        ..Sampling::default()
    };
    let mut group = c.benchmark_group("whole call, temperature 1");
    group.sample_size(20);
    for (rule, drawing, widths) in [
        ("greedy", Drawing::Deterministic, &TREE[..]),
        ("chain", Drawing::Independent, &CHAIN),
        (
            "rrs-without-replacement",
            Drawing::WithoutReplacement,
            &TREE,
        ),
    ] {
        let verifier = registry.make_rule(rule, &sampling, 1, toml::Table::new());
        let verifier = verifier.expect("rule");
        let tree = grow(drawing, widths, &sampling);
        let rows = LogitRows {
            logits: &matrix,
            tree: &tree,
            history: &[],
            sampling: &sampling,
            known: VOCAB,
            best: Default::default(),
        };
        let (mut chance, mut cycle) = (Seeded::new(5, 0), 0);
        group.bench_function(format!("{rule}, {} nodes", tree.len()), |b| {
            b.iter(|| {
                cycle += 1;
                chance.at(cycle);
                verifier.verify(&tree, &rows, &mut chance).expect("verdict")
            });
        });
    }
}

criterion_group!(benches, rules);
criterion_main!(benches);
