//! Trees that a draft may be given, and what each brings.

use std::path::{Path, PathBuf};

use scylla_core::tree::Budget;

use crate::experiment::{BudgetSpec, Override};
use crate::laws::Band;
use crate::trace::{Reader, Replay, find, replay};
use crate::{Error, Registry, Result};

/// A budget, and what it brings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shape {
    /// The budget.
    pub budget: Budget,
    /// Nodes of a cycle on average, root included.
    pub nodes: f64,
    /// Mean tokens a cycle.
    pub tau: Band,
}

/// A draft whose trees are to be chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Drafted {
    /// Its name.
    pub name: String,
    /// D; 0 where drafting takes no network.
    pub layers: usize,
    /// T, where a law speaks of it.
    pub tokens: Option<f64>,
    /// What it may be given.
    pub shapes: Vec<Shape>,
}

/// Acceptance of the candidates at a depth, first to last, given the depth above: they add up to 1 at most.
pub type Rates = Vec<Band>;

/// Most nodes of a tree that is considered.
const MOST: usize = 64;

/// The trees of rates by depth and rank, grown as drafts grow them: each level goes on from the `width` most probable nodes of the
/// one above, and of all the most probable are kept, as many as are asked for. A node is as probable as its rates multiplied.
pub fn from_rates(rates: &[Rates]) -> Vec<Shape> {
    let widest = rates.iter().map(Vec::len).max().unwrap_or(0);
    let mut all = Vec::new();
    for levels in 1..=rates.len() {
        for width in 1..=widest {
            let used = &rates[..levels];
            // A width that no depth has is another's.
            if !used.iter().any(|depth| depth.len() >= width) {
                continue;
            }
            let mut nodes = vec![vec![(1.0, 1.0, 1.0)]];
            for depth in used {
                let above = nodes.last().map_or(&[][..], |n| n);
                let mut level: Vec<(f64, f64, f64)> = above
                    .iter()
                    .take(width)
                    .flat_map(|&(v, l, h)| {
                        let below = depth.iter().take(width);
                        below.map(move |rate| (v * rate.value, l * rate.low, h * rate.high))
                    })
                    .collect();
                level.sort_by(|a, b| b.0.total_cmp(&a.0));
                nodes.push(level);
            }
            let mut best: Vec<(f64, f64, f64)> = nodes.into_iter().skip(1).flatten().collect();
            best.sort_by(|a, b| b.0.total_cmp(&a.0));
            let (mut value, mut low, mut high) = (1.0, 1.0, 1.0);
            for (i, node) in best.iter().take(MOST - 1).enumerate() {
                value += node.0;
                low += node.1;
                high += node.2;
                all.push(Shape {
                    budget: Budget {
                        total: i + 2,
                        width,
                        depth: levels - 1,
                    },
                    nodes: (i + 2) as f64,
                    tau: Band { value, low, high },
                });
            }
        }
    }
    // A chain that is cut is a shorter one.
    all.retain(|s| s.budget.width > 1 || s.budget.total == s.budget.depth + 2);
    all
}

/// Levels, widths and totals of the trees that a trace is replayed with.
const DEPTHS: [usize; 7] = [0, 1, 2, 3, 4, 5, 7];
const WIDTHS: [usize; 4] = [1, 2, 4, 8];
const TOTALS: [usize; 9] = [3, 4, 6, 8, 12, 16, 24, 32, 60];

/// The trees of a dense trace, each replayed: tau and nodes as decoding would have had them, with a band over its texts. With `only`
/// those budgets, else a choice of all that the trace holds.
///
/// # Errors
/// If the trace is not sound, or does not hold a budget.
pub fn from_trace(
    registry: &Registry,
    trace: &Path,
    only: &[Budget],
) -> Result<(String, Vec<Shape>)> {
    let path = find(trace)?;
    let reader = Reader::open(&path)?;
    let (name, most) = (reader.header().draft.clone(), reader.header().budget);
    let budgets = match only {
        [] => held(most.into()),
        some => some.to_vec(),
    };
    let mut all = Vec::new();
    for budget in budgets {
        all.extend(replayed(registry, &path, budget)?);
    }
    match all.is_empty() {
        true => Err(Error::file(trace, "a trace without a text or a tree")),
        false => Ok((name, all)),
    }
}

