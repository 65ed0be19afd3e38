//! What a draft is worth: tau on dev prompts, walked along the target's own answers and decoded for real.
//!
//! Both take the draft as it is exported, grown into the trees that will serve, with the target's states as the engine makes
//! them. On the CPU the two are the same number at temperature 0; where they are not, something is wrong, and the user is told.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use scylla_core::chance::Seeded;
use scylla_core::engine::{
    Cycle, Draft, Engine, Finish, Options, Output, Parts, Request, Walk, decode, tau, walk,
};
use scylla_core::plugin::{
    Committed, DraftModel, Matrix, Request as Asked, SlotRows, Step, Tap, TargetModel, Want,
};
use scylla_core::policy::FixedBudget;
use scylla_core::sampling::Sampling;
use scylla_core::text::Message;
use scylla_core::tree::{Budget, Drawing};
use scylla_verify::Auto;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::experiment::{EvaluateSpec, TrainExperiment};
use crate::prompts;
use crate::session::Session;
use crate::stats::alpha;
use crate::{Error, Result};

/// The target's own answer to a prompt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The prompt's id.
    pub id: String,
    /// Prompt and answer.
    pub text: Vec<u32>,
    /// Tokens of the prompt.
    pub prompt: usize,
}

/// Both numbers, bonus included: plain decoding is 1.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Tau {
    /// Walked along the target's own answers.
    pub simulated: f64,
    /// Decoded with the draft.
    pub real: f64,
}

/// What a draft is worth on one prompt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PromptTau {
    /// The prompt's id.
    pub id: String,
    /// Mean tokens per cycle, decoded with the draft.
    pub tau: f64,
    /// Tokens and cycles that it is the ratio of.
    pub tokens: usize,
    /// See above.
    pub cycles: usize,
    /// Acceptance by depth given the depth above.
    pub alpha: Vec<Option<f64>>,
}

impl PromptTau {
    /// Of the cycles of one answer.
    pub(crate) fn of(id: &str, cycles: &[Cycle]) -> Self {
        Self {
            id: id.into(),
            tau: tau(cycles).unwrap_or(1.0),
            tokens: cycles.iter().map(|c| c.committed).sum(),
            cycles: cycles.len(),
            alpha: alpha(cycles.iter()),
        }
    }
}

/// The slot that texts are walked in: no engine runs meanwhile.
pub(crate) const SLOT: usize = 0;

/// Dev prompts with the target's own answers, and how decoders are run on them.
pub struct Tester {
    /// The answers.
    pub answers: Vec<Answer>,
    budget: Budget,
    sampling: Sampling,
    max_new_tokens: usize,
    batch: usize,
    seed: u64,
    eos: Vec<u32>,
    known: usize,
}

/// A chosen prompt's tokens.
fn chosen(session: &Session, spec: &EvaluateSpec) -> Result<Vec<(String, Vec<u32>)>> {
    let mut all = prompts::select(prompts::load(&spec.prompts.set)?, &spec.prompts)?;
    // Of a limited number some of every task.
    if spec.count > 0 && spec.count < all.len() {
        let stride = all.len() as f64 / spec.count as f64;
        let kept: Vec<usize> = (0..spec.count)
            .map(|i| (i as f64 * stride) as usize)
            .collect();
        let mut at = 0;
        all.retain(|_| {
            at += 1;
            kept.contains(&(at - 1))
        });
    }
    let mut found = Vec::new();
    for prompt in all {
        let system = prompt.system.iter().map(Message::system);
        let messages: Vec<Message> = system
            .chain(prompt.turns.first().map(Message::user))
            .collect();
        let ids = session.prompt(&messages, &spec.prompts)?;
        let context = session.target.model.shape().context;
        if ids.len() + spec.max_new_tokens <= context {
            found.push((prompt.id, ids));
        }
    }
    match found.is_empty() {
        true => Err(Error::Experiment(format!(
            "no prompt of set `{}` leaves room for {} new tokens",
            spec.prompts.set, spec.max_new_tokens
        ))),
        false => Ok(found),
    }
}

impl Tester {
    /// Decodes the answers that drafts will be held against.
    ///
    /// # Errors
    /// If no prompt can be decoded; if broken off.
    pub fn new(
        session: &mut Session,
        experiment: &TrainExperiment,
        stop: &AtomicBool,
    ) -> Result<Self> {
        let spec = &experiment.evaluate;
        let asked = chosen(session, spec)?;
        let mut tester = Self {
            answers: Vec::new(),
            budget: spec.budget.limits(),
            sampling: Sampling::default(),
            max_new_tokens: spec.max_new_tokens,
            batch: spec.batch,
            seed: experiment.run.seed,
            eos: session.eos.clone(),
            known: session.known_tokens(),
        };
        tester.answers = tester.answers_to(session, asked, stop)?;
        Ok(tester)
    }

