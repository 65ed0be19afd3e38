//! `scylla sweep` on tiny models.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use common::Place;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::Value;

const STAGE: &str = "[[stage]]\nname = 'train'\nsteps = 30\ndata = { files = ['texts.txt'] }\noptimizer = { lr = 4e-3 }\n\
                     schedule = { warmup = 4 }\n";

fn place() -> Place {
    Place::training("draft = { name = 'scylla', layers = 1 }", STAGE)
}

/// A step has 3 x 48 rows: 4,320 tokens are 30 steps, 8,640 are 60.
fn sweep<'a>(output: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let base = [
        "sweep",
        "--config",
        "train.toml",
        "--json",
        "--output",
        output,
        "--grid",
    ];
    [&base[..], more].concat()
}

const GRID: [&str; 2] = ["draft.layers=1,2", "data.tokens=4320,8640"];

/// All files of a folder and below, by their paths.
fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![dir.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            match path.is_dir() {
                true => folders.push(path),
                false => {
                    let name = path.strip_prefix(dir).expect("below").to_path_buf();
                    found.insert(name, std::fs::read(&path).expect("a file"));
                }
            }
        }
    }
    found
}

/// Two sweeps left the same files, byte for byte.
fn alike(place: &Place, one: &str, other: &str) {
    let [a, b] = [one, other].map(|name| files(&place.dir.path().join(name)));
    let names = |f: &BTreeMap<PathBuf, Vec<u8>>| f.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&a), names(&b));
    for (name, bytes) in &a {
        assert!(bytes == &b[name], "{} differs", name.display());
    }
}

fn names(swept: &Value) -> Vec<&str> {
    let runs = swept["runs"].as_array().expect("runs");
    runs.iter()
        .map(|r| r["name"].as_str().expect("a name"))
        .collect()
}

#[test]
fn a_branch_is_the_run_that_was_trained_straight_to_its_budget() {
    let place = place();
    let swept = place.json(&sweep("out", &GRID));
    let expected = [
        "layers-1_tokens-4320_seed-0",
        "layers-1_tokens-8640_seed-0",
        "layers-2_tokens-4320_seed-0",
        "layers-2_tokens-8640_seed-0",
    ];
    assert_eq!(names(&swept), expected);
    for run in swept["runs"].as_array().expect("runs") {
        let name = run["name"].as_str().expect("a name");
        let config = format!("out/{name}/experiment.toml");
        let straight = format!("straight/{name}");
        let done = place.json(&[
            "train", "--config", &config, "--output", &straight, "--json",
        ]);
        assert_eq!((&done["tau"], &done["steps"]), (&run["tau"], &run["steps"]));
        assert_eq!(
            (&done["loss"], &done["tokens"]),
            (&run["loss"], &run["tokens"])
        );
        for file in [
            "metrics.jsonl",
            "best/model.safetensors",
            "best/config.json",
            "experiment.toml",
        ] {
            let [a, b] = ["out", "straight"].map(|dir| {
                std::fs::read(place.path(&format!("{dir}/{name}/{file}"))).expect("a file")
            });
            assert!(a == b, "{name}: {file}");
        }
        // What `summary.json` says is what laws are fitted to.
        assert_eq!(run["family"], "scylla");
        let layers: u64 = name[7..8].parse().expect("a number");
        assert_eq!(run["layers"], layers);
        assert_eq!(run["trunk"][0], format!("trunk_layers-{layers}_seed-0"));
        let prompts = run["prompts"].as_array().expect("prompts");
        assert_eq!(prompts.len(), 3);
        let sum = |key: &str| -> u64 {
            prompts
                .iter()
                .map(|p| p[key].as_u64().expect("a count"))
                .sum()
        };
        let tau = sum("tokens") as f64 / sum("cycles") as f64;
        assert!((run["tau"]["real"].as_f64().expect("tau") - tau).abs() < 1e-12);
        assert!(!Path::new(&place.path(&format!("out/{name}/checkpoint.safetensors"))).exists());
    }
    // Both layers shared batches, and both budgets the trunk: its rate is constant, theirs falls over the last fifth.
    let trunk = std::fs::read_to_string(place.path("out/trunk_layers-1_seed-0/metrics.jsonl"))
        .expect("metrics");
    assert_eq!(trunk.lines().count(), 48);
    let rates = |name: &str| -> Vec<f64> {
        let text = std::fs::read_to_string(place.path(&format!("out/{name}/metrics.jsonl")))
            .expect("metrics");
        let rate = |line: &str| {
            serde_json::from_str::<Value>(line).expect("JSON")["lr"]
                .as_f64()
                .expect("a rate")
        };
        text.lines().map(rate).collect()
    };
    let short = rates("layers-1_tokens-4320_seed-0");
    assert!(short[4..24].iter().all(|&r| r == 4e-3) && short[25..].windows(2).all(|w| w[1] < w[0]));
    assert_eq!(short.len(), 30);
    // What is done is not done again.
    let before = files(&place.dir.path().join("out"));
    let again = place.json(&sweep("out", &GRID));
    assert_eq!(
        (again["skipped"].as_u64(), &again["runs"]),
        (Some(4), &swept["runs"])
    );
    assert!(before == files(&place.dir.path().join("out")));
}

