//! Models by hub id, from a server on this machine that answers as the hub does.

use std::collections::HashSet;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use safetensors::Dtype;
use scylla_tests::{Tiny, write_hf};

/// What the server does with a request for a file.
#[derive(Clone, Default)]
struct Behaviour {
    /// Requests seen: path, and whether a token came with them.
    seen: Arc<Mutex<Vec<(String, bool)>>>,
    /// Files whose first whole download breaks off in the middle.
    broken: Arc<Mutex<HashSet<String>>>,
}

struct Hub {
    endpoint: String,
    behaviour: Behaviour,
}

/// Serves `dir` as `owner/name` until the test ends.
fn serve(dir: PathBuf) -> Hub {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let endpoint = format!("http://{}", listener.local_addr().expect("address"));
    let behaviour = Behaviour::default();
    let ours = behaviour.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // A client that went away is no concern of the server.
            let _ = answer(stream, &dir, &ours);
        }
    });
    Hub {
        endpoint,
        behaviour,
    }
}

fn answer(mut stream: TcpStream, dir: &Path, behaviour: &Behaviour) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().transpose()?.unwrap_or_default();
    let path = request
        .split(' ')
        .nth(1)
        .unwrap_or_default()
        .trim_start_matches('/')
        .to_string();
    let (mut start, mut end, mut token) = (0, None, false);
    for line in lines {
        let line = line?.to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        if let Some(range) = line.strip_prefix("range: bytes=") {
            let (a, b) = range.split_once('-').unwrap_or(("0", ""));
            start = a.parse().unwrap_or(0);
            end = b.parse::<usize>().ok();
        }
        token |= line == "authorization: bearer secret";
    }
    behaviour
        .seen
        .lock()
        .expect("lock")
        .push((path.clone(), token));
    let file = path.strip_prefix("owner/name/resolve/main/");
    let content = file.and_then(|f| std::fs::read(dir.join(f)).ok());
    let (Some(file), Some(content)) = (file, content) else {
        return stream.write_all(
            b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
        );
    };
    let end = end.map_or(content.len(), |e| content.len().min(e + 1));
    let part = &content[start.min(end)..end];
    write!(
        stream,
        "HTTP/1.1 206 Partial Content\r\nContent-Length: {}\r\nContent-Range: bytes {start}-{}/{}\r\n\
         ETag: \"{file}-1\"\r\nx-repo-commit: 0123\r\nConnection: close\r\n\r\n",
        part.len(),
        end.saturating_sub(1),
        content.len()
    )?;
    if part.len() > 1 && behaviour.broken.lock().expect("lock").remove(file) {
        return stream.write_all(&part[..part.len() / 2]);
    }
    stream.write_all(part)
}

fn generate(dir: &Path, more: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_scylla"));
    command
        .args(["generate", "--target", "owner/name", "--prompt-ids", "5,6"])
        .args(["--max-new-tokens", "4", "--ignore-eos", "--json"])
        .env("HF_HOME", dir.join("hf"))
        .env("SCYLLA_CACHE", dir.join("cache"))
        .env_remove("HF_TOKEN")
        .env_remove("HF_HUB_CACHE")
        .env_remove("HUGGINGFACE_HUB_CACHE")
        .env_remove("TRANSFORMERS_OFFLINE")
        .env_remove("HF_HUB_OFFLINE")
        .env_remove("SCYLLA_OFFLINE")
        .envs(more.iter().copied());
    command.output().expect("starts")
}

fn ids(out: &Output) -> serde_json::Value {
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{said}");
    let found: serde_json::Value = serde_json::from_slice(&out.stdout).expect("JSON");
    found["ids"].clone()
}

#[test]
fn a_model_is_fetched_once_by_its_id_and_then_needs_no_network() {
    for shards in [1, 3] {
        let place = tempfile::tempdir().expect("dir");
        let repo = place.path().join("repo");
        std::fs::create_dir(&repo).expect("create");
        write_hf(&Tiny::default(), &repo, Dtype::F32, shards);
        let hub = serve(repo);
        let online = [("HF_ENDPOINT", &*hub.endpoint), ("HF_TOKEN", "secret")];
        let first = ids(&generate(place.path(), &online));
        let seen = hub.behaviour.seen.lock().expect("lock").clone();
        assert!(
            seen.iter().all(|(_, token)| *token),
            "a request without the token: {seen:?}"
        );
        let offline = [
            ("HF_ENDPOINT", "http://127.0.0.1:9"),
            ("HF_HUB_OFFLINE", "1"),
        ];
        assert_eq!(ids(&generate(place.path(), &offline)), first);
    }
}

/// A cache as huggingface_hub leaves it: one commit, and a reference to it.
fn cached(hub: &Path, commit: &str, reference: &str, content: &str) {
    let folder = hub.join("models--owner--name");
    let snapshot = folder.join("snapshots").join(commit);
    std::fs::create_dir_all(&snapshot).expect("create");
    write_hf(&Tiny::default(), &snapshot, Dtype::F32, 1);
    let reference = folder.join("refs").join(reference);
    std::fs::create_dir_all(reference.parent().expect("parent")).expect("create");
    std::fs::write(reference, content).expect("write");
}

