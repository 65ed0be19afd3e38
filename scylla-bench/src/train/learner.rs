//! One draft that is being trained: parameters, recipe and optimizer, and what it is exported as.

use std::path::Path;
use std::sync::Arc;

use scylla_core::model::{ModelConfig, ModelFiles, WeightForm, Weights};
use scylla_core::plugin::{DraftModel, Matrix, Tap};
use scylla_core::train::graph::{Compute, Head, Parameters, Tape};
use scylla_core::train::{AdamW, AdamWSettings, Named};
use scylla_draft::checkpoint::{
    Checkpoint, DraftConfig, Export, Format, Layout, Precision, Written, export,
};
use scylla_draft::network::{self, Body, DraftHost, Feature, Ids};
use scylla_draft::recipe::{
    Batch, BatchLoss, DraftShape, Eagle3Recipe, EagleRecipe, Recipe, TrainHost, begin_as_target,
    held, new_config, parameters, start,
};
use scylla_draft::tree::{TreeDraft, TreeSettings};

use scylla_core::files;

use super::experiment::TrainExperiment;
use super::feed::Taught;
use crate::context::parse;
use crate::drafts::{HEAD, kept_head};
use crate::session::Session;
use crate::{Error, Result};

/// A draft that is being trained.
pub struct Learner {
    /// The network.
    pub config: DraftConfig,
    /// The draft vocabulary, where it has one.
    pub ids: Option<Vec<u32>>,
    /// What trains.
    pub parameters: Named,
    /// The optimizer's state.
    pub optimizer: AdamW,
    recipe: Box<dyn Recipe>,
    host: TrainHost,
    taps: Vec<usize>,
}

/// The recipe of a network as an experiment sets it.
///
/// # Errors
/// If a setting of the loss is unknown or out of range.
pub fn recipe_of(
    experiment: &TrainExperiment,
    config: &DraftConfig,
    ids: Option<&[u32]>,
    session: &Session,
    on: &Compute,
) -> Result<Box<dyn Recipe>> {
    Ok(match config {
        DraftConfig::Eagle(_) | DraftConfig::Scylla(_) => {
            let recipe = EagleRecipe::new(config, &experiment.eagle_loss()?)?;
            match ids {
                None => Box::new(recipe),
                Some(ids) => {
                    let head = Head::frozen(on, on.bring(&session.head_rows(ids)?)?)?;
                    let ids = Ids::mapped(ids.to_vec(), session.target.config.vocab)?;
                    Box::new(recipe.with_head(head, ids))
                }
            }
        }
        DraftConfig::Eagle3(c) => {
            let known = session.known_tokens();
            let ids = match ids {
                Some(ids) => Ids::mapped(ids.to_vec(), c.backbone.vocab)?,
                None => Ids::same(c.draft_vocab, known),
            };
            let shape = session.target.model.shape();
            Box::new(Eagle3Recipe::new(
                config,
                None,
                ids,
                &shape,
                &experiment.eagle3_loss()?,
            )?)
        }
    })
}

impl Learner {
    /// The network that an experiment names, before anything is counted or read.
    ///
    /// # Errors
    /// If its shape does not fit the target.
    pub fn network(experiment: &TrainExperiment, target: &ModelConfig) -> Result<DraftConfig> {
        let shape: DraftShape = parse("draft", experiment.draft.shape.clone())?;
        Ok(new_config(&experiment.draft.name, &shape, target)?)
    }

    /// A draft before its first step: random, or the one that the experiment begins with. `ids` is the draft vocabulary, for a
    /// network that has one.
    ///
    /// # Errors
    /// If the draft to begin with is another network.
    pub fn begin(
        experiment: &TrainExperiment,
        session: &Session,
        host: &TrainHost,
        ids: Option<Vec<u32>>,
    ) -> Result<Self> {
        let target = &session.target.config;
        let (config, ids, named) = match &experiment.draft.start {
            Some(dir) => Self::from_draft(experiment, dir, session, host)?,
            None => {
                let config = Self::network(experiment, target)?;
                let head = || {
                    let ids = ids.clone().unwrap_or_default();
                    Ok(session.head_rows(&ids)?.all()?.into_owned())
                };
                let mut named = start(&config, experiment.run.seed, &host.on, head)?;
                let shape: DraftShape = parse("draft", experiment.draft.shape.clone())?;
                if !shape.from_layers.is_empty() {
                    let files = ModelFiles::open(&session.path)?;
                    let weights = files.weights(WeightForm::AsIs);
                    begin_as_target(&mut named, &config, &shape.from_layers, &weights, &host.on)?;
                }
                (config, ids, named)
            }
        };
        let optimizer = AdamW::new(&host.on, &named)?;
        Self::resume(experiment, session, host, config, ids, named, optimizer)
    }

