//! What a cycle costs where a target and its draft run: forwards of m rows and of a tree, the draft's step and whole tree,
//! the rule's look at a tree, and EAGLE-3 cycles, on the default model and on random weights of well-known shapes, beside
//! the time that reading the weights once takes.
//!
//! `SCYLLA_DEVICE=cuda cargo bench --features cuda --bench device`; `SCYLLA_SHAPES` lists shapes (smollm2, 1.1b, 8b),
//! `SCYLLA_FORMS` forms of the weights, `SCYLLA_THREADS` the threads of a CPU. `SCYLLA_RESULTS=FILE` keeps everything as
//! JSON; `--write-hf DIR` writes the default model for transformers instead, in bf16.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use candle_core::{DType, Device, Tensor};
use common::{best, median, memory, read_rate, rows, seconds};
use criterion::Criterion;
use half::bf16;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use scylla_core::assets::{DEFAULT_MODEL, cache_dir};
use scylla_core::chance::Seeded;
use scylla_core::engine::{self, Draft, Engine, Event, Options, Parts, Phases, Step as Recorded};
use scylla_core::model::{
    AttentionInput, Executor, LoadOptions, Loaded, ModelConfig, ModelFiles, Transformer,
    WeightForm, Weights, load_on, parse_device,
};
use scylla_core::plugin::{Committed, DraftModel, Request, SlotRows, Step, Tap, TargetModel, Want};
use scylla_core::sampling::Sampling;
use scylla_core::tree::Budget;
use scylla_draft::checkpoint::{
    Backbone, Checkpoint, DraftConfig, Eagle3Config, HeldTensor, default_taps, entries, offsets_of,
};
use scylla_draft::network::{self, DraftHost, Network, Nodes};
use scylla_draft::tree::{TreeDraft, TreeSettings};
use scylla_tests::{RandomWeights, llama_shape};
use scylla_verify::Greedy;
use serde_json::{Value, json};

/// Tokens in the cache while forwards are timed.
const CONTEXT: usize = 512;
const BUDGET: Budget = Budget {
    total: 60,
    width: 10,
    depth: 5,
};
const CYCLES: usize = 24;

fn setting(name: &str, usual: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| usual.into())
}

fn options() -> LoadOptions {
    let device = setting("SCYLLA_DEVICE", "cpu");
    LoadOptions {
        threads: setting("SCYLLA_THREADS", "0").parse().expect("threads"),
        device: parse_device(&device).expect("device"),
        ..LoadOptions::default()
    }
}

fn default_model() -> ModelFiles {
    let given = std::env::var_os("SCYLLA_MODEL").map(PathBuf::from);
    let path = given.unwrap_or_else(|| {
        let cache = cache_dir().expect("a cache directory");
        DEFAULT_MODEL.fetch(&cache, &mut |_| {}).expect("the model")
    });
    ModelFiles::open(&path).expect("opens")
}

/// A target of a shape, with random weights where it is not the default model.
fn target(shape: &str, form: WeightForm, executor: &Arc<dyn Executor>) -> Loaded {
    let config = match shape {
        "smollm2" => {
            let options = LoadOptions {
                weights: form,
                context: 2048,
                ..LoadOptions::default()
            };
            return load_on(&default_model(), &options, Arc::clone(executor)).expect("loads");
        }
        "1.1b" => llama_shape(22, 2048, 5632, (32, 4), 32000, false),
        "8b" => llama_shape(32, 4096, 14336, (32, 8), 128_256, false),
        other => panic!("shape {other}: expected smollm2, 1.1b or 8b"),
    };
    let from = RandomWeights::new(form);
    let model = Transformer::read(&from, &config, 2048, Arc::clone(executor)).expect("reads");
    Loaded {
        weight_bytes: model.weight_bytes(),
        forms: model.forms(),
        cache_bytes: model.cache_bytes(),
        tokens: model.tokens().clone(),
        model: Box::new(model),
        executor: Arc::clone(executor),
        config,
    }
}

