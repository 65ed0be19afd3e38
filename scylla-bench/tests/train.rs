//! `scylla train`, `scylla data` and `scylla inspect loss`, on tiny models.

mod common;

use std::path::Path;
use std::time::Duration;

use common::Place;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use safetensors::SafeTensors;
use serde_json::Value;

fn place(draft: &str, more: &str) -> Place {
    Place::training(draft, more)
}

const STAGE: &str = "[[stage]]\nname = 'train'\nsteps = 120\ndata = { files = ['texts.txt'] }\noptimizer = { lr = 4e-3 }\n";
const EAGLE3: &str =
    "draft = { name = 'eagle3', vocab = 80, taps = [0, 1, 2] }\nloss = { unroll = 2 }";
const EAGLE2: &str = "draft = { name = 'eagle2' }";
const HASS: &str = "draft = { name = 'hass' }\nloss = { distance = 'ce-tv', decay = 0.8 }";
const SCYLLA: &str = "draft = { name = 'scylla', layers = 2 }";

fn json(place: &Place, args: &[&str]) -> Value {
    place.json(args)
}

/// Conversations of which the user's part alone is there, `count` of them.
fn asks(place: &Place, name: &str, count: usize) {
    let mut random = StdRng::seed_from_u64(9);
    let mut row = |i: usize| {
        let said: String = (0..random.random_range(2..12))
            .map(|_| (b'a' + random.random_range(0..26)) as char)
            .collect();
        format!("{{\"id\": \"ask-{i}\", \"prompt\": \"{said}\"}}\n")
    };
    let rows: String = (0..count).map(&mut row).collect();
    std::fs::write(place.path(name), rows).expect("asks");
}

/// Lets the target answer, and says where the answers are.
fn answers(place: &Place) -> Value {
    asks(place, "asks.jsonl", 60);
    let args = [
        "data",
        "regenerate",
        "asks.jsonl",
        "--output",
        "answers.jsonl",
        "--target",
        "talker",
        "--json",
    ];
    json(
        place,
        &[&args[..], &["--max-new-tokens", "40", "--batch", "4"]].concat(),
    )
}

fn train<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&["train", "--config", "train.toml", "--json"], more].concat()
}

fn metrics(dir: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(Path::new(dir).join("metrics.jsonl")).expect("metrics");
    text.lines()
        .map(|l| serde_json::from_str(l).expect("a line"))
        .collect()
}

fn real(tau: &Value) -> f64 {
    assert_eq!(tau["real"], tau["simulated"], "the two are one number");
    tau["real"].as_f64().expect("tau")
}

#[test]
fn a_trained_draft_is_worth_more_and_serves_as_training_said() {
    for (draft, name) in [
        (EAGLE3, "eagle3"),
        (EAGLE2, "eagle2"),
        (HASS, "hass"),
        (SCYLLA, "scylla"),
    ] {
        // One of them by Muon.
        let stage = match name {
            "hass" => STAGE.replace("4e-3", "4e-3, muon = {}"),
            _ => STAGE.to_string(),
        };
        let place = place(
            draft,
            &stage.replace(
                "texts.txt'",
                "answers.jsonl'], part = 'all', whole = true, keep_out = ['core'",
            ),
        );
        let counts = answers(&place);
        assert_eq!(counts["read"], 60, "{counts}");
        let dry = json(&place, &train(&["--output", "out", "--dry-run"]));
        assert!(
            !Path::new(&place.path("out")).exists(),
            "nothing is left behind"
        );
        let untrained = real(&dry["tau"]);
        let done = json(&place, &train(&["--output", "out"]));
        assert_eq!(
            (done["steps"].as_u64(), done["tokens"].as_u64()),
            (Some(120), Some(120 * 144))
        );
        let trained = real(&done["tau"]);
        assert!(
            trained > untrained + 0.05,
            "{name}: tau {untrained} untrained, {trained} trained"
        );
        let lines = metrics(&place.path("out"));
        assert_eq!(lines.len(), 120);
        let loss = |range: std::ops::Range<usize>| {
            let count = range.len() as f64;
            lines[range]
                .iter()
                .map(|l| l["loss"].as_f64().expect("loss"))
                .sum::<f64>()
                / count
        };
        assert!(
            loss(110..120) < 0.9 * loss(0..10),
            "{name}: {} then {}",
            loss(0..10),
            loss(110..120)
        );
        assert_eq!(lines.iter().filter(|l| l.get("tau").is_some()).count(), 2);
        assert_eq!(done["draft"], format!("{name}:out/best"));
        // What was written is loaded, and decodes as it did in training.
        let again = place.path("again.toml");
        let text = std::fs::read_to_string(place.path("train.toml")).expect("experiment");
        let text = text.replace(
            draft.lines().next().expect("draft"),
            &format!("draft = {{ name = '{name}', start = 'out/best' }}"),
        );
        std::fs::write(&again, text).expect("again");
        let loaded = json(
            &place,
            &[
                "train",
                "--config",
                "again.toml",
                "--output",
                "o2",
                "--dry-run",
                "--json",
            ],
        );
        assert_eq!(real(&loaded["tau"]), trained, "{name}");
        let budget = [
            "--set",
            "budget.total=6",
            "--set",
            "budget.width=2",
            "--set",
            "budget.depth=2",
        ];
        let draft = format!("{name}:out/best");
        let generate = [
            "generate",
            "--target",
            "talker",
            "--prompt",
            "abc",
            "--json",
            "--max-new-tokens",
            "24",
        ];
        let plain = json(&place, &generate);
        let drafted = json(
            &place,
            &[&generate[..], &["--draft", &draft], &budget].concat(),
        );
        assert_eq!(plain["ids"], drafted["ids"]);
        // A draft of another vocabulary is no beginning for this target.
        let config = place.path("out/best/config.json");
        let text = std::fs::read_to_string(&config).expect("config");
        let mut fields: Value = serde_json::from_str(&text).expect("JSON");
        fields["vocab_size"] = (fields["vocab_size"].as_u64().expect("V") + 1).into();
        std::fs::write(&config, fields.to_string()).expect("config");
        let again = ["train", "--config", "again.toml", "--output", "o3"];
        let said = place.refused(&again);
        assert!(said.contains("vocab"), "{name}: {said}");
        assert!(!Path::new(&place.path("o3/best")).exists());
    }
}

