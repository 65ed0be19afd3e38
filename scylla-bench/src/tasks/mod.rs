//! Tasks over a text, as their data sets write them: questions and summaries with the answers that count as right, and how an answer
//! is scored against them.
//!
//! | form | row |
//! |---|---|
//! | QED | `question`, `paragraph_text`, `original_nq_answers` of `string` |
//! | FairytaleQA | `question`, `story_section`, `answer1` and `answer2` |
//! | DIALOGSum | `dialogue`, `summary`, or `summary1` to `summary3` |
//! | any other | `question`, `context` (or `passage`, `paragraph`), `answer` or `answers`, as a text, texts, or SQuAD's `text` |
//! | | `summary` (or `highlights`) of a `document`, `article` or `text` |
//!
//! A row that holds more than that of what is asked (choices, images, messages, a system's) is none.

mod score;

use serde_json::{Map, Value};

pub use score::{f1, rouge_l, rouge_lsum};

/// A task over a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    /// What it is called.
    pub name: &'static str,
    /// What is asked, text included.
    pub asked: String,
    /// Answers that count as right, the first of which is learned from.
    pub answers: Vec<String>,
}

type Row = Map<String, Value>;

/// What would be asked beside a text and a question.
const MORE: [&str; 17] = [
    "choices",
    "options",
    "image",
    "images",
    "audio",
    "video",
    "tools",
    "messages",
    "conversations",
    "turns",
    "prompt",
    "instruction",
    "system",
    "system_prompt",
    "text",
    "input",
    "documents",
];

/// The task of a row, where it is one.
///
/// # Errors
/// If it is one and something of it is no text.
pub fn of_row(row: &Row) -> Option<Result<Task, String>> {
    let has = |key: &str| match row.get(key) {
        None | Some(Value::Null) => false,
        Some(Value::String(text)) => !text.trim().is_empty(),
        Some(_) => true,
    };
    let holds = |key: &&&str| has(key) && row[**key].as_array().is_none_or(|all| !all.is_empty());
    let first = |keys: &[&'static str]| keys.iter().copied().find(|key| has(key));
    let summary = first(&["summary", "summary1", "highlights"]);
    // A text with its summary; beside anything else a text is more than is asked.
    let others = ["dialogue", "document", "article", "question"];
    let of_text = has("text") && summary.is_some() && first(&others).is_none();
    if MORE
        .iter()
        .any(|key| holds(&key) && !(of_text && *key == "text"))
    {
        return None;
    }
    let context = first(&[
        "paragraph_text",
        "story_section",
        "context",
        "passage",
        "paragraph",
    ]);
    let answered = first(&["original_nq_answers", "answer1", "answers", "answer"]);
    if let (true, Some(context), Some(answered)) = (has("question"), context, answered) {
        return Some(question(row, context, answered));
    }
    let text = first(&["dialogue", "document", "article", "text"])?;
    Some(summarised(row, text, summary?))
}

fn text<'a>(row: &'a Row, key: &str) -> Result<&'a str, String> {
    match row.get(key) {
        Some(Value::String(text)) if !text.trim().is_empty() => Ok(text.trim()),
        found => Err(format!(
            "`{key}` is {}; expected a text",
            found.unwrap_or(&Value::Null)
        )),
    }
}

fn question(row: &Row, context: &str, answered: &str) -> Result<Task, String> {
    let asked = format!(
        "Answer the question by the text, in a few words.\n\nText: {}\n\nQuestion: {}",
        text(row, context)?,
        text(row, "question")?
    );
    let mut answers = Vec::new();
    match answered {
        "answer1" => {
            answers.push(text(row, "answer1")?.to_string());
            answers.extend(text(row, "answer2").ok().map(str::to_string));
        }
        key => strings(&row[key], &mut answers),
    }
    named("question", asked, answers, answered)
}

fn summarised(row: &Row, of: &str, summary: &str) -> Result<Task, String> {
    let what = if of == "dialogue" { "dialogue" } else { "text" };
    let asked = format!(
        "Summarise the {what} in a few sentences.\n\n{}",
        text(row, of)?
    );
    let mut answers = vec![text(row, summary)?.to_string()];
    for more in ["summary2", "summary3"]
        .iter()
        .filter(|_| summary == "summary1")
    {
        answers.extend(text(row, more).ok().map(str::to_string));
    }
    named("summary", asked, answers, summary)
}

fn named(
    name: &'static str,
    asked: String,
    mut answers: Vec<String>,
    key: &str,
) -> Result<Task, String> {
    let mut seen = std::collections::HashSet::new();
    answers.retain(|a| !a.is_empty() && seen.insert(a.clone()));
    match answers.is_empty() {
        true => Err(format!(
            "`{key}` holds no answer; expected a text, or several"
        )),
        false => Ok(Task {
            name,
            asked,
            answers,
        }),
    }
}

