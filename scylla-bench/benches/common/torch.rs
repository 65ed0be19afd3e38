//! A program in PyTorch that takes turns with a benchmark.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdout, Command, Stdio};

use serde_json::Value;

/// The peer, and what it answers: a line of JSON for each that it is asked.
pub(crate) struct Peer {
    child: Child,
    answers: BufReader<ChildStdout>,
}

impl Peer {
    /// A script of `peers/pytorch`, where `SCYLLA_TORCH` names a Python that has torch.
    pub(crate) fn start(script: &str, threads: usize) -> Option<Self> {
        let python = std::env::var_os("SCYLLA_TORCH")?;
        let place = concat!(env!("CARGO_MANIFEST_DIR"), "/../peers/pytorch/");
        let mut child = Command::new(python)
            .arg(format!("{place}{script}"))
            .env("OMP_NUM_THREADS", threads.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("SCYLLA_TORCH starts");
        let answers = BufReader::new(child.stdout.take().expect("its output"));
        let mut peer = Self { child, answers };
        println!("PyTorch {}", peer.line());
        Some(peer)
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("an answer");
        serde_json::from_str(&line).expect("JSON")
    }

    pub(crate) fn ask(&mut self, asked: &Value) -> Value {
        let to = self.child.stdin.as_mut().expect("its input");
        writeln!(to, "{asked}")
            .and_then(|()| to.flush())
            .expect("asked");
        self.line()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