/// Parameters and moments of a checkpoint, and the best draft's file.
fn bits(dir: &str) -> (Vec<(String, Vec<u8>)>, Vec<u8>) {
    let bytes = std::fs::read(Path::new(dir).join("checkpoint.safetensors")).expect("checkpoint");
    let file = SafeTensors::deserialize(&bytes).expect("whole");
    let mut all: Vec<(String, Vec<u8>)> = file
        .tensors()
        .into_iter()
        .map(|(name, view)| (name, view.data().to_vec()))
        .collect();
    all.sort();
    let best = std::fs::read(Path::new(dir).join("best/model.safetensors")).expect("best");
    (all, best)
}

/// What does not depend on the clock.
fn timeless(lines: Vec<Value>) -> Vec<Value> {
    let without = |mut line: Value| {
        for key in ["tokens_per_s", "target_ms", "draft_ms"] {
            line.as_object_mut().expect("a line").remove(key);
        }
        line
    };
    lines.into_iter().map(without).collect()
}

/// Two runs end with the same parameters, moments and best draft, bit for bit, and the same metrics.
fn end_alike(place: &Place, one: &str, other: &str, about: &str) {
    let (one, other) = (place.path(one), place.path(other));
    assert!(bits(&one) == bits(&other), "{about}");
    assert_eq!(
        timeless(metrics(&one)),
        timeless(metrics(&other)),
        "{about}"
    );
}

