//! The roofline form of a machine's forwards: what the shapes of a target and two peaks say they take.

use serde::{Deserialize, Serialize};

use super::table::CostTable;
use crate::Session;
use crate::laws::Roofline;

/// Of a target, what its forwards read and compute.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Shapes {
    /// P: weights that a row is multiplied with.
    pub parameters: f64,
    /// L.
    pub layers: f64,
    /// Heads times head size.
    pub hidden: f64,
    /// W.
    pub weight_bytes: f64,
    /// Bytes of a position of a sequence's cache.
    pub position_bytes: f64,
}

impl Shapes {
    /// Of a session's target.
    pub fn of(session: &Session) -> Self {
        let target = &session.target;
        let config = &target.config;
        let size = |(_, shape): &(String, Vec<usize>)| shape.iter().product::<usize>() as f64;
        let all: f64 = config.tensors().iter().map(size).sum();
        // An embedding that is no head is looked up, and not multiplied with.
        let table = match config.tied {
            true => 0.0,
            false => (config.vocab * config.hidden) as f64,
        };
        let attention = config.layers.first();
        Self {
            parameters: all - table,
            layers: config.layers.len() as f64,
            hidden: attention.map_or(0.0, |l| (l.heads * l.head_dim) as f64),
            weight_bytes: target.weight_bytes as f64,
            position_bytes: target.cache_bytes as f64,
        }
    }

    /// Bytes and operations of a forward.
    pub(super) fn work(&self, batch: f64, rows: f64, context: f64) -> (f64, f64) {
        (
            self.bytes(batch, context),
            self.operations(batch, rows, context),
        )
    }

    fn bytes(&self, batch: f64, context: f64) -> f64 {
        self.weight_bytes + batch * context * self.position_bytes
    }

    fn operations(&self, batch: f64, rows: f64, context: f64) -> f64 {
        let attention = 4.0 * self.layers * self.hidden;
        batch * rows * (2.0 * self.parameters + attention * (context + rows))
    }
}

/// What the form says, and how far it is from what was measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Peaks {
    /// The most bytes a second that a forward had.
    pub bytes_per_s: f64,
    /// The most operations a second.
    pub operations_per_s: f64,
    /// Mean absolute error of max(bytes, operations), each over its peak, as a share of what was measured.
    pub error: f64,
    /// Nodes a cycle at which both take as long, by batch: the third law with this machine's constants.
    pub widths: Vec<(usize, f64)>,
}

/// Fits the two peaks to a table's forwards. `None` where it holds none.
pub fn fit(table: &CostTable, shapes: &Shapes, batches: &[usize], context: usize) -> Option<Peaks> {
    let points: Vec<(f64, f64, f64)> = table
        .forwards()
        .map(|([context, batch, rows], seconds)| {
            (
                shapes.bytes(batch, context),
                shapes.operations(batch, rows, context),
                seconds,
            )
        })
        .filter(|point| point.2 > 0.0)
        .collect();
    let peak = |of: fn(&(f64, f64, f64)) -> f64| points.iter().map(of).fold(0.0, f64::max);
    let (bytes_per_s, operations_per_s) = (peak(|p| p.0 / p.2), peak(|p| p.1 / p.2));
    if points.is_empty() || bytes_per_s <= 0.0 || operations_per_s <= 0.0 {
        return None;
    }
    let off = |&(bytes, operations, seconds): &(f64, f64, f64)| {
        let said = (bytes / bytes_per_s).max(operations / operations_per_s);
        (said / seconds - 1.0).abs()
    };
    let error = points.iter().map(off).sum::<f64>() / points.len() as f64;
    let law = Roofline {
        parameters: shapes.parameters,
        layers: shapes.layers,
        hidden: shapes.hidden,
        context: context as f64,
        weight_bytes: shapes.weight_bytes,
        cache_bytes: shapes.position_bytes * context as f64,
        intensity: operations_per_s / bytes_per_s,
    }
    .law();
    Some(Peaks {
        bytes_per_s,
        operations_per_s,
        error,
        widths: batches.iter().map(|&b| (b, law.width(b as f64))).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::super::table::{Cost, What};
    use super::*;

    #[test]
    fn peaks_of_a_machine_that_is_a_roofline_are_found() {
        let shapes = Shapes {
            parameters: 1e8,
            layers: 30.0,
            hidden: 576.0,
            weight_bytes: 1e8,
            position_bytes: 23_040.0,
        };
        let mut costs = Vec::new();
        for batch in [1usize, 2, 8] {
            for rows in [1usize, 4, 16, 48] {
                let (b, r) = (batch as f64, rows as f64);
                let bytes = shapes.bytes(b, 128.0) / 25e9;
                let operations = shapes.operations(b, r, 128.0) / 400e9;
                costs.push(Cost {
                    what: What::Forward,
                    batch,
                    rows,
                    context: 128,
                    layers: 0,
                    seconds: bytes.max(operations),
                });
            }
        }
        let table = CostTable::new(&costs, Vec::new());
        let found = fit(&table, &shapes, &[1, 8], 128).expect("forwards");
        assert!((found.bytes_per_s / 25e9 - 1.0).abs() < 1e-9, "{found:?}");
        assert!(
            (found.operations_per_s / 400e9 - 1.0).abs() < 1e-9,
            "{found:?}"
        );
        assert!(found.error < 1e-9, "{found:?}");
        // At the width both take as long.
        let (batch, width) = found.widths[0];
        let ratio = shapes.operations(batch as f64, width, 128.0) / shapes.bytes(1.0, 128.0);
        assert!((ratio / 16.0 - 1.0).abs() < 1e-9, "{ratio}");
        assert!(found.widths[1].1 < width);
    }
}
