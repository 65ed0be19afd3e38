//! Decoder layers with their caches on the CPU kernels: what targets and drafts are both made of.

use std::sync::Arc;

use super::slots::{RowView, Slots};
use super::{ModelConfig, Rows};
use crate::kernels::{
    AttentionRow, CacheForm, KvLayer, Linear, Pool, Scratch, Weight, add, add_rms_norm, attention,
    rms_norm, rope, swiglu,
};
use crate::plugin::Slot;
use crate::{Error, Result};

/// The weights of one decoder layer.
pub struct Layer {
    /// Norm before attention; a draft's first layer may have none.
    pub attention_norm: Option<Vec<f32>>,
    /// q, k and v `[(A + 2 K) E, .]`; the first layer of a stack may take another width than H.
    pub qkv: Linear,
    /// `[H, A E]`
    pub output: Linear,
    /// Norm before the feed-forward part.
    pub ffn_norm: Vec<f32>,
    /// `[2 I, H]`
    pub gate_up: Linear,
    /// `[H, I]`
    pub down: Linear,
}

/// Where weights come from: by name and shape, a vector as one column per value.
pub trait Weights {
    /// A matrix `[n, k]`, in the form it shall be held in.
    fn matrix(&self, name: &str, n: usize, k: usize) -> Result<Weight>;
    /// A vector `[n]` in f32.
    fn vector(&self, name: &str, n: usize) -> Result<Vec<f32>>;

    /// A linear layer without bias, or with one.
    fn linear(&self, name: &str, n: usize, k: usize, bias: bool) -> Result<Linear> {
        let bias = match bias {
            true => Some(self.vector(&format!("{name}.bias"), n)?),
            false => None,
        };
        let weight = self.matrix(&format!("{name}.weight"), n, k)?;
        Ok(Linear::new(weight, bias))
    }
}

impl Layer {
    /// Reads a layer with Hugging Face names below `prefix`. Its attention takes `input` values a row, which are
    /// normalised first where `normed`.
    pub fn read(
        from: &dyn Weights,
        prefix: &str,
        c: &ModelConfig,
        input: usize,
        normed: bool,
    ) -> Result<Self> {
        let (h, q, kv) = (c.hidden, c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let at = |name: &str| format!("{prefix}.{name}");
        let linear = |name: &str, n, k, bias| from.linear(&at(name), n, k, bias);
        Ok(Self {
            attention_norm: match normed {
                true => Some(from.vector(&at("input_layernorm.weight"), input)?),
                false => None,
            },
            qkv: Linear::join(vec![
                linear("self_attn.q_proj", q, input, c.qkv_bias)?,
                linear("self_attn.k_proj", kv, input, c.qkv_bias)?,
                linear("self_attn.v_proj", kv, input, c.qkv_bias)?,
            ])?
            .settled(),
            output: linear("self_attn.o_proj", h, q, false)?.settled(),
            ffn_norm: from.vector(&at("post_attention_layernorm.weight"), h)?,
            gate_up: Linear::join(vec![
                linear("mlp.gate_proj", c.ffn, h, false)?,
                linear("mlp.up_proj", c.ffn, h, false)?,
            ])?
            .settled(),
            down: linear("mlp.down_proj", h, c.ffn, false)?.settled(),
        })
    }

    /// Its products.
    pub fn linears(&self) -> [&Linear; 4] {
        [&self.qkv, &self.output, &self.gate_up, &self.down]
    }

    /// Bytes of weights held.
    pub fn bytes(&self) -> usize {
        let norms = self.attention_norm.as_ref().map_or(0, Vec::len) + self.ffn_norm.len();
        self.linears().iter().map(|l| l.bytes()).sum::<usize>() + norms * 4
    }
}

/// Activations, kept from step to step. `M` rows.
#[derive(Default)]
struct Buffers {
    scratch: Scratch,
    /// `[M, H]`
    normed: Vec<f32>,
    delta: Vec<f32>,
    /// `[M, (A + 2 K) E]`
    qkv: Vec<f32>,
    /// `[M, A E]`
    q: Vec<f32>,
    mixed: Vec<f32>,
    /// `[M, 2 I]`
    gate_up: Vec<f32>,
    /// `[M, I]`
    inner: Vec<f32>,
}

/// Gives a buffer `len` values; what it held may stay.
pub(crate) fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    buffer.resize(len, 0.0);
    buffer
}

/// Decoder layers on the CPU, with one cache per slot.
///
/// Beside weights in single precision a cache holds single precision; beside those that are rounded more, half
/// precision, which costs attention half the reading.
pub struct CpuStack {
    config: ModelConfig,
    layers: Vec<Layer>,
    cache_form: CacheForm,
    cos: Vec<f32>,
    sin: Vec<f32>,
    pool: Arc<Pool>,
    slots: Slots<Vec<KvLayer>>,
    /// Caches of closed slots, whose pages are already there.
    spare: Vec<Vec<KvLayer>>,
    buffers: Buffers,
}

impl CpuStack {
    /// Layers of the shape `config` (its number of layers aside), whose slots hold `positions` rows.
    pub fn new(config: ModelConfig, layers: Vec<Layer>, positions: usize, pool: Arc<Pool>) -> Self {
        let (cos, sin) = config.rope_tables(positions);
        let linears = layers.iter().flat_map(Layer::linears);
        let wide = |w: &Weight| w.form() == "f32";
        let all_wide = linears.flat_map(Linear::weights).all(wide);
        let cache_form = match all_wide {
            true => CacheForm::F32,
            false => CacheForm::F16,
        };
        Self {
            cache_form,
            config,
            layers,
            cos,
            sin,
            pool,
            slots: Slots::new(positions),
            spare: Vec::new(),
            buffers: Buffers::default(),
        }
    }