#[test]
fn a_run_that_is_killed_again_and_again_ends_as_one_that_is_not() {
    // Two stages, two batches a step, features with noise: all that a checkpoint has to remember.
    let second = STAGE.replace("'train'", "'more'").replace("120", "40");
    let place = place(SCYLLA, &format!("{STAGE}{second}"));
    let settings = [
        "--set",
        "train.checkpoint=5",
        "--set",
        "train.accumulate=2",
        "--set",
        "evaluate.every=50",
    ];
    json(
        &place,
        &train(&[&["--output", "whole"], &settings[..]].concat()),
    );
    let seed = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .expect("now")
        .as_nanos() as u64;
    eprintln!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let args = train(&[&["--output", "killed", "--resume"], &settings[..]].concat());
    let mut kills = 0;
    for attempt in 0u64.. {
        let mut child = place
            .command(&args)
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .expect("starts");
        // Each is given longer, so that the run ends however slow the machine is.
        let until = std::time::Instant::now()
            + Duration::from_millis(random.random_range(20..400) + 150 * attempt);
        let status = loop {
            if let Some(status) = child.try_wait().expect("waits") {
                break Some(status);
            }
            if std::time::Instant::now() > until {
                break None;
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        match status {
            Some(status) => {
                assert!(status.success());
                break;
            }
            None if random.random_bool(0.5) => {
                child.kill().expect("SIGKILL");
                child.wait().expect("ends");
                kills += 1;
            }
            // Ctrl-C, which may come before an evaluation or in the middle of one.
            None => {
                let sent = std::process::Command::new("kill")
                    .args(["-INT", &child.id().to_string()])
                    .status();
                assert!(sent.is_ok());
                let status = child.wait().expect("ends");
                assert!(
                    status.success() || status.code() == Some(130) || status.code().is_none(),
                    "{status}"
                );
                kills += 1;
                if status.success() {
                    break;
                }
            }
        }
    }
    eprintln!("killed {kills} times");
    end_alike(
        &place,
        "whole",
        "killed",
        &format!("killed {kills} times, seed {seed}"),
    );
}

/// Files longer than 64 KiB (128 in some shells) cannot be written, as on a full disk: checkpoints, that is.
#[test]
fn a_full_disk_loses_no_more_than_what_came_since_the_last_checkpoint() {
    let place = place(EAGLE3, STAGE);
    let settings = ["--set", "train.checkpoint=4", "--set", "evaluate.every=60"];
    json(
        &place,
        &train(&[&["--output", "whole"], &settings[..]].concat()),
    );
    let args = train(&[&["--output", "full", "--resume"], &settings[..]].concat());
    let path = place.path("full/checkpoint.safetensors");
    let limited = || {
        let out = place.behind("trap '' XFSZ; ulimit -f 128", &args);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        (out.status.success(), said)
    };
    // Before there is any checkpoint, and behind one.
    let (done, said) = limited();
    assert!(!done && said.contains("checkpoint"), "{said}");
    assert!(!Path::new(&path).exists());
    let mut child = place
        .command(&args)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .expect("starts");
    while !Path::new(&path).exists() && child.try_wait().expect("waits").is_none() {
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().expect("SIGKILL");
    child.wait().expect("ends");
    let before = std::fs::read(&path).expect("checkpoint");
    let (done, said) = limited();
    // Unless the run had ended before it was killed.
    assert!(done || said.contains("checkpoint"), "{said}");
    assert!(std::fs::read(&path).expect("checkpoint") == before);
    json(&place, &args);
    end_alike(&place, "whole", "full", "a full disk");
}

#[test]
fn drafts_trained_side_by_side_are_those_trained_alone() {
    let place = place(EAGLE3, STAGE);
    let text = std::fs::read_to_string(place.path("train.toml")).expect("experiment");
    let other = text
        .replace(EAGLE3, SCYLLA)
        .replace("lr = 4e-3", "lr = 1e-3, clip_norm = 0.1");
    let other = other.replace("total = 6, width = 2", "total = 4, width = 1")
        + "schedule = { shape = 'linear' }\n";
    std::fs::write(place.path("other.toml"), other).expect("other");
    let short = ["--set", "stage.steps=30"];
    json(&place, &train(&[&["--output", "a"], &short[..]].concat()));
    json(
        &place,
        &[
            &["train", "--config", "other.toml", "--output", "b", "--json"],
            &short[..],
        ]
        .concat(),
    );
    let both = [
        &[
            "train",
            "--config",
            "train.toml",
            "--config",
            "other.toml",
            "--output",
            "both",
            "--json",
        ],
        &short[..],
    ]
    .concat();
    let report = json(&place, &both);
    assert_eq!(report["runs"].as_array().map(Vec::len), Some(2));
    assert!(bits(&place.path("a")) == bits(&place.path("both/train")));
    assert!(bits(&place.path("b")) == bits(&place.path("both/other")));
}

#[test]
fn what_is_wrong_is_said_and_nothing_is_lost() {
    let place = place(EAGLE3, STAGE);
    let refused = |args: &[&str], word: &str| {
        let out = place.run(args);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(
            !out.status.success() && said.contains(word),
            "{args:?}: expected `{word}`: {said}"
        );
    };
    let set = |value: &'static str| train(&["--output", "out", "--set", value]);
    std::fs::write(place.path("empty.txt"), "\n").expect("empty");
    std::fs::write(place.path("broken.txt"), [0xff, 0xfe, 0x41]).expect("broken");
    std::fs::write(
        place.path("asked.jsonl"),
        "{\"id\": 1, \"prompt\": \"what?\"}\n",
    )
    .expect("asked");
    for (value, word) in [
        ("stage.data.files=['empty.txt']", "nothing to train on"),
        ("stage.data.files=['broken.txt']", "UTF-8"),
        ("stage.data.files=['gone.txt']", "gone.txt"),
        (
            "stage.data.files=['asked.jsonl']",
            "the assistant says nothing",
        ),
        ("stage.data.files=['prompts.toml']", "expected a file"),
        ("stage.data.part=\"dev\"", "nothing to train on"),
        ("draft.vocab=4000", "draft.vocab 4000"),
        ("draft.layer=2", "layer"),
        ("draft.name=\"eagle9\"", "eagle9"),
        ("draft.taps=[0, 9, 12]", "taps"),
        ("loss.unrol=3", "unrol"),
        ("train.length=4096", "context"),
        ("train.products=\"f8\"", "f8"),
        ("evaluate.prompts.part=\"test\"", "reported on test"),
        ("stage.steps=0", "steps or tokens"),
        ("stage.optimizer.lr=-1.0", "optimizer.lr"),
        ("stage.schedule.warmup=5000", "warmup"),
    ] {
        refused(&set(value), word);
        assert!(!Path::new(&place.path("out/best")).exists());
    }
    // A loss that is no number: the batch is named, and what was kept before stays.
    json(
        &place,
        &train(&["--output", "kept", "--set", "stage.steps=10"]),
    );
    let before = bits(&place.path("kept"));
    refused(
        &train(&["--output", "nan", "--set", "stage.optimizer.lr=1e30"]),
        "texts.txt, document",
    );
    // Whatever changes is named, and the run is as it was.
    let resume = |value: &'static str| {
        train(&[
            "--output",
            "kept",
            "--resume",
            "--set",
            "stage.steps=10",
            "--set",
            value,
        ])
    };
    refused(&resume("loss.decay=0.5"), "loss.decay");
    refused(&resume("stage.data.tokens=500"), "have changed");
    refused(
        &train(&["--output", "kept", "--set", "stage.steps=10"]),
        "--resume goes on",
    );
    std::fs::rename(
        place.path("talker/model.safetensors"),
        place.path("was.safetensors"),
    )
    .expect("moved");
    place.talking("talker", |_| {});
    let weights = std::fs::read(place.path("was.safetensors")).expect("weights");
    let mut other = weights.clone();
    let last = other.len() - 3;
    other[last] ^= 1;
    std::fs::write(place.path("talker/model.safetensors"), other).expect("another target");
    refused(&resume("run.threads=1"), "target has changed");
    std::fs::write(place.path("talker/model.safetensors"), weights).expect("the target");
    assert!(before == bits(&place.path("kept")));
    // Done is done: going on does nothing, and says the same.
    let done = json(&place, &resume("run.threads=1"));
    assert_eq!(done["steps"], 10);
    assert!(before == bits(&place.path("kept")));
}

#[test]
fn data_show_prints_masks_and_pairs() {
    let place = place(EAGLE3, STAGE);
    let talk = "{\"id\": 1, \"messages\": [{\"role\": \"user\", \"content\": \"hi\"}, {\"role\": \"assistant\", \"content\": \"yes\"}, \
                {\"role\": \"user\", \"content\": \"so\"}, {\"role\": \"assistant\", \"content\": \"no\"}]}\n\
                {\"id\": 2, \"messages\": [{\"role\": \"user\", \"content\": \"and nothing\"}]}\n";
    std::fs::write(place.path("talks.jsonl"), talk).expect("talks");
    let args = [
        "data",
        "show",
        "talks.jsonl",
        "--target",
        "talker",
        "--part",
        "all",
        "--json",
        "--length",
        "80",
        "--rows",
        "80",
    ];
    let shown = json(&place, &args);
    for (key, count) in [("read", 2), ("written", 1), ("skipped", 0), ("failed", 1)] {
        assert_eq!(shown[key], count, "{key}");
    }
    let rows = shown["rows"].as_array().expect("rows");
    let masked: String = rows
        .iter()
        .filter(|r| r["mask"] == true)
        .map(|r| r["text"].as_str().expect("text"))
        .collect();
    assert_eq!(masked, "yes<|im_end|>no<|im_end|>");
    for pair in rows
        .windows(2)
        .filter(|p| p[0]["document"] == p[1]["document"])
    {
        assert_eq!(pair[0]["paired"], pair[1]["token"]);
        assert_eq!(pair[0]["says"], pair[1]["paired"]);
    }
    // A document that holds an evaluation prompt is left out.
    let set: Value = serde_json::from_str(
        include_str!("../../assets/prompts/core.jsonl")
            .lines()
            .next()
            .expect("one"),
    )
    .expect("JSON");
    let said = set["turns"][0]
        .as_str()
        .or(set["prompt"].as_str())
        .expect("a prompt");
    std::fs::write(
        place.path("held.txt"),
        format!("before {said} behind\n<|endoftext|>\nanother document\n"),
    )
    .expect("held");
    let shown = json(
        &place,
        &[
            "data", "show", "held.txt", "--target", "talker", "--part", "all", "--json",
        ],
    );
    assert_eq!(
        (&shown["overlapping"], &shown["written"]),
        (&1.into(), &1.into())
    );
}

#[test]
fn answers_are_the_targets_own_and_a_broken_off_run_goes_on() {
    let place = place(EAGLE3, STAGE);
    asks(&place, "asks.jsonl", 24);
    let two = "{\"id\": \"two\", \"turns\": [\"ab\", \"cd\"], \"system\": \"s\"}\n";
    let long = format!(
        "{{\"id\": \"long\", \"prompt\": \"{}\"}}\n",
        "a ".repeat(400)
    );
    let mut rows = std::fs::read_to_string(place.path("asks.jsonl")).expect("asks");
    rows += two;
    rows += &long;
    std::fs::write(place.path("asks.jsonl"), &rows).expect("asks");
    let regenerate = |output: &str| {
        let args = [
            "data",
            "regenerate",
            "asks.jsonl",
            "--output",
            output,
            "--target",
            "talker",
            "--json",
        ];
        json(
            &place,
            &[&args[..], &["--max-new-tokens", "20", "--batch", "5"]].concat(),
        )
    };
    let counts = regenerate("whole.jsonl");
    let sum = |c: &Value| {
        ["written", "skipped", "failed"]
            .map(|key| c[key].as_u64().expect("a count"))
            .iter()
            .sum::<u64>()
    };
    assert_eq!((&counts["read"], sum(&counts)), (&26.into(), 26));
    assert!(
        counts["failed"].as_u64() >= Some(1),
        "the long one has no room: {counts}"
    );
    let whole = std::fs::read_to_string(place.path("whole.jsonl")).expect("answers");
    let sorted = |text: &str| {
        let mut lines: Vec<String> = text.lines().map(str::to_string).collect();
        lines.sort();
        lines
    };
    // One that was answered alone is answered the same, turn by turn.
    let of = |id: &str| -> Value {
        let rows = whole
            .lines()
            .map(|l| serde_json::from_str::<Value>(l).expect("a row"));
        rows.into_iter().find(|r| r["id"] == id).expect("answered")
    };
    let roles: Vec<Value> = of("two")["messages"]
        .as_array()
        .expect("messages")
        .iter()
        .map(|m| m["role"].clone())
        .collect();
    assert_eq!(roles, ["system", "user", "assistant", "user", "assistant"]);
    let first: Value = serde_json::from_str(rows.lines().next().expect("a row")).expect("JSON");
    let prompt = first["prompt"].as_str().expect("text");
    let alone = json(
        &place,
        &[
            "generate",
            "--target",
            "talker",
            "--prompt",
            prompt,
            "--max-new-tokens",
            "20",
            "--json",
        ],
    );
    if let Some(answer) = whole.lines().find(|l| l.contains("\"ask-0\"")) {
        let answer: Value = serde_json::from_str(answer).expect("a row");
        assert_eq!(answer["messages"][1]["content"], alone["text"]);
    }
    // Broken off within a line: the rest is answered again.
    let cut = whole.len() * 2 / 3;
    let cut = (cut..)
        .find(|&at| whole.is_char_boundary(at))
        .expect("a place");
    std::fs::write(place.path("torn.jsonl"), &whole[..cut]).expect("torn");
    let counts = regenerate("torn.jsonl");
    assert_eq!(sum(&counts), 26);
    assert!(counts["skipped"].as_u64() > Some(0));
    let torn = std::fs::read_to_string(place.path("torn.jsonl")).expect("answers");
    assert_eq!(sorted(&torn), sorted(&whole));
    // Other files are neither cut nor appended to.
    for (name, content) in [
        ("precious.txt", "one line without an end"),
        (
            "other.jsonl",
            "{\"id\": \"ask-0\", \"prompt\": \"x\"}\n{\"id\"",
        ),
    ] {
        std::fs::write(place.path(name), content).expect("written");
        place.refused(&[
            "data",
            "regenerate",
            "asks.jsonl",
            "--output",
            name,
            "--target",
            "talker",
        ]);
        assert_eq!(
            std::fs::read_to_string(place.path(name)).expect("there"),
            content
        );
    }
    let said = place.refused(&[
        "data",
        "regenerate",
        "asks.jsonl",
        "--output",
        "asks.jsonl",
        "--target",
        "talker",
    ]);
    assert!(said.contains("is the input"), "{said}");
    let said = place.refused(&[
        "data",
        "regenerate",
        "asks.jsonl",
        "--output",
        "texts.txt",
        "--target",
        "talker",
    ]);
    assert!(said.contains("texts.txt"), "{said}");
}

#[test]
fn features_are_kept_once_and_trained_on_without_the_targets_pass() {
    let place = place(EAGLE3, STAGE);
    let features = |output: &str, more: &[&str]| {
        let args = [
            "data",
            "features",
            "texts.txt",
            "--output",
            output,
            "--target",
            "talker",
            "--json",
        ];
        let taps = ["--taps", "0,1,2", "--length", "48", "--shard-mb", "1"];
        [&args[..], &taps, more]
            .concat()
            .into_iter()
            .map(str::to_string)
            .collect::<Vec<_>>()
    };
    let run =
        |args: Vec<String>| json(&place, &args.iter().map(String::as_str).collect::<Vec<_>>());
    let counts = run(features("kept", &[]));
    let count = |key: &str| counts[key].as_u64().expect("a count");
    assert_eq!(
        count("read"),
        count("written") + count("skipped") + count("failed")
    );
    assert!(count("shards") > 1 && count("tokens") > 0, "{counts}");
    // A row: four states of 64 values, its token and its mask; pieces of one token are left out.
    assert!(count("bytes") <= count("tokens") * (4 * 64 * 2 + 5));
    // What is there already is not computed again.
    let again = run(features("kept", &[]));
    assert_eq!(again["shards_before"], counts["shards"]);
    let said = place.refused(
        &features("kept", &["--tokens", "500"])
            .iter()
            .map(String::as_str)
            .collect::<Vec<_>>(),
    );
    assert!(said.contains("other documents"), "{said}");
    // Broken off between two shards.
    let index = place.path("kept/features.json");
    let mut value: Value =
        serde_json::from_str(&std::fs::read_to_string(&index).expect("index")).expect("JSON");
    value["written"] = 1.into();
    std::fs::write(&index, value.to_string()).expect("index");
    let said = place.refused(&train(&[
        "--output",
        "early",
        "--set",
        "stage.data={features='kept', files=[]}",
    ]));
    assert!(said.contains("goes on"), "{said}");
    let bytes = std::fs::read(place.path("kept/model.safetensors.index.json")).expect("listing");
    assert_eq!(run(features("kept", &[]))["shards_before"], 1);
    assert_eq!(
        std::fs::read(place.path("kept/model.safetensors.index.json")).expect("listing"),
        bytes
    );
    // Rounded to bf16, the states give nearly the same loss as those of the moment.
    let live = json(
        &place,
        &train(&["--output", "live", "--set", "stage.steps=20"]),
    );
    let kept = json(
        &place,
        &train(&[
            "--output",
            "offline",
            "--set",
            "stage.steps=20",
            "--set",
            "stage.data={features='kept', files=[]}",
        ]),
    );
    let loss = |r: &Value| r["loss"].as_f64().expect("loss");
    assert!(
        (loss(&live) - loss(&kept)).abs() < 0.1 * loss(&live),
        "{live} {kept}"
    );
    // Those of another target, or without a state that is needed, are refused, before a step is paid for.
    let args = [
        "data",
        "features",
        "texts.txt",
        "--output",
        "finals",
        "--target",
        "talker",
        "--draft",
        "eagle2",
    ];
    json(&place, &[&args[..], &["--length", "48", "--json"]].concat());
    let said = place.refused(&train(&[
        "--output",
        "other",
        "--set",
        "stage.data={features='finals', files=[]}",
    ]));
    assert!(said.contains("keeps no state"), "{said}");
    std::fs::rename(place.path("talker"), place.path("was")).expect("moved");
    place.talking("talker", |files| files[0]["rms_norm_eps"] = 1e-4.into());
    let said = place.refused(&train(&[
        "--output",
        "other",
        "--set",
        "stage.data={features='kept', files=[]}",
    ]));
    assert!(said.contains("sha256"), "{said}");
}

#[test]
fn the_loss_of_a_batch_is_that_of_the_reference() {
    let Some(golden) = scylla_tests::golden("inspect loss") else {
        return;
    };
    let place = Place::new();
    let read = |path: std::path::PathBuf| -> Value {
        serde_json::from_str(&std::fs::read_to_string(path).expect("golden.json")).expect("JSON")
    };
    let at = |path: &str| golden.join(path).to_string_lossy().into_owned();
    for (dtype, bound) in [("f64", 1e-10), ("f32", 1e-4)] {
        let loss = |target: &str, draft: &str, input: &str, more: &[&str]| {
            let args = [
                "inspect",
                "loss",
                "--target",
                target,
                "--draft",
                draft,
                "--input",
                input,
                "--output",
                "out.safetensors",
            ];
            json(
                &place,
                &[&args[..], &["--dtype", dtype, "--json"], more].concat(),
            )
        };
        let close = |found: &Value, expected: &Value| {
            let (a, b) = (
                found.as_f64().expect("a number"),
                expected.as_f64().expect("a number"),
            );
            assert!((a / b - 1.0).abs() < bound, "{dtype}: {a} for {b}");
        };
        let about = read(golden.join("eagle3_loss/golden.json"));
        let draft = format!("eagle3:{}", at("eagle/eagle3-llama3-tiny"));
        let (target, input) = (
            at("models/llama3-tiny"),
            at("eagle3_loss/golden.safetensors"),
        );
        let found = loss(&target, &draft, &input, &["--set", "train.unroll=7"]);
        close(&found["total"], &about["total_7_mean_over_BS"]);
        close(
            &found["total_by_mask"],
            &about["total_7_each_step_over_position_mask_count"],
        );
        assert_eq!(found["steps"].as_array().map(Vec::len), Some(7));
        let bytes = std::fs::read(place.path("out.safetensors")).expect("written");
        let file = SafeTensors::deserialize(&bytes).expect("whole");
        assert_eq!(
            file.tensor("grad.fc.weight").expect("a gradient").shape(),
            [64, 192]
        );
        assert_eq!(file.tensor("logits").expect("logits").shape(), [2, 40, 200]);
        let about = read(golden.join("eagle_loss/scylla2-llama3-tiny/golden.json"));
        let draft = format!("scylla:{}", at("eagle_loss/scylla2-llama3-tiny/draft"));
        let found = loss(
            &target,
            &draft,
            &at("eagle_loss/scylla2-llama3-tiny/golden.safetensors"),
            &[],
        );
        close(&found["total"], &about["total"]);
        close(&found["parts"]["smooth_l1"], &about["smooth_l1"]);
        close(&found["parts"]["ce"], &about["ce"]);
    }
}

/// The tensors of a safetensors file, as f32.
fn tensors(path: &str) -> std::collections::BTreeMap<String, Vec<f32>> {
    let bytes = std::fs::read(path).expect("read");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let values = |view: &safetensors::tensor::TensorView<'_>| -> Vec<f32> {
        match view.dtype() {
            safetensors::Dtype::BF16 => {
                let pairs = view.data().as_chunks::<2>().0.iter();
                pairs
                    .map(|b| f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16))
                    .collect()
            }
            safetensors::Dtype::F32 => view
                .data()
                .as_chunks::<4>()
                .0
                .iter()
                .map(|b| f32::from_le_bytes(*b))
                .collect(),
            _ => Vec::new(),
        }
    };
    file.tensors()
        .iter()
        .map(|(name, view)| (name.clone(), values(view)))
        .collect()
}

