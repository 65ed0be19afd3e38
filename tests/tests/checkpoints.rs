//! Draft checkpoints: what is written is what was read, in exactly the keys of each layout, and wrong files are named.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::{Dtype, SafeTensors};
use scylla_core::model::{
    AttentionInput, LayerSpec, LoadOptions, ModelConfig, ModelFiles, WeightForm, load,
};
use scylla_core::plugin::{Tap, TargetShape};
use scylla_draft::checkpoint::{
    Checkpoint, DraftConfig, Export, Format, HeldTensor, Layout, Precision, Written, default_taps,
    export, offsets_of,
};
use scylla_draft::network::{self, DraftHost};
use scylla_tests::{Tiny, TinyDraft, golden, write_hf};
use serde_json::{Value, json};

const TARGET: Tiny = Tiny {
    family: "llama",
    window: None,
    vocab: 30,
    hidden: 32,
    ffn: 48,
    layers: 8,
    heads: 2,
    kv_heads: 1,
    head_dim: 16,
    tied: true,
    seed: 3,
};

const FAMILIES: [Layout; 4] = [
    Layout::Eagle,
    Layout::Eagle3,
    Layout::Speculators,
    Layout::Scylla,
];

fn shape() -> TargetShape {
    config().shape()
}

fn config() -> ModelConfig {
    let dir = tempfile::tempdir().expect("dir");
    write_hf(&TARGET, dir.path(), Dtype::F32, 1);
    ModelFiles::open(dir.path()).expect("opens").config
}

fn open(dir: &Path) -> scylla_core::Result<Checkpoint> {
    Checkpoint::open(dir, &FAMILIES, &shape(), WeightForm::AsIs)
}

fn write(from: &Path, to: &Path, format: Format, precision: Precision, bias: bool) -> Written {
    let checkpoint = open(from).expect("opens");
    write_checkpoint(&checkpoint, to, format, precision, bias)
}

fn write_checkpoint(
    checkpoint: &Checkpoint,
    to: &Path,
    format: Format,
    precision: Precision,
    bias: bool,
) -> Written {
    let target = config();
    let taps = checkpoint.taps(None, &shape()).expect("taps");
    let embedding = || {
        Ok((0..TARGET.vocab * TARGET.hidden)
            .map(|i| i as f32)
            .collect())
    };
    let what = Export {
        checkpoint,
        format,
        precision,
        zero_bias: bias,
        target: &target,
        target_sha256: None,
        verifier: ("somebody/target", "LlamaForCausalLM"),
        embedding: &embedding,
        taps: &taps,
        speculative_tokens: 4,
    };
    export(&what, to).expect("exports")
}

/// What an export that cannot be says.
fn export_refused(checkpoint: &Checkpoint, format: Format, to: &Path) -> String {
    let what = Export {
        checkpoint,
        format,
        precision: Precision::AsIs,
        zero_bias: false,
        target: &config(),
        target_sha256: None,
        verifier: ("t", "LlamaForCausalLM"),
        embedding: &|| Ok(Vec::new()),
        taps: &[],
        speculative_tokens: 5,
    };
    export(&what, to).expect_err("refused").to_string()
}

/// Name, type, shape and bytes of every tensor.
type All = Vec<(String, Dtype, Vec<usize>, Vec<u8>)>;

fn tensors(dir: &Path) -> All {
    let bytes = std::fs::read(dir.join("model.safetensors")).expect("weights");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let mut all: All = file
        .iter()
        .map(|(name, v)| {
            (
                name.into(),
                v.dtype(),
                v.shape().to_vec(),
                v.data().to_vec(),
            )
        })
        .collect();
    all.sort();
    all
}

fn json_of(dir: &Path) -> Value {
    let text = std::fs::read_to_string(dir.join("config.json")).expect("config");
    serde_json::from_str(&text).expect("json")
}

const EAGLE_KEYS: [&str; 9] = [
    "fc.weight",
    "layers.0.mlp.down_proj.weight",
    "layers.0.mlp.gate_proj.weight",
    "layers.0.mlp.up_proj.weight",
    "layers.0.post_attention_layernorm.weight",
    "layers.0.self_attn.k_proj.weight",
    "layers.0.self_attn.o_proj.weight",
    "layers.0.self_attn.q_proj.weight",
    "layers.0.self_attn.v_proj.weight",
];

