//! What trains drafts: losses and gradients against golden values, and the graph against the kernels that serve.

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device};
use safetensors::Dtype;
use scylla_core::kernels::{Pool, ProductForm, Products};
use scylla_core::model::{LoadOptions, Loaded, ModelFiles, WeightForm, load};
use scylla_core::plugin::{Committed, Matrix, SlotRows, Step, Want};
use scylla_core::train::Named;
use scylla_core::train::graph::{Compute, Head, PackedRows, Parameters, Tape};
use scylla_draft::checkpoint::{Checkpoint, Layout};
use scylla_draft::network::{self, DraftHost, Ids, Network};
use scylla_draft::recipe::{
    Batch, BatchLoss, Distance, Eagle3Loss, Eagle3Recipe, EagleLoss, EagleRecipe, Normalise,
    Recipe, TrainHost, parameters,
};
use scylla_tests::{TINY, Tensors, TinyDraft, golden, gpu, ids, write_hf};
use serde_json::{Value, json};

/// How a graph is computed, by name.
fn computes() -> Vec<(String, Compute)> {
    let kernels = |threads, form| {
        Compute::Kernels(Products {
            pool: Arc::new(Pool::new(threads)),
            form,
        })
    };
    let rounded = |device| Compute::Tensors {
        device,
        dtype: DType::F32,
        products: DType::BF16,
    };
    let mut all = vec![
        ("f64".to_string(), Compute::tensors(Device::Cpu, DType::F64)),
        (
            "f32, candle".into(),
            Compute::tensors(Device::Cpu, DType::F32),
        ),
        (
            "f32, kernels on one thread".into(),
            kernels(1, ProductForm::F32),
        ),
        (
            "f32, kernels on two threads".into(),
            kernels(2, ProductForm::F32),
        ),
        ("bf16, kernels".into(), kernels(2, ProductForm::Bf16)),
        ("bf16, candle".into(), rounded(Device::Cpu)),
    ];
    if let Some(gpu) = gpu() {
        all.push(("f32, GPU".into(), Compute::tensors(gpu.clone(), DType::F32)));
        all.push(("bf16, GPU".into(), rounded(gpu)));
    }
    all
}

/// How far losses, gradients, states and logits may be off.
fn bounds(name: &str) -> [f64; 4] {
    match &name[..3] {
        "f64" => [1e-10, 1e-9, 1e-6, 1e-6],
        "f32" => [1e-4, 1e-3, 2e-3, 5e-3],
        // Both sides of every product are rounded to eight bits.
        _ => [3e-2, 1.5e-1, 3e-1, 6e-1],
    }
}

/// How far an accuracy may be off: where products are rounded, near ties may fall the other way.
fn ties(name: &str) -> f64 {
    if name.starts_with("bf16") { 0.1 } else { 1e-7 }
}

fn target(dir: &Path) -> Loaded {
    let files = ModelFiles::open(dir).expect("target");
    load(&files, &LoadOptions::default()).expect("loads")
}

fn numbers(m: &Matrix) -> Vec<f64> {
    match m.tensor() {
        Ok(t) => t
            .to_dtype(DType::F64)
            .and_then(|t| t.flatten_all()?.to_vec1())
            .expect("values"),
        Err(_) => m
            .values()
            .expect("values")
            .iter()
            .map(|&v| f64::from(v))
            .collect(),
    }
}

/// The largest difference, as a share of the largest expected value.
fn off(found: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let largest = expected
        .iter()
        .fold(0.0f64, |m, v| m.max(v.abs()))
        .max(1e-300);
    found
        .iter()
        .zip(expected)
        .fold(0.0f64, |m, (a, b)| m.max((a - b).abs()))
        / largest
}

fn read_json(path: &Path) -> Value {
    let text = std::fs::read_to_string(path).expect("golden.json");
    serde_json::from_str(&text).expect("JSON")
}

