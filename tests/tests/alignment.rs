//! Alignment losses, the transport core and the grouping of tokens against reference values (`SCYLLA_GOLDEN`).

use candle_core::{DType, Device, Tensor};
use multilevel_ot::bytes::{Group, groups};
use multilevel_ot::transport::{Problem, Scaling, Settings, Stop, sinkhorn};
use multilevel_ot::{Matching, Mode, MultiLevelOt, Uld};
use scylla_core::train::{AlignLoss, AnswerLogits};
use scylla_tests::answers::{Answers, gradient, part, value};
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

/// A case of the released code.
fn answers(tensors: &Tensors, dtype: DType) -> Answers {
    let side = |name: &str| {
        let (logits, shape) = tensors.f32(&format!("{name}_logits"));
        let labels = tensors.i64(&format!("{name}_labels"));
        let (at, cpu) = ((shape[0], shape[1]), &Device::Cpu);
        let logits = Tensor::from_vec(logits, &shape[..], cpu).expect("logits");
        AnswerLogits {
            logits: logits.to_dtype(dtype).expect("widened"),
            labels: Tensor::from_vec(labels, at, cpu).expect("labels"),
            vocab: shape[2],
            tokens: None,
            offsets: None,
            hidden: None,
        }
    };
    Answers::new(side("teacher"), side("student"))
}

fn close(found: f64, expected: f64, room: f64, what: &str) {
    assert!(
        (found - expected).abs() <= room,
        "{what}: {found} instead of {expected}"
    );
}

/// Largest deviation relative to the largest value expected.
fn off(found: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(1e-30f64, |a, e| a.max(e.abs()));
    let off = found.iter().zip(expected).map(|(f, e)| (f - e).abs());
    off.fold(0.0, f64::max) / largest
}

fn released_cases() -> Option<Vec<(Value, Tensors)>> {
    let dir = golden("released alignment losses")?.join("multilevel-ot");
    let cases = json(&dir.join("golden.json"));
    let cases = cases["cases"].as_array().expect("cases").clone();
    let read = |case: Value| {
        let name = case["name"].as_str().expect("name");
        let tensors = Tensors::read(&dir.join(format!("{name}.safetensors")));
        (case, tensors)
    };
    Some(cases.into_iter().map(read).collect())
}

#[test]
fn mode_reference_code_gives_the_released_codes_values_and_gradients() {
    for (case, tensors) in released_cases().into_iter().flatten() {
        let (name, kwargs) = (case["name"].as_str().expect("name"), &case["kwargs"]);
        let flag = |key: &str| kwargs[key].as_bool().expect("flag");
        let aligner = MultiLevelOt {
            alpha: number(&kwargs["distillation_weight"]),
            student_temperature: number(&kwargs["student_temperature"]),
            teacher_temperature: number(&kwargs["teacher_temperature"]),
            skip_student_eos: flag("skip_student_eos"),
            skip_teacher_eos: flag("skip_teacher_eos"),
            ..MultiLevelOt::reference_code()
        };
        let uld = Uld {
            mode: Mode::ReferenceCode,
            distillation_weight: aligner.alpha,
            student_temperature: aligner.student_temperature,
            teacher_temperature: aligner.teacher_temperature,
            skip_student_eos: aligner.skip_student_eos,
            skip_teacher_eos: aligner.skip_teacher_eos,
        };
        let expected = &case["outputs"]["f64"];
        let read = answers(&tensors, DType::F64);
        let (loss, ulds) = (read.loss(&aligner), read.loss(&uld));
        let of = |loss: &AlignLoss, name: &str| value(&part(loss, name));
        // The released code adds up HAD and ULD in single precision.
        let (total, ce) = (value(&loss.total), of(&loss, "ce"));
        close(ce, number(&expected["ce"]), 1e-12, name);
        close(total, number(&expected["total"]), 2e-7, name);
        close(total - ce, number(&expected["distill"]), 2e-7, name);
        close(of(&loss, "sl"), number(&expected["sl"]), 1e-12, name);
        let sd = expected["sd_per_sample"].as_array().expect("costs");
        close(of(&loss, "sd"), sd.iter().map(number).sum(), 1e-12, name);
        let numpy = &case["numpy_code_variant"];
        close(total - ce, number(&numpy["distill"]), 1e-12, name);
        let (uld_total, uld_part) = (value(&ulds.total), of(&ulds, "uld"));
        close(uld_total, number(&expected["uld_total"]), 2e-7, name);
        close(
            uld.distillation_weight * uld_part,
            number(&expected["uld_distill"]),
            2e-7,
            name,
        );
        close(
            uld.distillation_weight * uld_part,
            number(&numpy["uld_distill"]),
            1e-12,
            name,
        );

        let of_ce = gradient(&part(&loss, "ce"), &read.logits);
        let without_ce = |total: Vec<f64>| -> Vec<f64> {
            total.iter().zip(&of_ce).map(|(t, c)| t - c).collect()
        };
        for (loss, key) in [(&loss, "grad_distill_f64"), (&ulds, "grad_uld_f64")] {
            let expected = tensors.f64(key);
            let largest = expected.iter().fold(0.0f64, |a, e| a.max(e.abs()));
            let found = without_ce(gradient(&loss.total, &read.logits));
            let off = off(&found, &expected);
            // Where identical logits leave no distance, what is left is rounding.
            assert!(
                off <= 1e-6 || largest < 1e-12,
                "{name}, {key}: off by {off}"
            );
        }
        // Single precision follows.
        let single = answers(&tensors, DType::F32);
        close(value(&single.loss(&aligner).total), total, 1e-5, name);
        close(value(&single.loss(&uld).total), uld_total, 1e-5, name);
    }
}

#[test]
fn mode_paper_gives_the_published_formulas_values() {
    for (case, tensors) in released_cases().into_iter().flatten() {
        let name = case["name"].as_str().expect("name");
        let batch = answers(&tensors, DType::F64);
        if batch.student.vocab < 50 {
            continue; // the reference pads with zeros what has fewer tokens than are compared
        }
        let samples = case["numpy_paper_variant_per_sample"]
            .as_array()
            .expect("samples");
        for (b, sample) in samples.iter().enumerate() {
            let one = batch.only(b);
            let flag = |key: &str| case["kwargs"][key].as_bool().expect("flag");
            let of = |matching| {
                one.loss(&MultiLevelOt {
                    matching,
                    skip_student_eos: flag("skip_student_eos"),
                    skip_teacher_eos: flag("skip_teacher_eos"),
                    ..MultiLevelOt::paper()
                })
            };
            let ranked = of(Matching::Rank);
            for part_name in ["had", "sl", "sd"] {
                // The reference's transport moves as much mass as the student has tokens, not as the smaller number.
                let [own, other] =
                    ["student", "teacher"].map(|side| number(&case["spans"][side][b][1]));
                let mass = if part_name == "sd" {
                    own.min(other) / own
                } else {
                    1.0
                };
                let expected = mass * number(&sample["rank"][part_name]);
                let found = value(&part(&ranked, part_name));
                close(
                    found,
                    expected,
                    1e-9 * expected.max(1.0),
                    &format!("{name}, {part_name}"),
                );
            }
            // The reference assigns the whole vocabulary, zeros included, before it cuts; here those compared are assigned.
            let had = value(&part(&of(Matching::Assignment), "had"));
            assert!(
                had <= number(&sample["hungarian"]["had"]) + 1e-9,
                "{name}: {had}"
            );
        }
    }
}
