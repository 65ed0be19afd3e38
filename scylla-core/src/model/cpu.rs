//! The transformer on this crate's CPU kernels.

use super::slots::{RowView, Slots};
use super::{LoadOptions, ModelConfig, ModelFiles};
use crate::Result;
use crate::kernels::{
    AttentionRow, KvLayer, Linear, Pool, Scratch, Weight, add, attention, rms_norm, rope, swiglu,
};
use crate::plugin::{Forward, Matrix, Slot, Step, Tap, TargetModel, TargetShape};

struct Layer {
    attention_norm: Vec<f32>,
    qkv: Linear,
    output: Linear,
    ffn_norm: Vec<f32>,
    gate_up: Linear,
    down: Linear,
}

/// A Llama- or Qwen2-style transformer on the CPU.
pub struct CpuModel {
    config: ModelConfig,
    /// Absent where the head's weight is the embedding.
    embedding: Option<Weight>,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    head: Linear,
    cos: Vec<f32>,
    sin: Vec<f32>,
    pool: Pool,
    slots: Slots<Vec<KvLayer>>,
    /// Caches of closed slots, whose pages are already there.
    spare: Vec<Vec<KvLayer>>,
    buffers: Buffers,
}

/// Activations, kept from step to step. `M` rows.
#[derive(Default)]
struct Buffers {
    scratch: Scratch,
    /// `[M, H]`
    x: Vec<f32>,
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

fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    buffer.resize(len, 0.0);
    buffer
}

impl CpuModel {
    /// Loads the weights in the form the options ask for.
    pub fn load(files: &ModelFiles, options: &LoadOptions) -> Result<Self> {
        let c = &files.config;
        let positions = options.positions(c)?;
        let matrix = |name: &str, n: usize, k: usize| -> Result<Weight> {
            options
                .weights
                .apply(files.source.tensor(name, &[n, k], c)?, k)
        };
        let vector = |name: &str, n: usize| files.source.vector(name, n, c);
        let linear = |name: &str, n: usize, k: usize, bias: bool| -> Result<Linear> {
            let bias = if bias {
                Some(vector(&format!("{name}.bias"), n)?)
            } else {
                None
            };
            Ok(Linear::new(
                matrix(&format!("{name}.weight"), n, k)?,
                k,
                bias,
            ))
        };
        let (h, q, kv) = (c.hidden, c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let layers = (0..c.layers).map(|i| {
            let at = |name: &str| format!("model.layers.{i}.{name}");
            Ok(Layer {
                attention_norm: vector(&at("input_layernorm.weight"), h)?,
                qkv: Linear::join(vec![
                    linear(&at("self_attn.q_proj"), q, h, c.qkv_bias)?,
                    linear(&at("self_attn.k_proj"), kv, h, c.qkv_bias)?,
                    linear(&at("self_attn.v_proj"), kv, h, c.qkv_bias)?,
                ]),
                output: linear(&at("self_attn.o_proj"), h, q, false)?,
                ffn_norm: vector(&at("post_attention_layernorm.weight"), h)?,
                gate_up: Linear::join(vec![
                    linear(&at("mlp.gate_proj"), c.ffn, h, false)?,
                    linear(&at("mlp.up_proj"), c.ffn, h, false)?,
                ]),
                down: linear(&at("mlp.down_proj"), h, c.ffn, false)?,
            })
        });
        let layers = layers.collect::<Result<_>>()?;
        let embedding = matrix("model.embed_tokens.weight", c.vocab, h)?;
        let (embedding, head) = if c.tied {
            (None, Linear::new(embedding, h, None))
        } else {
            (Some(embedding), linear("lm_head", c.vocab, h, false)?)
        };
        let (cos, sin) = c.rope_tables(positions);
        Ok(Self {
            norm: vector("model.norm.weight", h)?,
            config: c.clone(),
            embedding,
            layers,
            head,
            cos,
            sin,
            pool: Pool::new(options.thread_count()),
            slots: Slots::new(positions),
            spare: Vec::new(),
            buffers: Buffers::default(),
        })
    }

    /// Bytes of weights held.
    pub fn weight_bytes(&self) -> usize {
        let linears = self.linears().map(Linear::bytes).sum::<usize>();
        let norms = (2 * self.layers.len() + 1) * self.config.hidden * 4;
        linears + norms + self.embedding.as_ref().map_or(0, Weight::bytes)
    }

    /// The forms of the weights, most bytes first.
    pub fn forms(&self) -> Vec<&'static str> {
        let mut bytes = std::collections::BTreeMap::<&str, usize>::new();
        for weight in self
            .linears()
            .flat_map(Linear::weights)
            .chain(&self.embedding)
        {
            *bytes.entry(weight.form()).or_default() += weight.bytes();
        }
        let mut forms: Vec<_> = bytes.into_iter().collect();
        forms.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
        forms.into_iter().map(|(form, _)| form).collect()
    }

