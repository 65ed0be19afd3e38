//! Why a draft accepts so little: what its files say against what its target has, and tau with each usual mistake undone.
//!
//! Every variant is walked along the same answers of the target's own, fed with the target's states as the variant would have
//! them, so that what differs is the one thing that was changed. Beside tau, of which a few prompts say little, each place of
//! the answers is scored by how probable the draft holds what the target says next there; differences of these, place by
//! place, decide whether a change explains anything.

mod measure;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use scylla_core::engine::tau;
use scylla_core::model::WeightForm;
use scylla_core::plugin::{DraftModel, Tap};
use scylla_core::tree::Budget;
use scylla_draft::checkpoint::{
    Checkpoint, DraftConfig, Layout, Pairing, Precision, Reading, Variant, default_taps, rope_said,
    said, variants,
};
use scylla_draft::network::Ids;
use scylla_draft::recipe::{held, start};
use scylla_draft::tree::TreeSettings;
use serde::Serialize;

use crate::context::DraftContext;
use crate::drafts::kept_head;
use crate::experiment::Experiment;
use crate::session::Session;
use crate::train::{Fed, Tester, TrainExperiment, compute, serving};
use crate::{Error, Registry, Result};
use measure::{Measured, RandomTokens, States, scored};

/// What was looked at.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Finding {
    /// What is looked at.
    pub check: String,
    /// What its target, or the mistake undone, would have.
    pub expected: String,
    /// What the draft has.
    pub found: String,
    /// tau with the mistake undone; `null` where there is nothing to undo, or the draft cannot be read so.
    pub tau_if_undone: Option<f64>,
    /// What a place of the target's answers gains by it, in tokens held probable, with its standard error over answers.
    pub gain: Option<(f64, f64)>,
    /// Whether the draft differs in this from what its target, or usage, would have.
    pub suspect: bool,
}

/// What little and much are on the same prompts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Scale {
    /// The same network with random parameters.
    pub untrained: f64,
    /// Tokens drawn at random.
    pub random: f64,
    /// What followed the same tokens before, without a model.
    pub ngram: f64,
}

/// What a doctor says.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// tau as given; 1 where the draft cannot be read as given.
    pub tau: f64,
    /// `ok`, or the check that explains most.
    pub verdict: String,
    /// What stands in the way of reading the draft as given.
    pub refused: Option<String>,
    /// The explaining ones first.
    pub findings: Vec<Finding>,
    /// Other drafts on the same prompts.
    pub scale: Scale,
    /// Prompts, and tokens of the target's answers to them.
    pub prompts: usize,
    /// Tokens of those answers.
    pub tokens: usize,
}

/// Name of the verdict where nothing is wrong.
pub const OK: &str = "ok";

/// A change explains what it gains where a place gains so many tokens...
const GAIN: f64 = 0.02;
/// ...so many standard errors above none...
const SURE: f64 = 3.0;
/// ...and tau by this share.
const TAU: f64 = 1.01;
/// What is unusual may be undone where a place loses no more than so many standard errors.
const HARM: f64 = 2.0;

impl Finding {
    fn said(check: &str, expected: impl Into<String>, found: impl Into<String>) -> Self {
        Self {
            check: check.into(),
            expected: expected.into(),
            found: found.into(),
            tau_if_undone: None,
            gain: None,
            suspect: false,
        }
    }

    /// How well it explains a draft that accepts little, of which `tau` is measured as given: 2 surely, 1 where the files have
    /// something else than their target and undoing it does no harm, 0 not.
    fn explains(&self, tau: f64) -> u8 {
        let (Some((gain, error)), Some(undone)) = (self.gain, self.tau_if_undone) else {
            return 0;
        };
        if gain > GAIN && gain > SURE * error && undone >= tau * TAU {
            return 2;
        }
        u8::from(self.suspect && gain > -HARM * error)
    }

    fn gained(&self) -> f64 {
        self.gain.map_or(f64::NEG_INFINITY, |(gain, _)| gain)
    }
}

