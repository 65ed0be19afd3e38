//! Greedy decoding with candle-transformers' quantised Llama.
//!
//! usage: peer-candle-transformers MODEL.gguf 1,2,3 NEW_TOKENS
//!
//! Prints one JSON object: ids, prefill_ms, and tokens_per_s of the tokens after the first.

use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::quantized::gguf_file::Content;
use candle_core::{D, Device, Tensor};
use candle_transformers::models::quantized_llama::ModelWeights;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let (path, ids, n) = (
        args.next().context("MODEL.gguf")?,
        args.next().context("prompt ids")?,
        args.next().context("NEW_TOKENS")?.parse::<usize>()?,
    );
    let prompt = ids.split(',').map(str::parse::<u32>).collect::<Result<Vec<_>, _>>()?;
    let device = Device::Cpu;
    let mut file = std::fs::File::open(&path)?;
    let content = Content::read(&mut file)?;
    let mut model = ModelWeights::from_gguf(content, &mut file, &device)?;
    let argmax = |logits: Tensor| -> Result<u32> {
        Ok(logits.squeeze(0)?.argmax(D::Minus1)?.to_scalar::<u32>()?)
    };
    let begun = Instant::now();
    let mut token = argmax(model.forward(&Tensor::new(&prompt[..], &device)?.unsqueeze(0)?, 0)?)?;
    let prefill_ms = begun.elapsed().as_secs_f64() * 1e3;
    let mut out = vec![token];
    let begun = Instant::now();
    for i in 1..n {
        let input = Tensor::new(&[token], &device)?.unsqueeze(0)?;
        token = argmax(model.forward(&input, prompt.len() + i - 1)?)?;
        out.push(token);
    }
    let tokens_per_s = (n - 1) as f64 / begun.elapsed().as_secs_f64();
    let result = serde_json::json!({ "ids": out, "prefill_ms": prefill_ms, "tokens_per_s": tokens_per_s });
    println!("{result}");
    Ok(())
}
