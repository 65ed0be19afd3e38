//! Runs the `scylla` binary in a folder of its own.
#![allow(dead_code, unreachable_pub)] // each test file uses its part

use std::process::{Command, Output};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use safetensors::Dtype;
use scylla_tests::{LETTERS, Tiny, byte_level_tokenizer, write_hf};
use serde_json::{Value, json};

/// The template of many models.
pub const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// A folder to run in.
pub struct Place {
    pub dir: tempfile::TempDir,
}

impl Place {
    /// A folder with a tiny model in `model`.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("dir");
        let model = dir.path().join("model");
        std::fs::create_dir(&model).expect("create");
        write_hf(&Tiny::default(), &model, Dtype::F32, 1);
        Self { dir }
    }

    /// A place with a model that talks, text that repeats itself, and an experiment in `train.toml`.
    pub fn training(draft: &str, more: &str) -> Self {
        let place = Self::new();
        place.talking("talker", |_| {});
        let mut random = StdRng::seed_from_u64(5);
        let words: Vec<String> = (0..12)
            .map(|_| {
                (0..random.random_range(2..5))
                    .map(|_| (b'a' + random.random_range(0..26)) as char)
                    .collect()
            })
            .collect();
        let mut texts = String::new();
        for _ in 0..80 {
            let count = random.random_range(10..40);
            let line: Vec<&str> = (0..count)
                .map(|_| &*words[random.random_range(0..words.len())])
                .collect();
            texts += &format!("{}\n<|endoftext|>\n", line.join(" "));
        }
        std::fs::write(place.path("texts.txt"), texts).expect("texts");
        let prompts = "{\"id\": 1, \"prompt\": \"abc\"}\n{\"id\": 2, \"prompt\": \"hello there\"}\n{\"id\": 3, \"prompt\": \"x y z\"}\n";
        std::fs::write(place.path("prompts.jsonl"), prompts).expect("prompts");
        let text = format!(
            "target = {{ model = 'talker' }}\n{draft}\ntrain = {{ length = 48, batch = 3, products = 'f32' }}\n\
             evaluate = {{ every = 60, max_new_tokens = 24, prompts = {{ set = 'prompts.jsonl', part = 'all' }}, \
             budget = {{ total = 6, width = 2, depth = 2 }} }}\nrun = {{ threads = 2 }}\n{more}\n"
        );
        std::fs::write(place.path("train.toml"), text).expect("experiment");
        place
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_string_lossy().into_owned()
    }

    /// The binary there, without network and with an empty cache.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_scylla"));
        command
            .args(args)
            .current_dir(self.dir.path())
            .env("SCYLLA_CACHE", self.path("cache"))
            .env("HF_HOME", self.path("hf"))
            .env("SCYLLA_OFFLINE", "1")
            .env_remove("HF_HUB_CACHE")
            .env_remove("HUGGINGFACE_HUB_CACHE")
            .env("RUST_BACKTRACE", "1");
        command
    }

    /// The same behind words of a shell, such as limits; `$0` and what follows is the command.
    pub fn behind(&self, shell: &str, args: &[&str]) -> Output {
        let like = self.command(args);
        let words = like
            .get_envs()
            .filter_map(|(key, value)| Some((key, value?)));
        Command::new("sh")
            .args(["-c", &format!("{shell}; exec \"$0\" \"$@\"")])
            .arg(env!("CARGO_BIN_EXE_scylla"))
            .args(args)
            .envs(words)
            .current_dir(self.dir.path())
            .output()
            .expect("starts")
    }

    /// Runs it.
    pub fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("starts")
    }

    /// Writes a model that talks: letters, and `<|end|>`, `<|im_start|>`, `<|im_end|>` behind them, which its chat template
    /// puts around what is said. `edit` may change `config.json`, `tokenizer.json` and `tokenizer_config.json`.
    pub fn talking(&self, name: &str, edit: impl FnOnce(&mut [Value; 3])) {
        let dir = self.dir.path().join(name);
        std::fs::create_dir_all(&dir).expect("create");
        let tiny = Tiny {
            vocab: LETTERS + 3,
            ..Tiny::default()
        };
        write_hf(&tiny, &dir, Dtype::F32, 1);
        let read = |file: &str| std::fs::read(dir.join(file)).expect("written");
        let mut files = [
            serde_json::from_slice(&read("config.json")).expect("JSON"),
            byte_level_tokenizer(&["<|end|>", "<|im_start|>", "<|im_end|>"]),
            json!({"bos_token": "<|end|>", "eos_token": "<|im_end|>", "chat_template": CHATML}),
        ];
        edit(&mut files);
        for (file, value) in ["config.json", "tokenizer.json", "tokenizer_config.json"]
            .iter()
            .zip(&files)
        {
            std::fs::write(dir.join(file), value.to_string()).expect("write");
        }
    }

    /// Runs what must print one JSON object.
    pub fn json(&self, args: &[&str]) -> Value {
        let out = self.run(args);
        let text = String::from_utf8(out.stdout).expect("UTF-8");
        assert!(
            out.status.success(),
            "{args:?}: {}",
            String::from_utf8_lossy(&out.stderr)
        );
        assert_eq!(
            text.trim().lines().count(),
            1,
            "one object and nothing else: {text}"
        );
        serde_json::from_str(&text).expect("JSON")
    }

    /// Runs what must fail; returns its message.
    pub fn refused(&self, args: &[&str]) -> String {
        let out = self.run(args);
        assert!(!out.status.success(), "{args:?} passed");
        assert!(out.stdout.is_empty(), "{args:?} wrote to standard output");
        let message = String::from_utf8(out.stderr).expect("UTF-8");
        for word in ["panicked", "stack backtrace"] {
            assert!(!message.contains(word), "{args:?}: {message}");
        }
        message
    }
}
