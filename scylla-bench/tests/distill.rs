//! Distillation across tokenizers, on tiny models.

mod common;

use std::collections::HashSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Value as Gguf;
use common::{CHATML, Place};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use scylla_bench::Registry;
use scylla_bench::data::documents::DataSpec;
use scylla_bench::distill::{
    CacheSpec, DistillExperiment, Distiller, Outcome, PairSpec, Told, pairs_of,
};
use scylla_core::text::Tokenizer;
use scylla_tests::{Tiny, byte_level_tokenizer, pair_tokenizer, write_gguf_with, write_letters};
use serde_json::{Value, json};

/// Every aligner, with settings by which a student learns a lot in few steps.
const ALIGNERS: [&str; 10] = [
    "name = 'ce'",
    "name = 'uld'",
    "name = 'mined'",
    "name = 'multilevel-ot', k = 20",
    "name = 'multilevel-ot', mode = 'reference-code'",
    "name = 'alm'",
    "name = 'gold', ce_weight = 1.0",
    "name = 'dskd'",
    "name = 'x-token'",
    "name = 'x-token', loss = 'h-kl'",
];

fn folder(dir: &Path, tokenizer: &Value, config: &Value) {
    std::fs::create_dir_all(dir).expect("folder");
    std::fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).expect("tokenizer");
    std::fs::write(dir.join("tokenizer_config.json"), config.to_string()).expect("config");
}

/// A teacher that has read sources, a tokenizer of another kind, and sources.
fn place() -> Place {
    let place = Place::new();
    let dir = place.dir.path();
    std::fs::create_dir(dir.join("teacher")).expect("folder");
    write_letters(&dir.join("teacher"));
    folder(
        &dir.join("teacher"),
        &byte_level_tokenizer(&[]),
        &json!({"bos_token": "\u{10a}"}),
    );
    let (file, _) = pair_tokenizer(&["<|end|>", "<|more|>"]);
    folder(&dir.join("pairs"), &file, &json!({"eos_token": "<|end|>"}));
    let ascii = |text: &str| -> String { text.chars().filter(char::is_ascii).collect() };
    std::fs::write(
        dir.join("learn.txt"),
        ascii(concat!(
            include_str!("../src/distill/trainer.rs"),
            include_str!("../src/distill/learn.rs"),
            include_str!("../src/distill/cache.rs"),
        )),
    )
    .expect("text");
    std::fs::write(
        dir.join("check.txt"),
        ascii(include_str!("../src/distill/pairs.rs")),
    )
    .expect("text");
    place
}

fn experiment(place: &Place, aligner: &str, more: &str) -> DistillExperiment {
    let text = format!(
        "teacher = {{ model = '{}' }}\n\
         student = {{ tokenizer = '{}', layers = 1, hidden = 48, heads = 3 }}\n\
         aligner = {{ {aligner} }}\n\
         data = {{ files = ['{}'], part = 'all', keep_out = [] }}\n\
         pairs = {{ bytes = 160, longest = 200 }}\n\
         optimizer = {{ lr = 8e-3 }}\n\
         evaluate = {{ every = 0, count = 24, files = ['{}'] }}\n\
         run = {{ times = false, threads = 2 }}\n{more}",
        place.path("teacher"),
        place.path("pairs"),
        place.path("learn.txt"),
        place.path("check.txt"),
    );
    let table = text.parse().expect("TOML");
    DistillExperiment::from_table(table, &[]).expect("an experiment")
}

const TRAIN: &str = "train = { batch = 4, steps = 60, products = 'f32' }\n";