fn run(
    recipe: &dyn Recipe,
    named: &Named,
    host: &TrainHost,
    batch: &Batch<'_>,
) -> (BatchLoss, Named) {
    let mut tape = Tape::new(&host.on);
    let mut used = Parameters::new(named);
    let loss = recipe
        .loss(&mut tape, &mut used, host, batch)
        .expect("loss");
    let mut gradients = tape.backward().expect("backward");
    (
        loss,
        used.gradients(&host.on, &mut gradients).expect("gradients"),
    )
}

/// Rows of a golden batch.
struct Given {
    tokens: Vec<u32>,
    mask: Vec<bool>,
    rows: PackedRows,
}

impl Given {
    fn read(file: &Tensors, batch: usize) -> Self {
        let tokens = ids(&file.i64("input_ids"));
        let length = tokens.len() / batch;
        Self {
            mask: file.i64("loss_mask").iter().map(|&m| m != 0).collect(),
            rows: PackedRows::lines(batch, length).expect("rows"),
            tokens,
        }
    }

    fn batch<'a>(&'a self, taps: &'a [Matrix], logits: Option<&'a Matrix>) -> Batch<'a> {
        Batch {
            rows: &self.rows,
            tokens: &self.tokens,
            mask: &self.mask,
            taps,
            logits,
            top: None,
            seed: 0,
            beyond: true,
        }
    }
}

/// `[M, parts H]` as one matrix for each part.
fn split(values: &[f32], count: usize, rows: usize) -> Vec<Matrix> {
    let width = values.len() / rows / count;
    let part = |i: usize| {
        let row = |r: usize| values[(r * count + i) * width..(r * count + i + 1) * width].to_vec();
        Matrix::host((0..rows).flat_map(row).collect(), width)
    };
    (0..count).map(part).collect()
}

