//! One reader of conversations, in the forms that people keep them in: JSON lines or one JSON list of rows, with or
//! without a byte order mark, the rows of a parquet file, or a CSV table with a header.
//!
//! | form | row |
//! |---|---|
//! | this project's, Spec-Bench's, MT-bench's | `id` or `question_id`, `category`, `turns` or `prompt`, `system` |
//! | OpenAI's | `messages` of `role` and `content`, alone or in the `body` of a batch request |
//! | ShareGPT's, SpecForge's | `conversations` of `from` and `value`, or of `role` and `content` |
//! | HumanEval's | `task_id`, `prompt` |
//! | GSM8K's | `question` (and `answer`) |
//! | Alpaca's | `instruction`, `input` (and `output`) |
//! | tasks over a text | [`tasks`] |
//!
//! A row in no form is refused with its place and what was expected: a prompt that was misread is worse than none.

use std::path::Path;

use scylla_core::files::read_text;
use scylla_core::text::Message;
use serde_json::{Map, Value};

use super::parquet;
use crate::tasks;
use crate::{Error, Result};

/// A conversation as a file holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conversation {
    /// Its name within the file; the number of its row where it has none.
    pub id: String,
    /// Its task, where the file says one.
    pub task: Option<String>,
    /// What was said: a system message at most once and first, then user and assistant in turn. Where a file holds only what
    /// the user says, user messages alone.
    pub messages: Vec<Message>,
    /// Of a task over a text: other answers that count as right beside the assistant's.
    pub others: Vec<String>,
    /// Whether the last answer was broken off by a limit, and not ended by who said it, as this project's answers say
    /// (`finishes`).
    pub cut: bool,
}

/// Reads a file of conversations.
///
/// # Errors
/// If it cannot be read or holds none; if a row is none, with its line; if an id comes twice.
pub fn read(path: &Path) -> Result<Vec<Conversation>> {
    match path.extension().and_then(|e| e.to_str()) {
        _ if parquet::is(path) => of_rows(parquet::rows(path)?, path),
        Some("csv") => of_rows(csv_rows(path)?, path),
        _ => parse(&read_text(path)?, path),
    }
}

/// The rows of a table of texts with a header, each with its place.
pub(super) fn csv_rows(path: &Path) -> Result<Vec<(String, Value)>> {
    let text = read_text(path)?;
    let mut table = csv::Reader::from_reader(text.as_bytes());
    let bad = |e: csv::Error| Error::file(path, format!("no table of texts: {e}"));
    let header = table.headers().map_err(bad)?.clone();
    let row = |(i, record): (usize, csv::Result<csv::StringRecord>)| {
        let record = record.map_err(bad)?;
        let fields = header.iter().zip(&record);
        let fields = fields.map(|(k, v)| (k.trim().to_string(), Value::String(v.into())));
        Ok((format!("row {}", i + 1), Value::Object(fields.collect())))
    };
    table.records().enumerate().map(row).collect()
}

/// Reads the text of such a file.
///
/// # Errors
/// As [`read`].
pub fn parse(text: &str, path: &Path) -> Result<Vec<Conversation>> {
    of_rows(rows(text, path)?, path)
}

/// Conversations of rows, each with its place.
pub(super) fn of_rows(rows: Vec<(String, Value)>, path: &Path) -> Result<Vec<Conversation>> {
    let mut found: Vec<Conversation> = Vec::new();
    let mut seen = std::collections::HashSet::new();
    for (place, row) in rows {
        let number = found.len() + 1;
        let read = conversation(&row, number)
            .map_err(|message| Error::file(path, format!("{place}: {message}")))?;
        if !seen.insert(read.id.clone()) {
            return Err(Error::file(
                path,
                format!("{place}: id `{}` occurs twice", read.id),
            ));
        }
        found.push(read);
    }
    match found.is_empty() {
        true => Err(Error::file(path, "holds no prompt")),
        false => Ok(found),
    }
}

