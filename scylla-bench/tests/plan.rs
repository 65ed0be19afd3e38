//! `scylla plan` on tiny models and made-up machines.

mod common;

use common::Place;
use serde_json::Value;

fn output(place: &Place, args: &[&str]) -> (bool, String, String) {
    let out = place.command(args).output().expect("run");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (out.status.success(), text(&out.stdout), text(&out.stderr))
}

fn json(place: &Place, args: &[&str]) -> Value {
    let (done, out, err) = output(place, args);
    assert!(done, "{err}");
    serde_json::from_str(&out).expect("one JSON object")
}

fn failed(place: &Place, args: &[&str]) -> String {
    let (done, _, err) = output(place, args);
    assert!(!done);
    err
}

const MEASURE: [&str; 14] = [
    "plan",
    "--measure",
    "costs.csv",
    "--target",
    "model",
    "--draft",
    "ngram",
    "--batch",
    "1,2",
    "--context",
    "8",
    "--rounds",
    "2",
    "--json",
];

/// Lines but for comments and the header, without their times.
fn places(place: &Place) -> Vec<String> {
    let text = std::fs::read_to_string(place.path("costs.csv")).expect("a table");
    let lines = text.lines().filter(|line| !line.starts_with(['#', 'w']));
    let mut all: Vec<String> = lines
        .map(|line| line.rsplit_once(',').expect("a time").0.to_string())
        .collect();
    all.sort();
    all
}

#[test]
fn a_measurement_that_was_cut_off_goes_on_and_that_of_another_machine_is_refused() {
    let place = Place::new();
    json(&place, &MEASURE);
    let whole = places(&place);
    for expected in [
        "forward,1,1,8,0",
        "forward,2,8,8,0",
        "between,2,1,8,0",
        "between,1,4,8,0",
    ] {
        let count = whole.iter().filter(|line| *line == expected).count();
        assert!(count >= 2, "{expected} {count}: {whole:?}");
    }
    let said = json(
        &place,
        &[
            "plan",
            "--costs",
            "costs.csv",
            "--alpha",
            "0.5",
            "--layers",
            "0",
            "--json",
        ],
    );
    assert!(
        said["roofline"]["bytes_per_s"].as_f64().expect("shapes") > 0.0,
        "{said}"
    );
    let text = std::fs::read_to_string(place.path("costs.csv")).expect("a table");
    let half = &text[..text.len() / 2];
    std::fs::write(place.path("costs.csv"), half).expect("written");
    json(&place, &MEASURE);
    let again = places(&place);
    let missing = whole.iter().filter(|line| !again.contains(line));
    assert_eq!(missing.count(), 0, "{again:?}");
    let before = again.len();
    json(&place, &MEASURE);
    assert_eq!(places(&place).len(), before, "nothing was left to measure");

    let two = [
        "plan",
        "--measure",
        "two.csv",
        "--target",
        "model",
        "--draft",
        "ngram",
        "--draft",
        "suffix",
    ];
    let said = failed(&place, &two);
    assert!(said.contains("a file of its own"), "{said}");
    let suffix = MEASURE.map(|arg| if arg == "ngram" { "suffix" } else { arg });
    let said = failed(&place, &suffix);
    assert!(said.contains("measured elsewhere"), "{said}");
    let other = text.replacen("\"threads\":", "\"threads\":1", 1);
    std::fs::write(place.path("costs.csv"), other).expect("written");
    let said = failed(&place, &MEASURE);
    assert!(said.contains("measured elsewhere"), "{said}");
    std::fs::write(place.path("costs.csv"), "what,batch\nforward,1\n").expect("written");
    let said = failed(&place, &MEASURE);
    assert!(
        said.contains("costs.csv") && said.contains("line 1"),
        "{said}"
    );
}

