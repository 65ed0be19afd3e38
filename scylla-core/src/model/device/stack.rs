//! Decoder layers with their caches on a candle device.

use candle_core::{DType, Tensor};
use candle_nn::ops::{rms_norm, silu, softmax_last_dim};
use candle_nn::rotary_emb::rope_thd;

use super::super::executor::{Forms, Stack, WeightMatrix, check_input, check_packed};
use super::super::files::Weights;
use super::super::rope::{Rope, occurring};
use super::super::slots::{RowView, Slots, StackRows};
use super::super::spec::{AttentionInput, LayerSpec};
use super::{DeviceMatrix, OnDevice};
use crate::plugin::{Matrix, PackedRows, Slot};
use crate::{Error, Result};

/// The weights of one decoder layer.
struct Layer {
    spec: LayerSpec,
    /// Norm before attention, where there is one.
    attention_norm: Option<Tensor>,
    /// Norms of each head of q and of k, where there are.
    qk_norm: Option<[Tensor; 2]>,
    /// q, k and v `[(A + 2 K) E, .]`, in one product or several.
    qkv: Vec<DeviceMatrix>,
    output: Vec<DeviceMatrix>,
    ffn_norm: Tensor,
    /// `[2 I, H]`, in one product or two.
    gate_up: Vec<DeviceMatrix>,
    down: Vec<DeviceMatrix>,
}

/// Runs products that take the same input; their outputs lie side by side, in the precision of `x`.
fn multiply(products: &[DeviceMatrix], x: &Tensor) -> Result<Tensor> {
    let product = |p: &DeviceMatrix| -> Result<Tensor> { Ok(p.forward(x)?.to_dtype(x.dtype())?) };
    match products {
        [one] => product(one),
        several => {
            let all = several.iter().map(product);
            Ok(Tensor::cat(&all.collect::<Result<Vec<_>>>()?, 1)?)
        }
    }
}

/// Cosines and sines `[positions, E / 2]` of a rope.
struct Angles {
    cos: Tensor,
    sin: Tensor,
}

/// What a forward's rows of one slot see, in layers of one window.
struct Mask {
    window: Option<usize>,
    /// Places of the cache that are read.
    first: usize,
    seen: usize,
    /// 0 where a row sees a place, -infinity elsewhere, `[1, 1, n, seen - first]`; absent where all rows see all.
    values: Option<Tensor>,
}

/// What all layers of one forward share.
struct Frame {
    /// Cosines and sines of each row's position, for each rope.
    angles: Vec<(Tensor, Tensor)>,
    /// For each slot one mask per window.
    masks: Vec<Vec<Mask>>,
}

/// Decoder layers on a device, with one cache per slot.
pub(super) struct DeviceStack {
    on: OnDevice,
    layers: Vec<Layer>,
    angles: Vec<Angles>,
    angles_of: Vec<usize>,
    windows: Vec<Option<usize>>,
    /// Of activations and caches.
    dtype: DType,
    kv_heads: usize,
    head_dim: usize,
    /// Keys, then values, of each layer, `[L 2 K, capacity, E]`, written in place.
    slots: Slots<Tensor>,
    /// Caches of closed slots.
    spare: Vec<Tensor>,
}