/// The rows of a file, each with its place.
fn rows(text: &str, path: &Path) -> Result<Vec<(String, Value)>> {
    if text.trim_start().starts_with('[') {
        let list: Vec<Value> = serde_json::from_str(text)
            .map_err(|e| Error::file(path, format!("not a JSON list of rows: {e}")))?;
        let placed = list.into_iter().enumerate();
        return Ok(placed
            .map(|(i, row)| (format!("row {}", i + 1), row))
            .collect());
    }
    if let Ok(one @ Value::Object(_)) = serde_json::from_str(text) {
        return Ok(vec![("line 1".into(), one)]);
    }
    let lines = text
        .lines()
        .enumerate()
        .filter(|(_, l)| !l.trim().is_empty());
    lines
        .map(|(i, line)| {
            let place = format!("line {}", i + 1);
            match serde_json::from_str(line) {
                Ok(row) => Ok((place, row)),
                Err(e) => Err(Error::file(path, format!("{place}: not a prompt: {e}; expected one JSON object a line, or one list of them"))),
            }
        })
        .collect()
}

const EXPECTED: &str = "expected `turns`, `prompt`, `messages` (OpenAI), `conversations` (ShareGPT), `question` (GSM8K) or `instruction` (Alpaca)";

/// Keys that would change what is asked, and that are not read.
const NOT_READ: [&str; 9] = [
    "image",
    "images",
    "audio",
    "video",
    "tools",
    "functions",
    "tool_calls",
    "function_call",
    "documents",
];

/// Keys that would belong to the question, beside `question` or `prompt`.
const PART_OF_IT: [&str; 8] = [
    "context",
    "passage",
    "paragraph",
    "evidence",
    "article",
    "choices",
    "options",
    "input",
];

type Row = Map<String, Value>;

fn conversation(row: &Value, number: usize) -> Result<Conversation, String> {
    let Value::Object(row) = row else {
        return Err(format!("not a prompt: no JSON object; {EXPECTED}"));
    };
    if let Some(task) = tasks::of_row(row) {
        let task = task?;
        let mut answers = task.answers.into_iter();
        let said = answers.next().map(Message::assistant);
        return Ok(Conversation {
            id: id(row, number)?,
            task: Some(task.name.into()),
            messages: [user(task.asked)].into_iter().chain(said).collect(),
            others: answers.collect(),
            cut: false,
        });
    }
    let given = |row: &Row, key: &str| row.get(key).is_some_and(|v| !v.is_null());
    let empty = |v: &Value| v.as_array().is_some_and(Vec::is_empty);
    let body = match row.get("body") {
        Some(Value::Object(body)) => body,
        _ => row,
    };
    let holds = |row: &Row, key: &str| given(row, key) && !empty(&row[key]);
    let asked = given(body, "question") || given(body, "prompt");
    let beside: &[&str] = if asked { &PART_OF_IT } else { &[] };
    let strange = |key: &&&str| holds(row, key) || holds(body, key);
    if let Some(key) = NOT_READ.iter().chain(beside).find(strange) {
        return Err(format!(
            "holds `{key}`, which is not read; take it out, or the row"
        ));
    }
    let forms = [
        "turns",
        "messages",
        "conversations",
        "question",
        "instruction",
    ];
    let held: Vec<&str> = forms.into_iter().filter(|key| given(body, key)).collect();
    let (mut messages, alternate) = match held[..] {
        [] if given(body, "prompt") => (vec![user(text(body, "prompt")?)], false),
        [] => return Err(format!("needs a prompt: {EXPECTED}")),
        ["turns"] => (turns(&body["turns"])?, false),
        ["messages"] => (said(&body["messages"], "messages")?, true),
        ["conversations"] => (said(&body["conversations"], "conversations")?, true),
        ["question"] => (vec![user(text(body, "question")?)], false),
        ["instruction"] => {
            let mut asked = text(body, "instruction")?;
            for key in ["input", "context"] {
                let more = body.get(key).and_then(Value::as_str).unwrap_or_default();
                if !more.trim().is_empty() {
                    asked = format!("{asked}\n\n{more}");
                }
            }
            (vec![user(asked)], false)
        }
        _ => {
            return Err(format!(
                "holds {}: one of them is expected",
                held.join(" and ")
            ));
        }
    };
    let systems: Vec<&str> = ["system", "system_prompt"]
        .into_iter()
        .filter(|key| given(body, key))
        .collect();
    if let [key, ..] = systems[..] {
        let content = text(body, key)?;
        if messages.first().is_some_and(|m| m.role == "system") || systems.len() > 1 {
            return Err(format!(
                "holds two system messages, of which one is `{key}`"
            ));
        }
        if !content.trim().is_empty() {
            messages.insert(
                0,
                Message {
                    role: "system",
                    content,
                },
            );
        }
    }
    check(&messages, alternate)?;
    Ok(Conversation {
        id: id(row, number)?,
        task: match row.get("category").filter(|v| !v.is_null()) {
            None => None,
            Some(Value::String(task)) => Some(task.clone()),
            Some(other) => return Err(format!("`category` is {other}; expected a text")),
        },
        messages,
        others: Vec::new(),
        cut: cut(row),
    })
}