/// Committed positions that the tokens of traces' answers see on average; `None` without an answer.
///
/// # Errors
/// If a trace is not sound.
pub fn context_of(traces: &[PathBuf]) -> Result<Option<usize>> {
    let (mut positions, mut tokens) = (0.0, 0.0);
    for trace in traces {
        let mut reader = Reader::open(&find(trace)?)?;
        while let Some(text) = reader.text()? {
            let answer = text.answer.len() as f64;
            positions += answer * (text.prompt_tokens as f64 + answer / 2.0);
            tokens += answer;
        }
    }
    Ok((tokens > 0.0).then(|| (positions / tokens).round() as usize))
}

/// Trees to choose from that are within `most`.
fn held(most: Budget) -> Vec<Budget> {
    let mut all = Vec::new();
    for depth in DEPTHS.into_iter().filter(|&d| d <= most.depth) {
        for width in WIDTHS.into_iter().filter(|&w| w <= most.width) {
            let totals: Vec<usize> = match width {
                1 => vec![depth + 2],
                // At least a level's worth more than a chain, at most all there are.
                _ => TOTALS
                    .into_iter()
                    .filter(|&t| t > depth + 2)
                    .filter(|&t| {
                        t <= (1..=depth + 1).map(|l| width.pow(l as u32)).sum::<usize>() + 1
                    })
                    .collect(),
            };
            let within = totals.into_iter().filter(|&t| t <= most.total);
            all.extend(within.map(|total| Budget {
                total,
                width,
                depth,
            }));
        }
    }
    all
}

fn replayed(registry: &Registry, path: &Path, budget: Budget) -> Result<Option<Shape>> {
    let mut reader = Reader::open(path)?;
    let mut settings = Replay::of(reader.header(), &[] as &[Override])?;
    settings.budget = BudgetSpec::from(budget);
    let mut nodes = 0;
    // Tokens and cycles of each text.
    let mut texts: Vec<(f64, f64)> = Vec::new();
    let found = replay(
        registry,
        &mut reader,
        &settings,
        &mut |text, of, accepted| {
            nodes += of;
            texts.resize(texts.len().max(text + 1), (0.0, 0.0));
            texts[text].0 += (accepted + 1) as f64;
            texts[text].1 += 1.0;
        },
    )?;
    let tau = |of: &[usize]| {
        let sum = |f: fn(&(f64, f64)) -> f64| of.iter().map(|&i| f(&texts[i])).sum::<f64>();
        sum(|t| t.0) / sum(|t| t.1)
    };
    let Some(band) = crate::stats::interval(texts.len(), tau) else {
        return Ok(None);
    };
    Ok(Some(Shape {
        budget,
        nodes: nodes as f64 / found.count.max(1) as f64,
        tau: Band {
            value: found.tau,
            low: band.low.min(found.tau),
            high: band.high.max(found.tau),
        },
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rate(value: f64) -> Band {
        Band {
            value,
            low: value / 2.0,
            high: value,
        }
    }

    #[test]
    fn chains_and_trees_are_as_long_as_their_rates() {
        let chain = from_rates(&[vec![rate(0.7)], vec![rate(0.6)], vec![rate(0.5)]]);
        let taus: Vec<f64> = chain.iter().map(|s| s.tau.value).collect();
        let expected = [1.7, 1.7 + 0.42, 1.7 + 0.42 + 0.21];
        assert!(
            taus.iter()
                .zip(expected)
                .all(|(a, b)| (a - b).abs() < 1e-12)
        );
        assert!((chain[1].tau.low - (1.0 + 0.35 + 0.35 * 0.3)).abs() < 1e-12);
        assert_eq!(chain[2].budget, Budget::chain(3));

        let trees = from_rates(&[vec![rate(0.5), rate(0.2)], vec![rate(0.6), rate(0.3)]]);
        let four = Budget {
            total: 4,
            width: 2,
            depth: 1,
        };
        // 0.5, 0.3 below it, and the second of the first depth.
        let found = trees.iter().find(|s| s.budget == four).expect("a tree");
        assert!((found.tau.value - 2.0).abs() < 1e-12, "{found:?}");
        assert!(trees.iter().all(|s| s.tau.low <= s.tau.value));
        // Three levels of width 2: two nodes, and twice four below the two best of the level above.
        let rates = [rate(0.4), rate(0.35)];
        let deep = from_rates(&[rates.to_vec(), rates.to_vec(), rates.to_vec()]);
        let most = deep
            .iter()
            .filter(|s| s.budget.depth == 2 && s.budget.width == 2);
        let most = most.max_by_key(|s| s.budget.total).expect("a tree");
        assert_eq!(most.budget.total, 11);
        assert!((most.tau.value - 2.538).abs() < 1e-3, "{most:?}");
    }
}
