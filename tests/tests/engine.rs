//! Requests that join and leave: each decodes what it decodes alone, pays for itself alone, and leaves nothing behind.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use allocation_counter::measure;
use proptest::prelude::*;
use scylla_core::chance::Seeded;
use scylla_core::engine::{
    Draft, Engine, Event, Finish, Measured, Options, Output, Parts, Request as Asked, RequestId,
    Step,
};
use scylla_core::model::WeightForm;
use scylla_core::plugin::{
    BudgetPolicy, Chance, Committed, DraftModel, Forward, Matrix, Outlook, Request, Slot, SlotRows,
    Step as Forwarded, TargetModel, TargetShape, Verifier, Want,
};
use scylla_core::policy::{AdaptiveBudget, BudgetTable, FixedBudget, NoDrafting};
use scylla_core::sampling::Sampling;
use scylla_core::tabular::{Law, TableDraft, TableTarget};
use scylla_core::tree::{Budget, Drawing, Tree};
use scylla_core::{Decoder, Error, Result};
use scylla_draft::tree::{TreeDraft, TreeKind, TreeSettings};
use scylla_draft::{Hybrid, Ngram, Suffix};
use scylla_tests::{Bench, TINY, Tiny};
use scylla_verify::{Auto, Block, Chain, DeterministicTree, Greedy, Traversal};

#[test]
fn engines_and_decoders_are_send() {
    fn is_send<T: Send>() {}
    is_send::<Engine<'static>>();
    is_send::<Decoder>();
    is_send::<Asked>();
    is_send::<Event>();
}

/// What a test asks for, as numbers that proptest can shrink.
#[derive(Debug, Clone)]
struct Wish {
    prompt: Vec<u32>,
    temperature: f64,
    penalty: f64,
    top_p: f64,
    budget: (usize, usize, usize),
    rule: usize,
    new: usize,
    eos: Option<u32>,
    seed: u64,
    /// Steps after which it is submitted, and after which more it is taken back.
    at: usize,
    cancelled: Option<usize>,
}

impl Wish {
    fn asked(&self, sequence: usize, drawing: Drawing) -> Asked {
        let (total, width, depth) = self.budget;
        // A rule that is exact for these trees: some of the time another than would be chosen.
        let rule: Option<Arc<dyn Verifier>> = match (self.temperature > 0.0, drawing, self.rule) {
            (false, _, 0) => Some(Arc::new(Greedy)),
            (false, _, 1) => Some(Arc::new(Traversal)),
            (true, Drawing::Deterministic, 0) => Some(Arc::new(DeterministicTree)),
            (true, _, 1) if width == 1 => Some(Arc::new(Chain)),
            (true, _, 2) if width == 1 => Some(Arc::new(Block)),
            _ => None,
        };
        Asked {
            prompt: self.prompt.clone(),
            sampling: Sampling {
                temperature: self.temperature,
                repetition_penalty: self.penalty,
                top_p: self.top_p,
                ..Sampling::default()
            },
            seed: self.seed,
            sequence: sequence as u64,
            max_new_tokens: self.new,
            eos: self.eos.into_iter().collect(),
            budget: Budget {
                total,
                width,
                depth,
            },
            rule,
            ..Asked::default()
        }
    }
}

fn wishes(most: usize) -> impl Strategy<Value = Vec<Wish>> {
    // Prompts over few beginnings, so that some share a prefix.
    let prompt = (0u64..3, 1usize..60, prop::collection::vec(0u32..13, 0..6)).prop_map(
        |(family, length, end)| {
            let begin = (0..length as u64).map(|i| ((i * i + family * 7) % 13) as u32);
            begin.chain(end).collect::<Vec<u32>>()
        },
    );
    let wish = (
        prompt,
        (
            prop::sample::select(vec![0.0, 0.0, 0.7, 1.3]),
            prop::sample::select(vec![1.0, 1.2]),
            prop::sample::select(vec![1.0, 0.8]),
        ),
        (1usize..12, 1usize..4, 0usize..4),
        (
            0usize..4,
            1usize..20,
            prop::option::weighted(0.3, 0u32..13),
            0u64..5,
        ),
        (0usize..30, prop::option::weighted(0.2, 0usize..12)),
    );
    let wish = wish.prop_map(
        |(prompt, (temperature, penalty, top_p), budget, r, (at, cancelled))| {
            let (rule, new, eos, seed) = r;
            Wish {
                prompt,
                temperature,
                penalty,
                top_p,
                budget,
                rule,
                new,
                eos,
                seed,
                at,
                cancelled,
            }
        },
    );
    prop::collection::vec(wish, 1..most)
}

