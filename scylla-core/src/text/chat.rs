//! Chat templates, rendered as transformers renders them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use jiff::civil::DateTime;
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, Value, context};

use super::python;
use crate::guard::guarded;
use crate::{Error, Result};

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: &'static str,
    /// Its text.
    pub content: String,
}

impl Message {
    /// What the user says.
    pub fn user(content: impl Into<String>) -> Self {
        Self::of("user", content)
    }

    /// What the model said.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::of("assistant", content)
    }

    /// What stands above the conversation.
    pub fn system(content: impl Into<String>) -> Self {
        Self::of("system", content)
    }

    fn of(role: &'static str, content: impl Into<String>) -> Self {
        Self {
            role,
            content: content.into(),
        }
    }
}

/// What a template may do: an instruction costs 1, a byte that it makes or reads 1/64 (minijinja's fuel).
const FUEL: u64 = 2_000_000;
/// Bytes of a prompt.
const LONGEST: usize = 1 << 24;
/// Macros, loops and blocks within each other.
const DEEPEST: usize = 100;

/// A Jinja chat template of a model.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// Special tokens by the names that templates know them by.
    specials: Vec<(String, String)>,
    date: Option<DateTime>,
    uses_date: Arc<AtomicBool>,
}

/// Training's `{% generation %}` blocks, whose content is rendered as it stands: an `if` that is always true, with the
/// same control of white space.
fn without_generation(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        out.push_str(before);
        rest = tag;
        let Some(end) = tag.find("%}") else { break };
        let inner = &tag[..end];
        let word = inner.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let instead = match word {
            "generation" => "if true",
            "endgeneration" => "endif",
            _ => continue,
        };
        out.push_str(&inner.replace(word, instead));
        rest = &tag[end..];
    }
    out.push_str(rest);
    out
}

impl ChatTemplate {
    /// Compiles a template; `specials` are what its `bos_token`, `eos_token` and so on print.
    ///
    /// # Errors
    /// If it does not compile.
    pub fn new(source: &str, specials: Vec<(String, String)>) -> Result<Self> {
        let bad = |e: minijinja::Error| Error::Invalid(format!("chat template: {e:#}"));
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build();
        environment.set_syntax(syntax.map_err(bad)?);
        environment.set_debug(false);
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(DEEPEST);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_formatter(|out, _, value| Ok(out.write_str(&python::print(value)?)?));
        environment.add_filter("tojson", python::tojson);
        environment.add_filter("string", |value: Value| python::print(&value));
        environment.add_filter("join", python::join);
        environment.add_function(
            "raise_exception",
            |message: String| -> Result<String, minijinja::Error> {
                Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
            },
        );
        let source = without_generation(source);
        guarded("chat template", || {
            environment.add_template_owned("chat", source).map_err(bad)
        })?;
        Ok(Self {
            environment,
            specials,
            date: None,
            uses_date: Arc::default(),
        })
    }

    /// Fixes the date and time that the template is told, for repeatable runs; `None` tells it the real ones.
    pub fn set_date(&mut self, date: Option<DateTime>) {
        self.date = date;
    }

    /// Whether it has asked for the date while it was rendered.
    pub fn uses_date(&self) -> bool {
        self.uses_date.load(Ordering::Relaxed)
    }

    /// The prompt of a conversation, open for the assistant's answer.
    ///
    /// # Errors
    /// If the template refuses the conversation, does something wrong, or does too much.
    pub fn render(&self, messages: &[Message]) -> Result<String> {
        self.render_as(messages, true)
    }

    /// The same, closed: nothing is begun behind the last message.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub fn render_closed(&self, messages: &[Message]) -> Result<String> {
        self.render_as(messages, false)
    }

    /// The same; `open` says whether the assistant's turn is begun.
    pub(super) fn render_as(&self, messages: &[Message], open: bool) -> Result<String> {
        let turn = |m: &Message| context! { role => m.role, content => m.content.clone() };
        let mut values: Vec<(&str, Value)> = vec![
            ("messages", messages.iter().map(turn).collect()),
            ("add_generation_prompt", open.into()),
            // Given as None, so that `is not none` says no.
            ("tools", ().into()),
            ("documents", ().into()),
            ("strftime_now", self.strftime_now()),
        ];
        let specials = self.specials.iter();
        values.extend(specials.map(|(name, token)| (name.as_str(), token.clone().into())));
        let values = Value::from(values.into_iter().collect::<BTreeMap<_, _>>());
        let render = || {
            guarded("chat template", || {
                let template = self.environment.get_template("chat");
                template.and_then(|t| t.render(values)).map_err(explain)
            })
        };
        let text = with_deep_stack(render)??;
        match text.len() <= LONGEST {
            true => Ok(text),
            false => Err(Error::Invalid(format!(
                "chat template: a prompt of more than {LONGEST} bytes"
            ))),
        }
    }

    /// `datetime.now().strftime(format)`.
    fn strftime_now(&self) -> Value {
        let (date, used) = (self.date, Arc::clone(&self.uses_date));
        Value::from_function(move |format: String| -> Result<String, minijinja::Error> {
            used.store(true, Ordering::Relaxed);
            let now = date.unwrap_or_else(|| jiff::ZonedDateTime::now().datetime());
            let refuse = |e: jiff::Error| {
                let message = format!("strftime_now `{format}`: {e}");
                minijinja::Error::new(ErrorKind::InvalidOperation, message)
            };
            jiff::fmt::strtime::format(&format, now).map_err(refuse)
        })
    }
}

