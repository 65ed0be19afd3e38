//! Conversations through an engine: as many side by side as a batch has, or as they arrive.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use scylla_core::engine::{Engine, Event, Output, RequestId, Step, decode};
use scylla_core::text::Message;

use super::Skipped;
use crate::Result;
use crate::experiment::Experiment;
use crate::prompts::Prompt;
use crate::session::{Composed, Session, Wording, engine, request};

/// One conversation: a prompt, and which of several about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Talk {
    pub(super) prompt: usize,
    pub(super) copy: usize,
}

impl Talk {
    /// Keys the random stream of a turn.
    fn sequence(&self, turn: usize) -> u64 {
        ((self.copy as u64) << 48) | ((self.prompt as u64) << 16) | turn as u64
    }
}

/// What came of a run.
pub(super) struct Told {
    /// One output per turn, of each conversation.
    pub(super) outputs: Vec<Vec<Output>>,
    /// Turns that could not be decoded.
    pub(super) skipped: Vec<Skipped>,
    pub(super) steps: Vec<Step>,
    pub(super) ms: f64,
}

/// What stands before the first answer.
pub(super) fn opening(prompt: &Prompt) -> Vec<Message> {
    let system = prompt.system.iter().map(Message::system);
    system
        .chain(prompt.turns.first().map(Message::user))
        .collect()
}

/// Short answers, side by side as later, that are not counted.
pub(super) fn warm_up(
    session: &mut Session,
    composed: &mut Composed,
    experiment: &Experiment,
    prompts: &[Prompt],
    batch: usize,
) -> Result<()> {
    let mut requests = Vec::new();
    for i in 0..batch {
        let ids = session.prompt(&opening(&prompts[i % prompts.len()]), &experiment.prompts)?;
        let mut request = session.request(experiment, composed, ids, i as u64);
        request.max_new_tokens = request.max_new_tokens.min(8);
        requests.push(request);
    }
    let mut engine = session.engine(composed, experiment.run.options(batch))?;
    decode(&mut engine, requests, &mut |_| ControlFlow::Continue(()));
    Ok(())
}

/// Milliseconds at which conversations arrive: a Poisson process, or all at once.
fn arrivals(count: usize, rate: f64, seed: u64) -> Vec<f64> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut at = 0.0_f64;
    let next = |_| {
        if rate > 0.0 {
            // 1 - u is above 0.
            at -= (1.0 - rng.random::<f64>()).ln() / rate * 1e3;
        }
        at
    };
    (0..count).map(next).collect()
}

/// A run on its way.
struct Run<'a, 'e> {
    engine: Engine<'e>,
    wording: &'a Wording,
    experiment: &'a Experiment,
    group: &'a [Talk],
    prompts: &'a [Prompt],
    messages: Vec<Vec<Message>>,
    outputs: Vec<Vec<Output>>,
    skipped: Vec<Skipped>,
    ids: HashMap<RequestId, usize>,
    /// Milliseconds from the arrival of each to when it could be submitted: a step is not broken off.
    late: Vec<f64>,
    draft: String,
}

