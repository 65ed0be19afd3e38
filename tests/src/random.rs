//! Weights without meaning, of any shape: what a forward costs does not depend on what they say.

use std::cell::RefCell;

use half::bf16;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use safetensors::Dtype;
use scylla_core::Result;
use scylla_core::model::{
    AttentionInput, Biases, LayerSpec, ModelConfig, Rope, StoredTensor, WeightForm, Weights,
};

/// Weights that are made when they are asked for, in bf16; norms are ones.
pub struct RandomWeights {
    form: WeightForm,
    /// Values that are repeated, from another place on each time.
    block: Vec<u8>,
    next: RefCell<usize>,
}

impl RandomWeights {
    /// Weights that shall be held in a form; as they are stored they are bf16.
    pub fn new(form: WeightForm) -> Self {
        let mut rng = StdRng::seed_from_u64(1);
        let value = |_| bf16::from_f32(rng.random_range(-0.025f32..0.025)).to_le_bytes();
        Self {
            form,
            block: (0..(1 << 20) + 7).flat_map(value).collect(),
            next: RefCell::new(0),
        }
    }
}

impl Weights for RandomWeights {
    fn find(&self, name: &str, shape: &[usize]) -> Result<StoredTensor<'_>> {
        let bytes = 2 * shape.iter().product::<usize>();
        let mut values = Vec::with_capacity(bytes);
        if name.contains("norm") {
            values.extend(bf16::ONE.to_le_bytes().repeat(bytes / 2));
        } else {
            let mut next = self.next.borrow_mut();
            while values.len() < bytes {
                let rest = &self.block[*next..];
                let take = rest.len().min(bytes - values.len());
                values.extend_from_slice(&rest[..take]);
                *next = (*next + take) % self.block.len();
            }
        }
        StoredTensor::in_memory(name.to_string(), Dtype::BF16, shape, values)
    }

    fn form(&self) -> WeightForm {
        self.form
    }
}

/// The shape of a Llama model: layers, H, I, (A, K), V, and whether the head is the embedding.
pub fn llama_shape(
    layers: usize,
    hidden: usize,
    ffn: usize,
    (heads, kv_heads): (usize, usize),
    vocab: usize,
    tied: bool,
) -> ModelConfig {
    let layer = LayerSpec {
        hidden,
        ffn,
        heads,
        kv_heads,
        head_dim: hidden / heads,
        eps: 1e-5,
        biases: Biases::default(),
        qk_norm: false,
        window: None,
        rope: Rope::plain(1e4),
        input: AttentionInput::Normed,
    };
    ModelConfig {
        architecture: "llama".into(),
        vocab,
        hidden,
        context: 2048,
        tied,
        norm_eps: 1e-5,
        layers: vec![layer; layers],
    }
}
