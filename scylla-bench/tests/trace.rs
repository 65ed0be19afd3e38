//! Dense traces and their replay on the command line.

mod common;

use std::io::Write;

use common::Place;
use scylla_tests::{Tiny, TinyDraft, byte_level_tokenizer};
use serde_json::{Value, json};

/// A folder with a tiny target that has a tokenizer, a random draft, and prompts.
fn place() -> Place {
    let place = Place::new();
    let tokenizer = byte_level_tokenizer(&[]).to_string();
    std::fs::write(place.path("model/tokenizer.json"), tokenizer).expect("written");
    let template = "{% for m in messages %}{{ m.content }}\n{% endfor %}";
    let config = json!({"chat_template": template}).to_string();
    std::fs::write(place.path("model/tokenizer_config.json"), config).expect("written");
    TinyDraft::new(&Tiny::default(), "eagle", json!({}), 7).write(&place.dir.path().join("eagle2"));
    let rows = (0..5).map(|i| {
        let turns = [json!(["abc abc"]), json!(["say it", "once more"])];
        json!({"id": i, "category": (["a", "b"][i % 2]), "turns": turns[i % 2]}).to_string()
    });
    std::fs::write(place.path("set.jsonl"), rows.collect::<Vec<_>>().join("\n")).expect("written");
    place
}

/// A bench of one draft, with more settings.
fn bench<'a>(draft: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let base = "bench --json --set target.model=model --set prompts.set=set.jsonl --set prompts.part=all \
                --set prompts.per_task=0 --set run.max_new_tokens=12 --set run.repeats=1 --set run.ignore_eos=true \
                --set compare=[] --set run.threads=1";
    let draft = [
        "--set",
        draft,
        "--set",
        "draft.weights=q4",
        "--set",
        "draft.dir=model",
    ];
    base.split_whitespace()
        .chain(draft)
        .chain(more.iter().copied())
        .collect()
}

const LARGE: [&str; 6] = [
    "--set",
    "budget.total=24",
    "--set",
    "budget.width=4",
    "--set",
    "budget.depth=3",
];

fn dense(place: &Place, out: &str) -> String {
    let out_set = format!("run.output={out}");
    let more = [&LARGE[..], &["--trace", "dense", "--set", &out_set]].concat();
    place.json(&bench("draft.name=draft-lm", &more));
    place.path(&format!("{out}/dense-1.jsonl"))
}

#[test]
fn a_bench_records_what_replays_as_benches_of_other_budgets() {
    let place = place();
    dense(&place, "large");
    let light = place.path("light/dense-1.jsonl");
    for small in [
        vec![],
        vec!["budget.total=6", "budget.width=2"],
        vec!["draft.tree=chain", "budget.depth=1"],
    ] {
        let sets: Vec<&str> = small.iter().flat_map(|s| ["--set", *s]).collect();
        let more = [&LARGE[..], &sets, &["--set", "run.output=light"]].concat();
        let found = place.json(&bench("draft.name=draft-lm", &more));
        assert!(
            !std::path::Path::new(&light).exists(),
            "a light trace is light"
        );
        let row = found["rows"].as_array().expect("rows").iter();
        let row = row
            .clone()
            .find(|r| r["draft"] == "draft-lm" && r["task"] == "all")
            .expect("a row");
        let again = place.json(&[&["replay", "large", "--json"][..], &sets].concat());
        assert_eq!(
            (&again["tau"], &again["alpha"]),
            (&row["tau"], &row["alpha"]),
            "{small:?}"
        );
        assert!(
            again["tau"].as_f64().expect("tau") > 1.2,
            "a draft that is right now and then"
        );
        // Prompt by prompt and turn by turn: five conversations, of which two have a second turn.
        assert_eq!(again["texts"], 7);
        let run = scylla_bench::runs::read(&place.dir.path().join("light")).expect("a run");
        let mut cycles: Vec<_> = run.cycles.iter().filter(|c| c.decoder == 1).collect();
        cycles.sort_by_key(|c| c.prompt.parse::<usize>().expect("a number"));
        let expected = cycles
            .iter()
            .map(|c| json!({"nodes": c.record.nodes, "accepted": c.record.accepted}));
        assert_eq!(again["cycles"], Value::Array(expected.collect()));
    }
    // Plans with it are made for the positions that its answers' tokens see.
    let costs = "what,batch,rows,context,layers,seconds\nforward,1,1,8,0,0.001\nforward,1,8,8,0,0.002\ndraft,1,1,8,1,0.0001\n";
    std::fs::write(place.path("costs.csv"), costs).expect("written");
    let plan = ["plan", "--costs", "costs.csv", "--trace", "large", "--json"];
    let (mut positions, mut tokens) = (0.0, 0.0);
    for line in std::fs::read_to_string(place.path("large/dense-1.jsonl"))
        .expect("a trace")
        .lines()
    {
        let line: Value = serde_json::from_str(line).expect("JSON");
        if let Some(answer) = line["text"]["answer"].as_array() {
            let before = line["text"]["prompt_tokens"].as_f64().expect("a number");
            positions += answer.len() as f64 * (before + answer.len() as f64 / 2.0);
            tokens += answer.len() as f64;
        }
    }
    let context = |more: &[&str]| place.json(&[&plan[..], more].concat())["context"].clone();
    assert_eq!(context(&[]), (positions / tokens).round() as u64);
    assert_eq!(context(&["--context", "9"]), 9);
    // In words, and by the file's own name.
    let out = place.run(&["replay", "large/dense-1.jsonl"]);
    assert!(out.status.success());
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(
        text.starts_with("tau ") && text.contains("7 texts"),
        "{text}"
    );
}