#[test]
fn a_draft_begins_as_layers_of_its_target() {
    let place = place(SCYLLA, STAGE);
    let h = 64;
    let theirs = tensors(&place.path("talker/model.safetensors"));
    // A step that moves nothing.
    let still = [
        "--set",
        "stage.steps=1",
        "--set",
        "stage.optimizer.lr=1e-30",
    ];
    for (name, first, taps) in [("scylla", "layers.0", 1), ("eagle3", "midlayer", 3)] {
        let set = format!("draft.name={name}");
        let mut more = vec![
            "--set",
            &set,
            "--set",
            "draft.layers=2",
            "--set",
            "draft.from_layers=[1, 0]",
            "--output",
            name,
        ];
        more.extend(still);
        if name == "eagle3" {
            more.extend(["--set", "draft.taps=[0, 1, 2]"]);
        }
        json(&place, &train(&more));
        let own = tensors(&place.path(&format!("{name}/best/model.safetensors")));
        let near = |a: f32, b: f32| (a - b).abs() <= b.abs() / 250.0 + 1e-9; // bf16
        let same = |ours: &str, theirs_name: &str| {
            let (a, b) = (&own[ours], &theirs[theirs_name]);
            assert_eq!(a.len(), b.len(), "{ours}");
            assert!(a.iter().zip(b).all(|(a, b)| near(*a, *b)), "{name}: {ours}");
        };
        for (layer, prefix) in [(1, first), (0, "layers.1")] {
            for part in [
                "self_attn.o_proj",
                "mlp.gate_proj",
                "mlp.up_proj",
                "mlp.down_proj",
                "post_attention_layernorm",
            ] {
                same(
                    &format!("{prefix}.{part}.weight"),
                    &format!("model.layers.{layer}.{part}.weight"),
                );
            }
        }
        same(
            "layers.1.self_attn.q_proj.weight",
            "model.layers.0.self_attn.q_proj.weight",
        );
        same(
            "layers.1.input_layernorm.weight",
            "model.layers.0.input_layernorm.weight",
        );
        same("norm.weight", "model.norm.weight");
        let (q, norm) = (
            &theirs["model.layers.1.self_attn.q_proj.weight"],
            &theirs["model.layers.1.input_layernorm.weight"],
        );
        let ours = &own[&format!("{first}.self_attn.q_proj.weight")];
        for (row, expected) in q.chunks(h).enumerate() {
            for (i, &v) in expected.iter().enumerate() {
                // Without an input norm it is folded in; over two inputs side by side the second half is the target's.
                let (found, expected) = match name {
                    "scylla" => (ours[row * h + i], v * norm[i]),
                    _ => (ours[row * 2 * h + h + i], v),
                };
                assert!(near(found, expected), "{name}: {found} for {expected}");
            }
        }
        if name == "eagle3" {
            same(
                "midlayer.hidden_norm.weight",
                "model.layers.1.input_layernorm.weight",
            );
        }
        let width = if name == "scylla" { 2 * h } else { taps * h };
        for (row, values) in own["fc.weight"].chunks(width).enumerate() {
            let last = values[width - h..].iter().enumerate();
            last.for_each(|(i, &v)| assert!((v - f32::from(u8::from(i == row))).abs() < 1e-20));
        }
    }
    for (sets, words) in [
        (
            vec!["draft.from_layers=[1]"],
            "one for each of draft.layers 2",
        ),
        (vec!["draft.from_layers=[0, 2]"], "layers 0 to 1"),
        (vec!["draft.from_layers=[0, 1]", "draft.ffn=32"], "ffn"),
        (vec!["draft.head=9999"], "draft.head"),
    ] {
        let sets: Vec<&str> = sets.iter().flat_map(|s| ["--set", *s]).collect();
        let error = place.refused(&train(&[&["--output", "refused"], &sets[..]].concat()));
        assert!(error.contains(words), "{sets:?}: {error}");
    }
}

