//! Every file format gives the same model, and broken files are refused with the reason.

use std::path::Path;

use candle_core::quantized::GgmlDType;
use proptest::prelude::*;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use scylla_core::Error;
use scylla_core::model::{LoadOptions, ModelFiles, WeightForm, config_of, load, of_config};
use scylla_core::plugin::{SlotRows, Step, Want};
use scylla_core::text::Tokenizer;
use scylla_tests::{Tiny, backends, deviation, write_gguf, write_hf, write_sentencepiece_gguf};

const TOKENS: [u32; 6] = [3, 14, 15, 92, 65, 35];

fn logits(path: &Path, weights: WeightForm) -> Vec<f32> {
    let files = ModelFiles::open(path).expect("opens");
    let mut first: Option<Vec<f32>> = None;
    for (name, mut loaded) in backends(&files, weights) {
        let model = loaded.model.as_mut();
        model.open(0).expect("open");
        let rows = SlotRows {
            slot: 0,
            tokens: &TOKENS,
            parents: &[],
            want: Want::All,
        };
        let forward = model
            .forward(&Step {
                slots: vec![rows],
                taps: &[],
            })
            .expect("forward");
        let found = forward.logits[0].all().expect("logits").into_owned();
        match &first {
            // Integer products round activations; dense ones only sum in another order.
            Some(first) => assert!(
                distance(&found, first) < 0.05,
                "{name}: {}",
                distance(&found, first)
            ),
            None => first = Some(found),
        }
    }
    first.expect("a backend")
}

/// Euclidean distance over the norm of `b`.
fn distance(a: &[f32], b: &[f32]) -> f32 {
    let square = |v: f32| v * v;
    let off: f32 = a.iter().zip(b).map(|(a, b)| square(a - b)).sum();
    (off / b.iter().copied().map(square).sum::<f32>()).sqrt()
}

#[test]
fn shards_and_element_types_give_the_same_model() {
    for family in ["llama", "qwen2"] {
        let tiny = Tiny {
            family,
            ..Tiny::default()
        };
        let hf = |dtype, shards, form| {
            let dir = tempfile::tempdir().expect("dir");
            write_hf(&tiny, dir.path(), dtype, shards);
            logits(dir.path(), form)
        };
        let whole = hf(Dtype::F32, 1, WeightForm::AsIs);
        assert_eq!(whole, hf(Dtype::F32, 3, WeightForm::AsIs));
        for dtype in [Dtype::BF16, Dtype::F16] {
            let as_is = hf(dtype, 1, WeightForm::AsIs);
            assert!(deviation(&as_is, &whole) < 0.3, "{dtype:?}");
            // Widening is exact, so the form in memory does not matter but for activations, which bf16 rounds too.
            let bound = if dtype == Dtype::BF16 { 1e-2 } else { 1e-6 };
            let off = distance(&as_is, &hf(dtype, 2, WeightForm::F32));
            assert!(off < bound, "{dtype:?}: {off}");
        }
    }
}

#[test]
fn gguf_gives_the_model_of_the_directory() {
    for (family, tied) in [
        ("llama", false),
        ("llama", true),
        ("llama-bias", false),
        ("qwen2", true),
        ("qwen3", false),
    ] {
        let tiny = Tiny {
            family,
            tied,
            hidden: 256,
            heads: 8,
            head_dim: 32,
            ffn: 256,
            ..Tiny::default()
        };
        let dir = tempfile::tempdir().expect("dir");
        write_hf(&tiny, dir.path(), Dtype::F32, 1);
        let expected = logits(dir.path(), WeightForm::AsIs);
        let path = dir.path().join("model.gguf");
        // Two random layers amplify rounding; a wrong layout would be off by the whole norm and more.
        for (dtype, tolerance) in [
            (GgmlDType::F32, 1e-5),
            (GgmlDType::F16, 2e-3),
            (GgmlDType::BF16, 2e-2),
            (GgmlDType::Q8_0, 0.05),
            (GgmlDType::Q6K, 0.1),
            (GgmlDType::Q5K, 0.2),
            (GgmlDType::Q4K, 0.5),
            (GgmlDType::Q4_1, 0.5),
            (GgmlDType::Q4_0, 0.5),
            (GgmlDType::Q5_0, 0.3),
            (GgmlDType::Q5_1, 0.3),
        ] {
            write_gguf(&tiny, &path, dtype);
            for form in [WeightForm::AsIs, WeightForm::F32] {
                let off = distance(&logits(&path, form), &expected);
                assert!(off <= tolerance, "{family} {dtype:?} {form}: {off}");
            }
        }
    }
}

