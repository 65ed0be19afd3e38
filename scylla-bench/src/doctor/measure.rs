//! What a variant of a draft is worth along the target's answers.

use std::sync::atomic::{AtomicBool, Ordering};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use scylla_core::Result as CoreResult;
use scylla_core::chance::Seeded;
use scylla_core::engine::Cycle;
use scylla_core::plugin::{Committed, DraftModel, Matrix, Request, Slot, Tap};
use scylla_core::sampling::Sampling;
use scylla_core::tree::{Budget, Drawing, Tree};
use scylla_draft::checkpoint::{Pairing, Reading};

use crate::session::Session;
use crate::train::{SLOT, Tester, states_of, tell};
use crate::{Error, Result};

/// The target's states of all answers, for all variants.
pub(super) struct States {
    taps: Vec<Tap>,
    /// By answer, one matrix a tap.
    all: Vec<Vec<Matrix>>,
}

impl States {
    pub(super) fn of(
        session: &mut Session,
        tester: &Tester,
        wanted: impl Iterator<Item = Tap>,
    ) -> Result<Self> {
        let mut taps: Vec<Tap> = Vec::new();
        for tap in wanted {
            if !taps.contains(&tap) {
                taps.push(tap);
            }
        }
        let answers = tester.answers.iter();
        let all = answers.map(|a| states_of(&mut session.target.model, &a.text, &taps));
        Ok(Self {
            all: all.collect::<Result<_>>()?,
            taps,
        })
    }

    /// Those that a reading feeds its draft with.
    fn fed(&self, answer: usize, reading: &Reading) -> Result<Vec<Matrix>> {
        let mut fed = Vec::with_capacity(reading.taps.len());
        for tap in &reading.taps {
            let place = self.taps.iter().position(|t| t == tap);
            let state = place.and_then(|place| self.all[answer].get(place));
            let state =
                state.ok_or_else(|| Error::Experiment("a state that is not there".into()))?;
            let late = usize::from(reading.pairing == Pairing::Stale);
            let rows: Vec<usize> = (0..state.rows())
                .map(|row| row.saturating_sub(late))
                .collect();
            let mut moved = Matrix::default();
            moved.append(&[state], &rows)?;
            fed.push(moved);
        }
        Ok(fed)
    }
}

/// What a variant is worth.
pub(super) struct Measured {
    pub(super) tau: f64,
    /// By answer and place, tokens of what the target says next that the draft holds probable.
    scores: Vec<Vec<f64>>,
}

impl Measured {
    /// A draft that says nothing.
    pub(super) fn none(tester: &Tester) -> Self {
        let places =
            |a: &crate::train::Answer| vec![0.0; (a.text.len() - a.prompt).saturating_sub(1)];
        Self {
            tau: 1.0,
            scores: tester.answers.iter().map(places).collect(),
        }
    }

    /// The mean gain of a place over another variant, and its standard error, answers being independent.
    pub(super) fn over(&self, base: &Self) -> (f64, f64) {
        let pairs = self.scores.iter().zip(&base.scores);
        let sums: Vec<(f64, f64)> = pairs
            .map(|(a, b)| {
                let gained: f64 = a.iter().zip(b).map(|(a, b)| a - b).sum();
                (gained, a.len() as f64)
            })
            .collect();
        let (gained, places) = sums.iter().fold((0.0, 0.0), |(g, n), s| (g + s.0, n + s.1));
        let mean = gained / places.max(1.0);
        let n = sums.len() as f64;
        let squares: f64 = sums.iter().map(|(g, k)| (g - mean * k).powi(2)).sum();
        let error = (squares * n / (n - 1.0).max(1.0)).sqrt() / places.max(1.0);
        (mean, error)
    }
}

/// Levels that are scored, and children of a node among which the target's token is looked for.
const LEVELS: usize = 4;
const AMONG: usize = 32;
/// A token counts by how far its log-probability is above this: nothing at it, one where it is sure.
const FLOOR: f64 = -8.0;

/// Walks a variant along the answers, and scores it at each place.
pub(super) fn scored(
    tester: &Tester,
    session: &mut Session,
    draft: &mut Box<dyn DraftModel>,
    states: &States,
    reading: &Reading,
    stop: &AtomicBool,
) -> Result<Measured> {
    let context = session.target.model.shape().context;
    let (mut cycles, mut scores): (Vec<Cycle>, _) = (Vec::new(), Vec::new());
    for (i, answer) in tester.answers.iter().enumerate() {
        if stop.load(Ordering::Relaxed) {
            return Err(Error::Interrupted(String::new()));
        }
        let fed = states.fed(i, reading)?;
        for pass in [true, false] {
            draft.open(SLOT)?;
            let done = match pass {
                true => tester
                    .along(draft, answer, &fed, context, i as u64)
                    .map(|found| cycles.extend(found)),
                false => {
                    along(draft, &answer.text, answer.prompt, &fed).map(|found| scores.push(found))
                }
            };
            draft.close(SLOT);
            done?;
        }
    }
    Ok(Measured {
        tau: scylla_core::engine::tau(&cycles).unwrap_or(1.0),
        scores,
    })
}

/// The score of each place of an answer.
fn along(
    draft: &mut Box<dyn DraftModel>,
    text: &[u32],
    prompt: usize,
    fed: &[Matrix],
) -> Result<Vec<f64>> {
    let (sampling, mut chance) = (Sampling::default(), Seeded::new(0, 0));
    let mut scores = Vec::new();
    let mut told = 0;
    for root in prompt..text.len().saturating_sub(1) {
        tell(draft, text, fed, &mut told, root)?;
        let follows = &text[root + 1..text.len().min(root + 1 + LEVELS)];
        let found = draft.candidates(
            &mut Request {
                slot: SLOT,
                root: text[root],
                // Of trees only the text's own path, and the best chain.
                budget: Budget {
                    total: 2,
                    width: AMONG,
                    depth: LEVELS - 1,
                },
                sampling: &sampling,
                chance: &mut chance,
            },
            follows,
        )?;
        let (mut at, mut score) = (0, 0.0);
        for &token in follows {
            let Some(next) = found.child(at, token) else {
                break;
            };
            score += (1.0 - found.logs[next] / FLOOR).max(0.0);
            at = next;
        }
        scores.push(score);
    }
    Ok(scores)
}

/// Chains of tokens drawn at random.
pub(super) struct RandomTokens {
    pub(super) known: u32,
    pub(super) seed: u64,
}

impl DraftModel for RandomTokens {
    fn drawing(&self, _: &Sampling) -> Drawing {
        Drawing::Deterministic
    }
    fn open(&mut self, _: Slot) -> CoreResult<()> {
        Ok(())
    }
    fn close(&mut self, _: Slot) {}
    fn observe(&mut self, _: &[Committed<'_>]) -> CoreResult<()> {
        Ok(())
    }
    fn propose(&mut self, requests: &mut [Request<'_>]) -> CoreResult<Vec<Tree>> {
        let known = self.known;
        let mut tree = |r: &mut Request<'_>| {
            self.seed += 1;
            let mut random = StdRng::seed_from_u64(self.seed);
            let mut tree = Tree::root(r.root);
            // As many nodes as others get, as wide.
            let mut frontier = vec![0];
            for _ in 0..r.budget.levels() {
                for parent in std::mem::take(&mut frontier) {
                    for _ in 0..r.budget.width {
                        if tree.len() < r.budget.total {
                            frontier.push(tree.push(parent, random.random_range(0..known)));
                        }
                    }
                }
            }
            tree
        };
        Ok(requests.iter_mut().map(&mut tree).collect())
    }
}