#[test]
fn eagle3s_training_time_test_is_that_of_the_reference() {
    let Some(golden) = golden("eagle3's training-time test") else {
        return;
    };
    let dir = golden.join("eagle3_loss");
    let (file, about) = (
        Tensors::read(&dir.join("golden.safetensors")),
        read_json(&dir.join("golden.json")),
    );
    let target = target(&golden.join("models/llama3-tiny"));
    let shape = target.model.shape();
    let from = golden.join("eagle/eagle3-llama3-tiny");
    let checkpoint =
        Checkpoint::open(&from, &[Layout::Eagle3], &shape, WeightForm::AsIs).expect("draft");
    let given = Given::read(&file, 2);
    let m = given.tokens.len();
    let (features, _) = file.f32("features");
    let taps = split(&features, 3, m);
    let (logits, _) = file.f32("target_logits");
    let logits = Matrix::host(logits, shape.vocab);
    let number = |key: &str| about[key].as_f64().expect("a number");
    for (name, on) in computes() {
        let [loss_off, grad_off, _, logits_off] = bounds(&name);
        let host = TrainHost::new(&on, &target.tokens).expect("host");
        let named = parameters(&checkpoint, &on).expect("parameters");
        for (unroll, total) in [(3, "total_3_mean_over_BS"), (7, "total_7_mean_over_BS")] {
            let recipe = |normalise| {
                let settings = Eagle3Loss {
                    unroll,
                    normalise,
                    ..Default::default()
                };
                let ids = checkpoint.draft_ids(shape.vocab).expect("ids");
                Eagle3Recipe::new(&checkpoint.config, None, ids, &shape, &settings).expect("recipe")
            };
            let (loss, grads) = run(
                &recipe(Normalise::Rows),
                &named,
                &host,
                &given.batch(&taps, Some(&logits)),
            );
            let close = |what: &str, found: f64, expected: f64| {
                assert!(
                    (found / expected - 1.0).abs() < loss_off,
                    "{name}: {what} {found} for {expected}"
                );
            };
            close(total, loss.total, number(total));
            let by_mask = format!("total_{unroll}_each_step_over_position_mask_count");
            close(&by_mask, loss.total_by_mask, number(&by_mask));
            for (i, step) in loss.steps.iter().enumerate() {
                close(
                    "step",
                    step.loss,
                    about["step_loss_mean_over_BS"][i].as_f64().expect("loss"),
                );
                assert_eq!(
                    step.count as u64,
                    about["step_position_mask_count"][i]
                        .as_u64()
                        .expect("count")
                );
                let accuracy = about["step_accuracy_over_loss_mask"][i]
                    .as_f64()
                    .expect("accuracy");
                assert!(
                    (step.accuracy - accuracy).abs() < ties(&name),
                    "{name}: accuracy {}",
                    step.accuracy
                );
            }
            for (parameter, grad) in &grads {
                let found = off(
                    &numbers(grad),
                    &file.f64(&format!("total{unroll}.grad.{parameter}")),
                );
                assert!(
                    found < grad_off,
                    "{name}: {unroll} steps: {parameter} off by {found}"
                );
            }
            if unroll == 7 {
                let (loss, grads) = run(
                    &recipe(Normalise::Mask),
                    &named,
                    &host,
                    &given.batch(&taps, Some(&logits)),
                );
                close(&by_mask, loss.total, number(&by_mask));
                for (parameter, grad) in &grads {
                    let found = off(
                        &numbers(grad),
                        &file.f64(&format!("total7_maskcount.grad.{parameter}")),
                    );
                    assert!(
                        found < grad_off,
                        "{name}: by mask: {parameter} off by {found}"
                    );
                }
            }
            // The last row's goal lies behind its document.
            let mut edge = Given::read(&file, 2);
            let length = edge.rows.length;
            (0..2).for_each(|line| edge.mask[(line + 1) * length - 1] = true);
            let (loss, _) = run(
                &recipe(Normalise::Rows),
                &named,
                &host,
                &edge.batch(&taps, Some(&logits)),
            );
            let of_edge = &about["edge_case_last_position_unmasked"]["step_loss_mean_over_BS"];
            for (i, step) in loss.steps.iter().enumerate() {
                close("edge step", step.loss, of_edge[i].as_f64().expect("loss"));
            }
        }
        let settings = Eagle3Loss::default();
        let ids = checkpoint.draft_ids(shape.vocab).expect("ids");
        let recipe =
            Eagle3Recipe::new(&checkpoint.config, None, ids, &shape, &settings).expect("recipe");
        let mut used = Parameters::new(&named);
        let (_, found) = recipe
            .forward(&mut used, &host, &given.batch(&taps, Some(&logits)))
            .expect("forward");
        let (expected, _) = file.f32("step0.draft_logits");
        let expected: Vec<f64> = expected.iter().map(|&v| f64::from(v)).collect();
        let largest = numbers(&found)
            .iter()
            .zip(&expected)
            .fold(0.0f64, |m, (a, b)| m.max((a - b).abs()));
        assert!(largest < logits_off, "{name}: logits off by {largest}");
    }
}

