//! Which keys a checkpoint of each layout has, with their shapes and types.

use std::path::Path;

use safetensors::Dtype;
use scylla_core::model::{LayerSpec, Shards};
use scylla_core::{Error, Result};
use serde_json::Value;

use super::{DraftConfig, Eagle3Config};

/// A network and the layout of its files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// EAGLE-1, EAGLE-2 and HASS.
    Eagle,
    /// EAGLE-3, raw.
    Eagle3,
    /// EAGLE-3 as the speculators library writes it.
    Speculators,
    /// Scylla: D layers and a final norm.
    Scylla,
}

impl std::fmt::Display for Layout {
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

impl Layout {
    /// The layouts that a draft of this name may be read from; `what` says in the error what the name was asked for.
    ///
    /// # Errors
    /// If no draft of this name has weights in one of these layouts.
    pub fn of_name(name: &str, what: &'static str) -> Result<&'static [Self]> {
        match name {
            "eagle2" | "hass" => Ok(&[Self::Eagle]),
            "eagle3" => Ok(&[Self::Eagle3, Self::Speculators]),
            "scylla" => Ok(&[Self::Scylla]),
            other => {
                let known = ["eagle2", "eagle3", "hass", "scylla"];
                Err(Error::unknown(what, other, known))
            }
        }
    }

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

/// Keys that trainers leave in their files and no engine uses: copies of the target's head and norm.
pub(super) fn passed_over_in(layout: Layout) -> &'static [&'static str] {
    match layout {
        Layout::Eagle => &["lm_head.weight"],
        Layout::Scylla => &[],
        Layout::Eagle3 | Layout::Speculators => &[
            "verifier_lm_head.weight",
            "verifier_norm.weight",
            "target_lm_head.weight",
        ],
    }
}

/// The keys of one decoder layer.
fn layer(spec: &LayerSpec, prefix: &str) -> impl Iterator<Item = Entry> {
    let tensors = spec.tensors(prefix).into_iter();
    tensors.map(|(name, shape)| float(name, &shape))
}

/// Where a network's file keeps a layer.
pub(crate) fn layer_prefix(layout: Layout, layer: usize) -> String {
    match (layout, layer) {
        (Layout::Eagle3, 0) => "midlayer".into(),
        _ => format!("layers.{layer}"),
    }
}

/// The layers of a network with the prefixes of their keys.
pub(crate) fn layers(config: &DraftConfig) -> Vec<(String, LayerSpec)> {
    let layout = config.layout();
    let all = config.backbone().layers.iter().enumerate();
    all.map(|(i, spec)| (layer_prefix(layout, i), spec.clone()))
        .collect()
}

/// The keys of a network. `has` says which there are, since of an EAGLE-3 network's two maps either may be missing.
pub fn entries(config: &DraftConfig, has: &dyn Fn(&str) -> bool) -> Vec<Entry> {
    let c = config.backbone();
    let h = c.hidden;
    let mut all: Vec<Entry> = layers(config)
        .iter()
        .flat_map(|(prefix, spec)| layer(spec, prefix))
        .collect();
    match config {
        DraftConfig::Eagle(_) => all.extend([
            float("fc.weight", &[h, 2 * h]),
            float("fc.bias", &[h]).optional(),
        ]),
        DraftConfig::Scylla(_) => {
            all.extend([float("fc.weight", &[h, 2 * h]), float("norm.weight", &[h])]);
        }
        DraftConfig::Eagle3(eagle3) => all.extend(self::eagle3(eagle3, config.layout(), has)),
    }
    all.push(float("embed_tokens.weight", &[c.vocab, h]).optional());
    all
}

/// The keys of an EAGLE-3 network beside its layers.
fn eagle3(c: &Eagle3Config, layout: Layout, has: &dyn Fn(&str) -> bool) -> Vec<Entry> {
    let (h, vocab, taps) = (c.backbone.hidden, c.backbone.vocab, c.tap_count);
    let prefix = layer_prefix(layout, 0);
    // The target's head does where the two vocabularies are one.
    let head = float("lm_head.weight", &[c.draft_vocab, h]);
    let own = c.draft_vocab != vocab || h != c.target_hidden;
    let mut all = vec![
        float("fc.weight", &[h, taps * c.target_hidden]),
        float(format!("{prefix}.hidden_norm.weight"), &[h]),
        float(format!("{prefix}.input_layernorm.weight"), &[h]),
        float("norm.weight", &[h]),
        if own { head } else { head.optional() },
    ];
    if c.fc_norm {
        let norm = |i| float(format!("fc_norm.{i}.weight"), &[c.target_hidden]);
        all.extend((0..taps).map(norm));
    }
    if c.norm_before_fc {
        all.push(float("input_norm.weight", &[taps * c.target_hidden]));
    }
    let map = |name: &str, count, kinds| Entry {
        name: name.into(),
        shape: vec![count],
        kinds,
        // Without a vocabulary of its own a draft needs no maps, and one follows from the other.
        optional: c.draft_vocab == vocab || ["d2t", "t2d"].iter().any(|m| *m != name && has(m)),
    };
    let offsets = &[Dtype::I64, Dtype::I32, Dtype::I16];
    let marks = &[Dtype::BOOL, Dtype::U8, Dtype::I32, Dtype::I64];
    all.extend([map("d2t", c.draft_vocab, offsets), map("t2d", vocab, marks)]);
    all
}