/// A random EAGLE-3 draft for a target, of one of its layers.
fn eagle3(target: &ModelConfig, host: &DraftHost) -> Checkpoint {
    let mut layer = target.layers[0].clone();
    layer.input = AttentionInput::Beside(2 * target.hidden);
    let draft_vocab = target.vocab.min(32_000) / 4;
    let config = DraftConfig::Eagle3(Eagle3Config {
        backbone: Backbone {
            vocab: target.vocab,
            hidden: target.hidden,
            context: target.context,
            eps: target.norm_eps,
            layers: vec![layer],
        },
        speculators: false,
        draft_vocab,
        target_hidden: target.hidden,
        taps: Some(default_taps(target.layers.len()).expect("deep").to_vec()),
        tap_count: 3,
        norm_before_residual: false,
        norm_before_fc: false,
        fc_norm: false,
        norm_output: false,
    });
    let weights = RandomWeights::new(WeightForm::AsIs);
    let targets: Vec<u32> = (0..draft_vocab as u32).map(|i| i * 4).collect();
    let mut tensors = BTreeMap::new();
    for entry in entries(&config, &|_| false) {
        let held = match entry.name.as_str() {
            _ if entry.optional => continue,
            "d2t" => HeldTensor {
                dtype: Dtype::I64,
                bytes: offsets_of(&targets)
                    .into_iter()
                    .flat_map(i64::to_le_bytes)
                    .collect(),
                shape: entry.shape,
            },
            "t2d" => HeldTensor {
                dtype: Dtype::BOOL,
                bytes: (0..target.vocab)
                    .map(|t| u8::from(t.is_multiple_of(4) && t / 4 < draft_vocab))
                    .collect(),
                shape: entry.shape,
            },
            name => HeldTensor {
                dtype: Dtype::BF16,
                bytes: {
                    let found = weights.find(name, &entry.shape).expect("random");
                    found.raw().expect("finite").bytes.into_owned()
                },
                shape: entry.shape,
            },
        };
        tensors.insert(entry.name, held);
    }
    Checkpoint::in_memory(config, tensors, &host.target, host.weights).expect("fits")
}

/// Parents of a tree of 60 rows: ten children of the root, each of which has five, the last four.
fn tree() -> Vec<Option<usize>> {
    (0..BUDGET.total)
        .map(|i| match i {
            0 => None,
            1..=10 => Some(0),
            i => Some(1 + (i - 11) / 5),
        })
        .collect()
}

/// Bytes a second that a device reads and writes when it copies.
fn bandwidth(device: &Device, executor: &dyn Executor) -> f64 {
    if let Some(pool) = executor.pool() {
        let data = memory();
        return best(&std::array::from_fn::<_, 8, _>(|_| read_rate(pool, &data)));
    }
    let values = 1usize << 28;
    let from = Tensor::zeros(values, DType::F32, device).expect("memory");
    let copy = || {
        let to = from.copy().expect("copies");
        device.synchronize().expect("waits");
        drop(to);
    };
    copy();
    let rates: Vec<f64> = (0..8)
        .map(|_| (2 * 4 * values) as f64 / seconds(copy))
        .collect();
    best(&rates)
}

fn tokens(n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| 1000 + i * 7).collect()
}

/// A target whose slot 0 holds a prompt, with the taps of its rows.
fn fill(target: &mut dyn TargetModel, taps: &[Tap]) -> Vec<scylla_core::plugin::Matrix> {
    let prompt = tokens(CONTEXT);
    target.open(0).expect("open");
    let mut step = rows(&prompt, Want::None);
    step.taps = taps;
    let mut found = target.forward(&step).expect("prefill");
    target
        .commit(0, &(0..CONTEXT).collect::<Vec<_>>())
        .expect("commit");
    found.taps.swap_remove(0)
}

fn forwards(c: &mut Criterion, title: &str, target: &mut Loaded) {
    let model = target.model.as_mut();
    fill(model, &[]);
    let mut group = c.benchmark_group(format!("forward {title}"));
    let nodes: Vec<usize> = (0..BUDGET.total).collect();
    for m in [1usize, 2, 4, 8, 16, 32] {
        let tokens = tokens(m);
        // With the look at the logits that a rule takes: until then a device may not even have begun.
        group.bench_function(m.to_string(), |b| {
            b.iter(|| {
                let found = model.forward(&rows(&tokens, Want::All)).expect("forward");
                let best = found.logits[0].argmax(&nodes[..m], usize::MAX);
                model.commit(0, &[]).expect("drop the rows");
                model.recycle(found);
                best.expect("argmax")
            });
        });
    }
    let (tokens, parents) = (tokens(BUDGET.total), tree());
    let step = |want| Step {
        slots: vec![SlotRows {
            slot: 0,
            tokens: &tokens,
            parents: &parents,
            want,
        }],
        taps: &[],
    };
    group.bench_function("tree of 60", |b| {
        b.iter(|| {
            let found = model.forward(&step(Want::All)).expect("forward");
            let best = found.logits[0].argmax(&nodes, usize::MAX);
            model.commit(0, &[]).expect("drop the rows");
            model.recycle(found);
            best.expect("argmax")
        });
    });
    group.finish();
    let found = model.forward(&step(Want::All)).expect("forward");
    let mut group = c.benchmark_group(format!("rule {title}"));
    group.bench_function("argmax of 60 nodes", |b| {
        b.iter(|| found.logits[0].argmax(&nodes, usize::MAX).expect("argmax"));
    });
    group.bench_function("one row to the host", |b| {
        b.iter(|| found.logits[0].row(7).expect("row").into_owned());
    });
    group.finish();
    model.close(0);
}

