//! Which runs a grid asks for.

use std::collections::BTreeMap;

use scylla_core::train::Shape;
use toml::{Table, Value};

use crate::experiment::Override;
use crate::train::TrainExperiment;
use crate::{Error, Result};

/// The key of token budgets.
pub(super) const TOKENS: &str = "data.tokens";

/// A key of the grid with its values.
#[derive(Debug, Clone, PartialEq)]
pub struct Axis {
    /// The field, as in overrides; [`TOKENS`] are budgets.
    pub key: String,
    /// Its values.
    pub values: Vec<Value>,
}

impl Axis {
    /// `KEY=V,V,..`; values are TOML where they parse as such, else texts.
    ///
    /// # Errors
    /// If it is not of that form, or a value comes twice.
    pub fn parse(text: &str) -> Result<Self> {
        let form = || Error::Experiment(format!("--grid `{text}` is not of the form KEY=V,V,.."));
        let (key, values) = text.split_once('=').ok_or_else(form)?;
        if key.is_empty() || values.is_empty() || key.split('.').any(str::is_empty) {
            return Err(form());
        }
        let whole: Option<Table> = format!("v = [{values}]").parse().ok();
        let values = match whole.and_then(|mut t| t.remove("v")) {
            Some(Value::Array(values)) => values,
            _ => values.split(',').map(|v| plain(v.trim())).collect(),
        };
        if let Some(twice) = (1..values.len()).find(|&i| values[..i].contains(&values[i])) {
            return Err(Error::Experiment(format!(
                "--grid {key}: {} comes twice",
                values[twice]
            )));
        }
        Ok(Self {
            key: key.into(),
            values,
        })
    }
}

/// A value that stands alone.
fn plain(text: &str) -> Value {
    let table: Option<Table> = format!("v = {text}").parse().ok();
    let found = table.and_then(|mut t| t.remove("v"));
    found.unwrap_or_else(|| text.into())
}

/// A run of the grid.
#[derive(Debug, Clone, PartialEq)]
pub struct Planned {
    /// Name of its folder.
    pub name: String,
    /// The run, trained straight from nothing.
    pub experiment: TrainExperiment,
    /// The step behind which it leaves the trunk; 0: it has none.
    pub start: u64,
    /// What the grid set.
    pub settings: BTreeMap<String, Value>,
}

/// What runs of several budgets have in common.
#[derive(Debug, Clone, PartialEq)]
pub struct Trunk {
    /// Name of its folder.
    pub name: String,
    /// At a constant rate, as far as the last branch.
    pub experiment: TrainExperiment,
}

/// Runs that belong together: all budgets of one setting.
#[derive(Debug, Clone, PartialEq)]
pub struct Unit {
    /// Their trunk, where they share one.
    pub trunk: Option<Trunk>,
    /// The runs.
    pub runs: Vec<Planned>,
}

/// All runs of a grid.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// By setting.
    pub units: Vec<Unit>,
}

/// What a folder calls a key and its value.
fn named(key: &str, value: &Value) -> String {
    let key = key.rsplit('.').next().unwrap_or(key);
    let text = match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let safe = |c: char| match c {
        c if c.is_ascii_alphanumeric() || c == '.' => c,
        _ => '-',
    };
    let text: String = text.chars().map(safe).collect();
    format!("{key}-{}", text.trim_matches('-'))
}

impl Plan {
    /// The runs of a grid over an experiment. A budget's last `cooldown` share of steps cools down.
    ///
    /// # Errors
    /// If a key is unknown, a value does not fit, or two runs would have one folder.
    pub fn new(
        experiment: &Table,
        overrides: &[Override],
        grid: &[Axis],
        seeds: &[u64],
        cooldown: f64,
    ) -> Result<Self> {
        if !(0.0..=1.0).contains(&cooldown) || cooldown == 0.0 {
            return Err(Error::Experiment(format!(
                "--cooldown {cooldown}: a share of a budget's steps, above 0 and up to 1"
            )));
        }
        let mut keys: Vec<&str> = grid.iter().map(|axis| &*axis.key).collect();
        keys.sort_unstable();
        if let Some(twice) = keys.windows(2).find(|w| w[0] == w[1]) {
            return Err(Error::Experiment(format!(
                "--grid names {} twice",
                twice[0]
            )));
        }
        for axis in grid {
            if let Some(why) = refused(&axis.key, grid) {
                return Err(Error::Experiment(format!("--grid {}: {why}", axis.key)));
            }
            if axis.values.is_empty() {
                return Err(Error::Experiment(format!("--grid {}: no value", axis.key)));
            }
        }
        let budgets = grid.iter().find(|axis| axis.key == TOKENS);
        let others: Vec<&Axis> = grid.iter().filter(|axis| axis.key != TOKENS).collect();
        let mut settings: Vec<Vec<(&str, Value)>> = vec![Vec::new()];
        for axis in others {
            let mut longer = Vec::new();
            for one in settings {
                for value in &axis.values {
                    let mut with = one.clone();
                    with.push((&*axis.key, value.clone()));
                    longer.push(with);
                }
            }
            settings = longer;
        }
        let mut units = Vec::new();
        for setting in &settings {
            for &seed in seeds {
                let laid = |more: &[Override]| -> Result<TrainExperiment> {
                    let mut all = overrides.to_vec();
                    all.extend(setting.iter().map(|(k, v)| Override::new(k, v.clone())));
                    all.push(Override::number("run.seed", seed));
                    // Drafts are compared behind their last step, and files are the same each time.
                    all.push(Override::new("evaluate.every", 0));
                    all.push(Override::new("run.times", false));
                    all.push(Override::new("run.tensorboard", false));
                    all.extend(more.iter().cloned());
                    TrainExperiment::from_table(experiment.clone(), &all)
                };
                units.push(unit(setting, seed, budgets, cooldown, &laid)?);
            }
        }
        let mut names: Vec<&str> = units
            .iter()
            .flat_map(|u| &u.runs)
            .map(|r| &*r.name)
            .collect();
        names.sort_unstable();
        if let Some(twice) = names.windows(2).find(|w| w[0] == w[1]) {
            return Err(Error::Experiment(format!(
                "two runs of the grid would be called {}: give values that differ in letters and digits",
                twice[0]
            )));
        }
        Ok(Self { units })
    }

