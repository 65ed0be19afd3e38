//! Proofs of rules on tables of probabilities: cases from a file, trees as the rule wants them.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use scylla_core::chance::Seeded;
use scylla_core::draw;
use scylla_core::files::read_text;
use scylla_core::plugin::{Chance, Verifier};
use scylla_core::sampling::Sampling;
use scylla_core::tabular::{Law, TableDraft, TableRows};
use scylla_core::tree::{Budget, Drawing, Tree};
use scylla_verify::prove::{Proof, drawn_by, prove_watched};
use serde::Deserialize;

use crate::stats::{chi_square_tail, pearson};
use crate::{Error, Result};

/// Tables of p and q over a small vocabulary, and the trees to draw.
#[derive(Debug, Clone, Deserialize)]
pub struct Case {
    /// Its name.
    pub name: String,
    /// Tokens.
    pub vocab: usize,
    /// D: levels of the trees.
    pub depth: usize,
    /// Rows of the target `[V]` by prefix relative to the root (ids with commas between), of 0 to D tokens.
    pub p: HashMap<String, Vec<f64>>,
    /// Rows of the draft, of 0 to D - 1 tokens.
    pub q: HashMap<String, Vec<f64>>,
    /// Shapes of trees by name: `children` or `siblings_per_level`.
    #[serde(default)]
    pub rules: HashMap<String, Shape>,
}

/// The tree of a rule, where it needs one.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Shape {
    /// Tokens tried after each prefix, in order.
    pub children: Option<BTreeMap<String, Vec<u32>>>,
    /// Siblings drawn at every node of each depth.
    pub siblings_per_level: Option<Vec<usize>>,
}

/// Told the share that is done, from 0 to 1; may break off.
pub type Watch<'a> = &'a mut dyn FnMut(f64) -> ControlFlow<()>;

/// With which probability the bound on a distance that was sampled holds.
const CONFIDENCE: f64 = 0.99;

/// What sampling found about a rule on one case.
#[derive(Debug, Clone)]
pub struct Sampled {
    /// Share of the cycles that committed each sequence.
    pub law: BTreeMap<Vec<u32>, f64>,
    /// Mean tokens committed, bonus included.
    pub expected_committed: f64,
    /// Cycles run.
    pub cycles: usize,
    /// Probability with which the bound below holds.
    pub confidence: f64,
    /// Total variation between the sample and the target's joint law; above 0 for an exact rule too.
    pub tv: f64,
    /// Bound on the total variation between the rule's law and the target's.
    pub tv_at_most: f64,
    /// Pearson's statistic against the target's law; absent where that is a single sequence.
    pub chi_square: Option<f64>,
    /// Its degrees of freedom.
    pub degrees: Option<usize>,
    /// Probability of a statistic at least this large under the target's law.
    pub p_value: Option<f64>,
}

/// How the trees of a proof are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proposals {
    /// D tokens, each from q.
    Chain,
    /// A fixed tree of point masses.
    Fixed,
    /// Siblings without replacement.
    WithoutReplacement,
    /// Independent siblings.
    Independent,
}

impl std::str::FromStr for Proposals {
    type Err = Error;
    fn from_str(name: &str) -> Result<Self> {
        Ok(match name {
            "chain" => Self::Chain,
            "deterministic-tree" => Self::Fixed,
            "rrs-without-replacement" => Self::WithoutReplacement,
            "specinfer" => Self::Independent,
            _ => {
                let known = [
                    "chain",
                    "deterministic-tree",
                    "rrs-without-replacement",
                    "specinfer",
                ];
                return Err(scylla_core::Error::unknown("proposal", name, known).into());
            }
        })
    }
}

impl Proposals {
    /// What a rule is proved with unless asked otherwise; chains for rules that this project does not know.
    pub fn of_rule(rule: &str) -> Self {
        match rule {
            "deterministic-tree" | "typical" => Self::Fixed,
            "rrs-without-replacement" | "traversal" => Self::WithoutReplacement,
            "specinfer" | "k-seq" => Self::Independent,
            _ => Self::Chain,
        }
    }
}

/// Reads a file of cases `{cases: [...]}`, every row checked.
pub fn load(path: &Path) -> Result<Vec<Case>> {
    #[derive(Deserialize)]
    struct File {
        cases: Vec<Case>,
    }
    let text = read_text(path)?;
    let file: File = serde_json::from_str(&text)
        .map_err(|e| Error::file(path, format!("not a file of cases: {e}")))?;
    for case in &file.cases {
        case.check().map_err(|e| Error::file(path, e))?;
    }
    match file.cases.is_empty() {
        true => Err(Error::file(path, "holds no case")),
        false => Ok(file.cases),
    }
}

