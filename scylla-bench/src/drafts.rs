//! The drafts that have weights, made for a loaded target from their settings in an experiment.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use scylla_core::assets;
use scylla_core::files::read_text;
use scylla_core::model::{LoadOptions, ModelFiles, WeightForm, load_on};
use scylla_core::text::Tokenizer;
use scylla_draft::network::{self, DraftHost, DraftLm, NODES, Network};
use scylla_draft::tree::{TreeDraft, TreeKind, TreeSettings};
use serde::Deserialize;
use toml::Table;

use crate::cli::warn;
use crate::context::{DraftContext, parse};
use crate::{Error, Result};

/// Settings of a draft with weights, beside those of its tree.
#[derive(Deserialize, Default)]
#[serde(default)]
struct WeightSettings {
    /// Form of its weights.
    weights: WeightForm,
    /// Layers whose inputs an EAGLE-3 draft reads.
    taps: Option<Vec<usize>>,
    /// File with the target ids that it may propose, the most frequent first.
    head: Option<PathBuf>,
    /// How many of them; without a file, the lowest ids.
    head_size: Option<usize>,
}

/// The file of a truncated head's tokens in a draft's folder.
pub(crate) const HEAD: &str = "head.txt";

const KEYS: [&str; 4] = ["weights", "taps", "head", "head_size"];

/// Takes a draft's own settings out of its table; the rest is the tree's, which fits how text is sampled where nothing is said and
/// the rule takes what is drawn.
fn settings(
    context: &DraftContext<'_>,
    mut table: Table,
) -> Result<(WeightSettings, TreeSettings)> {
    let own: WeightSettings = parse("draft", take(&mut table, &KEYS))?;
    let mut tree: TreeSettings = parse("draft", table.clone())?;
    if context.drawn && !table.contains_key("tree") {
        tree.tree = TreeKind::Auto;
    }
    Ok((own, tree))
}

/// Takes the settings of some names out of a table.
pub(crate) fn take(table: &mut Table, keys: &[&str]) -> Table {
    let taken = keys.iter();
    taken
        .filter_map(|&key| Some((key.to_string(), table.remove(key)?)))
        .collect()
}

/// The settings of a draft that knows only some of the keys.
fn without(keys: &[&str], name: &str, table: &Table) -> Result<()> {
    match keys.iter().find(|key| table.contains_key(**key)) {
        Some(key) => Err(Error::Experiment(format!(
            "[draft]: draft `{name}` has no setting `{key}`"
        ))),
        None => Ok(()),
    }
}

/// The environment variable that names the folder of the shipped drafts.
const SHIPPED: &str = "SCYLLA_DRAFTS";

/// The shipped draft of a name: in the folder that [`SHIPPED`] names, or among the sources that this program was built from.
pub(crate) fn shipped(name: &str) -> Option<PathBuf> {
    let folder = match std::env::var_os(SHIPPED) {
        Some(folder) => PathBuf::from(folder),
        None => {
            let sources = Path::new(env!("CARGO_MANIFEST_DIR")).parent()?;
            sources.join("assets/drafts")
        }
    };
    let dir = folder.join(if name == "hybrid" { "eagle3" } else { name });
    dir.join("config.json").is_file().then_some(dir)
}

/// Where the draft's weights lie; the shipped ones, where none are named.
fn weights_of(context: &DraftContext<'_>, name: &str) -> Result<PathBuf> {
    match (&context.dir, shipped(name)) {
        (Some(dir), _) => Ok(assets::resolve(&dir.to_string_lossy(), &mut |_| {})?),
        (None, Some(dir)) => Ok(dir),
        (None, None) => Err(Error::Experiment(format!(
            "draft `{name}` needs its weights: --draft {name}:DIR (draft.dir); {SHIPPED} names the folder of shipped drafts"
        ))),
    }
}

