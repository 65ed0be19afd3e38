//! Which keys a checkpoint of each family has, with their shapes and types.

use safetensors::Dtype;
use scylla_core::model::Shards;
use scylla_core::plugin::TargetShape;
use serde_json::Value;

use super::Checkpoint;

/// A network and the layout of its files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// EAGLE-1, EAGLE-2 and HASS.
    Eagle,
    /// EAGLE-3, raw.
    Eagle3,
    /// EAGLE-3 as the speculators library writes it.
    Speculators,
    /// Scylla: D layers and a final norm.
    Scylla,
}

impl std::fmt::Display for Family {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Eagle => "an EAGLE-1/2 or HASS network",
            Self::Eagle3 => "an EAGLE-3 network",
            Self::Speculators => "an EAGLE-3 network in speculators format",
            Self::Scylla => "a Scylla network",
        })
    }
}

/// `architectures` of a Scylla checkpoint.
pub(super) const SCYLLA: &str = "ScyllaForCausalLM";

impl Family {
    /// What a configuration and its keys say.
    pub(super) fn of(json: &Value, shards: &Shards) -> Self {
        let architecture = json.pointer("/architectures/0").and_then(Value::as_str);
        let eagle3 = architecture.is_some_and(|a| a.to_lowercase().contains("eagle3"));
        if json.get("speculators_model_type").is_some() {
            Self::Speculators
        } else if architecture == Some(SCYLLA) {
            Self::Scylla
        } else if eagle3 || shards.contains("midlayer.hidden_norm.weight") {
            Self::Eagle3
        } else {
            Self::Eagle
        }
    }
}

/// One key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Types it may have.
    pub kinds: &'static [Dtype],
    /// Whether it may be absent.
    pub optional: bool,
}

const FLOAT: &[Dtype] = &[Dtype::F32, Dtype::BF16, Dtype::F16];

fn float(name: impl Into<String>, shape: &[usize]) -> Entry {
    Entry {
        name: name.into(),
        shape: shape.to_vec(),
        kinds: FLOAT,
        optional: false,
    }
}

impl Entry {
    fn optional(self) -> Self {
        Self {
            optional: true,
            ..self
        }
    }
}

/// Where an EAGLE-3 checkpoint keeps its one layer.
pub(crate) fn eagle3_prefix(family: Family) -> &'static str {
    match family {
        Family::Speculators => "layers.0",
        _ => "midlayer",
    }
}

/// The keys of a checkpoint's family and shape.
pub fn entries(checkpoint: &Checkpoint, target: &TargetShape) -> Vec<Entry> {
    let c = &checkpoint.config;
    let (h, vocab) = (c.hidden, c.vocab);
    let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
    let layer = |prefix: &str, input: usize| {
        let at = |name: &str, shape: &[usize]| float(format!("{prefix}.{name}"), shape);
        let mut all = vec![
            at("self_attn.q_proj.weight", &[q, input]),
            at("self_attn.k_proj.weight", &[kv, input]),
            at("self_attn.v_proj.weight", &[kv, input]),
            at("self_attn.o_proj.weight", &[h, q]),
            at("mlp.gate_proj.weight", &[c.ffn, h]),
            at("mlp.up_proj.weight", &[c.ffn, h]),
            at("mlp.down_proj.weight", &[h, c.ffn]),
            at("post_attention_layernorm.weight", &[h]),
        ];
        if c.qkv_bias {
            for (name, n) in [("q", q), ("k", kv), ("v", kv)] {
                all.push(at(&format!("self_attn.{name}_proj.bias"), &[n]));
            }
        }
        all
    };
    let embed = float("embed_tokens.weight", &[vocab, h]).optional();
    match checkpoint.family {
        Family::Eagle => {
            let mut all = layer("layers.0", h);
            all.push(float("fc.weight", &[h, 2 * h]));
            all.push(float("fc.bias", &[h]).optional());
            all.push(embed);
            all
        }
        Family::Scylla => {
            let mut all = vec![
                float("fc.weight", &[h, 2 * h]),
                float("norm.weight", &[h]),
                embed,
            ];
            for i in 0..c.layers {
                let prefix = format!("layers.{i}");
                all.extend(layer(&prefix, h));
                if i > 0 || checkpoint.flag("input_norm_first") {
                    all.push(float(format!("{prefix}.input_layernorm.weight"), &[h]));
                }
            }
            all
        }
        Family::Eagle3 | Family::Speculators => {
            let prefix = eagle3_prefix(checkpoint.family);
            let mut all = layer(prefix, 2 * h);
            let taps = checkpoint.tap_count();
            all.push(float("fc.weight", &[h, taps * target.hidden]));
            if checkpoint.flag("fc_norm") {
                let norm = |i| float(format!("fc_norm.{i}.weight"), &[target.hidden]);
                all.extend((0..taps).map(norm));
            }
            if checkpoint.norm_before_fc() {
                all.push(float("input_norm.weight", &[taps * target.hidden]));
            }
            all.push(float(format!("{prefix}.hidden_norm.weight"), &[h]));
            all.push(float(format!("{prefix}.input_layernorm.weight"), &[h]));
            all.push(float("norm.weight", &[h]));
            let draft_vocab = checkpoint.draft_vocab();
            all.push(float("lm_head.weight", &[draft_vocab, h]));
            // Without a vocabulary of its own a draft needs no maps.
            let optional = draft_vocab == vocab;
            all.push(Entry {
                name: "d2t".into(),
                shape: vec![draft_vocab],
                kinds: &[Dtype::I64],
                optional,
            });
            all.push(Entry {
                name: "t2d".into(),
                shape: vec![vocab],
                kinds: &[Dtype::BOOL],
                optional,
            });
            all.push(embed);
            all
        }
    }
}
