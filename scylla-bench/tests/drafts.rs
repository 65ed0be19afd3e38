//! Drafts with weights on the command line: decoding, settings, export, and trees from recorded acceptance.

mod common;

use std::path::Path;

use common::Place;
use safetensors::Dtype;
use scylla_tests::{Tiny, TinyDraft, write_hf};
use serde_json::{Value, json};

/// A folder with a tiny target in `model` and a draft of each kind beside it.
fn place() -> Place {
    let place = Place::new();
    let tiny = Tiny::default();
    for (name, family) in [
        ("eagle2", "eagle"),
        ("hass", "eagle"),
        ("eagle3", "eagle3"),
        ("scylla", "scylla"),
    ] {
        TinyDraft::new(&tiny, family, json!({}), 7).write(&place.dir.path().join(name));
    }
    place
}

fn generate<'a>(draft: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec![
        "generate",
        "--target",
        "model",
        "--ignore-eos",
        "--json",
        "--prompt-ids",
        "5,6,7,5,6",
        "--max-new-tokens",
        "24",
        "--draft",
        draft,
    ];
    args.extend(more);
    args
}

const TREE: [&str; 6] = [
    "--set",
    "budget.total=20",
    "--set",
    "budget.width=5",
    "--set",
    "budget.depth=3",
];

#[test]
fn every_registered_draft_decodes_greedily_what_plain_decoding_decodes() {
    let place = place();
    let plain = place.json(&generate("plain", &[]));
    for draft in [
        "ngram",
        "suffix",
        "eagle2:eagle2",
        "hass:hass",
        "scylla:scylla",
        "draft-lm:model",
        "hybrid:scylla",
    ] {
        let found = place.json(&generate(draft, &TREE));
        assert_eq!(found["ids"], plain["ids"], "{draft}");
    }
    // The target of two layers is too shallow for the default taps.
    let error = place.refused(&generate("eagle3:eagle3", &TREE));
    assert!(
        error.contains("2 layers") && error.contains("draft.taps"),
        "{error}"
    );
    let mut args = generate("eagle3:eagle3", &TREE);
    args.extend(["--set", "draft.taps=[0, 1, 2]"]);
    assert_eq!(place.json(&args)["ids"], plain["ids"]);
    // Its own target as draft is always right.
    let mut args = generate("draft-lm:model", &TREE);
    args.extend(["--set", "draft.tree=\"chain\""]);
    let found = place.json(&args);
    assert!(found["tau"].as_f64().expect("tau") > 3.0);
    for cycle in found["cycles"].as_array().expect("cycles") {
        assert_eq!(
            cycle["ranks"].as_array().map(Vec::len),
            cycle["accepted"].as_u64().map(|n| n as usize)
        );
    }
}

