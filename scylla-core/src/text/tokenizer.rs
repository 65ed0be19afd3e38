//! A tokenizer with the bytes of each token, from `tokenizer.json` or GGUF metadata.

use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use super::chat::ChatTemplate;
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
    bytes: Arc<TokenBytes>,
    spelling: Spelling,
    bos: Option<u32>,
    add_bos: bool,
    eos: Vec<u32>,
    template: Option<ChatTemplate>,
}

impl Tokenizer {
    /// Reads the tokenizer of a model and checks that it fits; `None` where the files hold none.
    pub fn of_model(files: &ModelFiles) -> Result<Option<Self>> {
        let tokenizer = match &files.source {
            Source::Gguf(gguf) if gguf.value("tokenizer.ggml.model").is_none() => None,
            // llama.cpp's names for a file without one.
            Source::Gguf(gguf)
                if matches!(
                    gguf.string("tokenizer.ggml.model"),
                    Some("no_vocab" | "none")
                ) =>
            {
                None
            }
            Source::Gguf(gguf) => Some(Self::from_gguf(gguf)?),
            Source::Safetensors(_) if files.path.join("tokenizer.json").is_file() => {
                Some(Self::from_dir(&files.path)?)
            }
            Source::Safetensors(_) => None,
        };
        let Some(mut tokenizer) = tokenizer else {
            return Ok(None);
        };
        tokenizer.check_fits(files.config.vocab, &files.path)?;
        let eos = eos_of_model(files)?;
        if !eos.is_empty() {
            tokenizer.eos = eos;
        }
        Ok(Some(tokenizer))
    }

