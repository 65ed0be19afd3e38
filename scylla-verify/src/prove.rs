//! The prover: the law of one cycle, by enumeration of every random decision of drawing and accepting.
//!
//! It runs the very code that decodes. A rule or drawer of one's own is proved with one call of [`prove`].

use std::collections::{BTreeMap, HashMap};

use scylla_core::chance::enumerate;
use scylla_core::plugin::{Chance, Committed, DraftModel, Request, Verifier};
use scylla_core::sampling::Sampling;
use scylla_core::tabular::{Law, TableRows};
use scylla_core::tree::{Budget, Tree};
use scylla_core::{Error, Result};

/// What enumeration found about a rule on one case.
#[derive(Debug, Clone, PartialEq)]
pub struct Proof {
    /// Probability of each committed sequence of one cycle: accepted tokens and bonus.
    pub law: BTreeMap<Vec<u32>, f64>,
    /// Mean tokens committed, bonus included.
    pub expected_committed: f64,
    /// Total variation between the target's joint law and this law, continued by plain sampling where it is shorter.
    pub tv_to_target: f64,
    /// Ways in which the random decisions can fall.
    pub branches: usize,
}

/// Sequences compared at the most.
const MOST: usize = 1 << 20;

/// Proves a rule: draws a tree with `draw` in every way, verifies it in every way against `target`, and compares.
///
/// The root is token `root` with nothing before it; `target` is asked for sequences that begin with it. `depth` is
/// that of the deepest tree `draw` can give.
///
/// # Errors
/// What `draw` and the rule report; a rule that returns no path of the tree; more than a million sequences.
pub fn prove(
    rule: &dyn Verifier,
    draw: &mut dyn FnMut(&mut dyn Chance) -> Result<Tree>,
    target: &Law,
    root: u32,
    vocab: usize,
    depth: usize,
) -> Result<Proof> {
    prove_watched(rule, draw, target, root, vocab, depth, &mut |_| {})
}

/// The same; `on_branch` is told the probability of each way, which sum to 1. To break off, `draw` returns an error.
///
/// # Errors
/// As [`prove`].
pub fn prove_watched(
    rule: &dyn Verifier,
    draw: &mut dyn FnMut(&mut dyn Chance) -> Result<Tree>,
    target: &Law,
    root: u32,
    vocab: usize,
    depth: usize,
    on_branch: &mut dyn FnMut(f64),
) -> Result<Proof> {
    let mut law = BTreeMap::new();
    let mut branches = 0;
    let cycle = |chance: &mut dyn Chance| {
        let tree = draw(chance)?;
        let deepest = tree.depth();
        if tree.tokens[0] != root || deepest > depth {
            return Err(Error::Invalid(format!(
                "a tree rooted at {} with {deepest} levels, expected root {root} and at most {depth}",
                tree.tokens[0]
            )));
        }
        let rows = TableRows {
            law: target,
            history: &[],
            tree: &tree,
        };
        let verdict = rule.verify(&tree, &rows, chance)?;
        verdict.check(&tree, vocab)?;
        let mut tokens: Vec<u32> = verdict.path.iter().map(|&n| tree.tokens[n]).collect();
        tokens.push(verdict.bonus);
        Ok(tokens)
    };
    enumerate(cycle, |probability, tokens| {
        branches += 1;
        on_branch(probability);
        *law.entry(tokens).or_insert(0.0) += probability;
    })?;
    Ok(Proof {
        expected_committed: law.iter().map(|(t, p)| t.len() as f64 * p).sum(),
        tv_to_target: distance(&law, target, root, vocab, depth)?,
        law,
        branches,
    })
}

/// Trees of a draft for [`prove`]: one slot, opened anew each time, with the root as its only token.
pub fn drawn_by<'a>(
    draft: &'a mut dyn DraftModel,
    root: u32,
    budget: Budget,
    sampling: &'a Sampling,
) -> impl FnMut(&mut dyn Chance) -> Result<Tree> + 'a {
    move |chance| {
        draft.close(0);
        draft.open(0)?;
        draft.observe(&[Committed {
            slot: 0,
            tokens: &[root],
            path: &[],
            taps: &[],
        }])?;
        let request = Request {
            slot: 0,
            root,
            budget,
            sampling,
            chance,
        };
        let trees = draft.propose(&mut [request])?;
        trees
            .into_iter()
            .next()
            .ok_or_else(|| Error::Invalid("the draft proposed no tree".into()))
    }
}

/// Half the sum of absolute differences over all sequences of `depth + 1` tokens.
fn distance(
    law: &BTreeMap<Vec<u32>, f64>,
    target: &Law,
    root: u32,
    vocab: usize,
    depth: usize,
) -> Result<f64> {
    let count = u32::try_from(depth)
        .ok()
        .and_then(|depth| depth.checked_add(1))
        .and_then(|n| vocab.checked_pow(n))
        .filter(|&count| count <= MOST);
    if count.is_none() {
        return Err(Error::Invalid(format!(
            "{vocab} tokens and {depth} levels are too many sequences to enumerate (at most {MOST})"
        )));
    }
    let mut rows: HashMap<Vec<u32>, Vec<f64>> = HashMap::new();
    let mut row = |tokens: &[u32]| -> Result<Vec<f64>> {
        if let Some(row) = rows.get(tokens) {
            return Ok(row.clone());
        }
        let before: Vec<u32> = std::iter::once(root)
            .chain(tokens.iter().copied())
            .collect();
        let found = target(&before);
        if found.len() != vocab {
            return Err(Error::Invalid(format!(
                "the target's law has {} tokens after {before:?}, expected {vocab}",
                found.len()
            )));
        }
        rows.insert(tokens.to_vec(), found.clone());
        Ok(found)
    };
    // Walks all prefixes with the target's probability, and with that of this law continued by the target's.
    let mut distance = 0.0;
    let mut stack = vec![(Vec::new(), 1.0, 0.0)];
    while let Some((prefix, joint, continued)) = stack.pop() {
        if prefix.len() == depth + 1 {
            distance += f64::abs(continued - joint);
            continue;
        }
        let next = row(&prefix)?;
        for (token, p) in next.into_iter().enumerate() {
            let mut longer = prefix.clone();
            longer.push(token as u32);
            // What ends here goes on by plain sampling from now on.
            let ended = law.get(&longer).copied().unwrap_or(0.0);
            stack.push((longer, joint * p, continued * p + ended));
        }
    }
    // A sequence longer than that, or with a token outside, is mass that the target never has there.
    let strange = |t: &Vec<u32>| t.len() > depth + 1 || t.iter().any(|&x| x as usize >= vocab);
    let outside: f64 = law.iter().filter(|(t, _)| strange(t)).map(|(_, p)| p).sum();
    Ok((distance + outside) / 2.0)
}