#[test]
fn a_file_that_says_it_has_no_vocabulary_is_a_model_without_tokenizer() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("model.gguf");
    write_gguf(&Tiny::default(), &path, GgmlDType::F32);
    let files = ModelFiles::open(&path).expect("opens");
    assert!(Tokenizer::of_model(&files).expect("reads").is_none());
}

#[test]
fn a_tensor_type_that_is_not_read_is_named_with_its_tensor_and_those_that_are() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("model.gguf");
    write_gguf(&Tiny::default(), &path, GgmlDType::F32);
    let bytes = std::fs::read(&path).expect("read");
    let name = b"blk.0.attn_q.weight";
    let at = bytes
        .windows(name.len())
        .position(|w| w == name)
        .expect("the tensor");
    // Behind the name: the number of dimensions, two of them, and the type.
    let kind = at + name.len() + 4 + 16;
    for (number, named) in [
        (23u32, "IQ4_XS"),
        (39, "MXFP4"),
        (9, "Q8_1"),
        (99, "unknown"),
    ] {
        let mut other = bytes.clone();
        other[kind..kind + 4].copy_from_slice(&number.to_le_bytes());
        std::fs::write(&path, other).expect("write");
        let error = refusal(&path);
        for word in [
            "model.gguf",
            "blk.0.attn_q.weight",
            &number.to_string(),
            named,
            "Q4_K",
            "Q8_0",
        ] {
            assert!(error.contains(word), "no `{word}` in: {error}");
        }
    }
}

/// A model with one more tensor.
fn with_tensor(dir: &Path, name: &str) -> Result<ModelFiles, Error> {
    write_hf(&Tiny::default(), dir, Dtype::F32, 1);
    let path = dir.join("model.safetensors");
    let bytes = std::fs::read(&path).expect("read");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let new = [0; 16];
    let view = TensorView::new(Dtype::F32, vec![4], &new).expect("view");
    let written =
        safetensors::serialize(file.iter().chain([(name, view)]), None).expect("serialize");
    std::fs::write(&path, written).expect("write");
    ModelFiles::open(dir)
}

proptest! {
    /// The law of files: a tensor is part of the model, or known to change nothing, or refused by name.
    #[test]
    fn a_tensor_added_to_a_file_is_used_listed_or_refused(
        prefix in "(model\\.|)",
        layer in "(layers\\.[0-3]\\.|)",
        part in "(self_attn\\.|mlp\\.|)",
        name in "(q_proj|o_proj|down_proj|q_norm|inv_freq|rotary_emb|lm_head|embed_tokens|norm|input_layernorm|score|bias)",
        end in "(\\.weight|\\.bias|\\.inv_freq|\\.qweight|\\.weight_scale|_2|)",
    ) {
        let name = format!("{prefix}{layer}{part}{name}{end}");
        let dir = tempfile::tempdir().expect("dir");
        write_hf(&Tiny::default(), dir.path(), Dtype::F32, 1);
        let own = ModelFiles::open(dir.path()).expect("opens").config.tensors();
        prop_assume!(own.iter().all(|(known, _)| *known != name));
        let listed = ["rotary_emb.inv_freq", "self_attn.bias", "self_attn.masked_bias"];
        match with_tensor(dir.path(), &name) {
            Ok(_) => prop_assert!(listed.iter().any(|end| name.ends_with(end)), "{name} was passed over"),
            Err(e) => prop_assert!(e.to_string().contains(&name), "{name}: {e}"),
        }
    }
}