const EAGLE3_KEYS: [&str; 15] = [
    "d2t",
    "fc.weight",
    "lm_head.weight",
    "midlayer.hidden_norm.weight",
    "midlayer.input_layernorm.weight",
    "midlayer.mlp.down_proj.weight",
    "midlayer.mlp.gate_proj.weight",
    "midlayer.mlp.up_proj.weight",
    "midlayer.post_attention_layernorm.weight",
    "midlayer.self_attn.k_proj.weight",
    "midlayer.self_attn.o_proj.weight",
    "midlayer.self_attn.q_proj.weight",
    "midlayer.self_attn.v_proj.weight",
    "norm.weight",
    "t2d",
];

#[test]
fn exports_hold_exactly_the_keys_types_and_fields_of_their_layout() {
    let dir = tempfile::tempdir().expect("dir");
    let at = |name: &str| dir.path().join(name);
    TinyDraft::new(&TARGET, "eagle", json!({}), 1).write(&at("eagle"));
    TinyDraft::new(&TARGET, "eagle3", json!({}), 1).write(&at("eagle3"));

    let written = write(
        &at("eagle"),
        &at("e"),
        Format::Eagle,
        Precision::Bf16,
        false,
    );
    assert_eq!(written.keys, EAGLE_KEYS);
    assert!(written.rounded > 0 && written.notes.is_empty());
    let config = json_of(&at("e"));
    assert_eq!(config["architectures"], json!(["LlamaForCausalLM"]));
    assert_eq!(
        (&config["bias"], &config["num_hidden_layers"]),
        (&json!(false), &json!(1))
    );
    let biased = write(
        &at("eagle"),
        &at("eb"),
        Format::Eagle,
        Precision::Bf16,
        true,
    );
    let mut keys = EAGLE_KEYS.to_vec();
    keys.insert(0, "fc.bias");
    assert_eq!(biased.keys, keys);
    let bias = tensors(&at("eb")).remove(0);
    assert_eq!(
        (bias.1, &bias.2[..], &bias.3[..]),
        (Dtype::BF16, &[32][..], &[0; 64][..])
    );
    let network = json_of(&at("eb"));
    assert_eq!(network["architectures"][0], json!("LlamaForCausalLMEagle"));

    let written = write(
        &at("eagle3"),
        &at("e3"),
        Format::Eagle3,
        Precision::Bf16,
        false,
    );
    assert_eq!(written.keys, EAGLE3_KEYS);
    let config = json_of(&at("e3"));
    for (key, value) in [
        ("architectures", json!(["LlamaForCausalLMEagle3"])),
        ("model_type", json!("llama")),
        ("draft_vocab_size", json!(20)),
        ("vocab_size", json!(30)),
        ("norm_before_residual", json!(false)),
        ("tie_word_embeddings", json!(false)),
        ("rope_theta", json!(10000.0)),
        ("rope_scaling", Value::Null),
        (
            "rope_parameters",
            json!({"rope_theta": 10000.0, "rope_type": "default"}),
        ),
        ("max_position_embeddings", json!(256)),
    ] {
        assert_eq!(config[key], value, "{key}");
    }
    assert!(
        config.get("eagle_aux_hidden_state_layer_ids").is_none(),
        "default taps are omitted"
    );
    for (name, dtype, shape, bytes) in tensors(&at("e3")) {
        match name.as_str() {
            "d2t" => {
                assert_eq!((dtype, &shape[..]), (Dtype::I64, &[20][..]));
                let offsets: Vec<i64> = bytes
                    .chunks_exact(8)
                    .map(|b| i64::from_le_bytes(b.try_into().expect("eight bytes")))
                    .collect();
                let targets: Vec<u32> = (0..).zip(&offsets).map(|(i, o)| (i + o) as u32).collect();
                assert!(targets.windows(2).all(|w| w[0] < w[1]) && targets[19] < 30);
                assert_eq!(offsets_of(&targets), offsets);
            }
            "t2d" => {
                assert_eq!((dtype, &shape[..]), (Dtype::BOOL, &[30][..]));
                assert_eq!(bytes.iter().map(|&b| usize::from(b)).sum::<usize>(), 20);
            }
            _ => assert_eq!(dtype, Dtype::BF16, "{name}"),
        }
    }

    let written = write(
        &at("eagle3"),
        &at("s"),
        Format::Speculators,
        Precision::Bf16,
        false,
    );
    let mut keys: Vec<String> = EAGLE3_KEYS
        .iter()
        .map(|k| k.replace("midlayer", "layers.0"))
        .chain(["embed_tokens.weight".to_string()])
        .collect();
    keys.sort();
    assert_eq!(written.keys, keys);
    let config = json_of(&at("s"));
    assert_eq!(config["speculators_model_type"], json!("eagle3"));
    assert!(config.get("model_type").is_none());
    let inner = &config["speculators_config"];
    let proposal = json!({
        "proposal_type": "greedy", "speculative_tokens": 4, "verifier_accept_k": 1, "accept_tolerance": 0.0,
    });
    assert_eq!(inner["proposal_methods"], json!([proposal]));
    let verifier =
        json!({"name_or_path": "somebody/target", "architectures": ["LlamaForCausalLM"]});
    assert_eq!(inner["verifier"], verifier);
    assert_eq!(
        config["transformer_layer_config"]["model_type"],
        json!("llama")
    );
}

