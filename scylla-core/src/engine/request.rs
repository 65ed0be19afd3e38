//! What is asked of an engine.

use std::sync::Arc;

use super::Draft;
use crate::plugin::{Rules, Verifier};
use crate::sampling::Sampling;
use crate::tree::{Budget, Drawing};
use crate::{Error, Result};

/// Names a request of one engine; they count up from 0, refused ones too.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(transparent)]
pub struct RequestId(pub u64);

/// One sequence to decode, with all that holds for it alone.
#[derive(Clone)]
pub struct Request {
    /// Token ids of the prompt.
    pub prompt: Vec<u32>,
    /// The transform of p and q.
    pub sampling: Sampling,
    /// Seed of its random stream.
    pub seed: u64,
    /// Keys the stream beside the seed: requests of one seed draw different tokens, and the same in any company.
    pub sequence: u64,
    /// Limit of new tokens, at least 1.
    pub max_new_tokens: usize,
    /// Ids that end it; empty to ignore them.
    pub eos: Vec<u32>,
    /// Texts that end it. They need a tokenizer.
    pub stops: Vec<String>,
    /// Limits of its trees; the engine's policy chooses within them.
    pub budget: Budget,
    /// The acceptance rule; `None` leaves the choice to the engine's [`Rules`].
    pub rule: Option<Arc<dyn Verifier>>,
    /// Accepts a rule that is not exact for the draft's trees.
    pub lossy: bool,
    /// Tokens the tokenizer knows; logits beyond are padding. `None` takes the model's vocabulary.
    pub known_tokens: Option<usize>,
    /// Whether trees and verdicts are told, as [`super::Event::Cycle`].
    pub trees: bool,
}

impl Default for Request {
    /// Greedy, 128 new tokens, chains of eight where something drafts.
    fn default() -> Self {
        Self {
            prompt: Vec::new(),
            sampling: Sampling::default(),
            seed: 0,
            sequence: 0,
            max_new_tokens: 128,
            eos: Vec::new(),
            stops: Vec::new(),
            budget: Budget::chain(8),
            rule: None,
            lossy: false,
            known_tokens: None,
            trees: false,
        }
    }
}

/// How a request is decoded: settled when it is submitted.
#[derive(Clone)]
pub(super) struct Settled {
    pub(super) rule: Arc<dyn Verifier>,
    /// How its trees will be drawn, each in one of these ways.
    pub(super) drawings: Vec<Drawing>,
}

impl Request {
    /// Checks what does not hang on the prompt.
    pub(super) fn check(&self, vocab: usize, tokenizer: bool) -> Result<()> {
        self.sampling.check()?;
        self.budget.check()?;
        let invalid = |message: String| Err(Error::Invalid(message));
        if self.max_new_tokens == 0 {
            return invalid("max_new_tokens 0 must be at least 1".into());
        }
        if !self.stops.is_empty() && !tokenizer {
            return invalid("stop strings need a tokenizer".into());
        }
        if self.stops.iter().any(String::is_empty) {
            return invalid("a stop string is empty".into());
        }
        let known = self.known_tokens;
        if known.is_some_and(|known| known == 0 || known > vocab) {
            return invalid(format!("{known:?} known tokens of a vocabulary of {vocab}"));
        }
        Ok(())
    }

    /// Checks the prompt against a model.
    pub(super) fn check_prompt(&self, context: usize, vocab: usize) -> Result<()> {
        let invalid = |message: String| Err(Error::Invalid(message));
        if self.prompt.is_empty() {
            return invalid("the prompt is empty".into());
        }
        if self.prompt.len() >= context {
            return invalid(format!(
                "the prompt has {} tokens; the context of {context} leaves no room for an answer",
                self.prompt.len()
            ));
        }
        match self.prompt.iter().find(|&&t| t as usize >= vocab) {
            Some(token) => invalid(format!(
                "the prompt holds token {token}, outside the vocabulary of {vocab}"
            )),
            None => Ok(()),
        }
    }

    /// Chooses the rule, and checks that it is exact where nothing is drafted, which is so for the first token of every
    /// answer, and for the trees that `draft` will propose.
    pub(super) fn settle(&self, rules: &dyn Rules, draft: Option<&Draft<'_>>) -> Result<Settled> {
        let drawing = draft.map_or(Drawing::Deterministic, |d| d.model.drawing(&self.sampling));
        let mut drawings = vec![drawing];
        if draft.is_some_and(|d| d.model.mixes(&self.sampling)) {
            drawings.push(Drawing::Deterministic);
        }
        let width = match draft {
            Some(_) if self.budget.levels() > 0 => self.budget.width,
            _ => 0,
        };
        let rule = match &self.rule {
            Some(rule) => Arc::clone(rule),
            None => rules.choose(drawing, width, &self.sampling),
        };
        if !self.lossy {
            check_sampling(&*rule, &self.sampling)?;
            if let Some(draft) = draft.filter(|_| width > 0) {
                let each = drawings.iter();
                each.copied().try_for_each(|drawing| {
                    check_width(&*rule, &draft.name, drawing, width, &self.sampling)
                })?;
            }
        }
        Ok(Settled { rule, drawings })
    }
}

fn check_sampling(rule: &dyn Verifier, sampling: &Sampling) -> Result<()> {
    let drawings = [
        Drawing::Deterministic,
        Drawing::Independent,
        Drawing::WithoutReplacement,
    ];
    match drawings.iter().any(|&d| rule.exact_for(d, 0, sampling)) {
        true => Ok(()),
        false => Err(Error::NotSampling {
            rule: rule.name().into(),
            temperature: sampling.temperature,
        }),
    }
}

pub(super) fn check_width(
    rule: &dyn Verifier,
    draft: &str,
    drawing: Drawing,
    width: usize,
    sampling: &Sampling,
) -> Result<()> {
    match rule.exact_for(drawing, width, sampling) {
        true => Ok(()),
        false => Err(not_exact(
            rule,
            draft,
            format!("trees of width {width} ({drawing})"),
        )),
    }
}

pub(super) fn not_exact(rule: &dyn Verifier, draft: &str, proposals: String) -> Error {
    Error::NotExact {
        rule: rule.name().into(),
        draft: draft.into(),
        proposals,
    }
}
