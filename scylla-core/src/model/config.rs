//! What a transformer looks like. It is read from `config.json` (`hf`) or from GGUF metadata (`gguf_config`).

use std::path::Path;

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
    /// Positions a row sees, itself included, where that is less than the context. The executors know no windows yet,
    /// so a slot may not hold more.
    pub window: Option<usize>,
}

/// Weights of a layer.
const LAYER: [&str; 9] = [
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

impl ModelConfig {
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
        // Each layer has tensors of its own names, which are looked for before any is read.
        if self.layers > 4096 {
            return bad(format!("number of layers {} is above 4096", self.layers));
        }
        if !(self.norm_eps >= 0.0
            && self.norm_eps.is_finite()
            && self.rope_theta > 0.0
            && self.rope_theta.is_finite())
        {
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

    /// Names of its tensors, Hugging Face style: those that a model is made of, and no other.
    pub fn tensors(&self) -> Vec<String> {
        let mut all = vec![
            "model.embed_tokens.weight".to_string(),
            "model.norm.weight".to_string(),
        ];
        if !self.tied {
            all.push("lm_head.weight".into());
        }
        for layer in 0..self.layers {
            let mut add = |name: &str| all.push(format!("model.layers.{layer}.{name}"));
            for name in LAYER {
                add(&format!("{name}.weight"));
            }
            if self.qkv_bias {
                for name in ["q_proj", "k_proj", "v_proj"] {
                    add(&format!("self_attn.{name}.bias"));
                }
            }
        }
        all
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