impl DeviceStack {
    pub(super) fn read(
        on: &OnDevice,
        from: &dyn Weights,
        layers: &[(String, LayerSpec)],
        positions: usize,
    ) -> Result<Self> {
        let Some((_, first)) = layers.first() else {
            return Err(Error::Invalid("a stack of no layers".into()));
        };
        let (kv_heads, head_dim) = (first.kv_heads, first.head_dim);
        if layers
            .iter()
            .any(|(_, l)| (l.kv_heads, l.head_dim) != (kv_heads, head_dim))
        {
            return Err(Error::Unsupported(
                "layers whose kv heads differ, on a device that runs through candle".into(),
            ));
        }
        let read = |(prefix, spec): &(String, LayerSpec)| read_layer(on, from, prefix, spec);
        let mut layers = layers.iter().map(read).collect::<Result<Vec<_>>>()?;
        let products = |l: &Layer| {
            let all = [&l.qkv, &l.output, &l.gate_up, &l.down];
            all.into_iter().flatten().all(|p| p.dtype == DType::BF16)
        };
        let dtype = match layers.iter().all(products) {
            true => DType::BF16,
            false => DType::F32,
        };
        for layer in &mut layers {
            let heads = layer.qk_norm.iter_mut().flatten();
            let norms = layer.attention_norm.iter_mut().chain(heads);
            for norm in norms.chain([&mut layer.ffn_norm]) {
                *norm = norm.to_dtype(dtype)?;
            }
        }
        let (ropes, angles_of) = occurring(layers.iter().map(|l| &l.spec));
        let table = |(rope, head_dim): (&Rope, usize)| -> Result<Angles> {
            let (cos, sin) = rope.tables(head_dim, positions);
            // Built in single precision and rounded last: positions are exact.
            let rounded = |values: Vec<f32>| {
                Tensor::from_vec(values, (positions, head_dim / 2), &on.device)?.to_dtype(dtype)
            };
            Ok(Angles {
                cos: rounded(cos)?,
                sin: rounded(sin)?,
            })
        };
        let angles = ropes.into_iter().map(table).collect::<Result<_>>()?;
        let mut windows = Vec::new();
        for Layer { spec, .. } in &layers {
            if !windows.contains(&spec.window) {
                windows.push(spec.window);
            }
        }
        Ok(Self {
            on: on.clone(),
            layers,
            angles,
            angles_of,
            windows,
            dtype,
            kv_heads,
            head_dim,
            slots: Slots::new(positions),
            spare: Vec::new(),
        })
    }

    /// Makes the cache of a slot, or takes that of a closed one.
    fn new_cache(&mut self) -> impl FnOnce() -> Result<Tensor> + use<> {
        let lines = self.layers.len() * 2 * self.kv_heads;
        let shape = (lines, self.slots.capacity, self.head_dim);
        let (spare, dtype, device) = (self.spare.pop(), self.dtype, self.on.device.clone());
        move || match spare {
            Some(cache) => Ok(cache),
            None => Ok(Tensor::zeros(shape, dtype, &device)?),
        }
    }

    fn frame(&self, views: &[Vec<RowView>]) -> Result<Frame> {
        let positions = views.iter().flatten().map(|v| v.position as u32).collect();
        let of_slot = |views: &Vec<RowView>| {
            let masks = self.windows.iter().map(|&window| self.mask(views, window));
            masks.collect::<Result<Vec<_>>>()
        };
        Ok(Frame {
            angles: self.angles_at(positions)?,
            masks: views.iter().map(of_slot).collect::<Result<_>>()?,
        })
    }

    fn mask(&self, views: &[RowView], window: Option<usize>) -> Result<Mask> {
        let (n, seen) = (views.len(), views.last().map_or(0, |v| v.at + 1));
        let since: Vec<_> = views.iter().map(|v| v.since(window)).collect();
        let first = since.iter().map(|s| s.0).min().unwrap_or(0);
        let width = seen - first;
        let mut values = vec![f32::NEG_INFINITY; n * width];
        for ((view, (begin, skipped)), row) in
            views.iter().zip(since).zip(values.chunks_exact_mut(width))
        {
            row[begin - first..view.contiguous - first].fill(0.0);
            for &place in &view.scattered[skipped..] {
                row[place as usize - first] = 0.0;
            }
        }
        let values = match values.iter().all(|&v| v == 0.0) {
            true => None,
            false => {
                let mask = Tensor::from_vec(values, (1, 1, n, width), &self.on.device)?;
                Some(mask.to_dtype(self.dtype)?)
            }
        };
        Ok(Mask {
            window,
            first,
            seen,
            values,
        })
    }

