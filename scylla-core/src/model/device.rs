//! The transformer through candle's tensors, for GPUs; it runs on any candle device.

use std::borrow::Cow;

use candle_core::quantized::{GgmlDType, QMatMul, QStorage, QTensor};
use candle_core::{DType, Device, IndexOp, Module, Tensor};
use candle_nn::ops::{rms_norm, silu, softmax_last_dim};
use candle_nn::rotary_emb::rope;

use super::slots::{RowView, Slots, rows_of};
use super::{LoadOptions, ModelConfig, ModelFiles, WeightForm};
use crate::plugin::{Forward, Matrix, Slot, Step, Tap, TargetModel, TargetShape, Want};
use crate::{Error, Result};

struct Linear {
    weight: QMatMul,
    bias: Option<Tensor>,
    form: &'static str,
    bytes: usize,
}

impl Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.weight.forward(x)?;
        Ok(match &self.bias {
            Some(bias) => y.broadcast_add(bias)?,
            None => y,
        })
    }
}

struct Layer {
    attention_norm: Tensor,
    q: Linear,
    k: Linear,
    v: Linear,
    output: Linear,
    ffn_norm: Tensor,
    gate: Linear,
    up: Linear,
    down: Linear,
}

/// Keys and values of one layer `[K, capacity, E]`, written in place.
struct Cache {
    keys: Tensor,
    values: Tensor,
}

/// A Llama- or Qwen2-style transformer on a candle device, in f32.
pub struct DeviceModel {
    config: ModelConfig,
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    head: Linear,
    cos: Tensor,
    sin: Tensor,
    device: Device,
    slots: Slots<Vec<Cache>>,
}

impl DeviceModel {
    /// Loads the weights in the form the options ask for: blocks as the file stores them, or Q8_0, or single precision,
    /// to which dense weights are widened.
    ///
    /// # Errors
    /// If the form is another one, which would be single precision without a word.
    pub fn load(files: &ModelFiles, options: &LoadOptions) -> Result<Self> {
        let c = &files.config;
        if matches!(options.weights, WeightForm::Bf16 | WeightForm::Q4) {
            return Err(Error::Unsupported(format!(
                "weights in form {} on a device that runs through candle; supported there: as-is, f32, q8_0",
                options.weights
            )));
        }
        let device = options.device.clone();
        let positions = options.positions(c)?;
        let vector = |name: &str, n: usize| -> Result<Tensor> {
            Ok(Tensor::from_vec(
                files.source.vector(name, n, c)?,
                n,
                &device,
            )?)
        };
        let linear = |name: &str, n: usize, k: usize, bias: bool| -> Result<Linear> {
            let bias = if bias {
                Some(vector(&format!("{name}.bias"), n)?)
            } else {
                None
            };
            matrix(files, &format!("{name}.weight"), [n, k], options, bias)
        };
        let (h, q, kv) = (c.hidden, c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let layers = (0..c.layers).map(|i| {
            let at = |name: &str| format!("model.layers.{i}.{name}");
            Ok(Layer {
                attention_norm: vector(&at("input_layernorm.weight"), h)?,
                q: linear(&at("self_attn.q_proj"), q, h, c.qkv_bias)?,
                k: linear(&at("self_attn.k_proj"), kv, h, c.qkv_bias)?,
                v: linear(&at("self_attn.v_proj"), kv, h, c.qkv_bias)?,
                output: linear(&at("self_attn.o_proj"), h, q, false)?,
                ffn_norm: vector(&at("post_attention_layernorm.weight"), h)?,
                gate: linear(&at("mlp.gate_proj"), c.ffn, h, false)?,
                up: linear(&at("mlp.up_proj"), c.ffn, h, false)?,
                down: linear(&at("mlp.down_proj"), h, c.ffn, false)?,
            })
        });
        let layers = layers.collect::<Result<_>>()?;
        let table = "model.embed_tokens.weight";
        let head = if c.tied {
            matrix(files, table, [c.vocab, h], options, None)?
        } else {
            linear("lm_head", c.vocab, h, false)?
        };
        let values = files.source.tensor(table, &[c.vocab, h], c)?.to_f32();
        let (cos, sin) = c.rope_tables(positions);
        let angles = |v: Vec<f32>| Tensor::from_vec(v, (positions, c.head_dim / 2), &device);
        Ok(Self {
            embedding: Tensor::from_vec(values, (c.vocab, h), &device)?,
            norm: vector("model.norm.weight", h)?,
            cos: angles(cos)?,
            sin: angles(sin)?,
            config: c.clone(),
            layers,
            head,
            device,
            slots: Slots::new(positions),
        })
    }

    fn linears(&self) -> impl Iterator<Item = &Linear> {
        let layers = self.layers.iter();
        layers
            .flat_map(|l| [&l.q, &l.k, &l.v, &l.output, &l.gate, &l.up, &l.down])
            .chain([&self.head])
    }

    /// Bytes of weights held.
    pub fn weight_bytes(&self) -> usize {
        let norms = (2 * self.layers.len() + 1) * self.config.hidden * 4;
        let table = self.config.vocab * self.config.hidden * 4;
        self.linears().map(|l| l.bytes).sum::<usize>() + norms + table
    }

    /// The forms of the weights, in order of first use.
    pub fn forms(&self) -> Vec<&'static str> {
        let mut forms = Vec::new();
        for linear in self.linears() {
            if !forms.contains(&linear.form) {
                forms.push(linear.form);
            }
        }
        forms
    }

