//! A whole language model in the graph: what is distilled into.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::graph::{
    Compute, GraphStack, Head, PackedRows, Parameters, StepCache, Tape, Value, embedding, rms_norm,
};
use super::optimizer::Named;
use crate::model::{ModelConfig, Weights};
use crate::{Error, Result};

const EMBEDDING: &str = "model.embed_tokens.weight";
const NORM: &str = "model.norm.weight";
const HEAD: &str = "lm_head.weight";

/// A language model whose every weight trains, under the names that its checkpoint has.
pub struct Language {
    config: ModelConfig,
    stack: GraphStack,
}

impl Language {
    /// A model of this shape.
    ///
    /// # Errors
    /// If its layers do not fit together.
    pub fn new(config: &ModelConfig) -> Result<Self> {
        let layers = config.layers.iter().enumerate();
        let layers = layers.map(|(i, spec)| (format!("model.layers.{i}"), spec.clone()));
        Ok(Self {
            config: config.clone(),
            stack: GraphStack::new(layers.collect())?,
        })
    }

    /// Its shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Random parameters by seed, as Llama begins: norms are ones, biases zeros, weights normal with a deviation of 0.02.
    ///
    /// # Errors
    /// If memory cannot be had on a device.
    pub fn start(&self, seed: u64, on: &Compute) -> Result<Named> {
        let mut random = StdRng::seed_from_u64(seed);
        let mut named = Named::new();
        for (name, shape) in self.config.tensors() {
            let count = shape.iter().product();
            let values = match shape.len() {
                1 if name.ends_with("bias") => vec![0.0; count],
                1 => vec![1.0; count],
                _ => (0..count).map(|_| SPREAD * normal(&mut random)).collect(),
            };
            let columns = shape.last().copied().unwrap_or(1);
            named.insert(name, on.matrix(values, columns)?);
        }
        Ok(named)
    }

    /// Parameters as a model's files hold them, widened.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape.
    pub fn read(&self, from: &dyn Weights, on: &Compute) -> Result<Named> {
        let mut named = Named::new();
        for (name, shape) in self.config.tensors() {
            let found = from.find(&name, &shape)?;
            let values = match shape.len() {
                1 => found.vector()?,
                _ => found.weight()?.to_f32(),
            };
            let columns = shape.last().copied().unwrap_or(1);
            named.insert(name, on.matrix(values, columns)?);
        }
        Ok(named)
    }

    /// The normalised states `[M, H]` behind the last layer.
    ///
    /// # Errors
    /// If a token is outside the vocabulary, or a parameter is missing.
    pub fn states(
        &self,
        tape: &mut Tape,
        named: &mut Parameters<'_>,
        rows: &PackedRows,
        tokens: &[u32],
    ) -> Result<Value> {
        let longest = rows.documents.iter().map(|d| d.len()).max().unwrap_or(0);
        if longest > self.config.context {
            return Err(Error::Invalid(format!(
                "a text of {longest} tokens; the context is {}",
                self.config.context
            )));
        }
        let table = named.get(tape, EMBEDDING)?;
        let x = embedding(tape, &table, tokens)?;
        let cache = &mut StepCache::default();
        let x = self.stack.forward(tape, named, rows, cache, &x, None)?;
        let norm = named.get(tape, NORM)?;
        rms_norm(tape, &x, &norm, self.config.norm_eps)
    }

    /// What turns them into logits.
    ///
    /// # Errors
    /// If the parameter is missing.
    pub fn head(&self, tape: &mut Tape, named: &mut Parameters<'_>) -> Result<Head> {
        let name = if self.config.tied { EMBEDDING } else { HEAD };
        Ok(Head::trained(&named.get(tape, name)?))
    }
}

/// Spread of random weights.
const SPREAD: f32 = 0.02;

/// A normal number (Box and Muller), the same on every machine but for the last digits of its logarithm and cosine.
pub fn normal(random: &mut StdRng) -> f32 {
    let (u, v) = (1.0 - random.random::<f64>(), random.random::<f64>());
    ((-2.0 * u.ln()).sqrt() * (2.0 * std::f64::consts::PI * v).cos()) as f32
}