    /// Its layers.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// How its caches hold keys and values.
    pub fn cache_form(&self) -> CacheForm {
        self.cache_form
    }

    /// Positions a slot can hold.
    pub fn capacity(&self) -> usize {
        self.slots.capacity
    }

    /// The threads that work on it.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// Starts an empty sequence in a slot.
    pub fn open(&mut self, slot: Slot) -> Result<()> {
        let c = &self.config;
        let (capacity, layers, form) = (self.slots.capacity, self.layers.len(), self.cache_form);
        let cache = self.spare.pop().unwrap_or_else(|| {
            let layer = || KvLayer::new(form, c.kv_heads, c.head_dim, capacity);
            (0..layers).map(|_| layer()).collect()
        });
        self.slots.open(slot, cache)
    }

    /// Ends it; closing a slot that is not open does nothing.
    pub fn close(&mut self, slot: Slot) {
        self.spare.extend(self.slots.close(slot));
    }

    /// Keeps the waiting rows that are listed, a path from a first row, and drops the rest.
    pub fn commit(&mut self, slot: Slot, path: &[usize]) -> Result<()> {
        self.slots.commit(slot, path, |cache, from, to| {
            for layer in cache {
                layer.copy(from, to);
            }
            Ok(())
        })
    }

    /// Runs rows through all layers: `x` `[M, H]`, rows slot by slot, goes from the input of the first to the output
    /// of the last. Where `input` `[M, .]` is given, the first layer's attention takes it as it is, instead of `x`.
    /// `on_layer(i, x)` sees what enters layer `i`.
    pub fn forward(
        &mut self,
        rows: &[Rows<'_>],
        x: &mut [f32],
        input: Option<&[f32]>,
        mut on_layer: impl FnMut(usize, &[f32]),
    ) -> Result<()> {
        let views = self.slots.begin(rows)?;
        let m = views.iter().map(Vec::len).sum::<usize>();
        let (h, ffn, eps) = (self.config.hidden, self.config.ffn, self.config.norm_eps);
        if x.len() != m * h {
            return Err(Error::Invalid(format!(
                "{} values for {m} rows of {h}",
                x.len()
            )));
        }
        for layer in 0..self.layers.len() {
            on_layer(layer, x);
            let (l, b) = (&self.layers[layer], &mut self.buffers);
            let taken = match (input, &l.attention_norm) {
                (Some(input), _) if layer == 0 => input,
                (_, Some(norm)) => {
                    let normed = sized(&mut b.normed, m * h);
                    rms_norm(x, norm, eps, normed);
                    normed
                }
                (_, None) => x,
            };
            let qkv = sized(&mut b.qkv, m * l.qkv.n);
            l.qkv.forward(&self.pool, taken, &mut b.scratch, qkv)?;
            self.attend(layer, rows, &views)?;
            let (l, b) = (&self.layers[layer], &mut self.buffers);
            let delta = sized(&mut b.delta, m * h);
            l.output
                .forward(&self.pool, &b.mixed, &mut b.scratch, delta)?;
            let normed = sized(&mut b.normed, m * h);
            add_rms_norm(x, &b.delta, &l.ffn_norm, eps, normed);
            let gate_up = sized(&mut b.gate_up, m * 2 * ffn);
            l.gate_up
                .forward(&self.pool, normed, &mut b.scratch, gate_up)?;
            swiglu(&b.gate_up, ffn, sized(&mut b.inner, m * ffn));
            l.down
                .forward(&self.pool, &b.inner, &mut b.scratch, &mut b.delta)?;
            add(x, &b.delta);
        }
        on_layer(self.layers.len(), x);
        Ok(())
    }

    /// Rotates q and k, stores k and v, and leaves attention's mix of values in `mixed`.
    fn attend(&mut self, layer: usize, rows: &[Rows<'_>], views: &[Vec<RowView>]) -> Result<()> {
        let c = &self.config;
        let (half, kv) = (c.head_dim / 2, c.kv_heads * c.head_dim);
        let q_len = c.heads * c.head_dim;
        let m = views.iter().map(Vec::len).sum::<usize>();
        let b = &mut self.buffers;
        let q = sized(&mut b.q, m * q_len);
        let mut lines = b
            .qkv
            .chunks_exact_mut(q_len + 2 * kv)
            .zip(q.chunks_exact_mut(q_len));
        for (slot, views) in rows.iter().zip(views) {
            let state = self.slots.get(slot.slot)?;
            for view in views {
                let Some((line, q)) = lines.next() else { break };
                let angle = view.position * half..(view.position + 1) * half;
                let (rotated, value) = line.split_at_mut(q_len + kv);
                rope(rotated, &self.cos[angle.clone()], &self.sin[angle]);
                let (queries, key) = rotated.split_at(q_len);
                q.copy_from_slice(queries);
                state.cache[layer].write(view.at, key, value);
            }
        }
        let slots = &self.slots;
        let row = |mut i: usize| {
            for (slot, views) in rows.iter().zip(views) {
                let Some(view) = views.get(i) else {
                    i -= views.len();
                    continue;
                };
                let Some(cache) = slots.cache(slot.slot) else {
                    break;
                };
                return AttentionRow {
                    cache: &cache[layer],
                    contiguous: view.contiguous,
                    scattered: &view.scattered,
                };
            }
            unreachable!("no row {i}: `begin` checked that its slot is open")
        };
        let mixed = sized(&mut b.mixed, m * q_len);
        attention(&self.pool, &b.q, m, &row, c.heads, mixed);
        Ok(())
    }
}
