//! The command line.

mod align;
mod assets;
mod bench;
mod data;
mod distill;
mod doctor;
mod export;
mod fit;
mod frequencies;
mod generate;
mod inspect;
mod loss;
mod plan;
mod prove;
mod quality;
mod replay;
mod sweep;
mod tau;
mod train;
mod tree;

use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::{Args, Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use scylla_core::assets::{OnProgress, Progress as Told};

use crate::experiment::{Experiment, Override};
use crate::{Error, Registry, Result, Session};

/// Speculative decoding: compose, compare, inspect.
#[derive(Parser)]
#[command(name = "scylla", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Decode one prompt.
    Generate(generate::Generate),
    /// Compare decoders on a prompt set.
    Bench(bench::Bench),
    /// Decode again from a dense trace with other budgets and trees, without target and draft.
    Replay(replay::Replay),
    /// Prove a rule: the law of one cycle by enumeration, against the target's.
    Prove(prove::Prove),
    /// Compute an alignment loss between a teacher's and a student's answers, and its gradient
    Align(align::Align),
    /// Let a student learn from a teacher whose tokenizer it does not share.
    Distill(distill::Distill),
    /// Train a draft for a target, and watch what it is worth when served.
    Train(train::Train),
    /// Train a grid of drafts: resumable runs that share trunks and the target's pass.
    Sweep(sweep::Sweep),
    /// Fit laws of tau over tokens and layers to runs, and predict runs that were not made.
    Fit(fit::Fit),
    /// Plan draft, tree and budget for each batch size from what steps cost and how much is accepted.
    Plan(Box<plan::Plan>),
    /// Why a draft accepts so little: its files against its target, and tau with each usual mistake undone.
    Doctor(doctor::Doctor),
    /// Look at what drafts are trained on.
    #[command(subcommand)]
    Data(data::Data),
    /// Write a draft in a layout that vLLM, SGLang or speculators load.
    Export(export::Export),
    /// Look inside a model.
    #[command(subcommand)]
    Inspect(inspect::Inspect),
    /// The default model: fetch it, or say where it lies.
    #[command(subcommand)]
    Assets(assets::Assets),
}

/// Options of every command that runs a model.
#[derive(Args, Clone)]
struct ModelOptions {
    /// cpu, cuda or cuda:n
    #[arg(long)]
    device: Option<String>,
    /// Threads on a CPU; 0 takes the number of cores
    #[arg(long)]
    threads: Option<usize>,
    /// Form of the weights: f32, bf16, q8_0, q4 or as-is
    #[arg(long)]
    weights: Option<String>,
}

impl ModelOptions {
    /// The same as overrides of an experiment.
    fn overrides(&self) -> Vec<Override> {
        self.overrides_of("target")
    }

    /// The same, where the model whose weights have a form is called otherwise.
    fn overrides_of(&self, model: &str) -> Vec<Override> {
        let text =
            |key: &str, v: &Option<String>| v.as_ref().map(|v| Override::new(key, v.clone()));
        let threads = self
            .threads
            .map(|v| Override::number("run.threads", v as u64));
        [
            text("run.device", &self.device),
            threads,
            text(&format!("{model}.weights"), &self.weights),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

impl ModelOptions {
    /// The same with a target, and a draft as `NAME[:DIR]`.
    fn with(&self, target: &str, draft: &str) -> Vec<Override> {
        let (name, dir) = named(draft);
        let mut all = self.overrides();
        all.push(Override::new("target.model", target));
        all.push(Override::new("draft.name", name));
        all.extend(dir.map(|dir| Override::new("draft.dir", dir)));
        all
    }
}

/// The parts of `NAME[:DIR]`.
fn named(draft: &str) -> (&str, Option<&str>) {
    match draft.split_once(':') {
        Some((name, dir)) => (name, Some(dir)),
        None => (draft, None),
    }
}

/// Runs the command line with the drafts and rules of a registry; returns the exit status.
pub fn run(registry: &Registry, args: impl IntoIterator<Item = OsString>) -> i32 {
    scylla_core::quiet();
    // What a library makes of a broken file is told as an error of that file.
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if std::thread::current().name() != Some(crate::data::parquet::READER) {
            tell(panic);
        }
    }));
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(e) => {
            let _ = e.print();
            return e.exit_code();
        }
    };
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    let handler = ctrlc::set_handler(move || {
        // The second one does not wait.
        if flag.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
    });
    if let Err(e) = handler {
        warn(&format!("Ctrl-C will end the program at once: {e}"));
    }
    if let Err(e) = on_termination(&stop) {
        warn(&format!("SIGTERM will end the program at once: {e}"));
    }
    let done = match cli.command {
        Command::Generate(c) => c.run(registry, &stop),
        Command::Bench(c) => c.run(registry, &stop),
        Command::Replay(c) => c.run(registry),
        Command::Prove(c) => c.run(registry, &stop),
        Command::Align(c) => c.run(registry),
        Command::Distill(c) => c.run(registry, &stop),
        Command::Sweep(c) => c.run(&stop),
        Command::Train(c) => c.run(&stop),
        Command::Fit(c) => c.run(),
        Command::Plan(c) => c.run(registry, &stop),
        Command::Doctor(c) => c.run(registry, &stop),
        Command::Data(c) => c.run(registry, &stop),
        Command::Export(c) => c.run(),
        Command::Inspect(c) => c.run(registry, &stop),
        Command::Assets(c) => c.run(),
    };
    match done {
        Ok(()) => 0,
        Err(Error::Interrupted(what)) => {
            say(&format!("interrupted{what}"));
            130
        }
        Err(e) => {
            say(&format!("error: {e}"));
            1
        }
    }
}

