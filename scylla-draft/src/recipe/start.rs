//! Where training begins: a network's shape after its target's, random parameters, and the draft vocabulary.

use rand::SeedableRng;
use rand::rngs::StdRng;
use scylla_core::model::{AttentionInput, LayerSpec, ModelConfig, Weights};
use scylla_core::train::graph::Compute;
use scylla_core::train::{Named, normal};
use scylla_core::{Error, Result};
use serde::{Deserialize, Serialize};

use super::held::{shape_of, trained};
use crate::checkpoint::{Backbone, DraftConfig, Eagle3Config, EagleConfig, ScyllaConfig, layers};

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
    /// Rows of the target's head that an EAGLE-1/2, HASS or Scylla draft keeps: those of the tokens most frequent in training;
    /// 0 keeps all.
    pub head: usize,
    /// Layers of the target that the draft's layers begin as, one each, in place of random weights; empty: none.
    pub from_layers: Vec<usize>,
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
            head: 0,
            from_layers: Vec::new(),
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
    check_from_layers(shape, &layer, target)?;
    if name == "eagle3" && shape.head > 0 {
        return Err(Error::Invalid(
            "[draft]: `eagle3` has a vocabulary of its own (draft.vocab), which a truncated head (draft.head) would be too".into(),
        ));
    }
    if shape.head > target.vocab {
        return Err(Error::Invalid(format!(
            "draft.head {}: expected at most the target's {}",
            shape.head, target.vocab
        )));
    }
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

/// Checks that the target has the layers that a draft's begin as, and that these are of its kind.
fn check_from_layers(shape: &DraftShape, layer: &LayerSpec, target: &ModelConfig) -> Result<()> {
    if shape.from_layers.is_empty() {
        return Ok(());
    }
    if shape.from_layers.len() != shape.layers {
        return Err(Error::Invalid(format!(
            "draft.from_layers {:?}: expected one for each of draft.layers {}",
            shape.from_layers, shape.layers
        )));
    }
    for &i in &shape.from_layers {
        let Some(like) = target.layers.get(i) else {
            return Err(Error::Invalid(format!(
                "draft.from_layers names layer {i}; the target has layers 0 to {}",
                target.layers.len() - 1
            )));
        };
        let sizes = |l: &LayerSpec| (l.ffn, l.heads, l.kv_heads, l.head_dim);
        if sizes(like) != sizes(layer) {
            return Err(Error::Invalid(format!(
                "draft.from_layers: layer {i} has ffn, heads, kv heads and head size {:?}; the draft's have {:?}",
                sizes(like),
                sizes(layer)
            )));
        }
        if like.qk_norm || like.biases != layer.biases {
            return Err(Error::Invalid(format!(
                "draft.from_layers: layer {i} has biases or norms of queries and keys, which a draft's layers have not"
            )));
        }
    }
    Ok(())
}

/// Lets a draft's layers begin as layers of its target, and its final norm as the target's. A first layer without input norm
/// gets the norm's weights folded into its products; one over embedding and feature side by side gets the target's products for
/// the feature and keeps its random ones for the embedding. `fc` begins as the identity of the (last) feature beside its random
/// weights, so that what enters the layers is what they know.
///
/// # Errors
/// If a tensor of the target cannot be read.
pub fn begin_as_target(
    named: &mut Named,
    config: &DraftConfig,
    from: &[usize],
    target: &dyn Weights,
    on: &Compute,
) -> Result<()> {
    let h = config.backbone().hidden;
    for ((prefix, spec), &from) in layers(config).iter().zip(from) {
        let theirs = format!("model.layers.{from}");
        let input_norm = target.vector(&format!("{theirs}.input_layernorm.weight"), h)?;
        for (name, shape) in spec.tensors("") {
            let name = name.trim_start_matches('.').to_string();
            let read = |shape: &[usize]| -> Result<Vec<f32>> {
                let found = target.find(&format!("{theirs}.{name}"), shape)?;
                Ok(found.weight()?.to_f32())
            };
            let takes_input = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
                .iter()
                .any(|n| name.starts_with(n));
            let values = match (shape[..].first(), shape.get(1), spec.input) {
                (Some(&n), Some(_), AttentionInput::Beside(_)) if takes_input => {
                    let own = named.get(&format!("{prefix}.{name}"));
                    let own =
                        own.ok_or_else(|| Error::Invalid(format!("no parameter `{name}`")))?;
                    let (own, theirs) = (own.all()?, read(&[n, h])?);
                    let rows = own.chunks(2 * h).zip(theirs.chunks(h));
                    rows.flat_map(|(own, theirs)| [&own[..h], theirs].concat())
                        .collect()
                }
                (Some(&n), Some(_), AttentionInput::Bare) if takes_input => {
                    let mut values = read(&[n, h])?;
                    for row in values.chunks_mut(h) {
                        row.iter_mut().zip(&input_norm).for_each(|(v, g)| *v *= g);
                    }
                    values
                }
                _ => read(&shape)?,
            };
            let columns = shape.last().copied().unwrap_or(values.len());
            named.insert(format!("{prefix}.{name}"), on.matrix(values, columns)?);
        }
        if let AttentionInput::Beside(_) = spec.input {
            named.insert(
                format!("{prefix}.hidden_norm.weight"),
                on.matrix(input_norm, h)?,
            );
        }
    }
    if named.contains_key("norm.weight") {
        let norm = target.vector("model.norm.weight", h)?;
        named.insert("norm.weight".into(), on.matrix(norm, h)?);
    }
    if let Some(fc) = named.get("fc.weight") {
        let columns = fc.columns;
        let mut values = fc.all()?.into_owned();
        for (i, row) in values.chunks_mut(columns).enumerate() {
            row[columns - h..].fill(0.0);
            row[columns - h + i] = 1.0;
        }
        named.insert("fc.weight".into(), on.matrix(values, columns)?);
    }
    Ok(())
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