/// Looks at a draft.
///
/// # Errors
/// If it is of no layout that has such mistakes, its files are not what they should be, or the user breaks off.
pub fn doctor(
    registry: &Registry,
    experiment: &Experiment,
    session: &mut Session,
    stop: &AtomicBool,
    told: &mut dyn FnMut(&str),
) -> Result<Report> {
    let (name, dir) = (&experiment.draft.name, &experiment.draft.dir);
    let layouts = Layout::of_name(name, "draft to look at")?;
    let Some(dir) = dir else {
        return Err(Error::Experiment(format!(
            "which one: --draft {name}:DIR (draft.dir)"
        )));
    };
    if let Some(key) = experiment.draft.settings.keys().next() {
        return Err(Error::Experiment(format!(
            "draft.{key} is not looked at: a doctor takes the draft as its files have it, in a dynamic tree"
        )));
    }
    let dir = scylla_core::assets::resolve(&dir.to_string_lossy(), &mut |_| {})?;
    let shape = session.target.model.shape();
    let mut from = Checkpoint::open(&dir, layouts, &shape, WeightForm::AsIs)?;
    let taps = from.taps(None, &shape)?;
    let Some(like) = session.target.config.layers.first().cloned() else {
        return Err(Error::Experiment("a target of no layers".into()));
    };
    let (given, all) = variants(&from, &taps, &like, shape.layers);
    told("the target answers");
    let mut tester = Tester::new(session, &TrainExperiment::checking(experiment), stop)?;
    if !experiment.sampling.is_greedy() {
        tester.sampled(
            session,
            experiment.sampling.clone(),
            experiment.run.seed,
            stop,
        )?;
    }
    let readings = all.iter().map(|v| &v.reading).chain([&given]);
    let wanted = readings.flat_map(|reading| reading.taps.clone());
    let states = States::of(session, &tester, wanted)?;
    let tree = TreeSettings::default();
    let usual = [
        ("taps", &usual_taps(&from, shape.layers)),
        ("rope", &rope_said(&like)),
    ];
    let mut measure = |reading: &Reading,
                       session: &mut Session|
     -> Result<std::result::Result<Measured, String>> {
        from.config.clone_from(&reading.config);
        from.map = reading.map;
        match serving_with(&from, reading, session, &tree) {
            Ok(mut draft) => scored(&tester, session, &mut draft, &states, reading, stop).map(Ok),
            Err(Error::Core(e)) => Ok(Err(e.to_string())),
            Err(e) => Err(e),
        }
    };
    told("as given");
    let (refused, base) = match measure(&given, session)? {
        Ok(measured) => (None, measured),
        Err(reason) => (Some(reason), Measured::none(&tester)),
    };
    let mut findings = Vec::new();
    for Variant {
        check,
        found,
        instead,
        reading,
    } in &all
    {
        told(&format!("{check}: {instead}"));
        let mut finding = Finding::said(check, instead, found);
        finding.suspect = usual.contains(&(*check, instead));
        // A map that cannot be read so, for one, leaves it at that.
        if let Ok(measured) = measure(reading, session)? {
            finding.tau_if_undone = Some(measured.tau);
            finding.gain = Some(measured.over(&base));
        }
        findings.push(finding);
    }
    findings.sort_by(|a, b| {
        let order = b.explains(base.tau).cmp(&a.explains(base.tau));
        order.then(b.gained().total_cmp(&a.gained()))
    });
    let verdict = match findings.first().filter(|f| f.explains(base.tau) > 0) {
        Some(f) => f.check.clone(),
        None if refused.is_some() => "unreadable".into(),
        None => OK.into(),
    };
    from.config.clone_from(&given.config);
    from.map = given.map;
    findings.extend(compared(&from, &taps, session, &tester)?);
    told("other drafts");
    Ok(Report {
        tau: base.tau,
        verdict,
        refused,
        findings,
        scale: scale(registry, experiment, session, &from, &tester, stop)?,
        prompts: tester.answers.len(),
        tokens: tester.answers.iter().map(|a| a.text.len() - a.prompt).sum(),
    })
}

/// The network of a reading, grown into trees.
fn serving_with(
    from: &Checkpoint,
    reading: &Reading,
    session: &Session,
    tree: &TreeSettings,
) -> Result<Box<dyn DraftModel>> {
    // What a feature is made of is the walk's business; the network only has to take as many.
    let layers: Option<Vec<usize>> = match &from.config {
        DraftConfig::Eagle3(_) => {
            let layer = |tap: &Tap| match tap {
                Tap::Input(layer) => Some(*layer),
                Tap::Final => None,
            };
            reading.taps.iter().map(layer).collect()
        }
        _ => None,
    };
    let fed = Fed {
        taps: layers.as_deref(),
        head: head_of(from)?,
        delayed: reading.pairing == Pairing::Same,
    };
    serving(from, &fed, session, tree)
}

/// The taps that a network of this kind usually has.
fn usual_taps(from: &Checkpoint, layers: usize) -> String {
    match (&from.config, default_taps(layers)) {
        (DraftConfig::Eagle3(_), Ok(layers)) => said(&layers.map(Tap::Input)),
        (DraftConfig::Eagle3(_), Err(_)) => format!("by configuration, of {layers} layers"),
        _ => said(&[Tap::Final]),
    }
}