#[test]
fn import_export_import_is_bit_identical() {
    let options = json!({
        "fc_norm": true, "norm_before_fc": true, "norm_output": true, "norm_before_residual": true,
        "eagle_aux_hidden_state_layer_ids": [1, 3, 6],
    });
    for (family, config, formats) in [
        ("eagle", json!({}), &[Format::Eagle][..]),
        (
            "eagle3",
            json!({}),
            &[Format::Eagle3, Format::Speculators][..],
        ),
        (
            "eagle3",
            options,
            &[Format::Eagle3, Format::Speculators][..],
        ),
        (
            "speculators",
            json!({}),
            &[Format::Eagle3, Format::Speculators][..],
        ),
    ] {
        for &format in formats {
            for precision in [Precision::AsIs, Precision::F32, Precision::Bf16] {
                let dir = tempfile::tempdir().expect("dir");
                let at = |name: &str| dir.path().join(name);
                TinyDraft::new(&TARGET, family, config.clone(), 2).write(&at("0"));
                let first = write(&at("0"), &at("1"), format, precision, false);
                let second = write(&at("1"), &at("2"), format, precision, false);
                assert_eq!(second.rounded, 0);
                assert_eq!(tensors(&at("1")), tensors(&at("2")), "{family} {format:?}");
                assert_eq!(json_of(&at("1")), json_of(&at("2")), "{family} {format:?}");
                if precision != Precision::Bf16 {
                    assert_eq!(first.rounded, 0);
                    // Back in the layout it came from, bit for bit what was there.
                    let back = match family {
                        "eagle" => Format::Eagle,
                        "eagle3" => Format::Eagle3,
                        _ => Format::Speculators,
                    };
                    write(&at("1"), &at("3"), back, precision, false);
                    let mut returned = tensors(&at("3"));
                    returned.retain(|t| t.0 != "embed_tokens.weight");
                    assert_eq!(returned, tensors(&at("0")), "{family} {format:?}");
                }
                let taps = |name: &str| {
                    let opened = open(&at(name)).expect("opens");
                    (family != "eagle").then(|| opened.taps(None, &shape()).expect("taps"))
                };
                assert_eq!(taps("0"), taps("2"));
            }
        }
    }
}

/// A target that drafts are made for.
fn host() -> DraftHost {
    let dir = tempfile::tempdir().expect("dir");
    write_hf(&TARGET, dir.path(), Dtype::F32, 1);
    let files = ModelFiles::open(dir.path()).expect("opens");
    DraftHost::of(&load(&files, &LoadOptions::default()).expect("loads"))
}