/// All texts of answers: texts, lists of them, and what QED (`string`) and SQuAD (`text`) put them into.
fn strings(value: &Value, into: &mut Vec<String>) {
    match value {
        Value::String(text) => into.push(text.trim().to_string()),
        Value::Array(all) => all.iter().for_each(|v| strings(v, into)),
        Value::Object(fields) => {
            let held = fields.get("string").or_else(|| fields.get("text"));
            held.iter().for_each(|v| strings(v, into));
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn task(row: Value) -> Task {
        let Value::Object(row) = row else {
            panic!("an object")
        };
        of_row(&row).expect("a task").expect("whole")
    }

    #[test]
    fn every_data_set_is_read_in_its_own_form() {
        for (row, name, asked, answers) in [
            (
                json!({"example_id": -62915, "title_text": "T", "url": "u", "question": "who was it", "paragraph_text": "It was Ann .",
                    "sentence_starts": [0], "original_nq_answers": [[{"start": 7, "end": 10, "string": "Ann"}]], "annotation": {}}),
                "question",
                "who was it",
                &["Ann"][..],
            ),
            (
                json!({"story_name": "s", "story_section": "Once there was a king.", "question": "Who was there?", "answer1": "A king.",
                    "answer2": "a king", "local-or-sum": "local", "attribute": "character"}),
                "question",
                "Once there was a king.",
                &["A king.", "a king"],
            ),
            (
                json!({"id": "train_0", "dialogue": "#Person1#: Hi.\n#Person2#: Bye.", "summary": "They meet.", "topic": "greeting"}),
                "summary",
                "the dialogue",
                &["They meet."],
            ),
            (
                json!({"fname": "test_0", "dialogue": "a", "summary1": "x", "summary2": "y", "summary3": "x"}),
                "summary",
                "the dialogue",
                &["x", "y"],
            ),
            (
                json!({"id": "5", "context": "c", "question": "q", "answers": {"text": ["a", "b"], "answer_start": [1, 2]}}),
                "question",
                "c",
                &["a", "b"],
            ),
            (
                json!({"context": "c", "question": "q", "answers": "", "answer": "a"}),
                "question",
                "c",
                &["a"],
            ),
            (
                json!({"passage": "c", "question": "q", "answer": " a "}),
                "question",
                "Question: q",
                &["a"],
            ),
            (
                json!({"article": "long", "highlights": "short", "id": "0"}),
                "summary",
                "the text",
                &["short"],
            ),
            (
                json!({"text": "long", "summary": "short"}),
                "summary",
                "long",
                &["short"],
            ),
        ] {
            let found = task(row);
            assert_eq!(
                (found.name, &found.answers[..]),
                (name, &answers.map_strings()[..])
            );
            assert!(found.asked.contains(asked), "{}", found.asked);
        }
    }

    trait Strings {
        fn map_strings(&self) -> Vec<String>;
    }

    impl Strings for &[&str] {
        fn map_strings(&self) -> Vec<String> {
            self.iter().map(|s| s.to_string()).collect()
        }
    }

    #[test]
    fn what_is_no_task_is_left_to_others_and_a_broken_one_is_said() {
        let of = |row: Value| of_row(row.as_object().expect("an object"));
        for row in [
            json!({"question": "how many?", "answer": "4"}),
            json!({"text": "only a text"}),
            json!({"prompt": "a"}),
            json!({"context": "c", "question": "q"}),
            json!({"context": "c", "question": "q", "answers": null}),
            json!({"context": "c", "question": "q", "answer": "B", "choices": ["x", "y"]}),
            json!({"context": "c", "question": "q", "answer": "b", "image": "i.png"}),
            json!({"text": "t", "summary": " "}),
            json!({"text": "t", "document": "d", "summary": "s"}),
            json!({"text": "t", "summary": "s", "choices": ["a"]}),
            json!({"document": "d", "summary": " "}),
        ] {
            assert!(of(row.clone()).is_none(), "{row}");
        }
        for (row, key) in [
            (
                json!({"context": "c", "question": 5, "answer": "a"}),
                "question",
            ),
            (
                json!({"context": "c", "question": "q", "answers": []}),
                "answers",
            ),
            (json!({"dialogue": 3, "summary": "s"}), "dialogue"),
            (json!({"dialogue": "d", "summary": ["s"]}), "summary"),
        ] {
            let error = of(row).expect("a task").expect_err("broken");
            assert!(error.contains(&format!("`{key}`")), "{error}");
        }
    }
}
