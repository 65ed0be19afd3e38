//! A tokenizer with the bytes of each token, from `tokenizer.json` or GGUF metadata.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use serde_json::{Value, json};
use tokenizers::processors::template::TemplateProcessing;

use super::chat::{ChatTemplate, Message};
use super::templates::Templates;
use crate::files::{parse_json, read_json, read_text};
use crate::guard::guarded;
use crate::model::{Gguf, ModelFiles, Source};
use crate::{Error, Result};

/// How token strings spell bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spelling {
    /// GPT-2's table: one printable character per byte.
    ByteLevel,
    /// `▁` for a space, `<0x0A>` for a single byte.
    SentencePiece,
}

/// Bytes of each token, one after the other; none for special tokens, which have no text.
#[derive(Default)]
struct TokenBytes {
    data: Vec<u8>,
    /// Where each token's bytes end.
    ends: Vec<u32>,
}

impl TokenBytes {
    fn push(&mut self, bytes: &[u8]) {
        self.data.extend_from_slice(bytes);
        self.ends.push(self.data.len() as u32);
    }

    fn get(&self, id: u32) -> Option<&[u8]> {
        let id = id as usize;
        let end = *self.ends.get(id)? as usize;
        let start = id.checked_sub(1).map_or(0, |i| self.ends[i] as usize);
        (start < end).then(|| &self.data[start..end])
    }
}

/// A tokenizer as a model needs it.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// The same, for which special tokens in a text are text.
    literal: OnceLock<tokenizers::Tokenizer>,
    bytes: Arc<TokenBytes>,
    spelling: Spelling,
    bos: Option<u32>,
    /// What stands before and behind a text that is taken as it is.
    around: [Vec<u32>; 2],
    eos: Vec<u32>,
    templates: Templates,
    template: Option<ChatTemplate>,
    /// Whether a piece of a text is encoded otherwise where it stands first.
    first_only: bool,
    /// Why the default template cannot be used, where there is one that does not compile.
    broken: Option<String>,
}

/// The largest id that is believed; vocabularies have some 10^5.
const LARGEST_ID: u32 = 1 << 20;

impl Tokenizer {
    /// Reads the tokenizer of a model and checks that it fits; `None` where the files hold none, for which
    /// [`no_tokenizer`] says why.
    ///
    /// # Errors
    /// If there is one that cannot be followed, or that does not belong to the model.
    pub fn of_model(files: &ModelFiles) -> Result<Option<Self>> {
        let tokenizer = match &files.source {
            // llama.cpp's names for a file without one.
            Source::Gguf(gguf) => match gguf.text("tokenizer.ggml.model")? {
                None | Some("no_vocab" | "none") => None,
                Some(_) => Some(Self::from_gguf(gguf)?),
            },
            Source::Safetensors(_) if files.path.join("tokenizer.json").is_file() => {
                Some(Self::from_dir(&files.path)?)
            }
            Source::Safetensors(_) => None,
        };
        let Some(mut tokenizer) = tokenizer else {
            return Ok(None);
        };
        tokenizer.check_fits(files.config.vocab, &files.path)?;
        let of_template = tokenizer.end_of_turn();
        let mut eos = eos_of_model(files)?;
        eos.extend(tokenizer.eos.iter().copied().chain(of_template));
        tokenizer.eos = distinct(eos);
        Ok(Some(tokenizer))
    }