/// Whether the last answer of a row was broken off.
fn cut(row: &Row) -> bool {
    let finishes = row.get("finishes").and_then(Value::as_array);
    let last = finishes.and_then(|all| all.last()?.as_str());
    last.is_some_and(|last| ["length", "context", "interrupted"].contains(&last))
}

fn user(content: String) -> Message {
    Message {
        role: "user",
        content,
    }
}

fn text(row: &Row, key: &str) -> Result<String, String> {
    match row.get(key) {
        Some(Value::String(text)) => Ok(text.clone()),
        found => Err(format!(
            "`{key}` is {}; expected a text",
            found.unwrap_or(&Value::Null)
        )),
    }
}

fn id(row: &Row, number: usize) -> Result<String, String> {
    let keys = [
        "id",
        "question_id",
        "task_id",
        "custom_id",
        "conversation_id",
        "example_id",
        "fname",
    ];
    let found = keys
        .iter()
        .find_map(|key| Some((key, row.get(*key).filter(|v| !v.is_null())?)));
    match found {
        None => Ok(number.to_string()),
        Some((_, Value::String(id))) => Ok(id.clone()),
        Some((_, Value::Number(id))) => Ok(id.to_string()),
        Some((key, other)) => Err(format!("`{key}` is {other}; expected a text or a number")),
    }
}

fn turns(value: &Value) -> Result<Vec<Message>, String> {
    let wrong = || format!("`turns` is {value}; expected texts");
    let turns = value
        .as_array()
        .filter(|t| !t.is_empty())
        .ok_or_else(wrong)?;
    let turn = |t: &Value| t.as_str().map(|t| user(t.into())).ok_or_else(wrong);
    turns.iter().map(turn).collect()
}

/// Messages of `role` and `content`, or of `from` and `value`.
fn said(value: &Value, name: &str) -> Result<Vec<Message>, String> {
    let list = value
        .as_array()
        .ok_or_else(|| format!("`{name}` is no list"))?;
    let mut messages = Vec::new();
    for (i, entry) in list.iter().enumerate() {
        let place = format!("`{name}`, message {}", i + 1);
        let Some(entry) = entry.as_object() else {
            return Err(format!(
                "{place}: expected an object with `role` and `content`"
            ));
        };
        // Both pairs of names stand under both names of the list.
        let [who, what] = match entry.contains_key("from") {
            true => ["from", "value"],
            false => ["role", "content"],
        };
        let strange = |key: &&&str| entry.get(**key).is_some_and(|v| !v.is_null());
        if let Some(key) = NOT_READ.iter().find(strange) {
            return Err(format!("{place} holds `{key}`, which is not read"));
        }
        let speaker = text(entry, who).map_err(|e| format!("{place}: {e}"))?;
        let role = match speaker.to_lowercase().as_str() {
            "system" | "developer" => "system",
            "user" | "human" => "user",
            "assistant" | "gpt" | "chatgpt" | "model" | "bot" | "bing" | "bard" => "assistant",
            _ => {
                return Err(format!(
                    "{place}: `{who}` is `{speaker}`; expected system, user (human) or assistant (gpt)"
                ));
            }
        };
        let content = match entry.get(what) {
            Some(Value::Array(parts)) => parts
                .iter()
                .map(
                    |part| match (part.get("type").and_then(Value::as_str), part.get("text")) {
                        (Some("text"), Some(Value::String(text))) => Ok(text.as_str()),
                        _ => Err(format!("{place}: `{what}` holds a part that is no text")),
                    },
                )
                .collect::<Result<Vec<_>, String>>()?
                .concat(),
            _ => text(entry, what).map_err(|e| format!("{place}: {e}"))?,
        };
        messages.push(Message { role, content });
    }
    Ok(messages)
}

