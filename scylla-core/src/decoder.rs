//! The front door: a target, a draft and rules, composed into a decoder that answers conversations.

use std::ops::ControlFlow;
use std::sync::Arc;

use crate::engine::{Draft, Engine, Event, Finish, Options, Output, Parts, Request, decode};
use crate::model::{LoadOptions, Loaded, ModelFiles, load};
use crate::plugin::{BudgetPolicy, Rules};
use crate::policy::FixedBudget;
use crate::text::{Message, Tokenizer, eos_of_model, no_tokenizer};
use crate::{Error, Result, assets};

/// A loaded target with what belongs to its text.
pub struct Target {
    /// The model; drafts that share its embedding and head are made from it.
    pub loaded: Loaded,
    /// Its tokenizer, where it has one.
    pub tokenizer: Option<Tokenizer>,
    /// Ids that end a sequence.
    pub eos: Vec<u32>,
    /// What the user should know of its files.
    pub notes: Vec<String>,
    /// What is said where a tokenizer is needed and there is none.
    pub no_tokenizer: String,
}

impl Target {
    /// Loads a model: `default`, a path, or a hub id, fetched if needed.
    ///
    /// # Errors
    /// If there is none, it cannot be fetched, or its files are not followed.
    pub fn open(model: &str, options: &LoadOptions) -> Result<Self> {
        let path = assets::resolve(model, &mut |_| {})?;
        Self::of_files(&ModelFiles::open(&path)?, options)
    }

    /// Loads a model whose files are open.
    ///
    /// # Errors
    /// If its weights or its tokenizer are not followed.
    pub fn of_files(files: &ModelFiles, options: &LoadOptions) -> Result<Self> {
        // The weights first: what the tokenizer needs for a moment only then lies above them, and is given back.
        let loaded = load(files, options)?;
        let tokenizer = Tokenizer::of_model(files)?;
        Ok(Self {
            loaded,
            eos: match &tokenizer {
                Some(tokenizer) => tokenizer.eos().to_vec(),
                None => eos_of_model(files)?,
            },
            tokenizer,
            notes: files.notes.clone(),
            no_tokenizer: no_tokenizer(files),
        })
    }
}

/// A target, a draft and rules that answer conversations, one after the other or many at once.
///
/// It looks after what is easily forgotten: the chat template, all ids that end an answer, vocabulary that is padding, a
/// rule that is exact for the draft's trees at this temperature, and rows that two conversations begin with.
///
/// ```no_run
/// use scylla_core::engine::Draft;
/// use scylla_core::model::LoadOptions;
/// use scylla_core::text::Message;
/// use scylla_core::{Decoder, Target};
/// # use scylla_core::{plugin::{Rules, Verifier, DraftModel}, sampling::Sampling, tree::Drawing};
/// # fn ngram() -> impl DraftModel + 'static { scylla_core::tabular::TableDraft::new(std::sync::Arc::new(|_: &[u32]| vec![1.0]), Drawing::Deterministic) }
/// # struct Auto;
/// # impl Rules for Auto { fn choose(&self, _: Drawing, _: usize, _: &Sampling) -> std::sync::Arc<dyn Verifier> { unimplemented!() } }
///
/// let target = Target::open("default", &LoadOptions::default())?;
/// let draft = Draft::new("ngram", ngram()); // scylla_draft::Ngram::new(2, 4)?
/// let mut decoder = Decoder::new(target, Some(draft), Auto)?; // scylla_verify::Auto
/// let asked = decoder.request(&[Message::user("Why is the sky blue?")])?;
/// let answer = decoder.answer(asked, |text| print!("{text}"))?;
/// println!("\n{} tokens, tau {:.2}", answer.ids.len(), answer.tau().unwrap_or(1.0));
/// # Ok::<(), scylla_core::Error>(())
/// ```
pub struct Decoder {
    engine: Engine<'static>,
    tokenizer: Option<Arc<Tokenizer>>,
    eos: Vec<u32>,
    no_tokenizer: String,
    sequences: u64,
}

/// Sequences side by side, and sequences whose rows are kept, of a decoder that is told nothing else.
const SIDE_BY_SIDE: usize = 8;
const KEPT: usize = 4;

