//! `scylla prove`: laws against golden values, and what scripts rely on.

use std::path::Path;
use std::process::{Command, Output};

use scylla_bench::Registry;
use scylla_bench::cases::{Proposals, load};
use scylla_core::plugin::{Chance, TargetRows, Verdict, Verifier};
use scylla_core::sampling::Sampling;
use scylla_core::tree::{Drawing, Tree};
use scylla_tests::golden;
use serde_json::{Value, json};

#[test]
fn laws_equal_the_golden_ones() {
    let Some(dir) = golden("laws_equal_the_golden_ones") else {
        return;
    };
    let path = dir.join("verify/cases.json");
    let raw: Value = serde_json::from_slice(&std::fs::read(&path).expect("read")).expect("JSON");
    let registry = Registry::default();
    for (rule, key) in [
        ("chain", "chain"),
        ("block", "block"),
        ("deterministic-tree", "deterministic_tree"),
        ("rrs-without-replacement", "rrs_without_replacement"),
        ("specinfer", "specinfer_multistep"),
    ] {
        let verifier = registry
            .make_rule(rule, &Sampling::default(), 1, toml::Table::new())
            .expect("rule");
        for (i, case) in load(&path).expect("cases").iter().enumerate() {
            let name = format!("{rule}, {}", case.name);
            let proof = case
                .prove(verifier.as_ref(), Proposals::of_rule(rule), &mut |_| {
                    std::ops::ControlFlow::Continue(())
                })
                .expect("proof");
            let expected = &raw["cases"][i]["rules"][key];
            let law = expected["law"].as_array().expect("law");
            for outcome in law {
                let tokens: Vec<u32> =
                    serde_json::from_value(outcome["tokens"].clone()).expect("tokens");
                let found = proof.law.get(&tokens).copied().unwrap_or(0.0);
                let p = outcome["prob"].as_f64().expect("prob");
                assert!(
                    (found - p).abs() < 1e-9,
                    "{name}, {tokens:?}: {found} for {p}"
                );
            }
            assert!(
                (proof.law.values().sum::<f64>() - 1.0).abs() < 1e-9,
                "{name}"
            );
            let committed = expected["expected_committed"].as_f64().expect("committed");
            assert!(
                (proof.expected_committed - committed).abs() < 1e-9,
                "{name}"
            );
            assert!(proof.tv_to_target < 1e-9, "{name}");
        }
    }
}

fn prove(cases: &Value, rule: &str, more: &[&str]) -> Output {
    let file = tempfile::NamedTempFile::new().expect("file");
    std::fs::write(file.path(), cases.to_string()).expect("write");
    Command::new(env!("CARGO_BIN_EXE_scylla"))
        .args(["prove", "--rule", rule, "--json", "--case"])
        .arg(file.path())
        .args(more)
        .output()
        .expect("starts")
}

fn cases() -> Value {
    json!({"cases": [{
        "name": "coin", "vocab": 2, "depth": 1,
        "p": {"": [0.75, 0.25], "0": [0.5, 0.5], "1": [0.0, 1.0]},
        "q": {"": [0.5, 0.5]},
        "rules": {
            "deterministic_tree": {"children": {"": [1, 0]}},
            "rrs_without_replacement": {"siblings_per_level": [2]},
            "specinfer_multistep": {"siblings_per_level": [2]}
        }
    }]})
}

#[test]
fn every_rule_prints_a_law_that_sums_to_one() {
    let registry = Registry::default();
    for rule in registry.rule_names() {
        let out = prove(&cases(), rule, &[]);
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "{rule}: {said}");
        let found: Value = serde_json::from_slice(&out.stdout).expect("one object");
        let case = &found["cases"][0];
        assert_eq!(case["name"], "coin");
        let law = case["law"].as_array().expect("law");
        let sum: f64 = law.iter().map(|o| o["prob"].as_f64().expect("prob")).sum();
        assert!((sum - 1.0).abs() < 1e-12, "{rule}");
        assert!(law.iter().all(|o| o["tokens"].is_array()), "{rule}");
        assert!(case["expected_committed"].as_f64().expect("committed") >= 1.0);
        let tv = case["tv_to_target"].as_f64().expect("tv");
        assert_eq!(tv > 1e-9, rule == "typical", "{rule}: {tv}");
    }
    // By hand: 0 is accepted from q = 1/2 always, 1 with 1/2; then token 0 leads to a second token.
    let out = prove(&cases(), "chain", &[]);
    let found: Value = serde_json::from_slice(&out.stdout).expect("one object");
    assert_eq!(found["cases"][0]["expected_committed"], 1.75);
}

