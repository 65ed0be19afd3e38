//! The transport core and the grouping of tokens against reference values (`SCYLLA_GOLDEN`).

use multilevel_ot::bytes::{Group, groups};
use multilevel_ot::transport::{Problem, Scaling, Settings, Stop, sinkhorn};
use scylla_tests::{Tensors, golden};
use serde_json::Value;

fn json(path: &std::path::Path) -> Value {
    let text = std::fs::read_to_string(path).expect("golden file");
    serde_json::from_str(&text).expect("JSON")
}

fn number(v: &Value) -> f64 {
    v.as_f64().expect("number")
}

#[test]
fn entropic_costs_and_plans_agree_with_the_reference() {
    let Some(dir) = golden("entropic transport").map(|d| d.join("multilevel-ot")) else {
        return;
    };
    let tensors = Tensors::read(&dir.join("sinkhorn.safetensors"));
    for case in json(&dir.join("sinkhorn.json")).as_array().expect("cases") {
        let id = &case["id"];
        let tensor = |name: &str| tensors.f64(&format!("{id}.{name}"));
        let (cost, a, b) = (tensor("C"), tensor("a"), tensor("b"));
        let problem = Problem {
            cost: &cost,
            a: &a,
            b: &b,
        };
        let exact = number(&case["exact_W"]);
        for (epsilon, expected) in case["eps"].as_object().expect("eps") {
            let epsilon: f64 = epsilon.parse().expect("number");
            let settings = Settings {
                epsilon,
                stop: Stop::Error(1e-13, 300_000),
                scaling: 0.5,
            };
            let found = sinkhorn(&problem, &settings).expect("solves");
            // The reference stopped at the error it names.
            let room = 1e-9 + 10.0 * number(&expected["marg_err"]) + 10.0 * found.error;
            let off = (found.cost - number(&expected["cost"])).abs();
            assert!(
                off <= room,
                "{id}, {epsilon}: off by {off}, error {}",
                found.error
            );
            let above = found.cost - exact;
            let most = epsilon * ((a.len() * b.len()) as f64).ln();
            assert!(
                above >= -room && above <= most + room,
                "{id}, {epsilon}: {above}"
            );
            if epsilon == 0.1 {
                // One of them it left before it had settled.
                let settled = number(&expected["iters"]) < 100_000.0;
                let room = if settled { 1e-8 } else { 1e-6 };
                for (x, y) in found.plan.iter().zip(tensor("P_eps0.1")) {
                    assert!((x - y).abs() < room, "{id}: {x} {y}");
                }
            }
        }
        let unit = &case["reference_style_unit_marginals_10it_eps0.1"];
        if let Some(expected) = unit["cost"].as_f64() {
            let ones = vec![1.0; a.len()];
            let problem = Problem {
                cost: &cost,
                a: &ones,
                b: &ones,
            };
            let run = Scaling::run(&problem, 0.1, 10).expect("runs");
            let (found, _) = run.value_and_gradient(&problem);
            assert!((found - expected).abs() < 1e-12, "{id}: {found} {expected}");
        }
    }
}

#[test]
fn tokens_group_by_bytes_as_in_the_reference() {
    let Some(dir) = golden("token groups").map(|d| d.join("multilevel-ot")) else {
        return;
    };
    let cases = json(&dir.join("alignment.json"));
    let list = |v: &Value| -> Vec<usize> { serde_json::from_value(v.clone()).expect("lengths") };
    for case in cases["align"].as_array().expect("cases") {
        let found = groups(
            &list(&case["student_byte_lens"]),
            &list(&case["teacher_byte_lens"]),
        );
        let side = |key: &str| -> Vec<Vec<usize>> {
            serde_json::from_value(case[key].clone()).expect("groups")
        };
        let (student, teacher): (Vec<Vec<usize>>, Vec<Vec<usize>>) = found
            .expect("same text")
            .into_iter()
            .map(|Group { student, teacher }| (student.collect(), teacher.collect()))
            .unzip();
        assert_eq!(student, side("student_groups"), "{}", case["name"]);
        assert_eq!(teacher, side("teacher_groups"), "{}", case["name"]);
    }
}
