//! The shape of a model in a GGUF file, from its metadata.

use serde_json::Value as Json;

use super::config::ModelConfig;
use super::gguf::{Gguf, Value};
use super::source::missing;
use super::{known, rope};
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
    "rope.scale_linear",
    "vocab_size",
];

impl Gguf {
    fn need(&self, key: &str) -> Result<usize> {
        self.size(key)?.ok_or_else(|| self.absent(key))
    }

    /// The model's shape; with it what the metadata say that was passed over.
    ///
    /// # Errors
    /// Names the key that is missing, wrong, or changes the model in a way that is not supported.
    pub fn config(&self) -> Result<(ModelConfig, Vec<String>)> {
        let refuse = |message: String| {
            Err(Error::Unsupported(format!(
                "{}: {message}",
                self.path.display()
            )))
        };
        if let Some(kind) = self.text("general.type")?
            && kind != "model"
        {
            return refuse(format!("general.type is `{kind}`; expected `model`"));
        }
        let Some(arch) = self.text("general.architecture")? else {
            return Err(self.absent("general.architecture"));
        };
        let arch = arch.to_string();
        if !["llama", "qwen2"].contains(&arch.as_str()) {
            return refuse(format!(
                "GGUF architecture `{arch}`; supported: llama, qwen2"
            ));
        }
        let notes = self.unread(&arch)?;
        let key = |name: &str| format!("{arch}.{name}");
        if self.flag(&key("attention.causal"))? == Some(false) {
            return refuse(format!(
                "`{}` is false; expected a causal model",
                key("attention.causal")
            ));
        }
        let context = self.need(&key("context_length"))?;
        let (hidden, heads) = (
            self.need(&key("embedding_length"))?,
            self.need(&key("attention.head_count"))?,
        );
        let embedding = "token_embd.weight";
        let Some(vocab) = self.shape(embedding).and_then(<[usize]>::first).copied() else {
            return Err(missing(self.path.clone(), embedding, &[hidden]));
        };
        if let Some(said) = self.size(&key("vocab_size"))?
            && said != vocab
        {
            return Err(Error::file(
                &self.path,
                format!(
                    "metadata `{}` is {said}; {embedding} has {vocab} rows",
                    key("vocab_size")
                ),
            ));
        }
        let usual = hidden.checked_div(heads).unwrap_or(0);
        let head_dim = self.size(&key("attention.key_length"))?.unwrap_or(usual);
        let values = self
            .size(&key("attention.value_length"))?
            .unwrap_or(head_dim);
        if values != head_dim {
            return refuse(format!(
                "values of {values} beside keys of {head_dim} (`{}`); supported: the same size",
                key("attention.value_length")
            ));
        }
        let factors = match self.contains("rope_freqs.weight") {
            true => Some(self.place("rope_freqs.weight", &[head_dim / 2])?.vector()?),
            false => None,
        };
        let rope = rope::of_gguf(self, &arch, head_dim, factors)?;
        let epsilon = key("attention.layer_norm_rms_epsilon");
        let config = ModelConfig {
            vocab,
            hidden,
            ffn: self.need(&key("feed_forward_length"))?,
            layers: self.need(&key("block_count"))?,
            heads,
            kv_heads: self.size(&key("attention.head_count_kv"))?.unwrap_or(heads),
            head_dim,
            norm_eps: self
                .number(&epsilon)?
                .ok_or_else(|| self.absent(&epsilon))? as f32,
            rope_theta: rope.theta,
            rope_scaling: rope.scaling,
            context,
            window: self
                .size(&key("attention.sliding_window"))?
                .filter(|&window| window > 0 && window < context),
            tied: !self.contains("output.weight"),
            qkv_bias: arch != "llama" && self.contains("blk.0.attn_q.bias"),
            architecture: arch,
        };
        config.check(&self.path)?;
        Ok((config, notes))
    }

    /// Refuses keys that are not known and may change the model; returns a word on the others.
    fn unread(&self, arch: &str) -> Result<Vec<String>> {
        let mut keys: Vec<&str> = self.keys().collect();
        keys.sort_unstable();
        let mut passed_over = Vec::new();
        for key in keys {
            let described = known::GGUF_PREFIXES.iter().any(|p| key.starts_with(p));
            let own = key.strip_prefix(arch).and_then(|k| k.strip_prefix('.'));
            let value = match self.value(key) {
                Some(Value::Integer(v)) => Json::from(*v as f64),
                Some(Value::Float(v)) => Json::from(*v),
                Some(Value::Flag(v)) => Json::from(*v),
                Some(Value::Text(v)) => Json::from(v.as_str()),
                _ => Json::from(vec![1]),
            };
            match own {
                Some(own) if READ.contains(&own) || known::GGUF_KEYS.iter().any(|k| k.0 == own) => {
                }
                // Behind the architecture stand the model's own settings, and nothing else.
                Some(_) if known::neutral(key, &value) => {}
                None if described => {}
                None if known::harmless(key, &value) => passed_over.push(format!("`{key}`")),
                _ => {
                    let value = self.value(key).map(ToString::to_string).unwrap_or_default();
                    return Err(Error::Unsupported(format!(
                        "{}: metadata `{key}` is {value}, which may change the model and is not known here",
                        self.path.display()
                    )));
                }
            }
        }
        Ok(match passed_over.is_empty() {
            true => Vec::new(),
            false => vec![format!(
                "{}: not known here and passed over: {}",
                self.path.display(),
                passed_over.join(", ")
            )],
        })
    }
}