    /// Attention of all rows `[M, .]` of products q, k and v, whose keys and values are stored.
    fn attend(
        &mut self,
        index: usize,
        rows: &[StackRows<'_>],
        views: &[Vec<RowView>],
        frame: &Frame,
        qkv: &Tensor,
    ) -> Result<Tensor> {
        let spec = &self.layers[index].spec;
        let kv = spec.kv_heads;
        let [q, k, v] = self.by_head(index, &frame.angles, qkv)?;
        let mut mixed = Vec::with_capacity(rows.len());
        let mut row = 0;
        for ((slot, views), masks) in rows.iter().zip(views).zip(&frame.masks) {
            let n = views.len();
            let at = views.first().map_or(0, |view| view.at);
            let cache = &self.slots.get(slot.slot)?.cache;
            let of_slot = |t: &Tensor| t.narrow(1, row, n)?.contiguous();
            let keys = cache.narrow(0, 2 * kv * index, kv)?;
            let values = cache.narrow(0, 2 * kv * index + kv, kv)?;
            keys.slice_set(&of_slot(&k)?, 1, at)?;
            values.slice_set(&of_slot(&v)?, 1, at)?;
            let of_window = |mask: &&Mask| mask.window == spec.window;
            let Some(mask) = masks.iter().find(of_window) else {
                return Err(Error::Invalid("a window without a mask".into()));
            };
            let places = |t: Tensor| t.narrow(1, mask.first, mask.seen - mask.first);
            mixed.push(mix(&of_slot(&q)?, &places(keys)?, &places(values)?, mask)?);
            row += n;
        }
        match &mixed[..] {
            [one] => Ok(one.clone()),
            several => Ok(Tensor::cat(several, 0)?),
        }
    }

    /// Queries, rotated and scaled, rotated keys, and values, of products `[M, .]`, by head `[., M, E]`; of each rope the
    /// cosines and sines of the rows are given.
    fn by_head(
        &self,
        index: usize,
        angles: &[(Tensor, Tensor)],
        qkv: &Tensor,
    ) -> Result<[Tensor; 3]> {
        let Layer { spec, qk_norm, .. } = &self.layers[index];
        let (heads, kv, e) = (spec.heads, spec.kv_heads, spec.head_dim);
        let m = qkv.dim(0)?;
        let qkv = qkv.reshape((m, heads + 2 * kv, e))?;
        let unrotated = match qk_norm {
            None => qkv.narrow(1, 0, heads + kv)?.contiguous()?,
            Some([q_norm, k_norm]) => {
                let part = |first, count, norm| -> Result<Tensor> {
                    let part = qkv.narrow(1, first, count)?.contiguous()?;
                    Ok(rms_norm(&part, norm, spec.eps)?)
                };
                let (q, k) = (part(0, heads, q_norm)?, part(heads, kv, k_norm)?);
                Tensor::cat(&[q, k], 1)?
            }
        };
        let (cos, sin) = &angles[self.angles_of[index]];
        let rotated = rope_thd(&unrotated.unsqueeze(0)?, cos, sin)?.squeeze(0)?;
        let by_head = |t: &Tensor, first, count| t.narrow(1, first, count)?.transpose(0, 1);
        // Scaled, which also lays it out by head: [A, M, E]
        let q = (by_head(&rotated, 0, heads)? / f64::sqrt(e as f64))?;
        let k = by_head(&rotated, heads, kv)?.contiguous()?; // [K, M, E]
        let v = by_head(&qkv, heads + kv, kv)?.contiguous()?;
        Ok([q, k, v])
    }

    /// Cosines and sines of rows' positions, for each rope.
    fn angles_at(&self, positions: Vec<u32>) -> Result<Vec<(Tensor, Tensor)>> {
        let positions = Tensor::new(positions, &self.on.device)?;
        let of_rows = |a: &Angles| -> Result<_> {
            Ok((
                a.cos.index_select(&positions, 0)?,
                a.sin.index_select(&positions, 0)?,
            ))
        };
        self.angles.iter().map(of_rows).collect()
    }

    /// Runs rows through all layers: `attend` gets the layer's number and its products q, k and v.
    fn run(
        &mut self,
        x: &mut Matrix,
        mut beside: Option<&Tensor>,
        on_layer: &mut dyn FnMut(usize, &Matrix),
        mut attend: impl FnMut(&mut Self, usize, &Tensor) -> Result<Tensor>,
    ) -> Result<()> {
        let mut h = x.tensor()?.to_dtype(self.dtype)?.contiguous()?;
        for index in 0..self.layers.len() {
            *x = Matrix::device(h.clone())?;
            on_layer(index, x);
            let l = &self.layers[index];
            let qkv = match (beside.take(), &l.attention_norm) {
                (Some(beside), _) => multiply(&l.qkv, &beside.to_dtype(self.dtype)?.contiguous()?)?,
                (_, Some(norm)) => multiply(&l.qkv, &rms_norm(&h, norm, l.spec.eps)?)?,
                (_, None) => multiply(&l.qkv, &h)?,
            };
            let mixed = attend(self, index, &qkv)?;
            let l = &self.layers[index];
            h = (h + multiply(&l.output, &mixed)?)?;
            let inner = multiply(&l.gate_up, &rms_norm(&h, &l.ffn_norm, l.spec.eps)?)?;
            let half = |first| inner.narrow(1, first, l.spec.ffn);
            let inner = (silu(&half(0)?)? * half(l.spec.ffn)?)?;
            h = (h + multiply(&l.down, &inner)?)?;
        }
        *x = Matrix::device(h)?;
        on_layer(self.layers.len(), x);
        Ok(())
    }
}

/// Softmax attention of packed rows, all lines at once: `q` `[A, M, E]`, scaled, `k` and `v` `[K, M, E]`, and the mask
/// `[B, 1, S, S]`, into `[M, A E]`.
fn mix_packed(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let ((heads, m, e), kv) = (q.dims3()?, k.dim(0)?);
    let (lines, _, s, _) = mask.dims4()?;
    let group = heads / kv;
    // The group is folded into rows, so that keys are never repeated.
    let q = q
        .reshape((kv, group, lines, s, e))?
        .permute((2, 0, 1, 3, 4))?;
    let q = q.contiguous()?.reshape((lines * kv, group * s, e))?;
    let of_lines = |t: &Tensor| -> Result<Tensor> {
        let t = t.reshape((kv, lines, s, e))?.transpose(0, 1)?;
        Ok(t.contiguous()?.reshape((lines * kv, s, e))?)
    };
    let (k, v) = (of_lines(k)?, of_lines(v)?);
    let scores = q.matmul(&k.t()?)?.reshape((lines, heads, s, s))?;
    let scores = scores.broadcast_add(mask)?;
    let p = softmax_last_dim(&scores)?.reshape((lines * kv, group * s, s))?;
    let mixed = p.matmul(&v)?.reshape((lines, heads, s, e))?;
    Ok(mixed.transpose(1, 2)?.reshape((m, heads * e))?)
}

/// Softmax attention of one slot's scaled queries `[A, n, E]` over keys and values `[K, places, E]`, into `[n, A E]`.
fn mix(q: &Tensor, keys: &Tensor, values: &Tensor, mask: &Mask) -> Result<Tensor> {
    let ((heads, n, e), (kv, places, _)) = (q.dims3()?, keys.dims3()?);
    let group = heads / kv;
    // The group is folded into rows, so that keys are never repeated.
    let scores = q.reshape((kv, group * n, e))?.matmul(&keys.t()?)?;
    let scores = match &mask.values {
        None => scores,
        Some(mask) => scores
            .reshape((kv, group, n, places))?
            .broadcast_add(mask)?
            .reshape((kv, group * n, places))?,
    };
    let mixed = softmax_last_dim(&scores)?.matmul(values)?; // [K, group * n, E]
    Ok(mixed
        .reshape((heads, n, e))?
        .transpose(0, 1)?
        .reshape((n, heads * e))?)
}

fn read_layer(on: &OnDevice, from: &dyn Weights, prefix: &str, spec: &LayerSpec) -> Result<Layer> {
    let vector = |name: &str, n| {
        on.vector_of(
            from.vector(&format!("{prefix}.{name}.weight"), n)?,
            DType::F32,
        )
    };
    let products: Vec<(String, [usize; 2], bool)> = spec
        .products()
        .into_iter()
        .map(|(name, shape, bias)| (format!("{prefix}.{name}"), shape, bias))
        .collect();
    let read = |range: std::ops::Range<usize>| on.joined(from, &products[range]);
    Ok(Layer {
        attention_norm: match spec.input {
            AttentionInput::Normed => Some(vector("input_layernorm", spec.hidden)?),
            _ => None,
        },
        qk_norm: match spec.qk_norm {
            true => Some([
                vector("self_attn.q_norm", spec.head_dim)?,
                vector("self_attn.k_norm", spec.head_dim)?,
            ]),
            false => None,
        },
        qkv: read(0..3)?,
        output: read(3..4)?,
        ffn_norm: vector("post_attention_layernorm", spec.hidden)?,
        gate_up: read(4..6)?,
        down: read(6..7)?,
        spec: spec.clone(),
    })
}

impl Stack for DeviceStack {
    fn capacity(&self) -> usize {
        self.slots.capacity
    }

