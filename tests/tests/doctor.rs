//! The doctor on trained drafts: sound ones, and ones with each usual mistake made on purpose.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use scylla_bench::data::documents::Document;
use scylla_bench::data::packing::{Position, Stream};
use scylla_bench::doctor::{Report, doctor};
use scylla_bench::experiment::Experiment;
use scylla_bench::train::{Learner, TrainExperiment, compute, teach};
use scylla_bench::{Override, Registry, Session};
use scylla_core::engine::{Engine, Options, Parts, Request, decode};
use scylla_core::plugin::{Matrix, Tap};
use scylla_core::sampling::Sampling;
use scylla_core::train::AdamWSettings;
use scylla_draft::recipe::TrainHost;
use scylla_tests::{LETTERS, default_model, write_letters};
use scylla_verify::Auto;
use serde_json::{Value, json};

/// A target that talks, in a folder.
struct Place {
    dir: tempfile::TempDir,
    model: PathBuf,
    session: Session,
    documents: Vec<Document>,
}

fn overrides(sets: &[String]) -> Vec<Override> {
    Override::parse_all(sets).expect("overrides")
}

impl Place {
    fn new(prompts: usize) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let model = dir.path().join("model");
        std::fs::create_dir(&model).expect("created");
        write_letters(&model);
        // How lines of this project's files begin.
        let ways = "pub fn |/// The |let mut |    fn |impl |# Er|assert|The d|use std|for (|match |struct |if let |return Err(|//! |#[test]|const |\
                    A row of |where |Ok(())|    }|        .map(|    pub |    let |enum |/// If |}\n\n|type |None =>|Some(|vec![|else {|while |true |&self|-> Result";
        let prompts = ways
            .split('|')
            .take(prompts)
            .enumerate()
            .map(|(i, text)| json!({"id": i, "prompt": text}).to_string());
        std::fs::write(
            dir.path().join("set.jsonl"),
            prompts.collect::<Vec<_>>().join("\n"),
        )
        .expect("written");
        let sets = [
            format!("target.model={}", model.display()),
            "run.threads=1".into(),
        ];
        let experiment = Experiment::from_overrides(&overrides(&sets)).expect("an experiment");
        let mut session = Session::open(&experiment, &mut |_| {}).expect("a session");
        let starts = (0..320).map(|i| vec![i % 90, (i * 7 + 3) % 90]).collect();
        let documents = said(&mut session, starts);
        Self {
            dir,
            model,
            session,
            documents,
        }
    }

    /// The default model, which goes on from the beginnings of English sentences.
    fn smollm2() -> Option<Self> {
        let model = default_model("mistakes of trainers for the default model")?;
        let dir = tempfile::tempdir().expect("a folder");
        let starts = "The history of|When I was a child|In the city of|To make bread,|The most important|A good teacher|Last summer we|\
                      Scientists have found|The river runs|If you want to|My grandmother used to|There are many|The first step is|\
                      Once upon a time|The government said|She opened the door|Water is a|The computer was|Music can|Every morning he|\
                      The forest is|In order to|He had never|The price of|Many people believe|The best way to|During the war|A small town";
        let others = "Birds fly south|The old house|Learning a new language|The teacher asked|On the first day|Plants need light|The city was built|\
                      When the train arrived,|A healthy diet|The story begins|Most scientists agree|After dinner, the family|The king ordered|\
                      To solve this problem,";
        let asked = starts
            .split('|')
            .step_by(4)
            .chain(others.split('|'))
            .enumerate();
        let asked = asked.map(|(i, text)| json!({"id": i, "prompt": text}).to_string());
        std::fs::write(
            dir.path().join("set.jsonl"),
            asked.collect::<Vec<_>>().join("\n"),
        )
        .expect("written");
        let experiment = Experiment::from_overrides(&[]).expect("an experiment");
        let mut session = Session::open(&experiment, &mut |_| {}).expect("a session");
        let learned = starts.split('|').enumerate().filter(|(i, _)| i % 4 != 0);
        let tokenizer = session.tokenizer().expect("a tokenizer");
        let ids: Vec<Vec<u32>> = learned
            .map(|(_, text)| tokenizer.encode(text).expect("ids"))
            .collect();
        let starts = ids.iter().cycle().take(320).cloned().collect();
        let documents = said(&mut session, starts);
        Some(Self {
            dir,
            model,
            session,
            documents,
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// What the doctor says of a draft.
    fn look(&mut self, name: &str, dir: &Path) -> Report {
        let sets = [
            format!("target.model={}", self.model.display()),
            "run.threads=1".into(),
            "run.max_new_tokens=48".into(),
            "run.ignore_eos=true".into(),
            format!("prompts.set={}", self.path("set.jsonl").display()),
            "prompts.part=all".into(),
            "prompts.per_task=0".into(),
            "prompts.raw=true".into(),
            "budget.total=20".into(),
            "budget.width=5".into(),
            "budget.depth=4".into(),
            format!("draft.name={name}"),
            format!("draft.dir={}", dir.display()),
        ];
        let experiment = Experiment::from_overrides(&overrides(&sets)).expect("an experiment");
        let stop = AtomicBool::new(false);
        doctor(
            &Registry::default(),
            &experiment,
            &mut self.session,
            &stop,
            &mut |_| {},
        )
        .expect("a report")
    }
}

/// Texts that the target draws.
fn said(session: &mut Session, starts: Vec<Vec<u32>>) -> Vec<Document> {
    let parts = Parts::plain(&mut session.target.model, Auto);
    let options = Options {
        batch: 16,
        ..Options::default()
    };
    let mut engine = Engine::new(parts, options).expect("an engine");
    let requests = (0..).zip(starts).map(|(i, prompt)| Request {
        prompt,
        sampling: Sampling {
            temperature: 0.8,
            ..Sampling::default()
        },
        seed: 0,
        sequence: i,
        max_new_tokens: 62,
        ..Request::default()
    });
    let requests: Vec<Request> = requests.collect();
    let prompts: Vec<Vec<u32>> = requests.iter().map(|r| r.prompt.clone()).collect();
    let outputs = decode(&mut engine, requests, &mut |_| ControlFlow::Continue(()));
    let document = |(prompt, output): (Vec<u32>, scylla_core::engine::Output)| {
        let tokens = [prompt, output.ids].concat();
        Document {
            name: String::new(),
            mask: vec![true; tokens.len()],
            tokens,
        }
    };
    prompts.into_iter().zip(outputs).map(document).collect()
}

/// What a trainer gets wrong.
#[derive(Clone, Copy, Default)]
struct Wrong {
    /// Features before the final norm; what the target says is right all the same.
    before_norm: bool,
    /// Rows by which features are off, and with them what is learned.
    shift: isize,
    /// Not what is learned.
    features_alone: bool,
}

/// Trains a draft on the target's own texts and writes it.
fn train(
    place: &mut Place,
    name: &str,
    more: &str,
    seed: u64,
    wrong: Wrong,
    steps: u64,
) -> PathBuf {
    let text = format!(
        "target = {{ model = 'default' }}\ndraft = {{ name = '{name}'{more} }}\ntrain = {{ length = 64, batch = 8, products = 'f32' }}\n\
         run = {{ threads = 1, seed = {seed} }}\n{}[[stage]]\nname = 'a'\nsteps = {steps}\ndata = {{ files = ['x'] }}\n",
        if name == "eagle3" {
            "loss = { unroll = 3 }\n"
        } else {
            ""
        }
    );
    let table = text.parse().expect("TOML");
    let experiment = TrainExperiment::from_table(table, &[]).expect("an experiment");
    let large = place.session.target.config.vocab > LETTERS;
    let form = (!large).then_some(scylla_core::kernels::ProductForm::F32);
    let on = compute(&place.session, form).expect("kernels");
    let host = TrainHost::new(&on, &place.session.target.tokens).expect("a host");
    let ids: Vec<u32> = match large {
        false => (0..LETTERS as u32).filter(|id| id % 9 != 8).collect(),
        true => often(&place.documents, 1024),
    };
    let ids = (name == "eagle3").then_some(ids);
    let mut learner = Learner::begin(&experiment, &place.session, &host, ids).expect("a learner");
    let taps = learner.taps();
    learner.fed_by(&taps).expect("its states");
    let layers = place.session.target.model.shape().layers;
    let mut fed = taps.clone();
    if wrong.before_norm {
        let early = |tap: &mut Tap| *tap = Tap::Input(layers);
        fed.iter_mut().filter(|t| **t == Tap::Final).for_each(early);
        fed.push(Tap::Final);
    }
    let documents = std::mem::take(&mut place.documents);
    let mut stream = Stream::new(&documents, 64, seed, Position::default()).expect("a stream");
    let settings = AdamWSettings::default();
    for step in 0..steps {
        let lines = stream.lines(8).expect("lines");
        let mut taught = teach(&mut *place.session.target.model, lines, &fed).expect("taught");
        if wrong.before_norm {
            let normed = taught.states.pop().expect("the final state");
            taught.logits = Some(host.head.logits(&on, &normed).expect("logits"));
        }
        let last = taught.states.len() - usize::from(wrong.features_alone);
        for state in &mut taught.states[..last] {
            let rows = shifted(&taught.lines.rows.documents, wrong.shift);
            let mut moved = Matrix::default();
            moved.append(&[&*state], &rows).expect("rows");
            *state = moved;
        }
        let (_, grads) = learner.learn(&taught, step).expect("a loss");
        let rate = if large { 1e-3 } else { 5e-3 };
        let rate = rate * (1.0 - step as f64 / steps as f64);
        learner.step(&settings, rate, &grads).expect("a step");
    }
    drop(stream);
    place.documents = documents;
    let dir = place.path(&format!("{name}-{seed}"));
    learner.export(&place.session, &dir).expect("written");
    dir
}

/// The most frequent tokens, ascending.
fn often(documents: &[Document], count: usize) -> Vec<u32> {
    let mut times = std::collections::BTreeMap::<u32, usize>::new();
    for &token in documents.iter().flat_map(|d| &d.tokens) {
        *times.entry(token).or_default() += 1;
    }
    let mut ids: Vec<u32> = times.keys().copied().collect();
    ids.sort_by_key(|id| std::cmp::Reverse(times[id]));
    ids.truncate(count);
    ids.sort_unstable();
    ids
}

/// For each row the row of its document that is `shift` further.
fn shifted(documents: &Arc<[std::ops::Range<usize>]>, shift: isize) -> Vec<usize> {
    let of = |d: &std::ops::Range<usize>| {
        let (start, end) = (d.start, d.end);
        (start..end)
            .map(move |row| row.saturating_add_signed(shift).clamp(start, end - 1))
            .collect::<Vec<_>>()
    };
    documents.iter().flat_map(of).collect()
}

/// A file of a draft's folder, changed.
fn edit_config(dir: &Path, edit: impl FnOnce(&mut Value)) {
    let path = dir.join("config.json");
    let mut config = serde_json::from_slice(&std::fs::read(&path).expect("read")).expect("JSON");
    edit(&mut config);
    std::fs::write(path, config.to_string()).expect("written");
}

/// Writes target ids where offsets are meant; `marks` keeps the map the other way, which then contradicts.
fn ids_for_offsets(dir: &Path, marks: bool) {
    let path = dir.join("model.safetensors");
    let bytes = std::fs::read(&path).expect("read");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let mut held: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    for (name, view) in file.tensors() {
        let mut data = view.data().to_vec();
        if name == "d2t" {
            for (i, offset) in data.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                *offset = (i64::from_le_bytes(*offset) + i as i64).to_le_bytes();
            }
        }
        if marks || name != "t2d" {
            held.push((name, view.dtype(), view.shape().to_vec(), data));
        }
    }
    let views = held.iter().map(|(name, dtype, shape, data)| {
        (
            name.as_str(),
            TensorView::new(*dtype, shape.clone(), data).expect("a view"),
        )
    });
    let bytes = safetensors::serialize(views, None).expect("serialised");
    std::fs::write(path, bytes).expect("written");
}

/// A copy of a draft with something done to it.
fn copied(dir: &Path, to: &Path, change: &dyn Fn(&Path)) {
    let _ = std::fs::remove_dir_all(to);
    std::fs::create_dir(to).expect("created");
    for entry in std::fs::read_dir(dir).expect("a folder") {
        let path = entry.expect("an entry").path();
        std::fs::copy(&path, to.join(path.file_name().expect("a name"))).expect("copied");
    }
    change(to);
}

/// The first finding is the mistake, undoing it gives back what the sound draft has, and it is named.
fn named(report: &Report, check: &str, instead: &str, about: &str) {
    assert_eq!(report.verdict, check, "{about}: {report:#?}");
    let first = &report.findings[0];
    assert_eq!(first.check, check, "{about}");
    assert!(first.expected.contains(instead), "{about}: {first:?}");
}

/// Mistakes in a draft's files: what is named, what it should be, and how it is made. Of a target whose usual taps are `taps`.
type Mistake<'a> = (&'static str, String, Box<dyn Fn(&Path) + 'a>);

fn mistakes(taps: [usize; 3], theta: f64, wrong: f64) -> Vec<Mistake<'static>> {
    let moved = |by: isize| taps.map(|t| t.saturating_add_signed(by));
    let tapped = move |by: isize| -> Box<dyn Fn(&Path)> {
        let moved = moved(by);
        Box::new(move |dir: &Path| {
            edit_config(dir, |c| {
                c["eagle_aux_hidden_state_layer_ids"] = json!(moved)
            });
        })
    };
    vec![
        ("taps", format!("input of layer {},", taps[0]), tapped(1)),
        ("taps", format!("input of layer {},", taps[0]), tapped(-1)),
        (
            "norm_before_residual",
            "false".into(),
            Box::new(|dir| edit_config(dir, |c| c["norm_before_residual"] = json!(true))),
        ),
        (
            "d2t",
            "ids".into(),
            Box::new(|dir| ids_for_offsets(dir, true)),
        ),
        (
            "d2t",
            "ids".into(),
            Box::new(|dir| ids_for_offsets(dir, false)),
        ),
        (
            "rope",
            format!("base {theta}"),
            Box::new(move |dir| {
                edit_config(dir, |c| {
                    c["rope_theta"] = json!(wrong);
                    c["rope_parameters"]["rope_theta"] = json!(wrong);
                });
            }),
        ),
    ]
}