#[test]
fn settings_reach_the_rule_and_the_drawer() {
    let expected = |rule: &str, more: &[&str]| {
        let out = prove(&cases(), rule, more);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success(), "{said}");
        let found: Value = serde_json::from_slice(&out.stdout).expect("one object");
        found["cases"][0]["expected_committed"]
            .as_f64()
            .expect("a number")
    };
    let independent = expected("traversal", &["--set", "proposal=specinfer"]);
    assert!(independent < expected("traversal", &[]));
    // Both children pass the default thresholds, and the first in order wins; only token 0 passes strict ones.
    let first = |more: &[&str]| {
        let found: Value =
            serde_json::from_slice(&prove(&cases(), "typical", more).stdout).expect("one object");
        found["cases"][0]["law"][0]["tokens"][0].clone()
    };
    assert_eq!(first(&[]), 1);
    assert_eq!(first(&["--set", "epsilon=0.9", "--set", "delta=1"]), 0);
}

#[test]
fn what_is_measured_is_what_was_proved() {
    for rule in ["chain", "traversal", "k-seq", "rrs-without-replacement"] {
        let out = prove(&cases(), rule, &["--cycles", "20000"]);
        let found: Value = serde_json::from_slice(&out.stdout).expect("one object");
        let [proved, measured] = ["expected_committed", "measured_committed"]
            .map(|key| found["cases"][0][key].as_f64().expect("a number"));
        // Lengths are 1 or 2: five standard deviations of a mean of 20000.
        assert!(
            (proved - measured).abs() < 5.0 * 0.5 / 20_000f64.sqrt(),
            "{rule}"
        );
    }
}

#[test]
fn bad_input_is_answered_with_what_to_do() {
    let without = |key: &str| {
        let mut cases = cases();
        cases["cases"][0]["p"]
            .as_object_mut()
            .expect("p")
            .remove(key);
        cases
    };
    let mut wrong = cases();
    wrong["cases"][0]["q"][""] = json!([0.5, 0.4]);
    let mut bare = cases();
    bare["cases"][0]["rules"] = json!({});
    let mut huge = cases();
    huge["cases"][0]["vocab"] = json!(60);
    huge["cases"][0]["depth"] = json!(8);
    for (cases, rule, more, word) in [
        (without("1"), "chain", &[][..], "p after `1` is missing"),
        (wrong, "chain", &[], "sum to 0.9"),
        (bare, "specinfer", &[], "siblings_per_level"),
        (huge, "chain", &[], "too many sequences"),
        (cases(), "magic", &[], "known: auto, greedy, chain, block"),
        (cases(), "typical", &["--set", "epsilon=2"], "at most 1"),
        (
            cases(),
            "chain",
            &["--set", "epsilon=2"],
            "no setting `epsilon`",
        ),
        (
            cases(),
            "traversal",
            &["--set", "proposal=x"],
            "unknown proposal `x`",
        ),
        (cases(), "chain", &["--cycles", "0"], "at least 1"),
        (json!({"cases": []}), "chain", &[], "holds no case"),
        (json!([]), "chain", &[], "not a file of cases"),
        // A rule whose trees are not those it wants says so.
        (
            cases(),
            "chain",
            &["--set", "proposal=specinfer"],
            "verifies chains",
        ),
    ] {
        let out = prove(&cases, rule, more);
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(
            !out.status.success() && out.stdout.is_empty(),
            "{rule} {word}"
        );
        assert!(said.contains(word), "no `{word}` in: {said}");
    }
}

#[test]
fn a_test_on_a_model_that_could_show_nothing_is_refused() {
    for (more, word) in [
        (&["--temperature", "0"][..], "temperature above 0"),
        (&["--cycles", "10"], "at least 1000 cycles"),
        (&["--temperature", "-1"], "temperature is -1"),
    ] {
        let out = Command::new(env!("CARGO_BIN_EXE_scylla"))
            .args(["prove", "--rule", "chain", "--target", "nowhere"])
            .args(more)
            .output()
            .expect("starts");
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(!out.status.success() && said.contains(word), "{said}");
    }
}

