//! Which keys a checkpoint of each family has, with their shapes and types.

use std::path::Path;

use safetensors::Dtype;
use scylla_core::model::{ModelConfig, Shards};
use scylla_core::plugin::TargetShape;
use scylla_core::{Error, Result};
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
    pub(super) fn of(json: &Value, shards: &Shards, path: &Path) -> Result<Self> {
        let architecture = json.pointer("/architectures/0").and_then(Value::as_str);
        let eagle3 = architecture.is_some_and(|a| a.to_lowercase().contains("eagle3"));
        if let Some(kind) = json.get("speculators_model_type") {
            return match kind.as_str() {
                Some("eagle3") => Ok(Self::Speculators),
                _ => Err(Error::Unsupported(format!(
                    "{}: speculators_model_type {kind}; supported: \"eagle3\"",
                    path.display()
                ))),
            };
        }
        Ok(if architecture == Some(SCYLLA) {
            Self::Scylla
        } else if eagle3
            || FIRST
                .iter()
                .any(|p| shards.contains(&format!("{p}.hidden_norm.weight")))
        {
            Self::Eagle3
        } else {
            Self::Eagle
        })
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

/// Both names of an EAGLE-3 checkpoint's first layer.
const FIRST: [&str; 2] = ["midlayer", "layers.0"];

/// Where an EAGLE-3 checkpoint keeps a layer.
pub(crate) fn eagle3_prefix(family: Family, layer: usize) -> String {
    match (family, layer) {
        (Family::Speculators, _) | (_, 1..) => format!("layers.{layer}"),
        _ => "midlayer".into(),
    }
}

/// Keys that trainers leave in their files and no engine uses: copies of the target's head and norm.
pub(super) fn passed_over_in(family: Family) -> &'static [&'static str] {
    match family {
        Family::Eagle => &["lm_head.weight"],
        Family::Scylla => &[],
        Family::Eagle3 | Family::Speculators => &[
            "verifier_lm_head.weight",
            "verifier_norm.weight",
            "target_lm_head.weight",
        ],
    }
}

/// The keys of one decoder layer whose attention takes `input` values, input norm aside.
fn layer(c: &ModelConfig, prefix: &str, input: usize) -> Vec<Entry> {
    let h = c.hidden;
    let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
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
}

/// The keys of a checkpoint's family and shape.
pub fn entries(checkpoint: &Checkpoint, target: &TargetShape) -> Vec<Entry> {
    let c = &checkpoint.config;
    let h = c.hidden;
    let mut all = match checkpoint.family {
        Family::Eagle => {
            let mut all = layer(c, "layers.0", h);
            all.push(float("fc.weight", &[h, 2 * h]));
            all.push(float("fc.bias", &[h]).optional());
            all
        }
        Family::Scylla => {
            let mut all = vec![float("fc.weight", &[h, 2 * h]), float("norm.weight", &[h])];
            for i in 0..c.layers {
                let prefix = format!("layers.{i}");
                all.extend(layer(c, &prefix, h));
                if i > 0 || checkpoint.flag("input_norm_first") {
                    all.push(float(format!("{prefix}.input_layernorm.weight"), &[h]));
                }
            }
            all
        }
        Family::Eagle3 | Family::Speculators => eagle3(checkpoint, target),
    };
    all.push(float("embed_tokens.weight", &[c.vocab, h]).optional());
    all
}

/// The keys of an EAGLE-3 checkpoint.
fn eagle3(checkpoint: &Checkpoint, target: &TargetShape) -> Vec<Entry> {
    let c = &checkpoint.config;
    let h = c.hidden;
    let prefix = eagle3_prefix(checkpoint.family, 0);
    let taps = checkpoint.tap_count();
    let draft_vocab = checkpoint.draft_vocab();
    let mut all = layer(c, &prefix, 2 * h);
    for i in 1..c.layers {
        let prefix = eagle3_prefix(checkpoint.family, i);
        all.extend(layer(c, &prefix, h));
        all.push(float(format!("{prefix}.input_layernorm.weight"), &[h]));
    }
    // The target's head does where the two vocabularies are one.
    let head = float("lm_head.weight", &[draft_vocab, h]);
    let own = draft_vocab != c.vocab || h != target.hidden;
    all.extend([
        float("fc.weight", &[h, taps * target.hidden]),
        float(format!("{prefix}.hidden_norm.weight"), &[h]),
        float(format!("{prefix}.input_layernorm.weight"), &[h]),
        float("norm.weight", &[h]),
        if own { head } else { head.optional() },
    ]);
    if checkpoint.flag("fc_norm") {
        let norm = |i| float(format!("fc_norm.{i}.weight"), &[target.hidden]);
        all.extend((0..taps).map(norm));
    }
    if checkpoint.norm_before_fc() {
        all.push(float("input_norm.weight", &[taps * target.hidden]));
    }
    let map = |name: &str, count, kinds| Entry {
        name: name.into(),
        shape: vec![count],
        kinds,
        // Without a vocabulary of its own a draft needs no maps, and one follows from the other.
        optional: draft_vocab == c.vocab
            || ["d2t", "t2d"]
                .iter()
                .any(|m| *m != name && checkpoint.has(m)),
    };
    all.push(map(
        "d2t",
        draft_vocab,
        &[Dtype::I64, Dtype::I32, Dtype::I16],
    ));
    all.push(map(
        "t2d",
        c.vocab,
        &[Dtype::BOOL, Dtype::U8, Dtype::I32, Dtype::I64],
    ));
    all
}
