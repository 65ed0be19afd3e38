//! The shape of a model in a GGUF file, from its metadata.

use serde_json::Value as Json;

use super::{Described, Family, known, named, rope};
use crate::model::config::{ModelConfig, check_layers, layer_prefix};
use crate::model::files::{Gguf, Value, missing};
use crate::model::spec::{AttentionInput, Biases, LayerSpec};
use crate::{Error, Result};

/// Keys behind the architecture that are read below, or with the rope.
const READ: &[&str] = &[
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.causal",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scale_linear",
    "vocab_size",
];

/// The model's shape; with it what the metadata say that was passed over.
pub(super) fn config<'f>(
    gguf: &Gguf,
    families: &[&'f dyn Family],
) -> Result<(Described, &'f dyn Family)> {
    let path = &gguf.path;
    let refuse =
        |message: String| Err(Error::Unsupported(format!("{}: {message}", path.display())));
    let need = |key: &str| -> Result<usize> { gguf.size(key)?.ok_or_else(|| gguf.absent(key)) };
    if let Some(kind) = gguf.text("general.type")?
        && kind != "model"
    {
        return refuse(format!("general.type is `{kind}`; expected `model`"));
    }
    let Some(arch) = gguf.text("general.architecture")? else {
        return Err(gguf.absent("general.architecture"));
    };
    let families: Vec<&dyn Family> = families.iter().copied().filter(|f| f.has_gguf()).collect();
    let family = named(arch, "GGUF architecture", &families, path)?;
    let notes = unread(gguf, arch)?;
    let key = |name: &str| format!("{arch}.{name}");
    if gguf.flag(&key("attention.causal"))? == Some(false) {
        return refuse(format!(
            "`{}` is false; expected a causal model",
            key("attention.causal")
        ));
    }
    let context = need(&key("context_length"))?;
    let hidden = need(&key("embedding_length"))?;
    let embedding = family.gguf_name("model.embed_tokens.weight");
    let Some(vocab) = gguf.shape(&embedding).and_then(<[usize]>::first).copied() else {
        return Err(missing(path.clone(), &embedding, &[hidden]));
    };
    if let Some(said) = gguf.size(&key("vocab_size"))?
        && said != vocab
    {
        return Err(Error::file(
            path,
            format!(
                "metadata `{}` is {said}; {embedding} has {vocab} rows",
                key("vocab_size")
            ),
        ));
    }
    let layer = layer(gguf, arch, family, hidden, context)?;
    let count = need(&key("block_count"))?;
    check_layers(count, path)?;
    let mut config = ModelConfig {
        architecture: arch.to_string(),
        vocab,
        hidden,
        context,
        tied: !gguf.contains(&family.gguf_name("lm_head.weight")),
        norm_eps: layer.eps,
        layers: vec![layer; count],
    };
    family.layers_of_gguf(gguf, &mut config.layers)?;
    config.check(path)?;
    Ok(((config, notes), family))
}

/// A layer; all are alike, as far as the metadata say.
fn layer(
    gguf: &Gguf,
    arch: &str,
    family: &dyn Family,
    hidden: usize,
    context: usize,
) -> Result<LayerSpec> {
    let path = &gguf.path;
    let refuse =
        |message: String| Err(Error::Unsupported(format!("{}: {message}", path.display())));
    let need = |key: &str| -> Result<usize> { gguf.size(key)?.ok_or_else(|| gguf.absent(key)) };
    let key = |name: &str| format!("{arch}.{name}");
    let heads = need(&key("attention.head_count"))?;
    let usual = hidden.checked_div(heads).unwrap_or(0);
    let head_dim = gguf.size(&key("attention.key_length"))?.unwrap_or(usual);
    let values = gguf
        .size(&key("attention.value_length"))?
        .unwrap_or(head_dim);
    if values != head_dim {
        return refuse(format!(
            "values of {values} beside keys of {head_dim} (`{}`); supported: the same size",
            key("attention.value_length")
        ));
    }
    let factors = match gguf.contains("rope_freqs.weight") {
        true => Some(gguf.find("rope_freqs.weight", &[head_dim / 2])?.vector()?),
        false => None,
    };
    let epsilon = key("attention.layer_norm_rms_epsilon");
    let eps = gguf
        .number(&epsilon)?
        .ok_or_else(|| gguf.absent(&epsilon))? as f32;
    // What a layer has is what the first has.
    let first =
        |name: &str| gguf.contains(&family.gguf_name(&format!("{}.{name}", layer_prefix(0))));
    Ok(LayerSpec {
        hidden,
        ffn: need(&key("feed_forward_length"))?,
        heads,
        kv_heads: gguf.size(&key("attention.head_count_kv"))?.unwrap_or(heads),
        head_dim,
        eps,
        biases: Biases {
            q: first("self_attn.q_proj.bias"),
            k: first("self_attn.k_proj.bias"),
            v: first("self_attn.v_proj.bias"),
            o: first("self_attn.o_proj.bias"),
            mlp: first("mlp.gate_proj.bias"),
        },
        qk_norm: false,
        window: gguf
            .size(&key("attention.sliding_window"))?
            .filter(|&window| window > 0 && window < context),
        rope: rope::of_gguf(gguf, arch, head_dim, context, factors)?,
        input: AttentionInput::Normed,
    })
}

/// Refuses keys that are not known and may change the model; returns a word on the others.
fn unread(gguf: &Gguf, arch: &str) -> Result<Vec<String>> {
    let mut keys: Vec<&str> = gguf.keys().collect();
    keys.sort_unstable();
    let mut passed_over = Vec::new();
    for key in keys {
        let described = known::GGUF_PREFIXES.iter().any(|p| key.starts_with(p));
        let own = key.strip_prefix(arch).and_then(|k| k.strip_prefix('.'));
        let value = match gguf.value(key) {
            Some(Value::Integer(v)) => Json::from(*v as f64),
            Some(Value::Float(v)) => Json::from(*v),
            Some(Value::Flag(v)) => Json::from(*v),
            Some(Value::Text(v)) => Json::from(v.as_str()),
            _ => Json::from(vec![1]),
        };
        match own {
            Some(own) if READ.contains(&own) || known::GGUF_KEYS.iter().any(|k| k.0 == own) => {}
            // Behind the architecture stand the model's own settings, and nothing else.
            Some(_) if known::neutral(key, &value) => {}
            None if described => {}
            None if known::harmless(key, &value) => passed_over.push(format!("`{key}`")),
            _ => {
                let value = gguf.value(key).map(ToString::to_string).unwrap_or_default();
                return Err(Error::Unsupported(format!(
                    "{}: metadata `{key}` is {value}, which may change the model and is not known here",
                    gguf.path.display()
                )));
            }
        }
    }
    Ok(match passed_over.is_empty() {
        true => Vec::new(),
        false => vec![format!(
            "{}: not known here and passed over: {}",
            gguf.path.display(),
            passed_over.join(", ")
        )],
    })
}