/// Ids with commas between.
fn key(tokens: &[u32]) -> String {
    let ids: Vec<String> = tokens.iter().map(u32::to_string).collect();
    ids.join(",")
}

/// All sequences of exactly `n` tokens.
fn sequences(vocab: usize, n: usize) -> impl Iterator<Item = Vec<u32>> {
    let count = vocab.pow(n as u32);
    (0..count).map(move |code| {
        let digit = |i: usize| (code / vocab.pow((n - 1 - i) as u32) % vocab) as u32;
        (0..n).map(digit).collect()
    })
}

impl Case {
    fn check(&self) -> Result<(), String> {
        let name = &self.name;
        if !(1..=64).contains(&self.vocab) || !(1..=8).contains(&self.depth) {
            return Err(format!(
                "case `{name}`: vocab {} (1 to 64) and depth {} (1 to 8)",
                self.vocab, self.depth
            ));
        }
        if (self.vocab as f64).powi(self.depth as i32 + 1) > 1e6 {
            return Err(format!(
                "case `{name}`: {} tokens and {} levels are too many sequences to enumerate",
                self.vocab, self.depth
            ));
        }
        for (table, rows, levels) in [("p", &self.p, self.depth + 1), ("q", &self.q, self.depth)] {
            for prefix in (0..levels).flat_map(|n| sequences(self.vocab, n)) {
                let prefix = key(&prefix);
                let place = format!("case `{name}`: {table} after `{prefix}`");
                let row = rows.get(&prefix).ok_or(format!("{place} is missing"))?;
                let sum: f64 = row.iter().sum();
                let is_law = (sum - 1.0).abs() < 1e-6 && row.iter().all(|&v| v >= 0.0);
                if row.len() != self.vocab || !is_law {
                    return Err(format!(
                        "{place}: {} probabilities that sum to {sum}; expected {} nonnegative ones that sum to 1",
                        row.len(),
                        self.vocab
                    ));
                }
            }
        }
        Ok(())
    }

    /// A table as a law of sequences that begin with the root.
    fn law(rows: &HashMap<String, Vec<f64>>) -> Law {
        let rows = rows.clone();
        Arc::new(move |tokens| rows.get(&key(&tokens[1..])).cloned().unwrap_or_default())
    }

    fn shape(&self, name: &str) -> Shape {
        self.rules.get(name).cloned().unwrap_or_default()
    }

    fn siblings(&self, name: &str) -> Result<Vec<usize>> {
        self.shape(name).siblings_per_level.ok_or_else(|| {
            Error::Experiment(format!(
                "case `{}` has no `rules.{name}.siblings_per_level`",
                self.name
            ))
        })
    }

    /// The fixed tree of the case.
    fn fixed_tree(&self) -> Result<Tree> {
        let children = self.shape("deterministic_tree").children.ok_or_else(|| {
            Error::Experiment(format!(
                "case `{}` has no `rules.deterministic_tree.children`",
                self.name
            ))
        })?;
        let mut tree = Tree::root(0);
        let mut node = 0;
        while node < tree.len() {
            let prefix = key(&tree.tokens_to(node)[1..]);
            for &token in children.get(&prefix).into_iter().flatten() {
                if token as usize >= self.vocab || tree.len() >= 4096 {
                    return Err(Error::Experiment(format!(
                        "case `{}`: child {token} after `{prefix}` is outside the vocabulary, or the tree too large",
                        self.name
                    )));
                }
                tree.push(node, token);
            }
            node += 1;
        }
        Ok(tree)
    }

    /// What a rule is compared with: greedy verification with greedy decoding (rows that are one on the most probable
    /// token), every other with the case's p.
    fn target(&self, rule: &dyn Verifier) -> Law {
        let target = Self::law(&self.p);
        match rule.name() {
            "greedy" => Arc::new(move |tokens| one_hot(&target(tokens))),
            _ => target,
        }
    }

