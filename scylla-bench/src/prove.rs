//! Proofs of rules on tables of probabilities: cases from a file, trees as the rule wants them.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use scylla_core::chance::Seeded;
use scylla_core::draw;
use scylla_core::plugin::{Chance, Verifier};
use scylla_core::sampling::Sampling;
use scylla_core::table::{Law, TableDraft, TableRows};
use scylla_core::tree::{Budget, Drawing, Tree};
use scylla_verify::prove::{Proof, drawn_by, prove};
use serde::Deserialize;

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
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
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

    /// Hands the case's drawer of trees to `with`.
    fn drawing<T>(
        &self,
        proposals: Proposals,
        with: impl FnOnce(&mut Drawer<'_>) -> scylla_core::Result<T>,
    ) -> Result<T> {
        let (drawing, widths) = match proposals {
            Proposals::Fixed => {
                let tree = self.fixed_tree()?;
                return Ok(with(&mut |_| Ok(tree.clone()))?);
            }
            Proposals::Chain => (Drawing::Independent, vec![1; self.depth]),
            Proposals::WithoutReplacement => (
                Drawing::WithoutReplacement,
                self.siblings("rrs_without_replacement")?,
            ),
            Proposals::Independent => (Drawing::Independent, self.siblings("specinfer_multistep")?),
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

    /// Proves a rule on this case, by enumeration.
    pub fn prove(&self, rule: &dyn Verifier, proposals: Proposals) -> Result<Proof> {
        let target = self.target(rule);
        self.drawing(proposals, |draw| {
            prove(rule, draw, &target, 0, self.vocab, self.depth)
        })
    }

    /// Mean tokens committed in `cycles` cycles with the generator that decodes.
    pub fn measure(
        &self,
        rule: &dyn Verifier,
        proposals: Proposals,
        cycles: usize,
        seed: u64,
    ) -> Result<f64> {
        let target = self.target(rule);
        self.drawing(proposals, |draw| {
            let mut chance = Seeded::new(seed, 0);
            let mut committed = 0;
            for cycle in 0..cycles {
                chance.at(cycle);
                let tree = draw(&mut chance)?;
                let rows = TableRows {
                    law: &target,
                    history: &[],
                    tree: &tree,
                };
                committed += rule.verify(&tree, &rows, &mut chance)?.path.len() + 1;
            }
            Ok(committed as f64 / cycles as f64)
        })
    }
}

/// Draws a tree.
type Drawer<'a> = dyn FnMut(&mut dyn Chance) -> scylla_core::Result<Tree> + 'a;

fn one_hot(row: &[f64]) -> Vec<f64> {
    let mut out = vec![0.0; row.len()];
    for best in draw::top(row, 1) {
        out[best] = 1.0;
    }
    out
}
