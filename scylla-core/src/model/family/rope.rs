//! How files spell the rotary positions, and what they mean by it.

use std::path::Path;

use serde_json::{Map, Value};

use super::{Fields, known};
use crate::model::files::Gguf;
use crate::model::rope::{Rope, RopeScaling, yarn_attention_factor};
use crate::{Error, Result};

/// Keys of a rope dictionary beside its type's own; each has to say "as usual", or is read elsewhere.
const COMMON: [&str; 5] = [
    "type",
    "rope_type",
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
];

/// Stretches that are refused, with the reason.
const REFUSED: [(&str, &str); 2] = [
    (
        "dynamic",
        "its frequencies change as a text grows, so that cached keys would have to be rotated anew",
    ),
    (
        "longrope",
        "its factors change with the length of a text, so that cached keys would have to be rotated anew",
    ),
];

/// The rope of a `config.json`: `rope_theta` with `rope_scaling`, or `rope_parameters`, which may be given by kind of
/// layer. Where several spellings are there they must agree.
pub(super) fn of_hf(fields: &Fields<'_>) -> Result<Rope> {
    whole_head(fields, fields.number("partial_rotary_factor")?)?;
    let theta = fields.number("rope_theta")?;
    let newer = match fields.given("rope_parameters") {
        None => None,
        Some(Value::Object(map)) => Some(by_layer(fields, map, theta)?),
        Some(other) => return Err(fields.wrong("rope_parameters", other, "an object")),
    };
    // The older dictionary has no base of its own.
    let base = theta.or(newer.as_ref().map(|rope| rope.theta));
    let older = match fields.given("rope_scaling") {
        None => None,
        Some(Value::Object(map)) => Some(read(fields, "rope_scaling", map, base)?),
        Some(other) => return Err(fields.wrong("rope_scaling", other, "an object")),
    };
    let plain = || Rope {
        theta: theta.unwrap_or(10000.0),
        scaling: RopeScaling::None,
    };
    match (older, newer) {
        (None, None) => Ok(plain()),
        (Some(rope), None) | (None, Some(rope)) => match theta {
            Some(theta) if theta != rope.theta => Err(disagree(fields)),
            _ => Ok(rope),
        },
        (Some(a), Some(b)) if a == b && theta.is_none_or(|t| t == a.theta) => Ok(a),
        _ => Err(disagree(fields)),
    }
}

fn disagree(fields: &Fields<'_>) -> Error {
    Error::file(
        fields.path,
        "`rope_theta`, `rope_scaling` and `rope_parameters` do not say the same; keep the one that holds",
    )
}

/// `rope_parameters`, whole or by kind of layer (`full_attention`, `sliding_attention`).
fn by_layer(fields: &Fields<'_>, map: &Map<String, Value>, theta: Option<f64>) -> Result<Rope> {
    let nested: Vec<(&String, &Map<String, Value>)> = map
        .iter()
        .filter_map(|(key, value)| Some((key, value.as_object()?)))
        .collect();
    if nested.is_empty() {
        return read(fields, "rope_parameters", map, theta);
    }
    if nested.len() != map.len() {
        return Err(Error::Unsupported(format!(
            "{}: `rope_parameters` holds kinds of layers beside values: {}",
            fields.path.display(),
            map.keys().cloned().collect::<Vec<_>>().join(", ")
        )));
    }
    let read_one = |(kind, map): &(&String, &Map<String, Value>)| {
        read(fields, &format!("rope_parameters.{kind}"), map, theta)
    };
    let ropes = nested.iter().map(read_one).collect::<Result<Vec<_>>>()?;
    match ropes.iter().all(|rope| *rope == ropes[0]) {
        true => Ok(ropes[0].clone()),
        false => Err(Error::Unsupported(format!(
            "{}: `rope_parameters` differs between kinds of layers ({}); one rope for all layers is supported",
            fields.path.display(),
            map.keys().cloned().collect::<Vec<_>>().join(", ")
        ))),
    }
}

fn whole_head(fields: &Fields<'_>, share: Option<f64>) -> Result<()> {
    match share {
        Some(share) if share != 1.0 => Err(Error::Unsupported(format!(
            "{}: `partial_rotary_factor` is {share}; only whole heads are rotated (1)",
            fields.path.display()
        ))),
        _ => Ok(()),
    }
}

/// One dictionary.
struct Dictionary<'a> {
    /// The whole configuration.
    fields: &'a Fields<'a>,
    /// The dictionary's own values.
    inner: Fields<'a>,
    name: &'a str,
    kind: Option<&'a str>,
}