#[test]
fn a_truncated_head_is_trained_kept_and_served() {
    let place = place(EAGLE2, STAGE);
    let done = json(
        &place,
        &train(&["--output", "out", "--set", "draft.head=40"]),
    );
    let kept = std::fs::read_to_string(place.path("out/best/head.txt")).expect("the tokens");
    let ids: Vec<u32> = kept.lines().map(|l| l.parse().expect("an id")).collect();
    assert!(
        ids.len() == 40 && ids.windows(2).all(|w| w[0] < w[1]),
        "{ids:?}"
    );
    // Served from its folder it is the draft that was checked, and proposes no other token.
    let tau = real(&done["tau"]);
    let asked = [
        "inspect",
        "tau",
        "--target",
        "talker",
        "--draft",
        "eagle2:out/best",
        "--json",
        "--set",
        "prompts.set=prompts.jsonl",
        "--set",
        "prompts.part=all",
        "--set",
        "run.max_new_tokens=24",
        "--set",
        "budget.total=6",
        "--set",
        "budget.width=2",
        "--set",
        "budget.depth=2",
    ];
    let found = json(&place, &asked);
    assert_eq!(found["real"]["tau"].as_f64(), Some(tau));
    // Beside another draft, and walked alone, it has the same answers and the same cycles; at temperature 0 both ways agree.
    let sum = |key: &str| -> u64 {
        let prompts = found["prompts"].as_array().expect("prompts");
        prompts.iter().filter_map(|p| p[key].as_u64()).sum()
    };
    assert_eq!(Some(sum("tokens")), found["real"]["tokens"].as_u64());
    assert_eq!(Some(sum("cycles")), found["real"]["cycles"].as_u64());
    let mut more = asked.to_vec();
    more.extend(["--draft", "ngram", "--walked"]);
    let both = json(&place, &more);
    let [first, second] = both["drafts"].as_array().expect("drafts").as_slice() else {
        panic!("{both}");
    };
    assert!(first["real"].is_null() && second["draft"] == "ngram");
    assert_eq!(first["simulated"], found["simulated"]);
    assert_eq!(first["prompts"], found["prompts"]);
    assert_eq!(first["positions"], found["positions"]);
    // A run that was broken off has the same head.
    json(
        &place,
        &train(&[
            "--output",
            "again",
            "--set",
            "draft.head=40",
            "--set",
            "stage.steps=120",
        ]),
    );
    assert!(bits(&place.path("out")) == bits(&place.path("again")));
}