fn drafts(c: &mut Criterion, title: &str, target: &mut Loaded, checkpoint: &Checkpoint) {
    let host = DraftHost::of(target);
    let build = || network::eagle3_of(checkpoint, None, &host).expect("builds");
    let mut network = build();
    let taps = fill(target.model.as_mut(), &network.taps());
    target.model.close(0);
    let prompt = tokens(CONTEXT + 1);
    let path: Vec<usize> = (0..CONTEXT).collect();
    let committed = Committed {
        slot: 0,
        tokens: &prompt,
        path: &path,
        taps: &taps,
    };
    network.open(0).expect("open");
    network.observe(&committed).expect("observe");
    let mut logits = Default::default();
    let level = tokens(BUDGET.width);
    let mut group = c.benchmark_group(format!("draft {title}"));
    group.bench_function("step of 10", |b| {
        b.iter(|| {
            network.start(&[0], &mut logits).expect("start");
            let nodes = Nodes {
                slot: 0,
                tokens: &level,
                parents: &[None; BUDGET.width],
            };
            network.expand(&[nodes], &mut logits).expect("expand");
            logits.top_log_probabilities(usize::MAX, BUDGET.width)
        });
    });
    let mut draft = TreeDraft::new(build(), &TreeSettings::default()).expect("draft");
    draft.open(0).expect("open");
    draft.observe(&[committed]).expect("observe");
    let sampling = Sampling::default();
    group.bench_function("tree of 60", |b| {
        b.iter(|| {
            let request = Request {
                slot: 0,
                root: prompt[CONTEXT],
                budget: BUDGET,
                sampling: &sampling,
                chance: &mut Seeded::new(0, 0),
            };
            draft.propose(&mut [request]).expect("propose")
        });
    });
    group.finish();
}

/// Medians of the phases of EAGLE-3 cycles, in milliseconds; a random draft is hardly ever accepted.
fn cycles(target: &mut Loaded, checkpoint: &Checkpoint) -> Value {
    let host = DraftHost::of(target);
    let network = network::eagle3_of(checkpoint, None, &host).expect("builds");
    let mut draft = TreeDraft::new(network, &TreeSettings::default()).expect("draft");
    let mut run = |draft: Option<&mut TreeDraft>, budget: Budget| {
        let target = &mut target.model;
        let parts = match draft {
            Some(draft) => Parts::drafted(target, Draft::new("eagle3", draft), Greedy),
            None => Parts::plain(target, Greedy),
        };
        let mut engine = Engine::new(parts, Options::default()).expect("an engine");
        let request = engine::Request {
            prompt: tokens(CONTEXT),
            max_new_tokens: CYCLES,
            budget,
            ..engine::Request::default()
        };
        engine.submit(request).expect("taken");
        let (mut steps, mut prefill_ms) = (Vec::<Recorded>::new(), 0.0);
        while !engine.is_idle() {
            for event in engine.step() {
                match event {
                    Event::Step(step) if step.batch > 0 => steps.push(step),
                    Event::Step(step) => prefill_ms += step.ms.decode(),
                    _ => {}
                }
            }
        }
        let phase =
            |of: fn(&Phases) -> f64| median(steps.iter().map(|step| of(&step.ms)).collect());
        json!({
            "cycle_ms": phase(|p| p.decode()),
            "propose_ms": phase(|p| p.propose),
            "forward_ms": phase(|p| p.forward),
            "accept_ms": phase(|p| p.accept),
            "commit_ms": phase(|p| p.commit),
            "prefill_ms": prefill_ms,
        })
    };
    json!({
        "plain": run(None, Budget::OFF),
        "eagle3": run(Some(&mut draft), BUDGET),
    })
}

