//! What goes wrong for one sequence ends that sequence, and what would change the law is refused beforehand.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use scylla_core::engine::{
    Draft, Engine, Event, Finish, Options, Output, Parts, Request as Asked, RequestId, decode,
};
use scylla_core::plugin::{
    Committed, DraftModel, Forward, Request, Slot, Step, TargetModel, TargetShape, Verifier,
};
use scylla_core::sampling::Sampling;
use scylla_core::tabular::{Law, TableDraft, TableTarget};
use scylla_core::tree::{Budget, Drawing, Tree};
use scylla_core::{Error, Result};
use scylla_tests::refusal;
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
    forwards: Arc<AtomicUsize>,
    fails: fn(usize, &Step<'_>) -> bool,
}

impl TargetModel for Watched {
    fn open(&mut self, slot: Slot) -> Result<()> {
        self.inner.open(slot)
    }
    fn close(&mut self, slot: Slot) {
        self.inner.close(slot);
    }
    fn forward(&mut self, step: &Step<'_>) -> Result<Forward> {
        let count = self.forwards.fetch_add(1, Ordering::Relaxed) + 1;
        match (self.fails)(count, step) {
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
    /// Whether a forward fails, by its number from 1 on.
    fails: fn(usize, &Step<'_>) -> bool,
    /// What all requests are like.
    like: Asked,
    batch: usize,
}

type OnEvent<'a> = &'a mut dyn FnMut(&Event) -> ControlFlow<()>;

impl Run {
    fn new(law: Law) -> Self {
        Self {
            law,
            fails: |_, _| false,
            like: Asked {
                max_new_tokens: 5,
                budget: Budget::OFF,
                ..Asked::default()
            },
            batch: 1,
        }
    }

    /// Decodes prompts of one token each; with the outputs, the forwards it took.
    fn with(
        &self,
        prompts: &[u32],
        rule: &'static dyn Verifier,
        draft: Option<&mut dyn DraftModel>,
        on_event: OnEvent<'_>,
    ) -> (Vec<Output>, usize) {
        let forwards = Arc::new(AtomicUsize::new(0));
        let mut target = Watched {
            inner: TableTarget::new(VOCAB, 64, Arc::clone(&self.law)),
            forwards: Arc::clone(&forwards),
            fails: self.fails,
        };
        let parts = match draft {
            Some(draft) => Parts::drafted(&mut target, Draft::new("test", draft), Greedy),
            None => Parts::plain(&mut target, Greedy),
        };
        let options = Options {
            batch: self.batch,
            ..Options::default()
        };
        let mut engine = Engine::new(parts, options).expect("an engine");
        let request = |&token: &u32| Asked {
            prompt: vec![token],
            sequence: u64::from(token),
            rule: Some(Arc::new(rule)),
            ..self.like.clone()
        };
        let requests = prompts.iter().map(request).collect();
        let done = decode(&mut engine, requests, on_event);
        assert!(engine.is_idle());
        drop(engine);
        for slot in 0..prompts.len() {
            assert!(
                target.commit(slot, &[]).is_err(),
                "slot {slot} was left open"
            );
        }
        (done, forwards.load(Ordering::Relaxed))
    }

    fn plain(&self, prompts: &[u32]) -> Vec<Output> {
        self.with(prompts, &Greedy, None, &mut |_| ControlFlow::Continue(()))
            .0
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
            run.batch = batch;
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
    run.batch = 2;
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

/// Where a forward of several fails, each is tried alone: what fails again ends alone, and what was no one's fault ends none.
#[test]
fn a_forward_that_fails_for_a_batch_ends_only_whose_rows_fail_alone() {
    let prompts = [0, 1, 2, 3];
    let alone = Run::new(counting(|_| None)).plain(&prompts);
    let mut run = Run::new(counting(|_| None));
    run.batch = 4;
    run.fails = |_, step| step.slots.iter().any(|s| s.tokens.contains(&4));
    // 0 and 1, 2, 3 come to the token 4 after four, three, two and one; as root it is forwarded, as the last it is not.
    let outputs = run.plain(&prompts);
    let ends: Vec<(Finish, usize)> = outputs.iter().map(|o| (o.finish, o.ids.len())).collect();
    let failed = Finish::Failed;
    assert_eq!(ends, [(failed, 4), (failed, 3), (failed, 2), (failed, 1)]);
    let reason = outputs[1].failed.as_deref().expect("a reason");
    assert!(reason.contains("device is gone"), "{reason}");
    for (found, expected) in outputs.iter().zip(&alone) {
        assert!(expected.ids.starts_with(&found.ids));
    }
    // One failure that does not come again.
    run.fails = |count, _| count == 3;
    assert_eq!(shown(&run.plain(&prompts)), shown(&alone));
}

/// Job 0 ends in the cycle in which the caller breaks off: with its own last token, or with its mate's.
#[test]
fn sequences_that_had_ended_keep_their_reason_and_their_event() {
    for (job_of_break, token) in [(0, 3), (2, 0)] {
        let mut run = Run::new(counting(|_| None));
        run.batch = 2;
        run.like.eos = vec![3];
        run.like.max_new_tokens = 9;
        let mut finished = Vec::new();
        let mut on_event = |event: &Event| match event {
            Event::Finished { request, output } => {
                finished.push((request.0, output.finish));
                ControlFlow::Continue(())
            }
            Event::Tokens { request, ids, .. }
                if *request == RequestId(job_of_break) && ids[..] == [token] =>
            {
                ControlFlow::Break(())
            }
            _ => ControlFlow::Continue(()),
        };
        // Job 1 ends with its first token, and job 2 takes its place.
        let outputs = run.with(&[0, 2, 4, 5], &Greedy, None, &mut on_event).0;
        assert_eq!(
            shown(&outputs),
            [
                (Finish::Eos, vec![1, 2, 3]),
                (Finish::Eos, vec![3]),
                (Finish::Interrupted, vec![5, 0]),
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
    run.like.eos = vec![3];
    let mut on_event = |event: &Event| match event {
        Event::Tokens { ids, .. } if ids[..] == [3] => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    };
    let outputs = run.with(&[0, 4, 5], &Greedy, None, &mut on_event).0;
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
    const TYPICAL: Typical = Typical {
        epsilon: 0.3,
        delta: 0.09,
    };
    let rules: [(&'static dyn Verifier, bool, bool); 9] = [
        (&Greedy, true, false),
        (&Chain, true, true),
        (&Block, true, true),
        (&DeterministicTree, true, true),
        (&RrsWithoutReplacement, true, true),
        (&SpecInfer, true, true),
        (&KSeq, true, true),
        (&Traversal, true, true),
        (&TYPICAL, false, false),
    ];
    for (rule, greedily, sampling) in rules {
        for (temperature, exact) in [(0.0, greedily), (0.8, sampling)] {
            for drafted in [false, true] {
                let mut run = Run::new(counting(|_| None));
                run.like.sampling.temperature = temperature;
                let mut draft = TableDraft::new(counting(|_| None), Drawing::Independent);
                let draft: Option<&mut dyn DraftModel> = match drafted {
                    true => Some(&mut draft),
                    false => None,
                };
                let go_on = &mut |_: &Event| ControlFlow::Continue(());
                let (done, forwards) = run.with(&[0], rule, draft, go_on);
                let name = format!("{} at {temperature}, drafted {drafted}", rule.name());
                match exact {
                    true => assert_eq!(done[0].ids.len(), 5, "{name}"),
                    false => {
                        let error = refusal(&done);
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
    run.like.sampling.temperature = 1.0;
    run.like.budget = Budget {
        total: 8,
        width: 2,
        depth: 1,
    };
    let mut draft = TableDraft::new(counting(|_| None), Drawing::Independent);
    let go_on = &mut |_: &Event| ControlFlow::Continue(());
    let (done, forwards) = run.with(&[0], &Chain, Some(&mut draft), go_on);
    assert!(refusal(&done).contains("trees of width 2"));
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
    run.batch = 2;
    run.like.max_new_tokens = 3;
    run.like.budget = Budget {
        total: 8,
        width: 1,
        depth: 2,
    };
    let go_on = &mut |_: &Event| ControlFlow::Continue(());
    let (outputs, _) = run.with(&[2, 4], &Greedy, Some(&mut TooWide), go_on);
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
