//! The executor on this crate's CPU kernels.

mod packed;

use std::sync::{Arc, Mutex, PoisonError};

use super::executor::{
    Executor, Forms, Stack, WeightMatrix, check_input, check_packed, check_specs, outside,
};
use super::files::Weights;
use super::rope::{Rope, occurring};
use super::slots::{RowView, Slots, StackRows};
use super::spec::{AttentionInput, LayerSpec};
use crate::kernels::{
    AttentionRow, CacheForm, KvLayer, Linear, Pool, Scratch, Weight, add, add_rms_norm, attention,
    rms_norm, rope, swiglu,
};
use crate::plugin::{Matrix, PackedRows, Slot};
use crate::{Error, Result};

/// Computes on the CPU kernels. Cloning shares threads and buffers.
#[derive(Clone)]
pub struct Cpu {
    pool: Arc<Pool>,
    scratch: Arc<Mutex<Scratch>>,
}

impl Cpu {
    /// On these threads, which all networks of a decoder share: two pools would spin against each other.
    pub fn new(pool: Arc<Pool>) -> Self {
        Self {
            pool,
            scratch: Arc::default(),
        }
    }

    /// A weight that is at hand.
    pub fn hold(&self, linear: Linear) -> Arc<dyn WeightMatrix> {
        Arc::new(CpuMatrix {
            linear: linear.settled(),
            on: self.clone(),
        })
    }
}

/// A weight in the kernels' tiles.
struct CpuMatrix {
    linear: Linear,
    on: Cpu,
}

impl WeightMatrix for CpuMatrix {
    fn n(&self) -> usize {
        self.linear.n
    }

    fn k(&self) -> usize {
        self.linear.k
    }

    fn multiply(&self, x: &Matrix, out: &mut Matrix) -> Result<()> {
        let x_values = x.values()?;
        let out = out.sized(x.rows(), self.linear.n);
        let mut scratch = self
            .on
            .scratch
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.linear
            .forward(&self.on.pool, x_values, &mut scratch, out)
    }

    fn rows(&self, ids: &[u32], out: &mut Matrix) -> Result<()> {
        let (weight, k) = (&self.linear.weights()[0], self.linear.k);
        let out = out.sized(ids.len(), k);
        for (&id, line) in ids.iter().zip(out.chunks_exact_mut(k)) {
            if id as usize >= weight.n {
                return Err(outside(id, weight.n));
            }
            weight.row(id as usize, line);
        }
        Ok(())
    }

    fn cut(&self, ids: &[u32]) -> Result<Arc<dyn WeightMatrix>> {
        let weight = &self.linear.weights()[0];
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= weight.n) {
            return Err(outside(id, weight.n));
        }
        Ok(self.on.hold(Linear::new(weight.rows(ids), None)))
    }

    fn count(&self, forms: &mut Forms) {
        count(&self.linear, forms);
    }
}

fn count(linear: &Linear, forms: &mut Forms) {
    for weight in linear.weights() {
        *forms.entry(weight.form()).or_default() += weight.bytes();
    }
}

/// Reads a linear layer.
fn linear(from: &dyn Weights, name: &str, [n, k]: [usize; 2], bias: bool) -> Result<Linear> {
    let bias = match bias {
        true => Some(from.vector(&format!("{name}.bias"), n)?),
        false => None,
    };
    let weight = from.matrix(&format!("{name}.weight"), n, k)?;
    Ok(Linear::new(weight, bias))
}

impl Executor for Cpu {
    fn bring(&self, rows: Matrix) -> Result<Matrix> {
        rows.values()?;
        Ok(rows)
    }

    fn vector(&self, from: &dyn Weights, name: &str, n: usize) -> Result<Matrix> {
        Ok(Matrix::host(from.vector(name, n)?, n))
    }

    fn weight(
        &self,
        from: &dyn Weights,
        name: &str,
        shape: [usize; 2],
        bias: bool,
    ) -> Result<Arc<dyn WeightMatrix>> {
        Ok(self.hold(linear(from, name, shape, bias)?))
    }

    fn stack(
        &self,
        from: &dyn Weights,
        layers: &[(String, LayerSpec)],
        positions: usize,
    ) -> Result<Box<dyn Stack>> {
        check_specs(layers)?;
        let read = |(prefix, spec): &(String, LayerSpec)| LayerWeights::read(from, prefix, spec);
        let layers = layers.iter().map(read).collect::<Result<_>>()?;
        Ok(Box::new(CpuStack::new(
            layers,
            positions,
            Arc::clone(&self.pool),
        )))
    }

