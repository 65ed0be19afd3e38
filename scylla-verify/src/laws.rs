//! The rules' laws, by enumeration of every decision of drawing and accepting.

use std::sync::Arc;

use proptest::prelude::*;
use proptest::sample::select;
use scylla_core::chance::Seeded;
use scylla_core::plugin::{Chance, TargetRows, Verdict, Verifier};
use scylla_core::sampling::Sampling;
use scylla_core::tabular::{Law, TableDraft, TableRows};
use scylla_core::tree::{Budget, Drawing, Tree};
use scylla_core::{Result, draw};

use crate::prove::{Proof, drawn_by, prove};
use crate::{
    Block, Chain, DeterministicTree, Greedy, KSeq, RrsWithoutReplacement, SpecInfer, Traversal,
    Typical,
};

use Drawing::{Deterministic, Independent, WithoutReplacement};

/// How p and q of a case relate.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Generic,
    Peaked,
    Zeros,
    Equal,
    Disjoint,
    /// Both one-hot, as at temperature 0.
    OneHot,
    /// Nearly one-hot, as at a very low temperature.
    Cold,
    /// q over a subset of the vocabulary, with ids of its own.
    Subset,
}

const KINDS: [Kind; 8] = [
    Kind::Generic,
    Kind::Peaked,
    Kind::Zeros,
    Kind::Equal,
    Kind::Disjoint,
    Kind::OneHot,
    Kind::Cold,
    Kind::Subset,
];

/// A law over `vocab` tokens, random as a function of the tokens after the root; `allowed` tells which may have mass.
fn law(vocab: usize, seed: u64, kind: Kind, allowed: fn(usize) -> bool) -> Law {
    Arc::new(move |tokens: &[u32]| {
        let mut state = seed;
        for &t in &tokens[1..] {
            state = state.wrapping_mul(31).wrapping_add(u64::from(t) + 1);
        }
        let mut next = || {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (state >> 33) as f64 / (1u64 << 31) as f64
        };
        let power = match kind {
            Kind::Peaked => 6.0,
            Kind::Cold => 200.0,
            _ => 1.0,
        };
        let mut row: Vec<f64> = (0..vocab).map(|_| next().max(1e-9).powf(power)).collect();
        if kind == Kind::Zeros {
            row.iter_mut().filter(|v| **v < 0.45).for_each(|v| *v = 0.0);
        }
        for (i, v) in row.iter_mut().enumerate() {
            *v *= f64::from(u8::from(allowed(i)));
        }
        let best = (0..vocab)
            .filter(|&i| allowed(i))
            .max_by(|&a, &b| row[a].total_cmp(&row[b]));
        let best = best.expect("a token with mass");
        if kind == Kind::OneHot {
            row.fill(0.0);
        }
        row[best] = row[best].max(1e-300);
        let sum: f64 = row.iter().sum();
        row.iter().map(|v| v / sum).collect()
    })
}

/// A random case: target, draft and the shape of its trees.
#[derive(Debug, Clone)]
struct Case {
    kind: Kind,
    vocab: usize,
    seeds: (u64, u64),
    widths: Vec<usize>,
}

impl Case {
    fn target(&self) -> Law {
        let even = |i: usize| i.is_multiple_of(2);
        match self.kind {
            Kind::Disjoint => law(self.vocab, self.seeds.0, self.kind, even),
            _ => law(self.vocab, self.seeds.0, self.kind, |_| true),
        }
    }

    fn draft(&self, drawing: Drawing) -> TableDraft {
        let odd = |i: usize| !i.is_multiple_of(2);
        let q = match self.kind {
            Kind::Equal => self.target(),
            Kind::Disjoint => law(self.vocab, self.seeds.1, self.kind, odd),
            Kind::Subset => law(self.vocab - 1, self.seeds.1, self.kind, |_| true),
            _ => law(self.vocab, self.seeds.1, self.kind, |_| true),
        };
        let mut draft = TableDraft::new(q, drawing);
        draft.widths = self.widths.clone();
        if self.kind == Kind::Subset {
            draft.draft_to_target = Some((1..self.vocab as u32).rev().collect());
        }
        draft
    }

    fn prove(&self, rule: &dyn Verifier, drawing: Drawing) -> Proof {
        let mut draft = self.draft(drawing);
        let sampling = sampling();
        let mut drawn = drawn_by(&mut draft, 0, self.budget(), &sampling);
        let depth = self.widths.len();
        let proof = prove(rule, &mut drawn, &self.target(), 0, self.vocab, depth).expect("proof");
        assert!((proof.law.values().sum::<f64>() - 1.0).abs() < 1e-9);
        proof
    }