    fn cache_bytes(&self) -> usize {
        let values = self.layers.iter().map(|l| 2 * l.spec.kv_width());
        values.sum::<usize>() * self.dtype.size_in_bytes()
    }

    fn count(&self, forms: &mut Forms) -> usize {
        let mut norms = 0;
        for l in &self.layers {
            let products = [&l.qkv, &l.output, &l.gate_up, &l.down];
            products.into_iter().flatten().for_each(|p| p.count(forms));
            let heads = l.qk_norm.iter().flatten();
            let all = l.attention_norm.iter().chain(heads).chain([&l.ffn_norm]);
            norms += all.map(Tensor::elem_count).sum::<usize>();
        }
        norms * self.dtype.size_in_bytes()
    }

    fn open(&mut self, slot: Slot) -> Result<()> {
        let cache = self.new_cache();
        self.slots.open(slot, cache)
    }

    fn fork(&mut self, from: Slot, to: Slot, count: usize) -> Result<()> {
        let cache = self.new_cache();
        self.slots.fork([from, to], count, cache, |to, from| {
            if count > 0 {
                to.slice_set(&from.narrow(1, 0, count)?.contiguous()?, 1, 0)?;
            }
            Ok(())
        })
    }

    /// A slot's tensor is there whole from the start.
    fn slot_bytes(&self, _positions: usize) -> usize {
        self.slots.capacity * self.cache_bytes()
    }

