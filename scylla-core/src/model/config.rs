//! What a transformer looks like, read from `config.json` or from GGUF metadata.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use crate::plugin::TargetShape;
use crate::{Error, Result};

/// How rotary frequencies are stretched for longer contexts.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Plain rotary positions.
    None,
    /// Positions divided by a factor.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama-3.1's stretch of the long wavelengths.
    Llama3 {
        /// Divisor of the lowest frequencies.
        factor: f64,
        /// Wavelengths above `original / low` are stretched whole.
        low_freq_factor: f64,
        /// Wavelengths below `original / high` are left alone.
        high_freq_factor: f64,
        /// Context the model was first trained with.
        original: f64,
    },
    /// A divisor per frequency, as GGUF's `rope_freqs.weight` stores Llama-3.1's stretch.
    Factors(Vec<f32>),
}

/// The shape of a Llama- or Qwen2-style transformer.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Name of the architecture, as reports print it.
    pub architecture: String,
    /// V: rows of the embedding.
    pub vocab: usize,
    /// H.
    pub hidden: usize,
    /// Inner size of the feed-forward layer.
    pub ffn: usize,
    /// L.
    pub layers: usize,
    /// A.
    pub heads: usize,
    /// K.
    pub kv_heads: usize,
    /// E.
    pub head_dim: usize,
    /// Added to the mean square in the norms.
    pub norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Their stretch.
    pub rope_scaling: RopeScaling,
    /// Positions the model was made for.
    pub context: usize,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Whether q, k and v have biases.
    pub qkv_bias: bool,
}

#[derive(Deserialize)]
struct Hf {
    model_type: Option<String>,
    vocab_size: Option<usize>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    rms_norm_eps: Option<f64>,
    rope_theta: Option<f64>,
    rope_scaling: Option<Value>,
    rope_parameters: Option<Value>,
    max_position_embeddings: Option<usize>,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    attention_bias: bool,
    qkv_bias: Option<bool>,
    #[serde(default)]
    mlp_bias: bool,
    hidden_act: Option<String>,
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
}

impl ModelConfig {
    /// Reads a Hugging Face `config.json`.
    pub fn from_hf(text: &str, path: &Path) -> Result<Self> {
        let hf: Hf = serde_json::from_str(text)
            .map_err(|e| Error::file(path, format!("not a model configuration: {e}")))?;
        let need = |value: Option<usize>, key: &str| {
            value.ok_or_else(|| Error::file(path, format!("key `{key}` is missing")))
        };
        let model_type = hf.model_type.clone().unwrap_or_default();
        if !["llama", "qwen2", "mistral"].contains(&model_type.as_str()) {
            return Err(Error::Unsupported(format!(
                "{}: model_type `{model_type}`; supported: llama, mistral, qwen2",
                path.display()
            )));
        }
        if hf.hidden_act.as_deref().unwrap_or("silu") != "silu" || hf.mlp_bias {
            return Err(Error::Unsupported(format!(
                "{}: hidden_act {:?} with mlp_bias {}; only silu without biases",
                path.display(),
                hf.hidden_act.unwrap_or_default(),
                hf.mlp_bias
            )));
        }
        let context = need(hf.max_position_embeddings, "max_position_embeddings")?;
        refuse_window(&hf, &model_type, context, path)?;
        let heads = need(hf.num_attention_heads, "num_attention_heads")?;
        let hidden = need(hf.hidden_size, "hidden_size")?;
        let config = Self {
            qkv_bias: hf
                .qkv_bias
                .unwrap_or(model_type == "qwen2" || hf.attention_bias),
            architecture: model_type,
            vocab: need(hf.vocab_size, "vocab_size")?,
            hidden,
            ffn: need(hf.intermediate_size, "intermediate_size")?,
            layers: need(hf.num_hidden_layers, "num_hidden_layers")?,
            heads,
            kv_heads: hf.num_key_value_heads.unwrap_or(heads),
            head_dim: hf
                .head_dim
                .unwrap_or(hidden.checked_div(heads).unwrap_or(0)),
            norm_eps: hf.rms_norm_eps.unwrap_or(1e-6) as f32,
            rope_theta: hf_theta(&hf),
            rope_scaling: hf_scaling(&hf, path)?,
            context,
            tied: hf.tie_word_embeddings,
        };
        config.check(path)?;
        Ok(config)
    }

    /// Checks that the sizes fit together.
    pub fn check(&self, path: &Path) -> Result<()> {
        let bad = |message: String| Err(Error::file(path, message));
        let sizes = [
            ("vocabulary size", self.vocab),
            ("hidden size", self.hidden),
            ("feed-forward size", self.ffn),
            ("number of layers", self.layers),
            ("number of heads", self.heads),
            ("number of kv heads", self.kv_heads),
            ("head size", self.head_dim),
            ("context", self.context),
        ];
        for (name, size) in sizes {
            if size == 0 || size > 1 << 24 {
                return bad(format!("{name} {size} is outside 1..=16777216"));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) || !self.head_dim.is_multiple_of(2) {
            return bad(format!(
                "{} heads over {} kv heads of size {}: heads must be a multiple of kv heads, the size even",
                self.heads, self.kv_heads, self.head_dim
            ));
        }
        if !(self.norm_eps >= 0.0 && self.rope_theta > 0.0 && self.rope_theta.is_finite()) {
            return bad(format!(
                "norm epsilon {} or rope base {} is out of range",
                self.norm_eps, self.rope_theta
            ));
        }
        Ok(())
    }

    /// Tables of cosines and sines `[positions, E / 2]`, built in f64 and rounded once.
    pub fn rope_tables(&self, positions: usize) -> (Vec<f32>, Vec<f32>) {
        let half = self.head_dim / 2;
        let frequencies: Vec<f64> = (0..half)
            .map(|i| {
                let plain = self
                    .rope_theta
                    .powf(-((2 * i) as f64) / self.head_dim as f64);
                self.stretched(plain, i)
            })
            .collect();
        let angles = (0..positions).flat_map(|p| frequencies.iter().map(move |f| p as f64 * f));
        angles.map(|a| (a.cos() as f32, a.sin() as f32)).unzip()
    }

    fn stretched(&self, frequency: f64, index: usize) -> f64 {
        match &self.rope_scaling {
            RopeScaling::None => frequency,
            RopeScaling::Linear { factor } => frequency / factor,
            RopeScaling::Factors(f) => frequency / f64::from(f.get(index).copied().unwrap_or(1.0)),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original,
            } => {
                let wavelength = 2.0 * std::f64::consts::PI / frequency;
                if wavelength < original / high {
                    frequency
                } else if wavelength > original / low {
                    frequency / factor
                } else {
                    let smooth = (original / wavelength - low) / (high - low);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                }
            }
        }
    }