/// A trainer's tensors, which no file holds, are written as a file's are, byte for byte.
#[test]
fn tensors_in_memory_are_exported_as_those_of_a_file() {
    for (family, format) in [
        ("eagle", Format::Eagle),
        ("eagle3", Format::Eagle3),
        ("speculators", Format::Speculators),
        ("scylla", Format::Scylla),
    ] {
        let dir = tempfile::tempdir().expect("dir");
        let at = |name: &str| dir.path().join(name);
        let draft = TinyDraft::new(&TARGET, family, json!({}), 2);
        draft.write(&at("file"));
        let from_file = open(&at("file")).expect("opens");
        let tensors = draft.tensors.iter().map(|t| {
            let held = HeldTensor {
                dtype: t.dtype,
                shape: t.shape.clone(),
                bytes: t.bytes.clone(),
            };
            (t.name.clone(), held)
        });
        let mut tensors: BTreeMap<String, HeldTensor> = tensors.collect();
        let memory = |tensors: &BTreeMap<String, HeldTensor>| {
            let config = from_file.config.clone();
            Checkpoint::in_memory(config, tensors.clone(), &shape(), WeightForm::AsIs)
        };
        let held = memory(&tensors).expect("fits");
        write_checkpoint(&from_file, &at("1"), format, Precision::Bf16, false);
        write_checkpoint(&held, &at("2"), format, Precision::Bf16, false);
        assert_eq!(self::tensors(&at("1")), self::tensors(&at("2")), "{family}");
        assert_eq!(json_of(&at("1")), json_of(&at("2")), "{family}");
        // And back: the same network.
        assert_eq!(open(&at("2")).expect("opens").config, from_file.config);

        // What a trainer fills in is checked as a file is.
        let broken = |change: &dyn Fn(&mut DraftConfig)| {
            let mut config = from_file.config.clone();
            change(&mut config);
            let held = Checkpoint::in_memory(config, tensors.clone(), &shape(), WeightForm::AsIs);
            let host = host();
            let built = held.and_then(|held| match &held.config {
                DraftConfig::Eagle(_) => network::eagle_of(&held, &host).map(|_| ()),
                DraftConfig::Eagle3(_) => network::eagle3_of(&held, None, &host).map(|_| ()),
                DraftConfig::Scylla(_) => network::scylla_of(&held, &host).map(|_| ()),
            });
            built.expect_err("refused").to_string()
        };
        let first = |config: &mut DraftConfig, change: &dyn Fn(&mut LayerSpec)| {
            let backbone = match config {
                DraftConfig::Eagle(c) => &mut c.backbone,
                DraftConfig::Eagle3(c) => &mut c.backbone,
                DraftConfig::Scylla(c) => &mut c.backbone,
            };
            change(&mut backbone.layers[0]);
        };
        let window = broken(&|c| first(c, &|l| l.window = Some(0)));
        check(
            &window,
            &["layers.0", "window 0"][usize::from(family == "eagle3")..],
        );
        let input = broken(&|c| first(c, &|l| l.input = AttentionInput::Beside(3)));
        check(&input, &["first layer", "Beside(3)"]);

        let fc = tensors.get_mut("fc.weight").expect("fc");
        fc.bytes.truncate(8);
        let error = memory(&tensors).map(|_| ()).expect_err("cut").to_string();
        check(&error, &["fc.weight", "8 bytes"]);
        tensors.remove("fc.weight");
        let error = memory(&tensors).map(|_| ()).expect_err("gone").to_string();
        check(&error, &["fc.weight", "no such tensor"]);
    }
}

/// A network that is exported and read again drafts the same; the golden networks too, where they are at hand.
#[test]
fn golden_checkpoints_survive_the_round_trip() {
    let Some(golden) = golden("golden_checkpoints_survive_the_round_trip") else {
        return;
    };
    for (draft, target, format) in [
        ("eagle1-llama2-tiny", "llama2-tiny", Format::Eagle),
        ("eagle3-llama3-tiny", "llama3-tiny", Format::Eagle3),
        ("eagle3-llama3-tiny", "llama3-tiny", Format::Speculators),
    ] {
        let from = golden.join("eagle").join(draft);
        let files = ModelFiles::open(&golden.join("models").join(target)).expect("opens");
        let shape = files.config.shape();
        let checkpoint = Checkpoint::open(&from, &FAMILIES, &shape, WeightForm::AsIs).expect(draft);
        let taps = match format {
            Format::Eagle => vec![Tap::Final],
            _ => checkpoint.taps(None, &shape).expect("taps"),
        };
        let embedding = || panic!("the file has its own");
        let what = Export {
            checkpoint: &checkpoint,
            format,
            precision: Precision::AsIs,
            zero_bias: false,
            target: &files.config,
            target_sha256: None,
            verifier: (target, "LlamaForCausalLM"),
            embedding: &embedding,
            taps: &taps,
            speculative_tokens: 5,
        };
        let dir = tempfile::tempdir().expect("dir");
        export(&what, dir.path()).expect("exports");
        let mut found = tensors(dir.path());
        for tensor in &mut found {
            tensor.0 = match format {
                Format::Speculators => tensor.0.replace("layers.0.", "midlayer."),
                _ => tensor.0.clone(),
            };
        }
        found.sort();
        assert_eq!(found, tensors(&from), "{draft} {format:?}");
    }
}