    fn budget(&self) -> Budget {
        Budget {
            total: 64,
            width: 8,
            depth: self.widths.len() - 1,
        }
    }
}

fn sampling() -> Sampling {
    Sampling {
        temperature: 1.0,
        ..Sampling::default()
    }
}

fn cases(widths: &'static [&'static [usize]]) -> impl Strategy<Value = Case> {
    let seeds = (0u64..1_000_000, 0u64..1_000_000);
    (select(&KINDS[..]), 2usize..5, seeds, select(widths)).prop_map(
        |(kind, vocab, seeds, widths)| {
            let largest = if widths.iter().product::<usize>() > 3 {
                3
            } else {
                4
            };
            Case {
                kind,
                vocab: vocab.min(largest),
                seeds,
                widths: widths.to_vec(),
            }
        },
    )
}

const CHAINS: &[&[usize]] = &[&[1], &[1, 1], &[1, 1, 1]];
const TREES: &[&[usize]] = &[
    &[2],
    &[3],
    &[4],
    &[2, 1],
    &[1, 2],
    &[3, 1],
    &[2, 2],
    &[2, 1, 1],
    &[1, 1, 2],
];
const BOUND: f64 = 1e-9;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(240))]

    #[test]
    fn chain_follows_the_targets_law(case in cases(CHAINS), drawing in select(vec![Deterministic, Independent, WithoutReplacement])) {
        prop_assert!(case.prove(&Chain, drawing).tv_to_target <= BOUND);
    }

    #[test]
    fn block_follows_the_targets_law_and_never_accepts_less_than_chain(
        case in cases(CHAINS), drawing in select(vec![Deterministic, Independent]),
    ) {
        let (block, chain) = (case.prove(&Block, drawing), case.prove(&Chain, drawing));
        prop_assert!(block.tv_to_target <= BOUND);
        prop_assert!(block.expected_committed >= chain.expected_committed - 1e-12);
    }

    #[test]
    fn traversal_is_block_verification_on_chains(case in cases(CHAINS), drawing in select(vec![Deterministic, Independent])) {
        let (a, b) = (case.prove(&Traversal, drawing), case.prove(&Block, drawing));
        prop_assert!((a.expected_committed - b.expected_committed).abs() < 1e-12);
        for (tokens, p) in &a.law {
            prop_assert!((p - b.law.get(tokens).copied().unwrap_or(0.0)).abs() < 1e-12);
        }
    }

    #[test]
    fn deterministic_tree_follows_the_targets_law(
        case in cases(TREES), drawing in select(vec![Deterministic, Deterministic, Independent, WithoutReplacement]),
    ) {
        prop_assert!(case.prove(&DeterministicTree, drawing).tv_to_target <= BOUND);
    }

    #[test]
    fn rrs_without_replacement_follows_the_targets_law(case in cases(TREES)) {
        prop_assert!(case.prove(&RrsWithoutReplacement, WithoutReplacement).tv_to_target <= BOUND);
    }

    #[test]
    fn specinfer_follows_the_targets_law(case in cases(TREES)) {
        prop_assert!(case.prove(&SpecInfer, Independent).tv_to_target <= BOUND);
    }

    #[test]
    fn k_seq_follows_the_targets_law(case in cases(TREES)) {
        prop_assert!(case.prove(&KSeq, Independent).tv_to_target <= BOUND);
    }

    #[test]
    fn traversal_follows_the_targets_law(
        case in cases(TREES), drawing in select(vec![Deterministic, Independent, WithoutReplacement]),
    ) {
        prop_assert!(case.prove(&Traversal, drawing).tv_to_target <= BOUND);
    }

    #[test]
    fn traversal_never_accepts_less_than_the_rule_from_the_root(case in cases(TREES)) {
        let from_root = case.prove(&RrsWithoutReplacement, WithoutReplacement);
        let from_leaves = case.prove(&Traversal, WithoutReplacement);
        prop_assert!(from_leaves.expected_committed >= from_root.expected_committed - 1e-9);
    }

    #[test]
    fn what_is_equal_is_accepted_whole(mut case in cases(TREES)) {
        case.kind = Kind::Equal;
        for (rule, drawing) in [
            (&RrsWithoutReplacement as &dyn Verifier, WithoutReplacement),
            (&SpecInfer, Independent),
            (&KSeq, Independent),
            (&Traversal, Independent),
        ] {
            let proof = case.prove(rule, drawing);
            let whole = (case.widths.len() + 1) as f64;
            prop_assert!((proof.expected_committed - whole).abs() < 1e-9, "{}: {}", rule.name(), proof.expected_committed);
        }
    }

    #[test]
    fn greedy_is_the_longest_path_of_argmaxes(case in cases(TREES), drawing in select(vec![Deterministic, Independent])) {
        let (mut draft, target, sampling) = (case.draft(drawing), case.target(), sampling());
        let mut chance = Seeded::new(case.seeds.0, 1);
        let tree = drawn_by(&mut draft, 0, case.budget(), &sampling)(&mut chance).expect("tree");
        let rows = TableRows { law: &target, history: &[], tree: &tree };
        let verdict = Greedy.verify(&tree, &rows, &mut chance).expect("verdict");
        let argmax = |node: usize| rows.argmax(&[node]).expect("argmax")[0];
        let follows = |&node: &usize| {
            tree.path_to(node).iter().all(|&n| tree.tokens[n] == argmax(tree.parents[n]))
        };
        let longest = (0..tree.len()).filter(follows).map(|n| tree.path_to(n).len()).max();
        prop_assert_eq!(Some(verdict.path.len()), longest);
        let last = verdict.path.last().copied().unwrap_or(0);
        prop_assert!(follows(&last));
        prop_assert_eq!(verdict.bonus, argmax(last));
    }
}