#[test]
fn candidates_carry_what_the_target_says_of_them() {
    let place = place();
    let text = std::fs::read_to_string(dense(&place, "large")).expect("a trace");
    let mut answer = Vec::new();
    let mut best = 0;
    for line in text.lines().skip(1) {
        let line: Value = serde_json::from_str(line).expect("JSON");
        if let Some(text) = line.get("text") {
            answer = text["answer"].as_array().expect("ids").clone();
            continue;
        }
        let place = &line["place"];
        let next = &answer[place["at"].as_u64().expect("a place") as usize + 1];
        let list = |key: &str| place[key].as_array().expect("a list").clone();
        // Of the root's children the one that the target says is the target's best, and no other.
        let children = list("open")[1].as_u64().expect("a count") as usize;
        for i in 0..children {
            let first = list("ranks")[i] == 0;
            assert_eq!(first, list("tokens")[i] == *next);
            best += usize::from(first);
        }
        let p: f64 = list("p")[..children]
            .iter()
            .map(|p| p.as_f64().expect("p"))
            .sum();
        assert!(p <= 1.001, "{p}");
    }
    assert!(best > 20, "{best}");
}

#[test]
fn what_cannot_be_replayed_is_refused_with_the_reason() {
    let place = place();
    dense(&place, "large");
    for (set, words) in [
        ("budget.total=25", "recorded with total 24"),
        ("budget.width=5", "recorded with width 4"),
        ("budget.depth=4", "recorded with depth 3"),
        ("budget.policy=adaptive", "measured time"),
        ("draft.early_stop=true", "clock"),
        ("draft.weights=f32", "another draft"),
        ("draft.name=ngram", "another draft"),
        ("sampling.temperature=1", "greedy text"),
        ("target.model=model", "greedy text"),
        ("verifier.name=typical", "other text than the target's own"),
        ("verifier.name=nonsense", "nonsense"),
        ("run.max_new_tokens=13", "recorded with 12"),
        ("run.max_new_tokens=0", "recorded with 12"),
        ("run.batch=2", "batch"),
        ("draft.tree=bush", "bush"),
    ] {
        let error = place.refused(&["replay", "large", "--set", set]);
        assert!(error.contains(words), "{set}: {error}");
    }
    for (set, tau) in [
        ("budget.policy=off", true),
        ("run.max_new_tokens=5", false),
        ("verifier.name=greedy", false),
    ] {
        let found = place.json(&["replay", "large", "--json", "--set", set]);
        assert_eq!(found["tau"] == 1.0, tau, "{set}");
    }
    // What is refused before anything is decoded, and what no trace can be made of.
    let error = place.refused(&bench(
        "draft.name=draft-lm",
        &["--trace", "dense", "--set", "sampling.temperature=1"],
    ));
    assert!(error.contains("greedy text"), "{error}");
    let out = place.run(&[
        "bench",
        "--trace",
        "dense",
        "--set",
        "target.model=model",
        "--set",
        "prompts.set=set.jsonl",
        "--set",
        "prompts.part=all",
        "--set",
        "compare=[]",
        "--set",
        "draft.name=ngram",
        "--set",
        "run.max_new_tokens=6",
        "--set",
        "run.output=ngram",
    ]);
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(
        !out.status.success() && said.contains("only drafts that grow trees"),
        "{said}"
    );
    assert!(
        place.path("ngram/summary.json").len() > 1
            && std::path::Path::new(&place.path("ngram/summary.json")).exists()
    );
    assert!(
        place
            .refused(&["replay", "ngram"])
            .contains("no dense trace")
    );
}