fn begin(place: &Place, experiment: &DistillExperiment, out: &str, resume: bool) -> Distiller {
    let registry = Registry::default();
    let dir = place.path(out);
    let (dir, quiet) = (Path::new(&dir), &mut |_: Told<'_>| {});
    Distiller::new(
        &registry,
        experiment,
        Some((dir, resume)),
        &mut |_| {},
        quiet,
    )
    .expect("begins")
}

fn run(distiller: &mut Distiller) -> Outcome {
    let stop = AtomicBool::new(false);
    distiller.run(&stop, &mut |_| {}).expect("runs")
}

#[test]
fn a_student_learns_by_every_aligner_and_serves_as_it_was_scored() {
    let place = place();
    for (i, aligner) in ALIGNERS.iter().enumerate() {
        let experiment = experiment(&place, aligner, TRAIN);
        let out = format!("out-{i}");
        let mut distiller = begin(&place, &experiment, &out, false);
        let untaught = distiller.evaluate().expect("scores");
        let taught = run(&mut distiller);
        println!("{aligner}: {untaught:?}, {:?}", taught.scores);
        // Random weights know nothing of the vocabulary's 111 tokens; the letters of sources take about four bits.
        assert!(untaught.bits_per_byte > 5.0, "{untaught:?}");
        assert!(
            taught.scores.bits_per_byte < untaught.bits_per_byte - 1.0,
            "{aligner}: {untaught:?}, {taught:?}"
        );
        assert!(taught.scores.next_byte > untaught.next_byte, "{aligner}");
        assert_eq!((taught.steps, taught.scores.bytes), (60, untaught.bytes));
        // What was exported is what was scored.
        let student = format!(
            "student = {{ model = '{}' }}",
            place.path(&format!("{out}/best"))
        );
        let again = toml_with(&experiment, &student);
        let mut again = begin(&place, &again, &format!("again-{i}"), false);
        assert_eq!(
            again.evaluate().expect("scores"),
            taught.scores,
            "{aligner}"
        );
    }
    // And decodes like any model.
    let said = place.json(&[
        "generate",
        "--target",
        "out-3/best",
        "--prompt",
        "let x",
        "--raw",
        "--max-new-tokens",
        "8",
        "--json",
    ]);
    assert!(
        said["ids"].as_array().is_some_and(|ids| !ids.is_empty()),
        "{said}"
    );
}

#[test]
fn a_gguf_file_learns_and_becomes_a_folder() {
    let place = place();
    let file = byte_level_tokenizer(&[]);
    let mut tokens: Vec<(u64, String)> = file["model"]["vocab"]
        .as_object()
        .expect("tokens")
        .iter()
        .map(|(token, id)| (id.as_u64().expect("an id"), token.clone()))
        .collect();
    tokens.sort_unstable();
    let list = |of: &dyn Fn(&str) -> Gguf| {
        Gguf::Array(tokens.iter().map(|(_, token)| of(token)).collect())
    };
    let text = |text: &str| Gguf::String(text.into());
    let tiny = Tiny {
        vocab: tokens.len(),
        tied: true,
        ..Tiny::default()
    };
    let path = place.path("student.gguf");
    write_gguf_with(
        &tiny,
        Path::new(&path),
        GgmlDType::Q8_0,
        &[
            ("tokenizer.ggml.model", text("gpt2")),
            ("tokenizer.ggml.tokens", list(&text)),
            ("tokenizer.ggml.token_type", list(&|_| Gguf::I32(1))),
            ("tokenizer.ggml.merges", Gguf::Array(vec![text("a b")])),
            // A line feed, as the teacher has it.
            ("tokenizer.ggml.bos_token_id", Gguf::U32(95)),
        ],
    );
    let experiment = experiment(&place, "name = 'multilevel-ot', k = 20", TRAIN);
    let of = |model: &str| toml_with(&experiment, &format!("student = {{ model = '{model}' }}"));
    let mut distiller = begin(&place, &of(&path), "gguf", false);
    let untaught = distiller.evaluate().expect("scores");
    let taught = run(&mut distiller);
    assert!(
        taught.scores.bits_per_byte < untaught.bits_per_byte - 1.0,
        "{untaught:?}, {taught:?}"
    );
    let again = of(&place.path("gguf/best"));
    let again = begin(&place, &again, "again", false).evaluate();
    assert_eq!(again.expect("scores"), taught.scores);
}

/// The same with another student.
fn toml_with(experiment: &DistillExperiment, student: &str) -> DistillExperiment {
    let mut table: toml::Table = experiment.to_toml().expect("TOML").parse().expect("TOML");
    table.extend(student.parse::<toml::Table>().expect("a student"));
    DistillExperiment::from_table(table, &[]).expect("an experiment")
}

#[test]
fn a_run_that_was_broken_off_ends_with_the_same_bytes() {
    let place = place();
    for aligner in ["name = 'multilevel-ot'", "name = 'dskd'"] {
        let more = "train = { batch = 3, steps = 12, checkpoint = 5 }\n";
        let mut experiment = experiment(&place, aligner, more);
        experiment.evaluate.every = 6;
        let (whole, broken) = (
            format!("whole-{}", aligner.len()),
            format!("broken-{}", aligner.len()),
        );
        run(&mut begin(&place, &experiment, &whole, false));
        let stop = AtomicBool::new(false);
        let mut first = begin(&place, &experiment, &broken, false);
        let error = first.run(&stop, &mut |told| {
            if let Told::Step(step, ..) = told {
                stop.store(step.step == 7, Ordering::Relaxed);
            }
        });
        assert!(
            error
                .expect_err("broken off")
                .to_string()
                .contains("step 7")
        );
        run(&mut begin(&place, &experiment, &broken, true));
        for name in [
            "checkpoint.safetensors",
            "metrics.jsonl",
            "best/model.safetensors",
        ] {
            let read = |out: &str| std::fs::read(place.path(&format!("{out}/{name}"))).expect(name);
            assert!(read(&whole) == read(&broken), "{aligner}: {name}");
        }
        // What it was begun with is what it goes on with.
        let mut other = experiment.clone();
        other.optimizer.lr = 1e-3;
        let dir = place.path(&broken);
        let refused = Distiller::new(
            &Registry::default(),
            &other,
            Some((Path::new(&dir), true)),
            &mut |_| {},
            &mut |_| {},
        );
        let refused = refused.err().expect("refused").to_string();
        assert!(refused.contains("optimizer.lr"), "{refused}");
    }
}

#[test]
fn what_a_student_says_of_tasks_is_scored_against_all_right_answers() {
    let place = place();
    let rows = "question,context,answer1,answer2\nWho was there?,\"Once there was a king, and he was old.\",A king.,the king\n\
                Who was old?,The queen was old.,The queen.,a queen\n";
    let rows = rows.replace("context", "story_section");
    std::fs::write(place.path("tales.csv"), rows).expect("table");
    let dialogues = r##"{"fname": "t", "dialogue": "#Person1#: Hi. #Person2#: Bye.", "summary1": "They meet.", "summary2": "Two meet."}"##;
    std::fs::write(place.path("talks.jsonl"), dialogues).expect("rows");
    let mut experiment = experiment(&place, "name = 'multilevel-ot'", TRAIN);
    experiment.data.files = vec![
        place.path("tales.csv").into(),
        place.path("talks.jsonl").into(),
    ];
    experiment.evaluate.files = experiment.data.files.clone();
    experiment.evaluate.max_new_tokens = 12;
    experiment.pairs.longest = 250;
    experiment.train.steps = 40;
    // Two documents to learn from, and all that is left to check on: with the same files there is nothing.
    let registry = Registry::default();
    let dir = place.path("none");
    let none = Distiller::new(
        &registry,
        &experiment,
        Some((Path::new(&dir), false)),
        &mut |_| {},
        &mut |_| {},
    );
    let none = none.err().expect("refused").to_string();
    assert!(
        none.contains("nothing to check on") && none.contains("evaluate.files"),
        "{none}"
    );
    experiment.data.files = vec![place.path("tales.csv").into()];
    let mut distiller = begin(&place, &experiment, "out", false);
    let taught = run(&mut distiller);
    let said = taught.last.said.expect("answers");
    assert_eq!(said.count, 1);
    let (scores, answers) = distiller.evaluate_each().expect("scores");
    assert_eq!((answers.len(), answers[0].said), (1, scores.said));
    for score in [said.f1, said.rouge_l, said.rouge_lsum] {
        assert!((0.0..=1.0).contains(&score), "{said:?}");
    }
    let metrics = std::fs::read_to_string(place.path("out/metrics.jsonl")).expect("metrics");
    let last: Value = serde_json::from_str(metrics.lines().last().expect("a line")).expect("JSON");
    assert_eq!(last["scores"]["said"]["count"], 1);
}

#[test]
fn an_evaluation_that_fails_costs_no_step() {
    let place = place();
    let row = |i: usize| {
        json!({"question": format!("Number {i}?"), "context": format!("It is {i}."), "answer": format!("{i}")}).to_string()
    };
    let rows: Vec<String> = (0..40).map(row).collect();
    std::fs::write(place.path("learn.jsonl"), rows[..30].join("\n")).expect("rows");
    std::fs::write(place.path("check.jsonl"), rows[30..].join("\n")).expect("rows");
    let mut experiment = experiment(
        &place,
        "name = 'multilevel-ot'",
        "train = { batch = 3, steps = 4, products = 'f32' }\n",
    );
    experiment.data.files = vec![place.path("learn.jsonl").into()];
    experiment.evaluate.files = vec![place.path("check.jsonl").into()];
    (
        experiment.evaluate.every,
        experiment.evaluate.max_new_tokens,
    ) = (2, 5);
    std::fs::write(place.path("e.toml"), experiment.to_toml().expect("TOML")).expect("written");
    let args = |out: &'static str| ["distill", "--config", "e.toml", "--output", out, "--resume"];
    assert!(place.run(&args("whole")).status.success());
    // Where there is no room for the model that answers, the step before is kept.
    let failed = place
        .command(&args("broken"))
        .env("TMPDIR", place.path("nowhere"))
        .output()
        .expect("starts");
    assert!(!failed.status.success());
    assert!(Path::new(&place.path("broken/checkpoint.safetensors")).exists());
    assert!(
        !Path::new(&place.path("broken/metrics.jsonl")).exists() || {
            let text =
                std::fs::read_to_string(place.path("broken/metrics.jsonl")).expect("metrics");
            text.lines().count() == 1
        }
    );
    assert!(place.run(&args("broken")).status.success());
    for name in [
        "checkpoint.safetensors",
        "metrics.jsonl",
        "best/model.safetensors",
    ] {
        let read = |out: &str| std::fs::read(place.path(&format!("{out}/{name}"))).expect(name);
        assert!(read("whole") == read("broken"), "{name}");
    }
}

#[test]
fn what_a_teacher_says_is_kept_once_and_by_whom_it_was_said() {
    let place = place();
    let more = "train = { batch = 3, steps = 6, products = 'f32' }\n";
    for aligner in ["name = 'multilevel-ot', k = 8", "name = 'dskd'"] {
        let live = experiment(&place, aligner, more);
        let mut kept = live.clone();
        let dir = place.path(&format!("said-{}", aligner.len()));
        // All of the teacher's tokens: nothing is lost.
        kept.cache = Some(CacheSpec {
            dir: dir.clone().into(),
            top_k: 1000,
        });
        let out = |name: &str| format!("{name}-{}", aligner.len());
        let a = run(&mut begin(&place, &live, &out("live"), false));
        let b = run(&mut begin(&place, &kept, &out("kept"), false));
        assert!(
            (a.loss - b.loss).abs() < 1e-4 * a.loss.abs(),
            "{aligner}: {} {}",
            a.loss,
            b.loss
        );
        // What is there is taken as it is, by a student of another shape too; of another teacher it is refused.
        let written = |name: &str| {
            std::fs::metadata(format!("{dir}/{name}"))
                .expect(name)
                .modified()
                .expect("time")
        };
        let before = written("said-00000.safetensors");
        let mut other = kept.clone();
        other.student.layers = 2;
        run(&mut begin(&place, &other, &out("other"), false));
        assert_eq!(written("said-00000.safetensors"), before);
        let mut few = kept.clone();
        few.cache = Some(CacheSpec {
            dir: dir.clone().into(),
            top_k: 8,
        });
        let refused = |experiment: &DistillExperiment, name: &str| {
            let mut distiller = begin(&place, experiment, name, false);
            let error = distiller.run(&AtomicBool::new(false), &mut |_| {});
            error.expect_err("refused").to_string()
        };
        let message = refused(&few, &out("few"));
        if aligner.contains("dskd") {
            assert!(message.contains("rows whole"), "{message}");
            continue;
        }
        assert!(
            message.contains("another number of tokens") && message.contains("cache.dir"),
            "{message}"
        );
        let mut longer = kept.clone();
        longer.pairs.bytes = 100;
        let message = refused(&longer, &out("longer"));
        assert!(message.contains("other answers"), "{message}");
        few.cache = Some(CacheSpec {
            dir: place.path(&out("cut")).into(),
            top_k: 8,
        });
        let c = run(&mut begin(&place, &few, &out("cut-run"), false));
        assert!(c.loss.is_finite() && c.loss != b.loss);
    }
}

#[test]
fn with_a_teachers_states_kept_every_loss_is_the_same_to_the_bit() {
    let place = place();
    let more = "train = { batch = 3, steps = 4, products = 'f32' }\n";
    for (i, aligner) in [
        "name = 'uld'",
        "name = 'multilevel-ot', k = 8",
        "name = 'multilevel-ot', mode = 'reference-code'",
        "name = 'dskd'",
    ]
    .iter()
    .enumerate()
    {
        let live = experiment(&place, aligner, more);
        let mut kept = live.clone();
        // One folder for all of them.
        kept.cache = Some(CacheSpec {
            dir: place.path("states").into(),
            top_k: 0,
        });
        let student = |experiment: &DistillExperiment, name: String| {
            let outcome = run(&mut begin(&place, experiment, &name, false));
            let weights = place.path(&format!("{name}/best/model.safetensors"));
            (outcome.last, std::fs::read(weights).expect("weights"))
        };
        let (a, b) = (
            student(&live, format!("live-{i}")),
            student(&kept, format!("kept-{i}")),
        );
        assert!(a == b, "{aligner}");
        // What it expects of other answers is kept there as well, once for all.
        let names = std::fs::read_dir(place.path("states")).expect("folder");
        let names = names.map(|e| e.expect("an entry").path());
        let bytes: Vec<_> = names
            .filter(|p| p.extension().is_some_and(|e| e == "json") && !p.ends_with("said.json"))
            .collect();
        assert_eq!(bytes.len(), 1, "{bytes:?}");
        if i == 3 {
            // What cannot be read is made again.
            let was = std::fs::read(&bytes[0]).expect("bytes");
            std::fs::write(&bytes[0], "{").expect("written");
            begin(&place, &kept, "spoilt", false)
                .evaluate()
                .expect("scores");
            assert_eq!(std::fs::read(&bytes[0]).expect("bytes"), was);
        }
    }
}

#[test]
fn a_cache_that_was_broken_off_goes_on() {
    let place = place();
    let mut experiment = experiment(
        &place,
        "name = 'multilevel-ot', k = 8",
        "train = { batch = 2, steps = 1, products = 'f32' }\n",
    );
    let cache = |name: &str| {
        Some(CacheSpec {
            dir: place.path(name).into(),
            top_k: 8,
        })
    };
    experiment.cache = cache("whole");
    run(&mut begin(&place, &experiment, "a", false));
    experiment.cache = cache("parts");
    let stop = AtomicBool::new(false);
    let mut first = begin(&place, &experiment, "b", false);
    let error = first.run(&stop, &mut |told| {
        if let Told::Note(note) = told {
            stop.store(note.contains("1 of"), Ordering::Relaxed);
        }
    });
    assert!(
        error
            .expect_err("broken off")
            .to_string()
            .contains("goes on")
    );
    assert!(!Path::new(&place.path("parts/said-00001.safetensors")).exists());
    run(&mut begin(&place, &experiment, "b", true));
    let names = std::fs::read_dir(place.path("whole")).expect("shards");
    let mut count = 0;
    for name in names.map(|e| e.expect("an entry").file_name()) {
        let read =
            |dir: &str| std::fs::read(Path::new(&place.path(dir)).join(&name)).expect("file");
        assert!(read("whole") == read("parts"), "{name:?}");
        count += 1;
    }
    assert!(count > 2, "{count} files");
}

/// Characters of both tokenizers, a BOS on one side, templates of different length.
fn talkers(place: &Place) -> [Tokenizer; 2] {
    let dir = place.dir.path();
    let ends = ["<|end|>", "<|im_start|>", "<|im_end|>"];
    folder(
        &dir.join("one"),
        &byte_level_tokenizer(&ends),
        &json!({"bos_token": "<|end|>", "eos_token": "<|im_end|>", "chat_template": CHATML}),
    );
    let (file, _) = pair_tokenizer(&["<|stop|>"]);
    let short = "{% for m in messages %}{{ m['content'] + '\n' }}{% if m['role'] == 'assistant' %}{{ '<|stop|>' }}{% endif %}{% endfor %}";
    folder(
        &dir.join("other"),
        &file,
        &json!({"eos_token": "<|stop|>", "chat_template": short}),
    );
    ["one", "other"].map(|name| Tokenizer::from_dir(&dir.join(name)).expect("a tokenizer"))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn answers_are_the_same_bytes_on_both_sides_whoever_teaches(
        talks in prop::collection::vec(("[ -~]{1,20}", "[ -~]{0,10}[a-z<|>_]{1,30}", any::<bool>()), 1..6),
        shots in 0usize..3,
    ) {
        let place = Place::new();
        let [one, other] = talkers(&place);
        let rows = talks.iter().enumerate().map(|(i, (asked, said, cut))| {
            let finish = if *cut { "length" } else { "eos" };
            json!({"id": i, "finishes": [finish], "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": format!("Frage{i}: {asked}")}, {"role": "assistant", "content": said}]}).to_string()
        });
        let rows: Vec<String> = rows.collect();
        std::fs::write(place.path("talks.jsonl"), rows.join("\n")).expect("talks");
        let spec = DataSpec {
            files: vec![place.path("talks.jsonl").into()],
            part: "all".into(),
            keep_out: Vec::new(),
            ..DataSpec::default()
        };
        let how = PairSpec { shots, ..PairSpec::default() };
        for (student, teacher) in [(&one, &other), (&other, &one)] {
            let found = pairs_of(&spec, &how, 0, &HashSet::new(), (student, teacher), &mut |_, _| {});
            if shots >= talks.len() {
                prop_assert!(found.expect_err("refused").to_string().contains("pairs.shots"));
                continue;
            }
            let found = found.expect("pairs");
            prop_assert_eq!(found.all.len(), talks.len(), "{:?}", found.failures);
            for pair in &found.all {
                let bytes = |tokenizer: &Tokenizer, ids: &[u32]| -> Vec<u8> {
                    ids.iter().flat_map(|&id| tokenizer.token_bytes(id).unwrap_or_default().to_vec()).collect()
                };
                let said = [bytes(student, pair.student.said()), bytes(teacher, pair.teacher.said())];
                prop_assert_eq!(&said[0], &said[1]);
                prop_assert_eq!(said[0].len(), pair.bytes);
                for (tokenizer, side, offsets) in [(student, &pair.student, &pair.offsets.0), (teacher, &pair.teacher, &pair.offsets.1)] {
                    // It ends with the token by which the model ends what it says, unless it was broken off, and begins behind a prompt.
                    let number = pair.name.rsplit(' ').next().and_then(|id| id.parse::<usize>().ok()).expect("an id");
                    let ends = tokenizer.eos().contains(side.tokens.last().expect("tokens"));
                    prop_assert_eq!(ends, !talks[number].2);
                    prop_assert!(side.answer.start > 0 && side.answer.end == side.tokens.len());
                    prop_assert!(side.tokens.iter().all(|&t| (t as usize) < tokenizer.size()));
                    for (&id, &(from, to)) in side.said().iter().zip(offsets) {
                        prop_assert_eq!(tokenizer.token_bytes(id).unwrap_or_default(), &said[0][from..to]);
                    }
                }
            }
            // Other questions stand before the teacher's alone, none of them its own, and the system speaks first.
            for pair in &found.all {
                let asked = |tokenizer: &Tokenizer, side: &scylla_bench::distill::Side| {
                    let ids = &side.tokens[..side.answer.start];
                    let bytes: Vec<u8> = ids.iter().flat_map(|&id| tokenizer.token_bytes(id).unwrap_or_default().to_vec()).collect();
                    String::from_utf8(bytes).expect("ASCII")
                };
                let (own, taught) = (asked(student, &pair.student), asked(teacher, &pair.teacher));
                prop_assert_eq!((own.matches("Frage").count(), taught.matches("Frage").count()), (1, shots + 1));
                let question = &own[own.find("Frage").expect("a question")..][..6];
                prop_assert_eq!(taught.matches(question).count(), 1);
                prop_assert!(taught.find(question) == taught.rfind("Frage"));
                prop_assert!(taught.find("Be brief.") < taught.find("Frage"));
                prop_assert_eq!(taught.matches("Be brief.").count(), 1);
            }
        }
    }
}