#[test]
fn a_cache_that_huggingface_hub_filled_needs_no_network() {
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let place = tempfile::tempdir().expect("dir");
    let hub = place.path().join("hf/hub");
    let line = format!("{commit}\n");
    cached(&hub, commit, "main", &line); // copied by hand, with an end of line
    cached(&hub, commit, "refs/pr/7", commit);
    let run = |id: &str, more: &[(&str, &str)]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_scylla"));
        command
            .args([
                "generate",
                "--target",
                id,
                "--prompt-ids",
                "5,6",
                "--max-new-tokens",
                "4",
                "--json",
            ])
            .env("HF_HOME", place.path().join("hf"))
            .env("SCYLLA_CACHE", place.path().join("cache"))
            .env("HF_ENDPOINT", "http://127.0.0.1:9")
            .env_remove("HF_TOKEN");
        for key in [
            "HF_HUB_OFFLINE",
            "SCYLLA_OFFLINE",
            "TRANSFORMERS_OFFLINE",
            "HF_HUB_CACHE",
            "HUGGINGFACE_HUB_CACHE",
        ] {
            command.env_remove(key);
        }
        command.envs(more.iter().copied()).output().expect("starts")
    };
    let said = |out: &Output| String::from_utf8_lossy(&out.stderr).into_owned();
    let first = ids(&run("owner/name", &[("HF_HUB_OFFLINE", "1")]));
    for word in ["ON", "yes", "True"] {
        assert_eq!(ids(&run("owner/name", &[("HF_HUB_OFFLINE", word)])), first);
    }
    let by_commit = format!("owner/name@{commit}");
    for id in [&*by_commit, "owner/name@refs/pr/7"] {
        assert_eq!(ids(&run(id, &[("HF_HUB_OFFLINE", "1")])), first, "{id}");
    }
    let moved = place.path().join("elsewhere");
    std::fs::rename(&hub, &moved).expect("rename");
    let moved = moved.to_string_lossy().into_owned();
    for key in ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"] {
        assert_eq!(
            ids(&run(
                "owner/name",
                &[(key, &moved), ("HF_HUB_OFFLINE", "1")]
            )),
            first,
            "{key}"
        );
    }
    // With the network on and down: told, file by file, and decoded.
    let down = run("owner/name", &[("HF_HUB_CACHE", &moved)]);
    assert_eq!(ids(&down), first);
    assert!(
        said(&down).contains("tokenizer.json") && said(&down).contains("taken as not there"),
        "{}",
        said(&down)
    );
    // What huggingface_hub has noted as absent is not asked for.
    let noted = Path::new(&moved)
        .join("models--owner--name/.no_exist")
        .join(commit);
    std::fs::create_dir_all(&noted).expect("create");
    std::fs::write(noted.join("tokenizer.json"), "").expect("write");
    let down = run("owner/name", &[("HF_HUB_CACHE", &moved)]);
    assert!(
        !said(&down).contains("tokenizer.json of"),
        "{}",
        said(&down)
    );
    // A false value is no order to stay offline.
    for word in ["false", "0", "no", "off", ""] {
        let out = run(
            "owner/other",
            &[("HF_HUB_OFFLINE", word), ("HF_HUB_CACHE", &moved)],
        );
        assert!(
            said(&out).contains("could not be fetched"),
            "{word}: {}",
            said(&out)
        );
    }
    let out = run(
        "owner/other",
        &[("HF_HUB_OFFLINE", "1"), ("HF_HUB_CACHE", &moved)],
    );
    assert!(
        said(&out).contains("switched off") && said(&out).contains("models--owner--other"),
        "{}",
        said(&out)
    );
}

#[test]
fn a_download_that_breaks_off_is_finished_by_the_next_call() {
    let place = tempfile::tempdir().expect("dir");
    let repo = place.path().join("repo");
    std::fs::create_dir(&repo).expect("create");
    write_hf(&Tiny::default(), &repo, Dtype::F32, 1);
    let hub = serve(repo);
    let broken = &hub.behaviour.broken;
    broken
        .lock()
        .expect("lock")
        .insert("model.safetensors".into());
    let online = [("HF_ENDPOINT", &*hub.endpoint)];
    let out = generate(place.path(), &online);
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success());
    assert!(
        said.contains("model.safetensors") && said.contains("network"),
        "{said}"
    );
    ids(&generate(place.path(), &online));
}

#[test]
fn an_id_that_the_hub_does_not_know_is_named() {
    let place = tempfile::tempdir().expect("dir");
    let hub = serve(place.path().join("nothing"));
    let out = generate(place.path(), &[("HF_ENDPOINT", &*hub.endpoint)]);
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(
        !out.status.success() && said.contains("owner/name"),
        "{said}"
    );
}