/// The drafts of these tests, by name; trees of networks do not look at time.
fn draft(bench: &Bench, name: &str) -> Option<Box<dyn DraftModel>> {
    let tree = |tree| TreeSettings {
        early_stop: false,
        tree,
        ..TreeSettings::default()
    };
    Some(match name {
        "plain" => return None,
        "ngram" => Box::new(Ngram::new(1, 3).expect("ngram")),
        "suffix" => Box::new(Suffix::new(1, 4.0).expect("suffix")),
        "hybrid" => {
            let network = bench.draft("eagle3", &tree(TreeKind::Auto), None);
            let repeats = Suffix::new(1, 4.0).expect("suffix");
            Box::new(Hybrid::new(repeats, network, 0.6).expect("hybrid"))
        }
        "eagle3-chain" => Box::new(bench.draft("eagle3", &tree(TreeKind::Chain), None)),
        "lm-widths" => {
            let tree = TreeSettings {
                widths: vec![3, 2, 1],
                ..tree(TreeKind::Widths)
            };
            Box::new(bench.draft("draft-lm", &tree, None))
        }
        name => Box::new(bench.draft(name, &tree(TreeKind::Dynamic), None)),
    })
}

const DRAFTS: [&str; 8] = [
    "plain",
    "ngram",
    "suffix",
    "hybrid",
    "eagle2",
    "scylla",
    "eagle3-chain",
    "lm-widths",
];

fn parts<'a>(
    target: &'a mut dyn TargetModel,
    draft: Option<&'a mut Box<dyn DraftModel>>,
    policy: Box<dyn BudgetPolicy + 'a>,
) -> Parts<'a> {
    let plain = Parts::plain(target, Auto);
    Parts {
        draft: draft.map(|draft| Draft::new("under test", draft)),
        policy,
        ..plain
    }
}

/// Runs wishes as they come and go; what became of each.
fn together(engine: &mut Engine<'_>, wishes: &[Wish], asked: &[Asked]) -> Vec<Output> {
    let mut outputs: Vec<Option<Output>> = vec![None; wishes.len()];
    let mut ids: HashMap<RequestId, usize> = HashMap::new();
    let mut told: HashMap<RequestId, Vec<u32>> = HashMap::new();
    let last = wishes.iter().map(|w| w.at).max().unwrap_or(0);
    let mut step = 0;
    while step <= last || !engine.is_idle() {
        for (i, _) in wishes.iter().enumerate().filter(|(_, w)| w.at == step) {
            let id = engine.submit(asked[i].clone()).expect("taken");
            ids.insert(id, i);
        }
        for event in engine.step() {
            match event {
                Event::Tokens { request, ids, .. } => told.entry(request).or_default().extend(ids),
                Event::Finished { request, output } => {
                    assert_eq!(told.remove(&request).unwrap_or_default(), output.ids);
                    outputs[ids[&request]] = Some(output);
                }
                _ => {}
            }
        }
        for (&id, &i) in &ids {
            if wishes[i]
                .cancelled
                .is_some_and(|after| wishes[i].at + after == step)
                && let Some(output) = engine.cancel(id)
            {
                assert_eq!(output.finish, Finish::Interrupted);
                assert!(engine.cancel(id).is_none());
                outputs[i] = Some(output);
            }
        }
        step += 1;
    }
    outputs.into_iter().map(|o| o.expect("an end")).collect()
}

fn policy(index: usize) -> Box<dyn BudgetPolicy> {
    match index {
        0 => Box::new(FixedBudget),
        1 => Box::new(NoDrafting),
        2 => Box::new(AdaptiveBudget::default()),
        3 => Box::new(Erratic(Seeded::new(3, 0))),
        _ => {
            let rows = vec![
                (1, Budget::chain(5)),
                (3, Budget::chain(2)),
                (6, Budget::OFF),
            ];
            Box::new(BudgetTable::new(rows).expect("a table"))
        }
    }
}

/// Budgets at random, each step and request anew.
struct Erratic(Seeded);

impl BudgetPolicy for Erratic {
    fn budgets(&mut self, outlook: &Outlook<'_>) -> Vec<Budget> {
        let mut any = |n: usize| self.0.pick(&vec![1.0; n.max(1)]).unwrap_or(0);
        let budget = |r: &scylla_core::plugin::Drafting<'_>| Budget {
            total: 1 + any(r.most.total),
            width: 1 + any(r.most.width),
            depth: any(r.most.depth + 1),
        };
        outlook.requests.iter().map(budget).collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    /// Bit for bit on the kernels: at temperature 0 under any policy, at others where budgets are the request's own.
    #[test]
    fn a_request_decodes_what_it_decodes_alone(
        wishes in wishes(33),
        name in prop::sample::select(DRAFTS.to_vec()),
        policies in (0usize..5, 0usize..2),
        (batch, prompt_rows, kept, threads) in (1usize..33, 1usize..80, 0usize..5, 1usize..3),
        seed in 0u64..20,
        form in prop::sample::select(vec![WeightForm::F32, WeightForm::Q8_0, WeightForm::Bf16]),
    ) {
        let mut bench = Bench::held(Tiny { seed, ..TINY }, threads, form);
        let mut draft = draft(&bench, name);
        let sampled = wishes.iter().any(|w| w.temperature > 0.0);
        let chosen = if sampled { policies.1 } else { policies.0 };
        let drawing = |w: &Wish| {
            let sampling = Sampling { temperature: w.temperature, ..Sampling::default() };
            draft.as_ref().map_or(Drawing::Deterministic, |d| d.drawing(&sampling))
        };
        let asked: Vec<Asked> = wishes.iter().enumerate().map(|(i, w)| w.asked(i, drawing(w))).collect();
        let options = Options { batch, prompt_rows, kept, ..Options::default() };
        let target = bench.target.model.as_mut();
        let mut engine = Engine::new(parts(target, draft.as_mut(), policy(chosen)), options).expect("an engine");
        let found = together(&mut engine, &wishes, &asked);
        let prefixes = engine.prefixes();
        prop_assert!(prefixes.kept <= kept);
        prop_assert_eq!(prefixes.reused, found.iter().map(|o| o.reused_tokens).sum::<usize>());
        drop(engine);
        // Alone a sampled request has the same policy, as its draws hang on its budgets; a greedy one decodes plainly.
        for ((wish, asked), found) in wishes.iter().zip(&asked).zip(&found) {
            let alone = policy(if wish.temperature > 0.0 { chosen } else { 1 });
            let parts = parts(bench.target.model.as_mut(), draft.as_mut(), alone);
            let mut engine = Engine::new(parts, Options::default()).expect("an engine");
            let outputs = scylla_core::engine::decode(&mut engine, vec![asked.clone()], &mut |_| std::ops::ControlFlow::Continue(()));
            let alone = &outputs[0];
            prop_assert_eq!(&alone.failed, &None);
            match found.finish {
                Finish::Interrupted => prop_assert!(alone.ids.starts_with(&found.ids)),
                _ => prop_assert_eq!((&alone.ids, alone.finish), (&found.ids, found.finish)),
            }
        }
        for slot in 0..64 {
            prop_assert!(bench.target.model.commit(slot, &[]).is_err(), "slot {} was left open", slot);
        }
    }
}