#[test]
fn scalars_are_written_for_tensorboard() {
    let place = place(EAGLE3, STAGE);
    let more = [
        "--output",
        "out",
        "--set",
        "run.tensorboard=true",
        "--set",
        "stage.steps=5",
    ];
    json(&place, &train(&more));
    let files = std::fs::read_dir(place.path("out")).expect("a folder");
    let mut files = files.map(|e| e.expect("an entry").path());
    let path = files
        .find(|p| p.to_string_lossy().contains("tfevents"))
        .expect("an event file");
    let bytes = std::fs::read(path).expect("read");
    // Records: length, its checksum, an event, its checksum.
    let (mut at, mut events) = (0, Vec::new());
    while at < bytes.len() {
        let length = u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight")) as usize;
        events.push(&bytes[at + 12..at + 12 + length]);
        at += 16 + length;
    }
    let with = |tag: &str| {
        events
            .iter()
            .filter(|e| e.windows(tag.len()).any(|w| w == tag.as_bytes()))
            .count()
    };
    assert_eq!(with("brain.Event:2"), 1);
    for tag in [
        "loss/total",
        "accuracy/step_1",
        "optimizer/lr",
        "speed/tokens_per_s",
    ] {
        assert_eq!(with(tag), 5, "{tag}");
    }
    assert_eq!((with("tau/real"), with("tau/simulated")), (1, 1));
    // The loss of the last step, as the metrics have it.
    let last = metrics(&place.path("out"))[4]["loss"]
        .as_f64()
        .expect("a loss") as f32;
    let event = events
        .iter()
        .rev()
        .find(|e| e.windows(10).any(|w| w == b"loss/total"))
        .expect("an event");
    assert!(event.windows(4).any(|w| w == last.to_le_bytes()));
}