impl Decoder {
    /// A decoder that drafts as much as requests allow; up to eight requests run side by side.
    ///
    /// # Errors
    /// None that options of these sizes give.
    pub fn new(
        target: Target,
        draft: Option<Draft<'static>>,
        rules: impl Rules + 'static,
    ) -> Result<Self> {
        let options = Options {
            batch: SIDE_BY_SIDE,
            kept: KEPT,
            ..Options::default()
        };
        Self::with(target, draft, rules, FixedBudget, options)
    }

    /// A decoder with a budget policy and options of its own.
    ///
    /// # Errors
    /// If an option is out of range.
    pub fn with(
        target: Target,
        draft: Option<Draft<'static>>,
        rules: impl Rules + 'static,
        policy: impl BudgetPolicy + 'static,
        options: Options,
    ) -> Result<Self> {
        let tokenizer = target.tokenizer.map(Arc::new);
        let parts = Parts {
            target: target.loaded.model,
            draft,
            rules: Arc::new(rules),
            policy: Box::new(policy),
            tokenizer: tokenizer.clone(),
        };
        Ok(Self {
            engine: Engine::new(parts, options)?,
            tokenizer,
            eos: target.eos,
            no_tokenizer: target.no_tokenizer,
            sequences: 0,
        })
    }

    /// A request for the next answer of a conversation, through the model's chat template, greedy; change in it what
    /// should be otherwise. Each has a random stream of its own.
    ///
    /// # Errors
    /// If the model has no tokenizer or no chat template, or the template refuses the conversation.
    pub fn request(&mut self, messages: &[Message]) -> Result<Request> {
        let Some(tokenizer) = &self.tokenizer else {
            return Err(Error::Unsupported(format!(
                "a conversation without a tokenizer; give token ids. {}",
                self.no_tokenizer
            )));
        };
        let Some(template) = tokenizer.template() else {
            let reason = tokenizer.broken_template();
            return Err(Error::Unsupported(format!(
                "a conversation without a chat template: {}; Decoder::continuing takes a text as it is",
                reason.unwrap_or("the model has none that is its default")
            )));
        };
        let prompt = tokenizer.encode_plain(&template.render(messages)?)?;
        Ok(self.request_of(prompt))
    }

    /// A request that goes on with a text as it is.
    ///
    /// # Errors
    /// If the model has no tokenizer.
    pub fn continuing(&mut self, text: &str) -> Result<Request> {
        let Some(tokenizer) = &self.tokenizer else {
            return Err(Error::Unsupported(format!(
                "a text without a tokenizer; give token ids. {}",
                self.no_tokenizer
            )));
        };
        let prompt = tokenizer.encode(text)?;
        Ok(self.request_of(prompt))
    }

    /// A request that goes on with these ids.
    pub fn request_of(&mut self, prompt: Vec<u32>) -> Request {
        self.sequences += 1;
        Request {
            prompt,
            sequence: self.sequences - 1,
            eos: self.eos.clone(),
            known_tokens: self.tokenizer.as_ref().map(|t| t.size()),
            ..Request::default()
        }
    }

    /// Decodes one request and tells its text as it comes. What others do meanwhile, that were submitted to the engine, is
    /// told to nobody: who has several at once steps the engine himself.
    ///
    /// # Errors
    /// If it is refused, or fails.
    pub fn answer(&mut self, request: Request, mut on_text: impl FnMut(&str)) -> Result<Output> {
        let id = self.engine.submit(request)?;
        let mut found = None;
        while found.is_none() && !self.engine.is_idle() {
            for event in self.engine.step() {
                match event {
                    Event::Tokens { request, text, .. } if request == id => on_text(&text),
                    Event::Finished { request, output } if request == id => found = Some(output),
                    _ => {}
                }
            }
        }
        match found {
            Some(Output {
                finish: Finish::Failed,
                failed,
                ..
            }) => Err(Error::Invalid(failed.unwrap_or_default())),
            Some(output) => Ok(output),
            None => Err(Error::Invalid("the request was taken back".into())),
        }
    }

    /// Decodes requests side by side and returns what became of each, in their order.
    pub fn answer_all(&mut self, requests: Vec<Request>) -> Vec<Output> {
        decode(&mut self.engine, requests, &mut |_| {
            ControlFlow::Continue(())
        })
    }

    /// The tokenizer, where the model has one.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_deref()
    }

    /// What decodes, for who submits, steps and cancels himself.
    pub fn engine(&mut self) -> &mut Engine<'static> {
        &mut self.engine
    }
}