fn read(
    fields: &Fields<'_>,
    name: &str,
    map: &Map<String, Value>,
    theta: Option<f64>,
) -> Result<Rope> {
    let inner = Fields {
        map,
        path: fields.path,
        prefix: format!("{name}."),
    };
    let text = |key: &str| inner.text(key).map(|t| t.map(str::to_string));
    let (newer, older) = (text("rope_type")?, text("type")?);
    if let (Some(a), Some(b)) = (&newer, &older)
        && a != b
    {
        return Err(Error::Unsupported(format!(
            "{}: `{name}` has rope_type `{a}` and type `{b}`",
            fields.path.display()
        )));
    }
    whole_head(fields, inner.number("partial_rotary_factor")?)?;
    let own_theta = inner.number("rope_theta")?.or(theta);
    let kind = newer.or(older);
    let dictionary = Dictionary {
        fields,
        inner,
        name,
        kind: kind.as_deref(),
    };
    let (scaling, own) = dictionary.scaling()?;
    dictionary.check_read(own)?;
    Ok(Rope {
        theta: own_theta.unwrap_or(10000.0),
        scaling,
    })
}

impl Dictionary<'_> {
    fn refuse<T>(&self, message: String) -> Result<T> {
        let path = self.fields.path.display();
        Err(Error::Unsupported(format!("{path}: {message}")))
    }

    /// A positive number, where there is one.
    fn optional(&self, key: &str) -> Result<Option<f64>> {
        match self.inner.number(key)? {
            Some(v) if !(v > 0.0 && v.is_finite()) => Err(Error::file(
                self.fields.path,
                format!("`{}.{key}` is {v}; it must be positive", self.name),
            )),
            found => Ok(found),
        }
    }

    fn positive(&self, key: &str) -> Result<f64> {
        let missing = || {
            let kind = self.kind.unwrap_or_default();
            Error::file(
                self.fields.path,
                format!("rope type `{kind}` needs a positive `{}.{key}`", self.name),
            )
        };
        self.optional(key)?.ok_or_else(missing)
    }

    /// The context that the model was first trained with; beside the dictionary where it is not in it.
    fn original(&self) -> Result<Option<f64>> {
        let key = "original_max_position_embeddings";
        match self.optional(key)? {
            Some(v) => Ok(Some(v)),
            None => Ok(self.fields.number(key)?.filter(|&v| v > 0.0)),
        }
    }

    /// The stretch, and the keys that say it.
    fn scaling(&self) -> Result<(RopeScaling, &'static [&'static str])> {
        Ok(match self.kind {
            None | Some("default") => (RopeScaling::None, &[]),
            Some("linear") => {
                let factor = self.positive("factor")?;
                (RopeScaling::Linear { factor }, &["factor"])
            }
            Some("llama3") => (
                self.llama3()?,
                &["factor", "low_freq_factor", "high_freq_factor"],
            ),
            Some("yarn") => (self.yarn()?, &YARN),
            Some(other) => {
                let reason = REFUSED.iter().find(|(name, _)| *name == other);
                return self.refuse(match reason {
                    Some((_, reason)) => format!("rope type `{other}`: {reason}"),
                    None => {
                        format!("rope type `{other}`; supported: default, linear, llama3, yarn")
                    }
                });
            }
        })
    }

    fn llama3(&self) -> Result<RopeScaling> {
        let original = match self.original()? {
            Some(v) => v,
            None => self.positive("original_max_position_embeddings")?,
        };
        let (low, high) = (
            self.positive("low_freq_factor")?,
            self.positive("high_freq_factor")?,
        );
        if high <= low {
            return Err(Error::file(
                self.fields.path,
                format!(
                    "`{}.high_freq_factor` {high} must be above `low_freq_factor` {low}",
                    self.name
                ),
            ));
        }
        Ok(RopeScaling::Llama3 {
            factor: self.positive("factor")?,
            low_freq_factor: low,
            high_freq_factor: high,
            original,
        })
    }

    /// YaRN, with the defaults of transformers.
    fn yarn(&self) -> Result<RopeScaling> {
        let context = self.fields.need("max_position_embeddings")? as f64;
        let original = self.original()?.unwrap_or(context);
        let factor = self.optional("factor")?.unwrap_or(context / original);
        let given = self.optional("attention_factor")?;
        let mscale = |by: f64| match factor > 1.0 {
            true => 0.1 * by * factor.ln() + 1.0,
            false => 1.0,
        };
        let both = (self.optional("mscale")?, self.optional("mscale_all_dim")?);
        let attention_factor = match (given, both) {
            (Some(given), _) => given,
            (None, (Some(scale), Some(all))) => mscale(scale) / mscale(all),
            _ => yarn_attention_factor(factor),
        };
        let (beta_fast, beta_slow) = (
            self.optional("beta_fast")?.unwrap_or(32.0),
            self.optional("beta_slow")?.unwrap_or(1.0),
        );
        if beta_fast < beta_slow {
            return Err(Error::file(
                self.fields.path,
                format!(
                    "`{}.beta_fast` {beta_fast} must not be below `beta_slow` {beta_slow}",
                    self.name
                ),
            ));
        }
        Ok(RopeScaling::Yarn {
            factor,
            original,
            beta_fast,
            beta_slow,
            attention_factor,
            truncate: self.inner.flag("truncate")?.unwrap_or(true),
        })
    }

    /// Refuses keys that the type does not have.
    fn check_read(&self, own: &[&str]) -> Result<()> {
        let map = self.inner.map;
        let unread = |key: &&String| {
            let known = COMMON.contains(&key.as_str()) || own.contains(&key.as_str());
            !known && !known::neutral(key, &map[*key])
        };
        let Some(key) = map.keys().find(unread) else {
            return Ok(());
        };
        let kind = self.kind.map_or("none".into(), |k| format!("`{k}`"));
        self.refuse(format!(
            "`{}.{key}` is {} beside rope type {kind}, which has no such key",
            self.name, map[key]
        ))
    }
}

