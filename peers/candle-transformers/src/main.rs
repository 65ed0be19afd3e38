//! candle-transformers' quantised models, as a worker that answers one JSON request a line.
//!
//! usage: peer-candle-transformers MODEL.gguf OPTIONS
//!
//! Threads come from RAYON_NUM_THREADS. Requests: `{"op": "decode", "prompt": [..], "new": n, "eos": [..]}` decodes greedily. Answers hold milliseconds.

use std::io::{BufRead, Write};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use candle_core::quantized::gguf_file::Content;
use candle_core::{D, Device, Tensor};
use candle_transformers::models::{quantized_llama, quantized_qwen2};
use serde_json::{Value, json};

enum Model {
    Llama(quantized_llama::ModelWeights),
    Qwen2(quantized_qwen2::ModelWeights),
}

impl Model {
    fn open(path: &str) -> Result<Self> {
        let mut file = std::fs::File::open(path)?;
        let content = Content::read(&mut file)?;
        let architecture = content.metadata.get("general.architecture");
        let architecture = architecture.context("general.architecture")?.to_string()?.clone();
        Ok(match architecture.as_str() {
            "llama" => Self::Llama(quantized_llama::ModelWeights::from_gguf(content, &mut file, &Device::Cpu)?),
            "qwen2" => Self::Qwen2(quantized_qwen2::ModelWeights::from_gguf(content, &mut file, &Device::Cpu)?),
            other => bail!("architecture {other}"),
        })
    }

    /// The most probable token behind `tokens`, the first of which stands at `position`; 0 empties the cache.
    fn next(&mut self, tokens: &[u32], position: usize) -> Result<u32> {
        let input = Tensor::new(tokens, &Device::Cpu)?.unsqueeze(0)?;
        let logits = match self {
            Self::Llama(model) => model.forward(&input, position)?,
            Self::Qwen2(model) => model.forward(&input, position)?,
        };
        Ok(logits.squeeze(0)?.argmax(D::Minus1)?.to_scalar()?)
    }

    fn answer(&mut self, request: &Value) -> Result<Value> {
        let ids = |key: &str| -> Result<Vec<u32>> { Ok(serde_json::from_value(request[key].clone())?) };
        let begun = Instant::now();
        let ms = |begun: Instant| begun.elapsed().as_secs_f64() * 1e3;
        match request["op"].as_str() {
            Some("decode") => {
                let (prompt, eos) = (ids("prompt")?, ids("eos")?);
                let new = request["new"].as_u64().context("new")? as usize;
                let mut token = self.next(&prompt, 0)?;
                let prefill_ms = ms(begun);
                let begun = Instant::now();
                let mut out = vec![token];
                while out.len() < new && !eos.contains(&token) {
                    token = self.next(&[token], prompt.len() + out.len() - 1)?;
                    out.push(token);
                }
                Ok(json!({ "ids": out, "ms": ms(begun), "prefill_ms": prefill_ms }))
            }
            other => bail!("unknown request {other:?}"),
        }
    }
}

fn main() -> Result<()> {
    let path = std::env::args().nth(1).context("MODEL.gguf")?;
    let mut model = Model::open(&path)?;
    println!("{}", json!({ "version": "0.11.1" }));
    for line in std::io::stdin().lock().lines() {
        let answer = model.answer(&serde_json::from_str(&line?)?)?;
        println!("{answer}");
        std::io::stdout().flush()?;
    }
    Ok(())
}
