//! How files spell the rotary positions, and what they mean by it.

use std::path::Path;

use serde_json::{Map, Value};

use super::config::RopeScaling;
use super::gguf::Gguf;
use super::hf::Fields;
use crate::{Error, Result};

/// Base and stretch of the rotary frequencies.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Rope {
    pub(super) theta: f64,
    pub(super) scaling: RopeScaling,
}

/// Keys of a rope dictionary beside its type's own; each has to say "as usual", or is read elsewhere.
const COMMON: [&str; 6] = [
    "type",
    "rope_type",
    "rope_theta",
    "partial_rotary_factor",
    "attention_factor",
    "original_max_position_embeddings",
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
    let refuse =
        |message: String| Error::Unsupported(format!("{}: {message}", fields.path.display()));
    let kind = match (inner.text("rope_type")?, inner.text("type")?) {
        (Some(a), Some(b)) if a != b => {
            return Err(refuse(format!(
                "`{name}` has rope_type `{a}` and type `{b}`"
            )));
        }
        (a, b) => a.or(b),
    };
    whole_head(fields, inner.number("partial_rotary_factor")?)?;
    if let Some(factor) = inner.number("attention_factor")?
        && factor != 1.0
    {
        return Err(refuse(format!(
            "`{name}.attention_factor` is {factor}; supported: 1"
        )));
    }
    let positive = |key: &str| -> Result<f64> {
        match inner.number(key)? {
            Some(v) if v > 0.0 && v.is_finite() => Ok(v),
            Some(v) => Err(Error::file(
                fields.path,
                format!("`{name}.{key}` is {v}; it must be positive"),
            )),
            None => Err(Error::file(
                fields.path,
                format!(
                    "rope type `{}` needs a positive `{name}.{key}`",
                    kind.unwrap_or_default()
                ),
            )),
        }
    };
    let (scaling, own): (RopeScaling, &[&str]) = match kind {
        None | Some("default") => (RopeScaling::None, &[]),
        Some("linear") => (
            RopeScaling::Linear {
                factor: positive("factor")?,
            },
            &["factor"],
        ),
        Some("llama3") => {
            let original = match inner.given("original_max_position_embeddings") {
                Some(_) => positive("original_max_position_embeddings")?,
                None => match fields.number("original_max_position_embeddings")? {
                    Some(v) if v > 0.0 => v,
                    _ => positive("original_max_position_embeddings")?,
                },
            };
            let (low, high) = (positive("low_freq_factor")?, positive("high_freq_factor")?);
            if high <= low {
                return Err(Error::file(
                    fields.path,
                    format!(
                        "`{name}.high_freq_factor` {high} must be above `low_freq_factor` {low}"
                    ),
                ));
            }
            let scaling = RopeScaling::Llama3 {
                factor: positive("factor")?,
                low_freq_factor: low,
                high_freq_factor: high,
                original,
            };
            (scaling, &["factor", "low_freq_factor", "high_freq_factor"])
        }
        Some(other) => {
            return Err(refuse(format!(
                "rope type `{other}`; supported: default, linear, llama3"
            )));
        }
    };
    let unread = |key: &&String| {
        let known = COMMON.contains(&key.as_str()) || own.contains(&key.as_str());
        !known && !super::known::neutral(key, &map[*key])
    };
    if let Some(key) = map.keys().find(unread) {
        let kind = kind.map_or("none".into(), |k| format!("`{k}`"));
        return Err(refuse(format!(
            "`{name}.{key}` is {} beside rope type {kind}, which has no such key",
            map[key]
        )));
    }
    let own_theta = inner.number("rope_theta")?.or(theta);
    Ok(Rope {
        theta: own_theta.unwrap_or(10000.0),
        scaling,
    })
}

/// The rope of a GGUF file, as llama.cpp reads it: a factor without a type is linear, and `rope.scale_linear` is the
/// older spelling. `factors` are those of `rope_freqs.weight`, one per pair.
pub(super) fn of_gguf(
    gguf: &Gguf,
    arch: &str,
    head_dim: usize,
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
    let factor = match gguf.text(&key("scaling.type"))? {
        None => factor.unwrap_or(1.0),
        Some("none") => 1.0,
        Some("linear") => match factor {
            Some(factor) => factor,
            None => return Err(gguf.absent(&key("scaling.factor"))),
        },
        Some(other) => {
            return refuse(format!(
                "rope scaling `{other}`; supported: none, linear, rope_freqs.weight"
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