#[test]
fn a_mistake_in_the_files_of_a_trained_draft_is_named_first() {
    let mut place = Place::new(12);
    let dir = train(
        &mut place,
        "eagle3",
        ", vocab = 87",
        0,
        Wrong::default(),
        300,
    );
    let sound = place.look("eagle3", &dir);
    assert_eq!(sound.verdict, "ok", "{sound:#?}");
    assert!(
        sound.tau > 2.0 && sound.tau > sound.scale.ngram,
        "{sound:#?}"
    );
    assert!(
        sound.scale.untrained < 1.2 && sound.scale.random < 1.2,
        "{sound:#?}"
    );
    let to = place.path("wrong");
    for (check, instead, make) in mistakes([2, 3, 4], 10000.0, 500000.0) {
        copied(&dir, &to, &make);
        let report = place.look("eagle3", &to);
        named(&report, check, &instead, check);
        let first = &report.findings[0];
        assert_eq!(first.tau_if_undone, Some(sound.tau), "{check}");
        assert!(
            report.tau <= sound.tau,
            "{check}: {} of {}",
            report.tau,
            sound.tau
        );
    }
}

#[test]
fn a_mistake_of_the_trainer_is_named_first() {
    let mut place = Place::new(33);
    let cases = [
        (
            "eagle2",
            "",
            Wrong {
                before_norm: true,
                ..Wrong::default()
            },
            "feature",
            "before the norm",
        ),
        (
            "scylla",
            ", layers = 2",
            Wrong {
                before_norm: true,
                ..Wrong::default()
            },
            "feature",
            "before the norm",
        ),
        // Features and goals one row ahead of the ids: ids that were not shifted.
        (
            "eagle2",
            "",
            Wrong {
                shift: 1,
                ..Wrong::default()
            },
            "pairing",
            "token i beside feature i",
        ),
        (
            "scylla",
            ", layers = 2",
            Wrong {
                shift: 1,
                ..Wrong::default()
            },
            "pairing",
            "token i beside feature i",
        ),
        (
            "eagle3",
            ", vocab = 87",
            Wrong {
                shift: 1,
                ..Wrong::default()
            },
            "pairing",
            "token i beside feature i",
        ),
        (
            "eagle3",
            ", vocab = 87",
            Wrong {
                shift: -1,
                features_alone: true,
                ..Wrong::default()
            },
            "pairing",
            "feature i - 1",
        ),
    ];
    for (name, more, wrong, check, instead) in cases {
        let dir = train(&mut place, name, more, 1, wrong, 300);
        let report = place.look(name, &dir);
        named(&report, check, instead, name);
        std::fs::remove_dir_all(dir).expect("removed");
    }
}

