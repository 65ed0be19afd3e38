//! `scylla prove`: laws against golden values, and what scripts rely on.

use std::process::{Command, Output};

use scylla_bench::Registry;
use scylla_bench::prove::{Proposals, load};
use scylla_core::sampling::Sampling;
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
                .prove(verifier.as_ref(), Proposals::of_rule(rule))
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
