//! Every file format gives the same model, and broken files are refused with the reason.

use std::path::Path;

use candle_core::quantized::GgmlDType;
use safetensors::Dtype;
use scylla_core::Error;
use scylla_core::model::{LoadOptions, ModelFiles, WeightForm, load};
use scylla_core::plugin::{SlotRows, Step, Want};
use scylla_core::text::Tokenizer;
use scylla_tests::{Tiny, backends, deviation, write_gguf, write_hf, write_sentencepiece_gguf};

const TOKENS: [u32; 6] = [3, 14, 15, 92, 65, 35];

fn logits(path: &Path, weights: WeightForm) -> Vec<f32> {
    let files = ModelFiles::open(path).expect("opens");
    let mut first: Option<Vec<f32>> = None;
    for (name, mut model) in backends(&files, weights) {
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
    for (family, tied) in [("llama", false), ("llama", true), ("qwen2", true)] {
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
fn an_element_type_the_kernels_do_not_know_is_named() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("model.gguf");
    write_gguf(
        &Tiny {
            hidden: 256,
            heads: 8,
            head_dim: 32,
            ffn: 256,
            ..Tiny::default()
        },
        &path,
        GgmlDType::Q2K,
    );
    let files = ModelFiles::open(&path).expect("opens");
    let error = load(&files, &LoadOptions::default())
        .err()
        .expect("refused")
        .to_string();
    assert!(error.contains("Q2K"), "{error}");
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

#[test]
fn a_tokenizer_that_does_not_fit_the_model_is_refused() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("model.gguf");
    write_sentencepiece_gguf(&path);
    let files = ModelFiles::open(&path).expect("opens");
    let tokenizer = Tokenizer::of_model(&files)
        .expect("reads")
        .expect("has one");
    let error = tokenizer
        .check_fits(100, &path)
        .expect_err("refused")
        .to_string();
    assert!(
        error.contains("100") && error.contains(&tokenizer.size().to_string()),
        "{error}"
    );
    assert!(matches!(
        tokenizer.check_fits(100, &path),
        Err(Error::File { .. })
    ));
}

#[test]
fn a_sentencepiece_tokenizer_merges_by_score_and_falls_back_to_bytes() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("model.gguf");
    write_sentencepiece_gguf(&path);
    let tokenizer = Tokenizer::of_model(&ModelFiles::open(&path).expect("opens"))
        .expect("reads")
        .expect("has one");
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