#[test]
fn eagles_loss_is_that_of_the_reference() {
    let Some(golden) = golden("EAGLE's loss") else {
        return;
    };
    for case in [
        "eagle1-llama2-tiny",
        "scylla2-llama3-tiny",
        "scylla3-qwen2-tiny",
    ] {
        let dir = golden.join("eagle_loss").join(case);
        let (file, about) = (
            Tensors::read(&dir.join("golden.safetensors")),
            read_json(&dir.join("golden.json")),
        );
        let target = target(
            &dir.join("..")
                .join(about["target"].as_str().expect("target")),
        );
        let shape = target.model.shape();
        let (from, layout) = match case.starts_with("eagle") {
            true => (golden.join("eagle/eagle1-llama2-tiny"), Layout::Eagle),
            false => (dir.join("draft"), Layout::Scylla),
        };
        let checkpoint =
            Checkpoint::open(&from, &[layout], &shape, WeightForm::AsIs).expect("draft");
        let given = Given::read(&file, 2);
        let (features, _) = file.f32("features");
        let taps = [Matrix::host(features, shape.hidden)];
        let settings = EagleLoss {
            noise: 0.0,
            ..Default::default()
        };
        let recipe = EagleRecipe::new(&checkpoint.config, &settings).expect("recipe");
        for (name, on) in computes() {
            let [loss_off, grad_off, hidden_off, logits_off] = bounds(&name);
            let host = TrainHost::new(&on, &target.tokens).expect("host");
            let named = parameters(&checkpoint, &on).expect("parameters");
            let (loss, grads) = run(&recipe, &named, &host, &given.batch(&taps, None));
            for (what, found) in [
                ("total", loss.total),
                ("smooth_l1", loss.parts[0].1),
                ("ce", loss.parts[1].1),
            ] {
                let expected = about[what].as_f64().expect("a number");
                assert!(
                    (found / expected - 1.0).abs() < loss_off,
                    "{case}, {name}: {what} {found} for {expected}"
                );
            }
            assert_eq!(
                loss.steps[0].count as f64,
                about["count"].as_f64().expect("count")
            );
            let accuracy = about["accuracy"].as_f64().expect("accuracy");
            assert!(
                (loss.steps[0].accuracy - accuracy).abs() < ties(&name),
                "{case}, {name}: {}",
                loss.steps[0].accuracy
            );
            for (parameter, grad) in &grads {
                let found = off(
                    &numbers(grad),
                    &file.f64(&format!("total.grad.{parameter}")),
                );
                assert!(
                    found < grad_off,
                    "{case}, {name}: {parameter} off by {found}"
                );
            }
            let mut used = Parameters::new(&named);
            let (hidden, logits) = recipe
                .forward(&mut used, &host, &given.batch(&taps, None))
                .expect("forward");
            for (what, found, bound) in [
                ("hidden", hidden, hidden_off),
                ("logits", logits, logits_off),
            ] {
                let (expected, _) = file.f32(what);
                let pairs = numbers(&found).into_iter().zip(expected);
                let largest = pairs.fold(0.0f64, |m, (a, b)| m.max((a - f64::from(b)).abs()));
                assert!(largest < bound, "{case}, {name}: {what} off by {largest}");
            }
        }
    }
}

/// Every network, with every option it may have.
fn networks() -> Vec<(&'static str, Layout, Value)> {
    let eagle3 = |more| ("eagle3", Layout::Eagle3, more);
    vec![
        ("eagle", Layout::Eagle, json!({})),
        ("scylla", Layout::Scylla, json!({})),
        (
            "scylla",
            Layout::Scylla,
            json!({"input_norm_first": true, "recur_before_norm": true}),
        ),
        eagle3(json!({})),
        eagle3(json!({"norm_before_residual": true})),
        eagle3(json!({"fc_norm": true})),
        eagle3(json!({"norm_before_fc": true})),
        eagle3(json!({"norm_output": true})),
        eagle3(
            json!({"norm_before_residual": true, "fc_norm": true, "norm_before_fc": true, "norm_output": true}),
        ),
        (
            "speculators",
            Layout::Speculators,
            json!({"norm_before_residual": false}),
        ),
    ]
}

/// Logits after each row by the network that serves, told row by row.
fn served<N: Network>(mut network: N, tokens: &[u32], taps: &[Matrix]) -> Vec<f32> {
    network.open(0).expect("open");
    let mut logits = Matrix::default();
    let mut all = Vec::new();
    for row in 0..tokens.len() - 1 {
        let known = if row == 0 {
            &tokens[..2]
        } else {
            &tokens[row + 1..row + 2]
        };
        network
            .observe(&Committed {
                slot: 0,
                tokens: known,
                path: &[row],
                taps,
            })
            .expect("observe");
        network.start(&[0], &mut logits).expect("start");
        all.extend_from_slice(&logits.all().expect("logits"));
    }
    all
}