#[test]
fn a_model_reads_every_tensor_that_it_says_it_is_made_of() {
    for (family, tied) in [
        ("llama", false),
        ("llama", true),
        ("qwen2", false),
        ("qwen3", true),
        ("llama-bias", false),
    ] {
        let tiny = Tiny {
            family,
            tied,
            ..Tiny::default()
        };
        let dir = tempfile::tempdir().expect("dir");
        write_hf(&tiny, dir.path(), Dtype::F32, 1);
        let path = dir.path().join("model.safetensors");
        let bytes = std::fs::read(&path).expect("read");
        let file = SafeTensors::deserialize(&bytes).expect("safetensors");
        let tensors = ModelFiles::open(dir.path())
            .expect("opens")
            .config
            .tensors();
        for (name, _) in tensors {
            let others = file.iter().filter(|(other, _)| *other != name);
            let written = safetensors::serialize(others, None).expect("serialize");
            std::fs::write(&path, written).expect("write");
            let error = refusal(dir.path());
            assert!(
                error.contains(&name) && error.contains("no such tensor"),
                "{name}: {error}"
            );
        }
    }
}

#[test]
fn a_head_beside_a_tied_one_is_its_copy_or_refused() {
    let tiny = Tiny::default();
    for (same, seed) in [(true, tiny.seed), (false, tiny.seed)] {
        let dir = tempfile::tempdir().expect("dir");
        write_hf(&Tiny { seed, ..tiny }, dir.path(), Dtype::F32, 1);
        let config = dir.path().join("config.json");
        let text = std::fs::read_to_string(&config).expect("read");
        let tied = text.replace(
            "\"tie_word_embeddings\":false",
            "\"tie_word_embeddings\":true",
        );
        assert_ne!(tied, text);
        std::fs::write(&config, tied).expect("write");
        if same {
            let path = dir.path().join("model.safetensors");
            let bytes = std::fs::read(&path).expect("read");
            let file = SafeTensors::deserialize(&bytes).expect("safetensors");
            let table = file.tensor("model.embed_tokens.weight").expect("table");
            let others = file.iter().filter(|(name, _)| *name != "lm_head.weight");
            let written = safetensors::serialize(others.chain([("lm_head.weight", table)]), None);
            std::fs::write(&path, written.expect("serialize")).expect("write");
            assert!(ModelFiles::open(dir.path()).is_ok());
        } else {
            let error = refusal(dir.path());
            assert!(
                error.contains("lm_head.weight") && error.contains("tie_word_embeddings"),
                "{error}"
            );
        }
    }
}

#[test]
fn listing_and_shards_agree_and_no_tensor_is_in_two() {
    let dir = tempfile::tempdir().expect("dir");
    write_hf(&Tiny::default(), dir.path(), Dtype::F32, 2);
    let listing = dir.path().join("model.safetensors.index.json");
    let text = std::fs::read_to_string(&listing).expect("read");
    let mut json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let map = json["weight_map"].as_object_mut().expect("map");
    let file = map["lm_head.weight"].as_str().expect("file").to_string();
    let other = if file.contains("00001") {
        file.replace("00001-of", "00002-of")
    } else {
        file.replace("00002-of", "00001-of")
    };
    map.insert("lm_head.weight".into(), other.into());
    std::fs::write(&listing, json.to_string()).expect("write");
    assert!(refusal(dir.path()).contains("lm_head.weight"));
    json["weight_map"]["lm_head.weight"] = file.into();
    json["weight_map"]["model.extra"] = json["weight_map"]["lm_head.weight"].clone();
    std::fs::write(&listing, json.to_string()).expect("write");
    assert!(refusal(dir.path()).contains("model.extra"));
    std::fs::write(&listing, text).expect("write");
    let first = dir.path().join("model-00001-of-00002.safetensors");
    std::fs::copy(&first, dir.path().join("model-00002-of-00002.safetensors")).expect("copy");
    assert!(refusal(dir.path()).contains("is also in"));
    assert!(scylla_core::model::Shards::open_files(&[]).is_err());
}