/// Writes a checkpoint that was tampered with and returns what opening it says.
fn refused(family: &str, break_it: impl FnOnce(&mut TinyDraft)) -> String {
    let dir = tempfile::tempdir().expect("dir");
    let mut draft = TinyDraft::new(&TARGET, family, json!({}), 4);
    break_it(&mut draft);
    draft.write(dir.path());
    let checkpoint = match open(dir.path()) {
        Err(e) => return e.to_string(),
        Ok(checkpoint) => checkpoint,
    };
    checkpoint
        .draft_ids(TARGET.vocab)
        .map(|_| ())
        .expect_err("refused")
        .to_string()
}

fn check(message: &str, words: &[&str]) {
    for word in words {
        assert!(message.contains(word), "`{word}` is missing in: {message}");
    }
}

#[test]
fn wrong_checkpoints_are_refused_naming_key_expected_and_found() {
    let missing = refused("eagle3", |d| {
        d.tensors
            .retain(|t| t.name != "midlayer.hidden_norm.weight")
    });
    check(
        &missing,
        &[
            "midlayer.hidden_norm.weight",
            "shape [32]",
            "no such tensor",
        ],
    );
    let extra = refused("eagle", |d| {
        let mut norm = d.tensor("layers.0.post_attention_layernorm.weight").clone();
        norm.name = "layers.0.input_layernorm.weight".into();
        d.tensors.push(norm);
    });
    check(
        &extra,
        &[
            "layers.0.input_layernorm.weight",
            "no such key in an EAGLE-1/2",
            "shape [32]",
        ],
    );
    let shaped = refused("scylla", |d| d.tensor("fc.weight").shape = vec![64, 32]);
    check(
        &shaped,
        &[
            "fc.weight",
            "expected shape [32, 64]",
            "found shape [64, 32]",
        ],
    );
    let typed = refused("eagle3", |d| d.tensor("t2d").dtype = Dtype::I8);
    check(&typed, &["t2d", "BOOL", "I8"]);
    let hidden = refused("eagle", |d| d.config["hidden_size"] = json!(64));
    check(&hidden, &["hidden_size", "64", "32, the target's"]);
    let vocab = refused("eagle", |d| d.config["vocab_size"] = json!(31));
    check(&vocab, &["vocab_size", "31", "30, the target's"]);
    let layers = refused("eagle3", |d| d.config["num_hidden_layers"] = json!(2));
    check(
        &layers,
        &["layers.1.self_attn.q_proj.weight", "no such tensor"],
    );
    let layers = refused("eagle", |d| d.config["num_hidden_layers"] = json!(2));
    check(&layers, &["num_hidden_layers", "2", "expected 1"]);
    let flag = refused("eagle3", |d| {
        d.config["norm_before_residual"] = json!("yes")
    });
    check(&flag, &["norm_before_residual", "\"yes\"", "true or false"]);
    let unknown = refused("eagle3", |d| d.config["parallel_heads"] = json!(4));
    check(&unknown, &["parallel_heads", "may change the model"]);
    let draft_vocab = refused("eagle3", |d| d.config["draft_vocab_size"] = json!(31));
    check(&draft_vocab, &["draft_vocab_size", "31", "1..=30"]);

    let taps = |value: Value| {
        refused("eagle3", |d| {
            d.config["eagle_aux_hidden_state_layer_ids"] = value
        })
    };
    check(&taps(json!([])), &["0 hidden states", "1..=9"]);
    check(
        &taps(json!(["2", "4", "5"])),
        &["eagle_aux_hidden_state_layer_ids", "list of layers"],
    );
    check(&taps(json!([-2, 4, 5])), &["[-2,4,5]"]);
    let huge = refused("eagle3", |d| {
        d.config["num_aux_hidden_states"] = json!(1u64 << 60);
        d.config["fc_norm"] = json!(true);
    });
    check(&huge, &["1152921504606846976 hidden states"]);
    let deep = refused("scylla", |d| d.config["num_hidden_layers"] = json!(1 << 24));
    check(&deep, &["number of layers 16777216"]);
    let deep = refused("scylla", |d| d.config["num_hidden_layers"] = json!(4000));
    check(&deep, &["num_hidden_layers", "4000"]);
    let other = refused("speculators", |d| {
        d.config["speculators_model_type"] = json!("eagle")
    });
    check(&other, &["speculators_model_type", "\"eagle\"", "eagle3"]);

    let offset = |at: usize, value: i64| {
        move |d: &mut TinyDraft| {
            d.tensor("d2t").bytes[at * 8..at * 8 + 8].copy_from_slice(&value.to_le_bytes());
        }
    };
    check(
        &refused("eagle3", offset(19, 11)),
        &["d2t", "0..30", "11 at draft id 19"],
    );
    check(
        &refused("eagle3", offset(0, -1)),
        &["d2t", "-1 at draft id 0"],
    );
    check(
        &refused("eagle3", offset(3, i64::MAX)),
        &["d2t", "at draft id 3"],
    );
    let twice = refused("eagle3", |d| d.tensor("d2t").bytes.fill(0xff));
    check(&twice, &["d2t", "-1 at draft id 0"]);
    let double = refused("eagle3", |d| {
        offset(0, 5)(d);
        offset(1, 4)(d);
    });
    check(&double, &["d2t", "both stand for token 5"]);
    let sum = refused("eagle3", |d| d.tensor("t2d").bytes.fill(1));
    check(&sum, &["t2d", "the 20 tokens", "30 true"]);
    let cut = refused("eagle3", |d| {
        let tensor = d.tensor("d2t");
        tensor.bytes.truncate(80);
        tensor.shape = vec![10];
    });
    check(&cut, &["d2t", "expected shape [20]", "found shape [10]"]);
}

