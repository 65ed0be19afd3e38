//! How drafts are trained: which rows pair with which features and goals, one file per recipe.
//!
//! A recipe turns a batch of packed rows and what the target said of them into losses on a tape. It knows no optimizer, and
//! the optimizer no recipe. What it trains is named as the draft's checkpoint names it, so that trained tensors are exported,
//! resumed and decoded with under one name.

mod eagle;
mod eagle3;
mod held;
mod start;

use std::sync::Arc;

use scylla_core::model::WeightMatrix;
use scylla_core::plugin::{Matrix, Tap};
use scylla_core::train::graph::{Compute, Head, Mix, PackedRows, Parameters, Tape, Value};
use scylla_core::{Error, Result};
use serde::{Deserialize, Serialize};

pub use eagle::{EagleLoss, EagleRecipe};
pub use eagle3::{Eagle3Loss, Eagle3Recipe, Normalise};
pub use held::{held, parameters};
pub use start::{DraftShape, begin_as_target, frequent, new_config, start};

/// The target's most probable tokens after each row, kept in place of what they would be computed from.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TopProbabilities {
    /// How many of each row.
    pub k: usize,
    /// Tokens `[M, k]`, the most probable first.
    pub ids: Vec<u32>,
    /// Their probabilities `[M, k]`.
    pub p: Vec<f32>,
}

/// A batch of packed rows, `M` of them, with what the target said.
pub struct Batch<'a> {
    /// Documents and lines.
    pub rows: &'a PackedRows,
    /// Tokens `[M]`.
    pub tokens: &'a [u32],
    /// Rows that are trained on `[M]`: those of the assistant's tokens, or all.
    pub mask: &'a [bool],
    /// The target's states `[M, H_t]`, one for each of [`Recipe::taps`].
    pub taps: &'a [Matrix],
    /// The target's logits `[M, V]`, where they are given; else they follow from its final state.
    pub logits: Option<&'a Matrix>,
    /// Its most probable tokens, where they were kept: what an EAGLE-3 draft is held against, without the target's final state.
    pub top: Option<&'a TopProbabilities>,
    /// Seed of what is random in this batch.
    pub seed: u64,
    /// Whether rows count whose goal would lie behind the end of their document, as in the reference code: they are held
    /// against a uniform distribution. Training leaves them out.
    pub beyond: bool,
}

impl Batch<'_> {
    fn check(&self, taps: usize) -> Result<()> {
        let m = self.rows.count();
        let whole = |t: &Matrix| t.rows() == m;
        if self.tokens.len() != m
            || self.mask.len() != m
            || self.taps.len() < taps
            || !self.taps.iter().all(whole)
        {
            return Err(Error::Invalid(format!(
                "a batch of {m} rows with {} tokens, {} of a mask and {} states",
                self.tokens.len(),
                self.mask.len(),
                self.taps.len()
            )));
        }
        Ok(())
    }

    /// For each row the token `by` places on in its document; 0 behind its end.
    fn ahead(&self, by: usize) -> Vec<u32> {
        let shifted = self.rows.shifted(by).into_iter();
        shifted
            .map(|row| row.map_or(0, |row| self.tokens[row]))
            .collect()
    }
}

/// What drafts share with their target while they train: frozen, and held once.
#[derive(Clone)]
pub struct TrainHost {
    /// What computes the graph.
    pub on: Compute,
    /// The target's embedding `[V, H]`.
    pub embedding: Arc<dyn WeightMatrix>,
    /// The target's head.
    pub head: Head,
}

impl TrainHost {
    /// Takes the embedding and the head of a target. The head's weight is held as products take it, beside the target's own.
    pub fn new(on: &Compute, tokens: &scylla_core::model::TokenLayers) -> Result<Self> {
        let all: Vec<u32> = (0..tokens.vocab as u32).collect();
        let mut weight = Matrix::default();
        tokens.head.rows(&all, &mut weight)?;
        Ok(Self {
            head: Head::frozen(on, on.bring(&weight)?)?,
            embedding: Arc::clone(&tokens.embedding),
            on: on.clone(),
        })
    }

    fn embed(&self, tokens: &[u32]) -> Result<Value> {
        let mut rows = Matrix::default();
        self.embedding.rows(tokens, &mut rows)?;
        Ok(Value::constant(self.on.bring(&rows)?))
    }
}

/// How far a draft's distribution q is from the target's p.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Distance {
    /// Cross entropy, `-sum p log q`.
    #[default]
    Ce,
    /// `sum p log(p / q)`: the gradient of cross entropy, and a loss that ends at zero.
    Kl,
    /// Total variation, `sum |p - q| / 2`: the probability that a drafted token is refused.
    Tv,
    /// 0.1 of cross entropy and 0.9 of total variation.
    CeTv,
    /// The LK loss, `-log sum min(p, q)`.
    Lk,
}

