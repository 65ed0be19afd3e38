//! A family of one's own: one file beside the built-in ones, here one that only tests know.

use std::collections::HashMap;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use scylla_core::Result;
use scylla_core::model::{Family, Fields, LayerSpec, ModelFiles, WeightForm};
use scylla_core::plugin::{
    Forward, PackedRows, Slot, SlotRows, Step, Tap, TargetModel, TargetShape, Want,
};
use scylla_tests::{Tiny, backends, write_hf};

/// Toy models: Qwen3's layers with other names, and a window of `sight` positions in every second layer.
struct Toy;

impl Family for Toy {
    fn name(&self) -> &'static str {
        "toy"
    }

    fn keys(&self) -> &'static [&'static str] {
        &["sight"]
    }

    fn layers_of_hf(&self, fields: &Fields<'_>, layers: &mut [LayerSpec]) -> Result<()> {
        let sight = fields.size("sight")?;
        for (i, layer) in layers.iter_mut().enumerate() {
            layer.qk_norm = true;
            layer.window = sight.filter(|_| i % 2 == 1);
        }
        Ok(())
    }

    fn hf_name(&self, name: &str) -> String {
        let toy = name.replace("model.layers", "blocks");
        toy.replace("self_attn", "look").replace("mlp", "think")
    }
}

fn greedy(model: &mut dyn TargetModel) -> Vec<u32> {
    let mut tokens = vec![5, 6, 7];
    let mut text = Vec::new();
    model.open(0).expect("open");
    for _ in 0..40 {
        let rows = SlotRows {
            slot: 0,
            tokens: &tokens,
            parents: &[],
            want: Want::Last,
        };
        let step = Step {
            slots: vec![rows],
            taps: &[],
        };
        let found = model.forward(&step).expect("forward");
        let path: Vec<usize> = (0..tokens.len()).collect();
        model.commit(0, &path).expect("commit");
        tokens = found.logits[0].argmax(&[0], usize::MAX).expect("argmax");
        text.extend_from_slice(&tokens);
    }
    model.close(0);
    text
}

#[test]
fn a_family_is_one_file_and_runs_on_every_executor() {
    let dir = tempfile::tempdir().expect("dir");
    let tiny = Tiny {
        family: "qwen3",
        window: Some(9),
        ..Tiny::default()
    };
    write_hf(&tiny, dir.path(), Dtype::F32, 1);
    let expected = backends(
        &ModelFiles::open(dir.path()).expect("opens"),
        WeightForm::AsIs,
    );

    // The same model in the toy's spelling: Qwen's window begins with layer 1 of 2, as every second layer does.
    let (weights, config) = (
        dir.path().join("model.safetensors"),
        dir.path().join("config.json"),
    );
    let text = std::fs::read_to_string(&config).expect("config");
    let text = text
        .replace("qwen3", "toy")
        .replace("sliding_window\":9", "sight\":9");
    std::fs::write(
        &config,
        text.replace("use_sliding_window\":true", "use_cache\":true"),
    )
    .expect("config");
    let bytes = std::fs::read(&weights).expect("weights");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let renamed: HashMap<String, TensorView<'_>> = file
        .iter()
        .map(|(name, view)| (Toy.hf_name(name), view))
        .collect();
    let written = safetensors::serialize(renamed, None).expect("serialises");
    std::fs::write(&weights, written).expect("weights");

    let unknown = ModelFiles::open(dir.path())
        .map(|_| ())
        .expect_err("unknown");
    assert!(
        unknown.to_string().contains("model_type `toy`"),
        "{unknown}"
    );
    let files = ModelFiles::open_among(dir.path(), &[&Toy]).expect("opens");
    for ((name, mut toy), (_, mut qwen)) in
        backends(&files, WeightForm::AsIs).into_iter().zip(expected)
    {
        let text = greedy(toy.model.as_mut());
        assert_eq!(text, greedy(qwen.model.as_mut()), "{name}");
    }
}

/// A target that packs as any target does: its documents take slots.
struct InSlots(Box<dyn TargetModel>);

impl TargetModel for InSlots {
    fn open(&mut self, slot: Slot) -> Result<()> {
        self.0.open(slot)
    }
    fn close(&mut self, slot: Slot) {
        self.0.close(slot);
    }
    fn forward(&mut self, step: &Step<'_>) -> Result<Forward> {
        self.0.forward(step)
    }
    fn commit(&mut self, slot: Slot, path: &[usize]) -> Result<()> {
        self.0.commit(slot, path)
    }
    fn shape(&self) -> TargetShape {
        self.0.shape()
    }
}