#[test]
fn the_teacher_never_sees_the_students_ids_and_padded_rows_take_no_part() {
    let place = place();
    // The student has more tokens than the teacher, whose embedding has no row for them, and more rows than tokens.
    let (_, tokens) = pair_tokenizer(&["<|end|>", "<|more|>"]);
    for (i, aligner) in ["name = 'multilevel-ot'", "name = 'dskd'", "name = 'gold'"]
        .iter()
        .enumerate()
    {
        let rows = |steps: u64| -> Vec<Vec<f32>> {
            let mut experiment = experiment(&place, aligner, TRAIN);
            experiment.train.steps = steps;
            experiment.student.vocab = 160;
            let out = format!("padded-{i}-{steps}");
            run(&mut begin(&place, &experiment, &out, false));
            let bytes = std::fs::read(place.path(&format!("{out}/best/model.safetensors")))
                .expect("weights");
            let file = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
            let table = file.tensor("model.embed_tokens.weight").expect("embedding");
            let word = |w: &[u8]| f32::from_le_bytes([w[0], w[1], w[2], w[3]]);
            let row = |row: &[u8]| row.chunks_exact(4).map(word).collect();
            table.data().chunks_exact(4 * 48).map(row).collect()
        };
        let (few, more) = (rows(1), rows(4));
        assert_eq!((few.len(), few[tokens..].len()), (160, 160 - tokens));
        assert_ne!(few[..tokens], more[..tokens]);
        assert_eq!(
            few[tokens..],
            more[tokens..],
            "{aligner}: rows of no token stay as they began"
        );
    }
}