    /// All runs.
    pub fn runs(&self) -> impl Iterator<Item = &Planned> {
        self.units.iter().flat_map(|unit| &unit.runs)
    }
}

/// Why a key is none of a grid: a sweep has one target and machine, and settles some fields itself.
fn refused(key: &str, grid: &[Axis]) -> Option<&'static str> {
    let budgets = grid.iter().any(|axis| axis.key == TOKENS);
    match key {
        "run.seed" => Some("seeds are --seeds"),
        "evaluate.every" => Some("drafts are compared behind their last step"),
        _ if key == "run" || key.starts_with("run.") => {
            Some("a sweep runs on one device, in one way")
        }
        _ if key == "target" || key.starts_with("target.") => {
            Some("a sweep has one target; another one is another sweep")
        }
        "stage.tokens" | "stage.steps" if budgets => Some("the budgets are data.tokens"),
        "stage.schedule.shape" | "stage.schedule.cooldown" if budgets => {
            Some("budgets that share a trunk cool down from a constant rate (--cooldown)")
        }
        _ => None,
    }
}

/// All budgets of one setting.
fn unit(
    setting: &[(&str, Value)],
    seed: u64,
    budgets: Option<&Axis>,
    cooldown: f64,
    laid: &dyn Fn(&[Override]) -> Result<TrainExperiment>,
) -> Result<Unit> {
    let mut parts: Vec<String> = setting.iter().map(|(k, v)| named(k, v)).collect();
    let mut own: BTreeMap<String, Value> = setting
        .iter()
        .map(|(k, v)| (k.to_string(), v.clone()))
        .collect();
    let seeded = format!("seed-{seed}");
    let Some(budgets) = budgets else {
        parts.push(seeded);
        return Ok(Unit {
            trunk: None,
            runs: vec![Planned {
                name: parts.join("_"),
                experiment: laid(&[])?,
                start: 0,
                settings: own,
            }],
        });
    };
    let mut runs = Vec::new();
    for value in &budgets.values {
        let tokens = match value {
            Value::Integer(tokens) => u64::try_from(*tokens).ok(),
            // 8e6, as people write it.
            Value::Float(tokens) if tokens.fract() == 0.0 && (0.0..1e18).contains(tokens) => {
                Some(*tokens as u64)
            }
            _ => None,
        };
        let Some(tokens) = tokens.filter(|&tokens| tokens > 0) else {
            return Err(Error::Experiment(format!(
                "--grid {TOKENS}: {value} is no number of tokens"
            )));
        };
        let asked = [
            Override::new("stage.steps", 0),
            Override::number("stage.tokens", tokens),
            Override::new("stage.schedule.shape", "constant"),
            Override::new("stage.schedule.cooldown", 0),
        ];
        let mut experiment = laid(&asked)?;
        let [stage] = &experiment.stage[..] else {
            return Err(Error::Experiment(format!(
                "--grid {TOKENS}: budgets are of one [[stage]]; the experiment has {}",
                experiment.stage.len()
            )));
        };
        let steps = experiment.steps(stage);
        let cooling = ((steps as f64 * cooldown).round() as u64).clamp(1, steps);
        let start = steps - cooling;
        let schedule = &mut experiment.stage[0].schedule;
        schedule.shape = Shape::Cooldown;
        schedule.cooldown = cooling;
        if schedule.warmup > start {
            return Err(Error::Experiment(format!(
                "--grid {TOKENS}: {tokens} tokens are {steps} steps, of which {cooling} cool down: no room for schedule.warmup {}",
                schedule.warmup
            )));
        }
        experiment.check()?;
        own.insert(TOKENS.into(), Value::Integer(tokens as i64));
        let name = [&parts[..], &[format!("tokens-{tokens}"), seeded.clone()]].concat();
        runs.push(Planned {
            name: name.join("_"),
            experiment,
            start,
            settings: own.clone(),
        });
    }
    let last = runs
        .iter()
        .max_by_key(|run| run.start)
        .filter(|run| run.start > 0);
    let trunk = last.map(|run| {
        let mut experiment = run.experiment.clone();
        let stage = &mut experiment.stage[0];
        (stage.steps, stage.tokens) = (run.start, 0);
        stage.schedule.shape = Shape::Constant;
        stage.schedule.cooldown = 0;
        parts.insert(0, "trunk".into());
        parts.push(seeded);
        Trunk {
            name: parts.join("_"),
            experiment,
        }
    });
    Ok(Unit { trunk, runs })
}