#[test]
fn a_sweep_that_is_killed_again_and_again_ends_as_one_that_is_not() {
    let place = place();
    place.json(&sweep("whole", &GRID));
    let seed = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .expect("now")
        .as_nanos() as u64;
    eprintln!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let more = [&GRID[..], &["--set", "train.checkpoint=7"]].concat();
    let args = sweep("killed", &more);
    let mut kills = 0;
    for attempt in 0u64.. {
        let mut child = place
            .command(&args)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("starts");
        // Longer and longer, so that it ends.
        std::thread::sleep(Duration::from_millis(
            random.random_range(20..150 + 60 * attempt),
        ));
        if child
            .try_wait()
            .expect("waits")
            .is_some_and(|status| status.success())
        {
            break;
        }
        child.kill().expect("killed");
        child.wait().expect("gone");
        kills += 1;
    }
    eprintln!("{kills} kills");
    // The steps between checkpoints may differ, and nothing else does.
    let plain = |name: &str| {
        let mut all = files(&place.dir.path().join(name));
        all.retain(|path, _| {
            !path.ends_with("checkpoint.safetensors") && !path.ends_with("experiment.toml")
        });
        all
    };
    let (a, b) = (plain("whole"), plain("killed"));
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    a.iter()
        .for_each(|(name, bytes)| assert!(bytes == &b[name], "{} differs", name.display()));
}

#[test]
fn the_same_command_again_leaves_the_same_bytes_and_a_grid_may_grow() {
    let place = place();
    place.json(&sweep("one", &GRID));
    place.json(&sweep("two", &GRID));
    alike(&place, "one", "two");
    // A larger budget lets the trunk go on; a smaller one needs it anew.
    for grid in [
        "data.tokens=4320",
        "data.tokens=4320,8640",
        "data.tokens=2880,4320,8640",
    ] {
        place.json(&sweep("grown", &["draft.layers=1", grid]));
    }
    place.json(&sweep(
        "whole",
        &["draft.layers=1", "data.tokens=2880,4320,8640"],
    ));
    let runs = |name: &str| {
        let mut all = files(&place.dir.path().join(name));
        all.retain(|path, _| !path.starts_with("trunk_layers-1_seed-0"));
        all
    };
    assert!(runs("grown") == runs("whole"));
    // Under one name there is one run.
    let error = place.refused(&sweep(
        "one",
        &[&GRID[..], &["--set", "train.batch=2"]].concat(),
    ));
    assert!(error.contains("another run"), "{error}");
}

#[test]
fn a_run_that_fails_is_said_and_the_others_go_on() {
    let place = place();
    let args = sweep(
        "out",
        &[
            "stage.optimizer.lr=4e-3,1e30",
            "data.tokens=4320",
            "--seeds",
            "0,1",
        ],
    );
    let out = place.run(&args);
    assert!(!out.status.success());
    let swept: Value = serde_json::from_slice(&out.stdout).expect("JSON");
    assert_eq!(names(&swept).len(), 2, "{swept}");
    let failed = swept["failed"].as_array().expect("failed");
    assert_eq!(failed.len(), 2, "{swept}");
    for one in failed {
        assert!(
            one["name"].as_str().is_some_and(|n| n.contains("lr-1")),
            "{one}"
        );
        assert!(
            one["reason"].as_str().is_some_and(|r| r.contains("step")),
            "{one}"
        );
    }
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(said.contains("2 runs of the grid are not done"), "{said}");
}