    fn trim(&mut self) {
        self.spare.clear();
    }

    fn close(&mut self, slot: Slot) {
        self.spare.extend(self.slots.close(slot));
    }

    fn commit(&mut self, slot: Slot, path: &[usize]) -> Result<()> {
        let device = self.on.device.clone();
        self.slots.commit(slot, path, |cache, moves| {
            // From the first that moves on all do, so they end up side by side; all layers at once.
            let from: Vec<u32> = moves.iter().map(|&(from, _)| from as u32).collect();
            let rows = cache.index_select(&Tensor::new(from, &device)?, 1)?;
            cache.slice_set(&rows, 1, moves[0].1)?;
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
        check_input(self.layers.first().map(|l| &l.spec), m, x, beside)?;
        let frame = self.frame(&views)?;
        let beside = beside.map(Matrix::tensor).transpose()?;
        self.run(x, beside, on_layer, |stack, index, qkv| {
            stack.attend(index, rows, &views, &frame, qkv)
        })
    }

    fn packed(
        &mut self,
        rows: &PackedRows,
        x: &mut Matrix,
        on_layer: &mut dyn FnMut(usize, &Matrix),
    ) -> Result<()> {
        let first = self.layers.first().map(|l| &l.spec);
        check_packed(first, rows, self.slots.capacity, x)?;
        let angles = self.angles_at(rows.positions(0))?;
        let mask = |&window: &Option<usize>| rows.mask(window, &self.on.device, self.dtype);
        let masks = self.windows.iter().map(mask).collect::<Result<Vec<_>>>()?;
        self.run(x, None, on_layer, |stack, index, qkv| {
            let [q, k, v] = stack.by_head(index, &angles, qkv)?;
            let window = stack.layers[index].spec.window;
            let at = stack.windows.iter().position(|&w| w == window);
            mix_packed(&q, &k, &v, &masks[at.unwrap_or(0)])
        })
    }
}