/// A teacher whose table and head have more rows than it has tokens: zeros, or rows that shout.
fn write_padded(dir: &Path, loud: bool) {
    const ROWS: usize = 160;
    std::fs::create_dir(dir).expect("folder");
    write_letters(dir);
    let begins = json!({"bos_token": "\u{10a}"});
    folder(dir, &byte_level_tokenizer(&[]), &begins);
    let file = dir.join("config.json");
    let config = std::fs::read_to_string(&file).expect("config");
    let mut config: Value = serde_json::from_str(&config).expect("JSON");
    config["vocab_size"] = ROWS.into();
    std::fs::write(&file, config.to_string()).expect("config");
    let file = dir.join("model.safetensors");
    let bytes = std::fs::read(&file).expect("weights");
    let was = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
    let mut rng = StdRng::seed_from_u64(7);
    let mut all: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    for (name, view) in was.tensors() {
        let (mut shape, mut data) = (view.shape().to_vec(), view.data().to_vec());
        if name.contains("embed_tokens") || name.contains("lm_head") {
            shape[0] = ROWS;
            let missing = ROWS * shape[1] - data.len() / 2;
            data.extend((0..missing).flat_map(|_| {
                let value = if loud {
                    rng.random_range(-9.0..9.0)
                } else {
                    0.0
                };
                half::bf16::from_f32(value).to_le_bytes()
            }));
        }
        all.push((name, view.dtype(), shape, data));
    }
    let views = all.iter().map(|(name, dtype, shape, data)| {
        let view = TensorView::new(*dtype, shape.clone(), data).expect("a view");
        (name.clone(), view)
    });
    let bytes = safetensors::serialize(views, None).expect("serialized");
    std::fs::write(&file, bytes).expect("weights");
}

