//! Where a model keeps its chat templates.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use super::chat::ChatTemplate;
use crate::files::{read_json, read_text};
use crate::model::Gguf;
use crate::{Error, Result};

/// The sources of a model's chat templates.
#[derive(Default)]
pub(super) struct Templates {
    /// The one that is taken unless another is asked for.
    pub(super) default: Option<String>,
    /// Others, by name.
    pub(super) named: BTreeMap<String, String>,
    /// What they print for `bos_token` and so on.
    pub(super) specials: Vec<(String, String)>,
}

impl Templates {
    /// Of a directory: `chat_template.jinja` and `additional_chat_templates/NAME.jinja`, else `chat_template` of
    /// `tokenizer_config.json` (one, or a list by name), else `chat_template.json`.
    pub(super) fn of_dir(dir: &Path, config: &Value) -> Result<Self> {
        let mut found = Self::default();
        match config.get("chat_template") {
            Some(Value::String(t)) => found.default = Some(t.clone()),
            Some(Value::Array(list)) => {
                for entry in list {
                    let text = |key: &str| entry.get(key).and_then(Value::as_str);
                    let (Some(name), Some(template)) = (text("name"), text("template")) else {
                        return Err(Error::file(
                            &dir.join("tokenizer_config.json"),
                            "`chat_template` holds a template without name or text",
                        ));
                    };
                    found.named.insert(name.into(), template.into());
                }
            }
            None | Some(Value::Null) => {}
            Some(other) => {
                return Err(Error::file(
                    &dir.join("tokenizer_config.json"),
                    format!("`chat_template` is {other}; expected a template, or a list of them"),
                ));
            }
        }
        let legacy = dir.join("chat_template.json");
        if found.default.is_none() && found.named.is_empty() && legacy.is_file() {
            let json = read_json(&legacy, "JSON")?;
            found.default = json
                .get("chat_template")
                .and_then(Value::as_str)
                .map(str::to_string);
        }
        let standalone = dir.join("chat_template.jinja");
        if standalone.is_file() {
            found.default = Some(read_text(&standalone)?);
        }
        let more = dir.join("additional_chat_templates");
        for entry in std::fs::read_dir(more).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.extension().is_some_and(|e| e == "jinja") {
                let name = path.file_stem().unwrap_or_default().to_string_lossy();
                found.named.insert(name.into_owned(), read_text(&path)?);
            }
        }
        Ok(found.settled())
    }

    /// Of a GGUF file: `tokenizer.chat_template` and `tokenizer.chat_template.NAME`.
    pub(super) fn of_gguf(gguf: &Gguf) -> Result<Self> {
        let mut found = Self {
            default: gguf.text("tokenizer.chat_template")?.map(str::to_string),
            ..Self::default()
        };
        for key in gguf.keys() {
            if let Some(name) = key.strip_prefix("tokenizer.chat_template.")
                && let Some(template) = gguf.text(key)?
            {
                found.named.insert(name.into(), template.into());
            }
        }
        Ok(found.settled())
    }

    /// The one named `default` is the default.
    fn settled(mut self) -> Self {
        let default = self.named.remove("default");
        self.default = self.default.or(default);
        self
    }

    /// The template of a name, or the default one; `None` where there is none at all.
    pub(super) fn compile(&self, name: Option<&str>) -> Result<Option<ChatTemplate>> {
        let source = match name {
            None | Some("default") => self.default.as_ref(),
            Some(name) => match self.named.get(name) {
                Some(source) => Some(source),
                None => {
                    let default = self.default.as_ref().map(|_| "default");
                    let known = self.named.keys().map(String::as_str).chain(default);
                    return Err(Error::unknown("chat template", name, known));
                }
            },
        };
        let compile = |source: &String| ChatTemplate::new(source, self.specials.clone());
        source.map(compile).transpose()
    }
}
