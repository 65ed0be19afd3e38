//! A loaded target with its tokenizer, and the decoders made for it.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

use scylla_core::assets::{self, OnProgress};
use scylla_core::decode::{Event, Job, Output, Parts, Settings, decode};
use scylla_core::kernels::Pool;
use scylla_core::model::{Ends, LoadOptions, Loaded, ModelFiles, load, parse_device};
use scylla_core::plugin::{DraftModel, Fixed, Verifier};
use scylla_core::text::{Message, Tokenizer, eos_of_model};

use crate::environment::{Environment, commit, cpu};
use crate::experiment::Experiment;
use crate::registry::{DraftContext, Registry};
use crate::{Error, Result};

/// A target ready to decode.
pub struct Session {
    /// The target.
    pub target: Loaded,
    /// Its tokenizer, where it has one.
    pub tokenizer: Option<Tokenizer>,
    /// Ids that end a sequence.
    pub eos: Vec<u32>,
    /// Where it runs.
    pub environment: Environment,
    /// Its directory or file.
    pub path: PathBuf,
    /// How it is held and run.
    pub options: LoadOptions,
}

/// A draft and a rule, made for a session's target.
pub struct Decoder {
    /// Name of the draft.
    pub name: String,
    draft: Option<Box<dyn DraftModel>>,
    /// The rule.
    pub verifier: Box<dyn Verifier>,
    policy: Fixed,
}

impl Session {
    /// Loads the target of an experiment.
    pub fn open(experiment: &Experiment, on_progress: OnProgress<'_>) -> Result<Self> {
        let path = assets::resolve(&experiment.target.model, on_progress)?;
        let files = ModelFiles::open(&path)?;
        let options = LoadOptions {
            weights: experiment.target.weights,
            threads: experiment.run.threads,
            context: experiment.target.context,
            device: parse_device(&experiment.run.device)?,
        };
        // The weights first: what the tokenizer needs for a moment only then lies above them, and is given back.
        let target = load(&files, &options)?;
        let tokenizer = Tokenizer::of_model(&files)?;
        let eos = match &tokenizer {
            Some(tokenizer) => tokenizer.eos().to_vec(),
            None => eos_of_model(&files)?,
        };
        Ok(Self {
            environment: Environment {
                commit: commit(),
                cpu: cpu(),
                simd: format!("{:?}", scylla_core::kernels::Level::detect()).to_lowercase(),
                threads: options.thread_count(),
                device: experiment.run.device.clone(),
                dtypes: target.forms.iter().map(|f| (*f).into()).collect(),
                target_hash: assets::hash_model(&path)?,
            },
            target,
            tokenizer,
            eos,
            path,
            options,
        })
    }

    /// The tokenizer, or an error that says what else to do.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        self.tokenizer.as_ref().ok_or_else(|| {
            Error::Experiment("this model has no tokenizer; give token ids (--prompt-ids)".into())
        })
    }

    /// Token ids of a conversation, through the chat template; `raw` takes the last text as it is.
    pub fn prompt(&self, messages: &[Message], raw: bool) -> Result<Vec<u32>> {
        let tokenizer = self.tokenizer()?;
        let text = match tokenizer.template() {
            _ if raw => messages
                .last()
                .map(|m| m.content.clone())
                .unwrap_or_default(),
            Some(template) => template.render(messages)?,
            None => {
                return Err(Error::Experiment(
                    "this model has no chat template; use --raw (prompts.raw = true)".into(),
                ));
            }
        };
        Ok(tokenizer.encode(&text)?)
    }

    /// Tokens the tokenizer knows; without one, the target's vocabulary.
    pub fn known_tokens(&self) -> usize {
        let vocab = self.target.config.vocab;
        self.tokenizer.as_ref().map_or(vocab, Tokenizer::size)
    }

    /// What drafts on the CPU share with the target: embedding, head and threads.
    pub fn shared(&self) -> Result<(Ends, Arc<Pool>)> {
        match self.target.shared() {
            Some((ends, pool)) => Ok((ends.clone(), Arc::clone(pool))),
            None => {
                let files = ModelFiles::open(&self.path)?;
                let pool = Pool::new(self.options.thread_count());
                Ok((Ends::open(&files, &self.options)?, Arc::new(pool)))
            }
        }
    }

    /// Makes the draft and the rule of an experiment.
    pub fn decoder(&self, registry: &Registry, experiment: &Experiment) -> Result<Decoder> {
        let spec = &experiment.draft;
        let context = DraftContext {
            target: self.target.model.shape(),
            target_hash: self.environment.target_hash.clone(),
            dir: spec.dir.clone(),
            session: self,
        };
        let rule = &experiment.verifier;
        Ok(Decoder {
            name: spec.name.clone(),
            draft: registry.make_draft(&spec.name, &context, spec.settings.clone())?,
            verifier: registry.make_rule(
                &rule.name,
                &experiment.sampling,
                experiment.budget.width,
                rule.settings.clone(),
            )?,
            policy: Fixed(experiment.budget.into()),
        })
    }

    /// The loop's settings of an experiment.
    pub fn settings(&self, experiment: &Experiment) -> Settings {
        Settings {
            sampling: experiment.sampling.clone(),
            seed: experiment.run.seed,
            max_new_tokens: experiment.run.max_new_tokens,
            eos: if experiment.run.ignore_eos {
                Vec::new()
            } else {
                self.eos.clone()
            },
            stops: experiment.run.stop.clone(),
            batch: experiment.run.batch,
            lossy: experiment.verifier.lossy,
            known_tokens: self.tokenizer.as_ref().map(Tokenizer::size),
            ..Settings::default()
        }
    }

    /// Decodes jobs.
    pub fn decode(
        &mut self,
        decoder: &mut Decoder,
        jobs: &[Job],
        settings: &Settings,
        on_event: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
    ) -> Result<Vec<Output>> {
        let mut parts = Parts {
            target: self.target.model.as_mut(),
            draft: match &mut decoder.draft {
                Some(draft) => Some((&decoder.name, draft.as_mut())),
                None => None,
            },
            verifier: decoder.verifier.as_ref(),
            policy: &mut decoder.policy,
        };
        Ok(decode(
            &mut parts,
            jobs,
            settings,
            self.tokenizer.as_ref(),
            on_event,
        )?)
    }
}