/// What criterion measured, by group and name, in milliseconds.
fn estimates(home: &Path) -> BTreeMap<String, Value> {
    let mut found = BTreeMap::new();
    let list = |dir: &Path| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        entries.map(|e| e.path()).collect()
    };
    let read = |path: PathBuf| -> Option<Value> {
        serde_json::from_str(&std::fs::read_to_string(path).ok()?).ok()
    };
    for bench in list(home).iter().flat_map(|group| list(group)) {
        let new = bench.join("new");
        let (Some(what), Some(times)) = (
            read(new.join("benchmark.json")),
            read(new.join("estimates.json")),
        ) else {
            continue;
        };
        let ms = |v: &Value| v.as_f64().unwrap_or(f64::NAN) / 1e6;
        let median = &times["median"];
        let interval = &median["confidence_interval"];
        let title = what["full_id"].as_str().unwrap_or_default().to_string();
        let value = json!({
            "median_ms": ms(&median["point_estimate"]),
            "low_ms": ms(&interval["lower_bound"]),
            "high_ms": ms(&interval["upper_bound"]),
        });
        found.insert(title, value);
    }
    found
}

/// Writes the default model as transformers reads it.
fn write_hf(dir: &Path) {
    let files = default_model();
    let c = &files.config;
    let weights = files.weights(WeightForm::F32);
    let all: Vec<(String, Vec<usize>, Vec<u8>)> = c
        .tensors()
        .into_iter()
        .map(|(name, shape)| {
            let found = weights.find(&name, &shape).expect("there");
            let values = found.weight().expect("reads").to_f32();
            let bytes = values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes());
            let bytes = bytes.collect();
            (name, shape, bytes)
        })
        .collect();
    let views = all.iter().map(|(name, shape, bytes)| {
        let view = TensorView::new(Dtype::BF16, shape.clone(), bytes).expect("view");
        (name.as_str(), view)
    });
    std::fs::create_dir_all(dir).expect("directory");
    let format = [("format".to_string(), "pt".to_string())].into();
    let bytes = safetensors::serialize(views, Some(format)).expect("serialises");
    std::fs::write(dir.join("model.safetensors"), bytes).expect("writes");
    let layer = &c.layers[0];
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": c.vocab,
        "hidden_size": c.hidden,
        "intermediate_size": layer.ffn,
        "num_hidden_layers": c.layers.len(),
        "num_attention_heads": layer.heads,
        "num_key_value_heads": layer.kv_heads,
        "head_dim": layer.head_dim,
        "rms_norm_eps": f64::from(layer.eps),
        "rope_theta": layer.rope.theta,
        "max_position_embeddings": c.context,
        "tie_word_embeddings": c.tied,
        "torch_dtype": "bfloat16",
    });
    std::fs::write(dir.join("config.json"), config.to_string()).expect("writes");
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    if let Some(at) = args.iter().position(|a| a == "--write-hf") {
        return write_hf(Path::new(args.get(at + 1).expect("a directory")));
    }
    let options = options();
    let executor = options.executor();
    let rate = bandwidth(&options.device, &*executor);
    println!("{:?}: {:.0} GB/s", options.device, rate / 1e9);
    let home = tempfile::tempdir().expect("a directory");
    let mut criterion = Criterion::default()
        .output_directory(home.path())
        .without_plots()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(700));
    let mut shapes = Vec::new();
    for shape in setting("SCYLLA_SHAPES", "smollm2,1.1b").split(',') {
        for form in setting("SCYLLA_FORMS", "as-is").split(',') {
            let form: WeightForm = form.parse().expect("form");
            let title = format!("{shape} {form}");
            let mut loaded = target(shape, form, &executor);
            let bytes = loaded.weight_bytes;
            let once = bytes as f64 / rate * 1e3;
            println!(
                "{title}: {:.0} MB of {:?}, read once in {once:.3} ms",
                bytes as f64 / 1e6,
                loaded.forms
            );
            forwards(&mut criterion, &title, &mut loaded);
            let host = DraftHost::of(&loaded);
            let checkpoint = eagle3(&loaded.config, &host);
            drafts(&mut criterion, &title, &mut loaded, &checkpoint);
            let cycles = cycles(&mut loaded, &checkpoint);
            println!("{title}: {cycles:#}");
            shapes.push(json!({
                "shape": shape, "form": form.to_string(), "weight_bytes": bytes, "forms": loaded.forms,
                "read_once_ms": once, "cycles": cycles,
            }));
        }
    }
    if let Some(path) = std::env::var_os("SCYLLA_RESULTS") {
        let all = json!({
            "device": setting("SCYLLA_DEVICE", "cpu"), "threads": options.thread_count(), "context": CONTEXT,
            "bytes_per_s": rate, "shapes": shapes, "benches": estimates(home.path()),
        });
        let text = serde_json::to_string_pretty(&all).expect("serialises");
        std::fs::write(path, text + "\n").expect("writes");
    }
}