    /// Grows trees within other limits from now on.
    pub fn limit(&mut self, budget: Budget) {
        self.budget = budget;
    }

    /// A hash over the prompts.
    pub fn hash(&self) -> String {
        let mut hash = Sha256::new();
        for answer in &self.answers {
            hash.update(answer.id.as_bytes());
            answer.text[..answer.prompt]
                .iter()
                .for_each(|t| hash.update(t.to_le_bytes()));
        }
        hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
    }

    /// Decodes from now on with other draws.
    pub fn reseed(&mut self, seed: u64) {
        self.seed = seed;
    }

    /// Answers drawn anew, under a sampling setting and a seed.
    ///
    /// # Errors
    /// As [`Tester::new`].
    pub fn sampled(
        &mut self,
        session: &mut Session,
        sampling: Sampling,
        seed: u64,
        stop: &AtomicBool,
    ) -> Result<()> {
        (self.sampling, self.seed) = (sampling, seed);
        let prompt = |a: &Answer| (a.id.clone(), a.text[..a.prompt].to_vec());
        let asked = self.answers.iter().map(prompt).collect();
        self.answers = self.answers_to(session, asked, stop)?;
        Ok(())
    }

    fn answers_to(
        &self,
        session: &mut Session,
        asked: Vec<(String, Vec<u32>)>,
        stop: &AtomicBool,
    ) -> Result<Vec<Answer>> {
        let prompts: Vec<Vec<u32>> = asked.iter().map(|(_, ids)| ids.clone()).collect();
        let outputs = self.decoded(session, None, &prompts, stop)?;
        let answer = |((id, ids), output): ((String, Vec<u32>), Output)| Answer {
            id,
            prompt: ids.len(),
            text: [ids, output.ids].concat(),
        };
        Ok(asked.into_iter().zip(outputs).map(answer).collect())
    }

    /// Decodes prompts, plainly or with a draft.
    fn decoded(
        &self,
        session: &mut Session,
        draft: Option<&mut Box<dyn DraftModel>>,
        prompts: &[Vec<u32>],
        stop: &AtomicBool,
    ) -> Result<Vec<Output>> {
        let parts = Parts {
            target: Box::new(&mut session.target.model),
            draft: draft.map(|model| Draft::new("trained", model)),
            rules: Arc::new(Auto),
            policy: Box::new(FixedBudget),
            tokenizer: None,
        };
        let options = Options {
            batch: self.batch,
            ..Options::default()
        };
        let mut engine = Engine::new(parts, options)?;
        let request = |(sequence, prompt): (usize, &Vec<u32>)| Request {
            prompt: prompt.clone(),
            sampling: self.sampling.clone(),
            seed: self.seed,
            sequence: sequence as u64,
            max_new_tokens: self.max_new_tokens,
            eos: self.eos.clone(),
            budget: self.budget,
            known_tokens: Some(self.known),
            ..Request::default()
        };
        let requests = prompts.iter().enumerate().map(request).collect();
        let outputs = decode(
            &mut engine,
            requests,
            &mut |_| match stop.load(Ordering::Relaxed) {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            },
        );
        for output in &outputs {
            match (&output.failed, output.finish) {
                (Some(reason), _) => {
                    return Err(Error::Experiment(format!("a dev prompt: {reason}")));
                }
                (None, Finish::Interrupted) => return Err(Error::Interrupted(String::new())),
                _ => {}
            }
        }
        Ok(outputs)
    }

    /// Decodes the dev prompts with a draft: the cycles of each.
    ///
    /// # Errors
    /// If a prompt fails; if broken off.
    pub fn real(
        &self,
        session: &mut Session,
        draft: &mut Box<dyn DraftModel>,
        stop: &AtomicBool,
    ) -> Result<Vec<Vec<Cycle>>> {
        let prompts: Vec<Vec<u32>> = self
            .answers
            .iter()
            .map(|a| a.text[..a.prompt].to_vec())
            .collect();
        let outputs = self.decoded(session, Some(draft), &prompts, stop)?;
        Ok(outputs.into_iter().map(|o| o.cycles).collect())
    }

