//! Decoder layers in the graph: the third executor of [`LayerSpec`], differentiable and without a cache.

use std::collections::BTreeMap;

use super::{
    Angles, Compute, Gradients, PackedRows, Tape, Value, attention, linear, rms_norm, rotary,
    swiglu,
};
use crate::model::{AttentionInput, LayerSpec};
use crate::plugin::Matrix;
use crate::{Error, Result};

/// Named parameters on a tape: each becomes a leaf when it is first used.
#[derive(Default)]
pub struct Parameters<'a> {
    values: Option<&'a BTreeMap<String, Matrix>>,
    leaves: BTreeMap<String, Value>,
}

impl<'a> Parameters<'a> {
    /// Parameters by name; matrices `[N, K]`, vectors `[1, N]`.
    pub fn new(values: &'a BTreeMap<String, Matrix>) -> Self {
        Self {
            values: Some(values),
            leaves: BTreeMap::new(),
        }
    }

    /// Lets a value stand for a parameter: another one's, or one that does not train.
    pub fn set(&mut self, name: &str, value: Value) {
        self.leaves.insert(name.to_string(), value);
    }

    /// One of them.
    ///
    /// # Errors
    /// If there is none of that name.
    pub fn get(&mut self, tape: &mut Tape, name: &str) -> Result<Value> {
        if let Some(value) = self.leaves.get(name) {
            return Ok(value.clone());
        }
        let Some(matrix) = self.values.and_then(|v| v.get(name)) else {
            return Err(Error::Invalid(format!("no parameter `{name}`")));
        };
        let value = tape.leaf(matrix.clone());
        self.leaves.insert(name.to_string(), value.clone());
        Ok(value)
    }

    /// Whether there is one of that name.
    pub fn has(&self, name: &str) -> bool {
        self.leaves.contains_key(name) || self.values.is_some_and(|v| v.contains_key(name))
    }

    /// The gradients that came, by name; zeros where none did.
    pub fn gradients(
        &self,
        on: &Compute,
        from: &mut Gradients,
    ) -> Result<BTreeMap<String, Matrix>> {
        let of = |(name, value): (&String, &Matrix)| {
            let found = self.leaves.get(name).and_then(|leaf| from.take(leaf));
            let grad = match found {
                Some(grad) => grad,
                None => on.zeros(value.rows(), value.columns)?,
            };
            Ok((name.clone(), grad))
        };
        self.values.into_iter().flatten().map(of).collect()
    }
}

/// Keys and values of the steps of a training-time test, layer by layer.
#[derive(Default)]
pub struct StepCache {
    layers: Vec<Vec<(Value, Value)>>,
}

impl StepCache {
    /// Steps that it holds.
    pub fn steps(&self) -> usize {
        self.layers.first().map_or(0, Vec::len)
    }
}

/// Decoder layers with the prefixes of their parameters' names.
pub struct GraphStack {
    layers: Vec<(String, LayerSpec)>,
}

impl GraphStack {
    /// Layers as their parameters are named.
    pub fn new(layers: Vec<(String, LayerSpec)>) -> Result<Self> {
        let flaw = |(prefix, spec): &(String, LayerSpec)| {
            Some(format!("layer {prefix}: {}", spec.flaw()?))
        };
        match layers.iter().find_map(flaw) {
            Some(flaw) => Err(Error::Invalid(flaw)),
            None => Ok(Self { layers }),
        }
    }