/// A table's target that counts what is open, has caches to account for, and can fork.
struct Counted {
    inner: TableTarget,
    tokens: BTreeMap<Slot, Vec<u32>>,
    open: Arc<std::sync::atomic::AtomicUsize>,
    pending: BTreeMap<Slot, Vec<u32>>,
}

const VOCAB: usize = 5;

impl TargetModel for Counted {
    fn open(&mut self, slot: Slot) -> Result<()> {
        assert!(
            self.tokens.insert(slot, Vec::new()).is_none(),
            "slot {slot} is open"
        );
        self.open.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        self.inner.open(slot)
    }
    fn close(&mut self, slot: Slot) {
        if self.tokens.remove(&slot).is_some() {
            self.open.fetch_sub(1, std::sync::atomic::Ordering::Relaxed);
        }
        self.pending.remove(&slot);
        self.inner.close(slot);
    }
    fn forward(&mut self, step: &Forwarded<'_>) -> Result<Forward> {
        for rows in &step.slots {
            let pending = self.pending.entry(rows.slot).or_default();
            pending.extend_from_slice(rows.tokens);
        }
        self.inner.forward(step)
    }
    fn commit(&mut self, slot: Slot, path: &[usize]) -> Result<()> {
        let pending = self.pending.remove(&slot).unwrap_or_default();
        if let Some(tokens) = self.tokens.get_mut(&slot) {
            tokens.extend(path.iter().map(|&row| pending[row]));
        }
        self.inner.commit(slot, path)
    }
    fn shape(&self) -> TargetShape {
        self.inner.shape()
    }
    fn fork(&mut self, from: Slot, to: Slot, count: usize) -> Result<bool> {
        let tokens = self.tokens[&from][..count].to_vec();
        self.open(to)?;
        if tokens.is_empty() {
            return Ok(true);
        }
        let rows = SlotRows {
            slot: to,
            tokens: &tokens,
            parents: &[],
            want: Want::None,
        };
        self.forward(&Forwarded {
            slots: vec![rows],
            taps: &[],
        })?;
        self.commit(to, &(0..count).collect::<Vec<_>>())?;
        Ok(true)
    }
    fn slot_bytes(&self, positions: usize) -> usize {
        positions * 10
    }
}

/// Some law over few tokens that hangs on the last two.
fn law() -> Law {
    Arc::new(|tokens: &[u32]| {
        let (last, before) = (
            tokens[tokens.len() - 1],
            tokens.iter().rev().nth(1).copied(),
        );
        let weight = |i: u32| 1.0 + f64::from((i * 3 + last * 5 + before.unwrap_or(2) * 7) % 6);
        let total: f64 = (0..VOCAB as u32).map(weight).sum();
        (0..VOCAB as u32).map(|i| weight(i) / total).collect()
    })
}

fn counted() -> (Counted, Arc<std::sync::atomic::AtomicUsize>) {
    let open = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let target = Counted {
        inner: TableTarget::new(VOCAB, 200, law()),
        tokens: BTreeMap::new(),
        open: Arc::clone(&open),
        pending: BTreeMap::new(),
    };
    (target, open)
}

