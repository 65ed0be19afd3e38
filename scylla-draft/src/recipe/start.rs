//! Where training begins: a network's shape after its target's, random parameters, and the draft vocabulary.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use scylla_core::model::{AttentionInput, LayerSpec, ModelConfig};
use scylla_core::train::Named;
use scylla_core::train::graph::Compute;
use scylla_core::{Error, Result};
use serde::{Deserialize, Serialize};

use super::held::{shape_of, trained};
use crate::checkpoint::{Backbone, DraftConfig, Eagle3Config, EagleConfig, ScyllaConfig};

/// The shape of a draft's network; what is 0 is taken from its target's layers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DraftShape {
    /// D: decoder layers.
    pub layers: usize,
    /// Inner size of the feed-forward part.
    pub ffn: usize,
    /// A.
    pub heads: usize,
    /// K.
    pub kv_heads: usize,
    /// V_d of an EAGLE-3 draft; 0 takes the target's whole vocabulary, and its head.
    pub vocab: usize,
    /// Layers whose inputs an EAGLE-3 draft reads; empty: the inputs of layers 2, n/2 and n-3.
    pub taps: Vec<usize>,
}

impl Default for DraftShape {
    fn default() -> Self {
        Self {
            layers: 1,
            ffn: 0,
            heads: 0,
            kv_heads: 0,
            vocab: 0,
            taps: Vec::new(),
        }
    }
}

/// The network of a draft by its name (`eagle2`, `eagle3`, `hass` or `scylla`), for a target of this shape: a plain Llama layer with
/// the target's sizes and rotary positions.
///
/// # Errors
/// If the name is unknown, or a size does not fit.
pub fn new_config(name: &str, shape: &DraftShape, target: &ModelConfig) -> Result<DraftConfig> {
    let Some(like) = target.layers.first() else {
        return Err(Error::Invalid("a target of no layers".into()));
    };
    let or = |own: usize, theirs: usize| if own == 0 { theirs } else { own };
    let layer = LayerSpec {
        hidden: target.hidden,
        ffn: or(shape.ffn, like.ffn),
        heads: or(shape.heads, like.heads),
        kv_heads: or(shape.kv_heads, like.kv_heads),
        head_dim: like.head_dim,
        eps: target.norm_eps,
        biases: Default::default(),
        qk_norm: false,
        window: None,
        rope: like.rope.clone(),
        input: AttentionInput::Normed,
    };
    if !(1..=64).contains(&shape.layers) {
        return Err(Error::Invalid(format!(
            "draft.layers {}: expected 1 to 64",
            shape.layers
        )));
    }
    if let Some(flaw) = layer.flaw() {
        return Err(Error::Invalid(format!("[draft]: {flaw}")));
    }
    let backbone = |first: AttentionInput| {
        let mut layers = vec![layer.clone(); shape.layers];
        layers[0].input = first;
        Backbone {
            vocab: target.vocab,
            hidden: target.hidden,
            context: target.context,
            eps: target.norm_eps,
            layers,
        }
    };
    if name != "eagle3" && (shape.vocab > 0 || !shape.taps.is_empty()) {
        return Err(Error::Invalid(format!(
            "[draft]: `{name}` has no vocabulary and no taps of its own (draft.vocab, draft.taps)"
        )));
    }
    match name {
        "eagle2" | "hass" if shape.layers != 1 => Err(Error::Invalid(format!(
            "draft.layers {}: an EAGLE-1/2 network has one; several make it `scylla`",
            shape.layers
        ))),
        "eagle2" | "hass" => Ok(DraftConfig::Eagle(EagleConfig {
            backbone: backbone(AttentionInput::Bare),
        })),
        "scylla" => Ok(DraftConfig::Scylla(ScyllaConfig {
            backbone: backbone(AttentionInput::Bare),
            input_norm_first: false,
            recur_before_norm: false,
        })),
        "eagle3" => {
            if shape.vocab > target.vocab {
                return Err(Error::Invalid(format!(
                    "draft.vocab {}: expected at most the target's {}",
                    shape.vocab, target.vocab
                )));
            }
            let taps = Some(shape.taps.clone()).filter(|t| !t.is_empty());
            let config = Eagle3Config {
                backbone: backbone(AttentionInput::Beside(2 * target.hidden)),
                speculators: false,
                draft_vocab: or(shape.vocab, target.vocab),
                target_hidden: target.hidden,
                tap_count: taps.as_ref().map_or(3, Vec::len),
                taps,
                norm_before_residual: false,
                norm_before_fc: false,
                fc_norm: false,
                norm_output: false,
            };
            config.taps(None, &target.shape())?;
            Ok(DraftConfig::Eagle3(config))
        }
        other => Err(Error::unknown(
            "draft to train",
            other,
            ["eagle2", "eagle3", "hass", "scylla"],
        )),
    }
}

/// Spread of the random weights, as Llama begins.
const SPREAD: f32 = 0.02;

/// Random parameters by seed: norms are ones, weights normal with a deviation of 0.02. `head` gives the rows that an EAGLE-3
/// draft's own head begins with: the target's, of its vocabulary.
///
/// # Errors
/// If `head` fails.
pub fn start(
    config: &DraftConfig,
    seed: u64,
    on: &Compute,
    head: impl FnOnce() -> Result<Vec<f32>>,
) -> Result<Named> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut head = Some(head);
    let own_head = matches!(config, DraftConfig::Eagle3(c) if c.draft_vocab != c.backbone.vocab);
    let mut named = Named::new();
    for entry in trained(config, &|name| name == "d2t") {
        if entry.optional {
            continue;
        }
        let (rows, columns) = shape_of(&entry);
        let values = match (rows, &*entry.name, own_head, head.take()) {
            (_, "lm_head.weight", true, Some(head)) => head()?,
            (1, .., kept) => {
                head = kept;
                vec![1.0; columns]
            }
            (.., kept) => {
                head = kept;
                (0..rows * columns)
                    .map(|_| SPREAD * normal(&mut random))
                    .collect()
            }
        };
        if values.len() != rows * columns {
            return Err(Error::Invalid(format!(
                "{} values for `{}`",
                values.len(),
                entry.name
            )));
        }
        named.insert(entry.name, on.matrix(values, columns)?);
    }
    Ok(named)
}

/// A normal number (Box and Muller), the same on every machine but for the last digits of its logarithm and cosine.
fn normal(random: &mut StdRng) -> f32 {
    let (u, v) = (1.0 - random.random::<f64>(), random.random::<f64>());
    ((-2.0 * u.ln()).sqrt() * (2.0 * std::f64::consts::PI * v).cos()) as f32
}

/// The `size` most frequent tokens, in rising order: EAGLE-3's draft vocabulary. Of equally frequent ones the lower id goes
/// first.
///
/// # Errors
/// If `size` is 0, or more than there are.
pub fn frequent(counts: &[u64], size: usize) -> Result<Vec<u32>> {
    if size == 0 || size > counts.len() {
        return Err(Error::Invalid(format!(
            "a draft vocabulary of {size} of {} tokens",
            counts.len()
        )));
    }
    let mut all: Vec<u32> = (0..counts.len() as u32).collect();
    all.sort_by_key(|&id| (std::cmp::Reverse(counts[id as usize]), id));
    all.truncate(size);
    all.sort_unstable();
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_frequent_tokens_in_rising_order() {
        assert_eq!(
            frequent(&[5, 9, 0, 9, 5, 7], 4).expect("four"),
            [0, 1, 3, 5]
        );
        assert!(frequent(&[1, 2], 3).is_err() && frequent(&[1, 2], 0).is_err());
    }
}
