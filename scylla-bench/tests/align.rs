//! `scylla align`: what scripts rely on.

use std::collections::HashMap;
use std::path::Path;
use std::process::{Command, Output};

use candle_core::{Device, Tensor};
use scylla_bench::Registry;
use scylla_tests::answers::{Answers, numbers};
use scylla_tests::golden;
use serde_json::Value;

fn align(input: &Path, aligner: &str, more: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_scylla"))
        .args(["align", "--aligner", aligner, "--json", "--input"])
        .arg(input)
        .args(more)
        .output()
        .expect("starts")
}

fn json(out: &Output) -> Value {
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{said}");
    serde_json::from_slice(&out.stdout).expect("one object")
}

fn refused(out: &Output, what: &str) {
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success() && said.contains(what), "{said}");
    assert!(out.stdout.is_empty());
}

/// A case in a file, with hidden states and heads.
fn case(dir: &Path) -> std::path::PathBuf {
    let answers = Answers::two(1);
    let single = |t: &Tensor| {
        t.detach()
            .to_dtype(candle_core::DType::F32)
            .expect("narrowed")
    };
    let mut tensors = HashMap::new();
    for (name, side) in [("student", &answers.student), ("teacher", &answers.teacher)] {
        let hidden = side.hidden.as_ref().expect("hidden states");
        let width = hidden.dim(2).expect("H");
        let head = scylla_tests::answers::random(&[side.vocab, width], 5);
        tensors.insert(format!("{name}_logits"), single(&side.logits));
        tensors.insert(format!("{name}_labels"), side.labels.clone());
        tensors.insert(
            format!("{name}_tokens"),
            side.tokens.clone().expect("tokens"),
        );
        tensors.insert(format!("{name}_hidden"), single(hidden));
        tensors.insert(format!("{name}_head"), single(&head));
    }
    let path = dir.join("case.safetensors");
    candle_core::safetensors::save(&tensors, &path).expect("written");
    path
}

#[test]
fn the_gradient_and_the_parts_are_printed_and_written() {
    let dir = tempfile::tempdir().expect("dir");
    let input = case(dir.path());
    let output = dir.path().join("out.safetensors");
    let more = [
        "--set",
        "k=4",
        "--set",
        "dtype=f64",
        "--output",
        output.to_str().expect("path"),
    ];
    let found = json(&align(&input, "multilevel-ot", &more));
    let part = |key: &str, name: &str| found[key][name].as_f64().expect("a number");
    let names = ["ce", "had", "sl", "sd"];
    let total: f64 = names
        .iter()
        .map(|n| part("weights", n) * part("parts", n))
        .sum();
    assert!((found["total"].as_f64().expect("total") - total).abs() < 1e-12);
    let written = candle_core::safetensors::load(&output, &Device::Cpu).expect("read");
    let gradient = &written["grad_student_logits"];
    assert_eq!(gradient.dims(), [2, 9, 8]);
    let norm = numbers(gradient).iter().map(|g| g * g).sum::<f64>().sqrt();
    assert!((norm - part("gradient_norms", "total")).abs() < 1e-12);
    assert!(names.iter().all(|n| part("gradient_norms", n) > 0.0));

    let code = [
        "--mode",
        "reference-code",
        "--set",
        "k=4",
        "--set",
        "distillation_weight=0.5",
    ];
    let found = json(&align(&input, "multilevel-ot", &code));
    assert_eq!(found["weights"]["had"], 0.5);
    let plain = Command::new(env!("CARGO_BIN_EXE_scylla"))
        .args(["align", "--aligner", "dskd", "--input"])
        .arg(&input)
        .output()
        .expect("starts");
    let text = String::from_utf8_lossy(&plain.stdout).into_owned();
    assert!(text.contains("t2s_kd") && text.contains("total"), "{text}");
}