/// Sets the flag where a cluster, a container or a closing terminal asks the program to end: SIGTERM and SIGHUP, the latter
/// not where it is ignored (nohup).
#[cfg(unix)]
fn on_termination(stop: &Arc<AtomicBool>) -> std::io::Result<()> {
    use signal_hook::consts::{SIGHUP, SIGTERM};
    signal_hook::flag::register(SIGTERM, Arc::clone(stop))?;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|l| l.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    if ignored.is_some_and(|mask| mask & (1 << (SIGHUP - 1)) == 0) {
        signal_hook::flag::register(SIGHUP, Arc::clone(stop))?;
    }
    Ok(())
}

#[cfg(not(unix))]
fn on_termination(_: &Arc<AtomicBool>) -> std::io::Result<()> {
    Ok(())
}

/// Prints one JSON object on standard output.
fn print_json(value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_string(value).map_err(|e| Error::Experiment(e.to_string()))?;
    print_text(&(text + "\n"))
}

/// Prints to standard output; a reader that left (`| head`) is no error.
fn print_text(text: &str) -> Result<()> {
    print_some(text).map(|_| ())
}

/// The same; false where the reader has left.
fn print_some(text: &str) -> Result<bool> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(e) => Err(Error::file(
            &PathBuf::from("standard output"),
            e.to_string(),
        )),
    }
}

/// Prints a line to standard error; where that cannot be written to there is nobody to tell.
fn say(line: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

/// Tells the user what may be wrong.
pub(crate) fn warn(message: &str) {
    say(&format!("warning: {message}"));
}

/// Opens the target of an experiment and tells what the user should know of it.
fn open_session(experiment: &Experiment) -> Result<Session> {
    let session = with_download(|p| Session::open(experiment, p))?;
    session
        .notes
        .iter()
        .for_each(|note| say(&format!("note: {note}")));
    Ok(session)
}

/// A bar on a terminal, a plain line now and then elsewhere.
struct Progress {
    bar: ProgressBar,
    what: String,
    terminal: bool,
    last_tenth: u64,
}

impl Progress {
    fn new(what: &str, bytes: bool) -> Self {
        let bar = ProgressBar::hidden();
        let form = match bytes {
            true => "{msg} {wide_bar} {bytes}/{total_bytes} {eta}",
            false => "{msg} {wide_bar} {pos}/{len} {eta}",
        };
        if let Ok(style) = ProgressStyle::with_template(form) {
            bar.set_style(style);
        }
        bar.set_message(what.to_string());
        Self {
            bar,
            what: what.into(),
            terminal: std::io::stderr().is_terminal(),
            last_tenth: 0,
        }
    }

    fn set(&mut self, done: u64, total: u64) {
        if self.terminal {
            if self.bar.is_hidden() {
                self.bar
                    .set_draw_target(indicatif::ProgressDrawTarget::stderr());
            }
            self.bar.set_length(total);
            self.bar.set_position(done);
            return;
        }
        let tenth = done * 10 / total.max(1);
        if tenth > self.last_tenth {
            self.last_tenth = tenth;
            say(&format!("{} {}%", self.what, tenth * 10));
        }
    }

    fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

/// Runs `body` with a download progress that shows once something is fetched.
fn with_download<T>(body: impl FnOnce(OnProgress<'_>) -> Result<T>) -> Result<T> {
    let mut progress = Progress::new("downloading", true);
    let result = body(&mut |told| match told {
        Told::Bytes(done, total) => progress.set(done, total.unwrap_or(done)),
        Told::Note(note) => say(&format!("note: {note}")),
    });
    progress.finish();
    result
}