    /// Walks a draft along the answers: the cycles of each.
    ///
    /// # Errors
    /// If target or draft fail; if broken off.
    pub fn simulated(
        &self,
        session: &mut Session,
        draft: &mut Box<dyn DraftModel>,
        stop: &AtomicBool,
    ) -> Result<Vec<Vec<Cycle>>> {
        if !self.sampling.is_greedy() && draft.drawing(&self.sampling) != Drawing::Deterministic {
            return Err(Error::Experiment(
                "a walk along sampled text needs trees whose children are not drawn at random"
                    .into(),
            ));
        }
        let taps = draft.taps();
        let mut all = Vec::new();
        for (i, answer) in self.answers.iter().enumerate() {
            if stop.load(Ordering::Relaxed) {
                return Err(Error::Interrupted(String::new()));
            }
            let states = states_of(&mut session.target.model, &answer.text, &taps)?;
            let context = session.target.model.shape().context;
            draft.open(SLOT)?;
            let cycles = self.along(draft, answer, &states, context, i as u64);
            draft.close(SLOT);
            all.push(cycles?);
        }
        Ok(all)
    }

    /// The cycles of a draft along one answer, from the target's states of its text.
    pub(crate) fn along(
        &self,
        draft: &mut Box<dyn DraftModel>,
        answer: &Answer,
        states: &[Matrix],
        context: usize,
        sequence: u64,
    ) -> Result<Vec<Cycle>> {
        let mut chance = Seeded::new(self.seed, sequence);
        let mut told = 0;
        let along = Walk {
            text: &answer.text,
            prompt: answer.prompt,
            budget: self.budget,
            max_new_tokens: self.max_new_tokens,
            context,
        };
        let cycles = walk(&along, &mut |root, budget| {
            tell(draft, &answer.text, states, &mut told, root)?;
            chance.at(root + 1);
            let asked = Asked {
                slot: SLOT,
                root: answer.text[root],
                budget,
                sampling: &self.sampling,
                chance: &mut chance,
            };
            let mut trees = draft.propose(&mut [asked])?;
            trees
                .pop()
                .ok_or_else(|| scylla_core::Error::Invalid("the draft proposed no tree".into()))
        })?;
        Ok(cycles)
    }

    /// Both numbers.
    ///
    /// # Errors
    /// As [`Tester::real`] and [`Tester::simulated`].
    pub fn test(
        &self,
        session: &mut Session,
        draft: &mut Box<dyn DraftModel>,
        stop: &AtomicBool,
    ) -> Result<Tau> {
        Ok(self.judge(session, draft, stop)?.0)
    }

    /// Both numbers, and the real one prompt by prompt.
    ///
    /// # Errors
    /// As [`Tester::test`].
    pub fn judge(
        &self,
        session: &mut Session,
        draft: &mut Box<dyn DraftModel>,
        stop: &AtomicBool,
    ) -> Result<(Tau, Vec<PromptTau>)> {
        let simulated = self.simulated(session, draft, stop)?.concat();
        let real = self.real(session, draft, stop)?;
        let pairs = self.answers.iter().zip(&real);
        let by_prompt = pairs.map(|(a, c)| PromptTau::of(&a.id, c)).collect();
        let both = Tau {
            simulated: tau(&simulated).unwrap_or(1.0),
            real: tau(&real.concat()).unwrap_or(1.0),
        };
        Ok((both, by_prompt))
    }
}

/// Tells a draft of a text what comes up to a root, behind what it was told. Tokens run one ahead of states: those up to the
/// root are known, and the states before it.
pub(crate) fn tell(
    draft: &mut Box<dyn DraftModel>,
    text: &[u32],
    states: &[Matrix],
    told: &mut usize,
    root: usize,
) -> scylla_core::Result<()> {
    let first = if *told == 0 { 0 } else { *told + 1 };
    let path: Vec<usize> = (*told..root).collect();
    *told = root;
    draft.observe(&[Committed {
        slot: SLOT,
        tokens: &text[first..=root],
        path: &path,
        taps: states,
    }])
}

/// The target's states of a whole text, as the engine computes them, one matrix a tap.
pub(crate) fn states_of(
    target: &mut Box<dyn TargetModel>,
    text: &[u32],
    taps: &[Tap],
) -> Result<Vec<Matrix>> {
    const ROWS: usize = 256;
    let mut states = vec![Matrix::default(); taps.len()];
    target.open(SLOT)?;
    let mut run = || -> Result<()> {
        for tokens in text.chunks(ROWS) {
            let mut forward = target.forward(&Step {
                slots: vec![SlotRows {
                    slot: SLOT,
                    tokens,
                    parents: &[],
                    want: Want::None,
                }],
                taps,
            })?;
            let rows: Vec<usize> = (0..tokens.len()).collect();
            target.commit(SLOT, &rows)?;
            for (state, tap) in states.iter_mut().zip(forward.taps.remove(0)) {
                match state.rows() {
                    0 => *state = tap.snapshot(),
                    _ => state.append(&[&tap], &rows)?,
                }
            }
        }
        Ok(())
    };
    let done = run();
    target.close(SLOT);
    done.map(|()| states)
}