#[test]
fn a_machine_that_is_not_at_hand_is_planned_for_by_its_peaks() {
    let place = Place::new();
    let with = |sheet: &'static str| {
        [
            "plan",
            "--measure",
            "sheet.csv",
            "--datasheet",
            sheet,
            "--target",
            "model",
            "--batch",
            "1,4",
            "--context",
            "8",
            "--json",
        ]
    };
    json(&place, &with("1e15,1e9"));
    let text = std::fs::read_to_string(place.path("sheet.csv")).expect("a table");
    let shapes = text
        .lines()
        .find_map(|line| line.strip_prefix("# target: "));
    let shapes: Value = serde_json::from_str(shapes.expect("shapes")).expect("JSON");
    let of = |key: &str| shapes[key].as_f64().expect("a number");
    // Reading is all: a second for a billion bytes, the same for every row.
    for (batch, rows) in [(1, 1), (4, 8)] {
        let line = format!("forward,{batch},{rows},8,0,");
        let seconds = text.lines().find_map(|l| l.strip_prefix(&line));
        let seconds: f64 = seconds.expect("a forward").parse().expect("a number");
        let bytes = of("weight_bytes") + f64::from(batch) * 8.0 * of("position_bytes");
        assert!((seconds - bytes / 1e9).abs() < 1e-12, "{seconds}");
    }
    json(&place, &with("1e15,1e9"));
    let again = std::fs::read_to_string(place.path("sheet.csv")).expect("a table");
    assert_eq!(again, text, "it was whole");
    let args = [
        "plan",
        "--costs",
        "sheet.csv",
        "--alpha",
        "0.7",
        "--layers",
        "0",
        "--json",
    ];
    let said = json(&place, &args);
    // Where rows are free drafting pays at every batch.
    assert!(said["off_from_batch"].is_null(), "{said}");
    let said = failed(&place, &with("2e15,1e9"));
    assert!(said.contains("measured elsewhere"), "{said}");
    let said = failed(&place, &with("1e15"));
    assert!(said.contains("bytes a second"), "{said}");
}

/// A machine on which a row more costs a tenth of a forward, and a level of D layers a tenth and D fiftieths.
fn machine() -> String {
    let mut text = "what,batch,rows,context,layers,seconds\n".to_string();
    for batch in [1usize, 4, 16, 64] {
        for rows in [1usize, 2, 4, 8, 16] {
            let seconds = 1e-3 * (1.0 + 0.1 * ((batch * rows) as f64 - 1.0));
            text += &format!("forward,{batch},{rows},64,0,{seconds}\n");
            for layers in [1, 2] {
                let seconds = 1e-3 * (0.03 + 0.02 * f64::from(layers));
                text += &format!("draft,{batch},{rows},64,{layers},{seconds}\n");
            }
        }
    }
    text
}

