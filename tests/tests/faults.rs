//! What goes wrong for one sequence ends that sequence, and what would change the law is refused beforehand.

use std::cell::Cell;
use std::ops::ControlFlow;
use std::rc::Rc;
use std::sync::Arc;

use scylla_core::decode::{Event, Finish, Job, Output, Parts, Settings, decode};
use scylla_core::plugin::{
    Committed, DraftModel, FixedBudget, Forward, Request, Slot, Step, TargetModel, TargetShape,
    Verifier,
};
use scylla_core::sampling::Sampling;
use scylla_core::tabular::{Law, TableDraft, TableTarget};
use scylla_core::tree::{Budget, Drawing, Tree};
use scylla_core::{Error, Result};
use scylla_verify::{
    Block, Chain, DeterministicTree, Greedy, KSeq, RrsWithoutReplacement, SpecInfer, Traversal,
    Typical,
};

const VOCAB: usize = 6;

/// Counts up modulo the vocabulary; what a sequence may not go on from is said by `bad`.
fn counting(bad: impl Fn(&[u32]) -> Option<f64> + Send + Sync + 'static) -> Law {
    Arc::new(move |tokens: &[u32]| {
        let mut row = vec![0.01; VOCAB];
        row[(tokens[tokens.len() - 1] as usize + 1) % VOCAB] = 1.0 - 0.01 * (VOCAB - 1) as f64;
        if let Some(value) = bad(tokens) {
            row[2] = value;
        }
        row
    })
}

/// A target that counts its forwards, and fails at those that are asked for.
struct Watched {
    inner: TableTarget,
    forwards: Rc<Cell<usize>>,
    fails_at: usize,
}

impl TargetModel for Watched {
    fn open(&mut self, slot: Slot) -> Result<()> {
        self.inner.open(slot)
    }
    fn close(&mut self, slot: Slot) {
        self.inner.close(slot);
    }
    fn forward(&mut self, step: &Step<'_>) -> Result<Forward> {
        self.forwards.set(self.forwards.get() + 1);
        match self.forwards.get() == self.fails_at {
            true => Err(Error::Invalid("the device is gone".into())),
            false => self.inner.forward(step),
        }
    }
    fn commit(&mut self, slot: Slot, path: &[usize]) -> Result<()> {
        self.inner.commit(slot, path)
    }
    fn shape(&self) -> TargetShape {
        self.inner.shape()
    }
}

struct Run {
    law: Law,
    fails_at: usize,
    settings: Settings,
    budget: Budget,
}

impl Run {
    fn new(law: Law) -> Self {
        Self {
            law,
            fails_at: 0,
            settings: Settings {
                max_new_tokens: 5,
                ..Settings::default()
            },
            budget: Budget::OFF,
        }
    }

    /// Decodes prompts of one token each; with the outputs, the forwards it took.
    fn with<'a>(
        &self,
        prompts: &[u32],
        rule: &'a dyn Verifier,
        mut draft: Option<&mut (dyn DraftModel + 'a)>,
        on_event: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
    ) -> (Result<Vec<Output>>, usize) {
        let forwards = Rc::new(Cell::new(0));
        let mut target = Watched {
            inner: TableTarget::new(VOCAB, 64, Arc::clone(&self.law)),
            forwards: Rc::clone(&forwards),
            fails_at: self.fails_at,
        };
        let mut policy = FixedBudget(self.budget);
        let mut parts = Parts {
            target: &mut target,
            draft: match &mut draft {
                Some(draft) => Some(("test", &mut **draft)),
                None => None,
            },
            verifier: rule,
            policy: &mut policy,
        };
        let jobs: Vec<Job> = prompts
            .iter()
            .map(|&token| Job {
                prompt: vec![token],
                sequence: u64::from(token),
            })
            .collect();
        let done = decode(&mut parts, &jobs, &self.settings, None, on_event);
        for slot in 0..prompts.len() {
            assert!(
                target.commit(slot, &[]).is_err(),
                "slot {slot} was left open"
            );
        }
        (done, forwards.get())
    }

    fn plain(&self, prompts: &[u32]) -> Vec<Output> {
        let go_on = &mut |_: Event<'_>| ControlFlow::Continue(());
        self.with(prompts, &Greedy, None, go_on).0.expect("runs")
    }
}

fn shown(outputs: &[Output]) -> Vec<(Finish, Vec<u32>)> {
    outputs.iter().map(|o| (o.finish, o.ids.clone())).collect()
}

