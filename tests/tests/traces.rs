//! A replay of a dense trace against decoding with the draft itself.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use proptest::prelude::*;
use safetensors::Dtype;
use scylla_bench::experiment::Experiment;
use scylla_bench::prompts::Prompt;
use scylla_bench::trace::{Reader, Recorder, Replay, Writer, replay};
use scylla_bench::{Override, Registry, Session};
use scylla_core::engine::{Options, decode};
use scylla_tests::{LETTERS, Tiny, TinyDraft, byte_level_tokenizer, default_model, write_hf};
use serde_json::json;

fn overrides(sets: &[String]) -> Vec<Override> {
    Override::parse_all(sets).expect("overrides")
}

fn experiment(sets: &[String]) -> Experiment {
    Experiment::from_overrides(&overrides(sets)).expect("an experiment")
}

fn budget(total: usize, width: usize, depth: usize) -> Vec<String> {
    [("total", total), ("width", width), ("depth", depth)]
        .map(|(key, value)| format!("budget.{key}={value}"))
        .to_vec()
}

/// Nodes and accepted tokens of each cycle.
type Cycles = Vec<(usize, usize)>;

/// Records a trace with one set of settings.
fn record(session: &mut Session, sets: &[String], prompts: &[Prompt], path: &Path) {
    let spec = experiment(sets);
    let registry = Registry::default();
    let mut composed = session.compose(&registry, &spec).expect("composed");
    let mut recorder = Recorder {
        session,
        draft: composed.draft.as_mut().expect("a draft"),
        name: composed.name.clone(),
        spec: &spec,
    };
    let header = recorder.header().expect("a header");
    let mut writer = Writer::new(path, header).expect("a file");
    let stop = AtomicBool::new(false);
    let skipped = recorder.run(prompts, &mut writer, &stop, &mut || {});
    assert_eq!(skipped.expect("recorded"), []);
}

fn replayed(path: &Path, sets: &[String]) -> (f64, Cycles) {
    let mut reader = Reader::open(path).expect("a trace");
    let settings = Replay::of(reader.header(), &overrides(sets)).expect("settings");
    let mut cycles = Vec::new();
    let told = &mut |_, nodes, accepted| cycles.push((nodes, accepted));
    let found = replay(&Registry::default(), &mut reader, &settings, told).expect("replayed");
    (found.tau, cycles)
}

/// The same prompts decoded greedily with the draft, one turn each.
fn decoded(session: &mut Session, sets: &[String], prompts: &[Prompt]) -> (f64, Cycles) {
    let spec = experiment(sets);
    let mut composed = session
        .compose(&Registry::default(), &spec)
        .expect("composed");
    let requests = prompts.iter().map(|prompt| {
        let messages = [scylla_core::text::Message::user(&prompt.turns[0])];
        let ids = session.prompt(&messages, &spec.prompts).expect("ids");
        session.request(&spec, &composed, ids, 0)
    });
    let requests = requests.collect();
    let mut engine = session
        .engine(&mut composed, Options::default())
        .expect("an engine");
    let outputs = decode(&mut engine, requests, &mut |_| ControlFlow::Continue(()));
    let cycles = outputs.iter().flat_map(|o| &o.cycles);
    let tokens: usize = cycles.clone().map(|c| c.committed).sum();
    let cycles: Cycles = cycles.map(|c| (c.nodes, c.accepted)).collect();
    (tokens as f64 / cycles.len() as f64, cycles)
}

fn prompts(texts: &[&str]) -> Vec<Prompt> {
    let prompt = |(i, text): (usize, &&str)| Prompt {
        id: i.to_string(),
        category: "any".into(),
        system: None,
        turns: vec![(*text).into()],
    };
    texts.iter().enumerate().map(prompt).collect()
}