/// Writes a safetensors file.
fn write_tensors(path: &str, tensors: &[(&str, safetensors::Dtype, Vec<usize>, Vec<u8>)]) {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        let view = safetensors::tensor::TensorView::new(*dtype, shape.clone(), bytes);
        (*name, view.expect("a view"))
    });
    std::fs::write(
        path,
        safetensors::serialize(views, None).expect("serialised"),
    )
    .expect("written");
}

#[test]
fn states_that_others_have_computed_are_taken_over_and_trained_on() {
    use safetensors::Dtype;
    let place = place(EAGLE3, STAGE);
    std::fs::create_dir(place.path("hs")).expect("created");
    let (layers, h, mut random) = (2, 64, StdRng::seed_from_u64(3));
    let mut finals = Vec::new();
    for i in 0..12 {
        let n = 20 + i;
        let tokens: Vec<i64> = (0..n).map(|_| random.random_range(0..97)).collect();
        let ids: Vec<u8> = tokens.iter().flat_map(|t| t.to_le_bytes()).collect();
        write_tensors(
            &place.path("in.safetensors"),
            &[("tokens", Dtype::I64, vec![n], ids.clone())],
        );
        let args = [
            "inspect",
            "forward",
            "--model",
            "talker",
            "--input",
            "in.safetensors",
            "--output",
            "out.safetensors",
            "--taps",
        ];
        assert!(place.run(&args).status.success());
        // [L + 2, S, H]: what enters each layer, the last output, and the same normed.
        let hidden = &tensors(&place.path("out.safetensors"))["hidden"];
        let state = |layer: usize, row: usize| &hidden[(layer * n + row) * h..][..h];
        let rows = (0..n).flat_map(|row| (0..=layers).flat_map(move |layer| state(layer, row)));
        let states: Vec<u8> = rows.flat_map(|v| v.to_le_bytes()).collect();
        finals.push(
            (0..n)
                .flat_map(|row| state(layers + 1, row).to_vec())
                .collect::<Vec<f32>>(),
        );
        let mask: Vec<u8> = (0..n).map(|row| u8::from(row > 3)).collect();
        let mut held = vec![
            ("hidden_states", Dtype::F32, vec![n, layers + 1, h], states),
            ("token_ids", Dtype::I64, vec![n], ids),
        ];
        if i % 2 == 0 {
            held.push(("loss_mask", Dtype::U8, vec![n], mask));
        }
        write_tensors(&place.path(&format!("hs/hs_{i}.safetensors")), &held);
    }
    let import = [
        "data", "import", "hs", "--layers", "0,1,2", "--target", "talker", "--output", "features",
        "--json",
    ];
    let kept = json(&place, &import);
    assert_eq!((&kept["written"], &kept["shards"]), (&12.into(), &1.into()));
    assert!(kept["masked"].as_u64() < kept["tokens"].as_u64());
    // The final state is normed here, as the target norms it.
    let shard = tensors(&place.path("features/model-00001-of-00001.safetensors"));
    for (i, expected) in finals.iter().enumerate() {
        let found = shard[&format!("{i}.states")]
            .chunks((layers + 1) * h)
            .flat_map(|row| row[layers * h..].to_vec());
        for (a, b) in found.zip(expected) {
            assert!(
                (a - b).abs() <= b.abs() / 120.0 + 1e-5,
                "sample {i}: {a} for {b}"
            );
        }
    }
    let stage = "stage.data={ features = 'features', files = [] }";
    let more = [
        "--output",
        "out",
        "--set",
        stage,
        "--set",
        "stage.steps=4",
        "--set",
        "draft.taps=[0, 1]",
    ];
    assert_eq!(json(&place, &train(&more))["steps"], 4);
    // What is wrong is said.
    let refused = |args: &[&str]| place.refused(args);
    let again = refused(&import);
    assert!(again.contains("not empty"), "{again}");
    let error = refused(&[
        "data", "import", "hs", "--layers", "0,1", "--target", "talker", "--output", "x",
    ]);
    assert!(error.contains("end with 2"), "{error}");
    let error = refused(&[
        "data", "import", "hs", "--layers", "1,2", "--target", "talker", "--output", "x",
    ]);
    assert!(
        error.contains("hs_0") && error.contains("[20, 2, 64]"),
        "{error}"
    );
    let error = refused(&[
        "data", "import", "out", "--layers", "0,1,2", "--target", "talker", "--output", "x",
    ]);
    assert!(error.contains("hs_{i}"), "{error}");
}

