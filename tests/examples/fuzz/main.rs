//! Files from outside, changed in small ways and read: each is taken or refused, without a panic, without more memory than
//! its size allows, and in time.
//!
//!     cargo run --package scylla-tests --example fuzz -- all INPUTS [SEED]
//!     cargo run --package scylla-tests --example fuzz -- FORMAT INPUTS [SEED]
//!
//! Inputs are read in child processes with a limit of memory, since neither a stack that overflows nor memory that runs out
//! can be caught inside. One that fails is kept in `target/fuzz`, and the next one goes on.

mod formats;
mod mutate;

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use formats::{FORMATS, Reader};

type Failed = Box<dyn std::error::Error>;

/// Address space of a child, in KiB; a template's thread alone reserves 256 MiB of it.
const MOST_KIB: u64 = 1536 << 10;
/// Bytes that reading an input may hold at once: so many, and so many for each of its own.
const MOST_BYTES: (u64, u64) = (32 << 20, 64);
/// How long one input may take.
const LONGEST: Duration = Duration::from_secs(10);

fn main() -> Result<ExitCode, Failed> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match &args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["child", format, from, to, seed] => {
            child(format, from.parse()?, to.parse()?, seed.parse()?)?;
            Ok(ExitCode::SUCCESS)
        }
        [format, inputs, rest @ ..] => {
            let seed = rest.first().map_or(Ok(0), |s| s.parse())?;
            let formats: Vec<&str> = match *format {
                "all" => FORMATS.to_vec(),
                one if FORMATS.contains(&one) => vec![one],
                other => {
                    return Err(format!(
                        "unknown format `{other}`; known: all, {}",
                        FORMATS.join(", ")
                    )
                    .into());
                }
            };
            let mut clean = true;
            println!(
                "| format | inputs | taken | refused | failed | largest memory, MiB | longest, ms | seconds |"
            );
            println!("|---|---|---|---|---|---|---|---|");
            for format in formats {
                clean &= all(format, inputs.parse()?, seed)?;
            }
            Ok(if clean {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            })
        }
        _ => Err("usage: fuzz all|FORMAT INPUTS [SEED]".into()),
    }
}

/// Reads the inputs of a range, each announced before it is read and told about afterwards.
fn child(format: &str, from: u64, to: u64, seed: u64) -> Result<(), Failed> {
    scylla_core::quiet();
    let reader = Reader::new(format).ok_or("unknown format")?;
    let mut out = std::io::stdout().lock();
    for number in from..to {
        writeln!(out, "at {number}")?;
        out.flush()?;
        let input = reader.input(number, seed);
        let begun = Instant::now();
        let mut taken = false;
        let held = allocation_counter::measure(|| taken = reader.read(&input));
        let most = MOST_BYTES.0 + MOST_BYTES.1 * input.len() as u64;
        let verdict = match held.bytes_max > most {
            true => "memory",
            false if taken => "taken",
            false => "refused",
        };
        writeln!(
            out,
            "{verdict} {} {}",
            held.bytes_max,
            begun.elapsed().as_micros()
        )?;
    }
    writeln!(out, "done")?;
    Ok(())
}

#[derive(Default)]
struct Tally {
    taken: u64,
    refused: u64,
    failed: Vec<(u64, String)>,
    bytes: u64,
    micros: u64,
}

/// Runs all inputs of a format; true if none failed.
fn all(format: &str, inputs: u64, seed: u64) -> Result<bool, Failed> {
    let begun = Instant::now();
    let mut tally = Tally::default();
    let mut next = 0;
    while next < inputs {
        next = some(format, next, inputs, seed, &mut tally)?;
    }
    println!(
        "| {format} | {inputs} | {} | {} | {} | {:.1} | {:.1} | {:.0} |",
        tally.taken,
        tally.refused,
        tally.failed.len(),
        tally.bytes as f64 / f64::from(1 << 20),
        tally.micros as f64 / 1e3,
        begun.elapsed().as_secs_f64()
    );
    let reader = Reader::new(format).ok_or("unknown format")?;
    for (number, how) in &tally.failed {
        let kept = kept(format, *number, seed);
        if let Some(dir) = kept.parent() {
            std::fs::create_dir_all(dir)?;
        }
        std::fs::write(&kept, reader.input(*number, seed))?;
        eprintln!(
            "{format}, input {number} of seed {seed}: {how}; kept as {}",
            kept.display()
        );
    }
    Ok(tally.failed.is_empty())
}

fn kept(format: &str, number: u64, seed: u64) -> PathBuf {
    Path::new("target/fuzz").join(format!("{format}-{seed}-{number}"))
}

/// Runs a child until its end or its first failure; returns the number to go on with.
fn some(format: &str, from: u64, to: u64, seed: u64, tally: &mut Tally) -> Result<u64, Failed> {
    let (mut child, lines) = start(format, from, to, seed)?;
    let mut at = from;
    let failure = loop {
        match lines.recv_timeout(LONGEST) {
            Ok(line) => {
                let words: Vec<&str> = line.split(' ').collect();
                match words[..] {
                    ["at", number] => at = number.parse()?,
                    ["done"] => break None,
                    [verdict, bytes, micros] => {
                        tally.bytes = tally.bytes.max(bytes.parse()?);
                        tally.micros = tally.micros.max(micros.parse()?);
                        match verdict {
                            "taken" => tally.taken += 1,
                            "refused" => tally.refused += 1,
                            _ => tally.failed.push((at, format!("held {bytes} bytes"))),
                        }
                    }
                    _ => return Err(format!("a child said `{line}`").into()),
                }
            }
            Err(RecvTimeoutError::Timeout) => break Some(format!("no end within {LONGEST:?}")),
            Err(RecvTimeoutError::Disconnected) => break Some(String::new()),
        }
    };
    let Some(mut how) = failure else {
        child.wait()?;
        return Ok(to);
    };
    let _ = child.kill();
    let status = child.wait()?;
    if how.is_empty() {
        how = format!("the process ended ({status})");
    }
    tally.failed.push((at, how));
    Ok(at + 1)
}

fn start(format: &str, from: u64, to: u64, seed: u64) -> Result<(Child, Receiver<String>), Failed> {
    let own = std::env::current_exe()?;
    let mut child = Command::new("sh")
        .arg("-c")
        .arg(format!(
            "ulimit -v {MOST_KIB} && ulimit -c 0 && exec \"$0\" \"$@\""
        ))
        .arg(own)
        .args(["child", format])
        .args([from, to, seed].map(|n| n.to_string()))
        .env("RAYON_NUM_THREADS", "1")
        .env("TOKENIZERS_PARALLELISM", "false")
        .stdout(Stdio::piped())
        .spawn()?;
    let pipe = child.stdout.take().ok_or("no pipe")?;
    let (tell, lines) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(pipe).lines().map_while(Result::ok) {
            if tell.send(line).is_err() {
                break;
            }
        }
    });
    Ok((child, lines))
}