impl Distance {
    /// Its name, as experiments spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ce => "ce",
            Self::Kl => "kl",
            Self::Tv => "tv",
            Self::CeTv => "ce-tv",
            Self::Lk => "lk",
        }
    }

    /// Its parts.
    pub fn mix(self) -> Mix {
        let none = Mix { ce: 0.0, ..Mix::CE };
        match self {
            Self::Ce => Mix::CE,
            Self::Kl => Mix { kl: 1.0, ..none },
            Self::Tv => Mix { tv: 1.0, ..none },
            Self::CeTv => Mix {
                ce: 0.1,
                tv: 0.9,
                ..none
            },
            Self::Lk => Mix { lk: 1.0, ..none },
        }
    }
}

/// The loss of one step of a training-time test; of other recipes there is one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct StepLoss {
    /// As the recipe normalises it, unweighted.
    pub loss: f64,
    /// Share of the rows trained on whose most probable token is the target's; those that the draft's vocabulary lacks count
    /// as missed.
    pub accuracy: f64,
    /// Rows that count.
    pub count: usize,
}

/// The loss of a batch.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct BatchLoss {
    /// What is trained on.
    pub total: f64,
    /// The same with each step divided by the rows that count in it.
    pub total_by_mask: f64,
    /// Step by step.
    pub steps: Vec<StepLoss>,
    /// Its parts by name, unweighted, where there are several.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<(&'static str, f64)>,
}

/// How a draft is trained.
///
/// ```
/// use scylla_core::plugin::Tap;
/// use scylla_core::train::graph::{Compared, Parameters, Tape, Teacher, Value, cross_entropy, linear};
/// use scylla_draft::recipe::{Batch, BatchLoss, Recipe, StepLoss, TrainHost};
///
/// /// Learns to say from one state of the target what it says next.
/// struct Linear;
///
/// impl Recipe for Linear {
///     fn taps(&self) -> Vec<Tap> {
///         vec![Tap::Final]
///     }
///     fn loss(&self, tape: &mut Tape, named: &mut Parameters<'_>, host: &TrainHost, batch: &Batch<'_>) -> scylla_core::Result<BatchLoss> {
///         let weight = named.get(tape, "fc.weight")?;
///         let state = Value::constant(host.on.bring(&batch.taps[0])?);
///         let state = linear(tape, &state, &weight, None, None)?;
///         let next = batch.rows.shifted(1).into_iter().enumerate();
///         let rows: Vec<Compared> = next
///             .filter_map(|(row, next)| Some(Compared { row, goal: next.filter(|_| batch.mask[row])?, weight: 1.0 }))
///             .collect();
///         let teacher = Teacher::States(&batch.taps[0], &host.head);
///         let found = cross_entropy(tape, &state, &host.head, &teacher, &rows)?;
///         let step = StepLoss { loss: found.sum, accuracy: found.correct as f64 / rows.len() as f64, count: rows.len() };
///         Ok(BatchLoss { total: found.sum, steps: vec![step], ..BatchLoss::default() })
///     }
/// }
/// ```
pub trait Recipe: Send + Sync {
    /// States of the target that it needs of every row.
    fn taps(&self) -> Vec<Tap>;
    /// How many of these, the last ones, only tell what the target says: a batch may come without them where it has
    /// [`Batch::top`] or [`Batch::logits`].
    fn spared(&self) -> usize {
        0
    }
    /// The loss of a batch; the tape is seeded with its gradient. Where no row counts it is 0, and its steps say so.
    ///
    /// # Errors
    /// If the batch does not fit.
    fn loss(
        &self,
        tape: &mut Tape,
        named: &mut Parameters<'_>,
        host: &TrainHost,
        batch: &Batch<'_>,
    ) -> Result<BatchLoss>;
    /// The first pass over a batch: states that recur `[M, H]`, and logits `[M, V_d]`.
    ///
    /// # Errors
    /// As [`Recipe::loss`].
    fn forward(
        &self,
        named: &mut Parameters<'_>,
        host: &TrainHost,
        batch: &Batch<'_>,
    ) -> Result<(Matrix, Matrix)> {
        let _ = (named, host, batch);
        Err(Error::Unsupported(
            "the outputs of this recipe's network".into(),
        ))
    }
}

/// Checks how often a network runs on its own states, and what each time weighs beside the one before.
fn check_unroll(unroll: usize, decay: f64) -> Result<()> {
    match (1..=64).contains(&unroll) && decay > 0.0 && decay <= 1.0 {
        true => Ok(()),
        false => Err(Error::Invalid(format!(
            "loss.unroll {unroll} and loss.decay {decay}: expected 1 to 64 steps, and a share above 0"
        ))),
    }
}