/// Keys of a yarn dictionary.
const YARN: [&str; 7] = [
    "factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
];

/// The rope of a GGUF file, as llama.cpp reads it: a factor without a type is linear, and `rope.scale_linear` is the
/// older spelling. `factors` are those of `rope_freqs.weight`, one per pair.
pub(super) fn of_gguf(
    gguf: &Gguf,
    arch: &str,
    head_dim: usize,
    context: usize,
    factors: Option<Vec<f32>>,
) -> Result<Rope> {
    let path: &Path = &gguf.path;
    let key = |name: &str| format!("{arch}.rope.{name}");
    let refuse =
        |message: String| Err(Error::Unsupported(format!("{}: {message}", path.display())));
    if let Some(size) = gguf.size(&key("dimension_count"))?
        && size != head_dim
    {
        return refuse(format!(
            "`{}` is {size} of heads of {head_dim}; only whole heads are rotated",
            key("dimension_count")
        ));
    }
    let positive = |key: String| -> Result<Option<f64>> {
        match gguf.number(&key)? {
            Some(v) if !(v > 0.0 && v.is_finite()) => Err(Error::file(
                path,
                format!("metadata `{key}` is {v}; it must be positive"),
            )),
            found => Ok(found),
        }
    };
    let factor = match positive(key("scaling.factor"))? {
        Some(factor) => Some(factor),
        None => positive(key("scale_linear"))?,
    };
    let kind = gguf.text(&key("scaling.type"))?;
    if kind == Some("yarn") {
        if factors.is_some() {
            return refuse("yarn beside rope_freqs.weight".into());
        }
        let Some(factor) = factor else {
            return Err(gguf.absent(&key("scaling.factor")));
        };
        let original = positive(key("scaling.original_context_length"))?;
        let own = positive(key("scaling.attn_factor"))?.unwrap_or(1.0);
        let scaling = RopeScaling::Yarn {
            factor,
            original: original.unwrap_or(context as f64),
            beta_fast: positive(key("scaling.yarn_beta_fast"))?.unwrap_or(32.0),
            beta_slow: positive(key("scaling.yarn_beta_slow"))?.unwrap_or(1.0),
            attention_factor: own * yarn_attention_factor(factor),
            truncate: true,
        };
        let theta = positive(key("freq_base"))?.unwrap_or(10000.0);
        return Ok(Rope { theta, scaling });
    }
    // llama.cpp applies it whatever the type.
    if let Some(own) = positive(key("scaling.attn_factor"))?
        && own != 1.0
    {
        return refuse(format!(
            "`{}` is {own} without yarn; supported: 1",
            key("scaling.attn_factor")
        ));
    }
    let factor = match kind {
        None => factor.unwrap_or(1.0),
        Some("none") => 1.0,
        Some("linear") => match factor {
            Some(factor) => factor,
            None => return Err(gguf.absent(&key("scaling.factor"))),
        },
        Some(other) => {
            return refuse(format!(
                "rope scaling `{other}`; supported: none, linear, yarn, rope_freqs.weight"
            ));
        }
    };
    let scaling = match factors {
        Some(factors) => {
            if let Some(f) = factors.iter().find(|f| !(f.is_finite() && **f > 0.0)) {
                return Err(Error::file(
                    path,
                    format!("rope_freqs.weight holds the factor {f}; it must be positive"),
                ));
            }
            RopeScaling::Factors(factors.into_iter().map(|f| f * factor as f32).collect())
        }
        None if factor == 1.0 => RopeScaling::None,
        None => RopeScaling::Linear { factor },
    };
    Ok(Rope {
        theta: positive(key("freq_base"))?.unwrap_or(10000.0),
        scaling,
    })
}