    /// A draft in the middle of its training.
    ///
    /// # Errors
    /// If the experiment does not fit it.
    pub fn resume(
        experiment: &TrainExperiment,
        session: &Session,
        host: &TrainHost,
        config: DraftConfig,
        ids: Option<Vec<u32>>,
        parameters: Named,
        optimizer: AdamW,
    ) -> Result<Self> {
        // A vocabulary and taps that are not there are known by now.
        let recipe = recipe_of(experiment, &config, ids.as_deref(), session, &host.on)?;
        Ok(Self {
            taps: Vec::new(),
            recipe,
            host: host.clone(),
            config,
            ids,
            parameters,
            optimizer,
        })
    }

    fn from_draft(
        experiment: &TrainExperiment,
        dir: &Path,
        session: &Session,
        host: &TrainHost,
    ) -> Result<(DraftConfig, Option<Vec<u32>>, Named)> {
        let shape = session.target.model.shape();
        // The first of a name's layouts is what training writes.
        let layouts = Layout::of_name(&experiment.draft.name, "draft to train")?;
        let from = Checkpoint::open(dir, &layouts[..1], &shape, WeightForm::AsIs)?;
        if !experiment.draft.shape.is_empty() {
            return Err(Error::Experiment(
                "draft.start names a draft, whose shape is its own: no other settings of [draft] beside it".into(),
            ));
        }
        let ids = match &from.config {
            DraftConfig::Eagle3(c) if c.draft_vocab != c.backbone.vocab => {
                let ids = from.draft_ids(session.known_tokens())?;
                Some(ids.targets())
            }
            DraftConfig::Eagle3(_) => None,
            _ => kept_head(dir)?,
        };
        let named = parameters(&from, &host.on)?;
        Ok((from.config.clone(), ids, named))
    }

    /// States of the target that it learns from.
    pub fn taps(&self) -> Vec<Tap> {
        self.recipe.taps()
    }

    /// The first of them, which it needs even where what the target says is kept.
    pub fn needed(&self) -> Vec<Tap> {
        let mut taps = self.recipe.taps();
        taps.truncate(taps.len() - self.recipe.spared());
        taps
    }

    /// Says which of a batch's states are its own, by the taps they are of.
    ///
    /// # Errors
    /// If one is missing, which is a defect.
    pub fn fed_by(&mut self, taps: &[Tap]) -> Result<()> {
        let place = |tap: &Tap| taps.iter().position(|t| t == tap);
        let whole = self.taps().iter().map(place).collect::<Option<Vec<_>>>();
        let found = whole.or_else(|| self.needed().iter().map(place).collect());
        self.taps = found.ok_or_else(|| {
            Error::Experiment("a state of the target that is not computed".into())
        })?;
        Ok(())
    }

    /// The loss of a batch and its gradients.
    ///
    /// # Errors
    /// If no row of it counts.
    pub fn learn(&self, taught: &Taught, seed: u64) -> Result<(BatchLoss, Named)> {
        let taps: Vec<Matrix> = self
            .taps
            .iter()
            .map(|&i| taught.states[i].clone())
            .collect();
        let batch = Batch {
            rows: &taught.lines.rows,
            tokens: &taught.lines.tokens,
            mask: &taught.lines.mask,
            taps: &taps,
            logits: taught.logits.as_ref(),
            top: taught.top.as_ref(),
            seed,
            beyond: false,
        };
        let mut tape = Tape::new(&self.host.on);
        let mut named = Parameters::new(&self.parameters);
        let loss = self
            .recipe
            .loss(&mut tape, &mut named, &self.host, &batch)?;
        let mut gradients = tape.backward()?;
        Ok((loss, named.gradients(&self.host.on, &mut gradients)?))
    }

    /// One step of the optimizer; returns the norm of the gradients.
    ///
    /// # Errors
    /// If a gradient is not finite: nothing is changed then.
    pub fn step(&mut self, settings: &AdamWSettings, rate: f64, grads: &Named) -> Result<f64> {
        Ok(self
            .optimizer
            .step(&self.host.on, settings, rate, &mut self.parameters, grads)?)
    }