#[test]
fn what_a_teachers_padding_says_reaches_no_student_live_or_kept() {
    let place = place();
    for (name, loud) in [("still", false), ("loud", true)] {
        write_padded(Path::new(&place.path(name)), loud);
    }
    let sources = std::fs::read_to_string(place.path("learn.txt")).expect("text");
    std::fs::write(place.path("few.txt"), &sources[..3000]).expect("text");
    let asked = |aligner: &str| {
        let more = "train = { batch = 3, steps = 2, products = 'f32' }\n";
        let mut asked = experiment(&place, aligner, more);
        asked.data.files = vec![place.path("few.txt").into()];
        asked.evaluate.count = 4;
        asked
    };
    for (i, aligner) in ALIGNERS.iter().enumerate().skip(1) {
        let live = asked(aligner);
        let student = |teacher: &str, top_k: Option<usize>| {
            let mut asked = live.clone();
            asked.teacher.model = place.path(teacher);
            let out = format!("{teacher}-{i}-{top_k:?}");
            asked.cache = top_k.map(|top_k| CacheSpec {
                dir: place.path(&format!("said-{teacher}-{i}-{top_k}")).into(),
                top_k,
            });
            let outcome = run(&mut begin(&place, &asked, &out, false));
            let weights = place.path(&format!("{out}/best/model.safetensors"));
            (outcome.last, std::fs::read(weights).expect("weights"))
        };
        // As a teacher without padding teaches: live, its states kept, and few of its tokens.
        let reads_whole = ["uld", "gold", "dskd", "x-token", "reference"];
        let reads_whole = reads_whole.iter().any(|name| aligner.contains(name));
        let kinds = [None, Some(0), Some(8)];
        for top_k in kinds.into_iter().take(if reads_whole { 2 } else { 3 }) {
            let plain = student("teacher", top_k);
            for teacher in ["still", "loud"] {
                assert!(
                    student(teacher, top_k) == plain,
                    "{aligner}: {teacher}, {top_k:?}"
                );
            }
        }
    }
    // What one says is not taken for what another says, be its words the same.
    let published = ALIGNERS.iter().position(|a| a.contains("k = 20"));
    let published = published.expect("an aligner that reads few tokens");
    let mut other = asked(ALIGNERS[published]);
    other.teacher.model = place.path("loud");
    for top_k in [0, 8] {
        other.cache = Some(CacheSpec {
            dir: place
                .path(&format!("said-still-{published}-{top_k}"))
                .into(),
            top_k,
        });
        let mut distiller = begin(&place, &other, &format!("other-{top_k}"), false);
        let refused = distiller.run(&AtomicBool::new(false), &mut |_| {});
        let refused = refused.expect_err("refused").to_string();
        assert!(
            refused.contains("another teacher") && refused.contains("cache.dir"),
            "{refused}"
        );
    }
}