/// Random operations on an engine: submit, step, cancel.
fn operate(engine: &mut Engine<'_>, count: usize, random: &mut Seeded, known: &mut Vec<RequestId>) {
    let mut any = |n: usize| random.pick(&vec![1.0; n]).expect("a number");
    for _ in 0..count {
        match any(8) {
            0 | 1 => {
                let begin = any(4) as u32;
                let length = 1 + any(40);
                let request = Asked {
                    prompt: (0..length as u32)
                        .map(|i| (i * begin + i / 7) % VOCAB as u32)
                        .collect(),
                    sampling: Sampling {
                        temperature: if any(2) == 0 { 0.0 } else { 1.0 },
                        ..Sampling::default()
                    },
                    sequence: any(1000) as u64,
                    max_new_tokens: 1 + any(12),
                    eos: vec![any(VOCAB) as u32],
                    budget: Budget {
                        total: 1 + any(6),
                        width: 1 + any(2),
                        depth: any(3),
                    },
                    ..Asked::default()
                };
                if known.len() < 60 {
                    known.push(engine.submit(request).expect("taken"));
                }
            }
            2 if !known.is_empty() => {
                let id = known[any(known.len())];
                engine.cancel(id);
                known.retain(|other| *other != id);
            }
            _ => {
                for event in engine.step() {
                    if let Event::Finished { request, output } = event {
                        assert_eq!(output.failed, None);
                        known.retain(|other| *other != request);
                    }
                }
            }
        }
    }
}

#[test]
fn slots_and_memory_leak_nothing_over_a_hundred_thousand_operations() {
    let (mut target, open) = counted();
    let mut draft = TableDraft::new(law(), Drawing::WithoutReplacement);
    let limit = 4_000;
    let options = Options {
        batch: 8,
        prompt_rows: 16,
        memory: Some(limit),
        kept: 3,
    };
    let parts = Parts::drafted(&mut target, Draft::new("table", &mut draft), Auto);
    let mut engine = Engine::new(parts, options).expect("an engine");
    let (mut random, mut known) = (Seeded::new(1, 0), Vec::new());
    for _ in 0..1000 {
        operate(&mut engine, 100, &mut random, &mut known);
        let (live, _) = engine.load();
        let slots = open.load(std::sync::atomic::Ordering::Relaxed);
        assert_eq!(slots, live + engine.prefixes().kept);
        assert!(live <= 8 && engine.prefixes().kept <= 3);
        assert!(engine.bytes() <= limit, "{} bytes", engine.bytes());
    }
    assert!(engine.prefixes().hits > 100, "{:?}", engine.prefixes());
    while !engine.is_idle() {
        engine.step();
    }
    drop(engine);
    assert_eq!(open.load(std::sync::atomic::Ordering::Relaxed), 0);
}

/// Caches of a real model and a real draft: what is allocated while requests come and go is freed or used again.
#[test]
fn caches_of_models_and_drafts_are_used_again() {
    let mut bench = Bench::new(TINY, 1);
    let mut draft = draft(&bench, "eagle3-chain");
    let options = Options {
        batch: 4,
        kept: 2,
        prompt_rows: 16,
        ..Options::default()
    };
    let parts = parts(
        bench.target.model.as_mut(),
        draft.as_mut(),
        Box::new(FixedBudget),
    );
    let mut engine = Engine::new(parts, options).expect("an engine");
    let (mut random, mut known) = (Seeded::new(2, 0), Vec::new());
    let mut run = |count| {
        operate(&mut engine, count, &mut random, &mut known);
        while !engine.is_idle() {
            engine.step();
        }
        known.clear();
    };
    run(3000); // everything is as large as it gets
    let info = measure(|| run(3000));
    // One cache of the target alone has 7 layers of 2 x 256 x 16 values.
    assert!(
        info.bytes_current < 50_000,
        "{} bytes more",
        info.bytes_current
    );
}

#[test]
fn requests_wait_for_memory_and_those_that_never_fit_are_refused() {
    let (target, _) = counted();
    let options = Options {
        batch: 8,
        memory: Some(1000),
        ..Options::default()
    };
    let mut engine = Engine::new(Parts::plain(target, Auto), options).expect("an engine");
    let request = |prompt: usize, new: usize| Asked {
        prompt: vec![1; prompt],
        max_new_tokens: new,
        ..Asked::default()
    };
    let error = engine
        .submit(request(90, 40))
        .expect_err("too large")
        .to_string();
    assert!(
        error.contains("1310 bytes") && error.contains("of 1000") && error.contains("90 tokens"),
        "{error}"
    );
    // 40 + 9 tokens and the row of a root: 500 bytes each.
    let ids: Vec<RequestId> = (0..5)
        .map(|_| engine.submit(request(40, 9)).expect("taken"))
        .collect();
    let mut most = 0;
    let mut ended = Vec::new();
    while !engine.is_idle() {
        for event in engine.step() {
            if let Event::Finished { request, output } = event {
                assert_eq!(output.finish, Finish::Length);
                ended.push(request);
            }
        }
        most = most.max(engine.load().0);
        assert!(engine.bytes() <= 1000);
    }
    assert_eq!((most, ended), (2, ids));
}