    /// Attention of one slot's rows `[n, A E]` after their keys and values were stored.
    fn attend(&self, cache: &Cache, q: &Tensor, views: &[RowView]) -> Result<Tensor> {
        let c = &self.config;
        let (n, seen) = (views.len(), views.last().map_or(0, |v| v.at + 1));
        let group = c.heads / c.kv_heads;
        // [A, n, E] -> [K, group * n, E]: the group is folded into rows, so that keys are never repeated.
        let q = q.reshape((c.kv_heads, group * n, c.head_dim))?;
        let keys = cache.keys.narrow(1, 0, seen)?;
        let values = cache.values.narrow(1, 0, seen)?;
        let scores = (q.matmul(&keys.t()?)? / (c.head_dim as f64).sqrt())?;
        let mask = Tensor::from_vec(mask(views, seen), (1, 1, n, seen), &self.device)?;
        let scores = scores
            .reshape((c.kv_heads, group, n, seen))?
            .broadcast_add(&mask)?;
        let weights = softmax_last_dim(&scores)?.reshape((c.kv_heads, group * n, seen))?;
        let mixed = weights.matmul(&values.contiguous()?)?; // [K, group * n, E]
        Ok(mixed
            .reshape((c.heads, n, c.head_dim))?
            .transpose(0, 1)?
            .reshape((n, c.heads * c.head_dim))?)
    }

    fn layer(
        &mut self,
        index: usize,
        x: &Tensor,
        step: &Step<'_>,
        views: &[Vec<RowView>],
        angles: &(Tensor, Tensor),
    ) -> Result<Tensor> {
        let c = self.config.clone();
        let l = &self.layers[index];
        let rows = x.dim(0)?;
        let heads = |t: Tensor, n: usize| -> Result<Tensor> {
            Ok(t.reshape((rows, n, c.head_dim))?
                .transpose(0, 1)?
                .contiguous()?) // [n, M, E]
        };
        let rotate = |t: Tensor| -> Result<Tensor> {
            Ok(rope(&t.unsqueeze(0)?, &angles.0, &angles.1)?.squeeze(0)?)
        };
        let normed = rms_norm(x, &l.attention_norm, c.norm_eps)?;
        let q = rotate(heads(l.q.forward(&normed)?, c.heads)?)?;
        let k = rotate(heads(l.k.forward(&normed)?, c.kv_heads)?)?;
        let v = heads(l.v.forward(&normed)?, c.kv_heads)?;
        let mut mixed = Vec::with_capacity(step.slots.len());
        let mut first = 0;
        for (slot, views) in step.slots.iter().zip(views) {
            let n = views.len();
            let cache = &self.slots.get(slot.slot)?.cache[index];
            let at = views.first().map_or(0, |v| v.at);
            cache
                .keys
                .slice_set(&k.narrow(1, first, n)?.contiguous()?, 1, at)?;
            cache
                .values
                .slice_set(&v.narrow(1, first, n)?.contiguous()?, 1, at)?;
            let cache = Cache {
                keys: cache.keys.clone(),
                values: cache.values.clone(),
            };
            let q = q.narrow(1, first, n)?.contiguous()?;
            mixed.push(self.attend(&cache, &q, views)?);
            first += n;
        }
        let l = &self.layers[index];
        let x = (x + l.output.forward(&Tensor::cat(&mixed, 0)?)?)?;
        let normed = rms_norm(&x, &l.ffn_norm, c.norm_eps)?;
        let inner = (silu(&l.gate.forward(&normed)?)? * l.up.forward(&normed)?)?;
        Ok((x + l.down.forward(&inner)?)?)
    }
}

/// Reads a matrix `[n, k]` onto the device.
fn matrix(
    files: &ModelFiles,
    name: &str,
    [n, k]: [usize; 2],
    options: &LoadOptions,
    bias: Option<Tensor>,
) -> Result<Linear> {
    let device = &options.device;
    let raw = files.source.raw(name, &[n, k], &files.config)?;
    let dense = matches!(raw.dtype, GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16);
    let quantized = |q: QTensor| -> Result<Linear> {
        Ok(Linear {
            form: if q.dtype() == GgmlDType::Q8_0 {
                "q8_0"
            } else {
                "gguf"
            },
            bytes: q.storage_size_in_bytes(),
            weight: QMatMul::QTensor(q.into()),
            bias: bias.clone(),
        })
    };
    match options.weights {
        WeightForm::AsIs if !dense => {
            let storage = QStorage::from_data(Cow::Owned(raw.bytes), device, raw.dtype)?;
            quantized(QTensor::new(storage, (n, k))?)
        }
        form => {
            let values = files.source.tensor(name, &[n, k], &files.config)?.to_f32();
            let tensor = Tensor::from_vec(values, (n, k), device)?;
            if form == WeightForm::Q8_0 && k.is_multiple_of(32) {
                return quantized(QTensor::quantize(&tensor, GgmlDType::Q8_0)?);
            }
            Ok(Linear {
                weight: QMatMul::Tensor(tensor),
                bias,
                form: "f32",
                bytes: n * k * 4,
            })
        }
    }
}