    /// Lets the optimizer begin anew.
    ///
    /// # Errors
    /// If memory for its state cannot be had.
    pub fn reset(&mut self) -> Result<()> {
        self.optimizer = AdamW::new(&self.host.on, &self.parameters)?;
        Ok(())
    }

    /// Tokens of its truncated head, where it has one.
    pub fn head(&self) -> Option<Arc<[u32]>> {
        match self.config {
            DraftConfig::Eagle3(_) => None,
            _ => self.ids.clone().map(Into::into),
        }
    }

    /// The draft as it is exported: rounded to bf16, in memory.
    ///
    /// # Errors
    /// If a parameter does not fit, which is a defect.
    pub fn checkpoint(&self, session: &Session) -> Result<Checkpoint> {
        let shape = session.target.model.shape();
        let ids = match &self.ids {
            Some(ids) => Some(Ids::mapped(ids.clone(), shape.vocab)?),
            None => None,
        };
        let tensors = held(
            &self.parameters,
            &self.config,
            ids.as_ref(),
            Precision::Bf16,
        )?;
        Ok(Checkpoint::in_memory(
            self.config.clone(),
            tensors,
            &shape,
            WeightForm::AsIs,
        )?)
    }

    /// Writes the draft into a directory.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn export(&self, session: &Session, dir: &Path) -> Result<Written> {
        let checkpoint = self.checkpoint(session)?;
        let target = &session.target.config;
        let format = match self.config.layout() {
            Layout::Eagle => Format::Eagle,
            Layout::Scylla => Format::Scylla,
            Layout::Eagle3 => Format::Eagle3,
            Layout::Speculators => Format::Speculators,
        };
        let path = session.path.to_string_lossy();
        let embedding = || {
            let shape = [target.vocab, target.hidden];
            let from = checkpoint.find("embed_tokens.weight", &shape)?;
            Ok(from.weight()?.to_f32())
        };
        if let Some(head) = self.head() {
            std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
            let ids: String = head.iter().map(|id| format!("{id}\n")).collect();
            files::write(&dir.join(HEAD), ids.as_bytes())?;
        }
        Ok(export(
            &Export {
                checkpoint: &checkpoint,
                format,
                precision: Precision::AsIs,
                zero_bias: false,
                target,
                target_sha256: Some(session.target_hash()?),
                verifier: (&path, "LlamaForCausalLM"),
                embedding: &embedding,
                taps: &checkpoint.taps(None, &session.target.model.shape())?,
                speculative_tokens: 5,
            },
            dir,
        )?)
    }

    /// The draft as it serves, grown into trees.
    ///
    /// # Errors
    /// If the tree does not fit.
    pub fn draft(&self, session: &Session, tree: &TreeSettings) -> Result<Box<dyn DraftModel>> {
        let head = self.head();
        serving(
            &self.checkpoint(session)?,
            &Fed {
                head,
                ..Fed::default()
            },
            session,
            tree,
        )
    }
}

/// What a checkpoint does not say.
#[derive(Default)]
pub(crate) struct Fed<'a> {
    /// Other taps than its own for an EAGLE-3 draft.
    pub(crate) taps: Option<&'a [usize]>,
    /// Tokens of a truncated head.
    pub(crate) head: Option<Arc<[u32]>>,
    /// Whether a row gets the token before its own.
    pub(crate) delayed: bool,
}

/// A checkpoint's network, grown into trees.
///
/// # Errors
/// If the tree does not fit.
pub(crate) fn serving(
    from: &Checkpoint,
    fed: &Fed<'_>,
    session: &Session,
    tree: &TreeSettings,
) -> Result<Box<dyn DraftModel>> {
    let host = DraftHost {
        known: session.known_tokens(),
        head: fed.head.clone(),
        ..DraftHost::of(&session.target)
    };
    Ok(match from.config.layout() {
        Layout::Eagle => grown(network::eagle_of(from, &host)?, fed, tree)?,
        Layout::Scylla => grown(network::scylla_of(from, &host)?, fed, tree)?,
        _ => grown(network::eagle3_of(from, fed.taps, &host)?, fed, tree)?,
    })
}

fn grown(
    network: Feature<impl Body + 'static>,
    fed: &Fed<'_>,
    tree: &TreeSettings,
) -> Result<Box<dyn DraftModel>> {
    let network = match fed.delayed {
        true => network.delayed(),
        false => network,
    };
    Ok(Box::new(TreeDraft::new(network, tree)?))
}