/// Looks at no tree and commits one token, without chance.
struct Blind;

impl Verifier for Blind {
    fn name(&self) -> &str {
        "blind"
    }
    fn exact_for(&self, _: Drawing, _: usize, _: &Sampling) -> bool {
        false
    }
    fn verify(
        &self,
        _: &Tree,
        _: &dyn TargetRows,
        _: &mut dyn Chance,
    ) -> scylla_core::Result<Verdict> {
        Ok(Verdict {
            path: Vec::new(),
            bonus: 0,
        })
    }
}

#[test]
fn the_trees_said_beforehand_are_those_that_are_drawn() {
    let cases = load(Path::new(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../assets/cases/tables.json"
    )))
    .expect("cases");
    for case in &cases {
        for proposals in [
            Proposals::Chain,
            Proposals::Fixed,
            Proposals::WithoutReplacement,
            Proposals::Independent,
        ] {
            let said = case.trees(proposals).expect("trees");
            if said > 1e5 {
                continue; // beyond a test's patience
            }
            let go_on = &mut |_: f64| std::ops::ControlFlow::Continue(());
            let drawn = case
                .prove(&Blind, proposals, go_on)
                .expect("proof")
                .branches;
            assert_eq!(said, drawn as f64, "{}, {proposals:?}", case.name);
        }
    }
}

/// Two siblings on three levels over four tokens.
fn large_case() -> Value {
    let row = |prefix: &str, i: usize| {
        let weight = |t: usize| 1.0 + ((prefix.len() * 7 + i * 3 + t * t) % 5) as f64;
        let sum: f64 = (0..4).map(weight).sum();
        (0..4).map(|t| weight(t) / sum).collect::<Vec<f64>>()
    };
    let table = |levels: usize, i: usize| {
        let mut rows = serde_json::Map::new();
        let mut prefixes = vec![String::new()];
        for _ in 0..levels {
            let mut next = Vec::new();
            for prefix in &prefixes {
                rows.insert(prefix.clone(), serde_json::json!(row(prefix, i)));
                let separator = if prefix.is_empty() { "" } else { "," };
                next.extend((0..4).map(|t| format!("{prefix}{separator}{t}")));
            }
            prefixes = next;
        }
        rows
    };
    let shape = serde_json::json!({"siblings_per_level": [2, 2, 2]});
    serde_json::json!({"cases": [{"name": "large", "vocab": 4, "depth": 3, "p": table(4, 0), "q": table(3, 1),
        "rules": {"rrs_without_replacement": shape, "specinfer_multistep": shape}}]})
}

#[test]
fn what_is_beyond_reach_is_said_at_once_and_sampled_with_a_stated_confidence() {
    let cases = large_case();
    let out = prove(&cases, "rrs-without-replacement", &[]);
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success());
    // 12 pairs of leaves, 12 * 12^2 below each of a pair, 12 * 1728^2 in all.
    for word in ["35831808", "`large`", "--sample", "--exhaustive"] {
        assert!(said.contains(word), "no `{word}` in: {said}");
    }
    for (rule, exact) in [
        ("rrs-without-replacement", true),
        ("traversal", true),
        ("typical", false),
    ] {
        let more = [
            "--sample",
            "40000",
            "--seed",
            "3",
            "--set",
            "proposal=rrs-without-replacement",
        ];
        let out = prove(&cases, rule, &more);
        assert!(
            out.status.success(),
            "{}",
            String::from_utf8_lossy(&out.stderr)
        );
        let found: Value = serde_json::from_slice(&out.stdout).expect("JSON");
        let case = &found["cases"][0];
        let bound = &case["sampled"];
        assert_eq!(
            (&bound["cycles"], &bound["confidence"]),
            (&40000.into(), &0.99.into())
        );
        let (tv, most) = (
            case["tv_to_target"].as_f64().expect("tv"),
            bound["tv_at_most"].as_f64().expect("bound"),
        );
        // sqrt(256 / 40000) / 2 + sqrt(ln 100 / 80000)
        assert!((most - tv - 0.0475871).abs() < 1e-6, "{tv} {most}");
        let p = bound["p_value"].as_f64().expect("p");
        // The seed is fixed, so this is no matter of chance.
        assert_eq!(p > 1e-3, exact, "{rule}: p = {p}");
    }
}