    /// Reads `tokenizer.json` and the configuration files beside it.
    ///
    /// # Errors
    /// If a file is broken, or says something that is not followed here.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        let text = read_text(&path)?;
        let raw = parse_json(&text, &path, "a tokenizer")?;
        check_raw(&raw, &path)?;
        let bad = |e: tokenizers::Error| Error::file(&path, format!("not a tokenizer: {e}"));
        let mut inner = guarded(&path.display().to_string(), || {
            text.parse::<tokenizers::Tokenizer>().map_err(bad)
        })?;
        // What was saved for training; a prompt is neither cut nor filled up.
        inner.with_truncation(None).map_err(bad)?;
        inner.with_padding(None);
        let spelling = spelling(&raw).ok_or_else(|| {
            Error::Unsupported(format!(
                "{}: neither a byte-level nor a SentencePiece-style tokenizer",
                path.display()
            ))
        })?;
        let config_path = dir.join("tokenizer_config.json");
        let config = json(&config_path)?;
        check_config(&config, &raw, &config_path)?;
        add_tokens(&mut inner, &config, &config_path)?;
        let more = json(&dir.join("special_tokens_map.json"))?;
        let name = |key: &str| special(&config, key).or_else(|| special(&more, key));
        let token = |key: &str| name(key).and_then(|t| inner.token_to_id(&t));
        let (bos, eos) = (token("bos_token"), token("eos_token"));
        let specials = SPECIALS
            .iter()
            .filter_map(|key| Some((key.to_string(), name(key)?)));
        let templates = Templates {
            specials: specials.collect(),
            ..Templates::of_dir(dir, &config)?
        };
        let mut tokenizer = Self::new(inner, spelling, templates)?;
        tokenizer.bos = bos;
        tokenizer.eos = eos.into_iter().collect();
        let pre = raw
            .get("pre_tokenizer")
            .map(Value::to_string)
            .unwrap_or_default();
        tokenizer.first_only = pre.contains("\"prepend_scheme\":\"first\"");
        let flags =
            ["add_bos_token", "add_eos_token"].map(|key| config.get(key).and_then(Value::as_bool));
        // Where transformers builds the post-processor of these classes anew.
        let class = config.get("tokenizer_class").and_then(Value::as_str);
        let rebuilt = class.is_some_and(|c| {
            ["Llama", "CodeLlama", "Gemma"]
                .iter()
                .any(|p| c.starts_with(p))
        });
        for (i, (flag, id)) in flags.into_iter().zip([bos, eos]).enumerate() {
            if let (true, Some(flag), Some(id)) = (rebuilt, flag, id) {
                tokenizer.around[i] = if flag { vec![id] } else { Vec::new() };
            }
        }
        Ok(tokenizer)
    }

    fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let (inner, byte_level) = guarded(&gguf.path.display().to_string(), || {
            super::gguf::build(gguf)
        })?;
        let id = |key: &str| gguf.id(&format!("tokenizer.ggml.{key}_token_id"));
        let mut specials = Vec::new();
        for (name, key) in [
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        ] {
            let token = id(key)?.and_then(|id| inner.id_to_token(id));
            specials.extend(token.map(|token| (name.to_string(), token)));
        }
        let templates = Templates {
            specials,
            ..Templates::of_gguf(gguf)?
        };
        let spelling = match byte_level {
            true => Spelling::ByteLevel,
            false => Spelling::SentencePiece,
        };
        let mut tokenizer = Self::new(inner, spelling, templates)?;
        tokenizer.bos = id("bos")?;
        // As llama.cpp takes it where the file says nothing.
        let llama3 = ["llama-bpe", "llama3", "llama-v3"]
            .map(Some)
            .contains(&gguf.text("tokenizer.ggml.pre")?);
        let add_bos = gguf
            .flag("tokenizer.ggml.add_bos_token")?
            .unwrap_or(!byte_level || llama3);
        let add_eos = gguf.flag("tokenizer.ggml.add_eos_token")?.unwrap_or(false);
        let added = |add: bool, id: Option<u32>| id.filter(|_| add).into_iter().collect();
        tokenizer.around = [added(add_bos, tokenizer.bos), added(add_eos, id("eos")?)];
        Ok(tokenizer)
    }

    /// Writes a folder that [`Tokenizer::from_dir`] reads as this tokenizer, with the one end of an answer that `eos_token` names: `tokenizer.json` and
    /// `tokenizer_config.json` with chat templates and special tokens. All ends go to `generation_config.json`, where [`Tokenizer::of_model`] finds
    /// them. For models whose files hold none of these (GGUF).
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let bad = |e: tokenizers::Error| Error::Invalid(format!("tokenizer: {e}"));
        let mut inner = self.inner.clone();
        let names = |ids: &[u32]| -> Vec<(String, u32)> {
            let name = |&id: &u32| Some((self.token(id)?, id));
            ids.iter().filter_map(name).collect()
        };
        let [before, behind] = [0, 1].map(|i| names(&self.around[i]));
        if !(before.is_empty() && behind.is_empty()) {
            let text = |all: &[(String, u32)]| all.iter().map(|(t, _)| t.clone()).collect();
            let pieces: Vec<String> =
                [text(&before), vec!["$A".to_string()], text(&behind)].concat();
            let whole = TemplateProcessing::builder()
                .try_single(pieces)
                .map_err(|e| Error::Invalid(format!("tokenizer: {e}")))?
                .special_tokens([before, behind].concat())
                .build();
            let whole = whole.map_err(|e| Error::Invalid(format!("tokenizer: {e}")))?;
            inner.with_post_processor(Some(whole));
        }
        let text = inner.to_string(true).map_err(bad)?;
        crate::files::write(&dir.join("tokenizer.json"), text.as_bytes())?;
        let mut config = json!({ "tokenizer_class": "PreTrainedTokenizerFast" });
        for (key, token) in &self.templates.specials {
            config[key] = token.as_str().into();
        }
        let mut templates: Vec<Value> = Vec::new();
        for (name, source) in &self.templates.named {
            templates.push(json!({ "name": name, "template": source }));
        }
        match &self.templates.default {
            Some(source) if templates.is_empty() => {
                config["chat_template"] = source.as_str().into()
            }
            Some(source) => templates.push(json!({ "name": "default", "template": source })),
            None => {}
        }
        if !templates.is_empty() {
            config["chat_template"] = templates.into();
        }
        let write = |name: &str, value: &Value| {
            crate::files::write(&dir.join(name), format!("{value:#}\n").as_bytes())
        };
        write("tokenizer_config.json", &config)?;
        match self.eos.is_empty() {
            true => Ok(()),
            false => write(
                "generation_config.json",
                &json!({ "eos_token_id": self.eos }),
            ),
        }
    }

    fn new(inner: tokenizers::Tokenizer, spelling: Spelling, templates: Templates) -> Result<Self> {
        let added = inner.get_added_tokens_decoder();
        let largest = inner.get_vocab(true).into_iter().max_by_key(|(_, id)| *id);
        if let Some((token, id)) = &largest
            && *id > LARGEST_ID
        {
            return Err(Error::Invalid(format!(
                "tokenizer: token {token:?} has id {id}; ids up to {LARGEST_ID} are believed"
            )));
        }
        let mut bytes = TokenBytes::default();
        for id in 0..largest.map_or(0, |(_, id)| id + 1) {
            match (added.get(&id), inner.id_to_token(id)) {
                (Some(added), _) if added.special => bytes.push(&[]),
                (Some(added), _) => bytes.push(added.content.as_bytes()),
                (None, Some(token)) => bytes.push(&token_bytes(&token, spelling)),
                (None, None) => bytes.push(&[]),
            }
        }
        // What the post-processor of the file puts around a text.
        let around = guarded("tokenizer", || {
            let bad = |e: tokenizers::Error| Error::Invalid(format!("tokenizer: {e}"));
            let bare = inner.encode("a", false).map_err(bad)?;
            let whole = inner.encode("a", true).map_err(bad)?;
            let (bare, whole) = (bare.get_ids(), whole.get_ids());
            let at = (0..=whole.len().saturating_sub(bare.len()))
                .find(|&at| whole[at..].starts_with(bare));
            match at {
                Some(at) => Ok([whole[..at].to_vec(), whole[at + bare.len()..].to_vec()]),
                None => Err(Error::Unsupported(
                    "tokenizer: a post-processor that changes more than the ends of a text".into(),
                )),
            }
        })?;
        // A template that does not compile is told where one is needed: other prompts do without.
        let (template, broken) = match templates.compile(None) {
            Ok(template) => (template, None),
            Err(e) => (None, Some(e.to_string())),
        };
        Ok(Self {
            inner,
            literal: OnceLock::new(),
            bytes: Arc::new(bytes),
            spelling,
            bos: None,
            around,
            eos: Vec::new(),
            templates,
            template,
            broken,
            first_only: false,
        })
    }

    /// The special token that the chat template puts behind an answer, where it does.
    fn end_of_turn(&self) -> Option<u32> {
        let template = self.template.as_ref()?;
        let answer = "An answer.";
        let turn = |role, content: &str| Message {
            role,
            content: content.into(),
        };
        let talk = [turn("user", "A question."), turn("assistant", answer)];
        // A template that refuses this conversation says nothing of the end of an answer.
        let text = template.render_as(&talk, false).ok()?;
        let behind = text.rsplit_once(answer)?.1.trim_start();
        // One that is not flagged special has to be all that follows.
        let added = self.inner.get_added_vocabulary().get_added_tokens_decoder();
        let ends = |token: &tokenizers::AddedToken| {
            let rest = behind.strip_prefix(token.content.as_str());
            !token.content.is_empty()
                && rest.is_some_and(|rest| token.special || rest.trim().is_empty())
        };
        let found = added.iter().filter(|(_, token)| ends(token));
        found
            .max_by_key(|(_, token)| token.content.len())
            .map(|(id, _)| *id)
    }

    /// Special tokens and their ids.
    fn specials(&self) -> impl Iterator<Item = (&str, u32)> {
        let added = self.inner.get_added_vocabulary().get_added_tokens_decoder();
        let special = added
            .iter()
            .filter(|(_, token)| token.special && !token.content.is_empty());
        special.map(|(&id, token)| (token.content.as_str(), id))
    }

    /// Checks that no id of the tokenizer lies outside the model's vocabulary.
    pub fn check_fits(&self, vocab: usize, path: &Path) -> Result<()> {
        if self.size() > vocab {
            return Err(Error::file(
                path,
                format!(
                    "the tokenizer has {} tokens, the model's vocabulary {vocab}: they do not belong together",
                    self.size()
                ),
            ));
        }
        Ok(())
    }

    /// Highest id plus one.
    pub fn size(&self) -> usize {
        self.bytes.ends.len()
    }

    /// Ids that end a sequence.
    pub fn eos(&self) -> &[u32] {
        &self.eos
    }

    /// The token of an id, as the vocabulary spells it; special ones too.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The chat template, where the model has one.
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    /// Why the model's chat template cannot be used, where it has one that does not compile.
    pub fn broken_template(&self) -> Option<&str> {
        self.broken.as_deref()
    }

    /// Takes the chat template of that name; the date is what it is told, `None` for the real one.
    ///
    /// # Errors
    /// If there is none of the name, or it does not compile.
    pub fn choose_template(
        &mut self,
        name: Option<&str>,
        date: Option<jiff::civil::DateTime>,
    ) -> Result<()> {
        if name.is_some() {
            self.template = self.templates.compile(name)?;
            let end = self.end_of_turn().filter(|end| !self.eos.contains(end));
            self.eos.extend(end);
        }
        if let Some(template) = &mut self.template {
            template.set_date(date);
        }
        Ok(())
    }

    /// The names of the model's chat templates, beside the default one.
    pub fn template_names(&self) -> Vec<&str> {
        self.templates.named.keys().map(String::as_str).collect()
    }

    /// Whether a text that is taken as it is gets something in front (BOS) that the chat template does not put in front
    /// of a conversation.
    pub fn template_lacks_bos(&self) -> bool {
        let (Some(bos), Some(template)) = (self.bos, &self.template) else {
            return false;
        };
        let question = Message {
            role: "user",
            content: "A question.".into(),
        };
        let first = template
            .render(&[question])
            .and_then(|text| self.encode_plain(&text));
        self.around[0].contains(&bos) && first.is_ok_and(|ids| ids.first() != Some(&bos))
    }

    /// Ids of a text that is taken as it is; special tokens in it are recognised, and what the model wants around a text
    /// (BOS, mostly) is added, as transformers does. A BOS that the text begins with is not doubled.
    ///
    /// # Errors
    /// If the tokenizer cannot encode it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.wrapped(self.encode_plain(text)?))
    }

    fn wrapped(&self, ids: Vec<u32>) -> Vec<u32> {
        let [before, behind] = &self.around;
        let has = !before.is_empty() && ids.starts_with(before);
        let before = if has { &[][..] } else { before };
        [before, &ids, behind].concat()
    }

    /// Ids of a text, without anything around it.
    ///
    /// # Errors
    /// If the tokenizer cannot encode it.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>> {
        encode(&self.inner, text)
    }

    /// Ids of a text that is taken as it is, in which special tokens are text.
    ///
    /// # Errors
    /// If the tokenizer cannot encode it.
    pub fn encode_literal(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.wrapped(self.encode_bare(text)?))
    }

    /// Ids of a text, without anything around it, in which special tokens are text.
    ///
    /// # Errors
    /// If the tokenizer cannot encode it.
    pub fn encode_bare(&self, text: &str) -> Result<Vec<u32>> {
        encode(self.literal(), text)
    }

    /// What a text begins with where nothing stands before it: BOS, or where there is none the first id that ends a sequence.
    pub fn beginning(&self) -> Option<u32> {
        self.bos.or_else(|| self.eos.first().copied())
    }

    /// Ids of a conversation through the chat template, in which special tokens are text where a message says them: only
    /// the template's own are recognised.
    ///
    /// # Errors
    /// If there is no template, or it refuses the conversation.
    pub fn encode_conversation_literally(&self, messages: &[Message]) -> Result<Vec<u32>> {
        let Some(template) = &self.template else {
            return Err(Error::Invalid("this model has no chat template".into()));
        };
        // Each special token in a message becomes a mark that stands for it until the template's own are found.
        let said = |c: &char| messages.iter().any(|m| m.content.contains(*c));
        let mut free = ('\u{F0000}'..='\u{FFFFD}').filter(|c| !said(c));
        let mut specials: Vec<(&str, u32)> = self.specials().collect();
        specials.sort_unstable_by_key(|(token, _)| std::cmp::Reverse(token.len()));
        let marks: Vec<(char, &str)> = specials
            .iter()
            .map(|(token, _)| *token)
            .map_while(|token| Some((free.next()?, token)))
            .collect();
        let marked = messages.iter().map(|m| {
            let mut content = String::with_capacity(m.content.len());
            let mut rest = m.content.as_str();
            while let Some(c) = rest.chars().next() {
                let found = marks.iter().find(|(_, token)| rest.starts_with(token));
                let step = match found {
                    Some((mark, token)) => {
                        content.push(*mark);
                        token.len()
                    }
                    None => {
                        content.push(c);
                        c.len_utf8()
                    }
                };
                rest = &rest[step..];
            }
            Message {
                role: m.role,
                content,
            }
        });
        let marked: Vec<Message> = marked.collect();
        if marked == messages {
            return self.encode_plain(&template.render(messages)?);
        }
        if self.first_only {
            return Err(Error::Unsupported(
                "special tokens in a text as text, with a tokenizer whose pre-tokenizer treats the first word alone (prepend_scheme `first`)".into(),
            ));
        }
        let text = template.render(&marked)?;
        let unmarked = |text: &str| {
            let mut out = String::with_capacity(text.len());
            for c in text.chars() {
                match marks.iter().find(|(mark, _)| *mark == c) {
                    Some((_, token)) => out.push_str(token),
                    None => out.push(c),
                }
            }
            out
        };
        // Split as the tokenizer itself splits at special tokens, so that what lies between is encoded the same.
        let added = self.inner.get_added_vocabulary().get_added_tokens_decoder();
        let (mut ids, mut piece, mut rest) = (Vec::new(), String::new(), text.as_str());
        while let Some(c) = rest.chars().next() {
            let own = specials.iter().find(|(token, _)| rest.starts_with(token));
            let Some((token, id)) = own else {
                piece.push(c);
                rest = &rest[c.len_utf8()..];
                continue;
            };
            rest = &rest[token.len()..];
            let flags = added.get(id);
            if flags.is_some_and(|t| t.lstrip) {
                piece.truncate(piece.trim_end().len());
            }
            if flags.is_some_and(|t| t.rstrip) {
                rest = rest.trim_start();
            }
            if !piece.is_empty() {
                ids.extend(encode(self.literal(), &unmarked(&piece))?);
                piece.clear();
            }
            ids.push(*id);
        }
        if !piece.is_empty() {
            ids.extend(encode(self.literal(), &unmarked(&piece))?);
        }
        Ok(ids)
    }

    fn literal(&self) -> &tokenizers::Tokenizer {
        self.literal.get_or_init(|| {
            let mut literal = self.inner.clone();
            literal.set_encode_special_tokens(true);
            literal
        })
    }

    /// Text of ids, without special tokens; bytes that are no character become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut stream = self.stream();
        let mut text = String::new();
        for &id in ids {
            stream.push(id, &mut text);
        }
        stream.finish(&mut text);
        // SentencePiece puts a space before the first word that was not in the text.
        match self.spelling {
            Spelling::SentencePiece => text.strip_prefix(' ').map_or(text.clone(), str::to_string),
            Spelling::ByteLevel => text,
        }
    }

    /// The bytes of a token; `None` for special and unknown ones.
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        self.bytes.get(id)
    }

    /// Text that grows token by token.
    pub fn stream(&self) -> TextStream {
        TextStream {
            bytes: Arc::clone(&self.bytes),
            partial: Vec::new(),
        }
    }
}