#[test]
fn the_graph_computes_what_the_networks_that_serve_compute() {
    let dir = tempfile::tempdir().expect("dir");
    let tiny = TINY;
    std::fs::create_dir(dir.path().join("target")).expect("folder");
    write_hf(&tiny, &dir.path().join("target"), Dtype::F32, 1);
    let mut target = target(&dir.path().join("target"));
    let shape = target.model.shape();
    let host = DraftHost::of(&target);
    let tokens: Vec<u32> = (0..23).map(|i| (i * 5 + i * i) % 13).collect();
    for (i, (family, layout, more)) in networks().into_iter().enumerate() {
        let name = format!("{family} {more}");
        let to = dir.path().join(format!("draft-{i}"));
        TinyDraft::new(&tiny, family, more, i as u64).write(&to);
        let from = Checkpoint::open(&to, &[layout], &shape, WeightForm::AsIs).expect("draft");
        let recipe: Box<dyn Recipe> = match layout {
            Layout::Eagle | Layout::Scylla => {
                Box::new(EagleRecipe::new(&from.config, &EagleLoss::default()).expect("recipe"))
            }
            _ => {
                let ids = from.draft_ids(tiny.vocab).expect("ids");
                let settings = Eagle3Loss::default();
                Box::new(
                    Eagle3Recipe::new(&from.config, None, ids, &shape, &settings).expect("recipe"),
                )
            }
        };
        target.model.open(0).expect("open");
        let step = Step {
            slots: vec![SlotRows {
                slot: 0,
                tokens: &tokens,
                parents: &[],
                want: Want::None,
            }],
            taps: &recipe.taps(),
        };
        let taps = target.model.forward(&step).expect("forward").taps.remove(0);
        target.model.close(0);
        let own = match layout {
            Layout::Eagle | Layout::Scylla => &taps[..],
            _ => &taps[..taps.len() - 1],
        };
        let expected = match layout {
            Layout::Eagle => served(
                network::eagle_of(&from, &host).expect("network"),
                &tokens,
                own,
            ),
            Layout::Scylla => served(
                network::scylla_of(&from, &host).expect("network"),
                &tokens,
                own,
            ),
            _ => served(
                network::eagle3_of(&from, None, &host).expect("network"),
                &tokens,
                own,
            ),
        };
        let given = Given {
            rows: PackedRows::lines(1, tokens.len()).expect("rows"),
            mask: vec![true; tokens.len()],
            tokens: tokens.clone(),
        };
        for (compute, on) in computes()
            .into_iter()
            .filter(|(name, _)| name.starts_with("f32"))
        {
            let host = TrainHost::new(&on, &target.tokens).expect("host");
            let named = parameters(&from, &on).expect("parameters");
            let batch = given.batch(&taps, None);
            let (_, logits) = recipe
                .forward(&mut Parameters::new(&named), &host, &batch)
                .expect("forward");
            let found = numbers(&logits);
            let pairs = found.iter().zip(&expected);
            let largest = pairs.fold(0.0f64, |m, (a, b)| m.max((a - f64::from(*b)).abs()));
            assert!(largest < 1e-4, "{name}, {compute}: off by {largest}");
        }
    }
}