/// A tokenizer that knows these tokens and no merges; the first ends a text.
fn tokenizer(dir: &Path, tokens: &[&str]) -> String {
    let vocab: serde_json::Map<String, Value> = (tokens.iter().enumerate())
        .map(|(id, token)| {
            (
                if token.is_empty() { "</s>" } else { token }.to_string(),
                id.into(),
            )
        })
        .collect();
    let file = serde_json::json!({
        "version": "1.0",
        "added_tokens": [{"id": 0, "content": "</s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    });
    std::fs::create_dir_all(dir).expect("dir");
    std::fs::write(dir.join("tokenizer.json"), file.to_string()).expect("written");
    let config = serde_json::json!({"eos_token": "</s>"});
    std::fs::write(dir.join("tokenizer_config.json"), config.to_string()).expect("written");
    dir.to_str().expect("path").into()
}

#[test]
fn every_registered_aligner_runs_and_says_what_it_needs() {
    let dir = tempfile::tempdir().expect("dir");
    let input = case(dir.path());
    let student = tokenizer(&dir.path().join("student"), &scylla_tests::answers::STUDENT);
    let teacher = tokenizer(&dir.path().join("teacher"), &scylla_tests::answers::TEACHER);
    let both = [
        "--student-tokenizer",
        &student,
        "--teacher-tokenizer",
        &teacher,
    ];
    for name in Registry::default().aligner_names() {
        let settings: &[&str] = match name {
            "multilevel-ot" | "mined" => &["--set", "k=4"],
            "gold" => &["--set", "hybrid=true"],
            _ => &[],
        };
        let with = [settings, &both].concat();
        let found = json(&align(&input, name, &with));
        assert!(
            found["total"].as_f64().expect("total").is_finite(),
            "{name}"
        );
        if ["alm", "gold", "mined", "x-token"].contains(&name) {
            refused(&align(&input, name, settings), "--student-tokenizer");
        }
        refused(&align(&input, name, &["--set", "nonsense=1"]), "nonsense");
    }
    // abc, da, b and the end of the first answer; d, dab and the end of the second.
    let found = json(&align(&input, "alm", &both));
    assert_eq!(found["notes"]["groups"], 3.5);
    let swapped = [
        "--student-tokenizer",
        &teacher,
        "--teacher-tokenizer",
        &student,
    ];
    refused(
        &align(&input, "alm", &swapped),
        "did not write the same answer",
    );
}

#[test]
fn bad_input_is_answered_with_what_to_do() {
    let dir = tempfile::tempdir().expect("dir");
    let input = case(dir.path());
    let nowhere = dir.path().join("nowhere.safetensors");
    refused(&align(&nowhere, "uld", &[]), "nowhere.safetensors");
    refused(&align(&input, "ulb", &[]), "known: multilevel-ot, uld");
    refused(&align(&input, "multilevel-ot", &[]), "k = 50");
    refused(
        &align(&input, "multilevel-ot", &["--set", "epsilon=0"]),
        "epsilon 0",
    );
    refused(&align(&input, "uld", &["--set", "dtype=f16"]), "f32 or f64");
    refused(&align(&input, "uld", &["--mode", "papr"]), "papr");
    refused(
        &align(&input, "uld", &["--set", "student_vocab=3"]),
        "one of 3 tokens",
    );
    let text = dir.path().join("text");
    std::fs::write(&text, "no tensors").expect("written");
    refused(&align(&text, "uld", &[]), "safetensors");
}

#[test]
fn released_values_come_out_of_the_command_line() {
    let Some(dir) = golden("released values").map(|d| d.join("multilevel-ot")) else {
        return;
    };
    let text = std::fs::read_to_string(dir.join("golden.json")).expect("golden file");
    let cases: Value = serde_json::from_str(&text).expect("JSON");
    for case in cases["cases"].as_array().expect("cases") {
        let name = case["name"].as_str().expect("name");
        let keys = [
            "distillation_weight",
            "student_temperature",
            "teacher_temperature",
            "skip_student_eos",
            "skip_teacher_eos",
        ];
        let set = keys.map(|key| format!("{key}={}", case["kwargs"][key]));
        let mut more = vec!["--mode", "reference-code", "--set", "dtype=f64"];
        more.extend(set.iter().flat_map(|s| ["--set", s]));
        let input = dir.join(format!("{name}.safetensors"));
        for (aligner, key) in [("multilevel-ot", "total"), ("uld", "uld_total")] {
            let found = json(&align(&input, aligner, &more))["total"]
                .as_f64()
                .expect("total");
            let expected = case["outputs"]["f64"][key].as_f64().expect("total");
            assert!(
                (found - expected).abs() < 2e-7,
                "{name}, {aligner}: {found} {expected}"
            );
        }
    }
}
