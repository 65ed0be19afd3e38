//! Values of a template as Python writes them: printed, and as `json.dumps`.

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Error, ErrorKind, Value};

/// Characters that one value may take: a value may hold another many times.
const MOST: usize = 1 << 24;
/// Values within values.
const DEEPEST: usize = 64;

fn refuse(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

/// Text that grows up to a limit.
struct Text(String);

impl Text {
    fn push(&mut self, s: &str) -> Result<(), Error> {
        self.0.push_str(s);
        match self.0.len() <= MOST {
            true => Ok(()),
            false => Err(refuse(format!("a value of more than {MOST} characters"))),
        }
    }
}

/// A floating-point number as `repr` writes it.
fn float(v: f64) -> String {
    if v.is_nan() {
        return "nan".into();
    }
    if v.is_infinite() {
        return if v > 0.0 { "inf".into() } else { "-inf".into() };
    }
    let text = format!("{v:?}");
    match text.split_once('e') {
        // 1e-7 is 1e-07 there, and 1e16 is 1e+16.
        Some((digits, exponent)) => {
            let (sign, exponent) = match exponent.strip_prefix('-') {
                Some(rest) => ('-', rest),
                None => ('+', exponent),
            };
            format!("{digits}e{sign}{exponent:0>2}")
        }
        None => text,
    }
}

/// Whether a number has a fraction in Python's eyes.
fn is_float(value: &Value) -> bool {
    value.kind() == ValueKind::Number && !value.is_integer()
}

/// A number as Python prints it.
fn number(value: &Value) -> String {
    match (is_float(value), f64::try_from(value.clone())) {
        (true, Ok(v)) => float(v),
        _ => value.to_string(),
    }
}

/// What `{{ value }}` prints with Jinja2.
pub(super) fn print(value: &Value) -> Result<String, Error> {
    if let Some(text) = value.as_str() {
        return Ok(text.to_string());
    }
    let mut out = Text(String::new());
    repr(value, 0, &mut out)?;
    Ok(out.0)
}

/// The filter `join`, each value as it is printed.
pub(super) fn join(values: Value, between: Option<String>) -> Result<String, Error> {
    let mut out = Text(String::new());
    for (i, value) in values.try_iter()?.enumerate() {
        if i > 0 {
            out.push(between.as_deref().unwrap_or_default())?;
        }
        out.push(&print(&value)?)?;
    }
    Ok(out.0)
}

fn repr(value: &Value, depth: usize, out: &mut Text) -> Result<(), Error> {
    if depth > DEEPEST {
        return Err(refuse("values lie too deep within each other"));
    }
    match value.kind() {
        ValueKind::Undefined => Ok(()),
        ValueKind::None => out.push("None"),
        ValueKind::Bool => out.push(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => out.push(&number(value)),
        ValueKind::String => out.push(&quoted(value.as_str().unwrap_or_default())),
        ValueKind::Seq | ValueKind::Iterable => {
            out.push("[")?;
            for (i, item) in value.try_iter()?.enumerate() {
                if i > 0 {
                    out.push(", ")?;
                }
                repr(&item, depth + 1, out)?;
            }
            out.push("]")
        }
        ValueKind::Map => {
            out.push("{")?;
            for (i, key) in value.try_iter()?.enumerate() {
                if i > 0 {
                    out.push(", ")?;
                }
                repr(&key, depth + 1, out)?;
                out.push(": ")?;
                repr(&value.get_item(&key)?, depth + 1, out)?;
            }
            out.push("}")
        }
        _ => out.push(&value.to_string()),
    }
}

/// A text as `repr` writes it.
fn quoted(text: &str) -> String {
    let quote = match text.contains('\'') && !text.contains('"') {
        true => '"',
        false => '\'',
    };
    let mut out = String::from(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            c if (c as u32) < 0x20 || (0x7F..0xA1).contains(&(c as u32)) || c == '\u{AD}' => {
                out.push_str(&format!("\\x{:02x}", c as u32));
            }
            c => out.push(c),
        }
    }
    out.push(quote);
    out
}

/// How `json.dumps` is asked to write.
struct Json {
    ascii: bool,
    /// What each level is indented by.
    indent: Option<String>,
    between: String,
    colon: String,
    sort: bool,
}

/// The filter `tojson` of transformers: `json.dumps(x, ensure_ascii, indent, separators, sort_keys)`, and no escapes for
/// HTML.
pub(super) fn tojson(value: Value, given: Rest<Value>, named: Kwargs) -> Result<Value, Error> {
    let mut given = given.0.into_iter();
    let mut argument = |name: &str| -> Result<Option<Value>, Error> {
        let by_name: Option<Value> = named.get(name)?;
        Ok(given
            .next()
            .or(by_name)
            .filter(|v| !v.is_none() && !v.is_undefined()))
    };
    let ascii = argument("ensure_ascii")?.is_some_and(|v| v.is_true());
    let indent = match argument("indent")? {
        None => None,
        Some(v) => Some(match v.as_str() {
            Some(text) => text.to_string(),
            None => {
                let n =
                    i64::try_from(v.clone()).map_err(|_| refuse("tojson: indent is no number"))?;
                " ".repeat(usize::try_from(n).unwrap_or(0).min(64))
            }
        }),
    };
    let usual = if indent.is_some() { "," } else { ", " };
    let (between, colon) = match argument("separators")? {
        None => (usual.to_string(), ": ".to_string()),
        Some(pair) => {
            let parts: Vec<Value> = pair.try_iter()?.collect();
            match &parts[..] {
                [a, b] => (print(a)?, print(b)?),
                _ => return Err(refuse("tojson: separators are two texts")),
            }
        }
    };
    let sort = argument("sort_keys")?.is_some_and(|v| v.is_true());
    named.assert_all_used()?;
    if given.next().is_some() {
        return Err(refuse("tojson: too many arguments"));
    }
    let how = Json {
        ascii,
        indent,
        between,
        colon,
        sort,
    };
    let mut out = Text(String::new());
    how.write(&value, 0, &mut out)?;
    Ok(Value::from(out.0))
}

impl Json {
    fn write(&self, value: &Value, depth: usize, out: &mut Text) -> Result<(), Error> {
        if depth > DEEPEST {
            return Err(refuse("tojson: values lie too deep within each other"));
        }
        match value.kind() {
            ValueKind::None => out.push("null"),
            ValueKind::Bool => out.push(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push(&match f64::try_from(value.clone()) {
                Ok(v) if is_float(value) && v.is_nan() => "NaN".into(),
                Ok(v) if is_float(value) && v.is_infinite() => {
                    if v > 0.0 {
                        "Infinity".into()
                    } else {
                        "-Infinity".into()
                    }
                }
                _ => number(value),
            }),
            ValueKind::String => self.text(value.as_str().unwrap_or_default(), out),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.group('[', ']', items.len(), depth, out, &mut |i, out| {
                    self.write(&items[i], depth + 1, out)
                })
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort {
                    keys.sort();
                }
                self.group('{', '}', keys.len(), depth, out, &mut |i, out| {
                    match keys[i].as_str() {
                        Some(key) => self.text(key, out)?,
                        None => {
                            let mut key = Text(String::new());
                            self.write(&keys[i], DEEPEST, &mut key)?;
                            self.text(&key.0, out)?;
                        }
                    }
                    out.push(&self.colon)?;
                    self.write(&value.get_item(&keys[i])?, depth + 1, out)
                })
            }
            _ => Err(refuse(format!("tojson: a {} is no JSON", value.kind()))),
        }
    }

    fn group(
        &self,
        open: char,
        close: char,
        count: usize,
        depth: usize,
        out: &mut Text,
        item: &mut dyn FnMut(usize, &mut Text) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let line = |depth: usize, out: &mut Text| match &self.indent {
            Some(indent) if count > 0 => out.push(&format!("\n{}", indent.repeat(depth))),
            _ => Ok(()),
        };
        out.push(open.encode_utf8(&mut [0; 4]))?;
        for i in 0..count {
            if i > 0 {
                out.push(&self.between)?;
            }
            line(depth + 1, out)?;
            item(i, out)?;
        }
        line(depth, out)?;
        out.push(close.encode_utf8(&mut [0; 4]))
    }

    fn text(&self, text: &str, out: &mut Text) -> Result<(), Error> {
        let mut quoted = String::from('"');
        for c in text.chars() {
            match c {
                '"' => quoted.push_str("\\\""),
                '\\' => quoted.push_str("\\\\"),
                '\n' => quoted.push_str("\\n"),
                '\r' => quoted.push_str("\\r"),
                '\t' => quoted.push_str("\\t"),
                '\u{8}' => quoted.push_str("\\b"),
                '\u{C}' => quoted.push_str("\\f"),
                c if (c as u32) < 0x20 || (self.ascii && !c.is_ascii()) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        quoted.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => quoted.push(c),
            }
        }
        quoted.push('"');
        out.push(&quoted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_printed_as_python_prints_them() {
        let shown = |v: Value| print(&v).expect("prints");
        assert_eq!(shown(Value::from(true)), "True");
        assert_eq!(shown(Value::from(())), "None");
        assert_eq!(shown(Value::UNDEFINED), "");
        for (v, text) in [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e16, "1e+16"),
            (1.5e-7, "1.5e-07"),
            (123456789012345.0, "123456789012345.0"),
        ] {
            assert_eq!(shown(Value::from(v)), text);
        }
        let list = Value::from(vec![
            Value::from("it's"),
            Value::from("a\"b"),
            Value::from("\n\u{e9}"),
            Value::from(2),
        ]);
        assert_eq!(shown(list), "[\"it's\", 'a\"b', '\\n\u{e9}', 2]");
        let map = Value::from(std::collections::BTreeMap::from([("k", Value::from(()))]));
        assert_eq!(shown(map), "{'k': None}");
    }
}