/// 0 where a row sees a position of the cache, -infinity elsewhere, `[n, seen]`.
fn mask(views: &[RowView], seen: usize) -> Vec<f32> {
    let mut mask = vec![f32::NEG_INFINITY; views.len() * seen];
    for (view, row) in views.iter().zip(mask.chunks_exact_mut(seen)) {
        row[..view.contiguous].fill(0.0);
        for &position in &view.scattered {
            row[position as usize] = 0.0;
        }
    }
    mask
}

/// Splits `[M, .]` into one matrix per slot.
fn per_slot(step: &Step<'_>, values: &Tensor) -> Result<Vec<Matrix>> {
    let mut first = 0;
    let mut out = Vec::with_capacity(step.slots.len());
    for slot in &step.slots {
        let n = slot.tokens.len();
        out.push(Matrix::device(values.narrow(0, first, n)?)?);
        first += n;
    }
    Ok(out)
}

impl TargetModel for DeviceModel {
    fn open(&mut self, slot: Slot) -> Result<()> {
        let shape = (
            self.config.kv_heads,
            self.slots.capacity,
            self.config.head_dim,
        );
        let zeros = || Tensor::zeros(shape, DType::F32, &self.device);
        let layer = |_| -> Result<Cache> {
            Ok(Cache {
                keys: zeros()?,
                values: zeros()?,
            })
        };
        let cache = (0..self.config.layers).map(layer).collect::<Result<_>>()?;
        self.slots.open(slot, cache)
    }

    fn close(&mut self, slot: Slot) {
        self.slots.close(slot);
    }

    fn forward(&mut self, step: &Step<'_>) -> Result<Forward> {
        let views = self.slots.begin(&rows_of(step, self.config.vocab)?)?;
        let tokens: Vec<u32> = step.slots.iter().flat_map(|s| s.tokens).copied().collect();
        let positions: Vec<u32> = views.iter().flatten().map(|v| v.position as u32).collect();
        let rows = tokens.len();
        let positions = Tensor::from_vec(positions, rows, &self.device)?;
        let angles = (
            self.cos.index_select(&positions, 0)?,
            self.sin.index_select(&positions, 0)?,
        );
        let tokens = Tensor::from_vec(tokens, rows, &self.device)?;
        let mut x = self.embedding.index_select(&tokens, 0)?;
        let mut states = Vec::new();
        for layer in 0..self.layers.len() {
            states.push((Tap::Input(layer), x.clone()));
            x = self.layer(layer, &x, step, &views, &angles)?;
        }
        states.push((Tap::Input(self.layers.len()), x.clone()));
        let last = rms_norm(&x, &self.norm, self.config.norm_eps)?;
        states.push((Tap::Final, last.clone()));
        let mut taps: Vec<Vec<Matrix>> = vec![Vec::new(); step.slots.len()];
        for tap in step.taps {
            let Some((_, state)) = states.iter().find(|(name, _)| name == tap) else {
                return Err(Error::Invalid(format!(
                    "tap {tap:?} of a model with {} layers",
                    self.layers.len()
                )));
            };
            for (out, matrix) in taps.iter_mut().zip(per_slot(step, state)?) {
                out.push(matrix);
            }
        }
        let mut logits = Vec::with_capacity(step.slots.len());
        let mut first = 0;
        for slot in &step.slots {
            let n = slot.tokens.len();
            logits.push(match slot.want {
                Want::None => Matrix::host(Vec::new(), self.config.vocab),
                Want::Last => {
                    Matrix::device(self.head.forward(&last.i(first + n - 1..first + n)?)?)?
                }
                Want::All => Matrix::device(self.head.forward(&last.narrow(0, first, n)?)?)?,
                Want::Rows(_) => {
                    let rows = slot.want.of(n)?.into_iter().map(|row| (first + row) as u32);
                    let rows = Tensor::new(rows.collect::<Vec<u32>>(), &self.device)?;
                    Matrix::device(self.head.forward(&last.index_select(&rows, 0)?)?)?
                }
            });
            first += n;
        }
        Ok(Forward { logits, taps })
    }

    fn commit(&mut self, slot: Slot, path: &[usize]) -> Result<()> {
        self.slots.commit(slot, path, |cache, from, to| {
            for layer in cache {
                for tensor in [&layer.keys, &layer.values] {
                    // A copy of the row first: source and destination share the tensor.
                    let row = tensor.narrow(1, from, 1)?.force_contiguous()?;
                    tensor.slice_set(&row, 1, to)?;
                }
            }
            Ok(())
        })
    }

    fn shape(&self) -> TargetShape {
        TargetShape {
            context: self.slots.capacity,
            ..self.config.shape()
        }
    }
}