#[test]
fn the_tasks_of_an_array_script_are_the_same_runs() {
    let place = place();
    let answer = place.json(&sweep(
        "array",
        &[&GRID[..], &["--executor", "slurm", "--seeds", "0,1"]].concat(),
    ));
    let script = answer["script"].as_str().expect("a script").to_string();
    let text = std::fs::read_to_string(place.dir.path().join(&script)).expect("written");
    assert!(text.contains("#SBATCH --array=0-3\n"), "{text}");
    match std::process::Command::new("sbatch")
        .args(["--test-only", &script])
        .current_dir(place.dir.path())
        .output()
    {
        Ok(out) => assert!(
            out.status.success(),
            "{}",
            String::from_utf8_lossy(&out.stderr)
        ),
        Err(e) => eprintln!("skipped: sbatch --test-only: {e}"),
    }
    for task in 0..4 {
        let like = place.command(&[]);
        let out = std::process::Command::new("bash")
            .arg(&script)
            .env("SLURM_ARRAY_TASK_ID", task.to_string())
            .envs(
                like.get_envs()
                    .filter_map(|(key, value)| Some((key, value?))),
            )
            .current_dir(place.dir.path())
            .output()
            .expect("starts");
        assert!(
            out.status.success(),
            "{}",
            String::from_utf8_lossy(&out.stderr)
        );
    }
    place.json(&sweep("local", &[&GRID[..], &["--seeds", "0,1"]].concat()));
    std::fs::remove_file(place.dir.path().join(&script)).expect("removed");
    alike(&place, "array", "local");
    // Gathered from two machines.
    std::fs::create_dir_all(place.path("all/two")).expect("created");
    std::fs::rename(place.path("local"), place.path("all/one")).expect("moved");
    std::fs::rename(
        place.path("array/layers-2_tokens-8640_seed-1"),
        place.path("all/two/layers-2_tokens-8640_seed-1"),
    )
    .expect("moved");
    let gathered = place.json(&["sweep", "--gather", "all", "--json"]);
    assert_eq!(names(&gathered).len(), 8);
    let path = place.path("all/two/layers-2_tokens-8640_seed-1/summary.json");
    let changed = std::fs::read_to_string(&path)
        .expect("read")
        .replace("\"real\": ", "\"real\": 1");
    std::fs::write(&path, changed).expect("written");
    let error = place.refused(&["sweep", "--gather", "all"]);
    assert!(error.contains("another result"), "{error}");
    std::fs::write(&path, "{\"format\": \"scylla-sweep\", \"version\": 9}").expect("written");
    assert!(
        place
            .refused(&["sweep", "--gather", "all"])
            .contains("version")
    );
    std::fs::create_dir(place.path("empty")).expect("created");
    assert!(
        place
            .refused(&["sweep", "--gather", "empty"])
            .contains("no run")
    );
}

#[test]
fn a_grid_that_cannot_be_is_refused_before_anything_is_trained() {
    let place = place();
    for (more, words) in [
        (vec!["draft.layers"], "KEY=V"),
        (vec!["=1"], "KEY=V"),
        (vec!["draft.layers=1,1"], "comes twice"),
        (vec!["draft.layers=1", "draft.layers=2"], "twice"),
        (vec!["draft.lairs=1,2"], "lairs"),
        (vec!["data.tokens=few"], "no number of tokens"),
        (vec!["data.tokens=-5"], "no number of tokens"),
        (vec!["data.tokens=144"], "schedule.warmup 4"),
        (
            vec!["data.tokens=720", "--cooldown", "0.5"],
            "no room for schedule.warmup",
        ),
        (vec!["draft.layers=0"], "1 to 64"),
        (vec!["target.model=a,b"], "one target"),
        (vec!["run.device=cpu,cuda"], "one device"),
        (vec!["run.seed=1,2"], "--seeds"),
        (
            vec!["stage.schedule.shape=cosine,linear", "data.tokens=4320"],
            "cool down",
        ),
        (vec!["draft.layers= "], "no value"),
        (
            vec!["draft.layers=1", "--task", "0", "--executor", "slurm"],
            "cannot be used with",
        ),
        (vec!["data.tokens=4320", "--cooldown", "0"], "cooldown"),
        (vec!["draft.layers=1", "--task", "1"], "1 settings"),
    ] {
        let error = place.refused(&sweep("out", &more));
        assert!(error.contains(words), "{more:?}: {error}");
        assert!(!Path::new(&place.path("out/trunk_seed-0")).exists());
    }
    // Budgets as people write them, texts, and lists.
    let found = place.json(&sweep(
        "out",
        &[
            "data.tokens=4.32e3",
            "loss.distance=kl,tv",
            "--executor",
            "slurm",
        ],
    ));
    let text = std::fs::read_to_string(
        place
            .dir
            .path()
            .join(found["script"].as_str().expect("a script")),
    )
    .expect("written");
    assert!(
        text.contains("# 1: distance-tv_tokens-4320_seed-0"),
        "{text}"
    );
}