    /// The sizes that drafts need, with the whole context.
    pub fn shape(&self) -> TargetShape {
        TargetShape {
            vocab: self.vocab,
            hidden: self.hidden,
            layers: self.layers,
            context: self.context,
        }
    }

    /// Values of a cache of `positions` positions.
    pub fn cache_values(&self, positions: usize) -> usize {
        2 * self.layers * self.kv_heads * self.head_dim * positions
    }
}

/// A window that covers the whole context is no window.
fn refuse_window(hf: &Hf, model_type: &str, context: usize, path: &Path) -> Result<()> {
    let used = hf.use_sliding_window.unwrap_or(model_type == "mistral");
    match hf.sliding_window {
        Some(window) if used && window < context => Err(Error::Unsupported(format!(
            "{}: sliding_window {window} is active in a context of {context}",
            path.display()
        ))),
        _ => Ok(()),
    }
}

fn hf_theta(hf: &Hf) -> f64 {
    let newer = hf
        .rope_parameters
        .as_ref()
        .and_then(|p| p.get("rope_theta"));
    hf.rope_theta
        .or_else(|| newer.and_then(Value::as_f64))
        .unwrap_or(10000.0)
}

fn hf_scaling(hf: &Hf, path: &Path) -> Result<RopeScaling> {
    let older = hf.rope_scaling.as_ref().filter(|v| !v.is_null());
    let Some(rope) = older.or(hf.rope_parameters.as_ref()) else {
        return Ok(RopeScaling::None);
    };
    let kind = ["rope_type", "type"]
        .iter()
        .find_map(|k| rope.get(k).and_then(Value::as_str))
        .unwrap_or("default");
    let number = |key: &str| {
        rope.get(key)
            .and_then(Value::as_f64)
            .filter(|v| v.is_finite() && *v > 0.0)
            .ok_or_else(|| {
                Error::file(path, format!("rope type `{kind}` needs a positive `{key}`"))
            })
    };
    match kind {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear {
            factor: number("factor")?,
        }),
        "llama3" => Ok(RopeScaling::Llama3 {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original: number("original_max_position_embeddings")?,
        }),
        other => Err(Error::Unsupported(format!(
            "{}: rope type `{other}`; supported: default, linear, llama3",
            path.display()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(extra: &str) -> String {
        format!(
            r#"{{"model_type":"llama","vocab_size":10,"hidden_size":8,"intermediate_size":16,"num_hidden_layers":1,
            "num_attention_heads":2,"max_position_embeddings":64{extra}}}"#
        )
    }

    fn read(extra: &str) -> Result<ModelConfig> {
        ModelConfig::from_hf(&json(extra), Path::new("config.json"))
    }

    #[test]
    fn defaults_follow_the_heads() {
        let c = read("").expect("config");
        assert_eq!((c.kv_heads, c.head_dim, c.rope_theta), (2, 4, 10000.0));
        assert!(!c.qkv_bias && !c.tied);
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        for (extra, word) in [
            (
                r#","rope_scaling":{"rope_type":"yarn","factor":4.0}"#,
                "yarn",
            ),
            (r#","rope_scaling":{"rope_type":"linear"}"#, "factor"),
            (
                r#","use_sliding_window":true,"sliding_window":16"#,
                "sliding_window 16",
            ),
            (r#","hidden_act":"gelu""#, "gelu"),
            (r#","num_key_value_heads":3"#, "3 kv heads"),
            (r#","head_dim":0"#, "head size 0"),
        ] {
            let error = read(extra).expect_err(word).to_string();
            assert!(error.contains(word), "{error}");
        }
        let gpt2 = json("").replace("\"llama\"", "\"gpt2\"");
        let error = ModelConfig::from_hf(&gpt2, Path::new("x"))
            .expect_err("gpt2")
            .to_string();
        assert!(error.contains("gpt2") && error.contains("qwen2"), "{error}");
    }

    #[test]
    fn a_window_as_long_as_the_context_is_no_window() {
        assert!(read(r#","use_sliding_window":true,"sliding_window":64"#).is_ok());
        assert!(read(r#","use_sliding_window":false,"sliding_window":16"#).is_ok());
    }

    #[test]
    fn both_spellings_of_the_rope_say_the_same() {
        let older = r#","rope_theta":5e5,"rope_scaling":{"type":"linear","factor":2.0}"#;
        let newer = r#","rope_parameters":{"rope_type":"linear","rope_theta":5e5,"factor":2.0}"#;
        assert_eq!(read(older).expect("older"), read(newer).expect("newer"));
    }
}