    fn rms_norm(&self, x: &Matrix, weight: &Matrix, eps: f32, out: &mut Matrix) -> Result<()> {
        let (weight, x_values) = (weight.values()?, x.values()?);
        if weight.is_empty() || !x.columns.is_multiple_of(weight.len()) {
            return Err(Error::Invalid(format!(
                "a norm of {} values over rows of {}",
                weight.len(),
                x.columns
            )));
        }
        let (width, out) = (x.columns, out.sized(x.rows(), x.columns));
        norm(&self.pool, x_values, width, weight, eps, out);
        Ok(())
    }

    fn pool(&self) -> Option<&Arc<Pool>> {
        Some(&self.pool)
    }
}

/// The weights of one decoder layer.
pub struct LayerWeights {
    /// Its shape.
    pub spec: LayerSpec,
    /// Norm before attention, where there is one.
    attention_norm: Option<Vec<f32>>,
    /// Norms of each head of q and of k, where there are.
    qk_norm: Option<[Vec<f32>; 2]>,
    /// q, k and v `[(A + 2 K) E, .]`
    qkv: Linear,
    /// `[H, A E]`
    output: Linear,
    /// Norm before the feed-forward part.
    ffn_norm: Vec<f32>,
    /// `[2 I, H]`
    gate_up: Linear,
    /// `[H, I]`
    down: Linear,
}

impl LayerWeights {
    /// Reads a layer with Hugging Face names below `prefix`.
    pub fn read(from: &dyn Weights, prefix: &str, spec: &LayerSpec) -> Result<Self> {
        let vector = |name: &str, n| from.vector(&format!("{prefix}.{name}.weight"), n);
        let product = |(name, shape, bias): &(&str, [usize; 2], bool)| {
            linear(from, &format!("{prefix}.{name}"), *shape, *bias)
        };
        let [q, k, v, o, gate, up, down] = &spec.products();
        let (h, e) = (spec.hidden, spec.head_dim);
        Ok(Self {
            attention_norm: match spec.input {
                AttentionInput::Normed => Some(vector("input_layernorm", h)?),
                _ => None,
            },
            qk_norm: match spec.qk_norm {
                true => Some([
                    vector("self_attn.q_norm", e)?,
                    vector("self_attn.k_norm", e)?,
                ]),
                false => None,
            },
            qkv: Linear::join(vec![product(q)?, product(k)?, product(v)?])?.settled(),
            output: product(o)?.settled(),
            ffn_norm: vector("post_attention_layernorm", h)?,
            gate_up: Linear::join(vec![product(gate)?, product(up)?])?.settled(),
            down: product(down)?.settled(),
            spec: spec.clone(),
        })
    }

    /// Its products.
    pub fn linears(&self) -> [&Linear; 4] {
        [&self.qkv, &self.output, &self.gate_up, &self.down]
    }

    /// Bytes of its norms.
    fn norm_bytes(&self) -> usize {
        let heads = self.qk_norm.iter().flatten();
        let all = self.attention_norm.iter().chain(heads);
        (all.map(Vec::len).sum::<usize>() + self.ffn_norm.len()) * 4
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
    /// `[M, K E]`, of packed rows
    k: Vec<f32>,
    v: Vec<f32>,
    /// `[M, 2 I]`
    gate_up: Vec<f32>,
    /// `[M, I]`
    inner: Vec<f32>,
}

/// Gives a buffer `len` values; what it held may stay.
fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    buffer.resize(len, 0.0);
    buffer
}

/// Cosines and sines `[positions, E / 2]`.
struct Angles {
    cos: Vec<f32>,
    sin: Vec<f32>,
}

/// Decoder layers on the CPU, with one cache per slot.
///
/// Beside weights in single precision a cache holds single precision; beside those that are rounded more, half
/// precision, which costs attention half the reading.
pub struct CpuStack {
    layers: Vec<LayerWeights>,
    cache_form: CacheForm,
    /// Tables of the ropes that occur, and which of them each layer rotates with.
    angles: Vec<Angles>,
    angles_of: Vec<usize>,
    pool: Arc<Pool>,
    slots: Slots<Vec<KvLayer>>,
    /// Caches of closed slots, whose pages are already there.
    spare: Vec<Vec<KvLayer>>,
    buffers: Buffers,
}

impl CpuStack {
    /// Layers whose slots hold `positions` rows.
    pub fn new(layers: Vec<LayerWeights>, positions: usize, pool: Arc<Pool>) -> Self {
        let linears = layers.iter().flat_map(LayerWeights::linears);
        let wide = |w: &Weight| w.form() == "f32";
        let all_wide = linears.flat_map(Linear::weights).all(wide);
        let cache_form = match all_wide {
            true => CacheForm::F32,
            false => CacheForm::F16,
        };
        let (ropes, angles_of) = occurring(layers.iter().map(|l| &l.spec));
        let table = |(rope, head_dim): (&Rope, usize)| {
            let (cos, sin) = rope.tables(head_dim, positions);
            Angles { cos, sin }
        };
        let angles = ropes.into_iter().map(table).collect();
        Self {
            layers,
            cache_form,
            angles,
            angles_of,
            pool,
            slots: Slots::new(positions),
            spare: Vec::new(),
            buffers: Buffers::default(),
        }
    }