#[test]
fn pickle_is_refused_with_a_way_out_and_other_networks_by_name() {
    let dir = tempfile::tempdir().expect("dir");
    let at = |name: &str| dir.path().join(name);
    TinyDraft::new(&TARGET, "eagle", json!({}), 1).write(&at("eagle"));
    let error =
        |e: scylla_core::Result<Checkpoint>| e.map(|_| ()).expect_err("refused").to_string();
    std::fs::rename(
        at("eagle").join("model.safetensors"),
        at("eagle").join("pytorch_model.bin"),
    )
    .expect("rename");
    let message = error(open(&at("eagle")));
    check(
        &message,
        &[
            "pytorch_model.bin",
            "pickled",
            "torch.load",
            "weights_only=True",
            "save_file",
        ],
    );
    std::fs::remove_file(at("eagle").join("pytorch_model.bin")).expect("remove");
    check(&error(open(&at("eagle"))), &["no safetensors"]);

    TinyDraft::new(&TARGET, "scylla", json!({}), 1).write(&at("scylla"));
    let other = Checkpoint::open(&at("scylla"), &[Layout::Eagle], &shape(), WeightForm::AsIs);
    check(
        &error(other),
        &["a Scylla network", "expected an EAGLE-1/2"],
    );
    let lm = at("lm");
    std::fs::create_dir(&lm).expect("directory");
    write_hf(&TARGET, &lm, Dtype::F32, 1);
    let message = error(open(&lm));
    check(&message, &["num_hidden_layers", "8"]);
    std::fs::write(at("scylla").join("config.json"), "{").expect("config");
    check(
        &error(open(&at("scylla"))),
        &["config.json", "not a configuration"],
    );
}