/// Every distance, against plain sums in f64 over what the network and the target say.
#[test]
fn distances_are_those_of_plain_sums_over_what_both_say() {
    let dir = tempfile::tempdir().expect("dir");
    std::fs::create_dir(dir.path().join("target")).expect("folder");
    write_hf(&TINY, &dir.path().join("target"), Dtype::F32, 1);
    let mut target = target(&dir.path().join("target"));
    let shape = target.model.shape();
    let tokens: Vec<u32> = (0..24).map(|i| (i * 5 + i * i) % 13).collect();
    let given = Given {
        rows: PackedRows::new(1, 24, vec![0..15, 15..24]).expect("rows"),
        mask: (0..24).map(|i| i % 5 != 2).collect(),
        tokens: tokens.clone(),
    };
    let softmax = |logits: &[f64]| -> Vec<f64> {
        let e: Vec<f64> = logits.iter().map(|l| l.exp()).collect();
        let sum: f64 = e.iter().sum();
        e.into_iter().map(|e| e / sum).collect()
    };
    // What the target says after each row.
    let mut said = Vec::new();
    for document in given.rows.documents.iter() {
        target.model.open(0).expect("open");
        let slot = SlotRows {
            slot: 0,
            tokens: &tokens[document.clone()],
            parents: &[],
            want: Want::All,
        };
        let step = Step {
            slots: vec![slot],
            taps: &[],
        };
        let found = target.model.forward(&step).expect("forward");
        target.model.close(0);
        let logits = numbers(&found.logits[0]);
        said.extend(logits.chunks_exact(shape.vocab).map(<[f64]>::to_vec));
    }
    // A head of some of the target's tokens alone.
    let kept: Vec<u32> = vec![1, 2, 4, 5, 7, 8, 9, 11, 12];
    for (i, (family, layout, truncated)) in [
        ("eagle", Layout::Eagle, false),
        ("eagle3", Layout::Eagle3, false),
        ("eagle", Layout::Eagle, true),
    ]
    .into_iter()
    .enumerate()
    {
        let to = dir.path().join(family);
        TinyDraft::new(&TINY, family, json!({}), i as u64).write(&to);
        let from = Checkpoint::open(&to, &[layout], &shape, WeightForm::AsIs).expect("draft");
        for distance in [
            Distance::Ce,
            Distance::Kl,
            Distance::Tv,
            Distance::CeTv,
            Distance::Lk,
        ] {
            let settings = EagleLoss {
                smooth_l1: 0.0,
                ce: 1.0,
                noise: 0.0,
                distance,
                ..Default::default()
            };
            let eagle = || EagleRecipe::new(&from.config, &settings).expect("recipe");
            let (mut recipe, listed): (Box<dyn Recipe>, Vec<usize>) = match layout {
                Layout::Eagle if truncated => (
                    Box::new(eagle()),
                    kept.iter().map(|&id| id as usize).collect(),
                ),
                Layout::Eagle => (Box::new(eagle()), (0..shape.vocab).collect()),
                _ => {
                    let settings = Eagle3Loss {
                        unroll: 1,
                        normalise: Normalise::Mask,
                        distance,
                        ..Default::default()
                    };
                    let ids = from.draft_ids(TINY.vocab).expect("ids");
                    let listed = ids.targets().into_iter().map(|id| id as usize).collect();
                    let recipe = Eagle3Recipe::new(&from.config, None, ids, &shape, &settings);
                    (Box::new(recipe.expect("recipe")), listed)
                }
            };
            let taps = target
                .model
                .states(&tokens, &given.rows, &recipe.taps())
                .expect("states");
            for (name, on) in computes().into_iter().filter(|(n, _)| n.starts_with('f')) {
                let host = TrainHost::new(&on, &target.tokens).expect("host");
                let named = parameters(&from, &on).expect("parameters");
                if truncated {
                    let mut rows = Matrix::default();
                    target.tokens.head.rows(&kept, &mut rows).expect("rows");
                    let head = Head::frozen(&on, on.bring(&rows).expect("rows")).expect("head");
                    let ids = Ids::mapped(kept.clone(), shape.vocab).expect("ids");
                    recipe = Box::new(eagle().with_head(head, ids));
                }
                let mut batch = given.batch(&taps, None);
                batch.beyond = false;
                let (loss, _) = run(recipe.as_ref(), &named, &host, &batch);
                let (_, logits) = recipe
                    .forward(&mut Parameters::new(&named), &host, &batch)
                    .expect("forward");
                let logits = numbers(&logits);
                let (mut sum, mut count, mut asked) = (0.0, 0, 0);
                for document in given.rows.documents.iter() {
                    for row in document.start..document.end - 1 {
                        let goal = &said[row + 1];
                        let best = (0..shape.vocab).max_by(|&a, &b| goal[a].total_cmp(&goal[b]));
                        asked += i32::from(given.mask[row]);
                        if !given.mask[row] || !listed.contains(&best.expect("a token")) {
                            continue;
                        }
                        let among: Vec<f64> = listed.iter().map(|&id| goal[id]).collect();
                        let p = softmax(&among);
                        let q = softmax(&logits[row * listed.len()..(row + 1) * listed.len()]);
                        let pairs = || p.iter().zip(&q);
                        let ce = -pairs().map(|(p, q)| p * q.ln()).sum::<f64>();
                        let tv = 0.5 * pairs().map(|(p, q)| (p - q).abs()).sum::<f64>();
                        sum += match distance {
                            Distance::Ce => ce,
                            Distance::Kl => pairs().map(|(p, q)| p * (p / q).ln()).sum::<f64>(),
                            Distance::Tv => tv,
                            Distance::CeTv => 0.1 * ce + 0.9 * tv,
                            Distance::Lk => -pairs().map(|(p, q)| p.min(*q)).sum::<f64>().ln(),
                        };
                        count += 1;
                    }
                }
                assert!(count > 4, "{family}: {count} rows");
                // Rows whose most probable token is not kept say nothing, and count among those that features are learned in.
                assert!(!truncated || count < asked, "{count} of {asked}");
                let expected = sum / f64::from(if truncated { asked } else { count });
                assert!(
                    (loss.total - expected).abs() < 1e-4 * (1.0 + expected),
                    "{family}, {distance:?}, {name}: {} for {expected}",
                    loss.total
                );
            }
        }
    }
}