#[test]
fn a_sequence_that_fails_ends_alone_with_what_it_had() {
    let alone = Run::new(counting(|_| None)).plain(&[0, 1, 2, 3]);
    for value in [f64::NAN, f64::INFINITY] {
        for batch in [1, 2, 4] {
            // The sequence that began with 1 fails after its third token.
            let mut run = Run::new(counting(move |t| {
                (t[0] == 1 && t.len() == 4).then_some(value)
            }));
            run.settings.batch = batch;
            let outputs = run.plain(&[0, 1, 2, 3]);
            for (i, (found, expected)) in outputs.iter().zip(&alone).enumerate() {
                if i == 1 {
                    assert_eq!(
                        (found.finish, &found.ids[..]),
                        (Finish::Failed, &[2, 3, 4][..])
                    );
                    let reason = found.failed.as_deref().expect("a reason");
                    assert!(reason.contains("logit"), "{reason}");
                } else {
                    assert_eq!(
                        (found.finish, &found.ids),
                        (Finish::Length, &expected.ids),
                        "batch {batch}"
                    );
                }
            }
        }
    }
}

#[test]
fn prompts_that_do_not_fit_are_told_one_by_one_and_the_others_run() {
    let mut run = Run::new(counting(|_| None));
    run.settings.batch = 2;
    let outputs = run.plain(&[0, 99, 2]);
    assert_eq!(outputs[1].finish, Finish::Failed);
    assert!(
        outputs[1]
            .failed
            .as_deref()
            .is_some_and(|m| m.contains("token 99"))
    );
    assert_eq!(
        shown(&[outputs[0].clone(), outputs[2].clone()]),
        shown(&run.plain(&[0, 2]))
    );
}

#[test]
fn what_fails_for_a_whole_batch_ends_that_batch_and_the_next_jobs_run() {
    let mut run = Run::new(counting(|_| None));
    run.settings.batch = 2;
    run.fails_at = 4; // two prompts, one cycle of both, then the second cycle
    let outputs = run.plain(&[0, 1, 2, 3]);
    let finishes: Vec<Finish> = outputs.iter().map(|o| o.finish).collect();
    assert_eq!(
        finishes,
        [
            Finish::Failed,
            Finish::Failed,
            Finish::Length,
            Finish::Length
        ]
    );
    assert_eq!((outputs[0].ids.len(), outputs[2].ids.len()), (2, 5));
    assert!(
        outputs[1]
            .failed
            .as_deref()
            .is_some_and(|m| m.contains("device is gone"))
    );
}

/// Job 0 ends in the cycle in which the caller breaks off: with its own last token, or with its mate's.
#[test]
fn sequences_that_had_ended_keep_their_reason_and_their_event() {
    for (job_of_break, token) in [(0, 3), (2, 1)] {
        let mut run = Run::new(counting(|_| None));
        run.settings = Settings {
            batch: 2,
            eos: vec![3],
            max_new_tokens: 9,
            ..Settings::default()
        };
        let mut finished = Vec::new();
        let mut on_event = |event: Event<'_>| match event {
            Event::Finished { job, finish } => {
                finished.push((job, finish));
                ControlFlow::Continue(())
            }
            Event::Tokens { job, ids, .. } if job == job_of_break && ids == [token] => {
                ControlFlow::Break(())
            }
            Event::Tokens { .. } => ControlFlow::Continue(()),
        };
        // Job 1 ends with its first token, and job 2 takes its place.
        let outputs = run
            .with(&[0, 2, 4, 5], &Greedy, None, &mut on_event)
            .0
            .expect("runs");
        assert_eq!(
            shown(&outputs),
            [
                (Finish::Eos, vec![1, 2, 3]),
                (Finish::Eos, vec![3]),
                (Finish::Interrupted, vec![5, 0, 1]),
                (Finish::Interrupted, vec![]),
            ],
            "broken off by job {job_of_break}"
        );
        assert_eq!(finished, [(1, Finish::Eos), (0, Finish::Eos)]);
    }
}