#[test]
fn what_the_target_says_is_kept_in_place_of_its_final_state() {
    let place = place(EAGLE3, STAGE);
    let features = |name: &str, more: &[&str]| {
        let base = [
            "data",
            "features",
            "texts.txt",
            "--target",
            "talker",
            "--taps",
            "0,1,2",
            "--length",
            "48",
            "--output",
            name,
            "--json",
        ];
        json(&place, &[&base[..], more].concat())
    };
    let whole = features("whole", &[]);
    // Of 100 tokens 20 are kept, and then all of them.
    let few = features("few", &["--top-k", "20"]);
    features("all", &["--top-k", "100"]);
    assert!(
        few["bytes"].as_u64() > whole["bytes"].as_u64().map(|b| b / 2),
        "{few}"
    );
    let loss = |name: &str, distance: &str| {
        let stage = format!("stage.data={{ features = '{name}', files = [] }}");
        let (distance, output) = (
            format!("loss.distance={distance}"),
            format!("out-{name}-{distance}"),
        );
        let more = [
            "--output",
            &output,
            "--set",
            &stage,
            "--set",
            "stage.steps=12",
            "--set",
            &distance,
        ];
        json(&place, &train(&more));
        let lines = metrics(&place.path(&output));
        lines
            .iter()
            .map(|l| l["loss"].as_f64().expect("a loss"))
            .collect::<Vec<_>>()
    };
    for distance in ["ce", "tv"] {
        let [whole, few, all] = ["whole", "few", "all"].map(|name| loss(name, distance));
        for (step, (a, b)) in whole.iter().zip(&all).enumerate() {
            // The final state was kept in bf16, what it says in f32.
            assert!(
                (a - b).abs() < 0.01 * a,
                "{distance}, step {step}: {b} for {a}"
            );
        }
        assert!(
            few.last() < few.first() && few.iter().all(|l| l.is_finite()),
            "{few:?}"
        );
    }
    let base = [
        "data",
        "features",
        "texts.txt",
        "--target",
        "talker",
        "--output",
        "x",
        "--top-k",
    ];
    let error = place.refused(&[&base[..], &["5", "--draft", "eagle2"]].concat());
    assert!(error.contains("final states too"), "{error}");
    let error = place.refused(&[&base[..], &["101", "--taps", "0,1,2", "--length", "48"]].concat());
    assert!(error.contains("100 tokens"), "{error}");
}
