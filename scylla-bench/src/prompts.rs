//! Prompt sets: JSONL rows `{id, category, turns or prompt}`, Spec-Bench's form included.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::{Error, Result};

/// Name of the set that comes with the project.
pub const CORE: &str = "core";

const CORE_ROWS: &str = include_str!("../../assets/prompts/core.jsonl");

/// One prompt of one or more turns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// Its name within the set.
    pub id: String,
    /// Its task.
    pub category: String,
    /// What the user says, turn by turn; each later one follows the model's own answers.
    pub turns: Vec<String>,
}

#[derive(Deserialize)]
struct Row {
    id: Option<Value>,
    question_id: Option<Value>,
    category: Option<String>,
    turns: Option<Vec<String>>,
    prompt: Option<String>,
}

/// Part of a prompt set: dev to choose by, test to report on. It depends on the id alone.
pub fn part_of(id: &str) -> &'static str {
    if Sha256::digest(id.as_bytes())[0] < 85 {
        "dev"
    } else {
        "test"
    }
}

/// Reads a set by name or file.
pub fn load(set: &str) -> Result<Vec<Prompt>> {
    if set == CORE {
        return parse(CORE_ROWS, Path::new("the core prompt set"));
    }
    let path = Path::new(set);
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    let text = String::from_utf8(bytes).map_err(|e| {
        Error::file(
            path,
            format!("not UTF-8 from byte {} on", e.utf8_error().valid_up_to()),
        )
    })?;
    parse(&text, path)
}

fn parse(text: &str, path: &Path) -> Result<Vec<Prompt>> {
    let mut prompts: Vec<Prompt> = Vec::new();
    for (i, line) in text
        .lines()
        .enumerate()
        .filter(|(_, l)| !l.trim().is_empty())
    {
        let bad = |message: String| Error::file(path, format!("line {}: {message}", i + 1));
        let row: Row = serde_json::from_str(line).map_err(|e| bad(format!("not a prompt: {e}")))?;
        let id = match row.id.or(row.question_id) {
            Some(Value::String(id)) => id,
            Some(Value::Number(id)) => id.to_string(),
            _ => return Err(bad("needs an `id` or `question_id`".into())),
        };
        let turns = match (row.turns, row.prompt) {
            (Some(turns), _) if !turns.is_empty() => turns,
            (None, Some(prompt)) => vec![prompt],
            _ => return Err(bad("needs `turns` (not empty) or `prompt`".into())),
        };
        if turns.iter().any(|t| t.trim().is_empty()) {
            return Err(bad(format!("prompt `{id}` has an empty turn")));
        }
        if prompts.iter().any(|p| p.id == id) {
            return Err(bad(format!("id `{id}` occurs twice")));
        }
        prompts.push(Prompt {
            id,
            category: row.category.unwrap_or_else(|| "all".into()),
            turns,
        });
    }
    match prompts.is_empty() {
        true => Err(Error::file(path, "holds no prompt")),
        false => Ok(prompts),
    }
}

/// Chooses the part, tasks and number of prompts that an experiment asks for; the order is the set's.
pub fn select(prompts: Vec<Prompt>, spec: &crate::experiment::Prompts) -> Result<Vec<Prompt>> {
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
    fn both_forms_of_rows_are_read() {
        let text = r#"{"question_id": 81, "category": "writing", "turns": ["a", "b"]}
{"id": "x", "prompt": "c"}"#;
        let prompts = parse(text, Path::new("x")).expect("parses");
        assert_eq!((prompts[0].id.as_str(), prompts[0].turns.len()), ("81", 2));
        assert_eq!(prompts[1].category, "all");
    }

    #[test]
    fn a_wrong_row_is_named_by_its_line() {
        for (text, word) in [
            ("", "holds no prompt"),
            ("{}", "line 1: needs an `id`"),
            ("{\"id\":1}", "needs `turns`"),
            ("{\"id\":1,\"turns\":[]}", "needs `turns`"),
            ("{\"id\":1,\"prompt\":\" \"}", "empty turn"),
            (
                "{\"id\":1,\"prompt\":\"a\"}\n{\"id\":1,\"prompt\":\"a\"}",
                "line 2: id `1` occurs twice",
            ),
            ("nonsense", "line 1: not a prompt"),
        ] {
            let error = parse(text, Path::new("x")).expect_err(word).to_string();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn a_file_that_is_not_utf8_is_refused_with_the_place() {
        let file = tempfile::NamedTempFile::new().expect("file");
        std::fs::write(file.path(), b"{\"id\":\xff}").expect("write");
        let error = load(&file.path().to_string_lossy())
            .expect_err("refused")
            .to_string();
        assert!(error.contains("not UTF-8 from byte 6"), "{error}");
    }

    #[test]
    fn an_unknown_task_is_answered_with_the_known_ones() {
        let spec = crate::experiment::Prompts {
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