fn fixed(kind: Kind, widths: &[usize]) -> Case {
    Case {
        kind,
        vocab: 3,
        seeds: (5, 9),
        widths: widths.to_vec(),
    }
}

#[test]
fn typical_acceptance_is_shown_to_be_lossy() {
    let proof = fixed(Kind::Generic, &[2, 1]).prove(&Typical::default(), Deterministic);
    assert!(proof.tv_to_target > 0.05, "{}", proof.tv_to_target);
    for drawing in [Deterministic, Independent, WithoutReplacement] {
        assert!(!Typical::default().exact_for(drawing, 1, &sampling()));
    }
    assert!(Typical::new(0.0, 0.3).is_err() && Typical::new(0.1, f64::NAN).is_err());
}

#[test]
fn greedy_under_sampling_is_shown_to_be_biased() {
    let proof = fixed(Kind::Generic, &[1, 1]).prove(&Greedy, Deterministic);
    assert!(proof.tv_to_target > 0.1);
    assert!(!Greedy.exact_for(Deterministic, 1, &sampling()));
}

#[test]
fn each_rule_says_for_which_trees_it_is_exact_and_elsewhere_it_is_biased_or_fails() {
    let claims: [(&dyn Verifier, [bool; 3]); 8] = [
        (&Chain, [false; 3]),
        (&Block, [false; 3]),
        (&DeterministicTree, [true; 3]),
        (&RrsWithoutReplacement, [false, false, true]),
        (&SpecInfer, [false, true, false]),
        (&KSeq, [false, true, false]),
        (&Traversal, [true; 3]),
        (&Typical::default(), [false; 3]),
    ];
    let drawings = [Deterministic, Independent, WithoutReplacement];
    for (rule, exact) in claims {
        for (drawing, exact) in drawings.into_iter().zip(exact) {
            let name = rule.name();
            let says = rule.exact_for(drawing, 2, &sampling());
            assert_eq!(says, exact, "{name}, {drawing}");
            // On some cases a wrong pairing happens to be right.
            let wrong = (0..12).filter(|&seed| {
                let mut case = fixed(Kind::Generic, &[2]);
                (case.vocab, case.seeds) = (4, (seed, seed + 50));
                let mut draft = case.draft(drawing);
                let sampling = sampling();
                let mut drawn = drawn_by(&mut draft, 0, case.budget(), &sampling);
                let proof = prove(rule, &mut drawn, &case.target(), 0, 4, 1);
                proof.map_or(true, |p| p.tv_to_target > 1e-4)
            });
            assert_eq!(wrong.count() == 0, exact, "{name}, {drawing}");
        }
    }
}