#[test]
fn a_break_that_comes_with_the_end_of_a_text_ends_the_run() {
    let mut run = Run::new(counting(|_| None));
    run.settings.eos = vec![3];
    let mut on_event = |event: Event<'_>| match event {
        Event::Tokens { ids: [3], .. } => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    };
    let outputs = run
        .with(&[0, 4, 5], &Greedy, None, &mut on_event)
        .0
        .expect("runs");
    assert_eq!(
        shown(&outputs),
        [
            (Finish::Eos, vec![1, 2, 3]),
            (Finish::Interrupted, vec![]),
            (Finish::Interrupted, vec![])
        ]
    );
}

#[test]
fn every_rule_says_for_root_only_trees_whether_it_samples() {
    let rules: [(&dyn Verifier, bool, bool); 9] = [
        (&Greedy, true, false),
        (&Chain, true, true),
        (&Block, true, true),
        (&DeterministicTree, true, true),
        (&RrsWithoutReplacement, true, true),
        (&SpecInfer, true, true),
        (&KSeq, true, true),
        (&Traversal, true, true),
        (&Typical::default(), false, false),
    ];
    for (rule, greedily, sampling) in rules {
        for (temperature, exact) in [(0.0, greedily), (0.8, sampling)] {
            for drafted in [false, true] {
                let mut run = Run::new(counting(|_| None));
                run.settings.sampling.temperature = temperature;
                let mut draft = TableDraft::new(counting(|_| None), Drawing::Independent);
                let draft: Option<&mut dyn DraftModel> = match drafted {
                    true => Some(&mut draft),
                    false => None,
                };
                let go_on = &mut |_: Event<'_>| ControlFlow::Continue(());
                let (done, forwards) = run.with(&[0], rule, draft, go_on);
                let name = format!("{} at {temperature}, drafted {drafted}", rule.name());
                match exact {
                    true => assert_eq!(done.expect(&name)[0].ids.len(), 5, "{name}"),
                    false => {
                        let error = done.expect_err(&name).to_string();
                        assert!(
                            error.contains(rule.name()) && error.contains("lossy"),
                            "{error}"
                        );
                        assert_eq!(forwards, 0, "{name}: refused before the prompt is paid for");
                    }
                }
            }
        }
    }
}

#[test]
fn what_is_not_exact_for_a_drafts_trees_is_refused_before_the_prompt() {
    let mut run = Run::new(counting(|_| None));
    run.settings.sampling.temperature = 1.0;
    run.budget = Budget {
        total: 8,
        width: 2,
        depth: 1,
    };
    let mut draft = TableDraft::new(counting(|_| None), Drawing::Independent);
    let go_on = &mut |_: Event<'_>| ControlFlow::Continue(());
    let (done, forwards) = run.with(&[0], &Chain, Some(&mut draft), go_on);
    assert!(
        done.expect_err("refused")
            .to_string()
            .contains("trees of width 2")
    );
    assert_eq!(forwards, 0);
}

/// Proposes two children where exactness was granted for one.
struct TooWide;

impl DraftModel for TooWide {
    fn drawing(&self, _: &Sampling) -> Drawing {
        Drawing::Deterministic
    }
    fn open(&mut self, _: Slot) -> Result<()> {
        Ok(())
    }
    fn close(&mut self, _: Slot) {}
    fn observe(&mut self, _: &[Committed<'_>]) -> Result<()> {
        Ok(())
    }
    fn propose(&mut self, requests: &mut [Request<'_>]) -> Result<Vec<Tree>> {
        let tree = |r: &mut Request<'_>| {
            let mut tree = Tree::root(r.root);
            for token in 0..if r.root == 3 { 2 } else { 1 } {
                tree.push(0, token);
            }
            Ok(tree)
        };
        requests.iter_mut().map(tree).collect()
    }
}

#[test]
fn a_tree_wider_than_its_budget_ends_its_sequence_alone() {
    let mut run = Run::new(counting(|_| None));
    run.settings.batch = 2;
    run.settings.max_new_tokens = 3;
    run.budget = Budget {
        total: 8,
        width: 1,
        depth: 2,
    };
    let go_on = &mut |_: Event<'_>| ControlFlow::Continue(());
    let (done, _) = run.with(&[2, 4], &Greedy, Some(&mut TooWide), go_on);
    let outputs = done.expect("runs");
    assert_eq!(outputs[0].finish, Finish::Failed);
    assert!(
        outputs[0]
            .failed
            .as_deref()
            .is_some_and(|m| m.contains("budget of width 1"))
    );
    assert_eq!(
        (outputs[1].finish, &outputs[1].ids[..]),
        (Finish::Length, &[5, 0, 1][..])
    );
}