    /// How the trees are drawn, and the children of each node by its depth; `None` for the fixed tree.
    fn widths(&self, proposals: Proposals) -> Result<Option<(Drawing, Vec<usize>)>> {
        Ok(match proposals {
            Proposals::Fixed => None,
            Proposals::Chain => Some((Drawing::Independent, vec![1; self.depth])),
            Proposals::WithoutReplacement => Some((
                Drawing::WithoutReplacement,
                self.siblings("rrs_without_replacement")?,
            )),
            Proposals::Independent => {
                Some((Drawing::Independent, self.siblings("specinfer_multistep")?))
            }
        })
    }

    /// Hands the case's drawer of trees to `with`.
    fn drawing<T>(
        &self,
        proposals: Proposals,
        with: impl FnOnce(&mut Drawer<'_>) -> scylla_core::Result<T>,
    ) -> Result<T> {
        let Some((drawing, widths)) = self.widths(proposals)? else {
            let tree = self.fixed_tree()?;
            return Ok(with(&mut |_| Ok(tree.clone()))?);
        };
        let mut draft = TableDraft::new(Self::law(&self.q), drawing);
        let budget = Budget {
            total: 4096,
            width: widths.iter().copied().max().unwrap_or(1),
            depth: widths.len().min(self.depth).saturating_sub(1),
        };
        draft.widths = widths;
        let sampling = Sampling {
            temperature: 1.0,
            ..Sampling::default()
        };
        Ok(with(&mut drawn_by(&mut draft, 0, budget, &sampling))?)
    }

    /// Ways in which the case's trees can be drawn; each is verified in every way in turn.
    ///
    /// # Errors
    /// If the case has no such trees.
    pub fn trees(&self, proposals: Proposals) -> Result<f64> {
        let Some((drawing, widths)) = self.widths(proposals)? else {
            return Ok(1.0);
        };
        let levels = widths.len().min(self.depth);
        Ok(self.ways(&mut Vec::new(), drawing, &widths[..levels]))
    }

    /// Ways to draw what is below a node.
    fn ways(&self, prefix: &mut Vec<u32>, drawing: Drawing, widths: &[usize]) -> f64 {
        let Some((&width, below)) = widths.split_first() else {
            return 1.0;
        };
        let q = self.q.get(&key(prefix)).map_or(&[][..], |row| row);
        let mut children = Vec::new();
        for (token, _) in q.iter().enumerate().filter(|(_, q)| **q > 0.0) {
            prefix.push(token as u32);
            children.push(self.ways(prefix, drawing, below));
            prefix.pop();
        }
        if drawing == Drawing::Independent {
            return children.iter().sum::<f64>().powi(width as i32);
        }
        // Ordered choices of distinct children: the elementary symmetric polynomial, times the orders.
        let width = width.min(children.len());
        let mut chosen = vec![0.0; width + 1];
        chosen[0] = 1.0;
        for ways in children {
            for n in (1..=width).rev() {
                chosen[n] += chosen[n - 1] * ways;
            }
        }
        (1..=width).fold(chosen[width], |ways, n| ways * n as f64)
    }

    /// Proves a rule on this case, by enumeration.
    ///
    /// # Errors
    /// What drawing and the rule report, and where `watch` breaks off.
    pub fn prove(
        &self,
        rule: &dyn Verifier,
        proposals: Proposals,
        watch: Watch<'_>,
    ) -> Result<Proof> {
        let target = self.target(rule);
        let stopped = Cell::new(false);
        let proof = self.drawing(proposals, |draw| {
            let mut mass = 0.0;
            let mut draw = |chance: &mut dyn Chance| match stopped.get() {
                true => Err(scylla_core::Error::Invalid("broken off".into())),
                false => draw(chance),
            };
            let mut told = |p: f64| {
                mass += p;
                stopped.set(watch(mass).is_break());
            };
            prove_watched(
                rule, &mut draw, &target, 0, self.vocab, self.depth, &mut told,
            )
        });
        match stopped.get() {
            true => Err(Error::Interrupted(format!(" in case `{}`", self.name))),
            false => proof,
        }
    }

    /// Tests a rule on this case, where its trees are too many to enumerate: `cycles` cycles with the generator that
    /// decodes, each continued by plain sampling to the full depth.
    ///
    /// # Errors
    /// As [`Case::prove`].
    pub fn sample(
        &self,
        rule: &dyn Verifier,
        proposals: Proposals,
        cycles: usize,
        seed: u64,
        watch: Watch<'_>,
    ) -> Result<Sampled> {
        let target = self.target(rule);
        let n = cycles as f64;
        let (mut law, mut joint) = (BTreeMap::new(), BTreeMap::new());
        self.cycles(
            rule,
            proposals,
            cycles,
            seed,
            watch,
            &mut |mut tokens, chance| {
                *law.entry(tokens.clone()).or_insert(0.0) += 1.0 / n;
                while tokens.len() <= self.depth {
                    let before: Vec<u32> =
                        std::iter::once(0).chain(tokens.iter().copied()).collect();
                    tokens.push(chance.pick(&target(&before))? as u32);
                }
                *joint.entry(tokens).or_insert(0u64) += 1;
                Ok(())
            },
        )?;
        let cells: Vec<(f64, f64)> = sequences(self.vocab, self.depth + 1)
            .map(|tokens| {
                let before = |i: usize| [&[0], &tokens[..i]].concat();
                let p: f64 = (0..tokens.len())
                    .map(|i| target(&before(i))[tokens[i] as usize])
                    .product();
                (p * n, joint.get(&tokens).copied().unwrap_or(0) as f64)
            })
            .collect();
        let distance = cells.iter().map(|(e, s)| (e - s).abs()).sum::<f64>() / 2.0 / n;
        // The distance of a sample from its own law is at most sqrt(K / n) / 2 in the mean (Cauchy and Schwarz), and exceeds
        // its mean by sqrt(ln(1 / delta) / 2 n) with probability delta at most (McDiarmid).
        let spread =
            (cells.len() as f64 / n).sqrt() / 2.0 + (-(1.0 - CONFIDENCE).ln() / (2.0 * n)).sqrt();
        let test = pearson(cells.into_iter(), n);
        Ok(Sampled {
            expected_committed: law
                .iter()
                .map(|(t, p): (&Vec<u32>, &f64)| t.len() as f64 * p)
                .sum(),
            law,
            cycles,
            confidence: CONFIDENCE,
            tv: distance,
            tv_at_most: (distance + spread).min(1.0),
            chi_square: test.map(|t| t.0),
            degrees: test.map(|t| t.1),
            p_value: test.map(|t| chi_square_tail(t.0, t.1)),
        })
    }

    /// Runs cycles with the generator that decodes; `each` is handed what one commits, and the generator as it left it.
    fn cycles(
        &self,
        rule: &dyn Verifier,
        proposals: Proposals,
        cycles: usize,
        seed: u64,
        watch: Watch<'_>,
        each: &mut Each<'_>,
    ) -> Result<()> {
        let target = self.target(rule);
        let done = self.drawing(proposals, |draw| {
            let mut chance = Seeded::new(seed, 0);
            for cycle in 0..cycles {
                if cycle % 1024 == 0 && watch(cycle as f64 / cycles as f64).is_break() {
                    return Ok(false);
                }
                chance.at(cycle);
                let tree = draw(&mut chance)?;
                let rows = TableRows {
                    law: &target,
                    history: &[],
                    tree: &tree,
                };
                let verdict = rule.verify(&tree, &rows, &mut chance)?;
                verdict.check(&tree, self.vocab)?;
                let accepted = verdict.path.iter().map(|&n| tree.tokens[n]);
                each(accepted.chain([verdict.bonus]).collect(), &mut chance)?;
            }
            Ok(true)
        })?;
        match done {
            true => Ok(()),
            false => Err(Error::Interrupted(format!(" in case `{}`", self.name))),
        }
    }

    /// Mean tokens committed in `cycles` cycles with the generator that decodes.
    ///
    /// # Errors
    /// As [`Case::prove`].
    pub fn measure(
        &self,
        rule: &dyn Verifier,
        proposals: Proposals,
        cycles: usize,
        seed: u64,
        watch: Watch<'_>,
    ) -> Result<f64> {
        let mut committed = 0;
        self.cycles(rule, proposals, cycles, seed, watch, &mut |tokens, _| {
            committed += tokens.len();
            Ok(())
        })?;
        Ok(committed as f64 / cycles as f64)
    }
}

/// Takes what a cycle commits, and the generator.
type Each<'a> = dyn FnMut(Vec<u32>, &mut dyn Chance) -> scylla_core::Result<()> + 'a;

/// Draws a tree.
type Drawer<'a> = dyn FnMut(&mut dyn Chance) -> scylla_core::Result<Tree> + 'a;

fn one_hot(row: &[f64]) -> Vec<f64> {
    let mut out = vec![0.0; row.len()];
    for best in draw::top(row, 1) {
        out[best] = 1.0;
    }
    out
}