    /// Reads `tokenizer.json` and the configuration files beside it.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
        let inner = text
            .parse::<tokenizers::Tokenizer>()
            .map_err(|e| Error::file(&path, format!("not a tokenizer: {e}")))?;
        let raw: Value = serde_json::from_str(&text)
            .map_err(|e| Error::file(&path, format!("not a tokenizer: {e}")))?;
        let spelling = spelling(&raw).ok_or_else(|| {
            Error::Unsupported(format!(
                "{}: neither a byte-level nor a SentencePiece-style tokenizer",
                path.display()
            ))
        })?;
        let config = json(&dir.join("tokenizer_config.json"))?;
        let token = |key: &str| special(&config, key).and_then(|t| inner.token_to_id(&t));
        let bos = token("bos_token");
        let eos = token("eos_token").into_iter().collect();
        let standalone = dir.join("chat_template.jinja");
        let template = match config.get("chat_template") {
            _ if standalone.is_file() => {
                Some(std::fs::read_to_string(&standalone).map_err(Error::io(&standalone))?)
            }
            Some(Value::String(t)) => Some(t.clone()),
            Some(Value::Array(list)) => default_template(list),
            _ => None,
        };
        let name = |key: &str| special(&config, key).unwrap_or_default();
        let template = template
            .map(|t| ChatTemplate::new(t, name("bos_token"), name("eos_token")))
            .transpose()?;
        Self::new(inner, spelling, bos, eos, template)
    }

    fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let (inner, byte_level) = super::gguf::build(gguf)?;
        let id = |key: &str| {
            gguf.number(&format!("tokenizer.ggml.{key}_token_id"))
                .map(|v| v as u32)
        };
        let name = |key: &str| {
            id(key)
                .and_then(|i| inner.id_to_token(i))
                .unwrap_or_default()
        };
        let template = gguf
            .string("tokenizer.chat_template")
            .map(|t| ChatTemplate::new(t.to_string(), name("bos"), name("eos")))
            .transpose()?;
        let spelling = match byte_level {
            true => Spelling::ByteLevel,
            false => Spelling::SentencePiece,
        };
        let mut tokenizer = Self::new(inner, spelling, id("bos"), Vec::new(), template)?;
        tokenizer.add_bos = match gguf.value("tokenizer.ggml.add_bos_token") {
            Some(v) => v.to_bool().unwrap_or(false),
            None => !byte_level,
        };
        Ok(tokenizer)
    }

    fn new(
        inner: tokenizers::Tokenizer,
        spelling: Spelling,
        bos: Option<u32>,
        eos: Vec<u32>,
        template: Option<ChatTemplate>,
    ) -> Result<Self> {
        let added = inner.get_added_tokens_decoder();
        let largest = inner.get_vocab(true).into_values().max();
        let mut bytes = TokenBytes::default();
        for id in 0..largest.map_or(0, |id| id + 1) {
            match (added.get(&id), inner.id_to_token(id)) {
                (Some(added), _) if added.special => bytes.push(&[]),
                (Some(added), _) => bytes.push(added.content.as_bytes()),
                (None, Some(token)) => bytes.push(&token_bytes(&token, spelling)),
                (None, None) => bytes.push(&[]),
            }
        }
        // Whether the post-processor of the file puts BOS in front.
        let empty = inner
            .encode("", true)
            .map_err(|e| Error::Invalid(e.to_string()))?;
        let add_bos = bos.is_some() && empty.get_ids().first().copied() == bos;
        Ok(Self {
            inner,
            bytes: Arc::new(bytes),
            spelling,
            bos,
            add_bos,
            eos,
            template,
        })
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

    /// The chat template, where the model has one.
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    /// Ids of a text; special tokens in it are recognised. BOS goes in front where the model wants one and the
    /// text does not already begin with it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.encode_plain(text)?;
        if let Some(bos) = self.bos
            && self.add_bos
            && ids.first() != Some(&bos)
        {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    /// Ids of a text, without BOS.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.inner.encode(text, false);
        let encoding = encoding.map_err(|e| Error::Invalid(format!("tokenizer: {e}")))?;
        Ok(encoding.get_ids().to_vec())
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

/// A JSON file that may be absent.
fn json(path: &Path) -> Result<Value> {
    if !path.is_file() {
        return Ok(Value::Null);
    }
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    serde_json::from_str(&text).map_err(|e| Error::file(path, format!("not JSON: {e}")))
}

/// A special token of `tokenizer_config.json`: a string, or an object with its content.
fn special(config: &Value, key: &str) -> Option<String> {
    let value = config.get(key)?;
    let text = value.as_str().or_else(|| value.get("content")?.as_str());
    text.map(str::to_string)
}

/// Ids that end a sequence, by the files of a model that may have no tokenizer.
pub fn eos_of_model(files: &ModelFiles) -> Result<Vec<u32>> {
    match &files.source {
        Source::Gguf(gguf) => {
            let id = |key: &str| gguf.number(&format!("tokenizer.ggml.{key}_token_id"));
            let mut ids: Vec<u32> = [id("eos"), id("eot")]
                .into_iter()
                .flatten()
                .map(|v| v as u32)
                .collect();
            ids.dedup();
            Ok(ids)
        }
        Source::Safetensors(_) => {
            let ids = eos_ids(&json(&files.path.join("generation_config.json"))?);
            match ids.is_empty() {
                true => Ok(eos_ids(&json(&files.path.join("config.json"))?)),
                false => Ok(ids),
            }
        }
    }
}

fn eos_ids(config: &Value) -> Vec<u32> {
    let id = |v: &Value| v.as_u64().and_then(|v| u32::try_from(v).ok());
    match config.get("eos_token_id") {
        Some(Value::Array(list)) => list.iter().filter_map(id).collect(),
        Some(v) => id(v).into_iter().collect(),
        None => Vec::new(),
    }
}

/// Of several named templates, the one called default.
fn default_template(list: &[Value]) -> Option<String> {
    let named = |v: &&Value| v.get("name").and_then(Value::as_str) == Some("default");
    let chosen = list.iter().find(named).or(list.first())?;
    chosen.get("template")?.as_str().map(str::to_string)
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
    fn sentencepiece_tokens_spell_spaces_and_bytes() {
        let of = |t: &str| token_bytes(t, Spelling::SentencePiece).to_vec();
        assert_eq!(of("\u{2581}a"), b" a");
        assert_eq!(of("<0x0A>"), b"\n");
        assert_eq!(of("<0x0>"), b"<0x0>");
    }
}