/// Runs on a stack on which values within values, as many as the fuel allows, are taken apart one within the other. It
/// takes memory as it is used.
fn with_deep_stack<T: Send>(body: impl FnOnce() -> T + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(256 << 20);
        let no_thread =
            |e: std::io::Error| Error::Invalid(format!("chat template: no thread: {e}"));
        let running = thread.spawn_scoped(scope, body).map_err(no_thread)?;
        let died = |_| Error::Invalid("chat template: it cannot be worked with".into());
        running.join().map_err(died)
    })
}

fn explain(e: minijinja::Error) -> Error {
    match e.kind() {
        ErrorKind::OutOfFuel => Error::Invalid(format!(
            "chat template: it does more than a prompt can need (limit {FUEL} steps, a byte counting 1/64)"
        )),
        _ => Error::Invalid(format!("chat template: {e:#}")),
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

    fn render(source: &str) -> Result<String> {
        let specials = [("bos_token", "<s>"), ("eos_token", "</s>")];
        let specials = specials.map(|(k, v)| (k.to_string(), v.to_string()));
        let mut template = ChatTemplate::new(source, specials.to_vec())?;
        template.set_date(Some(jiff::civil::date(2024, 7, 6).at(5, 4, 3, 0)));
        template.render(&[user(" a "), user("b")])
    }

    #[test]
    fn templates_use_python_methods_and_both_special_tokens() {
        let source = "{{ bos_token }}{% for m in messages %}\n    {% if m['role'] == 'user' %}[{{ m['content'].strip() }}]{% endif %}\n{% endfor %}{{ eos_token }}";
        assert_eq!(render(source).expect("renders"), "<s>[a][b]</s>");
    }

    #[test]
    fn what_transformers_renders_is_rendered() {
        for (source, expected) in [
            ("{% if tools is not none %}TOOLS{% endif %}x", "x"),
            (
                "{% if tools is defined and documents is defined %}x{% endif %}",
                "x",
            ),
            ("{% if pad_token is defined %}x{% endif %}", ""),
            ("{{ strftime_now('%Y-%m-%d') }}", "2024-07-06"),
            (
                "{{ strftime_now('%d %b %Y, %-d %B, %H:%M') }}",
                "06 Jul 2024, 6 July, 05:04",
            ),
            (
                "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
                " a b",
            ),
            (
                "x\n  {%- generation -%}  y {%- endgeneration +%}\nz",
                "xy\nz",
            ),
            ("{% generation %}\ny\n{% endgeneration %}\nz", "y\nz"),
            (
                "{{ 'a<b & \\'c\\' \u{e9}' | tojson }}",
                "\"a<b & 'c' \u{e9}\"",
            ),
            (
                "{{ 'a\u{e9}\u{1F600}' | tojson(ensure_ascii=True) }}",
                "\"a\\u00e9\\ud83d\\ude00\"",
            ),
            (
                "{{ {'b': [1, 2.0, none, true], 'a': {}} | tojson }}",
                "{\"b\": [1, 2.0, null, true], \"a\": {}}",
            ),
            (
                "{{ {'b': 1, 'a': [2]} | tojson(indent=2, sort_keys=true) }}",
                "{\n  \"a\": [\n    2\n  ],\n  \"b\": 1\n}",
            ),
            ("{{ [1, 2] | tojson(separators=(',', ':')) }}", "[1,2]"),
            (
                "{{ none }}{{ true }}{{ 1.0 }}{{ ['a', 1] }}",
                "NoneTrue1.0['a', 1]",
            ),
            (
                "{{ [1, none, 'a'] | join }}{{ [true, 'b'] | join('-') }}",
                "1NoneaTrue-b",
            ),
            (
                "{{ true | string }}{{ (none | string) ~ 'x' }}",
                "TrueNonex",
            ),
            ("{{ undefined_thing }}x", "x"),
        ] {
            assert_eq!(render(source).expect(source), expected, "{source}");
        }
    }

    #[test]
    fn a_template_can_refuse_a_conversation() {
        let error = render("{{ raise_exception('roles must alternate') }}");
        let error = error.expect_err("refused").to_string();
        assert!(error.contains("roles must alternate"), "{error}");
    }

    #[test]
    fn a_template_that_does_too_much_is_stopped() {
        for source in [
            "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
            "{% for a in range(100000) %}{{ 'x' * 100000 }}{% endfor %}",
            "{% set n = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "{% set n = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
            "{% macro f(s) %}{{ f(s ~ s) }}{% endmacro %}{{ f('x') }}",
            "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
            "{{ ('x' * 100000) | replace('x', 'y' * 100000) }}",
            "{{ '%1000000000d' | format(1) }}",
            "{{ 'x' | indent(1000000000) }}{{ 'x\nx' | indent(1000000000) }}",
            "{{ [1] | batch(1000000000, 'x') | list | length }}",
            "{{ [1] * 1000000000 | length }}",
            "{{ range(10 ** 18) | list | length }}",
            "{{ 10 ** (10 ** 18) }}",
            "{{ [1, 2] | tojson(indent='x' * 10000000) }}",
            "{% set n = namespace(x=['aaaaaaaa']) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
            "{% set n = namespace(x=['aaaaaaaa']) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | tojson }}",
            "{% set n = namespace(x=[]) %}{% for i in range(100000) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x }}{{ n.x | tojson }}",
        ] {
            let done = render(source);
            assert!(
                done.is_err() || done.is_ok_and(|t| t.len() < 1 << 24),
                "{source}"
            );
        }
    }

    #[test]
    fn a_broken_template_is_an_error() {
        for source in ["{% for", "{% generation %}x", "{% if", "{%"] {
            assert!(ChatTemplate::new(source, Vec::new()).is_err(), "{source}");
        }
    }
}