#[test]
fn weights_that_are_not_finite_are_refused_by_name() {
    let dir = tempfile::tempdir().expect("dir");
    for value in [f32::NAN, f32::NEG_INFINITY] {
        write_hf(&Tiny::default(), dir.path(), Dtype::F32, 1);
        let path = dir.path().join("model.safetensors");
        let mut bytes = std::fs::read(&path).expect("read");
        let end = bytes.len() - 4;
        bytes[end..].copy_from_slice(&value.to_le_bytes());
        std::fs::write(&path, bytes).expect("write");
        let error = refusal(dir.path());
        assert!(
            error.contains("tensor `") && error.contains("NaN or infinity"),
            "{error}"
        );
    }
}

/// Opening and loading, whichever fails first.
fn refusal(path: &Path) -> String {
    let loaded = ModelFiles::open(path).and_then(|files| load(&files, &LoadOptions::default()));
    loaded.err().expect("refused").to_string()
}

#[test]
fn missing_and_truncated_files_are_refused_with_the_reason() {
    let dir = tempfile::tempdir().expect("dir");
    assert!(refusal(&dir.path().join("nothing")).contains("no such file"));
    assert!(refusal(dir.path()).contains("config.json"));
    write_hf(&Tiny::default(), dir.path(), Dtype::F32, 1);
    let weights = dir.path().join("model.safetensors");
    let bytes = std::fs::read(&weights).expect("read");
    for keep in [0, 7, 100, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(&weights, &bytes[..keep]).expect("write");
        let error = refusal(dir.path());
        assert!(error.contains("model.safetensors"), "{keep}: {error}");
    }
    std::fs::remove_file(&weights).expect("remove");
    assert!(refusal(dir.path()).contains("model.safetensors"));
    std::fs::write(dir.path().join("config.json"), "{").expect("write");
    assert!(refusal(dir.path()).contains("config.json"));

    let gguf = dir.path().join("model.gguf");
    write_gguf(&Tiny::default(), &gguf, GgmlDType::Q8_0);
    let bytes = std::fs::read(&gguf).expect("read");
    for keep in [0, 3, 50, 600, bytes.len() / 2, bytes.len() - 64] {
        std::fs::write(&gguf, &bytes[..keep]).expect("write");
        assert!(refusal(&gguf).contains("model.gguf"), "{keep}");
    }
}

#[test]
fn wrong_shapes_types_and_architectures_are_named() {
    let dir = tempfile::tempdir().expect("dir");
    write_hf(&Tiny::default(), dir.path(), Dtype::F32, 1);
    let config = dir.path().join("config.json");
    let text = std::fs::read_to_string(&config).expect("read");
    let with = |from: &str, to: &str| {
        std::fs::write(&config, text.replace(from, to)).expect("write");
        refusal(dir.path())
    };
    let error = with("\"intermediate_size\":96", "\"intermediate_size\":64");
    assert!(
        error.contains("gate_proj") && error.contains("[64, 64]") && error.contains("[96, 64]"),
        "{error}"
    );
    assert!(with("\"num_hidden_layers\":2", "\"num_hidden_layers\":3").contains("model.layers.2."));
    assert!(with("\"model_type\":\"llama\"", "\"model_type\":\"mamba\"").contains("mamba"));
    assert!(with("\"vocab_size\":97", "\"vocab_size\":0").contains("vocabulary size 0"));
    std::fs::write(&config, &text).expect("write");
    let bytes = [0u8; 97 * 64 * 8];
    let view =
        safetensors::tensor::TensorView::new(Dtype::I64, vec![97, 64], &bytes).expect("view");
    let file =
        safetensors::serialize([("model.embed_tokens.weight", view)], None).expect("serialize");
    std::fs::write(dir.path().join("model.safetensors"), file).expect("write");
    let error = refusal(dir.path());
    assert!(
        error.contains("I64") || error.contains("no such tensor"),
        "{error}"
    );
}