    /// Its layers.
    pub fn layers(&self) -> &[LayerWeights] {
        &self.layers
    }

    /// The threads that work on it.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// One layer: `x` `[M, H]` goes from its input to its output.
    fn layer(
        &mut self,
        layer: usize,
        rows: &[StackRows<'_>],
        views: &[Vec<RowView>],
        x: &mut [f32],
        beside: Option<&[f32]>,
    ) -> Result<()> {
        let (l, b) = (&self.layers[layer], &mut self.buffers);
        let (h, ffn, eps) = (l.spec.hidden, l.spec.ffn, l.spec.eps);
        let m = x.len() / h;
        let taken = match (beside, &l.attention_norm) {
            (Some(beside), _) => beside,
            (_, Some(norm)) => {
                let normed = sized(&mut b.normed, m * h);
                self::norm(&self.pool, x, h, norm, eps, normed);
                normed
            }
            (_, None) => x,
        };
        let qkv = sized(&mut b.qkv, m * l.qkv.n);
        l.qkv.forward(&self.pool, taken, &mut b.scratch, qkv)?;
        self.attend(layer, rows, views)?;
        let (l, b) = (&self.layers[layer], &mut self.buffers);
        let delta = sized(&mut b.delta, m * h);
        l.output
            .forward(&self.pool, &b.mixed, &mut b.scratch, delta)?;
        let (normed, delta) = (sized(&mut b.normed, m * h), &b.delta);
        self.pool
            .rows([&mut *x, &mut *normed], [h, h], SHARE, |r, [x, out]| {
                let delta = &delta[r.start * h..r.end * h];
                add_rms_norm(x, delta, &l.ffn_norm, eps, out);
            });
        let gate_up = sized(&mut b.gate_up, m * 2 * ffn);
        l.gate_up
            .forward(&self.pool, normed, &mut b.scratch, gate_up)?;
        gated(&self.pool, &b.gate_up, ffn, sized(&mut b.inner, m * ffn));
        l.down
            .forward(&self.pool, &b.inner, &mut b.scratch, &mut b.delta)?;
        let delta = &b.delta;
        self.pool.rows([x], [h], SHARE, |r, [x]| {
            add(x, &delta[r.start * h..r.end * h]);
        });
        Ok(())
    }

    /// Rotates q and k, stores k and v, and leaves attention's mix of values in `mixed`.
    fn attend(
        &mut self,
        layer: usize,
        rows: &[StackRows<'_>],
        views: &[Vec<RowView>],
    ) -> Result<()> {
        let LayerWeights { spec, qk_norm, .. } = &self.layers[layer];
        let Angles { cos, sin, .. } = &self.angles[self.angles_of[layer]];
        let (half, kv, q_len) = (spec.head_dim / 2, spec.kv_width(), spec.q_width());
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
                if let Some([q_norm, k_norm]) = qk_norm {
                    let (queries, key) = rotated.split_at_mut(q_len);
                    norm_heads(queries, q_norm, spec.eps, q);
                    norm_heads(key, k_norm, spec.eps, q);
                }
                rope(rotated, &cos[angle.clone()], &sin[angle]);
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
                let (first, skipped) = view.since(spec.window);
                return AttentionRow {
                    cache: &cache[layer],
                    first,
                    contiguous: view.contiguous,
                    scattered: &view.scattered[skipped..],
                };
            }
            unreachable!("no row {i}: `begin` checked that its slot is open")
        };
        let mixed = sized(&mut b.mixed, m * q_len);
        attention(&self.pool, &b.q, m, &row, spec.heads, mixed);
        Ok(())
    }
}

/// Makes the cache of a slot, of which no page is there yet.
fn new_cache(
    layers: &[LayerWeights],
    form: CacheForm,
    capacity: usize,
) -> impl FnOnce() -> Vec<KvLayer> + '_ {
    move || {
        let layer =
            |l: &LayerWeights| KvLayer::new(form, l.spec.kv_heads, l.spec.head_dim, capacity);
        layers.iter().map(layer).collect()
    }
}

/// Rows of a share of what lies between products.
const SHARE: usize = 32;

