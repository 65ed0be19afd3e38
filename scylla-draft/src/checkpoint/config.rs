//! What a draft's network is, one type per network: what loaders, exporters and trainers all go by.

use std::path::Path;

use scylla_core::model::{AttentionInput, LayerSpec, ModelConfig};
use scylla_core::plugin::TargetShape;
use scylla_core::{Error, Result};
use serde_json::Value;

use super::Layout;
use super::eagle3::configured_taps;

/// What all networks have.
#[derive(Debug, Clone, PartialEq)]
pub struct Backbone {
    /// V: the target's vocabulary.
    pub vocab: usize,
    /// H: width of the state that recurs.
    pub hidden: usize,
    /// Positions the draft was made for.
    pub context: usize,
    /// Added to the mean square in the norms.
    pub eps: f32,
    /// The decoder layers.
    pub layers: Vec<LayerSpec>,
}

/// EAGLE-1, EAGLE-2 and HASS: one layer without input norm over `fc(cat(embed(x), f))`.
#[derive(Debug, Clone, PartialEq)]
pub struct EagleConfig {
    /// Its layer.
    pub backbone: Backbone,
}

/// Scylla: EAGLE-2's input, D layers and a final norm.
#[derive(Debug, Clone, PartialEq)]
pub struct ScyllaConfig {
    /// Its layers.
    pub backbone: Backbone,
    /// Whether layer 0 has an input norm.
    pub input_norm_first: bool,
    /// Whether the state recurs before the final norm.
    pub recur_before_norm: bool,
}

/// EAGLE-3: taps reduced by `fc`, a first layer over `cat(norm(embed(x)), norm(g))`, a vocabulary and a head of its own.
#[derive(Debug, Clone, PartialEq)]
pub struct Eagle3Config {
    /// Its layers; the first takes 2 H values.
    pub backbone: Backbone,
    /// Whether its files are named as the speculators library names them.
    pub speculators: bool,
    /// V_d.
    pub draft_vocab: usize,
    /// H_t.
    pub target_hidden: usize,
    /// Layers whose inputs it reads, where it says so.
    pub taps: Option<Vec<usize>>,
    /// How many those are.
    pub tap_count: usize,
    /// Whether the residual stream begins with the normed feature.
    pub norm_before_residual: bool,
    /// Whether all taps are normed as one before `fc` (EAGLE-3.1).
    pub norm_before_fc: bool,
    /// Whether each tap is normed before `fc` (EAGLE-3.1).
    pub fc_norm: bool,
    /// Whether the state recurs after the final norm (EAGLE-3.1).
    pub norm_output: bool,
}

/// The network of a draft.
#[derive(Debug, Clone, PartialEq)]
pub enum DraftConfig {
    /// EAGLE-1, EAGLE-2 and HASS.
    Eagle(EagleConfig),
    /// EAGLE-3.
    Eagle3(Eagle3Config),
    /// Scylla.
    Scylla(ScyllaConfig),
}

impl DraftConfig {
    /// What all networks have.
    pub fn backbone(&self) -> &Backbone {
        match self {
            Self::Eagle(c) => &c.backbone,
            Self::Eagle3(c) => &c.backbone,
            Self::Scylla(c) => &c.backbone,
        }
    }

    /// Which network it is, in which layout.
    pub fn layout(&self) -> Layout {
        match self {
            Self::Eagle(_) => Layout::Eagle,
            Self::Eagle3(c) if c.speculators => Layout::Speculators,
            Self::Eagle3(_) => Layout::Eagle3,
            Self::Scylla(_) => Layout::Scylla,
        }
    }

    /// V_d: the draft's vocabulary.
    pub fn draft_vocab(&self) -> usize {
        match self {
            Self::Eagle3(c) => c.draft_vocab,
            _ => self.backbone().vocab,
        }
    }

