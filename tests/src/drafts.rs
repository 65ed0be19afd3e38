//! Random draft checkpoints for tiny targets.

use std::path::Path;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use crate::tiny::{Tiny, to_bytes};

/// A tensor of a checkpoint.
#[derive(Debug, Clone)]
pub struct DraftTensor {
    /// Its key.
    pub name: String,
    /// Its type.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// A random draft checkpoint, to be written as it is or broken first.
#[derive(Debug, Clone)]
pub struct TinyDraft {
    /// `config.json`.
    pub config: Value,
    /// The tensors.
    pub tensors: Vec<DraftTensor>,
}

impl TinyDraft {
    /// A checkpoint of `family` (`eagle`, `eagle3`, `speculators` or `scylla`, the last of two layers) for a target, in
    /// f32. `config` is merged into its `config.json` and may ask for EAGLE-3's options.
    pub fn new(target: &Tiny, family: &str, config: Value, seed: u64) -> Self {
        let (h, ffn, vocab) = (target.hidden, target.ffn, target.vocab);
        let mut all = json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": vocab,
            "hidden_size": h,
            "intermediate_size": ffn,
            "num_hidden_layers": if family == "scylla" { 2 } else { 1 },
            "num_attention_heads": target.heads,
            "num_key_value_heads": target.kv_heads,
            "head_dim": target.head_dim,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "max_position_embeddings": 256,
            "tie_word_embeddings": false,
        });
        let draft_vocab = match config.get("draft_vocab_size").and_then(Value::as_u64) {
            Some(size) => size as usize,
            None => vocab - vocab / 3,
        };
        match family {
            "eagle3" => {
                all["architectures"] = json!(["LlamaForCausalLMEagle3"]);
                all["draft_vocab_size"] = json!(draft_vocab);
            }
            "speculators" => {
                all = json!({
                    "speculators_model_type": "eagle3",
                    "draft_vocab_size": draft_vocab,
                    "transformer_layer_config": all,
                });
            }
            "scylla" => all["architectures"] = json!(["ScyllaForCausalLM"]),
            _ => {}
        }
        for (key, value) in config.as_object().into_iter().flatten() {
            all[key] = value.clone();
        }
        let mut draft = Self {
            config: all,
            tensors: Vec::new(),
        };
        let mut rng = StdRng::seed_from_u64(seed);
        let flag = |key: &str| config.get(key).and_then(Value::as_bool).unwrap_or(false);
        let q = target.heads * target.head_dim;
        let kv = target.kv_heads * target.head_dim;
        let layer = |prefix: &str, input: usize| -> Vec<(String, Vec<usize>)> {
            let shapes = [
                ("self_attn.q_proj", vec![q, input]),
                ("self_attn.k_proj", vec![kv, input]),
                ("self_attn.v_proj", vec![kv, input]),
                ("self_attn.o_proj", vec![h, q]),
                ("mlp.gate_proj", vec![ffn, h]),
                ("mlp.up_proj", vec![ffn, h]),
                ("mlp.down_proj", vec![h, ffn]),
                ("post_attention_layernorm", vec![h]),
            ];
            let name = |(n, s): (&str, Vec<usize>)| (format!("{prefix}.{n}.weight"), s);
            shapes.map(name).to_vec()
        };
        let mut shapes: Vec<(String, Vec<usize>)> = Vec::new();
        match family {
            "eagle" => {
                shapes.extend(layer("layers.0", h));
                shapes.push(("fc.weight".into(), vec![h, 2 * h]));
            }
            "scylla" => {
                shapes.extend(layer("layers.0", h));
                shapes.extend(layer("layers.1", h));
                shapes.push(("layers.1.input_layernorm.weight".into(), vec![h]));
                if flag("input_norm_first") {
                    shapes.push(("layers.0.input_layernorm.weight".into(), vec![h]));
                }
                shapes.push(("fc.weight".into(), vec![h, 2 * h]));
                shapes.push(("norm.weight".into(), vec![h]));
            }
            _ => {
                let prefix = match family {
                    "eagle3" => "midlayer",
                    _ => "layers.0",
                };
                shapes.extend(layer(prefix, 2 * h));
                for name in ["hidden_norm", "input_layernorm"] {
                    shapes.push((format!("{prefix}.{name}.weight"), vec![h]));
                }
                shapes.push(("fc.weight".into(), vec![h, 3 * h]));
                shapes.push(("norm.weight".into(), vec![h]));
                shapes.push(("lm_head.weight".into(), vec![draft_vocab, h]));
                if flag("fc_norm") {
                    shapes.extend((0..3).map(|i| (format!("fc_norm.{i}.weight"), vec![h])));
                }
                if flag("norm_before_fc") {
                    shapes.push(("input_norm.weight".into(), vec![3 * h]));
                }
                draft.draft_vocabulary(vocab, draft_vocab, &mut rng);
            }
        }
        for (name, shape) in shapes {
            let scale = match name.contains("norm") {
                true => 0.1,
                false => 2.0 / (*shape.last().expect("a shape") as f32).sqrt(),
            };
            let base = if name.contains("norm") { 1.0 } else { 0.0 };
            let count = shape.iter().product();
            let values: Vec<f32> = (0..count)
                .map(|_| base + scale * rng.random_range(-1.0f32..1.0))
                .collect();
            draft.tensors.push(DraftTensor {
                name,
                dtype: Dtype::F32,
                bytes: to_bytes(&values, Dtype::F32),
                shape,
            });
        }
        draft
    }

    fn draft_vocabulary(&mut self, vocab: usize, count: usize, rng: &mut StdRng) {
        let mut ids: Vec<usize> = (0..vocab).collect();
        while ids.len() > count {
            ids.swap_remove(rng.random_range(0..ids.len()));
        }
        ids.sort_unstable();
        let offsets = ids.iter().enumerate().map(|(i, &id)| id as i64 - i as i64);
        let mask = (0..vocab).map(|id| u8::from(ids.binary_search(&id).is_ok()));
        self.tensors.push(DraftTensor {
            name: "d2t".into(),
            dtype: Dtype::I64,
            shape: vec![count],
            bytes: offsets.flat_map(i64::to_le_bytes).collect(),
        });
        self.tensors.push(DraftTensor {
            name: "t2d".into(),
            dtype: Dtype::BOOL,
            shape: vec![vocab],
            bytes: mask.collect(),
        });
    }

    /// A tensor by its key.
    pub fn tensor(&mut self, name: &str) -> &mut DraftTensor {
        let mut all = self.tensors.iter_mut();
        all.find(|t| t.name == name)
            .unwrap_or_else(|| panic!("no tensor {name}"))
    }

    /// Writes it into a directory.
    pub fn write(&self, dir: &Path) {
        std::fs::create_dir_all(dir).expect("directory");
        std::fs::write(dir.join("config.json"), self.config.to_string()).expect("config");
        let views = self.tensors.iter().map(|t| {
            let view = TensorView::new(t.dtype, t.shape.clone(), &t.bytes).expect("view");
            (t.name.as_str(), view)
        });
        let bytes = safetensors::serialize(views, None).expect("serialize");
        std::fs::write(dir.join("model.safetensors"), bytes).expect("weights");
    }
}