#[test]
fn shard_names_may_not_leave_the_directory() {
    let dir = tempfile::tempdir().expect("dir");
    write_hf(&Tiny::default(), dir.path(), Dtype::F32, 2);
    let listing = dir.path().join("model.safetensors.index.json");
    std::fs::write(&listing, r#"{"weight_map":{"a":"../../etc/passwd"}}"#).expect("write");
    assert!(refusal(dir.path()).contains("is a path"));
}

/// A small SentencePiece tokenizer, out of a file in `dir`.
fn sentencepiece(dir: &Path) -> Tokenizer {
    let path = dir.join("model.gguf");
    write_sentencepiece_gguf(&path);
    let files = ModelFiles::open(&path).expect("opens");
    let tokenizer = Tokenizer::of_model(&files).expect("reads");
    tokenizer.expect("has one")
}

#[test]
fn a_tokenizer_that_does_not_fit_the_model_is_refused() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path();
    let tokenizer = sentencepiece(path);
    let error = tokenizer
        .check_fits(100, path)
        .expect_err("refused")
        .to_string();
    assert!(
        error.contains("100") && error.contains(&tokenizer.size().to_string()),
        "{error}"
    );
    assert!(matches!(
        tokenizer.check_fits(100, path),
        Err(Error::File { .. })
    ));
}

#[test]
fn a_sentencepiece_tokenizer_merges_by_score_and_falls_back_to_bytes() {
    let dir = tempfile::tempdir().expect("dir");
    let tokenizer = sentencepiece(dir.path());
    let pieces = |text: &str| -> Vec<String> {
        let ids = tokenizer.encode(text).expect("encodes");
        assert_eq!(ids[0], 1, "BOS comes first");
        let bytes = |id: &u32| {
            String::from_utf8_lossy(tokenizer.token_bytes(*id).unwrap_or(b"?")).into_owned()
        };
        ids[1..].iter().map(bytes).collect()
    };
    assert_eq!(pieces("the cat"), [" the", " cat"]);
    assert_eq!(pieces("then\n"), [" the", "n", "\n"]);
    // An emoji is four bytes, each a token of its own; é is a piece.
    assert_eq!(
        tokenizer.encode("\u{1F600}").expect("encodes").len(),
        1 + 1 + 4
    );
    for text in ["the cat and the rest", "a\u{1F600}é", "in  the\n\nend"] {
        let ids = tokenizer.encode(text).expect("encodes");
        assert_eq!(tokenizer.decode(&ids), text);
    }
    // A text that already begins with BOS gets no second one.
    let ids = tokenizer.encode("<s>the").expect("encodes");
    assert_eq!(ids.iter().filter(|&&id| id == 1).count(), 1);
}

#[test]
fn a_shape_is_described_as_a_configuration_says_it() {
    for family in ["llama", "llama-bias", "mistral", "qwen2", "qwen3"] {
        for tied in [false, true] {
            let tiny = Tiny {
                family,
                tied,
                ..Tiny::default()
            };
            let dir = tempfile::tempdir().expect("dir");
            write_hf(&tiny, dir.path(), Dtype::F32, 1);
            let shape = ModelFiles::open(dir.path()).expect("opens").config;
            let json = config_of(&shape).expect("described");
            let (again, notes) = of_config(&json, dir.path()).expect("read");
            assert_eq!(again, shape, "{json}");
            assert!(notes.is_empty(), "{notes:?}");
        }
    }
    let dir = tempfile::tempdir().expect("dir");
    write_hf(&Tiny::default(), dir.path(), Dtype::F32, 1);
    let mut shape = ModelFiles::open(dir.path()).expect("opens").config;
    shape.layers[1].window = Some(8);
    let error = config_of(&shape).expect_err("a window").to_string();
    assert!(error.contains("a window"), "{error}");
}

#[test]
fn a_tokenizer_of_a_gguf_file_is_written_as_a_folder_that_reads_alike() {
    let dir = tempfile::tempdir().expect("dir");
    let tokenizer = sentencepiece(dir.path());
    tokenizer.write(dir.path()).expect("written");
    let again = Tokenizer::from_dir(dir.path()).expect("read");
    assert_eq!(again.size(), tokenizer.size());
    for text in [
        "the cat and",
        "a\u{1F600}\u{e9}",
        "in  the\n\nend",
        "<s>the",
        "",
    ] {
        assert_eq!(
            again.encode(text).expect("encodes"),
            tokenizer.encode(text).expect("encodes"),
            "{text:?}"
        );
    }
    for id in 0..tokenizer.size() as u32 {
        assert_eq!(again.token_bytes(id), tokenizer.token_bytes(id), "{id}");
    }
    assert_eq!(again.eos(), tokenizer.eos());
}