#[test]
fn sound_drafts_are_found_sound_whatever_the_seed() {
    let mut place = Place::new(12);
    for seed in 0..20 {
        let (name, more) = [
            ("eagle3", ", vocab = 87"),
            ("eagle2", ""),
            ("scylla", ", layers = 2"),
        ][seed as usize % 3];
        let dir = train(
            &mut place,
            name,
            more,
            seed,
            Wrong::default(),
            60 + 5 * seed,
        );
        let report = place.look(name, &dir);
        assert_eq!(report.verdict, "ok", "seed {seed}: {report:#?}");
        std::fs::remove_dir_all(dir).expect("removed");
    }
}

#[test]
fn mistakes_around_the_shipped_draft_are_named_first() {
    around_the_shipped_draft(&[0, 3]);
}

/// Minutes: `cargo nextest run -p scylla-tests --test doctor --run-ignored only`.
#[test]
#[ignore = "measures the shipped draft under six mistakes, which takes minutes"]
fn each_mistake_around_the_shipped_draft_is_named_first() {
    around_the_shipped_draft(&[0, 1, 2, 3, 4, 5]);
}

/// Makes these of [`mistakes`].
fn around_the_shipped_draft(which: &[usize]) {
    let Some(model) = default_model("mistakes around the shipped draft") else {
        return;
    };
    let draft = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/drafts/eagle3");
    let sets = |dir: &Path| -> Vec<String> {
        vec![
            format!("target.model={}", model.display()),
            "prompts.part=dev".into(),
            "prompts.tasks=['chat', 'maths', 'question answering']".into(),
            "prompts.per_task=2".into(),
            "run.max_new_tokens=16".into(),
            "budget.total=10".into(),
            "budget.width=4".into(),
            "budget.depth=2".into(),
            "draft.name=eagle3".into(),
            format!("draft.dir={}", dir.display()),
        ]
    };
    let of =
        |dir: &Path| Experiment::from_overrides(&overrides(&sets(dir))).expect("an experiment");
    let mut session = Session::open(&of(&draft), &mut |_| {}).expect("a session");
    let stop = AtomicBool::new(false);
    let mut look = |dir: &Path| {
        doctor(
            &Registry::default(),
            &of(dir),
            &mut session,
            &stop,
            &mut |_| {},
        )
        .expect("a report")
    };
    let sound = look(&draft);
    assert_eq!(sound.verdict, "ok", "{sound:#?}");
    let place = tempfile::tempdir().expect("a folder");
    let to = place.path().join("wrong");
    let all = mistakes([2, 15, 27], 100000.0, 10000.0);
    let made = all.into_iter().enumerate();
    for (_, (check, instead, make)) in made.filter(|(i, _)| which.contains(i)) {
        copied(&draft, &to, &make);
        let report = look(&to);
        named(&report, check, &instead, check);
        assert_eq!(report.findings[0].tau_if_undone, Some(sound.tau), "{check}");
    }
}

