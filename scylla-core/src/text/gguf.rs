//! Tokenizers out of GGUF metadata: byte-level BPE ("gpt2") and SentencePiece-style ("llama").

use tokenizers::AddedToken;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::{Prepend, Replace, Sequence as Normalizers, unicode::NFC};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;

use crate::model::Gguf;
use crate::{Error, Result};

/// llama.cpp's token types.
const UNKNOWN: u32 = 2;
const CONTROL: u32 = 3;
const USER_DEFINED: u32 = 4;

/// Builds the tokenizer; the flag says whether it is byte-level.
pub(super) fn build(gguf: &Gguf) -> Result<(tokenizers::Tokenizer, bool)> {
    let model = gguf.text("tokenizer.ggml.model")?.unwrap_or_default();
    let tokens = gguf.texts("tokenizer.ggml.tokens")?;
    let (mut tokenizer, byte_level) = match model {
        "gpt2" => (byte_level(gguf, tokens)?, true),
        "llama" => (sentencepiece(gguf, tokens)?, false),
        other => {
            return Err(Error::Unsupported(format!(
                "{}: tokenizer model `{other}`; supported: gpt2, llama",
                gguf.path.display()
            )));
        }
    };
    let types = gguf.numbers("tokenizer.ggml.token_type")?;
    if types.len() != tokens.len() {
        return Err(broken(
            gguf,
            format!("{} types for {} tokens", types.len(), tokens.len()),
        ));
    }
    let added = tokens.iter().zip(types).filter_map(|(token, &kind)| {
        let special = kind as u32 == CONTROL || kind as u32 == UNKNOWN;
        (special || kind as u32 == USER_DEFINED)
            .then(|| AddedToken::from(token.to_string(), special).normalized(false))
    });
    tokenizer.add_tokens(added).map_err(|e| broken(gguf, e))?;
    Ok((tokenizer, byte_level))
}

fn broken(gguf: &Gguf, error: impl std::fmt::Display) -> Error {
    Error::file(&gguf.path, format!("tokenizer: {error}"))
}

fn vocabulary(gguf: &Gguf, tokens: &[String]) -> Result<Vocab> {
    let vocab: Vocab = tokens
        .iter()
        .enumerate()
        .map(|(i, t)| (t.to_string(), i as u32))
        .collect();
    if vocab.len() == tokens.len() {
        Ok(vocab)
    } else {
        Err(broken(
            gguf,
            format!("{} of {} tokens are distinct", vocab.len(), tokens.len()),
        ))
    }
}

fn byte_level(gguf: &Gguf, tokens: &[String]) -> Result<tokenizers::Tokenizer> {
    let merges = gguf
        .texts("tokenizer.ggml.merges")?
        .iter()
        .map(|m| match m.split_once(' ') {
            Some((a, b)) => Ok((a.to_string(), b.to_string())),
            None => Err(broken(gguf, format!("merge `{m}` is not a pair"))),
        })
        .collect::<Result<Vec<_>>>()?;
    let pre = gguf.text("tokenizer.ggml.pre")?.unwrap_or("gpt-2");
    let bpe = BPE::builder()
        .vocab_and_merges(vocabulary(gguf, tokens)?, merges)
        // Llama-3 takes a whole word that is a token as it is.
        .ignore_merges(pre == "llama-bpe" || pre == "llama3")
        .build()
        .map_err(|e| broken(gguf, e))?;
    let mut tokenizer = tokenizers::Tokenizer::new(bpe);
    if pre == "qwen2" {
        tokenizer
            .with_normalizer(Some(NFC))
            .map_err(|e| broken(gguf, e))?;
    }
    tokenizer.with_pre_tokenizer(Some(pre_tokenizer(gguf, pre)?));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    Ok(tokenizer)
}

/// How text is split before merging, by the names llama.cpp gives.
fn pre_tokenizer(gguf: &Gguf, pre: &str) -> Result<PreTokenizerWrapper> {
    let gpt2 = ByteLevel::new(false, false, true);
    let words = |digits: &str| {
        let pattern = format!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        );
        let split = Split::new(
            SplitPattern::Regex(pattern),
            SplitDelimiterBehavior::Isolated,
            false,
        );
        split.map_err(|e| broken(gguf, e))
    };
    let bytes = ByteLevel::new(false, false, false);
    Ok(match pre {
        "gpt-2" | "gpt2" | "default" => gpt2.into(),
        "smollm" => Sequence::new(vec![Digits::new(true).into(), gpt2.into()]).into(),
        "llama-bpe" | "llama3" => {
            Sequence::new(vec![words(r"\p{N}{1,3}")?.into(), bytes.into()]).into()
        }
        "qwen2" => Sequence::new(vec![words(r"\p{N}")?.into(), bytes.into()]).into(),
        other => {
            return Err(Error::Unsupported(format!(
                "{}: pre-tokenizer `{other}`; supported: default, gpt-2, llama-bpe, qwen2, smollm",
                gguf.path.display()
            )));
        }
    })
}

/// SentencePiece BPE: merges in the order of the merged token's score.
fn sentencepiece(gguf: &Gguf, tokens: &[String]) -> Result<tokenizers::Tokenizer> {
    let vocab = vocabulary(gguf, tokens)?;
    let scores = gguf.numbers("tokenizer.ggml.scores")?;
    if scores.len() != tokens.len() {
        return Err(broken(
            gguf,
            format!("{} scores for {} tokens", scores.len(), tokens.len()),
        ));
    }
    let mut merges = Vec::new();
    for (id, token) in tokens.iter().enumerate() {
        for (at, _) in token.char_indices().skip(1) {
            let (a, b) = token.split_at(at);
            if let (Some(&left), Some(&right)) = (vocab.get(a), vocab.get(b)) {
                merges.push((scores[id], left, right, (a.to_string(), b.to_string())));
            }
        }
    }
    merges.sort_by(|x, y| y.0.total_cmp(&x.0).then((x.1, x.2).cmp(&(y.1, y.2))));
    let unknown = gguf.id("tokenizer.ggml.unknown_token_id")?.unwrap_or(0);
    let mut builder = BPE::builder()
        .vocab_and_merges(vocab, merges.into_iter().map(|m| m.3).collect())
        .byte_fallback(true)
        .fuse_unk(true);
    if let Some(token) = tokens.get(unknown as usize) {
        builder = builder.unk_token(token.to_string());
    }
    let mut tokenizer = tokenizers::Tokenizer::new(builder.build().map_err(|e| broken(gguf, e))?);
    let spaces = Replace::new(" ", "\u{2581}").map_err(|e| broken(gguf, e))?;
    let prefix = gguf
        .flag("tokenizer.ggml.add_space_prefix")?
        .unwrap_or(true);
    let mut normalizers = Vec::new();
    if prefix {
        normalizers.push(Prepend::new("\u{2581}".into()).into());
    }
    normalizers.push(spaces.into());
    tokenizer
        .with_normalizer(Some(Normalizers::new(normalizers)))
        .map_err(|e| broken(gguf, e))?;
    let unspaced = Replace::new("\u{2581}", " ").map_err(|e| broken(gguf, e))?;
    tokenizer.with_decoder(Some(Decoders::new(vec![
        unspaced.into(),
        ByteFallback::default().into(),
        Fuse::default().into(),
    ])));
    Ok(tokenizer)
}
