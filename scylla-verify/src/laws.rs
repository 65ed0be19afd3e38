//! The rules' laws, by enumeration of every decision of drawing and accepting.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use scylla_core::chance::enumerate;
use scylla_core::plugin::{Chance, Committed, DraftModel, Request, Verifier};
use scylla_core::sampling::Sampling;
use scylla_core::table::{Law, TableDraft, TableRows};
use scylla_core::tree::{Budget, Drawing};

use crate::{Chain, Greedy};

/// A random law over `vocab` tokens: a function of the tokens after the root, with zeros here and there.
fn law(vocab: usize, seed: u64, sharp: f64) -> Law {
    Arc::new(move |tokens: &[u32]| {
        let mut state = seed;
        for &t in &tokens[1..] {
            state = state.wrapping_mul(31).wrapping_add(u64::from(t) + 1);
        }
        let mut next = || {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            ((state >> 33) as f64 / (1u64 << 31) as f64).powf(sharp)
        };
        let mut row: Vec<f64> = (0..vocab)
            .map(|_| next())
            .map(|v| if v < 0.1 { 0.0 } else { v })
            .collect();
        row[seed as usize % vocab] += 0.05;
        let sum: f64 = row.iter().sum();
        row.iter().map(|v| v / sum).collect()
    })
}

/// Probability of each committed sequence of one cycle.
fn law_of_cycle(
    rule: &dyn Verifier,
    p: &Law,
    q: &Law,
    drawing: Drawing,
    depth: usize,
) -> BTreeMap<Vec<u32>, f64> {
    let mut out = BTreeMap::new();
    let sampling = Sampling {
        temperature: 1.0,
        ..Sampling::default()
    };
    let cycle = |chance: &mut dyn Chance| {
        let mut draft = TableDraft::new(Arc::clone(q), drawing);
        draft.open(0)?;
        draft.observe(&[Committed {
            slot: 0,
            tokens: &[0],
            path: &[],
            taps: &[],
        }])?;
        let budget = Budget::chain(depth);
        let tree = draft
            .propose(&mut [Request {
                slot: 0,
                root: 0,
                budget,
                sampling: &sampling,
                chance,
            }])?
            .remove(0);
        let rows = TableRows {
            law: p,
            history: &[],
            tree: &tree,
        };
        let verdict = rule.verify(&tree, &rows, chance)?;
        let mut tokens: Vec<u32> = verdict.path.iter().map(|&n| tree.tokens[n]).collect();
        tokens.push(verdict.bonus);
        Ok(tokens)
    };
    enumerate(cycle, |probability, tokens| {
        *out.entry(tokens).or_insert(0.0) += probability
    })
    .expect("enumeration");
    out
}

/// Total variation between the law continued by plain sampling to `depth + 1` tokens and the target's joint law.
fn distance(committed: &BTreeMap<Vec<u32>, f64>, p: &Law, vocab: usize, depth: usize) -> f64 {
    let mut distance = 0.0;
    for code in 0..vocab.pow(depth as u32 + 1) {
        let tokens: Vec<u32> = (0..=depth)
            .map(|i| (code / vocab.pow(i as u32) % vocab) as u32)
            .collect();
        // Probability that p continues the first `from` tokens by the rest.
        let continued = |from: usize| -> f64 {
            (from..=depth)
                .map(|i| {
                    let before: Vec<u32> = std::iter::once(0)
                        .chain(tokens[..i].iter().copied())
                        .collect();
                    p(&before)[tokens[i] as usize]
                })
                .product()
        };
        let found: f64 = (1..=depth + 1)
            .map(|n| committed.get(&tokens[..n]).copied().unwrap_or(0.0) * continued(n))
            .sum();
        distance += (found - continued(0)).abs();
    }
    distance / 2.0
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn chain_sampling_follows_the_targets_law(
        seeds in (0u64..1_000_000, 0u64..1_000_000), sharp in 0.3f64..6.0, depth in 1usize..4, vocab in 2usize..5,
        drawing in prop::sample::select(vec![Drawing::Deterministic, Drawing::Independent, Drawing::WithoutReplacement]),
    ) {
        let (p, q) = (law(vocab, seeds.0, sharp), law(vocab, seeds.1, sharp));
        let committed = law_of_cycle(&Chain, &p, &q, drawing, depth);
        prop_assert!((committed.values().sum::<f64>() - 1.0).abs() < 1e-9);
        prop_assert!(distance(&committed, &p, vocab, depth) < 1e-9);
    }

    #[test]
    fn equal_draft_and_target_accept_everything(seed in 0u64..1_000_000, depth in 1usize..4) {
        let p = law(3, seed, 1.0);
        let committed = law_of_cycle(&Chain, &p, &p, Drawing::Independent, depth);
        prop_assert!(committed.iter().all(|(tokens, &prob)| tokens.len() == depth + 1 || prob < 1e-12));
    }
}

#[test]
fn the_distance_sees_a_biased_rule() {
    // Greedy verification under sampling is not exact, and the enumeration must show it.
    let (p, q) = (law(3, 5, 1.0), law(3, 9, 1.0));
    let committed = law_of_cycle(&Greedy, &p, &q, Drawing::Deterministic, 2);
    assert!(distance(&committed, &p, 3, 2) > 0.1);
    let sampling = Sampling {
        temperature: 1.0,
        ..Sampling::default()
    };
    assert!(!Greedy.exact_for(Drawing::Deterministic, 1, &sampling));
    assert!(!Chain.exact_for(Drawing::Independent, 2, &sampling));
}
