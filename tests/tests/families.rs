//! A family of one's own: one file beside the built-in ones, here one that only tests know.

use std::collections::HashMap;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use scylla_core::Result;
use scylla_core::model::{Family, Fields, LayerSpec, ModelFiles, WeightForm};
use scylla_core::plugin::{SlotRows, Step, TargetModel, Want};
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
