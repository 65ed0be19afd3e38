//! Chat templates, rendered as Hugging Face renders them.

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, Value, context};

use crate::{Error, Result};

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: &'static str,
    /// Its text.
    pub content: String,
}

/// A Jinja chat template of a model.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    /// Compiles a template; `bos` and `eos` are what its `bos_token` and `eos_token` print.
    pub fn new(source: String, bos: String, eos: String) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build();
        environment
            .set_syntax(syntax.map_err(|e| Error::Invalid(format!("chat template: {e:#}")))?);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function(
            "raise_exception",
            |message: String| -> Result<String, minijinja::Error> {
                Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
            },
        );
        // A fixed day: prompts must not change with the calendar.
        environment.add_function("strftime_now", |_format: String| "26 Jul 2024");
        environment
            .add_template_owned("chat", source)
            .map_err(|e| Error::Invalid(format!("chat template: {e:#}")))?;
        Ok(Self {
            environment,
            bos,
            eos,
        })
    }

    /// The prompt of a conversation, open for the assistant's answer.
    pub fn render(&self, messages: &[Message]) -> Result<String> {
        let turn = |m: &Message| context! { role => m.role, content => m.content.clone() };
        let values = context! {
            messages => messages.iter().map(turn).collect::<Vec<Value>>(),
            add_generation_prompt => true,
            bos_token => self.bos.clone(),
            eos_token => self.eos.clone(),
        };
        self.environment
            .get_template("chat")
            .and_then(|t| t.render(values))
            .map_err(|e| Error::Invalid(format!("chat template: {e:#}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(content: &str) -> Message {
        Message {
            role: "user",
            content: content.into(),
        }
    }

    #[test]
    fn templates_use_python_methods_and_both_special_tokens() {
        let source = "{{ bos_token }}{% for m in messages %}\n    {% if m['role'] == 'user' %}[{{ m['content'].strip() }}]{% endif %}\n{% endfor %}{{ eos_token }}";
        let template =
            ChatTemplate::new(source.into(), "<s>".into(), "</s>".into()).expect("compiles");
        assert_eq!(
            template.render(&[user(" a "), user("b")]).expect("renders"),
            "<s>[a][b]</s>"
        );
    }

    #[test]
    fn a_template_can_refuse_a_conversation() {
        let source = "{{ raise_exception('roles must alternate') }}".to_string();
        let template = ChatTemplate::new(source, String::new(), String::new()).expect("compiles");
        let error = template
            .render(&[user("a")])
            .expect_err("refused")
            .to_string();
        assert!(error.contains("roles must alternate"), "{error}");
    }

    #[test]
    fn a_broken_template_is_an_error() {
        assert!(ChatTemplate::new("{% for".into(), String::new(), String::new()).is_err());
    }
}