    /// Runs rows `x` `[M, H]` through all layers; `beside` is what the first layer's attention takes where its spec says so.
    /// Step `i` of a training-time test sees step 0 as a causal sequence and of the later ones its own rows, which `cache`
    /// keeps; positions move on by one a step. A single pass is step 0 of a fresh cache.
    pub fn forward(
        &self,
        tape: &mut Tape,
        parameters: &mut Parameters<'_>,
        rows: &PackedRows,
        cache: &mut StepCache,
        x: &Value,
        beside: Option<&Value>,
    ) -> Result<Value> {
        cache.layers.resize_with(self.layers.len(), Vec::new);
        let step = cache.steps();
        let positions = rows.positions(step);
        let mut x = x.clone();
        let mut angles: Vec<(&LayerSpec, Angles)> = Vec::new();
        for ((prefix, spec), kept) in self.layers.iter().zip(&mut cache.layers) {
            let same =
                |(s, _): &&(&LayerSpec, Angles)| s.rope == spec.rope && s.head_dim == spec.head_dim;
            let turned = match angles.iter().find(same) {
                Some((_, angles)) => angles.clone(),
                None => {
                    let made = Angles::new(&tape.on, &spec.rope, spec.head_dim, &positions)?;
                    angles.push((spec, made.clone()));
                    made
                }
            };
            let mut layer = Layer {
                tape: &mut *tape,
                parameters: &mut *parameters,
                prefix,
                spec,
            };
            x = layer.forward(rows, &turned, kept, &x, beside)?;
        }
        Ok(x)
    }
}

/// One layer on a tape.
struct Layer<'a, 'p> {
    tape: &'a mut Tape,
    parameters: &'a mut Parameters<'p>,
    prefix: &'a str,
    spec: &'a LayerSpec,
}

impl Layer<'_, '_> {
    fn parameter(&mut self, name: &str) -> Result<Value> {
        self.parameters
            .get(self.tape, &format!("{}.{name}", self.prefix))
    }

    fn product(&mut self, name: &str, x: &Value, residual: Option<&Value>) -> Result<Value> {
        let weight = self.parameter(&format!("{name}.weight"))?;
        let biased = self
            .spec
            .products()
            .iter()
            .any(|(n, _, bias)| *n == name && *bias);
        let bias = match biased {
            true => Some(self.parameter(&format!("{name}.bias"))?),
            false => None,
        };
        linear(self.tape, x, &weight, bias.as_ref(), residual)
    }

    fn norm(&mut self, name: &str, x: &Value) -> Result<Value> {
        let weight = self.parameter(&format!("{name}.weight"))?;
        rms_norm(self.tape, x, &weight, self.spec.eps)
    }

    fn forward(
        &mut self,
        rows: &PackedRows,
        angles: &Angles,
        kept: &mut Vec<(Value, Value)>,
        x: &Value,
        beside: Option<&Value>,
    ) -> Result<Value> {
        let taken = match (self.spec.input, beside) {
            (AttentionInput::Normed, _) => self.norm("input_layernorm", x)?,
            (AttentionInput::Bare, _) => x.clone(),
            (AttentionInput::Beside(width), Some(beside)) if beside.columns() == width => {
                beside.clone()
            }
            (AttentionInput::Beside(width), given) => {
                return Err(Error::Invalid(format!(
                    "layer {} takes {width} values beside the residual stream; given {:?}",
                    self.prefix,
                    given.map(Value::columns)
                )));
            }
        };
        let mut q = self.product("self_attn.q_proj", &taken, None)?;
        let mut k = self.product("self_attn.k_proj", &taken, None)?;
        let v = self.product("self_attn.v_proj", &taken, None)?;
        if self.spec.qk_norm {
            q = self.norm("self_attn.q_norm", &q)?;
            k = self.norm("self_attn.k_norm", &k)?;
        }
        q = rotary(self.tape, &q, angles)?;
        k = rotary(self.tape, &k, angles)?;
        kept.push((k, v));
        let mixed = attention(self.tape, &q, kept, rows, self.spec)?;
        let x = self.product("self_attn.o_proj", &mixed, Some(x))?;
        let normed = self.norm("post_attention_layernorm", &x)?;
        let gate = self.product("mlp.gate_proj", &normed, None)?;
        let up = self.product("mlp.up_proj", &normed, None)?;
        let inner = swiglu(self.tape, &gate, &up)?;
        self.product("mlp.down_proj", &inner, Some(&x))
    }
}