/// A rule with a fault, as they are found in the wild.
struct Faulty(&'static str);

impl Verifier for Faulty {
    fn name(&self) -> &str {
        self.0
    }

    fn exact_for(&self, _: Drawing, _: usize, _: &Sampling) -> bool {
        true // so it claims
    }

    fn verify(
        &self,
        tree: &Tree,
        rows: &dyn TargetRows,
        chance: &mut dyn Chance,
    ) -> Result<Verdict> {
        let (mut path, mut node, mut p) = (Vec::new(), 0, Vec::new());
        'nodes: loop {
            rows.row(node, &mut p)?;
            let mut q = tree
                .q
                .get(node)
                .and_then(|q| q.as_deref())
                .unwrap_or(&[])
                .to_vec();
            let mut tried: f64 = 0.0;
            for child in tree.children(node) {
                let x = tree.tokens[child] as usize;
                let ratio = (p[x] / q[x]).min(1.0);
                let passes = match self.0 {
                    // One number in [0, 1) for all siblings: it passed none of the earlier thresholds.
                    "one coin" => chance.coin(((ratio - tried) / (1.0 - tried)).max(0.0)),
                    _ => chance.coin(ratio),
                };
                if passes {
                    path.push(child);
                    node = child;
                    continue 'nodes;
                }
                tried = tried.max(ratio);
                let mut left = 0.0;
                for i in 0..p.len() {
                    p[i] = (p[i] - q[i]).max(0.0);
                    left += p[i];
                }
                if left <= 0.0 {
                    // Only a fault comes here: nothing of p was left to reject into.
                    rows.row(node, &mut p)?;
                    break;
                }
                if self.0 != "residual not renormalised" {
                    p.iter_mut().for_each(|p| *p /= left);
                }
                q[x] = 0.0;
                let rest: f64 = q.iter().sum();
                q.iter_mut().for_each(|q| *q /= rest);
            }
            match self.0 {
                "bonus from the raw softmax" => {
                    // The transform undone: a square was taken in place of the softmax at temperature 1.
                    p.iter_mut().for_each(|p| *p = p.sqrt());
                }
                "bonus ignoring the path" => rows.row(0, &mut p)?,
                _ => {}
            }
            let bonus = chance.pick(&p)? as u32;
            return Ok(Verdict { path, bonus });
        }
    }
}

#[test]
fn faults_seen_in_the_wild_are_caught() {
    let tree = fixed(Kind::Generic, &[2, 2]);
    // The frame of the faulty rules is sound.
    assert!(tree.prove(&Faulty("none"), WithoutReplacement).tv_to_target < BOUND);
    for fault in [
        "one coin",
        "residual not renormalised",
        "bonus from the raw softmax",
        "bonus ignoring the path",
    ] {
        let tv = tree.prove(&Faulty(fault), WithoutReplacement).tv_to_target;
        assert!(tv > 1e-3, "{fault}: {tv}");
    }
}

/// Proves a rule against a drawer that does something to a tree drawn as it should be.
fn with_drawer(rule: &dyn Verifier, drawing: Drawing, spoil: impl Fn(&mut Tree)) -> f64 {
    let case = fixed(Kind::Generic, &[2]);
    let mut draft = case.draft(drawing);
    let sampling = sampling();
    let mut sound = drawn_by(&mut draft, 0, case.budget(), &sampling);
    let mut drawn = |chance: &mut dyn Chance| {
        let mut tree = sound(chance)?;
        spoil(&mut tree);
        Ok(tree)
    };
    let proof = prove(rule, &mut drawn, &case.target(), 0, 3, 1).expect("proof");
    proof.tv_to_target
}

#[test]
fn drawers_that_report_another_q_prune_or_re_rank_are_caught() {
    let q_of = |tree: &Tree, node: usize| {
        tree.q[0]
            .as_ref()
            .map_or(0.0, |q| q[tree.tokens[node] as usize])
    };
    // q as it was before the transform: drawn from q, reported as its normalised square root.
    let raw = |tree: &mut Tree| {
        let roots: Vec<f64> = tree.q[0]
            .iter()
            .flat_map(|q| q.iter())
            .map(|q| q.sqrt())
            .collect();
        let sum: f64 = roots.iter().sum();
        tree.q[0] = Some(roots.iter().map(|v| v / sum).collect());
    };
    // The less likely of two children is dropped, or tried last.
    let prune = |tree: &mut Tree| {
        if q_of(tree, 1) < q_of(tree, 2) {
            tree.tokens.swap(1, 2);
        }
        tree.tokens.truncate(2);
        tree.parents.truncate(2);
    };
    let re_rank = |tree: &mut Tree| {
        if q_of(tree, 1) < q_of(tree, 2) {
            tree.tokens.swap(1, 2);
        }
    };
    // To stop early without a look at the values is sound.
    let stop_early = |tree: &mut Tree| {
        tree.tokens.truncate(2);
        tree.parents.truncate(2);
    };
    for (rule, drawing) in [
        (&RrsWithoutReplacement as &dyn Verifier, WithoutReplacement),
        (&SpecInfer, Independent),
        (&Traversal, WithoutReplacement),
    ] {
        let name = rule.name();
        assert!(with_drawer(rule, drawing, |_| {}) < BOUND, "{name}");
        assert!(with_drawer(rule, drawing, stop_early) < BOUND, "{name}");
        for (what, tv) in [
            ("raw q", with_drawer(rule, drawing, raw)),
            ("pruned", with_drawer(rule, drawing, prune)),
            ("re-ranked", with_drawer(rule, drawing, re_rank)),
        ] {
            assert!(tv > 1e-3, "{name}, {what}: {tv}");
        }
    }
}