/// What the draft's files say against what its target has.
fn compared(
    from: &Checkpoint,
    taps: &[Tap],
    session: &Session,
    tester: &Tester,
) -> Result<Vec<Finding>> {
    let (backbone, target) = (from.config.backbone(), &session.target.config);
    let mut all = Vec::new();
    let expected = usual_taps(from, target.layers.len());
    all.push(Finding::said("files: taps", expected, said(taps)));
    let known = default_taps(target.layers.len()).is_ok();
    if let (Some(own), Some(like)) = (backbone.layers.first(), target.layers.first()) {
        all.push(Finding::said(
            "files: rope",
            rope_said(like),
            rope_said(own),
        ));
    }
    let eps = |eps: f32| format!("epsilon {eps}");
    all.push(Finding::said(
        "files: norms",
        eps(target.norm_eps),
        eps(backbone.eps),
    ));
    let known_tokens = session.known_tokens();
    let found = match from.draft_ids(known_tokens) {
        Err(e) => e.to_string(),
        Ok(ids) => {
            let said: Vec<u32> = tester
                .answers
                .iter()
                .flat_map(|a| &a.text[a.prompt..])
                .copied()
                .collect();
            let held = said.iter().filter(|&&t| ids.draft(t).is_some()).count();
            format!(
                "{} of {} tokens, {:.1} % of what the target says here",
                ids.limit,
                target.vocab,
                100.0 * held as f64 / said.len().max(1) as f64
            )
        }
    };
    let expected = "different tokens, most of what the target says".to_string();
    all.push(Finding::said("files: vocabulary", expected, found));
    let text = std::fs::read_to_string(from.dir.join("config.json")).unwrap_or_default();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
    let found = json
        .get("target_sha256")
        .and_then(|v| v.as_str())
        .unwrap_or("not said");
    all.push(Finding::said(
        "files: target",
        session.target_hash()?,
        found,
    ));
    for finding in &mut all {
        finding.suspect = match finding.check.as_str() {
            "files: vocabulary" => from.draft_ids(known_tokens).is_err(),
            "files: target" => finding.found != finding.expected && finding.found != "not said",
            "files: taps" => known && finding.found != finding.expected,
            _ => finding.found != finding.expected,
        };
    }
    Ok(all)
}

/// What other drafts are worth on the same prompts.
fn scale(
    registry: &Registry,
    experiment: &Experiment,
    session: &mut Session,
    from: &Checkpoint,
    tester: &Tester,
    stop: &AtomicBool,
) -> Result<Scale> {
    let of = |draft: &mut Box<dyn DraftModel>, session: &mut Session| -> Result<f64> {
        let cycles = tester.simulated(session, draft, stop)?.concat();
        Ok(tau(&cycles).unwrap_or(1.0))
    };
    let tree = TreeSettings::default();
    let fed = Fed {
        head: head_of(from)?,
        ..Fed::default()
    };
    let mut untrained = serving(&untrained(from, session)?, &fed, session, &tree)?;
    let mut random: Box<dyn DraftModel> = Box::new(RandomTokens {
        known: session.known_tokens() as u32,
        seed: experiment.run.seed,
    });
    let context = DraftContext {
        drawn: false,
        target: session.target.model.shape(),
        dir: None,
        session,
    };
    let ngram = registry.make_draft("ngram", &context, toml::Table::new())?;
    Ok(Scale {
        untrained: of(&mut untrained, session)?,
        random: of(&mut random, session)?,
        ngram: match ngram {
            Some(mut ngram) => of(&mut ngram, session)?,
            None => 1.0,
        },
    })
}

/// The tokens of a truncated head, where the draft's folder has them.
fn head_of(from: &Checkpoint) -> Result<Option<Arc<[u32]>>> {
    match from.config {
        DraftConfig::Eagle3(_) => Ok(None),
        _ => Ok(kept_head(&from.dir)?.map(Into::into)),
    }
}

/// The same network with random parameters.
fn untrained(from: &Checkpoint, session: &Session) -> Result<Checkpoint> {
    let shape = session.target.model.shape();
    let mut config = from.config.clone();
    let ids = match &mut config {
        DraftConfig::Eagle3(c) => {
            // As a run's own file has them; these are the layout that training writes.
            c.speculators = false;
            let lowest = || Ids::mapped((0..c.draft_vocab as u32).collect(), shape.vocab);
            Some(
                from.draft_ids(session.known_tokens())
                    .or_else(|_| lowest())?,
            )
        }
        _ => None,
    };
    let head = || {
        let targets = ids.as_ref().map(Ids::targets).unwrap_or_default();
        Ok(session.head_rows(&targets)?.all()?.into_owned())
    };
    let named = start(&config, 0, &compute(session, None)?, head)?;
    let tensors = held(&named, &config, ids.as_ref(), Precision::Bf16)?;
    Ok(Checkpoint::in_memory(
        config,
        tensors,
        &shape,
        WeightForm::AsIs,
    )?)
}

/// Limits of trees where nothing else is said.
pub const BUDGET: Budget = Budget {
    total: 20,
    width: 5,
    depth: 4,
};