/// Decodes tokens as they come and emits whole characters only.
pub struct TextStream {
    bytes: Arc<TokenBytes>,
    partial: Vec<u8>,
}

impl TextStream {
    /// Appends a token's characters to `out`; an unfinished character waits for its rest.
    pub fn push(&mut self, id: u32, out: &mut String) {
        if let Some(bytes) = self.bytes.get(id) {
            self.partial.extend_from_slice(bytes);
            self.drain(out);
        }
    }

    /// Emits what is left, an unfinished character as U+FFFD.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&String::from_utf8_lossy(&self.partial));
        self.partial.clear();
    }

    fn drain(&mut self, out: &mut String) {
        loop {
            match std::str::from_utf8(&self.partial) {
                Ok(text) => {
                    out.push_str(text);
                    self.partial.clear();
                    return;
                }
                Err(e) => {
                    let (valid, rest) = self.partial.split_at(e.valid_up_to());
                    out.push_str(&String::from_utf8_lossy(valid));
                    match e.error_len() {
                        // Never part of a character.
                        Some(bad) => {
                            out.push('\u{FFFD}');
                            self.partial = rest[bad..].to_vec();
                        }
                        None => {
                            self.partial = rest.to_vec();
                            return;
                        }
                    }
                }
            }
        }
    }
}