/// States of packed documents are those of slots, to what the forms round: in f32 to the last places, else to those of bf16.
#[test]
fn packed_documents_have_the_states_of_slots_on_every_executor() {
    let dir = tempfile::tempdir().expect("dir");
    // Two lines of 200 rows, more than a block of attention; one document is a single row.
    let documents = vec![0..160, 160..200, 200..201, 201..400];
    let rows = PackedRows::new(2, 200, documents).expect("rows");
    let tokens: Vec<u32> = (0..400u32).map(|i| (i * 7 + i * i % 31) % 50).collect();
    let taps = [Tap::Input(0), Tap::Input(1), Tap::Input(2), Tap::Final];
    for (i, (family, window)) in [
        ("llama-bias", None),
        ("mistral", Some(40)),
        ("qwen2", Some(9)),
        ("qwen3", Some(200)),
    ]
    .into_iter()
    .enumerate()
    {
        let tiny = Tiny {
            family,
            window,
            ffn: 128,
            seed: i as u64,
            ..Tiny::default()
        };
        let dir = dir.path().join(family);
        std::fs::create_dir(&dir).expect("folder");
        write_hf(&tiny, &dir, Dtype::F32, 1);
        let files = ModelFiles::open(&dir).expect("opens");
        for (form, bound) in [
            (WeightForm::AsIs, 1e-5),
            (WeightForm::Bf16, 0.03),
            (WeightForm::Q8_0, 0.03),
            (WeightForm::Q4, 0.03),
        ] {
            for (name, loaded) in backends(&files, form) {
                let mut target = InSlots(loaded.model);
                let expected = target.states(&tokens, &rows, &taps).expect("slots");
                let found = target.0.states(&tokens, &rows, &taps).expect("packed");
                for ((found, expected), tap) in found.iter().zip(&expected).zip(taps) {
                    let (found, expected) =
                        (found.all().expect("here"), expected.all().expect("here"));
                    assert_eq!(
                        (found.len(), expected.len()),
                        (400 * tiny.hidden, 400 * tiny.hidden)
                    );
                    // The whole, and the row of its own.
                    let h = tiny.hidden;
                    for range in [0..400 * h, 200 * h..201 * h] {
                        let (mut off, mut size) = (0.0f64, 0.0f64);
                        for (a, b) in found[range.clone()].iter().zip(&expected[range]) {
                            off += f64::from(a - b).powi(2);
                            size += f64::from(*b).powi(2);
                        }
                        let off = (off / size).sqrt();
                        assert!(
                            off < bound,
                            "{family} {form:?} on {name}, {tap:?}: off by {off:.2e}"
                        );
                    }
                }
                // Their company does not matter to rows on the kernels.
                if !found[0].is_on_device() {
                    let alone = PackedRows::lines(1, 199).expect("rows");
                    let one = target.0.states(&tokens[201..], &alone, &taps).expect("one");
                    for (one, all) in one.iter().zip(&found) {
                        let all = &all.values().expect("host")[201 * tiny.hidden..];
                        assert_eq!(one.values().expect("host"), all, "{family} {form:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn packed_rows_that_do_not_fit_are_refused() {
    let dir = tempfile::tempdir().expect("dir");
    let tiny = Tiny::default();
    write_hf(&tiny, dir.path(), Dtype::F32, 1);
    let files = ModelFiles::open(dir.path()).expect("opens");
    for (name, loaded) in backends(&files, WeightForm::AsIs) {
        let mut model = loaded.model;
        let longer = model.shape().context + 1;
        let rows = |n| PackedRows::lines(1, n).expect("rows");
        let mut refused = |tokens: &[u32], n, taps: &[Tap], said: &str| {
            let found = model.states(tokens, &rows(n), taps);
            let error = found.map(|_| ()).expect_err(said).to_string();
            assert!(error.contains(said), "{name}: {error}");
        };
        refused(&[1, 2], 3, &[Tap::Final], "2 tokens for 3 packed rows");
        refused(&[1, 1 << 20], 2, &[Tap::Final], "outside the vocabulary");
        refused(&[1, 2], 2, &[Tap::Input(99)], "tap Input(99)");
        refused(&vec![1; longer], longer, &[Tap::Final], "positions");
    }
}
