//! A loss that carries a teacher's knowledge to a student with another tokenizer.

use candle_core::Tensor;

use crate::Result;

/// Logits over a batch of texts whose answers are distilled, of a teacher or a student.
#[derive(Debug, Clone)]
pub struct AnswerLogits {
    /// `[B, S, W]`; row `s` predicts the token at `s + 1`.
    pub logits: Tensor,
    /// `[B, S]` i64: the token at each position, -100 where it is not part of the answer.
    pub labels: Tensor,
    /// How many of the `W` columns belong to tokens; those of a padded vocabulary follow and take no part.
    pub vocab: usize,
    /// Ids of all tokens `[B, S]` i64, where the aligner asked for them.
    pub tokens: Option<Tensor>,
    /// Where each answer token lies in the bytes of its answer, `[B]` by answer tokens, where the aligner asked for it.
    pub offsets: Option<Vec<Vec<(usize, usize)>>>,
    /// Hidden states `[B, S, H]`, where the aligner asked for them.
    pub hidden: Option<Tensor>,
}

/// What an aligner needs beside logits and labels.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AlignNeeds {
    /// Ids of all tokens.
    pub tokens: bool,
    /// Byte offsets of the answers' tokens.
    pub offsets: bool,
    /// Hidden states.
    pub hidden: bool,
    /// Nothing of a teacher: the loss is over the student's answers alone.
    pub alone: bool,
    /// The teacher's rows whole, rather than its most probable tokens and those of the answer with the mass of all others.
    pub whole_rows: bool,
    /// All answers of a batch at once: it is no mean over answers that are looked at one by one.
    pub whole_batch: bool,
    /// Its terms are means over the tokens of all answers, so that an answer counts by its length.
    pub by_token: bool,
}

/// Where in training a loss is asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AlignContext {
    /// Optimizer steps done.
    pub step: usize,
}

/// One term of a loss.
#[derive(Debug, Clone)]
pub struct Part {
    /// ce, had, sl, sd, ...
    pub name: &'static str,
    /// What the total multiplies it by.
    pub weight: f64,
    /// Scalar without its weight, differentiable as the total is.
    pub value: Tensor,
}

/// A loss and its parts.
#[derive(Debug, Clone)]
pub struct AlignLoss {
    /// Scalar, the weighted sum of the parts, differentiable with respect to what the student gave.
    pub total: Tensor,
    /// Its terms.
    pub parts: Vec<Part>,
    /// The total's gradient with respect to the student's logits, where it was computed beside it and those are tracked. It is
    /// what `total.backward()` arrives at by way of two more tensors of its size. Who trains by it takes its values: it is made anew for each loss.
    pub gradient: Option<Tensor>,
    /// What else there is to know, by name: how far a matching may be from the best one, or how many tokens took part.
    pub notes: Vec<(&'static str, f64)>,
}

/// A loss that carries a teacher's knowledge to a student with another tokenizer.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use scylla_core::train::{AlignContext, AlignLoss, AlignNeeds, Aligner, AnswerLogits, Part};
///
/// /// The mean squared distance of logits; both must have one tokenizer.
/// struct Distance;
///
/// impl Aligner for Distance {
///     fn needs(&self) -> AlignNeeds {
///         AlignNeeds::default()
///     }
///     fn loss(&self, teacher: &AnswerLogits, student: &AnswerLogits, _: &AlignContext) -> scylla_core::Result<AlignLoss> {
///         let value = (&student.logits - teacher.logits.detach())?.sqr()?.mean_all()?;
///         let part = Part { name: "distance", weight: 1.0, value: value.clone() };
///         Ok(AlignLoss { total: value, parts: vec![part], gradient: None, notes: Vec::new() })
///     }
/// }
///
/// let answer = |value: f32| -> scylla_core::Result<AnswerLogits> {
///     let logits = Tensor::full(value, (1, 2, 3), &Device::Cpu)?;
///     let labels = Tensor::zeros((1, 2), candle_core::DType::I64, &Device::Cpu)?;
///     Ok(AnswerLogits { logits, labels, vocab: 3, tokens: None, offsets: None, hidden: None })
/// };
/// let loss = Distance.loss(&answer(1.0)?, &answer(3.0)?, &AlignContext::default())?;
/// assert_eq!(loss.total.to_scalar::<f32>()?, 4.0);
/// # Ok::<(), scylla_core::Error>(())
/// ```
pub trait Aligner {
    /// What it needs beside logits and labels.
    fn needs(&self) -> AlignNeeds;
    /// The loss of the student's answers against the teacher's. Nothing flows into the teacher.
    fn loss(
        &self,
        teacher: &AnswerLogits,
        student: &AnswerLogits,
        context: &AlignContext,
    ) -> Result<AlignLoss>;
    /// Parameters it trains beside the student's, by name.
    fn parameters(&self) -> Vec<(String, candle_core::Var)> {
        Vec::new()
    }
}