/// The ids of a truncated head, for a draft whose weights lie in `dir`.
fn head(
    context: &DraftContext<'_>,
    dir: &Path,
    own: &WeightSettings,
) -> Result<Option<Arc<[u32]>>> {
    let known = context.session.known_tokens();
    // What training leaves beside a draft with a truncated head.
    let beside = Some(dir.join(HEAD)).filter(|path| path.is_file());
    let mut ids: Vec<u32> = match (own.head.as_ref().or(beside.as_ref()), own.head_size) {
        (None, None) => return Ok(None),
        (Some(path), _) => read_ids(path)?,
        // Byte-level vocabularies list their merges by frequency; the ends of sequences are proposed too.
        (None, Some(size)) => {
            let eos = context.session.eos.iter().copied();
            let low = 0..known as u32;
            let others = low.filter(|id| !context.session.eos.contains(id));
            eos.chain(others).take(size).collect()
        }
    };
    if let Some(size) = own.head_size {
        if size == 0 || size > ids.len() {
            return Err(Error::Experiment(format!(
                "[draft]: head_size {size} of {} ids",
                ids.len()
            )));
        }
        ids.truncate(size);
    }
    ids.sort_unstable();
    Ok(Some(ids.into()))
}

/// The tokens of the truncated head that training has left in a draft's folder.
pub(crate) fn kept_head(dir: &Path) -> Result<Option<Vec<u32>>> {
    let path = dir.join(HEAD);
    path.is_file().then(|| read_ids(&path)).transpose()
}

/// Reads ids, one per line; what follows an id on its line (a count) is not looked at.
fn read_ids(path: &Path) -> Result<Vec<u32>> {
    let text = read_text(path)?;
    let lines = text
        .lines()
        .enumerate()
        .filter(|(_, l)| !l.trim().is_empty());
    lines
        .map(|(i, line)| {
            let id = line.split_whitespace().next().unwrap_or_default();
            let bad = |_| Error::file(path, format!("line {}: `{id}` is no token id", i + 1));
            id.parse().map_err(bad)
        })
        .collect()
}

fn host(context: &DraftContext<'_>, dir: &Path, own: &WeightSettings) -> Result<DraftHost> {
    Ok(DraftHost {
        known: context.session.known_tokens(),
        weights: own.weights,
        head: head(context, dir, own)?,
        ..DraftHost::of(&context.session.target)
    })
}

/// What a draft's folder says of it; nothing, where that cannot be read: whoever loads it says so.
pub(crate) fn config_of(dir: &Path) -> serde_json::Value {
    let text = std::fs::read_to_string(dir.join("config.json")).unwrap_or_default();
    serde_json::from_str(&text).unwrap_or_default()
}

/// A draft that was trained for another target works, and accepts little.
fn warn_of_other_target(dir: &Path, context: &DraftContext<'_>) -> Result<()> {
    let json = config_of(dir);
    let Some(hash) = json.get("target_sha256").and_then(|v| v.as_str()) else {
        return Ok(());
    };
    let own = context.target_hash()?;
    if hash != own {
        warn(&format!(
            "{} was made for the target with sha256 {hash}; this one has {own}",
            dir.display()
        ));
    }
    Ok(())
}

fn feature<N: Network + 'static>(
    name: &str,
    context: &DraftContext<'_>,
    table: Table,
    load: impl FnOnce(&Path, Option<&[usize]>, &DraftHost) -> scylla_core::Result<N>,
) -> Result<TreeDraft> {
    let (own, tree) = settings(context, table)?;
    let dir = weights_of(context, name)?;
    warn_of_other_target(&dir, context)?;
    let network = load(&dir, own.taps.as_deref(), &host(context, &dir, &own)?)?;
    network.notes().iter().for_each(|note| warn(note));
    Ok(TreeDraft::new(network, &tree)?)
}

/// One that reads no layers of the target's but the last.
fn untapped<N: Network + 'static>(
    name: &str,
    context: &DraftContext<'_>,
    table: Table,
    load: impl FnOnce(&Path, &DraftHost) -> scylla_core::Result<N>,
) -> Result<TreeDraft> {
    without(&["taps"], name, &table)?;
    feature(name, context, table, |dir, _, host| load(dir, host))
}