/// Minutes: `cargo nextest run -p scylla-tests --test doctor --run-ignored only`.
#[test]
#[ignore = "trains drafts for the default model, which takes minutes"]
fn mistakes_of_a_trainer_for_the_default_model_are_named_first() {
    let Some(mut place) = Place::smollm2() else {
        return;
    };
    let sound = Wrong::default();
    let early = Wrong {
        before_norm: true,
        ..sound
    };
    let ahead = Wrong { shift: 1, ..sound };
    let scylla = ", layers = 1";
    let cases = [
        ("eagle2", "", sound, 300, "ok", ""),
        ("scylla", scylla, sound, 300, "ok", ""),
        ("scylla", scylla, early, 300, "feature", "before the norm"),
        // The token that is there already adds little, so what was learned of it takes time to show.
        (
            "eagle2",
            "",
            ahead,
            700,
            "pairing",
            "token i beside feature i",
        ),
    ];
    for (name, more, wrong, steps, check, instead) in cases {
        let dir = train(&mut place, name, more, 1, wrong, steps);
        let report = place.look(name, &dir);
        if check == "ok" {
            assert_eq!(report.verdict, "ok", "{name}: {report:#?}");
            assert!(report.tau > 1.3, "{name}: {report:#?}");
        } else {
            named(&report, check, instead, name);
        }
        std::fs::remove_dir_all(dir).expect("removed");
    }
}