    fn linears(&self) -> impl Iterator<Item = &Linear> {
        let layers = self.layers.iter();
        layers
            .flat_map(|l| [&l.qkv, &l.output, &l.gate_up, &l.down])
            .chain([&self.head])
    }

    /// Rotates q and k, stores k and v, and leaves attention's mix of values in `mixed`.
    fn attend(&mut self, layer: usize, step: &Step<'_>, views: &[Vec<RowView>]) -> Result<()> {
        let c = &self.config;
        let (half, kv) = (c.head_dim / 2, c.kv_heads * c.head_dim);
        let q_len = c.heads * c.head_dim;
        let rows = views.iter().map(Vec::len).sum::<usize>();
        let b = &mut self.buffers;
        let q = sized(&mut b.q, rows * q_len);
        let mut lines = b
            .qkv
            .chunks_exact_mut(q_len + 2 * kv)
            .zip(q.chunks_exact_mut(q_len));
        for (slot, views) in step.slots.iter().zip(views) {
            let state = self.slots.get(slot.slot)?;
            for (i, view) in views.iter().enumerate() {
                let Some((line, q)) = lines.next() else { break };
                let angle = view.position * half..(view.position + 1) * half;
                let (rotated, value) = line.split_at_mut(q_len + kv);
                rope(rotated, &self.cos[angle.clone()], &self.sin[angle]);
                let (queries, key) = rotated.split_at(q_len);
                q.copy_from_slice(queries);
                state.cache[layer].write(state.len + i, key, value);
            }
        }
        let mut seen = Vec::with_capacity(rows);
        let mut caches = Vec::with_capacity(step.slots.len());
        for slot in &step.slots {
            // Taken for the duration of the call: several slots are read at once.
            caches.push(std::mem::replace(
                &mut self.slots.get(slot.slot)?.cache[layer],
                KvLayer::new(0, 0, 0),
            ));
        }
        for (cache, views) in caches.iter().zip(views) {
            seen.extend(views.iter().map(|view| AttentionRow {
                cache,
                contiguous: view.contiguous,
                scattered: &view.scattered,
            }));
        }
        let mixed = sized(&mut b.mixed, rows * q_len);
        attention(&self.pool, &b.q, &seen, c.heads, mixed);
        drop(seen);
        for (slot, cache) in step.slots.iter().zip(caches) {
            self.slots.get(slot.slot)?.cache[layer] = cache;
        }
        Ok(())
    }

    /// The last state after the final norm is in `normed`; returns the logits asked for, slot by slot.
    fn logits(&mut self, step: &Step<'_>) -> Result<Vec<Matrix>> {
        let (h, vocab) = (self.config.hidden, self.config.vocab);
        let b = &mut self.buffers;
        let mut first = 0;
        b.delta.clear();
        let mut counts = Vec::with_capacity(step.slots.len());
        for slot in &step.slots {
            let rows = slot.want.of(slot.tokens.len())?;
            counts.push(rows.len());
            for row in rows {
                let from = (first + row) * h..(first + row + 1) * h;
                b.delta.extend_from_slice(&b.normed[from]);
            }
            first += slot.tokens.len();
        }
        let mut logits = vec![0.0; counts.iter().sum::<usize>() * vocab];
        if !logits.is_empty() {
            self.head
                .forward(&self.pool, &b.delta, &mut b.scratch, &mut logits)?;
        }
        if let [_] = counts[..] {
            return Ok(vec![Matrix::host(logits, vocab)]);
        }
        let mut rest = &logits[..];
        let mut split = |count: usize| {
            let (mine, others) = rest.split_at(count * vocab);
            rest = others;
            Matrix::host(mine.to_vec(), vocab)
        };
        Ok(counts.iter().map(|&count| split(count)).collect())
    }
}

/// Copies `[M, H]` apart into one matrix per slot.
fn per_slot(step: &Step<'_>, values: &[f32], h: usize) -> Vec<Matrix> {
    let mut first = 0;
    let mut split = |n: usize| {
        first += n;
        Matrix::host(values[(first - n) * h..first * h].to_vec(), h)
    };
    step.slots.iter().map(|s| split(s.tokens.len())).collect()
}