/// A system message comes first; then user and assistant speak in turn, where both do.
fn check(messages: &[Message], alternate: bool) -> Result<(), String> {
    let talk = match messages {
        [first, rest @ ..] if first.role == "system" => rest,
        all => all,
    };
    let spoken = talk.iter().filter(|m| m.role == "user");
    if spoken.clone().next().is_none() {
        return Err(format!("the user says nothing; {EXPECTED}"));
    }
    if spoken.clone().any(|m| m.content.trim().is_empty()) {
        return Err("an empty turn: the user says nothing in it".into());
    }
    for (i, message) in talk.iter().enumerate().filter(|_| alternate) {
        let expected = if i % 2 == 0 { "user" } else { "assistant" };
        if message.role != expected {
            let at = i + 1 + messages.len() - talk.len();
            return Err(format!(
                "message {at} is the {}'s; expected the {expected}'s",
                message.role
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn one(row: &str) -> Result<Conversation, String> {
        let found = parse(row, Path::new("x")).map_err(|e| e.to_string())?;
        assert_eq!(found.len(), 1);
        Ok(found.into_iter().next().expect("one"))
    }

    fn shown(c: &Conversation) -> Vec<String> {
        let line = |m: &Message| format!("{}: {}", m.role, m.content);
        c.messages.iter().map(line).collect()
    }

    #[test]
    fn every_form_is_read() {
        for (row, id, expected) in [
            (r#"{"id": 1, "prompt": "a"}"#, "1", &["user: a"][..]),
            (
                r#"{"question_id": 81, "category": "x", "turns": ["a", "b"]}"#,
                "81",
                &["user: a", "user: b"],
            ),
            (
                r#"{"id": "q", "system": "s", "prompt": "a"}"#,
                "q",
                &["system: s", "user: a"],
            ),
            (
                r#"{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#,
                "1",
                &["system: s", "user: a", "assistant: b"],
            ),
            (
                r#"{"custom_id": "r-1", "method": "POST", "body": {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}}"#,
                "r-1",
                &["user: a"],
            ),
            (
                r#"{"id": "k_0", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "c"}]}"#,
                "k_0",
                &["user: a", "assistant: b", "user: c"],
            ),
            (
                r#"{"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": "x", "test": "y", "entry_point": "f"}"#,
                "HumanEval/0",
                &["user: def f():\n"],
            ),
            (
                r#"{"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#,
                "1",
                &["user: a", "assistant: b"],
            ),
            (
                r#"{"question": "how many?", "answer": "4"}"#,
                "1",
                &["user: how many?"],
            ),
            (
                r#"{"instruction": "a", "input": "", "output": "o"}"#,
                "1",
                &["user: a"],
            ),
            (
                r#"{"instruction": "a", "input": "b"}"#,
                "1",
                &["user: a\n\nb"],
            ),
        ] {
            let list = format!("[{row}]");
            let spaced = format!("\n{row}\r\n\n");
            for text in [row, &list, &spaced] {
                let found = one(text).expect(text);
                assert_eq!(
                    (found.id.as_str(), &shown(&found)[..]),
                    (
                        id,
                        &expected.iter().map(|s| s.to_string()).collect::<Vec<_>>()[..]
                    ),
                    "{text}"
                );
            }
        }
    }

    #[test]
    fn a_wrong_row_is_refused_with_its_place_and_what_was_expected() {
        for (text, word) in [
            ("", "holds no prompt"),
            ("[]", "holds no prompt"),
            ("{}", "line 1: needs a prompt: expected `turns`"),
            ("[{}]", "row 1: needs a prompt"),
            ("{\"id\":1,\"turns\":[]}", "`turns` is []"),
            ("{\"id\":1,\"turns\":[1]}", "`turns` is [1]"),
            ("{\"id\":1,\"prompt\":\" \"}", "empty turn"),
            ("{\"id\":1,\"prompt\":[\"a\"]}", "`prompt` is"),
            ("{\"id\":[1],\"prompt\":\"a\"}", "`id` is [1]"),
            (
                "{\"id\":1,\"prompt\":\"a\",\"category\":3}",
                "`category` is 3",
            ),
            (
                "{\"id\":1,\"prompt\":\"a\"}\n{\"id\":1,\"prompt\":\"a\"}",
                "line 2: id `1` occurs twice",
            ),
            (
                "{\"id\":1,\"prompt\":\"a\",\"images\":[\"x.png\"]}",
                "`images`",
            ),
            ("{\"turns\":[\"a\"],\"messages\":[]}", "turns and messages"),
            ("{\"messages\":[]}", "the user says nothing"),
            ("{\"messages\":\"a\"}", "`messages` is no list"),
            (
                "{\"messages\":[{\"role\":\"tool\",\"content\":\"a\"}]}",
                "`tool`",
            ),
            ("{\"messages\":[{\"role\":\"user\"}]}", "`content` is null"),
            (
                "{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image_url\"}]}]}",
                "no text",
            ),
            (
                "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"},{\"role\":\"user\",\"content\":\"b\"}]}",
                "message 2 is the user's; expected the assistant's",
            ),
            (
                "{\"conversations\":[{\"from\":\"gpt\",\"value\":\"a\"},{\"from\":\"human\",\"value\":\"b\"}]}",
                "message 1",
            ),
            ("{\"question\":\"q\",\"context\":\"c\"}", "`context`"),
            (
                "{\"question\":\"q\",\"choices\":[\"a\",\"b\"]}",
                "`choices`",
            ),
            (
                "{\"custom_id\":\"x\",\"body\":{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}],\"tools\":[1]}}",
                "`tools`",
            ),
            (
                "{\"system\":\"s\",\"messages\":[{\"role\":\"system\",\"content\":\"t\"},{\"role\":\"user\",\"content\":\"a\"}]}",
                "two system",
            ),
            ("nonsense", "line 1: not a prompt"),
            ("[1, 2", "not a JSON list"),
            ("3", "no JSON object"),
        ] {
            let error = parse(text, Path::new("x")).expect_err(word).to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    proptest! {
        /// The law of forms: one conversation, however it is written down.
        #[test]
        fn a_conversation_is_the_same_in_every_form(
            system in proptest::option::of("[a-z\"{\\[]{1,8}"),
            said in prop::collection::vec("\\PC{0,12}x", 1..6),
        ) {
            let roles = ["user", "assistant"].into_iter().cycle();
            let turns: Vec<(&str, &String)> = roles.zip(&said).collect();
            let mut expected: Vec<String> = system.iter().map(|s| format!("system: {s}")).collect();
            expected.extend(turns.iter().map(|(role, text)| format!("{role}: {text}")));
            let list = |who: &str, what: &str, names: [&str; 3]| {
                let named = |role: &str| names[["system", "user", "assistant"].iter().position(|r| *r == role).expect("a role")];
                let system = system.iter().map(|s| json!({who: named("system"), what: s}));
                system.chain(turns.iter().map(|(role, text)| json!({who: named(role), what: text}))).collect::<Vec<_>>()
            };
            for row in [
                json!({"messages": list("role", "content", ["system", "user", "assistant"])}),
                json!({"messages": list("role", "content", ["developer", "user", "assistant"])}),
                json!({"conversations": list("from", "value", ["system", "human", "gpt"])}),
                json!({"custom_id": "x", "body": {"messages": list("role", "content", ["system", "user", "assistant"])}}),
            ] {
                for text in [row.to_string(), json!([row]).to_string(), format!("\n{row}\r\n")] {
                    prop_assert_eq!(&shown(&one(&text).expect("read")), &expected);
                }
            }
        }
    }

    #[test]
    fn one_object_over_several_lines_is_one_row() {
        let found = one("{\n  \"id\": 5,\n  \"prompt\": \"a\"\n}").expect("read");
        assert_eq!(
            (found.id.as_str(), &shown(&found)[..]),
            ("5", &["user: a".to_string()][..])
        );
    }

    #[test]
    fn a_byte_order_mark_is_skipped() {
        let file = tempfile::NamedTempFile::new().expect("file");
        std::fs::write(
            file.path(),
            b"\xEF\xBB\xBF{\"id\": 1, \"prompt\": \"Hi\"}\r\n",
        )
        .expect("write");
        assert_eq!(shown(&read(file.path()).expect("read")[0]), ["user: Hi"]);
    }
}