/// Names of the drafts that grow trees with a network.
pub(crate) const NETWORKS: [&str; 5] = ["draft-lm", "eagle2", "eagle3", "hass", "scylla"];

/// A draft that grows trees with a network, by one of [`NETWORKS`].
pub(crate) fn with_network(
    name: &str,
    context: &DraftContext<'_>,
    table: Table,
) -> Result<TreeDraft> {
    match name {
        "draft-lm" => draft_lm(context, table),
        "eagle2" => untapped(name, context, table, network::eagle),
        "eagle3" => feature(name, context, table, network::eagle3),
        "hass" => untapped(name, context, table, network::hass),
        "scylla" => untapped(name, context, table, network::scylla),
        _ => Err(scylla_core::Error::unknown("draft with a network", name, NETWORKS).into()),
    }
}

/// Which of [`NETWORKS`] a folder holds, where its files say it.
pub(crate) fn network_of(context: &DraftContext<'_>) -> Result<&'static str> {
    let dir = weights_of(context, "hybrid")?;
    let json = config_of(&dir);
    let said = json["architectures"][0].as_str().unwrap_or_default();
    match said {
        _ if said.ends_with("Eagle3") => Ok("eagle3"),
        _ if said.starts_with("Scylla") => Ok("scylla"),
        _ => Err(Error::Experiment(format!(
            "[draft]: {} does not say which network it holds; draft.network is one of {}",
            dir.display(),
            NETWORKS.join(", ")
        ))),
    }
}

/// A whole language model; it must have the target's tokenizer.
fn draft_lm(context: &DraftContext<'_>, table: Table) -> Result<TreeDraft> {
    without(&["taps", "head", "head_size"], "draft-lm", &table)?;
    let (own, tree) = settings(context, table)?;
    let files = ModelFiles::open(&weights_of(context, "draft-lm")?)?;
    match (&context.session.tokenizer, Tokenizer::of_model(&files)?) {
        (Some(ours), Some(theirs)) => check_same(ours, &theirs, &files.path)?,
        (ours, theirs) => {
            let absent = match (ours, theirs) {
                (None, Some(_)) => "the target has no tokenizer",
                (Some(_), None) => "the draft model has no tokenizer",
                _ => "neither the draft model nor its target has a tokenizer",
            };
            warn(&format!(
                "{}: {absent}, so that both mean the same by a token could not be checked",
                files.path.display()
            ));
        }
    }
    let options = LoadOptions {
        weights: own.weights,
        context: (context.target.context + NODES).min(files.config.context),
        ..context.session.options.clone()
    };
    let executor = Arc::clone(&context.session.target.executor);
    let model = load_on(&files, &options, executor)?;
    let known = context.session.known_tokens();
    let network = DraftLm::new(model.model, model.weight_bytes, context.target.vocab, known)?;
    Ok(TreeDraft::new(network, &tree)?)
}

/// Token by token, special ones too: a vocabulary of the same size may still be another one.
fn check_same(ours: &Tokenizer, theirs: &Tokenizer, path: &Path) -> Result<()> {
    let count = ours.size().max(theirs.size()) as u32;
    let differs = |&id: &u32| {
        ours.token(id) != theirs.token(id) || ours.token_bytes(id) != theirs.token_bytes(id)
    };
    let Some(id) = (0..count).find(differs) else {
        return Ok(());
    };
    let said = |t: &Tokenizer| match t.token(id) {
        None => "not there".to_string(),
        Some(token) => match t.token_bytes(id) {
            Some(_) => format!("{token:?}"),
            None => format!("{token:?}, special"),
        },
    };
    Err(Error::file(
        path,
        format!(
            "the draft model has another tokenizer than its target: token {id} is {}, the target's is {}",
            said(theirs),
            said(ours)
        ),
    ))
}
