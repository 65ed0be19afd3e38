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

type Shapes = Vec<(String, Vec<usize>)>;

/// Keys and shapes of one decoder layer whose attention takes `input` values.
fn layer(t: &Tiny, prefix: &str, input: usize) -> Shapes {
    let (h, q, kv) = (t.hidden, t.heads * t.head_dim, t.kv_heads * t.head_dim);
    let shapes = [
        ("self_attn.q_proj", vec![q, input]),
        ("self_attn.k_proj", vec![kv, input]),
        ("self_attn.v_proj", vec![kv, input]),
        ("self_attn.o_proj", vec![h, q]),
        ("mlp.gate_proj", vec![t.ffn, h]),
        ("mlp.up_proj", vec![t.ffn, h]),
        ("mlp.down_proj", vec![h, t.ffn]),
        ("post_attention_layernorm", vec![h]),
    ];
    let name = |(n, s): (&str, Vec<usize>)| (format!("{prefix}.{n}.weight"), s);
    shapes.map(name).to_vec()
}

/// Keys and shapes of a family, the draft vocabulary's maps aside.
fn shapes(t: &Tiny, family: &str, more: &Value, draft_vocab: usize) -> Shapes {
    let h = t.hidden;
    let flag = |key: &str| more.get(key).and_then(Value::as_bool).unwrap_or(false);
    let wide = matches!(family, "eagle3" | "speculators");
    let mut all: Shapes = vec![(
        "fc.weight".into(),
        vec![h, if wide { 3 * h } else { 2 * h }],
    )];
    match family {
        "eagle" => all.extend(layer(t, "layers.0", h)),
        "scylla" => {
            all.extend(layer(t, "layers.0", h));
            all.extend(layer(t, "layers.1", h));
            all.push(("layers.1.input_layernorm.weight".into(), vec![h]));
            if flag("input_norm_first") {
                all.push(("layers.0.input_layernorm.weight".into(), vec![h]));
            }
            all.push(("norm.weight".into(), vec![h]));
        }
        _ => {
            let prefix = match family {
                "eagle3" => "midlayer",
                _ => "layers.0",
            };
            all.extend(layer(t, prefix, 2 * h));
            for name in ["hidden_norm", "input_layernorm"] {
                all.push((format!("{prefix}.{name}.weight"), vec![h]));
            }
            all.push(("norm.weight".into(), vec![h]));
            all.push(("lm_head.weight".into(), vec![draft_vocab, h]));
            if flag("fc_norm") {
                all.extend((0..3).map(|i| (format!("fc_norm.{i}.weight"), vec![h])));
            }
            if flag("norm_before_fc") {
                all.push(("input_norm.weight".into(), vec![3 * h]));
            }
        }
    }
    all
}

/// `config.json` of a family, `more` merged in.
fn config(t: &Tiny, family: &str, more: &Value, draft_vocab: usize) -> Value {
    let mut all = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": t.vocab,
        "hidden_size": t.hidden,
        "intermediate_size": t.ffn,
        "num_hidden_layers": if family == "scylla" { 2 } else { 1 },
        "num_attention_heads": t.heads,
        "num_key_value_heads": t.kv_heads,
        "head_dim": t.head_dim,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 256,
        "tie_word_embeddings": false,
    });
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
    for (key, value) in more.as_object().into_iter().flatten() {
        all[key] = value.clone();
    }
    all
}

impl TinyDraft {
    /// A checkpoint of `family` (`eagle`, `eagle3`, `speculators` or `scylla`, the last of two layers) for a target, in
    /// f32. `more` is merged into its `config.json` and may ask for EAGLE-3's options.
    pub fn new(target: &Tiny, family: &str, more: Value, seed: u64) -> Self {
        let draft_vocab = match more.get("draft_vocab_size").and_then(Value::as_u64) {
            Some(size) => size as usize,
            None => target.vocab - target.vocab / 3,
        };
        let mut draft = Self {
            config: config(target, family, &more, draft_vocab),
            tensors: Vec::new(),
        };
        let mut rng = StdRng::seed_from_u64(seed);
        if matches!(family, "eagle3" | "speculators") {
            draft.draft_vocabulary(target.vocab, draft_vocab, &mut rng);
        }
        for (name, shape) in shapes(target, family, &more, draft_vocab) {
            let (base, scale) = match name.contains("norm") {
                true => (1.0, 0.1),
                false => (0.0, 2.0 / (*shape.last().expect("a shape") as f32).sqrt()),
            };
            let value = |_| base + scale * rng.random_range(-1.0f32..1.0);
            let values: Vec<f32> = (0..shape.iter().product()).map(value).collect();
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