#[test]
fn rates_and_costs_make_a_plan_that_engines_take() {
    let place = Place::new();
    std::fs::write(place.path("costs.csv"), machine()).expect("written");
    let plan = [
        "plan",
        "--costs",
        "costs.csv",
        "--alpha",
        "0.7,0.6,0.5",
        "--batch",
        "1,2,4,8,16,32",
    ];
    let with = |more: &[&'static str]| [&plan[..], more].concat();
    let said = json(&place, &with(&["--json"]));
    let choices = said["choices"].as_array().expect("choices");
    assert_eq!(choices.len(), 6);
    for choice in choices {
        for key in ["batch", "draft", "layers", "tau"] {
            assert!(choice.get(key).is_some(), "{key}: {choice}");
        }
        for key in ["total", "width", "depth"] {
            assert!(choice["budget"][key].is_u64(), "{choice}");
        }
        let speed = |key: &str| choice["tokens_per_s"][key].as_f64().expect("a speed");
        assert!(
            speed("low") <= speed("value") && speed("value") <= speed("high"),
            "{choice}"
        );
    }
    // 2.12 tokens in 1.2 and 0.1 ms; a third token costs more than it brings.
    assert_eq!(choices[0]["budget"]["total"], 3);
    let speed = choices[0]["tokens_per_s"]["value"]
        .as_f64()
        .expect("a speed");
    assert!((speed - 2.12 / 1.3e-3).abs() < 1.0, "{speed}");
    let off = said["off_from_batch"]
        .as_u64()
        .expect("off from some batch");
    assert!((8..=32).contains(&off), "{off}");

    // Two trees that are asked for, beside plain decoding.
    let two = json(&place, &with(&["--budgets", "3/1/1,2/1/0", "--json"]));
    let cells = two["cells"].as_array().expect("cells");
    assert_eq!(cells.len(), 6 * 3);
    let (plain, chosen) = (&cells[0], &two["choices"][0]);
    assert!(plain["draft"].is_null() && chosen["budget"]["total"] == 3);
    let of = |total: usize| {
        let found = cells.iter().find(|c| c["budget"]["total"] == total);
        found.expect("a cell")["tokens_per_s"]["value"].as_f64()
    };
    assert_eq!(of(3), chosen["tokens_per_s"]["value"].as_f64());
    assert!(of(2) < of(3) && of(1) == plain["plain_tokens_per_s"].as_f64());
    assert!(said.get("cells").is_none());

    let shuffled = [
        "plan",
        "--costs",
        "costs.csv",
        "--alpha",
        "0.7,0.6,0.5",
        "--batch",
        "32,4,1,16,2,8,4",
        "--json",
    ];
    assert_eq!(json(&place, &shuffled), said);

    let (done, out, flags) = output(
        &place,
        &with(&["--export", "vllm", "--draft", "eagle3:drafts/e"]),
    );
    assert!(done && flags.contains("--speculative-config"), "{flags}");
    let config: Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(config["model"], "drafts/e");
    let table = config["num_speculative_tokens_per_batch_size"]
        .as_array()
        .expect("a table");
    assert_eq!((&table[0][0], &table[0][2]), (&1.into(), &2.into()));
    assert_eq!(table.last().expect("off")[2], 0);
    for (engine, expected) in [
        ("sglang", "candidate_steps"),
        ("llama.cpp", "--spec-draft-n-max 2"),
        ("scylla", "policy = \"table\""),
    ] {
        let (done, out, err) = output(&place, &with(&["--export", engine]));
        assert!(done && out.contains(expected), "{out} {err}");
    }
}

#[test]
fn laws_make_a_plan_and_say_what_more_training_would_bring() {
    let place = Place::new();
    std::fs::write(place.path("costs.csv"), machine()).expect("written");
    // Runs with prompts, as sweeps leave them.
    let mut points = Vec::new();
    for layers in [1usize, 2] {
        for power in 15..=20 {
            let tokens = f64::from(1 << power);
            let alpha = 0.1 * (tokens / 3e4).ln() + 0.3;
            let tau = 1.0 + alpha + alpha * alpha;
            let prompt = |i: usize| serde_json::json!({"id": format!("p{i}"), "tokens": 100.0 * tau, "cycles": 100.0, "alpha": [alpha, alpha]});
            points.push(serde_json::json!({
                "family": "scylla", "layers": layers, "tokens": tokens, "seed": 0, "tau": tau,
                "prompts": (0..4).map(prompt).collect::<Vec<_>>(),
            }));
        }
    }
    let laws = serde_json::json!({ "points": points }).to_string();
    std::fs::write(place.path("fit.json"), laws).expect("written");
    let said = json(
        &place,
        &[
            "plan",
            "--costs",
            "costs.csv",
            "--laws",
            "fit.json",
            "--json",
        ],
    );
    let first = &said["choices"][0];
    assert_eq!(first["draft"], "scylla");
    // A second layer costs and brings nothing here.
    assert_eq!(first["layers"], 1);
    assert_eq!(first["tokens"].as_f64(), Some(f64::from(1 << 20)));
    let more = said["more"].as_array().expect("more");
    assert_eq!(more.len(), 2);
    let speed = |of: &Value| of["tokens_per_s"]["value"].as_f64().expect("a speed");
    assert!(speed(&more[0]["choice"]) > speed(first), "{said}");
    assert!(speed(&more[1]["choice"]) < speed(first), "{said}");

    let args = [
        "plan",
        "--costs",
        "costs.csv",
        "--laws",
        "fit.json",
        "--predict",
        "family=scylla,layers=9,tokens=1e6",
    ];
    let (done, out, err) = output(&place, &args);
    assert!(done && out.contains("batch"), "{err}");
}

#[test]
fn what_cannot_be_planned_is_told() {
    let place = Place::new();
    std::fs::write(place.path("costs.csv"), machine()).expect("written");
    std::fs::write(place.path("fit.json"), "{}").expect("written");
    std::fs::write(
        place.path("empty.csv"),
        "what,batch,rows,context,layers,seconds\n",
    )
    .expect("written");
    let plan = ["plan", "--costs", "costs.csv"];
    for (args, expected) in [
        (vec!["--alpha", "0.7,x"], "`x` is no number"),
        (vec!["--alpha", "1.7"], "no rate"),
        (vec!["--alpha", "0.7/0.5"], "more than 1"),
        (
            vec!["--alpha", "0.7", "--ranks", "66,18"],
            "--ranks are shares",
        ),
        (vec![], "what is accepted?"),
        (vec!["--laws", "fit.json"], "fit.json: not what `scylla fit"),
        (vec!["--laws", "absent.json"], "absent.json"),
        (vec!["--trace", "absent"], "absent"),
        (vec!["--alpha", "0.5", "--batch", "0"], "1 at least"),
        (vec!["--alpha", "0.5", "--budgets", "3/1"], "5/2/2 is meant"),
        (
            vec!["--alpha", "0.5", "--budgets", "1/1/0"],
            "5/2/2 is meant",
        ),
        (
            vec!["--alpha", "0.5", "--budgets", "5/2/1"],
            "nothing of such trees",
        ),
    ] {
        let said = failed(&place, &[&plan[..], &args].concat());
        assert!(said.contains(expected), "{args:?}: {said}");
    }
    let said = failed(&place, &["plan", "--costs", "empty.csv", "--alpha", "0.5"]);
    assert!(said.contains("no forward"), "{said}");
    let said = failed(&place, &["plan", "--alpha", "0.5"]);
    assert!(said.contains("--costs"), "{said}");
}