/// GPT-2's table: the byte that a character of a token string stands for.
fn byte_of(c: char) -> Option<u8> {
    let code = c as u32;
    let plain = |b: u32| matches!(b, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    if plain(code) {
        return Some(code as u8);
    }
    // The other bytes, in order, are spelt from U+0100 on.
    let others = (0..256u32).filter(|&b| !plain(b));
    others
        .zip(256u32..)
        .find(|(_, spelt)| *spelt == code)
        .map(|(b, _)| b as u8)
}

fn token_bytes(token: &str, spelling: Spelling) -> Box<[u8]> {
    match spelling {
        Spelling::ByteLevel => {
            let bytes: Option<Vec<u8>> = token.chars().map(byte_of).collect();
            bytes.unwrap_or_else(|| token.as_bytes().to_vec()).into()
        }
        Spelling::SentencePiece => {
            let hex = token.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'));
            match hex
                .filter(|h| h.len() == 2)
                .and_then(|h| u8::from_str_radix(h, 16).ok())
            {
                Some(byte) => [byte].into(),
                None => token.replace('\u{2581}', " ").into_bytes().into(),
            }
        }
    }
}

/// Finds how a `tokenizer.json` spells bytes, by its decoder.
fn spelling(tokenizer: &Value) -> Option<Spelling> {
    let text = tokenizer.get("decoder")?.to_string();
    if text.contains("\"ByteLevel\"") {
        Some(Spelling::ByteLevel)
    } else if text.contains("\"ByteFallback\"") || text.contains("\"Metaspace\"") {
        Some(Spelling::SentencePiece)
    } else {
        None
    }
}

fn encode(tokenizer: &tokenizers::Tokenizer, text: &str) -> Result<Vec<u32>> {
    guarded("tokenizer", || {
        let encoding = tokenizer.encode(text, false);
        let encoding = encoding.map_err(|e| Error::Invalid(format!("tokenizer: {e}")))?;
        Ok(encoding.get_ids().to_vec())
    })
}

/// Refuses what would make a tokenizer other than it was.
fn check_raw(raw: &Value, path: &Path) -> Result<()> {
    let dropout = raw.pointer("/model/dropout").and_then(Value::as_f64);
    if let Some(p) = dropout.filter(|p| *p != 0.0) {
        return Err(Error::Unsupported(format!(
            "{}: model.dropout is {p}: prompts would be cut into tokens at random; set it to null",
            path.display()
        )));
    }
    match raw.get("normalizer").is_none_or(charsmaps_fit) {
        true => Ok(()),
        false => Err(Error::file(
            path,
            "a precompiled_charsmap that is not whole",
        )),
    }
}

/// Refuses settings of `tokenizer_config.json` under which transformers would make other tokens.
fn check_config(config: &Value, raw: &Value, path: &Path) -> Result<()> {
    let says = |key: &str| config.get(key).and_then(Value::as_bool);
    let refuse = |message: &str| Err(Error::Unsupported(format!("{}: {message}", path.display())));
    if says("split_special_tokens") == Some(true) {
        return refuse(
            "split_special_tokens is true; take it out, and use --literal where special tokens in a text are text",
        );
    }
    let pre = raw
        .get("pre_tokenizer")
        .filter(|p| p.get("type").is_some_and(|t| t == "ByteLevel"));
    let own = pre
        .and_then(|p| p.get("add_prefix_space"))
        .and_then(Value::as_bool);
    match (says("add_prefix_space"), own) {
        (Some(said), Some(own)) if said != own => {
            refuse("add_prefix_space is not as in tokenizer.json; make them say the same")
        }
        _ => Ok(()),
    }
}

/// Whether every map of SentencePiece's normalizers is as long as its first four bytes say: the library that reads it
/// believes them.
fn charsmaps_fit(value: &Value) -> bool {
    match value {
        Value::Array(list) => list.iter().all(charsmaps_fit),
        Value::Object(map) => map.iter().all(|(key, inner)| match (key.as_str(), inner) {
            ("precompiled_charsmap", Value::String(text)) => {
                let text = text.trim_end_matches('=');
                let six = |c: u8| match c {
                    b'A'..=b'Z' => Some(u64::from(c - b'A')),
                    b'a'..=b'z' => Some(u64::from(c - b'a') + 26),
                    b'0'..=b'9' => Some(u64::from(c - b'0') + 52),
                    b'+' => Some(62),
                    b'/' => Some(63),
                    _ => None,
                };
                // Base64: six characters begin with the four bytes of a length, lowest first.
                let bits = text
                    .bytes()
                    .take(6)
                    .try_fold(0, |bits, c| Some(bits << 6 | six(c)?));
                let length = bits.map(|bits| u64::from(((bits >> 4) as u32).swap_bytes()));
                text.len() >= 6 && length.is_some_and(|n| n + 4 <= text.len() as u64 * 3 / 4)
            }
            _ => charsmaps_fit(inner),
        }),
        _ => true,
    }
}

/// Adds the tokens that `tokenizer_config.json` says beside those of `tokenizer.json`, as transformers does.
fn add_tokens(inner: &mut tokenizers::Tokenizer, config: &Value, path: &Path) -> Result<()> {
    let Some(listed) = config
        .get("added_tokens_decoder")
        .and_then(Value::as_object)
    else {
        return Ok(());
    };
    let mut tokens = Vec::new();
    for (id, token) in listed {
        let bad = || {
            Error::file(
                path,
                format!("added_tokens_decoder: `{id}` is no token with its id"),
            )
        };
        let id: u32 = id.parse().map_err(|_| bad())?;
        let content = token
            .get("content")
            .and_then(Value::as_str)
            .ok_or_else(bad)?;
        let flag = |key: &str| token.get(key).and_then(Value::as_bool);
        let special = flag("special").unwrap_or(false);
        let added = tokenizers::AddedToken::from(content.to_string(), special)
            .single_word(flag("single_word").unwrap_or(false))
            .lstrip(flag("lstrip").unwrap_or(false))
            .rstrip(flag("rstrip").unwrap_or(false))
            .normalized(flag("normalized").unwrap_or(!special));
        tokens.push((id, added));
    }
    tokens.sort_unstable_by_key(|(id, _)| *id);
    let wanted: Vec<(u32, String)> = tokens
        .iter()
        .map(|(id, t)| (*id, t.content.clone()))
        .collect();
    let known = inner.get_added_tokens_decoder();
    let new = tokens.into_iter().filter(|(id, token)| {
        let same = |k: &tokenizers::AddedToken| {
            k.content == token.content
                && (k.special, k.lstrip, k.rstrip, k.single_word, k.normalized)
                    == (
                        token.special,
                        token.lstrip,
                        token.rstrip,
                        token.single_word,
                        token.normalized,
                    )
        };
        !known.get(id).is_some_and(same)
    });
    let new: Vec<_> = new.map(|(_, token)| token).collect();
    let added = inner.add_tokens(new);
    added.map_err(|e| Error::file(path, format!("added_tokens_decoder: {e}")))?;
    match wanted
        .iter()
        .find(|(id, token)| inner.token_to_id(token) != Some(*id))
    {
        None => Ok(()),
        Some((id, token)) => Err(Error::file(
            path,
            format!(
                "added_tokens_decoder gives {token:?} the id {id}; in tokenizer.json it has {:?}",
                inner.token_to_id(token)
            ),
        )),
    }
}

/// A JSON file that may be absent.
fn json(path: &Path) -> Result<Value> {
    match path.is_file() {
        true => read_json(path, "JSON"),
        false => Ok(Value::Null),
    }
}

/// Names of special tokens that chat templates know.
const SPECIALS: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

/// A special token of `tokenizer_config.json`: a string, or an object with its content.
fn special(config: &Value, key: &str) -> Option<String> {
    let value = config.get(key)?;
    let text = value.as_str().or_else(|| value.get("content")?.as_str());
    text.map(str::to_string)
}

/// Why a model has no tokenizer, and what to do about it.
pub fn no_tokenizer(files: &ModelFiles) -> String {
    let at = files.path.display();
    let there = |name: &str| files.path.join(name).is_file();
    let found = match &files.source {
        Source::Gguf(_) => return format!("{at}: the file holds no tokenizer"),
        _ if there("tokenizer.model") => {
            "holds tokenizer.model (SentencePiece) and no tokenizer.json"
        }
        _ if there("vocab.json") => "holds vocab.json and no tokenizer.json",
        _ if there("tekken.json") => "holds tekken.json and no tokenizer.json",
        _ => return format!("{at}: the model has no tokenizer.json"),
    };
    format!(
        "{at}: {found}; make one with Python: from transformers import AutoTokenizer; AutoTokenizer.from_pretrained('{at}').save_pretrained('{at}')"
    )
}

fn distinct(ids: Vec<u32>) -> Vec<u32> {
    let mut seen = Vec::new();
    for id in ids {
        if !seen.contains(&id) {
            seen.push(id);
        }
    }
    seen
}

/// Ids that end a sequence, by the files of a model beside its tokenizer's.
///
/// # Errors
/// If a file says something else than ids.
pub fn eos_of_model(files: &ModelFiles) -> Result<Vec<u32>> {
    let ids = match &files.source {
        Source::Gguf(gguf) => {
            let mut ids = Vec::new();
            for key in ["eos", "eot", "eom"] {
                ids.extend(gguf.id(&format!("tokenizer.ggml.{key}_token_id"))?);
            }
            ids
        }
        Source::Safetensors(_) => {
            let of = |name: &str| {
                let path = files.path.join(name);
                eos_ids(&json(&path)?, &path)
            };
            match of("generation_config.json")? {
                ids if ids.is_empty() => of("config.json")?,
                ids => ids,
            }
        }
    };
    match ids.iter().find(|&&id| id as usize >= files.config.vocab) {
        Some(id) => Err(Error::file(
            &files.path,
            format!(
                "eos_token_id {id} is outside the vocabulary of {}",
                files.config.vocab
            ),
        )),
        None => Ok(distinct(ids)),
    }
}

fn eos_ids(config: &Value, path: &Path) -> Result<Vec<u32>> {
    let id = |v: &Value| {
        let id = v.as_u64().and_then(|v| u32::try_from(v).ok());
        id.ok_or_else(|| {
            Error::file(
                path,
                format!("`eos_token_id` holds {v}; expected token ids"),
            )
        })
    };
    match config.get("eos_token_id") {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(list)) => list.iter().map(id).collect(),
        // -1 says none.
        Some(v) if v.as_i64() == Some(-1) => Ok(Vec::new()),
        Some(v) => Ok(vec![id(v)?]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_one_spelling() {
        let mut seen = std::collections::HashSet::new();
        for code in 0..0x200u32 {
            if let Some(b) = char::from_u32(code).and_then(byte_of) {
                assert!(seen.insert(b), "byte {b} twice");
            }
        }
        assert_eq!(seen.len(), 256);
        assert_eq!(byte_of('Ġ'), Some(b' '));
        assert_eq!(byte_of('Ċ'), Some(b'\n'));
    }

    /// Text of tokens with these bytes.
    fn stream(tokens: &[&[u8]]) -> TextStream {
        let mut bytes = TokenBytes::default();
        for token in tokens {
            bytes.push(token);
        }
        TextStream {
            bytes: Arc::new(bytes),
            partial: Vec::new(),
        }
    }

    #[test]
    fn a_stream_never_emits_half_a_character() {
        let bytes = "a\u{1F600}é".as_bytes();
        let mut stream = stream(&bytes.chunks(1).collect::<Vec<_>>());
        let mut out = String::new();
        let mut lengths = Vec::new();
        for id in 0..bytes.len() as u32 {
            stream.push(id, &mut out);
            lengths.push(out.chars().count());
        }
        assert_eq!(out, "a\u{1F600}é");
        assert_eq!(lengths, [1, 1, 1, 1, 2, 2, 3]);
    }

    #[test]
    fn bytes_that_are_no_character_are_replaced_and_the_rest_goes_on() {
        let mut stream = stream(&[&[0xFF], b"x", &[0xE2, 0x82]]);
        let mut out = String::new();
        for id in [0, 1, 2, 9] {
            stream.push(id, &mut out);
        }
        assert_eq!(out, "\u{FFFD}x");
        stream.finish(&mut out);
        assert_eq!(out, "\u{FFFD}x\u{FFFD}");
    }

    #[test]
    fn a_map_of_characters_is_as_long_as_it_says() {
        let fits = |text: &str| charsmaps_fit(&serde_json::json!([{"precompiled_charsmap": text}]));
        // Lengths 0, 3 and 4 before three bytes.
        assert!(fits("AAAAAAECAw==") && fits("AwAAAAECAw=="));
        assert!(!fits("BAAAAAECAw==") && !fits("////f/8=") && !fits("AAA") && !fits("???????"));
    }

    #[test]
    fn sentencepiece_tokens_spell_spaces_and_bytes() {
        let of = |t: &str| token_bytes(t, Spelling::SentencePiece).to_vec();
        assert_eq!(of("\u{2581}a"), b" a");
        assert_eq!(of("<0x0A>"), b"\n");
        assert_eq!(of("<0x0>"), b"<0x0>");
    }
}
