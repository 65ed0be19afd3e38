//! A loaded target with its tokenizer, and the decoders made for it.

use std::cell::OnceCell;
use std::path::PathBuf;
use std::sync::Arc;

use jiff::ZonedDateTime;
use jiff::civil::DateTime;
use scylla_core::Target;
use scylla_core::assets::{self, OnProgress};
use scylla_core::engine::{Draft, Engine, Measured, Options, Parts, Request};
use scylla_core::model::{LoadOptions, Loaded, ModelFiles, parse_device};
use scylla_core::plugin::{BudgetPolicy, DraftModel, Matrix, Verifier};
use scylla_core::policy::StepTimes;
use scylla_core::text::{Message, Tokenizer};
use scylla_core::tree::Drawing;

use crate::context::DraftContext;
use crate::costs;
use crate::environment::Environment;
use crate::experiment::Experiment;
use crate::prompts::PromptSpec;
use crate::registry::Registry;
use crate::{Error, Result};

/// A target ready to decode.
pub struct Session {
    /// The target.
    pub target: Loaded,
    /// Its tokenizer, where it has one.
    pub tokenizer: Option<Arc<Tokenizer>>,
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
    /// How conversations become ids.
    pub wording: Wording,
    device: String,
    /// The files that its hash is of.
    hashed: Vec<PathBuf>,
    hash: OnceCell<String>,
}

/// How conversations become ids: apart from the model, which is busy while they do.
pub struct Wording {
    tokenizer: Option<Arc<Tokenizer>>,
    /// What is said where a tokenizer is needed and there is none.
    no_tokenizer: String,
    /// Positions a slot holds, the most that the model was made for, and whether the former was asked for.
    positions: usize,
    most: usize,
    asked: bool,
}

/// A draft, a rule and a budget policy, made for a session's target.
pub struct Composed {
    /// Name of the draft.
    pub name: String,
    /// What proposes; `None` decodes plainly.
    pub draft: Option<Box<dyn DraftModel>>,
    /// The rule.
    pub rule: Arc<dyn Verifier>,
    /// How much is drafted.
    pub policy: Box<dyn BudgetPolicy>,
    /// What its engines have measured until now.
    pub measured: Measured,
    /// Costs of this machine that its budgets go by, where they were measured beforehand.
    pub times: Option<StepTimes>,
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
        let Target {
            loaded: target,
            mut tokenizer,
            eos,
            mut notes,
            no_tokenizer,
        } = Target::of_files(&files, &options)?;
        let prompts = &experiment.prompts;
        let named = Some(prompts.template.as_str()).filter(|name| !name.is_empty());
        let date = prompts
            .date()?
            .unwrap_or_else(|| ZonedDateTime::now().datetime());
        if let Some(tokenizer) = &mut tokenizer {
            tokenizer.choose_template(named, Some(date))?;
            if !prompts.raw && tokenizer.template_lacks_bos() {
                notes.push(
                    "the chat template puts no BOS in front, so conversations begin without one, as with transformers; \
                     raw prompts get it"
                        .into(),
                );
            }
        }
        let tokenizer = tokenizer.map(Arc::new);
        Ok(Self {
            wording: Wording {
                tokenizer: tokenizer.clone(),
                no_tokenizer,
                positions: target.model.shape().context,
                most: target.config.context,
                asked: options.context > 0,
            },
            target,
            tokenizer,
            eos,
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
        Ok(Environment::here(
            self.options.thread_count(),
            &self.device,
            self.target.forms.iter().map(|f| (*f).into()).collect(),
            self.target_hash()?,
        ))
    }

    /// The tokenizer, or an error that says what else to do.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        self.wording.tokenizer()
    }

    /// As [`Wording::prompt`].
    pub fn prompt(&self, messages: &[Message], how: &PromptSpec) -> Result<Vec<u32>> {
        self.wording.prompt(messages, how)
    }

    /// Tokens the tokenizer knows; without one, the target's vocabulary.
    pub fn known_tokens(&self) -> usize {
        let vocab = self.target.config.vocab;
        self.tokenizer.as_ref().map_or(vocab, |t| t.size())
    }