/// A folder with a tiny target that talks, and drafts that are right now and then: another model of its family, which shares
/// its embedding, and a random EAGLE head.
fn place(seed: u64) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a folder");
    let tiny = Tiny {
        vocab: LETTERS,
        hidden: 32,
        ffn: 48,
        heads: 2,
        kv_heads: 1,
        tied: true,
        seed,
        ..Tiny::default()
    };
    let model = dir.path().join("model");
    std::fs::create_dir(&model).expect("created");
    write_hf(&tiny, &model, Dtype::F32, 1);
    let tokenizer = byte_level_tokenizer(&[]).to_string();
    std::fs::write(model.join("tokenizer.json"), tokenizer).expect("written");
    TinyDraft::new(&tiny, "eagle", json!({}), seed).write(&dir.path().join("eagle2"));
    dir
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn a_replay_has_the_cycles_of_decoding_with_the_draft(
        seed in 0u64..1000,
        (total, width, depth) in (2usize..40, 1usize..7, 0usize..5),
        (less_total, less_width, less_depth) in (0usize..40, 0usize..6, 0usize..5),
        tokens in 2usize..40,
        draft in 0usize..2,
        kind in 0usize..5,
        penalty in prop::sample::select(vec![1.0, 1.2]),
    ) {
        let place = place(seed);
        let model = place.path().join("model");
        // The target's weights in four bits: alike, and not the same.
        let draft = match draft {
            0 => vec!["draft.name=draft-lm".into(), format!("draft.dir={}", model.display()), "draft.weights=q4".into()],
            _ => vec!["draft.name=eagle2".into(), format!("draft.dir={}", place.path().join("eagle2").display())],
        };
        let tree = ["dynamic", "chain", "static", "widths", "optimal"][kind];
        let mut tree = vec![format!("draft.tree={tree}")];
        match kind {
            3 => tree.push("draft.widths=[3, 1, 2]".into()),
            4 => tree.push("draft.alpha=[[0.5, 0.2, 0.1], [0.4, 0.3]]".into()),
            _ => {}
        }
        let shared = [
            vec![
                format!("target.model={}", model.display()),
                format!("run.max_new_tokens={tokens}"),
                "run.ignore_eos=true".into(),
                "run.threads=1".into(),
                "prompts.raw=true".into(),
                format!("sampling.repetition_penalty={penalty}"),
            ],
            draft,
        ].concat();
        let asked = prompts(&["abc abc", "the"]);
        let mut session = Session::open(&experiment(&shared), &mut |_| {}).expect("a session");
        let path = place.path().join("dense.jsonl");
        record(&mut session, &[&shared[..], &budget(total, width, depth)].concat(), &asked, &path);
        let less = budget(
            total.saturating_sub(less_total).max(1),
            width.saturating_sub(less_width).max(1),
            depth.saturating_sub(less_depth),
        );
        let again = [less, tree].concat();
        let expected = decoded(&mut session, &[&shared[..], &again[..]].concat(), &asked);
        prop_assert_eq!(replayed(&path, &again), expected);
    }
}

#[test]
fn a_replay_with_the_shipped_draft_has_the_cycles_of_decoding_with_it() {
    if default_model("a replay with the shipped draft").is_none() {
        return;
    }
    let draft = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/drafts/eagle3");
    let shared = vec![
        "draft.name=eagle3".into(),
        format!("draft.dir={}", draft.display()),
        "run.max_new_tokens=40".to_string(),
    ];
    let asked = prompts(&[
        "What is the capital of France, and what is it known for?",
        "Add 17 and 25, then double the sum.",
    ]);
    let mut session = Session::open(&experiment(&shared), &mut |_| {}).expect("a session");
    let place = tempfile::tempdir().expect("a folder");
    let path = place.path().join("dense.jsonl");
    let most = [&shared[..], &budget(30, 6, 4)].concat();
    record(&mut session, &most, &asked, &path);
    for (sets, tree) in [
        (budget(30, 6, 4), "dynamic"),
        (budget(20, 5, 4), "dynamic"),
        (budget(8, 2, 3), "dynamic"),
        (budget(5, 1, 3), "chain"),
        (budget(26, 4, 4), "static"),
    ] {
        let again = [sets, vec![format!("draft.tree={tree}")]].concat();
        let (tau, cycles) = decoded(&mut session, &[&shared[..], &again[..]].concat(), &asked);
        assert!(tau > 1.1, "a draft that is right now and then: {tau}");
        assert_eq!(replayed(&path, &again), (tau, cycles), "{again:?}");
    }
}