/// A large request leaves a large cache behind, which small ones do not need: they are not counted as large for that.
#[test]
fn a_large_request_does_not_hold_up_the_small_ones_after_it() {
    let (target, _) = counted();
    let options = Options {
        batch: 8,
        memory: Some(1000),
        ..Options::default()
    };
    let mut engine = Engine::new(Parts::plain(target, Auto), options).expect("an engine");
    let mut ask = |prompt: usize, new: usize, count: usize| {
        for _ in 0..count {
            let request = Asked {
                prompt: vec![1; prompt],
                max_new_tokens: new,
                ..Asked::default()
            };
            engine.submit(request).expect("taken");
        }
        let mut most = 0;
        while !engine.is_idle() {
            engine.step();
            most = most.max(engine.load().0);
            assert!(engine.bytes() <= 1000);
        }
        most
    };
    assert_eq!((ask(90, 9, 1), ask(5, 6, 8)), (1, 8));
}

/// The rows that a prompt goes on from are the last that make room for it.
#[test]
fn a_prefix_that_is_wanted_outlives_others_when_memory_is_short() {
    let (target, _) = counted();
    let options = Options {
        batch: 1,
        memory: Some(1600),
        kept: 4,
        ..Options::default()
    };
    let mut engine = Engine::new(Parts::plain(target, Auto), options).expect("an engine");
    let mut ask = |first: u32, length: usize| {
        let request = Asked {
            prompt: (0..length as u32)
                .map(|i| (first + i / 3) % VOCAB as u32)
                .collect(),
            max_new_tokens: 5,
            ..Asked::default()
        };
        let go_on = &mut |_: &Event| std::ops::ControlFlow::Continue(());
        scylla_core::engine::decode(&mut engine, vec![request], go_on)[0].reused_tokens
    };
    assert_eq!((ask(0, 40), ask(2, 40)), (0, 0));
    // Two are kept; there is room for one of them beside a third of this length.
    assert!(ask(0, 60) >= 39);
}

/// What fails when a slot is opened, once.
struct FailsToOpen {
    inner: Counted,
    forks: bool,
}

impl TargetModel for FailsToOpen {
    fn open(&mut self, slot: Slot) -> Result<()> {
        self.inner.open(slot)
    }
    fn close(&mut self, slot: Slot) {
        self.inner.close(slot);
    }
    fn forward(&mut self, step: &Forwarded<'_>) -> Result<Forward> {
        self.inner.forward(step)
    }
    fn commit(&mut self, slot: Slot, path: &[usize]) -> Result<()> {
        self.inner.commit(slot, path)
    }
    fn shape(&self) -> TargetShape {
        self.inner.shape()
    }
    fn fork(&mut self, from: Slot, to: Slot, count: usize) -> Result<bool> {
        match std::mem::replace(&mut self.forks, true) {
            true => self.inner.fork(from, to, count),
            false => {
                self.inner.open(to)?;
                Err(Error::Invalid("no memory for a copy".into()))
            }
        }
    }
}

#[test]
fn a_slot_that_cannot_be_opened_ends_its_request_and_is_free_again() {
    let (inner, open) = counted();
    let target = FailsToOpen {
        inner,
        forks: false,
    };
    let options = Options {
        kept: 2,
        ..Options::default()
    };
    let mut engine = Engine::new(Parts::plain(target, Auto), options).expect("an engine");
    let mut ends = Vec::new();
    for _ in 0..3 {
        let request = Asked {
            prompt: vec![1; 20],
            max_new_tokens: 2,
            ..Asked::default()
        };
        let go_on = &mut |_: &Event| std::ops::ControlFlow::Continue(());
        let output = scylla_core::engine::decode(&mut engine, vec![request], go_on).remove(0);
        ends.push((output.finish, output.reused_tokens));
    }
    let length = Finish::Length;
    assert_eq!(ends, [(length, 0), (Finish::Failed, 0), (length, 19)]);
    drop(engine);
    assert_eq!(open.load(std::sync::atomic::Ordering::Relaxed), 0);
}

#[test]
fn budgets_beyond_the_context_are_cut_to_it() {
    let (target, _) = counted();
    let draft = TableDraft::new(law(), Drawing::Deterministic);
    let parts = Parts::drafted(target, Draft::new("table", draft), Auto);
    let mut engine = Engine::new(parts, Options::default()).expect("an engine");
    let request = Asked {
        prompt: vec![1; 190],
        max_new_tokens: 500,
        budget: Budget {
            total: 4096,
            width: 2,
            depth: 4095,
        },
        ..Asked::default()
    };
    let outputs = scylla_core::engine::decode(&mut engine, vec![request], &mut |_| {
        std::ops::ControlFlow::Continue(())
    });
    assert_eq!(
        (outputs[0].ids.len(), outputs[0].finish),
        (10, Finish::Context)
    );
}

/// A draft that fails in slots whose text ends with a token, however many are asked together.
struct FailsAt(TableDraft, u32);