    /// What a `config.json` of a layout says, for a target of this shape. `layer` is its decoder layer as plain models
    /// describe theirs.
    ///
    /// # Errors
    /// If a value has another type, or sizes do not fit.
    pub(super) fn read(
        json: &Value,
        layout: Layout,
        layer: ModelConfig,
        target: &TargetShape,
        file: &Path,
    ) -> Result<Self> {
        let options = Options { json, file };
        let backbone = Backbone {
            vocab: layer.vocab,
            hidden: layer.hidden,
            context: layer.context,
            eps: layer.norm_eps,
            layers: layer.layers,
        };
        // Checked whatever the layout, so that a value of another type is never passed over.
        let flags = Flags::read(&options)?;
        let draft_vocab = options.size("draft_vocab_size")?;
        let tap_count = options.size("num_aux_hidden_states")?;
        options.size("target_hidden_size")?;
        let mut config = match layout {
            Layout::Eagle => Self::Eagle(EagleConfig { backbone }),
            Layout::Scylla => Self::Scylla(ScyllaConfig {
                backbone,
                input_norm_first: flags.input_norm_first,
                recur_before_norm: flags.recur_before_norm,
            }),
            Layout::Eagle3 | Layout::Speculators => {
                let taps = configured_taps(json)?;
                let listed = taps.as_ref().map(Vec::len);
                let tap_count = tap_count.or(listed).unwrap_or(3);
                if !(1..=target.layers + 1).contains(&tap_count) {
                    return Err(Error::Invalid(format!(
                        "{tap_count} hidden states make up a feature; expected 1..={} for a target of {} layers",
                        target.layers + 1,
                        target.layers
                    )));
                }
                Self::Eagle3(Eagle3Config {
                    speculators: layout == Layout::Speculators,
                    draft_vocab: draft_vocab.unwrap_or(backbone.vocab),
                    target_hidden: target.hidden,
                    taps,
                    tap_count,
                    norm_before_residual: flags.norm_before_residual,
                    norm_before_fc: flags.norm_before_fc,
                    fc_norm: flags.fc_norm,
                    norm_output: flags.norm_output,
                    backbone,
                })
            }
        };
        let input = config.first_input();
        if let Some(first) = config.backbone_mut().layers.first_mut() {
            first.input = input;
        }
        Ok(config)
    }

    pub(super) fn backbone_mut(&mut self) -> &mut Backbone {
        match self {
            Self::Eagle(c) => &mut c.backbone,
            Self::Eagle3(c) => &mut c.backbone,
            Self::Scylla(c) => &mut c.backbone,
        }
    }

    /// Where the network's first layer gets its attention's input from.
    pub fn first_input(&self) -> AttentionInput {
        match self {
            Self::Scylla(c) if c.input_norm_first => AttentionInput::Normed,
            Self::Eagle(_) | Self::Scylla(_) => AttentionInput::Bare,
            Self::Eagle3(c) => AttentionInput::Beside(2 * c.backbone.hidden),
        }
    }
}

/// The switches of all networks.
struct Flags {
    norm_before_residual: bool,
    norm_before_fc: bool,
    norm_output: bool,
    fc_norm: bool,
    input_norm_first: bool,
    recur_before_norm: bool,
}

impl Flags {
    fn read(options: &Options<'_>) -> Result<Self> {
        let flag = |key: &str| Ok::<_, Error>(options.flag(key)?.unwrap_or(false));
        let nested = options.json.pointer("/eagle_config/norm_before_fc");
        Ok(Self {
            norm_before_residual: flag("norm_before_residual")?,
            // The nested key counts more.
            norm_before_fc: match (nested.and_then(Value::as_bool), flag("norm_before_fc")?) {
                (Some(nested), _) => nested,
                (None, plain) => plain,
            },
            norm_output: flag("norm_output")?,
            fc_norm: flag("fc_norm")?,
            input_norm_first: flag("input_norm_first")?,
            recur_before_norm: flag("recur_before_norm")?,
        })
    }
}

/// What a configuration says beside its layer's shape.
struct Options<'a> {
    json: &'a Value,
    file: &'a Path,
}

impl Options<'_> {
    fn given(&self, key: &str) -> Option<&Value> {
        self.json.get(key).filter(|v| !v.is_null())
    }

    fn wrong(&self, key: &str, found: &Value, expected: &str) -> Error {
        Error::file(
            self.file,
            format!("`{key}` is {found}; expected {expected}"),
        )
    }

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        match self.given(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(found) => Err(self.wrong(key, found, "true or false")),
        }
    }

    fn size(&self, key: &str) -> Result<Option<usize>> {
        match self.given(key) {
            None => Ok(None),
            Some(found) => match found.as_u64().and_then(|v| usize::try_from(v).ok()) {
                Some(size) => Ok(Some(size)),
                None => Err(self.wrong(key, found, "a size")),
            },
        }
    }
}