#[test]
fn trees_and_heads_are_chosen_by_settings() {
    let place = place();
    let plain = place.json(&generate("plain", &[]));
    let nodes = |settings: &[&str]| -> Vec<u64> {
        let mut args = generate("eagle2:eagle2", &[]);
        for setting in settings {
            args.extend(["--set", setting]);
        }
        let found = place.json(&args);
        assert_eq!(found["ids"], plain["ids"], "{settings:?}");
        let cycles = found["cycles"].as_array().expect("cycles");
        cycles
            .iter()
            .map(|c| c["nodes"].as_u64().expect("nodes"))
            .collect()
    };
    let wide = ["budget.total=26", "budget.width=4", "budget.depth=4"];
    let with = |more: &[&'static str]| nodes(&[&wide[..], more].concat());
    assert_eq!(with(&["draft.tree=\"static\""])[0], 26, "EAGLE-1's tree");
    assert_eq!(
        with(&["draft.tree=\"static\"", "draft.paths=[[0],[1],[1,0]]"])[0],
        4
    );
    assert_eq!(with(&["draft.tree=\"chain\""])[0], 6);
    assert_eq!(
        with(&["draft.tree=\"widths\"", "draft.widths=[2,1]"])[0],
        11
    );
    assert_eq!(
        with(&["draft.tree=\"optimal\"", "draft.alpha=[[0.5,0.3]]"])[0],
        26
    );
    assert_eq!(with(&["draft.early_stop=true"])[0], 26);
    // Three ids only: three children at most.
    assert_eq!(
        with(&["draft.head_size=3", "budget.depth=0", "budget.total=9"])[0],
        4
    );
    assert_eq!(with(&["draft.weights=\"q8_0\""])[0], 26);

    let refused = |setting: &str| {
        let args = ["--set", setting];
        place.refused(&generate("eagle2:eagle2", &args))
    };
    for (setting, words) in [
        ("draft.tree=\"bush\"", &["bush", "dynamic"][..]),
        ("draft.trees=\"chain\"", &["trees"]),
        ("draft.taps=[1,2,3]", &["eagle2", "taps"]),
        ("draft.head_size=0", &["head_size 0"]),
        ("draft.head=\"nowhere\"", &["nowhere"]),
        ("draft.weights=\"q9\"", &["q9", "q8_0"]),
    ] {
        let error = refused(setting);
        assert!(
            words.iter().all(|word| error.contains(word)),
            "{setting}: {error}"
        );
    }
}

#[test]
fn drafts_without_weights_or_with_those_of_another_kind_say_so() {
    let place = place();
    let check = |draft: &str, words: &[&str]| {
        let error = place.refused(&generate(draft, &[]));
        assert!(
            words.iter().all(|word| error.contains(word)),
            "{draft}: {error}"
        );
    };
    check("eagle2", &["needs its weights", "--draft eagle2:DIR"]);
    check("eagle2:scylla", &["a Scylla network", "EAGLE-1/2"]);
    check("scylla:eagle3", &["an EAGLE-3 network", "a Scylla network"]);
    check("draft-lm:nowhere", &["nowhere"]);
    check("hybrid:eagle2", &["which network", "draft.network"]);
    check("eagle4:eagle3", &["eagle4", "eagle3", "suffix"]);
}

#[test]
fn a_draft_without_a_folder_is_the_shipped_one() {
    let place = place();
    let ids = |shipped: &str, draft: &str| {
        let args = generate(draft, &TREE);
        let mut command = place.command(&args);
        command.env("SCYLLA_DRAFTS", place.path(shipped));
        let output = command.output().expect("runs");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let json: Option<Value> = serde_json::from_slice(&output.stdout).ok();
        json.map(|json| json["ids"].clone()).ok_or(said)
    };
    let plain = place.json(&generate("plain", &[]));
    assert_eq!(ids(".", "scylla"), Ok(plain["ids"].clone()));
    // Elsewhere there is none, and what would have been looked for is said.
    let error = ids("model", "scylla").expect_err("refused");
    assert!(
        error.contains("--draft scylla:DIR") && error.contains("SCYLLA_DRAFTS"),
        "{error}"
    );
}

#[test]
fn a_sampled_text_is_the_same_again_and_inexact_pairs_are_refused() {
    let place = place();
    let sampled = |draft, more: &[&'static str]| {
        let mut args = generate(draft, &TREE);
        args.extend(["--temperature", "0.8", "--seed", "3"]);
        args.extend(more);
        args
    };
    for draft in ["eagle2:eagle2", "scylla:scylla", "draft-lm:model"] {
        for tree in [
            "draft.tree=\"dynamic\"",
            "draft.tree=\"widths\"",
            "draft.tree=\"auto\"",
        ] {
            let args = sampled(draft, &["--set", tree]);
            assert_eq!(
                place.json(&args)["ids"],
                place.json(&args)["ids"],
                "{draft} {tree}"
            );
        }
    }
    let error = place.refused(&sampled(
        "eagle2:eagle2",
        &[
            "--rule",
            "rrs-without-replacement",
            "--set",
            "draft.tree=dynamic",
        ],
    ));
    assert!(
        error.contains("rrs-without-replacement") && error.contains("eagle2"),
        "{error}"
    );
    // Where nothing is said of the tree, it is one that the rule takes.
    for rule in [
        "auto",
        "traversal",
        "deterministic-tree",
        "rrs-without-replacement",
    ] {
        let found = place.json(&sampled("eagle2:eagle2", &["--rule", rule]));
        assert_eq!(found["ids"].as_array().map(Vec::len), Some(24), "{rule}");
    }
    let both = [
        "--set",
        "draft.tree=dynamic",
        "--set",
        "draft.drawing=independent",
    ];
    let error = place.refused(&sampled("eagle2:eagle2", &both));
    assert!(
        error.contains("dynamic") && error.contains("Independent"),
        "{error}"
    );
}

#[test]
fn export_writes_once_and_says_what_it_cannot() {
    let place = place();
    let export = |draft, format, output, more: &[&'static str]| {
        let mut args = vec![
            "export", "--draft", draft, "--target", "model", "--format", format, "--output", output,
        ];
        args.extend(more);
        args
    };
    let taps = ["--taps", "0,1,2", "--json"];
    let found = place.json(&export("eagle3:eagle3", "eagle3", "out/3", &taps));
    assert!(found["rounded"].as_u64().expect("a number") > 0);
    assert_eq!(found["keys"].as_array().expect("keys").len(), 15);
    let text = std::fs::read_to_string(place.path("out/3/config.json")).expect("written");
    let config: Value = serde_json::from_str(&text).expect("json");
    assert_eq!(config["eagle_aux_hidden_state_layer_ids"], json!([0, 1, 2]));
    // What was written decodes, without naming the taps again.
    let plain = place.json(&generate("plain", &[]));
    assert_eq!(
        place.json(&generate("eagle3:out/3", &TREE))["ids"],
        plain["ids"]
    );
    let speculators = export("eagle3:out/3", "speculators", "out/s", &["--json"]);
    let found = place.json(&speculators);
    assert_eq!(found["keys"].as_array().expect("keys").len(), 16);
    assert_eq!(
        place.json(&generate("eagle3:out/s", &TREE))["ids"],
        plain["ids"]
    );

    let refused = |args: Vec<&str>, words: &[&str]| {
        let error = place.refused(&args);
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    };
    refused(
        export("eagle3:out/3", "eagle3", "out/3", &[]),
        &["is there already"],
    );
    refused(
        export("scylla:scylla", "eagle", "out/x", &[]),
        &["a Scylla network", "format Eagle"],
    );
    refused(
        export("ngram:scylla", "eagle", "out/x", &[]),
        &["`ngram`", "eagle3"],
    );
    refused(
        export("eagle2:eagle2", "medusa", "out/x", &[]),
        &["medusa", "speculators"],
    );
    refused(
        export("ngram:eagle2", "eagle", "out/x", &[]),
        &["ngram", "eagle2"],
    );
    refused(export("eagle2", "eagle", "out/x", &[]), &["NAME:DIR"]);
}

#[test]
fn recorded_acceptance_gives_the_best_static_tree() {
    let place = place();
    let prompts =
        (0..3).map(|i| format!("{{\"id\": \"p{i}\", \"category\": \"x\", \"prompt\": \"a\"}}\n"));
    std::fs::write(place.path("prompts.jsonl"), prompts.collect::<String>()).expect("prompts");
    // Cycles as a benchmark records them: the first child is right half of the time, the second a quarter.
    let cycle = |ranks: &[usize]| {
        let offered: Vec<usize> = (0..=ranks.len())
            .map(|d| if d < 2 { 2 } else { 0 })
            .collect();
        json!({
            "decoder": 1, "repeat": 0, "task": "x", "prompt": "p0", "turn": 0, "cycle": 0, "nodes": 7, "depth": 2,
            "accepted": ranks.len(), "committed": ranks.len() + 1, "cut": false, "ranks": ranks, "offered": offered,
            "ms": {"prefill": 0.0, "propose": 0.0, "forward": 0.0, "accept": 0.0, "commit": 0.0},
        })
    };
    let cycles = [cycle(&[0, 0]), cycle(&[0]), cycle(&[1]), cycle(&[])];
    std::fs::create_dir(place.path("run")).expect("directory");
    let lines: String = cycles.iter().map(|c| format!("{c}\n")).collect();
    std::fs::write(place.path("run/cycles.jsonl"), lines).expect("cycles");
    let found = place.json(&[
        "inspect", "tree", "run", "--total", "4", "--width", "2", "--depth", "1", "--json",
    ]);
    assert_eq!(found["alpha"][0], json!([0.5, 0.25]));
    assert_eq!(found["paths"], json!([[0], [1], [0, 0]]));
    let expected = 1.0 + 0.5 + 0.25 + 0.5 / 3.0;
    assert!((found["tau_expected"].as_f64().expect("tau") - expected).abs() < 1e-12);
    let broken = cycle(&[0]).to_string().replace("[2,2]", "[2,99999999999]");
    std::fs::write(place.path("run/cycles.jsonl"), broken).expect("cycles");
    let error = place.refused(&["inspect", "tree", "run"]);
    assert!(
        error.contains("line 1") && error.contains("do not fit"),
        "{error}"
    );
    std::fs::write(place.path("run/cycles.jsonl"), cycle(&[]).to_string()).expect("cycles");
    let error = place.refused(&["inspect", "tree", "run", "--decoder", "3"]);
    assert!(error.contains("no cycles of decoder 3"), "{error}");
    let error = place.refused(&[
        "inspect",
        "frequencies",
        "--model",
        "model",
        "--text",
        "prompts.jsonl",
        "--output",
        "f",
    ]);
    assert!(error.contains("no tokenizer"), "{error}");
    let error = place.refused(&["inspect", "quality", "model", "--text", "prompts.jsonl"]);
    assert!(error.contains("no tokenizer"), "{error}");
}

/// A target deep enough for EAGLE-3's own taps, and how a draft in `draft` decodes for it.
fn eagle3_place() -> (Place, Tiny) {
    let place = Place::new();
    // Few tokens, so that a random draft is right now and then.
    let tiny = Tiny {
        layers: 8,
        vocab: 18,
        ..Tiny::default()
    };
    scylla_tests::write_hf(
        &tiny,
        &place.dir.path().join("model"),
        safetensors::Dtype::F32,
        1,
    );
    (place, tiny)
}

/// Ids, and nodes and accepted tokens of each cycle.
fn decoded(place: &Place, draft: &TinyDraft) -> (Value, Vec<(Value, Value)>) {
    draft.write(&place.dir.path().join("draft"));
    let found = place.json(&generate("eagle3:draft", &TREE));
    let cycles = found["cycles"].as_array().expect("cycles").iter();
    let cycles = cycles
        .map(|c| (c["nodes"].clone(), c["accepted"].clone()))
        .collect();
    (found["ids"].clone(), cycles)
}

type Edit<'a> = &'a dyn Fn(&mut TinyDraft);

#[test]
fn eagle3_files_that_the_engines_load_are_the_same_draft() {
    let (place, tiny) = eagle3_place();
    let draft = |edit: Edit<'_>| {
        let mut draft = TinyDraft::new(&tiny, "eagle3", json!({}), 7);
        edit(&mut draft);
        draft
    };
    let good = decoded(&place, &draft(&|_| {}));
    let rename = |to: fn(&str) -> String| {
        move |d: &mut TinyDraft| d.tensors.iter_mut().for_each(|t| t.name = to(&t.name))
    };
    let first = rename(|n| n.replace("midlayer.", "layers.0."));
    let model = rename(|n| format!("model.{}", n.replace("midlayer.", "layers.0.")));
    let narrow = |d: &mut TinyDraft| {
        let d2t = d.tensor("d2t");
        let value = |b: &[u8]| i64::from_le_bytes(b.try_into().expect("eight bytes")) as i32;
        d2t.bytes = d2t
            .bytes
            .chunks_exact(8)
            .flat_map(|b| value(b).to_le_bytes())
            .collect();
        d2t.dtype = safetensors::Dtype::I32;
    };
    let copies = |d: &mut TinyDraft| {
        for name in ["verifier_lm_head.weight", "verifier_norm.weight"] {
            let mut copy = d.tensor("norm.weight").clone();
            copy.name = name.into();
            d.tensors.push(copy);
        }
    };
    let edits: [(&str, Edit<'_>); 6] = [
        ("without t2d", &|d| d.tensors.retain(|t| t.name != "t2d")),
        ("t2d alone", &|d| d.tensors.retain(|t| t.name != "d2t")),
        ("d2t in 32 bits", &narrow),
        ("layers.0", &first),
        ("model.layers.0", &model),
        ("copies of the target's", &copies),
    ];
    for (name, edit) in edits {
        assert_eq!(decoded(&place, &draft(edit)), good, "{name}");
    }
    let out = place.run(&generate("eagle3:draft", &TREE));
    assert!(String::from_utf8_lossy(&out.stderr).contains("verifier_lm_head.weight"));
    for (edit, word) in [
        (
            &(|d: &mut TinyDraft| d.tensors.retain(|t| !["d2t", "t2d"].contains(&&*t.name)))
                as Edit<'_>,
            "d2t",
        ),
        (&|d| d.tensor("d2t").dtype = safetensors::Dtype::F64, "d2t"),
        (
            &|d| d.tensors.retain(|t| t.name != "lm_head.weight"),
            "lm_head.weight",
        ),
        (
            &|d| {
                let mut twice = d.tensor("norm.weight").clone();
                twice.name = "model.norm.weight".into();
                d.tensors.push(twice);
            },
            "under two names",
        ),
        (
            &|d| {
                let mut other = d.tensor("norm.weight").clone();
                other.name = "mask_hidden".into();
                d.tensors.push(other);
            },
            "mask_hidden",
        ),
    ] {
        draft(edit).write(&place.dir.path().join("draft"));
        let message = place.refused(&generate("eagle3:draft", &TREE));
        assert!(message.contains(word), "no `{word}` in: {message}");
    }
}

#[test]
fn an_eagle3_layer_that_adds_nothing_changes_nothing_and_one_that_does_does() {
    let (place, tiny) = eagle3_place();
    let one = TinyDraft::new(&tiny, "eagle3", json!({}), 7);
    let base = decoded(&place, &one);
    let second = |silent: bool| {
        let mut two = TinyDraft::new(&tiny, "eagle3", json!({}), 7);
        two.config["num_hidden_layers"] = json!(2);
        let other = TinyDraft::new(&tiny, "scylla", json!({}), 8);
        for mut tensor in other
            .tensors
            .into_iter()
            .filter(|t| t.name.starts_with("layers.1."))
        {
            if silent && (tensor.name.contains("o_proj") || tensor.name.contains("down_proj")) {
                tensor.bytes.fill(0);
            }
            two.tensors.push(tensor);
        }
        decoded(&place, &two)
    };
    assert_eq!(second(true), base);
    let louder = second(false);
    assert_eq!(louder.0, base.0, "greedy output is the target's");
    assert_ne!(louder.1, base.1);
    let out = place.run(&[
        "export",
        "--draft",
        "eagle3:draft",
        "--target",
        "model",
        "--format",
        "eagle3",
        "--output",
        "out",
        "--dtype",
        "as-is",
    ]);
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(
        out.status.success() && said.contains("several layers"),
        "{said}"
    );
    let again = place.json(&generate("eagle3:out", &TREE));
    assert_eq!(
        again["cycles"].as_array().map(Vec::len),
        Some(louder.1.len())
    );
}

#[test]
fn an_eagle3_file_without_a_head_has_the_targets_where_the_vocabularies_are_one() {
    let (place, tiny) = eagle3_place();
    let mut draft = TinyDraft::new(&tiny, "eagle3", json!({"draft_vocab_size": tiny.vocab}), 7);
    draft
        .tensors
        .retain(|t| !["d2t", "t2d"].contains(&&*t.name));
    let bytes = std::fs::read(place.path("model/model.safetensors")).expect("read");
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
    let head = file.tensor("lm_head.weight").expect("head").data().to_vec();
    draft.tensor("lm_head.weight").bytes = head;
    let with = decoded(&place, &draft);
    draft.tensors.retain(|t| t.name != "lm_head.weight");
    assert_eq!(decoded(&place, &draft), with);
}

/// A Qwen3 target, whose layers past the first have a window that the text outgrows, with an EAGLE-3 draft: decoded,
/// exported for both engines, and decoded with what was written.
#[test]
fn a_qwen3_target_drafts_exports_and_imports_eagle3() {
    let place = Place::new();
    let tiny = Tiny {
        family: "qwen3",
        layers: 7,
        window: Some(12),
        ..Tiny::default()
    };
    let target = place.path("model");
    write_hf(&tiny, Path::new(&target), Dtype::F32, 1);
    TinyDraft::new(&tiny, "eagle3", json!({}), 7).write(Path::new(&place.path("eagle3")));
    let found = place.json(&["inspect", "model", "model", "--json"]);
    assert_eq!(
        (&found["qk_norm"], &found["windows"]),
        (&json!(true), &json!([12]))
    );
    let ids = |draft: &str| place.json(&generate(draft, &TREE))["ids"].clone();
    let plain = ids("plain");
    assert_eq!(ids("eagle3:eagle3"), plain);
    for format in ["eagle3", "speculators"] {
        let output = format!("out/{format}");
        place.json(&[
            "export",
            "--draft",
            "eagle3:eagle3",
            "--target",
            "model",
            "--format",
            format,
            "--dtype",
            "f32",
            "--output",
            &output,
            "--json",
        ]);
        assert_eq!(ids(&format!("eagle3:{output}")), plain);
    }
    let text = std::fs::read_to_string(place.path("out/speculators/config.json")).expect("written");
    assert!(text.contains("Qwen3ForCausalLM"), "{text}");
}