#[test]
fn broken_input_is_an_error_and_never_a_panic_or_a_bias() {
    let rules: [&dyn Verifier; 9] = [
        &Greedy,
        &Chain,
        &Block,
        &DeterministicTree,
        &RrsWithoutReplacement,
        &SpecInfer,
        &KSeq,
        &Traversal,
        &Typical::default(),
    ];
    let mut chance = Seeded::new(1, 1);
    let good: Law = Arc::new(|_| vec![0.5, 0.25, 0.25]);
    let bad: Law = Arc::new(|_| vec![f64::NAN, 0.5, 0.5]);
    let mut verify = |rule: &dyn Verifier, law: &Law, tree: &Tree| {
        let rows = TableRows {
            law,
            history: &[],
            tree,
        };
        rule.verify(tree, &rows, &mut chance)
    };
    let mut drawn = Tree::chain(0, &[1]);
    drawn.drawing = Independent;
    let without_q = drawn.clone();
    drawn.q = vec![Some(vec![0.5, 0.25, 0.25].into()), None];
    let mut outside = drawn.clone();
    outside.tokens[1] = 7;
    outside.q = vec![
        Some([vec![0.5], vec![0.0; 6], vec![0.5]].concat().into()),
        None,
    ];
    for rule in rules {
        let name = rule.name();
        // The root alone is plain decoding.
        let verdict = verify(rule, &good, &Tree::root(0)).expect("plain");
        assert!(verdict.path.is_empty() && verdict.bonus < 3, "{name}");
        assert!(verify(rule, &good, &drawn).is_ok(), "{name}");
        assert!(verify(rule, &bad, &Tree::root(0)).is_err(), "{name}");
        let mut first = drawn.clone();
        first.tokens[1] = 0;
        assert!(verify(rule, &bad, &first).is_err(), "{name}");
        if !["greedy", "deterministic-tree", "typical"].contains(&name) {
            assert!(verify(rule, &good, &without_q).is_err(), "{name}");
        }
        if name != "greedy" {
            assert!(verify(rule, &good, &outside).is_err(), "{name}");
        }
    }
}

#[test]
fn memory_is_a_row_per_level_whatever_the_number_of_nodes() {
    let case = fixed(Kind::Generic, &[3, 3, 2]);
    let (mut draft, target, sampling) = (case.draft(Independent), case.target(), sampling());
    let mut chance = Seeded::new(1, 1);
    let tree = drawn_by(&mut draft, 0, case.budget(), &sampling)(&mut chance).expect("tree");
    assert_eq!(tree.len(), 1 + 3 + 9 + 18);
    let rows = TableRows {
        law: &target,
        history: &[],
        tree: &tree,
    };
    for rule in [
        &SpecInfer as &dyn Verifier,
        &KSeq,
        &Traversal,
        &DeterministicTree,
    ] {
        for position in 0..50 {
            chance.at(position);
            rule.verify(&tree, &rows, &mut chance).expect("verdict");
        }
    }
    let kept = crate::weights::spare_rows();
    assert!((1..=4).contains(&kept), "{kept} rows");
}

#[test]
fn drawing_stops_at_the_support_and_rules_go_on() {
    // Three siblings wanted, two in the support.
    let case = fixed(Kind::Subset, &[3]);
    assert!(
        case.prove(&RrsWithoutReplacement, WithoutReplacement)
            .tv_to_target
            < BOUND
    );
    let mut chance = Seeded::new(3, 3);
    let found = draw::children(WithoutReplacement, &[0.5, 0.0, 0.5], 3, &mut chance);
    assert_eq!(found.expect("drawn").len(), 2);
}