/// Decodes all turns of conversations; `None` when the user broke off. One whose turn cannot be decoded ends there, and the
/// others go on.
#[expect(clippy::too_many_arguments, reason = "what a run is of, one by one")]
pub(super) fn converse(
    session: &mut Session,
    composed: &mut Composed,
    experiment: &Experiment,
    batch: usize,
    group: &[Talk],
    prompts: &[Prompt],
    repeat: usize,
    stop: &AtomicBool,
) -> Result<Option<Told>> {
    // What belongs to all requests; each gets its prompt and random stream below.
    let plain = request(
        experiment,
        &session.eos,
        session.tokenizer.as_deref(),
        composed,
        Vec::new(),
        0,
    );
    let draft = composed.name.clone();
    let measured = std::mem::take(&mut composed.measured);
    let tokenizer = session.tokenizer.as_ref();
    let options = experiment.run.options(batch);
    let mut run = Run {
        engine: engine(&mut session.target, tokenizer, composed, options)?,
        wording: &session.wording,
        experiment,
        group,
        prompts,
        messages: vec![Vec::new(); group.len()],
        outputs: vec![Vec::new(); group.len()],
        skipped: Vec::new(),
        ids: HashMap::new(),
        late: vec![0.0; group.len()],
        draft,
    };
    run.engine.resume(measured);
    let arrivals = arrivals(group.len(), experiment.run.rate, repeat as u64);
    let (begun, mut next, mut steps) = (Instant::now(), 0, Vec::new());
    loop {
        let now = begun.elapsed().as_secs_f64() * 1e3;
        while next < group.len() && arrivals[next] <= now {
            run.late[next] = begun.elapsed().as_secs_f64() * 1e3 - arrivals[next];
            run.speak(next, &plain);
            next += 1;
        }
        if run.engine.is_idle() {
            let Some(at) = arrivals.get(next) else { break };
            let wait = (at - now).max(0.0) / 1e3;
            std::thread::sleep(Duration::from_secs_f64(wait.min(0.05)));
        }
        for event in run.engine.step() {
            match event {
                Event::Finished { request, output } => run.finished(request, output, &plain),
                Event::Step(step) => steps.push(step),
                _ => {}
            }
        }
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
    }
    let ms = begun.elapsed().as_secs_f64() * 1e3;
    let measured = run.engine.measured().clone();
    let (outputs, skipped) = (
        std::mem::take(&mut run.outputs),
        std::mem::take(&mut run.skipped),
    );
    drop(run);
    composed.measured = measured;
    Ok(Some(Told {
        outputs,
        skipped,
        steps,
        ms,
    }))
}

impl Run<'_, '_> {
    fn skip(&mut self, index: usize, draft: Option<&str>, reason: String) {
        self.skipped.push(Skipped {
            prompt: self.prompts[self.group[index].prompt].id.clone(),
            turn: self.outputs[index].len(),
            draft: draft.map(str::to_string),
            reason,
        });
    }

    /// Submits the next turn of a conversation, if there is one.
    fn speak(&mut self, index: usize, plain: &scylla_core::engine::Request) {
        let talk = self.group[index];
        let prompt = &self.prompts[talk.prompt];
        let turn = self.outputs[index].len();
        match (turn, prompt.turns.get(turn)) {
            (_, None) => return,
            (0, _) => self.messages[index] = opening(prompt),
            (_, Some(text)) => self.messages[index].push(Message::user(text)),
        }
        let ids = self
            .wording
            .prompt(&self.messages[index], &self.experiment.prompts);
        let fitting = ids.and_then(|ids| self.wording.check_length(&ids).map(|()| ids));
        let prompt = match fitting {
            Ok(prompt) => prompt,
            Err(e) => return self.skip(index, None, e.to_string()),
        };
        let request = scylla_core::engine::Request {
            prompt,
            sequence: talk.sequence(turn),
            ..plain.clone()
        };
        match self.engine.submit(request) {
            Ok(id) => {
                self.ids.insert(id, index);
            }
            Err(e) => {
                let draft = self.draft.clone();
                self.skip(index, Some(&draft), e.to_string());
            }
        }
    }

    /// Keeps an answer, and goes on with the conversation.
    fn finished(
        &mut self,
        id: RequestId,
        mut output: Output,
        plain: &scylla_core::engine::Request,
    ) {
        let Some(index) = self.ids.remove(&id) else {
            return;
        };
        if let Some(reason) = output.failed {
            let draft = self.draft.clone();
            return self.skip(index, Some(&draft), reason);
        }
        if self.outputs[index].is_empty() {
            let (waited, late) = (&mut output.waited, self.late[index]);
            waited.slot += late;
            waited.first = waited.first.map(|ms| ms + late);
            waited.end += late;
        }
        self.messages[index].push(Message::assistant(&output.text));
        self.outputs[index].push(output);
        self.speak(index, plain);
    }
}
