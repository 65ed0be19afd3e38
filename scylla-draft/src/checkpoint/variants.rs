//! The usual mistakes around a draft, and the draft with each of them undone.
//!
//! Each was met in the field: layers counted by outputs where inputs are meant, a residual stream that begins before or behind a
//! norm, features taken before the final norm, rows paired one off, a vocabulary map of ids where offsets are meant, and a
//! rotary base that a configuration left out.

use scylla_core::model::{LayerSpec, RopeScaling};
use scylla_core::plugin::Tap;

use super::{Checkpoint, DraftConfig, Eagle3Config, MapForm};

/// What a row of a draft pairs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Pairing {
    /// Token `i + 1` with feature `i`.
    #[default]
    Next,
    /// Token `i` with feature `i`: ids that were not shifted.
    Same,
    /// Token `i + 1` with feature `i - 1`: features shifted once too often.
    Stale,
}

impl Pairing {
    /// As people read it.
    pub fn said(self) -> &'static str {
        match self {
            Self::Next => "token i + 1 beside feature i",
            Self::Same => "token i beside feature i",
            Self::Stale => "token i + 1 beside feature i - 1",
        }
    }
}

/// What a draft is fed with, and how its files are read.
#[derive(Debug, Clone, PartialEq)]
pub struct Reading {
    /// The network.
    pub config: DraftConfig,
    /// How its vocabulary map is read.
    pub map: MapForm,
    /// States of the target that make up a feature.
    pub taps: Vec<Tap>,
    /// What a row pairs.
    pub pairing: Pairing,
}

/// A reading with one thing changed.
#[derive(Debug, Clone, PartialEq)]
pub struct Variant {
    /// What is looked at.
    pub check: &'static str,
    /// What the files and the engine say of it.
    pub found: String,
    /// What this reading takes instead.
    pub instead: String,
    /// The reading.
    pub reading: Reading,
}

/// Taps as people read them.
pub fn said(taps: &[Tap]) -> String {
    let one = |tap: &Tap| match tap {
        Tap::Input(layer) => format!("input of layer {layer}"),
        Tap::Final => "final state, normed".into(),
    };
    taps.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// A rotary setting as people read it.
pub fn rope_said(layer: &LayerSpec) -> String {
    match &layer.rope.scaling {
        RopeScaling::None => format!("base {}", layer.rope.theta),
        scaling => format!("base {}, {scaling:?}", layer.rope.theta),
    }
}

/// The base that a configuration means which says none.
const USUAL_BASE: f64 = 10000.0;

/// A draft as its files say, with these taps, and with each usual mistake undone. `like` is a layer of its target, which has
/// `layers` of them.
pub fn variants(
    from: &Checkpoint,
    taps: &[Tap],
    like: &LayerSpec,
    layers: usize,
) -> (Reading, Vec<Variant>) {
    let given = Reading {
        config: from.config.clone(),
        map: from.map,
        taps: taps.to_vec(),
        pairing: Pairing::Next,
    };
    let mut all = Vec::new();
    let mut add = |check, found: &str, instead: String, change: &dyn Fn(&mut Reading)| {
        let mut reading = given.clone();
        change(&mut reading);
        all.push(Variant {
            check,
            found: found.into(),
            instead,
            reading,
        });
    };
    for off in [-1, 1] {
        let moved = |tap: &Tap| match tap {
            Tap::Input(layer) => layer.checked_add_signed(off).filter(|&l| l <= layers),
            Tap::Final => None,
        };
        let moved: Option<Vec<usize>> = taps.iter().map(moved).collect();
        if let Some(moved) = moved {
            let moved: Vec<Tap> = moved.into_iter().map(Tap::Input).collect();
            add("taps", &said(taps), said(&moved), &|r| {
                r.taps.clone_from(&moved)
            });
        }
    }
    if taps == [Tap::Final] {
        let before = [Tap::Input(layers)];
        let instead = "final state, before the norm".to_string();
        add("feature", &said(taps), instead, &|r| {
            r.taps = before.to_vec()
        });
    }
    for other in [Pairing::Same, Pairing::Stale] {
        let found = Pairing::Next.said();
        add("pairing", found, other.said().into(), &|r| {
            r.pairing = other
        });
    }
    match &from.config {
        DraftConfig::Eagle3(c) => {
            let flip = |change: fn(&mut Eagle3Config)| {
                move |r: &mut Reading| {
                    if let DraftConfig::Eagle3(c) = &mut r.config {
                        change(c);
                    }
                }
            };
            let (found, instead) = (c.norm_before_residual, !c.norm_before_residual);
            add(
                "norm_before_residual",
                &found.to_string(),
                instead.to_string(),
                &flip(|c| c.norm_before_residual = !c.norm_before_residual),
            );
            let (found, instead) = recurrence(c.norm_output);
            add(
                "recurrence",
                found,
                instead.into(),
                &flip(|c| c.norm_output = !c.norm_output),
            );
            if from.has("d2t") {
                let (found, instead) = match from.map {
                    MapForm::Offsets => ("offsets", "ids"),
                    MapForm::Ids => ("ids", "offsets"),
                };
                add("d2t", found, instead.into(), &|r| {
                    r.map = match r.map {
                        MapForm::Offsets => MapForm::Ids,
                        MapForm::Ids => MapForm::Offsets,
                    }
                });
            }
        }
        DraftConfig::Scylla(c) => {
            let (found, instead) = recurrence(!c.recur_before_norm);
            add("recurrence", found, instead.into(), &|r| {
                if let DraftConfig::Scylla(c) = &mut r.config {
                    c.recur_before_norm = !c.recur_before_norm;
                }
            });
        }
        DraftConfig::Eagle(_) => {}
    }
    if let Some(layer) = from.config.backbone().layers.first() {
        let mut usual = layer.clone();
        usual.rope = scylla_core::model::Rope::plain(USUAL_BASE);
        let mut known = vec![layer.rope.clone()];
        for other in [like, &usual] {
            if !known.contains(&other.rope) {
                known.push(other.rope.clone());
                let rope = other.rope.clone();
                add("rope", &rope_said(layer), rope_said(other), &|r| {
                    for layer in &mut r.config.backbone_mut().layers {
                        layer.rope = rope.clone();
                    }
                });
            }
        }
    }
    (given, all)
}

fn recurrence(normed: bool) -> (&'static str, &'static str) {
    const STATES: [&str; 2] = [
        "the state before the final norm",
        "the state behind the final norm",
    ];
    (STATES[usize::from(normed)], STATES[usize::from(!normed)])
}