impl TargetModel for CpuModel {
    fn open(&mut self, slot: Slot) -> Result<()> {
        let c = &self.config;
        let capacity = self.slots.capacity;
        let cache = self.spare.pop().unwrap_or_else(|| {
            let layer = || KvLayer::new(c.kv_heads, c.head_dim, capacity);
            (0..c.layers).map(|_| layer()).collect()
        });
        self.slots.open(slot, cache)
    }

    fn close(&mut self, slot: Slot) {
        self.spare.extend(self.slots.close(slot));
    }

    fn forward(&mut self, step: &Step<'_>) -> Result<Forward> {
        let views = self.slots.begin(step, self.config.vocab)?;
        let rows = views.iter().map(Vec::len).sum::<usize>();
        let (h, ffn, eps) = (self.config.hidden, self.config.ffn, self.config.norm_eps);
        let mut taps: Vec<Vec<Matrix>> = vec![Vec::new(); step.taps.len()];
        let x = sized(&mut self.buffers.x, rows * h);
        let table = self.embedding.as_ref().unwrap_or(&self.head.weights()[0]);
        let tokens = step.slots.iter().flat_map(|s| s.tokens);
        for (out, &token) in x.chunks_exact_mut(h).zip(tokens) {
            table.row(token as usize, h, out)?;
        }
        for layer in 0..self.layers.len() {
            self.tap(step, Tap::Input(layer), &mut taps);
            let (l, b) = (&self.layers[layer], &mut self.buffers);
            rms_norm(&b.x, &l.attention_norm, eps, sized(&mut b.normed, rows * h));
            let qkv = sized(&mut b.qkv, rows * l.qkv.n);
            l.qkv.forward(&self.pool, &b.normed, &mut b.scratch, qkv)?;
            self.attend(layer, step, &views)?;
            let (l, b) = (&self.layers[layer], &mut self.buffers);
            let delta = sized(&mut b.delta, rows * h);
            l.output
                .forward(&self.pool, &b.mixed, &mut b.scratch, delta)?;
            add(&mut b.x, &b.delta);
            rms_norm(&b.x, &l.ffn_norm, eps, &mut b.normed);
            let gate_up = sized(&mut b.gate_up, rows * 2 * ffn);
            l.gate_up
                .forward(&self.pool, &b.normed, &mut b.scratch, gate_up)?;
            swiglu(&b.gate_up, ffn, sized(&mut b.inner, rows * ffn));
            l.down
                .forward(&self.pool, &b.inner, &mut b.scratch, &mut b.delta)?;
            add(&mut b.x, &b.delta);
        }
        self.tap(step, Tap::Input(self.layers.len()), &mut taps);
        let b = &mut self.buffers;
        rms_norm(&b.x, &self.norm, eps, &mut b.normed);
        for (tap, out) in step.taps.iter().zip(&mut taps) {
            if *tap == Tap::Final {
                *out = per_slot(step, &b.normed, h);
            }
        }
        if let Some(i) = taps.iter().position(Vec::is_empty) {
            return Err(crate::Error::Invalid(format!(
                "tap {:?} of a model with {} layers",
                step.taps[i],
                self.layers.len()
            )));
        }
        let logits = self.logits(step)?;
        // From [tap][slot] to [slot][tap].
        let mut taps: Vec<_> = taps.into_iter().map(Vec::into_iter).collect();
        let of_slot = |_| taps.iter_mut().filter_map(Iterator::next).collect();
        Ok(Forward {
            logits,
            taps: (0..step.slots.len()).map(of_slot).collect(),
        })
    }

    fn commit(&mut self, slot: Slot, path: &[usize]) -> Result<()> {
        self.slots.commit(slot, path, |cache, from, to| {
            for layer in cache {
                layer.copy(from, to);
            }
            Ok(())
        })
    }

    fn shape(&self) -> TargetShape {
        TargetShape {
            vocab: self.config.vocab,
            hidden: self.config.hidden,
            layers: self.config.layers,
            context: self.slots.capacity,
        }
    }
}

impl CpuModel {
    /// Copies the current state for every tap of this name.
    fn tap(&self, step: &Step<'_>, at: Tap, taps: &mut [Vec<Matrix>]) {
        for (tap, out) in step.taps.iter().zip(taps) {
            if *tap == at {
                *out = per_slot(step, &self.buffers.x, self.config.hidden);
            }
        }
    }
}
