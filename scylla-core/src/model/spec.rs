//! What one decoder layer is: plain data, from which every executor makes the same layer.

use super::rope::Rope;

/// Where a layer's attention gets its input from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttentionInput {
    /// The residual stream, through `input_layernorm`.
    Normed,
    /// The residual stream as it is, as in an EAGLE-1 draft's first layer.
    Bare,
    /// So many values a row that the network hands beside the residual stream, as in an EAGLE-3 draft's first layer.
    Beside(usize),
}

/// Which products have a bias.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Biases {
    /// `q_proj`
    pub q: bool,
    /// `k_proj`
    pub k: bool,
    /// `v_proj`
    pub v: bool,
    /// `o_proj`
    pub o: bool,
    /// `gate_proj`, `up_proj` and `down_proj`
    pub mlp: bool,
}

impl Biases {
    /// Those of q, k and v.
    pub const QKV: Self = Self {
        q: true,
        k: true,
        v: true,
        o: false,
        mlp: false,
    };
}

/// The shape of one decoder layer: attention over K key-value heads and a SwiGLU, each behind an RMS norm.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerSpec {
    /// H: width of the residual stream.
    pub hidden: usize,
    /// Inner size of the feed-forward part.
    pub ffn: usize,
    /// A.
    pub heads: usize,
    /// K.
    pub kv_heads: usize,
    /// E.
    pub head_dim: usize,
    /// Added to the mean square in the norms.
    pub eps: f32,
    /// Which products have a bias.
    pub biases: Biases,
    /// Whether each head of q and k is normed before it is rotated (Qwen3).
    pub qk_norm: bool,
    /// Positions a row sees, itself included; all of them without one.
    pub window: Option<usize>,
    /// Rotary positions.
    pub rope: Rope,
    /// Where attention gets its input from.
    pub input: AttentionInput,
}

impl LayerSpec {
    /// Values a row that q, k and v take.
    pub fn input_width(&self) -> usize {
        match self.input {
            AttentionInput::Normed | AttentionInput::Bare => self.hidden,
            AttentionInput::Beside(width) => width,
        }
    }

    /// `A E`.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// `K E`.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Its products by their Hugging Face names, each `[n, k]` and whether it has a bias.
    pub fn products(&self) -> [(&'static str, [usize; 2], bool); 7] {
        let (h, q, kv, input) = (
            self.hidden,
            self.q_width(),
            self.kv_width(),
            self.input_width(),
        );
        let b = self.biases;
        [
            ("self_attn.q_proj", [q, input], b.q),
            ("self_attn.k_proj", [kv, input], b.k),
            ("self_attn.v_proj", [kv, input], b.v),
            ("self_attn.o_proj", [h, q], b.o),
            ("mlp.gate_proj", [self.ffn, h], b.mlp),
            ("mlp.up_proj", [self.ffn, h], b.mlp),
            ("mlp.down_proj", [h, self.ffn], b.mlp),
        ]
    }

    /// Its norms by their Hugging Face names, with their lengths.
    pub fn norms(&self) -> Vec<(&'static str, usize)> {
        let mut all = vec![("post_attention_layernorm", self.hidden)];
        if self.input == AttentionInput::Normed {
            all.push(("input_layernorm", self.hidden));
        }
        if self.qk_norm {
            all.extend([
                ("self_attn.q_norm", self.head_dim),
                ("self_attn.k_norm", self.head_dim),
            ]);
        }
        all
    }

    /// The tensors it is made of, with their shapes: the one list that loaders, exporters and trainers go by.
    pub fn tensors(&self, prefix: &str) -> Vec<(String, Vec<usize>)> {
        let mut all = Vec::new();
        for (name, [n, k], bias) in self.products() {
            all.push((format!("{prefix}.{name}.weight"), vec![n, k]));
            if bias {
                all.push((format!("{prefix}.{name}.bias"), vec![n]));
            }
        }
        let norms = self.norms().into_iter();
        all.extend(norms.map(|(name, n)| (format!("{prefix}.{name}.weight"), vec![n])));
        all
    }

    /// What does not fit together, if anything.
    pub fn flaw(&self) -> Option<String> {
        let sizes = [
            ("hidden size", self.hidden),
            ("feed-forward size", self.ffn),
            ("number of heads", self.heads),
            ("number of kv heads", self.kv_heads),
            ("head size", self.head_dim),
            ("window", self.window.unwrap_or(1)),
        ];
        if let Some((name, size)) = sizes.iter().find(|(_, s)| !(1..=1 << 24).contains(s)) {
            return Some(format!("{name} {size} is outside 1..=16777216"));
        }
        if !self.heads.is_multiple_of(self.kv_heads) || !self.head_dim.is_multiple_of(2) {
            return Some(format!(
                "{} heads over {} kv heads of size {}: heads must be a multiple of kv heads, the size even",
                self.heads, self.kv_heads, self.head_dim
            ));
        }
        let positive = |v: f64| v > 0.0 && v.is_finite();
        let eps = self.eps >= 0.0 && self.eps.is_finite();
        if !(eps && positive(self.rope.theta)) {
            return Some(format!(
                "norm epsilon {} or rope base {} is out of range",
                self.eps, self.rope.theta
            ));
        }
        None
    }
}