    /// Rows of the target's head `[ids, H]`.
    pub(crate) fn head_rows(&self, ids: &[u32]) -> scylla_core::Result<Matrix> {
        let mut rows = Matrix::default();
        self.target.tokens.head.rows(ids, &mut rows)?;
        Ok(rows)
    }

    /// Makes the draft, the rule and the policy of an experiment.
    pub fn compose(&self, registry: &Registry, experiment: &Experiment) -> Result<Composed> {
        let (spec, sampling) = (&experiment.draft, &experiment.sampling);
        let width = experiment.budget.limits().width;
        let rule = &experiment.verifier;
        let rule = registry.make_rule(&rule.name, sampling, width, rule.settings.clone())?;
        let context = DraftContext {
            target: self.target.model.shape(),
            dir: spec.dir.clone(),
            drawn: rule.exact_for(Drawing::WithoutReplacement, width, sampling),
            session: self,
        };
        Ok(Composed {
            name: spec.name.clone(),
            draft: registry.make_draft(&spec.name, &context, spec.settings.clone())?,
            rule,
            policy: experiment.budget.policy()?,
            measured: Measured::default(),
            times: None,
        })
    }

    /// Lets a decoder whose budget nobody gave go by what steps cost on this machine, which takes some seconds where it is not
    /// known yet; others stay what they are.
    ///
    /// # Errors
    /// If the target or the draft cannot run.
    pub fn settle(
        &mut self,
        registry: &Registry,
        experiment: &Experiment,
        composed: &mut Composed,
    ) -> Result<()> {
        costs::settle(registry, self, experiment, composed)
    }

    /// A request as an experiment has it, of a prompt whose random stream is that of `sequence`.
    pub fn request(
        &self,
        experiment: &Experiment,
        composed: &Composed,
        prompt: Vec<u32>,
        sequence: u64,
    ) -> Request {
        request(
            experiment,
            &self.eos,
            self.tokenizer.as_deref(),
            composed,
            prompt,
            sequence,
        )
    }

    /// An engine of the session's target and a decoder made for it.
    ///
    /// # Errors
    /// If an option is out of range.
    pub fn engine<'a>(
        &'a mut self,
        composed: &'a mut Composed,
        options: Options,
    ) -> Result<Engine<'a>> {
        engine(&mut self.target, self.tokenizer.as_ref(), composed, options)
    }
}

/// A request as an experiment has it.
pub(crate) fn request(
    experiment: &Experiment,
    eos: &[u32],
    tokenizer: Option<&Tokenizer>,
    composed: &Composed,
    prompt: Vec<u32>,
    sequence: u64,
) -> Request {
    Request {
        prompt,
        sequence,
        sampling: experiment.sampling.clone(),
        seed: experiment.run.seed,
        max_new_tokens: experiment.run.max_new_tokens,
        eos: match experiment.run.ignore_eos {
            true => Vec::new(),
            false => eos.to_vec(),
        },
        stops: experiment.run.stop.clone(),
        budget: experiment.budget.limits(),
        rule: Some(Arc::clone(&composed.rule)),
        lossy: experiment.verifier.lossy,
        known_tokens: tokenizer.map(Tokenizer::size),
        trees: false,
    }
}

/// An engine of borrowed parts.
pub(crate) fn engine<'a>(
    target: &'a mut Loaded,
    tokenizer: Option<&Arc<Tokenizer>>,
    composed: &'a mut Composed,
    options: Options,
) -> Result<Engine<'a>> {
    let parts = Parts {
        target: Box::new(&mut target.model),
        draft: composed
            .draft
            .as_mut()
            .map(|model| Draft::new(composed.name.clone(), model)),
        rules: Arc::new(Arc::clone(&composed.rule)),
        policy: Box::new(&mut composed.policy),
        tokenizer: tokenizer.cloned(),
    };
    Ok(Engine::new(parts, options)?)
}

impl Wording {
    /// The tokenizer, or an error that says what else to do.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        self.tokenizer.as_deref().ok_or_else(|| {
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
        let (positions, most) = (self.positions, self.most);
        if prompt.len() < positions {
            return Ok(());
        }
        let usual = match self.asked {
            false if positions < most => ", which is taken unless another is asked for",
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
}