#[test]
fn a_foreign_or_broken_trace_is_an_error_that_names_the_line() {
    let place = place();
    let path = dense(&place, "large");
    let whole = std::fs::read_to_string(&path).expect("a trace");
    let refused = |text: &[u8]| {
        std::fs::write(place.path("bad.jsonl"), text).expect("written");
        place.refused(&["replay", "bad.jsonl"])
    };
    let lines: Vec<&str> = whole.lines().collect();
    let with = |at: usize, line: &str| {
        let mut lines = lines.clone();
        lines[at] = line;
        (lines.join("\n") + "\n").into_bytes()
    };
    for (text, words) in [
        (Vec::new(), vec!["not the beginning of a dense trace"]),
        (
            std::fs::read(place.path("large/cycles.jsonl")).expect("cycles"),
            vec!["line 1", "dense trace"],
        ),
        (
            with(0, &lines[0].replace("\"version\":1", "\"version\":2")),
            vec!["line 1", "version 2"],
        ),
        (
            with(0, &lines[0].replace("\"total\":24", "\"total\":0")),
            vec!["line 1", "total 0"],
        ),
        (with(2, ""), vec!["line 3"]),
        (with(2, lines[3]), vec!["line 3", "place 0"]),
        (
            with(2, &lines[2].replace("\"open\":[0,", "\"open\":[0,0,0,")),
            vec!["line 3", "open"],
        ),
        (
            with(2, &lines[2].replace("\"open\":[0,", "\"open\":[9999,")),
            vec!["line 3", "open"],
        ),
        (
            with(2, &lines[2].replace("\"ranks\":[", "\"ranks\":[1,")),
            vec!["line 3", "ranks"],
        ),
        (
            with(2, &lines[2].replace("\"logs\":[", "\"logs\":[-1,")),
            vec!["line 3"],
        ),
        (with(1, lines[2]), vec!["line 2", "before any text"]),
        (with(1, lines[0]), vec!["line 2", "another trace"]),
        (
            with(1, &lines[1].replace("\"context\":256", "\"context\":1")),
            vec!["line 2", "limits"],
        ),
        (
            whole.as_bytes()[..whole.len() - 7].to_vec(),
            vec!["middle of a line"],
        ),
        (
            (lines[..4].join("\n") + "\n").into_bytes(),
            vec!["cut short"],
        ),
        (b"\xff\xfe\x00".to_vec(), vec!["middle of a line"]),
    ] {
        let error = refused(&text);
        for word in words {
            assert!(error.contains(word), "no `{word}` in: {error}");
        }
    }
    assert!(place.refused(&["replay", "absent"]).contains("absent"));
    // Any byte that is changed leaves a trace that is sound, or an error with its line.
    let bytes = whole.as_bytes();
    for i in (0..4000).map(|i| i * 7919 % bytes.len()).take(150) {
        let mut changed = bytes.to_vec();
        changed[i] = changed[i].wrapping_add(1 + (i % 250) as u8);
        std::fs::write(place.path("bad.jsonl"), &changed).expect("written");
        let out = place.run(&["replay", "bad.jsonl"]);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!said.contains("panicked"), "byte {i}: {said}");
        assert!(
            out.status.success() || said.contains("line "),
            "byte {i}: {said}"
        );
    }
}

/// Files longer than 16 KiB (32 in some shells) cannot be written, as on a full disk.
#[cfg(unix)]
#[test]
fn a_full_disk_keeps_the_texts_that_were_written() {
    let place = place();
    let more = [
        &LARGE[..],
        &["--trace", "dense", "--set", "run.output=full"],
    ]
    .concat();
    let args = bench("draft.name=draft-lm", &more);
    let out = place.behind("trap '' XFSZ; ulimit -f 32", &args);
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(
        !out.status.success() && said.contains("texts before are whole"),
        "{said}"
    );
    let found = place.json(&["replay", "full", "--json"]);
    let kept = found["texts"].as_u64().expect("a count");
    assert!((1..7).contains(&kept), "{kept}: {said}");
}

/// A trace of one text of a million tokens is read as it is walked: its file is many times the memory allowed.
#[cfg(target_os = "linux")]
#[test]
fn a_million_cycles_are_replayed_in_bounded_memory() {
    let place = place();
    let header = std::fs::read_to_string(dense(&place, "large")).expect("a trace");
    let header = header.lines().next().expect("a header");
    let count = 1_000_001;
    let file = std::fs::File::create(place.path("long.jsonl")).expect("a file");
    let mut to = std::io::BufWriter::new(file);
    let answer = vec!["5"; count].join(",");
    writeln!(to, "{header}").expect("written");
    writeln!(
        to,
        "{{\"text\":{{\"prompt\":\"long\",\"task\":\"a\",\"turn\":0,\"prompt_tokens\":3,\"answer\":[{answer}],\"max_new_tokens\":2000000,\
         \"context\":4000000,\"most\":97}}}}"
    )
    .expect("written");
    for at in 0..count - 1 {
        writeln!(
            to,
            "{{\"place\":{{\"at\":{at},\"open\":[0,3],\"tokens\":[7,8,9],\"logs\":[1000000000,2000000000,2000000000],\
             \"ranks\":[11,12,13],\"p\":[0.01,0.001,0.0001]}}}}"
        )
        .expect("written");
    }
    to.flush().expect("written");
    drop(to);
    let bytes = std::fs::metadata(place.path("long.jsonl"))
        .expect("a file")
        .len();
    assert!(bytes > 100 << 20, "{bytes}");
    // Address space, in KiB: the program and its threads' stacks, and a fraction of the file.
    let args = ["replay", "long.jsonl", "--set", "budget.depth=0"];
    let out = place.behind("ulimit -v 262144", &args);
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success(), "{said}");
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(
        text.starts_with("tau 1.0000: 1000000 tokens in 1000000 cycles of 1 texts"),
        "{text}"
    );
}