/// HASS, path by path: each row's drafted path is a text of its own, whose features are the target's up to the row and the
/// network's own behind it, run from its beginning each time.
#[test]
fn hass_is_the_sum_over_paths_that_are_run_one_by_one() {
    let dir = tempfile::tempdir().expect("dir");
    std::fs::create_dir(dir.path().join("target")).expect("folder");
    write_hf(&TINY, &dir.path().join("target"), Dtype::F32, 1);
    let mut target = target(&dir.path().join("target"));
    let shape = target.model.shape();
    let h = shape.hidden;
    let tokens: Vec<u32> = (0..21).map(|i| (i * 5 + i * i) % 13).collect();
    let given = Given {
        rows: PackedRows::new(1, 21, vec![0..12, 12..21]).expect("rows"),
        mask: (0..21).map(|i| i % 4 != 2).collect(),
        tokens: tokens.clone(),
    };
    let to = dir.path().join("draft");
    TinyDraft::new(&TINY, "eagle", json!({}), 3).write(&to);
    let from = Checkpoint::open(&to, &[Layout::Eagle], &shape, WeightForm::AsIs).expect("draft");
    let settings = EagleLoss {
        noise: 0.0,
        decay: 0.7,
        top_k: 5,
        top_weight: 0.3,
        ..EagleLoss::hass()
    };
    let recipe = EagleRecipe::new(&from.config, &settings).expect("recipe");
    let taps = target
        .model
        .states(&tokens, &given.rows, &recipe.taps())
        .expect("states");
    let features = numbers(&taps[0]);
    let wide = computes().swap_remove(0).1;
    let host = TrainHost::new(&wide, &target.tokens).expect("host");
    let named = parameters(&from, &wide).expect("parameters");
    let softmax = |logits: &[f64]| -> Vec<f64> {
        let e: Vec<f64> = logits.iter().map(|l| l.exp()).collect();
        let sum: f64 = e.iter().sum();
        e.into_iter().map(|e| e / sum).collect()
    };
    let head = |states: &[f64]| {
        let states = wide
            .matrix(states.iter().map(|&v| v as f32).collect(), h)
            .expect("states");
        numbers(&host.head.logits(&wide, &states).expect("logits"))
    };
    let (mut sums, mut counts) = (vec![0.0; settings.unroll], vec![0usize; settings.unroll]);
    for document in given.rows.documents.iter() {
        for row in document.clone() {
            let own: Vec<f32> = features[document.start * h..(row + 1) * h]
                .iter()
                .map(|&v| v as f32)
                .collect();
            let mut path = own;
            for step in 0..settings.unroll {
                let goal = row + 1 + step;
                if goal >= document.end {
                    break;
                }
                // One more row, whose token the last one looks at.
                let text = &tokens[document.start..=goal];
                let mut all = path.clone();
                all.resize(text.len() * h, 0.0);
                let of_path = Given {
                    rows: PackedRows::lines(1, text.len()).expect("rows"),
                    mask: vec![true; text.len()],
                    tokens: text.to_vec(),
                };
                let all = [Matrix::host(all, h)];
                let (states, logits) = recipe
                    .forward(
                        &mut Parameters::new(&named),
                        &host,
                        &of_path.batch(&all, None),
                    )
                    .expect("forward");
                let last = text.len() - 2;
                let state = numbers(&states)[last * h..(last + 1) * h].to_vec();
                path.extend(state.iter().map(|&v| v as f32));
                if !given.mask[row + step] {
                    continue;
                }
                let learnt = &features[goal * h..(goal + 1) * h];
                let near = state.iter().zip(learnt).map(|(a, b)| {
                    let off = (a - b).abs();
                    if off < 1.0 {
                        0.5 * off * off
                    } else {
                        off - 0.5
                    }
                });
                let near = near.sum::<f64>() / h as f64;
                let q = softmax(&numbers(&logits)[last * shape.vocab..(last + 1) * shape.vocab]);
                let p = softmax(&head(learnt));
                let mut order: Vec<usize> = (0..shape.vocab).collect();
                order.sort_by(|&a, &b| p[b].total_cmp(&p[a]));
                let ce =
                    |columns: &[usize]| -> f64 { columns.iter().map(|&c| -p[c] * q[c].ln()).sum() };
                sums[step] += near + 0.1 * ce(&order) + 0.3 * ce(&order[..5]);
                counts[step] += 1;
            }
        }
    }
    let of_step = |step: usize| sums[step] / counts[step] as f64;
    let expected = of_step(0) + 0.7 * of_step(1) + 0.49 * of_step(2);
    let mut gradients: Option<Named> = None;
    for (name, on) in computes() {
        if !name.starts_with('f') {
            continue;
        }
        let host = TrainHost::new(&on, &target.tokens).expect("host");
        let named = parameters(&from, &on).expect("parameters");
        let (loss, grads) = run(&recipe, &named, &host, &given.batch(&taps, None));
        let found: Vec<usize> = loss.steps.iter().map(|s| s.count).collect();
        assert_eq!(found, counts);
        // Paths carry their states in f32.
        for (step, found) in loss.steps.iter().enumerate() {
            let off = (found.loss / of_step(step) - 1.0).abs();
            assert!(
                off < 1e-4,
                "{name}, step {step}: {} for {}",
                found.loss,
                of_step(step)
            );
        }
        assert!(
            (loss.total / expected - 1.0).abs() < 1e-4,
            "{name}: {}",
            loss.total
        );
        // Every form's gradients are those of f64, which comes first.
        match &gradients {
            None => gradients = Some(grads),
            Some(wide) => {
                for (parameter, grad) in &grads {
                    let found = off(&numbers(grad), &numbers(&wide[parameter]));
                    assert!(found < 1e-3, "{name}: {parameter} off by {found}");
                }
            }
        }
    }
}
