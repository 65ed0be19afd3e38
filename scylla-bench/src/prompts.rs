//! Prompt sets: what users say, out of any file of conversations.

use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::data::conversations::{self, Conversation};
use crate::{Error, Result};

/// Name of the set that comes with the project.
pub const CORE: &str = "core";

const CORE_ROWS: &str = include_str!("../../assets/prompts/core.jsonl");

/// Which prompts are decoded, and how they become ids.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PromptSpec {
    /// `core`, the set that comes with the project, or a JSONL file.
    pub set: String,
    /// `dev`, `test` or `all`.
    pub part: String,
    /// Prompts per task; 0 takes all.
    pub per_task: usize,
    /// Tasks (categories); empty takes all.
    pub tasks: Vec<String>,
    /// Whether prompts are taken as they are, without the chat template.
    pub raw: bool,
    /// Name of the chat template, where a model has several; empty takes its default one.
    pub template: String,
    /// What the chat template is told as date, as `2026-07-26` or `2026-07-26T18:30:00`; empty is the real one.
    pub date: String,
    /// Whether special tokens in a prompt's text are text; else they are recognised, as transformers does.
    pub literal: bool,
}

impl PromptSpec {
    /// The date that the chat template is told; `None` is the real one.
    ///
    /// # Errors
    /// If it is none.
    pub fn date(&self) -> Result<Option<jiff::civil::DateTime>> {
        let text = self.date.trim();
        if text.is_empty() {
            return Ok(None);
        }
        let parsed = text.parse().map_err(|e| {
            Error::Experiment(format!(
                "prompts.date `{text}`: {e}; expected 2026-07-26 or 2026-07-26T18:30:00"
            ))
        });
        parsed.map(Some)
    }
}

impl Default for PromptSpec {
    fn default() -> Self {
        Self {
            set: CORE.into(),
            part: "test".into(),
            per_task: 0,
            tasks: Vec::new(),
            raw: false,
            template: String::new(),
            date: String::new(),
            literal: false,
        }
    }
}

/// One prompt of one or more turns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// Its name within the set.
    pub id: String,
    /// Its task.
    pub category: String,
    /// What the system message says, where there is one.
    pub system: Option<String>,
    /// What the user says, turn by turn; each later one follows the model's own answers.
    pub turns: Vec<String>,
}

/// Part of a prompt set: dev to choose by, test to report on. It depends on the id alone.
pub fn part_of(id: &str) -> &'static str {
    if Sha256::digest(id.as_bytes())[0] < 85 {
        "dev"
    } else {
        "test"
    }
}

/// Reads a set by name or file; see [`conversations`] for the forms it may have. Of a conversation that holds answers, the
/// user's turns are taken: the model gives answers of its own.
///
/// # Errors
/// If the file cannot be read, or a row is not understood.
pub fn load(set: &str) -> Result<Vec<Prompt>> {
    let found = match set {
        CORE => conversations::parse(CORE_ROWS, Path::new("the core prompt set"))?,
        path => conversations::read(Path::new(path))?,
    };
    Ok(found.into_iter().map(Prompt::from).collect())
}

impl From<Conversation> for Prompt {
    fn from(from: Conversation) -> Self {
        let mut prompt = Self {
            id: from.id,
            category: from.task.unwrap_or_else(|| "all".into()),
            system: None,
            turns: Vec::new(),
        };
        for message in from.messages {
            match message.role {
                "system" => prompt.system = Some(message.content),
                "user" => prompt.turns.push(message.content),
                _ => {}
            }
        }
        prompt
    }
}

/// Chooses the part, tasks and number of prompts that an experiment asks for; the order is the set's.
pub fn select(prompts: Vec<Prompt>, spec: &PromptSpec) -> Result<Vec<Prompt>> {
    let mut known: Vec<String> = Vec::new();
    for p in &prompts {
        if !known.contains(&p.category) {
            known.push(p.category.clone());
        }
    }
    if let Some(task) = spec.tasks.iter().find(|t| !known.contains(t)) {
        return Err(
            scylla_core::Error::unknown("task", task, known.iter().map(String::as_str)).into(),
        );
    }
    let mut counts = std::collections::HashMap::<String, usize>::new();
    let chosen: Vec<Prompt> = prompts
        .into_iter()
        .filter(|p| spec.part == "all" || part_of(&p.id) == spec.part)
        .filter(|p| spec.tasks.is_empty() || spec.tasks.contains(&p.category))
        .filter(|p| {
            let count = counts.entry(p.category.clone()).or_default();
            *count += 1;
            spec.per_task == 0 || *count <= spec.per_task
        })
        .collect();
    if chosen.is_empty() {
        return Err(Error::Experiment(format!(
            "no prompt of set `{}` is in part `{}`",
            spec.set, spec.part
        )));
    }
    Ok(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_core_set_has_six_tasks_with_both_parts_and_long_prompts() {
        let prompts = load(CORE).expect("core");
        let mut tasks = std::collections::BTreeMap::<&str, [usize; 2]>::new();
        for p in &prompts {
            tasks.entry(&p.category).or_default()[usize::from(part_of(&p.id) == "test")] += 1;
        }
        assert_eq!(tasks.len(), 6, "{tasks:?}");
        assert!(
            tasks
                .values()
                .all(|[dev, test]| *dev >= 2 && *test >= 4 && dev + test >= 8),
            "{tasks:?}"
        );
        let long = prompts
            .iter()
            .filter(|p| p.turns[0].split_whitespace().count() > 380)
            .count();
        assert!(long >= 6, "{long} long prompts");
    }

    #[test]
    fn an_unknown_task_is_answered_with_the_known_ones() {
        let spec = PromptSpec {
            tasks: vec!["cooking".into()],
            ..Default::default()
        };
        let error = select(load(CORE).expect("core"), &spec)
            .expect_err("refused")
            .to_string();
        assert!(
            error.contains("cooking") && error.contains("code"),
            "{error}"
        );
    }
}
