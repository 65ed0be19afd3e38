//! Runs the `scylla` binary in a folder of its own.
#![allow(dead_code, unreachable_pub)] // each test file uses its part

use std::process::{Command, Output};

use safetensors::Dtype;
use scylla_tests::{Tiny, write_hf};
use serde_json::Value;

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

    /// A path in it.
    pub fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_string_lossy().into_owned()
    }

    /// Runs the binary there, without network and with an empty cache.
    pub fn run(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_scylla"))
            .args(args)
            .current_dir(self.dir.path())
            .env("SCYLLA_CACHE", self.path("cache"))
            .env("HF_HOME", self.path("hf"))
            .env("SCYLLA_OFFLINE", "1")
            .output()
            .expect("starts")
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
        assert!(!message.contains("panicked"), "{args:?}: {message}");
        message
    }
}
