//! Costs of a machine that is not at hand: the roofline form of its datasheet's peaks.

use std::path::Path;
use std::str::FromStr;

use scylla_core::model::Shards;
use serde::Serialize;

use super::measure::{File, MOST_ROWS, Measured, ROWS, WIDTHS, layers, told_apart};
use super::roofline::Shapes;
use super::table::{Cost, What};
use crate::costs::draft_hash;
use crate::drafts::shipped;
use crate::experiment::{Experiment, Named};
use crate::{Error, Result, Session};

/// A machine's peaks.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Datasheet {
    /// Operations a second in the form that products are computed in; a multiplication and an addition are two.
    pub operations_per_s: f64,
    /// Bytes a second from memory.
    pub bytes_per_s: f64,
}

impl FromStr for Datasheet {
    type Err = String;

    /// `989e12,3.35e12`
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let peak = |part: &str| {
            part.trim()
                .parse()
                .ok()
                .filter(|p: &f64| p.is_finite() && *p > 0.0)
        };
        match text.split(',').map(peak).collect::<Vec<_>>()[..] {
            [Some(operations_per_s), Some(bytes_per_s)] => Ok(Self {
                operations_per_s,
                bytes_per_s,
            }),
            _ => Err(format!(
                "`{text}`: 989e12,3.35e12 is meant, operations a second and bytes a second"
            )),
        }
    }
}

impl Datasheet {
    /// What so many bytes and operations take.
    fn seconds(&self, bytes: f64, operations: f64) -> f64 {
        (bytes / self.bytes_per_s).max(operations / self.operations_per_s)
    }
}

/// Bytes and weights that a level of a draft reads and multiplies with: its matrices, but for an embedding, which is looked up.
fn read_of(draft: &Named) -> Result<Option<(f64, f64)>> {
    let Some(dir) = draft.dir.clone().or_else(|| shipped(&draft.name)) else {
        return Ok(None);
    };
    let shards = Shards::open(&dir)?;
    let (mut bytes, mut weights) = (0.0, 0.0);
    for name in shards.names() {
        let shape = shards.shape(name).unwrap_or_default();
        if shape.len() != 2 || name.contains("embed_tokens") {
            continue;
        }
        let size = shape.iter().product::<usize>() as f64;
        weights += size;
        bytes += size * shards.dtype(name, shape)?.bitsize() as f64 / 8.0;
    }
    Ok(Some((bytes, weights)))
}

/// Writes what forwards of a target, and levels of drafts in the form in which they are stored, would take at least on a machine
/// into a file of costs. What is between is left out: a datasheet says nothing of it.
///
/// # Errors
/// If the file is of another machine or other models, or a draft cannot be read.
pub fn from_datasheet(
    session: &Session,
    drafts: &[Experiment],
    sheet: Datasheet,
    sizes: &Measured,
    path: &Path,
) -> Result<()> {
    told_apart(drafts)?;
    let named: Vec<&Named> = drafts.iter().map(|d| &d.draft).collect();
    let hashes: Vec<String> = named.iter().map(|d| draft_hash(d)).collect::<Result<_>>()?;
    let about = serde_json::json!({
        "datasheet": sheet, "target_hash": session.target_hash()?, "drafts": named, "hashes": hashes,
    });
    let shapes = Shapes::of(session);
    let said = serde_json::to_string(&shapes).map_err(|e| Error::Experiment(e.to_string()))?;
    let mut file = File::open(path, &about.to_string(), &said)?;
    let mut levels = Vec::new();
    for draft in drafts {
        if let Some(read) = read_of(&draft.draft)? {
            levels.push((layers(draft), read));
        }
    }
    for &context in &sizes.contexts {
        for &batch in &sizes.batches {
            let b = batch as f64;
            let fits = |rows: &usize| *rows == 1 || batch * rows <= MOST_ROWS;
            for rows in ROWS.into_iter().filter(fits) {
                let (bytes, operations) = shapes.work(b, rows as f64, context as f64);
                file.add_new(&Cost {
                    what: What::Forward,
                    batch,
                    rows,
                    context,
                    layers: 0,
                    seconds: sheet.seconds(bytes, operations),
                })?;
            }
            for &(layers, (bytes, weights)) in &levels {
                for rows in WIDTHS {
                    file.add_new(&Cost {
                        what: What::Draft,
                        batch,
                        rows,
                        context,
                        layers,
                        seconds: sheet.seconds(bytes, 2.0 * weights * b * rows as f64),
                    })?;
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_datasheet_is_two_peaks() {
        let sheet: Datasheet = "989e12, 3.35e12".parse().expect("two peaks");
        assert_eq!(sheet.seconds(3.35e12, 1.0), 1.0);
        assert_eq!(sheet.seconds(1.0, 2.0 * 989e12), 2.0);
        for bad in ["989e12", "989e12,x", "0,1", "1,2,3", "inf,1", ""] {
            assert!(bad.parse::<Datasheet>().is_err(), "{bad}");
        }
    }
}