/// Norms rows of `width` values, or the pieces of them that are as long as `weight`.
fn norm(pool: &Pool, x: &[f32], width: usize, weight: &[f32], eps: f32, out: &mut [f32]) {
    pool.rows([out], [width], SHARE, |r, [out]| {
        rms_norm(&x[r.start * width..r.end * width], weight, eps, out);
    });
}

/// SwiGLU of rows `[gate | up]`.
fn gated(pool: &Pool, x: &[f32], ffn: usize, out: &mut [f32]) {
    pool.rows([out], [ffn], SHARE, |r, [out]| {
        swiglu(&x[r.start * 2 * ffn..r.end * 2 * ffn], ffn, out);
    });
}

/// Norms heads in place; `scratch` has room for them.
fn norm_heads(heads: &mut [f32], norm: &[f32], eps: f32, scratch: &mut [f32]) {
    let scratch = &mut scratch[..heads.len()];
    rms_norm(heads, norm, eps, scratch);
    heads.copy_from_slice(scratch);
}

impl Stack for CpuStack {
    fn capacity(&self) -> usize {
        self.slots.capacity
    }

    fn cache_bytes(&self) -> usize {
        let values = self.layers.iter().map(|l| 2 * l.spec.kv_width());
        values.sum::<usize>() * self.cache_form.bytes()
    }

    fn count(&self, forms: &mut Forms) -> usize {
        let linears = self.layers.iter().flat_map(LayerWeights::linears);
        linears.for_each(|linear| count(linear, forms));
        self.layers.iter().map(LayerWeights::norm_bytes).sum()
    }

    fn open(&mut self, slot: Slot) -> Result<()> {
        let made = new_cache(&self.layers, self.cache_form, self.slots.capacity);
        let spare = &mut self.spare;
        let cache = || Ok(spare.pop().unwrap_or_else(made));
        self.slots.open(slot, cache)
    }

    fn fork(&mut self, from: Slot, to: Slot, count: usize) -> Result<()> {
        let made = new_cache(&self.layers, self.cache_form, self.slots.capacity);
        let spare = &mut self.spare;
        let cache = || Ok(spare.pop().unwrap_or_else(made));
        self.slots.fork([from, to], count, cache, |to, from| {
            let layers = to.iter_mut().zip(from);
            layers.for_each(|(to, from)| to.copy_first(from, count));
            Ok(())
        })
    }

    /// Pages are there once they are written, by head and layer.
    fn slot_bytes(&self, positions: usize) -> usize {
        const PAGE: usize = 4096;
        let (rows, value) = (positions.next_multiple_of(16), self.cache_form.bytes());
        let of_layer = |l: &LayerWeights| {
            // Of keys whole tiles, of values whole registers.
            let widths = [l.spec.head_dim, l.spec.head_dim.next_multiple_of(16)];
            let pages = widths.map(|width| (rows * width * value).next_multiple_of(PAGE));
            l.spec.kv_heads * pages.iter().sum::<usize>()
        };
        self.layers.iter().map(of_layer).sum()
    }

    fn trim(&mut self) {
        self.spare.clear();
    }

    fn close(&mut self, slot: Slot) {
        self.spare.extend(self.slots.close(slot));
    }

    fn commit(&mut self, slot: Slot, path: &[usize]) -> Result<()> {
        self.slots.commit(slot, path, |cache, moves| {
            for layer in cache {
                moves.iter().for_each(|&(from, to)| layer.copy(from, to));
            }
            Ok(())
        })
    }

    fn forward(
        &mut self,
        rows: &[StackRows<'_>],
        x: &mut Matrix,
        beside: Option<&Matrix>,
        on_layer: &mut dyn FnMut(usize, &Matrix),
    ) -> Result<()> {
        let views = self.slots.begin(rows)?;
        let m = views.iter().map(Vec::len).sum::<usize>();
        let first = self.layers.first().map(|l| &l.spec);
        check_input(first, m, x, beside)?;
        let mut beside = beside.map(Matrix::values).transpose()?;
        for layer in 0..self.layers.len() {
            on_layer(layer, x);
            self.layer(layer, rows, &views, x.values_mut()?, beside.take())?;
        }
        on_layer(self.layers.len(), x);
        Ok(())
    }

    fn packed(
        &mut self,
        rows: &PackedRows,
        x: &mut Matrix,
        on_layer: &mut dyn FnMut(usize, &Matrix),
    ) -> Result<()> {
        let first = self.layers.first().map(|l| &l.spec);
        check_packed(first, rows, self.slots.capacity, x)?;
        let positions = rows.positions(0);
        for layer in 0..self.layers.len() {
            on_layer(layer, x);
            self.packed_layer(layer, rows, &positions, x.values_mut()?)?;
        }
        on_layer(self.layers.len(), x);
        Ok(())
    }
}