impl DraftModel for FailsAt {
    fn drawing(&self, sampling: &Sampling) -> Drawing {
        self.0.drawing(sampling)
    }
    fn open(&mut self, slot: Slot) -> Result<()> {
        self.0.open(slot)
    }
    fn close(&mut self, slot: Slot) {
        self.0.close(slot);
    }
    fn observe(&mut self, committed: &[Committed<'_>]) -> Result<()> {
        self.0.observe(committed)
    }
    fn propose(&mut self, requests: &mut [Request<'_>]) -> Result<Vec<Tree>> {
        match requests.iter().find(|r| r.root == self.1) {
            Some(r) => Err(Error::Invalid(format!("slot {}: no more", r.slot))),
            None => self.0.propose(requests),
        }
    }
}

#[test]
fn a_draft_that_fails_in_one_slot_ends_that_request_and_the_others_go_on() {
    let counting: Law = Arc::new(|tokens: &[u32]| {
        let next = (tokens[tokens.len() - 1] as usize + 1) % VOCAB;
        (0..VOCAB)
            .map(|i| if i == next { 0.96 } else { 0.01 })
            .collect()
    });
    let target = TableTarget::new(VOCAB, 64, Arc::clone(&counting));
    // It proposes what does not come, so that roots go through all tokens.
    let wrong: Law = Arc::new(|_: &[u32]| vec![0.2; VOCAB]);
    let draft = FailsAt(TableDraft::new(wrong, Drawing::Deterministic), 4);
    let parts = Parts::drafted(target, Draft::new("fails", draft), Auto);
    let options = Options {
        batch: 3,
        ..Options::default()
    };
    let mut engine = Engine::new(parts, options).expect("an engine");
    let request = |first: u32, new: usize| Asked {
        prompt: vec![first],
        max_new_tokens: new,
        budget: Budget::chain(1),
        ..Asked::default()
    };
    let requests = vec![request(0, 4), request(1, 9), request(0, 3)];
    let outputs = scylla_core::engine::decode(&mut engine, requests, &mut |_| {
        std::ops::ControlFlow::Continue(())
    });
    assert_eq!(
        (outputs[0].finish, &outputs[0].ids[..]),
        (Finish::Length, &[1, 2, 3, 4][..])
    );
    assert_eq!(
        (outputs[1].finish, &outputs[1].ids[..]),
        (Finish::Failed, &[2, 3, 4][..])
    );
    assert!(
        outputs[1]
            .failed
            .as_deref()
            .is_some_and(|m| m.contains("no more"))
    );
    assert_eq!(
        (outputs[2].finish, outputs[2].ids.len()),
        (Finish::Length, 3)
    );
}

#[test]
fn a_step_tells_its_whole_costs_and_requests_their_shares_of_them() {
    let (target, _) = counted();
    let draft = TableDraft::new(law(), Drawing::Independent);
    let parts = Parts::drafted(target, Draft::new("table", draft), Auto);
    let options = Options {
        batch: 3,
        prompt_rows: 7,
        ..Options::default()
    };
    let mut engine = Engine::new(parts, options).expect("an engine");
    for (i, prompt) in [10, 3, 12, 1].into_iter().enumerate() {
        let request = Asked {
            prompt: vec![1; prompt],
            max_new_tokens: 6,
            sequence: i as u64,
            sampling: Sampling {
                temperature: 1.0,
                ..Sampling::default()
            },
            budget: Budget::chain(2),
            trees: true,
            ..Asked::default()
        };
        engine.submit(request).expect("taken");
    }
    let (mut steps, mut outputs, mut trees) =
        (Vec::<Step>::new(), BTreeMap::new(), BTreeMap::new());
    while !engine.is_idle() {
        let mut here = Vec::new();
        for event in engine.step() {
            match event {
                Event::Step(step) => {
                    assert_eq!(step.step, steps.len() as u64);
                    let nodes: usize = here.iter().sum();
                    assert_eq!((step.batch, step.rows), (here.len(), nodes));
                    steps.push(step);
                }
                Event::Cycle {
                    request,
                    tree,
                    verdict,
                } => {
                    here.push(tree.len());
                    let all: &mut Vec<(usize, usize)> = trees.entry(request).or_default();
                    all.push((tree.len(), verdict.path.len()));
                }
                Event::Finished { request, output } => {
                    outputs.insert(request, output);
                }
                Event::Tokens { .. } => {}
            }
        }
    }
    assert!(steps.iter().all(|s| s.prompt_rows <= 7 && s.batch <= 3));
    assert_eq!(steps.iter().map(|s| s.prompt_rows).sum::<usize>(), 26);
    let mut of_steps: BTreeMap<RequestId, Vec<(usize, usize)>> = BTreeMap::new();
    for step in &steps {
        for one in &step.requests {
            of_steps
                .entry(one.request)
                .or_default()
                .push((one.nodes, one.accepted));
        }
    }
    assert_eq!(of_steps, trees);
    for (request, output) in &outputs {
        let nodes: Vec<usize> = output.cycles.iter().map(|c| c.nodes).collect();
        let seen: Vec<usize> = trees
            .get(request)
            .into_iter()
            .flatten()
            .map(|t| t.0)
            .collect();
        assert_eq!(nodes, seen);
        for cycle in &output.cycles {
            let step = &steps[cycle.step as usize];
            assert!(step.requests.iter().any(|r| r.request == *request));
        }
        let waited = output.waited;
        let first = waited.first.expect("a token");
        assert!(waited.slot <= first && first <= waited.end);
    }
    let shares: f64 = outputs.values().map(|o| o.ms.prefill + o.ms.decode()).sum();
    let whole: f64 = steps.iter().map(|s| s.ms.decode()).sum();
    // The end of a step, when slots are closed, is nobody's.
    assert!(
        shares <= whole * (1.0 + 1e-9) && shares > 0.0,
        "{shares} of {whole}"
    );
}

/// Two turns of a conversation, and another one that begins alike: rows are taken over, text stays the same.
#[test]
fn what_prompts_share_is_not_run_again_and_changes_nothing() {
    let names = ["plain", "ngram", "eagle3-chain", "scylla", "lm-widths"];
    let forms = [WeightForm::F32, WeightForm::Q8_0];
    for (name, form) in names
        .iter()
        .flat_map(|name| forms.map(|form| (*name, form)))
    {
        let mut bench = Bench::held(TINY, 2, form);
        let mut draft = draft(&bench, name);
        let mut run = |kept: usize| {
            let target = bench.target.model.as_mut();
            let parts = parts(target, draft.as_mut(), Box::new(FixedBudget));
            let options = Options {
                batch: 2,
                kept,
                ..Options::default()
            };
            let mut engine = Engine::new(parts, options).expect("an engine");
            let mut ask = |prompt: Vec<u32>, sequence: u64| {
                let request = Asked {
                    prompt,
                    sequence,
                    sampling: Sampling {
                        temperature: 0.8,
                        ..Sampling::default()
                    },
                    max_new_tokens: 12,
                    budget: Budget {
                        total: 5,
                        width: if name == "eagle3-chain" { 1 } else { 2 },
                        depth: 3,
                    },
                    ..Asked::default()
                };
                let go_on = &mut |_: &Event| std::ops::ControlFlow::Continue(());
                scylla_core::engine::decode(&mut engine, vec![request], go_on).remove(0)
            };
            let system: Vec<u32> = (0..50).map(|i| i * i % 13).collect();
            let first = ask(system.clone(), 0);
            let second = ask([&system[..], &first.ids, &[3, 4]].concat(), 1);
            let other = ask([&system[..], &[7, 7, 7]].concat(), 2);
            let again = ask(system.clone(), 3);
            let kept = engine.prefixes();
            ([first, second, other, again], kept)
        };
        let (fresh, none) = run(0);
        let (reused, prefixes) = run(2);
        assert_eq!((none.kept, none.hits), (0, 0));
        for (a, b) in fresh.iter().zip(&reused) {
            assert_eq!((&a.failed, &b.failed), (&None, &None), "{name}");
            assert_eq!(a.ids, b.ids, "{name}");
        }
        let taken: Vec<usize> = reused.iter().map(|o| o.reused_tokens).collect();
        // The last token that is shared is run again; of the first answer the last token was never forwarded. What follows
        // the system's text may be shared by chance.
        assert_eq!((taken[0], taken[1], taken[3]), (0, 60, 49), "{name}");
        assert!((49..=52).contains(&taken[2]), "{name}: {taken:?}");
        let told = (prefixes.hits, prefixes.reused, prefixes.kept);
        assert_eq!(told, (3, taken.iter().sum(), 2), "{name}");
    }
}

/// Probability of a statistic this large under the law; Wilson and Hilferty's approximation is too coarse for a tail, so that
/// bounds below are the statistic's: mean `d`, and Laurent and Massart's bound `d + 2 sqrt(d x) + 2 x` for exp(-x).
fn bound(degrees: f64, x: f64) -> f64 {
    degrees + 2.0 * (degrees * x).sqrt() + 2.0 * x
}

/// Pearson's statistic of counts against expectations, the rare as one cell, and its degrees of freedom.
fn statistic(counts: &HashMap<Vec<u32>, usize>, law: &[(Vec<u32>, f64)], n: f64) -> (f64, f64) {
    let (mut sum, mut cells, mut rest) = (0.0, 0usize, (n, n));
    for (tokens, p) in law.iter().filter(|(_, p)| p * n >= 20.0) {
        let seen = counts.get(tokens).copied().unwrap_or(0) as f64;
        sum += (seen - p * n).powi(2) / (p * n);
        cells += 1;
        rest = (rest.0 - p * n, rest.1 - seen);
    }
    if rest.0 >= 20.0 {
        sum += (rest.1 - rest.0).powi(2) / rest.0;
        cells += 1;
    }
    (sum, (cells - 1) as f64)
}

/// Budgets that hang on the clock alone.
struct ByTheClock;

impl BudgetPolicy for ByTheClock {
    fn budgets(&mut self, outlook: &Outlook<'_>) -> Vec<Budget> {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let nanos = now.map_or(0, |d| d.subsec_nanos()) as usize / 100;
        let budget = |(i, r): (usize, &scylla_core::plugin::Drafting<'_>)| {
            r.most.within((nanos + i) % 4, 1 + (nanos / 7 + i) % 6)
        };
        outlook.requests.iter().enumerate().map(budget).collect()
    }
}

/// The law of three tokens behind a prompt, of a real model, and how often each text came, decoded 32 at a time.
fn drawn(policy: impl Fn() -> Box<dyn BudgetPolicy>, name: &str, n: usize, least: usize) {
    let mut bench = Bench::new(TINY, 2);
    let sampling = Sampling {
        temperature: 0.9,
        top_p: 0.95,
        ..Sampling::default()
    };
    let prompt: Vec<u32> = (0..20).map(|i| i * 5 % 13).collect();
    let law = law_of(&mut bench, &prompt, &sampling, 3);
    let tree = TreeSettings {
        early_stop: false,
        tree: if name == "chain" {
            TreeKind::Chain
        } else {
            TreeKind::Widths
        },
        widths: if name == "chain" {
            Vec::new()
        } else {
            vec![2, 2, 1]
        },
        ..TreeSettings::default()
    };
    let mut draft: TreeDraft = bench.draft("draft-lm", &tree, None);
    let mut parts = Parts::drafted(
        bench.target.model.as_mut(),
        Draft::new("under test", &mut draft),
        Auto,
    );
    parts.policy = policy();
    let options = Options {
        batch: 32,
        kept: 1,
        ..Options::default()
    };
    let mut engine = Engine::new(parts, options).expect("an engine");
    for sequence in 0..n as u64 {
        let request = Asked {
            prompt: prompt.clone(),
            sequence,
            sampling: sampling.clone(),
            max_new_tokens: 3,
            budget: Budget {
                total: 6,
                width: if name == "chain" { 1 } else { 2 },
                depth: 2,
            },
            ..Asked::default()
        };
        engine.submit(request).expect("taken");
    }
    let (mut counts, mut drafted) = (HashMap::new(), 0);
    while !engine.is_idle() {
        for event in engine.step() {
            match event {
                Event::Finished { output, .. } => *counts.entry(output.ids).or_default() += 1,
                Event::Step(step) => drafted += step.rows - step.batch,
                _ => {}
            }
        }
    }
    assert!(drafted > least, "{drafted} nodes drafted: nothing is shown");
    let (found, degrees) = statistic(&counts, &law, n as f64);
    // exp(-25) is one in 7e10.
    let most = bound(degrees, 25.0);
    assert!(
        degrees > 50.0 && found < most,
        "{name}: {found} with {degrees} degrees, at most {most}"
    );
}

/// Every text of so many tokens with its probability.
fn law_of(
    bench: &mut Bench,
    prompt: &[u32],
    sampling: &Sampling,
    length: usize,
) -> Vec<(Vec<u32>, f64)> {
    let model = bench.target.model.as_mut();
    let mut texts = vec![(Vec::new(), 1.0)];
    for _ in 0..length {
        let mut longer = Vec::new();
        for (text, p) in texts {
            let tokens = [prompt, &text].concat();
            model.open(0).expect("open");
            let rows = SlotRows {
                slot: 0,
                tokens: &tokens,
                parents: &[],
                want: Want::Last,
            };
            let found = model.forward(&Forwarded {
                slots: vec![rows],
                taps: &[],
            });
            model.close(0);
            let logits: Matrix = found.expect("forward").logits.remove(0);
            let mut row = Vec::new();
            let values = logits.row(0).expect("row");
            sampling
                .distribution(&values, TINY.vocab, &mut row)
                .expect("a law");
            for (token, q) in row.into_iter().enumerate().filter(|(_, q)| *q > 0.0) {
                longer.push(([&text[..], &[token as u32]].concat(), p * q));
            }
        }
        texts = longer;
    }
    texts
}

#[test]
fn budgets_that_look_at_time_keep_the_law_of_sampled_text() {
    drawn(|| Box::new(ByTheClock), "chain", 12_000, 600);
    drawn(|| Box::new(ByTheClock), "widths", 12_000, 600);
    // How much that drafts hangs on the machine; its first step does.
    drawn(|| Box::new(AdaptiveBudget::default()), "widths", 12_000, 0);
}

/// Where a row costs as much as a token is worth nothing is drafted, where rows are free as much as is allowed.
#[test]
fn adaptive_budgets_follow_what_was_measured() {
    let run = |slope: f64| {
        let mut measured = Measured::default();
        for rows in 1..=40 {
            for _ in 0..9 {
                // Far dearer than any table's forward, so that what the run measures itself does not matter at once.
                measured
                    .costs
                    .forward
                    .add(rows, 1e6 * (1.0 + slope * (rows - 1) as f64), 0);
            }
        }
        for _ in 0..300 {
            measured.acceptance.add(3, &Tree::chain(0, &[1, 1, 1]), 2);
        }
        let (target, _) = counted();
        let draft = TableDraft::new(law(), Drawing::Deterministic);
        let mut parts = Parts::drafted(target, Draft::new("table", draft), Auto);
        parts.policy = Box::new(AdaptiveBudget::default());
        let mut engine = Engine::new(parts, Options::default()).expect("an engine");
        engine.resume(measured);
        let request = Asked {
            prompt: vec![1],
            max_new_tokens: 9,
            budget: Budget::chain(3),
            ..Asked::default()
        };
        engine.submit(request).expect("taken");
        engine.step();
        let events = engine.step();
        events
            .iter()
            .find_map(|e| match e {
                Event::Step(step) => Some(step.levels),
                _ => None,
            })
            .expect("a step")
    };
    assert_eq!((run(0.05), run(1.5)), (2, 0));
}