#[test]
fn what_cannot_be_distilled_is_said() {
    let place = place();
    let write = |name: &str, text: &str| std::fs::write(place.path(name), text).expect("written");
    let good = experiment(&place, "name = 'uld'", TRAIN)
        .to_toml()
        .expect("TOML");
    write("good.toml", &good);
    let refused = |set: &[&str], words: &[&str]| {
        let sets = set.iter().flat_map(|s| ["--set", s]);
        let args: Vec<&str> = ["distill", "--config", "good.toml", "--output", "out"]
            .into_iter()
            .chain(sets)
            .collect();
        let message = place.refused(&args);
        for word in words {
            assert!(message.contains(word), "{set:?}: {message}");
        }
    };
    refused(&["aligner.name=nobody"], &["nobody", "multilevel-ot"]);
    refused(&["aligner.shape=round"], &["shape"]);
    refused(&["student.tokenizer=nowhere"], &["nowhere"]);
    refused(&["student.hidden=50"], &["student.hidden 50", "3 heads"]);
    refused(&["teacher.model=nowhere"], &["nowhere"]);
    refused(
        &["pairs.longest=100000"],
        &["pairs.longest 100000", "context"],
    );
    refused(&["pairs.longest=9"], &["no answer", "too long"]);
    refused(&["data.part=dev"], &["data.part", "dev"]);
    refused(&["train.steps=0"], &["train.steps 0"]);
    refused(&["data.files=[\"missing.txt\"]"], &["missing.txt"]);
    refused(
        &["evaluate.files=[\"learn.txt\"]"],
        &["nothing to check on", "evaluate.files"],
    );
    refused(
        &["student.model=teacher"],
        &["student.model and student.tokenizer"],
    );
    refused(
        &["evaluate.part=test"],
        &["evaluate.part", "evaluate.files"],
    );
    refused(&["evaluate.part=train"], &["evaluate.part"]);
    refused(
        &["evaluate.part=test", "evaluate.files=[]", "data.part=train"],
        &["part `test`"],
    );
    refused(&["data.whole=true"], &["data.whole"]);
    refused(&["pairs.date=tomorrow"], &["pairs.date", "tomorrow"]);
    refused(&["cache={ dir = \"said\" }"], &["whole", "cache.top_k"]);
    let scores = place.json(&["distill", "--config", "good.toml", "--score", "--json"]);
    assert!(
        scores["bits_per_byte"].as_f64().is_some_and(|b| b > 4.0),
        "{scores}"
    );
    assert_eq!(scores["answers"].as_array().map(Vec::len), Some(24));
    std::fs::create_dir(place.path("half")).expect("folder");
    write("half/config.json", "{}");
    write("half/pytorch_model.bin", "");
    let half = experiment(&place, "name = 'uld'", TRAIN);
    let half = toml_with(
        &half,
        &format!("student = {{ model = '{}' }}", place.path("half")),
    );
    write("half.toml", &half.to_toml().expect("TOML"));
    let message = place.refused(&["distill", "--config", "half.toml", "--output", "half-out"]);
    assert!(message.contains("pytorch_model.bin"), "{message}");
    refused(
        &["optimizer.lr=1e12", "optimizer.clip_norm=0.0"],
        &["step 2 failed", "NaN or infinity"],
    );
}