#[test]
fn coinciding_taps_are_refused_unless_layers_are_given() {
    for n in [4, 5, 6] {
        let error = default_taps(n).expect_err("shallow").to_string();
        check(&error, &[&format!("{n} layers"), "draft.taps"]);
    }
    for (n, taps) in [
        (32, [2, 16, 29]),
        (30, [2, 15, 27]),
        (28, [2, 14, 25]),
        (24, [2, 12, 21]),
        (7, [2, 3, 4]),
    ] {
        assert_eq!(default_taps(n).expect("deep enough"), taps);
    }
    let dir = tempfile::tempdir().expect("dir");
    let shallow = TargetShape {
        layers: 6,
        ..shape()
    };
    let write = |config| TinyDraft::new(&TARGET, "eagle3", config, 1).write(dir.path());
    let taps = |layers: Option<&[usize]>| {
        let opened = Checkpoint::open(dir.path(), &FAMILIES, &shallow, WeightForm::AsIs);
        opened.expect("opens").taps(layers, &shallow)
    };
    write(json!({}));
    check(&taps(None).expect_err("shallow").to_string(), &["6 layers"]);
    let given = taps(Some(&[1, 3, 6])).expect("given");
    assert_eq!(given, [Tap::Input(1), Tap::Input(3), Tap::Input(6)]);
    check(
        &taps(Some(&[1, 1, 2])).expect_err("twice").to_string(),
        &["[1, 1, 2]", "rising"],
    );
    check(
        &taps(Some(&[1, 2, 7])).expect_err("deep").to_string(),
        &["0..=6"],
    );
    // vLLM counts inputs, SGLang outputs.
    write(json!({"eagle_aux_hidden_state_layer_ids": [1, 3, 5]}));
    assert_eq!(
        taps(None).expect("inputs"),
        [Tap::Input(1), Tap::Input(3), Tap::Input(5)]
    );
    write(json!({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [-1, 2, 4]}}));
    assert_eq!(
        taps(None).expect("outputs"),
        [Tap::Input(0), Tap::Input(3), Tap::Input(5)]
    );
}

/// A draft vocabulary of the target's size needs no maps, and vLLM takes none: an order of its own cannot be served.
#[test]
fn a_whole_draft_vocabulary_is_written_without_maps_or_not_at_all() {
    let dir = tempfile::tempdir().expect("dir");
    let at = |name: &str| dir.path().join(name);
    let mut draft = TinyDraft::new(&TARGET, "eagle3", json!({"draft_vocab_size": 30}), 1);
    draft.write(&at("whole"));
    let written = write(
        &at("whole"),
        &at("out"),
        Format::Eagle3,
        Precision::AsIs,
        false,
    );
    assert!(!written.keys.iter().any(|k| k == "d2t" || k == "t2d"));
    assert!(open(&at("out")).expect("opens").draft_ids(30).is_ok());
    // Tokens 0 and 1 change places.
    draft.tensor("d2t").bytes[..8].copy_from_slice(&1i64.to_le_bytes());
    draft.tensor("d2t").bytes[8..16].copy_from_slice(&(-1i64).to_le_bytes());
    draft.write(&at("mixed"));
    let checkpoint = open(&at("mixed")).expect("opens");
    assert_eq!(checkpoint.draft_ids(30).expect("ids").target(0), 1);
    let error = export_refused(&checkpoint, Format::Eagle3, &at("never"));
    check(&error, &["another order"]);
}

/// EAGLE's own switch for biases of q, k and v is read and written.
#[test]
fn biases_of_the_attention_go_in_and_out() {
    let dir = tempfile::tempdir().expect("dir");
    let at = |name: &str| dir.path().join(name);
    let mut draft = TinyDraft::new(&TARGET, "eagle", json!({"qkv_bias": true}), 1);
    for (name, n) in [("q", 32), ("k", 16), ("v", 16)] {
        let mut bias = draft
            .tensor("layers.0.post_attention_layernorm.weight")
            .clone();
        bias.name = format!("layers.0.self_attn.{name}_proj.bias");
        bias.shape = vec![n];
        bias.bytes.truncate(4 * n);
        draft.tensors.push(bias);
    }
    draft.write(&at("in"));
    let written = write(&at("in"), &at("out"), Format::Eagle, Precision::AsIs, false);
    assert_eq!(written.keys.len(), EAGLE_KEYS.len() + 3);
    assert!(written.notes.iter().any(|n| n.contains("qkv_bias")));
    let config = json_of(&at("out"));
    assert_eq!(
        (&config["qkv_bias"], &config["attention_bias"]),
        (&json!(true), &json!(false))
    );
    assert_eq!(tensors(&at("out")), tensors(&at("in")));
}

#[test]
fn formats_that_cannot_say_a_network_are_refused() {
    let dir = tempfile::tempdir().expect("dir");
    TinyDraft::new(&TARGET, "scylla", json!({}), 1).write(dir.path());
    let checkpoint = open(dir.path()).expect("opens");
    for format in [Format::Eagle, Format::Eagle3] {
        let error = export_refused(&checkpoint, format, &dir.path().join("out"));
        check(&error, &["a Scylla network", &format!("{format:?}")]);
        assert!(!dir.path().join("out").exists());
    }
}
