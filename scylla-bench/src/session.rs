//! A loaded target with its tokenizer, and the decoders made for it.

use std::cell::OnceCell;
use std::ops::ControlFlow;
use std::path::PathBuf;

use jiff::ZonedDateTime;
use jiff::civil::DateTime;
use scylla_core::assets::{self, OnProgress};
use scylla_core::decode::{Event, Job, Output, Parts, Settings, decode};
use scylla_core::model::{LoadOptions, Loaded, ModelFiles, load, parse_device};
use scylla_core::plugin::{DraftModel, FixedBudget, Verifier};
use scylla_core::text::{Message, Tokenizer, eos_of_model, no_tokenizer};

use crate::context::DraftContext;
use crate::environment::{Environment, commit, cpu};
use crate::experiment::Experiment;
use crate::prompts::PromptSpec;
use crate::registry::Registry;
use crate::{Error, Result};

/// A target ready to decode.
pub struct Session {
    /// The target.
    pub target: Loaded,
    /// Its tokenizer, where it has one.
    pub tokenizer: Option<Tokenizer>,
    /// Ids that end a sequence.
    pub eos: Vec<u32>,
    /// Its directory or file.
    pub path: PathBuf,
    /// How it is held and run.
    pub options: LoadOptions,
    /// What the user should know of it.
    pub notes: Vec<String>,
    /// The date and time that the chat template is told, the same as long as the session lasts.
    pub date: DateTime,
    device: String,
    /// What is said where a tokenizer is needed and there is none.
    no_tokenizer: String,
    /// The files that its hash is of.
    hashed: Vec<PathBuf>,
    hash: OnceCell<String>,
}

/// A draft and a rule, made for a session's target.
pub struct Decoder {
    /// Name of the draft.
    pub name: String,
    draft: Option<Box<dyn DraftModel>>,
    /// The rule.
    pub verifier: Box<dyn Verifier>,
    policy: FixedBudget,
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
        let mut tokenizer = Tokenizer::of_model(&files)?;
        let prompts = &experiment.prompts;
        let named = Some(prompts.template.as_str()).filter(|name| !name.is_empty());
        let mut notes = files.notes.clone();
        let date = prompts
            .date()?
            .unwrap_or_else(|| ZonedDateTime::now().datetime());
        let eos = match &mut tokenizer {
            Some(tokenizer) => {
                tokenizer.choose_template(named, Some(date))?;
                if !prompts.raw && tokenizer.template_lacks_bos() {
                    notes.push(
                        "the chat template puts no BOS in front, so conversations begin without one, as with transformers; \
                         raw prompts get it"
                            .into(),
                    );
                }
                tokenizer.eos().to_vec()
            }
            None => eos_of_model(&files)?,
        };
        Ok(Self {
            target,
            tokenizer,
            eos,
            no_tokenizer: no_tokenizer(&files),
            hashed: files.files(),
            path,
            options,
            notes,
            date,
            device: experiment.run.device.clone(),
            hash: OnceCell::new(),
        })
    }

    /// Sha256 of the target, computed when first asked for.
    ///
    /// # Errors
    /// If its files cannot be read any more.
    pub fn target_hash(&self) -> Result<&str> {
        if self.hash.get().is_none() {
            let _ = self.hash.set(assets::hash_files(&self.hashed)?);
        }
        Ok(self.hash.get().map_or("", String::as_str))
    }

    /// Where it runs.
    ///
    /// # Errors
    /// If the target's files cannot be read any more.
    pub fn environment(&self) -> Result<Environment> {
        Ok(Environment {
            commit: commit(),
            cpu: cpu(),
            simd: format!("{:?}", scylla_core::kernels::InstructionSet::detect()).to_lowercase(),
            threads: self.options.thread_count(),
            device: self.device.clone(),
            dtypes: self.target.forms.iter().map(|f| (*f).into()).collect(),
            target_hash: self.target_hash()?.to_string(),
        })
    }

    /// The tokenizer, or an error that says what else to do.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        self.tokenizer.as_ref().ok_or_else(|| {
            Error::Experiment(format!(
                "this model has no tokenizer; give token ids (--prompt-ids). {}",
                self.no_tokenizer
            ))
        })
    }

    /// Token ids of a conversation, through the chat template; where the experiment says so, the last text as it is, or with
    /// special tokens in a text as text.
    ///
    /// # Errors
    /// If there is no tokenizer or template, or the template refuses the conversation.
    pub fn prompt(&self, messages: &[Message], how: &PromptSpec) -> Result<Vec<u32>> {
        let tokenizer = self.tokenizer()?;
        if how.raw {
            let text = messages.last().map_or("", |m| &m.content);
            return Ok(match how.literal {
                true => tokenizer.encode_literal(text)?,
                false => tokenizer.encode(text)?,
            });
        }
        let Some(template) = tokenizer.template() else {
            let names = tokenizer.template_names();
            if let Some(reason) = tokenizer.broken_template() {
                return Err(Error::Experiment(format!(
                    "{reason}; --raw (prompts.raw = true) does without it"
                )));
            }
            return Err(Error::Experiment(match names.is_empty() {
                true => "this model has no chat template; use --raw (prompts.raw = true)".into(),
                false => format!(
                    "this model has several chat templates and none called default; choose one of them (--set prompts.template=NAME): {}",
                    names.join(", ")
                ),
            }));
        };
        // What stands around a text that is taken as it is is the template's own business here.
        Ok(match how.literal {
            true => tokenizer.encode_conversation_literally(messages)?,
            false => tokenizer.encode_plain(&template.render(messages)?)?,
        })
    }

    /// Checks that a prompt leaves room for an answer.
    ///
    /// # Errors
    /// Says what to set if it does not.
    pub fn check_length(&self, prompt: &[u32]) -> Result<()> {
        let (positions, most) = (
            self.target.model.shape().context,
            self.target.config.context,
        );
        if prompt.len() < positions {
            return Ok(());
        }
        let usual = match self.options.context {
            0 if positions < most => ", which is taken unless another is asked for",
            _ => "",
        };
        let advice = match positions < most {
            true => {
                format!("a longer one can be asked for: --set target.context=N, at most {most}")
            }
            false => "the model was made for no longer one".into(),
        };
        Err(Error::Experiment(format!(
            "the prompt has {} tokens, which leave no room for an answer in the context of {positions}{usual}; {advice}",
            prompt.len()
        )))
    }

    /// Tokens the tokenizer knows; without one, the target's vocabulary.
    pub fn known_tokens(&self) -> usize {
        let vocab = self.target.config.vocab;
        self.tokenizer.as_ref().map_or(vocab, Tokenizer::size)
    }

    /// Makes the draft and the rule of an experiment.
    pub fn decoder(&self, registry: &Registry, experiment: &Experiment) -> Result<Decoder> {
        let spec = &experiment.draft;
        let context = DraftContext {
            target: self.target.model.shape(),
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
            policy: FixedBudget(experiment.budget.into()),
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

    /// Decodes jobs; without any, only what can be known beforehand is checked.
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
