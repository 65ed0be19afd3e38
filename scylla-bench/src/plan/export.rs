//! Plans in the forms that engines take.
//!
//! Checked against the parsers of vLLM 0.33.0 (`vllm/v1/spec_decode/dynamic/utils.py`), SGLang 0.5.23
//! (`sglang/srt/speculative/adaptive_spec_params.py`) and llama.cpp v0.5.0 (`common/arg.cpp`). They draft chains here.

use serde_json::{Value, json};

use super::choose::{Choice, Planned};
use crate::{Error, Result};

/// An engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// A table of budgets of this project's experiments.
    Scylla,
    /// vLLM's `--speculative-config`, from 0.24.0 on.
    Vllm,
    /// SGLang's file for `--speculative-adaptive-config`, from 0.5.14 on.
    Sglang,
    /// Flags of llama.cpp's server.
    LlamaCpp,
}

impl Engine {
    /// Whether it drafts chains alone.
    pub fn chains(self) -> bool {
        self != Self::Scylla
    }

    fn names(self) -> (&'static str, [Option<&'static str>; 3]) {
        match self {
            Self::Scylla => ("scylla", [None; 3]),
            Self::Vllm => ("vllm", [Some("eagle"), Some("eagle3"), Some("draft_model")]),
            Self::Sglang => (
                "sglang",
                [Some("EAGLE"), Some("EAGLE3"), Some("STANDALONE")],
            ),
            Self::LlamaCpp => (
                "llama.cpp",
                [None, Some("draft-eagle3"), Some("draft-simple")],
            ),
        }
    }

    /// What it calls a draft.
    fn method(self, draft: &str) -> Result<&'static str> {
        let (engine, names) = self.names();
        let kind = match draft {
            "eagle" | "eagle1" | "eagle2" | "hass" => names[0],
            "eagle3" => names[1],
            "draft-lm" => names[2],
            _ => None,
        };
        kind.ok_or_else(|| {
            Error::Experiment(format!(
                "{engine} has no draft of the kind `{draft}`: a plan for it needs another"
            ))
        })
    }
}

/// A plan in an engine's form, for standard output, and what else its command line needs.
#[derive(Debug, Clone, PartialEq)]
pub struct Exported {
    /// The form.
    pub text: String,
    /// Flags to go with it.
    pub flags: Option<String>,
}

/// Drafted tokens of a chain.
fn steps(choice: &Choice) -> usize {
    choice.budget.total - 1
}

/// From which batch on how many tokens are drafted, the first from 1 on; equal neighbours are one.
fn ranges(planned: &Planned) -> Vec<(usize, usize)> {
    let mut all: Vec<(usize, usize)> = Vec::new();
    for choice in &planned.choices {
        let from = if all.is_empty() { 1 } else { choice.batch };
        if all.last().is_none_or(|last| last.1 != steps(choice)) {
            all.push((from, steps(choice)));
        }
    }
    all
}

fn draft_of(planned: &Planned) -> Option<&str> {
    planned.choices.iter().find_map(|c| c.draft.as_deref())
}

/// A plan for an engine, whose draft lies at `model`.
///
/// # Errors
/// If the engine has no such draft, or the plan drafts with several, or nowhere.
pub fn export(planned: &Planned, engine: Engine, model: &str) -> Result<Exported> {
    let of = |c: &Choice| (c.draft.clone(), c.layers);
    let mut used: Vec<_> = planned
        .choices
        .iter()
        .filter(|c| c.draft.is_some())
        .map(of)
        .collect();
    used.dedup();
    if used.len() > 1 {
        return Err(Error::Experiment(
            "the plan drafts with another draft at other batches, and an engine loads one: plan for one".into(),
        ));
    }
    if engine == Engine::Scylla {
        let row = |c: &Choice| {
            let (b, t) = (c.batch, c.budget);
            format!(
                "    {{ batch = {b}, total = {}, width = {}, depth = {} }},\n",
                t.total, t.width, t.depth
            )
        };
        let rows: String = planned.choices.iter().map(row).collect();
        let text = format!("[budget]\npolicy = \"table\"\ntable = [\n{rows}]\n");
        return Ok(Exported { text, flags: None });
    }
    let Some(draft) = draft_of(planned) else {
        return Err(Error::Experiment(
            "drafting pays at no batch that was asked for: start the engine without it".into(),
        ));
    };
    let method = engine.method(draft)?;
    let ranges = ranges(planned);
    let most = ranges.iter().map(|r| r.1).max().unwrap_or(1).max(1);
    let last = planned.choices.last().map_or(1, |c| c.batch);
    Ok(match engine {
        Engine::Scylla | Engine::Vllm => {
            let ends = ranges.iter().skip(1).map(|r| r.0 - 1).chain([last]);
            let table: Vec<[usize; 3]> = ranges
                .iter()
                .zip(ends)
                .map(|(&(from, steps), to)| [from, to.max(from), steps])
                .collect();
            let config = json!({
                "method": method,
                "model": model,
                "num_speculative_tokens": most,
                "num_speculative_tokens_per_batch_size": table,
            });
            Exported {
                flags: Some(format!("--speculative-config '{config}'")),
                text: format!("{config}\n"),
            }
        }
        Engine::Sglang => {
            // One candidate an entry: the number is the plan's, and not moved by what is accepted.
            let mut file = serde_json::Map::new();
            for (from, steps) in &ranges {
                file.insert(from.to_string(), json!({ "candidate_steps": [steps] }));
            }
            file.insert("ema_alpha".into(), json!(0.2));
            file.insert("update_interval".into(), json!(5));
            file.insert("warmup_batches".into(), json!(10));
            Exported {
                text: format!("{}\n", Value::Object(file)),
                flags: Some(format!(
                    "--speculative-algorithm {method} --speculative-draft-model-path {model} --speculative-num-steps {most} \
                     --speculative-eagle-topk 1 --speculative-num-draft-tokens {} --speculative-adaptive \
                     --speculative-adaptive-config FILE --max-running-requests {last}",
                    most + 1
                )),
            }
        }
        Engine::LlamaCpp => {
            // It knows one number for all batches: that of the first one planned. Its 0 drafts one token: then no flag is said.
            let first = planned.choices.first().map_or(0, steps);
            let text = match first {
                0 => String::new(),
                n => format!(
                    "--spec-type {method} --spec-draft-model {model} --spec-draft-n-max {n} --spec-draft-n-min 0 --spec-draft-p-min 0.0\n"
                ),
            };
            Exported { text, flags: None }
        }
    })
}

#[cfg(test)]
mod tests {
    use scylla_core::tree::Budget;

    use super::super::choose::Speed;
    use super::*;

    fn plan(draft: &str, steps: &[(usize, usize)]) -> Planned {
        let speed = Speed {
            value: 1.0,
            low: 1.0,
            high: 1.0,
        };
        let choice = |&(batch, steps): &(usize, usize)| Choice {
            batch,
            draft: (steps > 0).then(|| draft.to_string()),
            layers: usize::from(steps > 0),
            tokens: None,
            budget: match steps {
                0 => Budget::OFF,
                n => Budget::chain(n),
            },
            tau: 1.0,
            tokens_per_s: speed,
            plain_tokens_per_s: 1.0,
        };
        Planned {
            choices: steps.iter().map(choice).collect(),
            off_from_batch: None,
        }
    }

    /// The rules of vLLM 0.33.0: three whole numbers an entry, from 1 on, rising, without overlap; no draft length above the
    /// configured one.
    fn vllm_takes(config: &Value) {
        let most = config["num_speculative_tokens"].as_u64().expect("a number");
        assert!(most > 0);
        let table = config["num_speculative_tokens_per_batch_size"]
            .as_array()
            .expect("a list");
        let mut next = 1;
        for entry in table {
            let entry: Vec<u64> = entry
                .as_array()
                .expect("a list")
                .iter()
                .map(|v| v.as_u64().expect("whole"))
                .collect();
            let [start, end, steps] = entry[..] else {
                panic!("{entry:?}")
            };
            assert!(start == next && start <= end && steps <= most, "{config}");
            next = end + 1;
        }
        for key in config.as_object().expect("an object").keys() {
            let known = [
                "method",
                "model",
                "num_speculative_tokens",
                "num_speculative_tokens_per_batch_size",
            ];
            assert!(
                known.contains(&key.as_str()),
                "vLLM refuses unknown keys: {key}"
            );
        }
    }

    #[test]
    fn each_engine_gets_what_its_parser_takes() {
        let planned = plan("eagle3", &[(1, 3), (2, 3), (64, 1), (128, 0), (512, 0)]);
        let vllm = export(&planned, Engine::Vllm, "draft").expect("vLLM");
        let config: Value = serde_json::from_str(&vllm.text).expect("JSON");
        vllm_takes(&config);
        assert_eq!(config["method"], "eagle3");
        assert_eq!(
            config["num_speculative_tokens_per_batch_size"],
            json!([[1, 63, 3], [64, 127, 1], [128, 512, 0]])
        );

        let sglang = export(&planned, Engine::Sglang, "draft").expect("SGLang");
        let file: Value = serde_json::from_str(&sglang.text).expect("JSON");
        let mut found = Vec::new();
        for (key, entry) in file.as_object().expect("an object") {
            if key.bytes().all(|b| b.is_ascii_digit()) {
                let steps = entry["candidate_steps"].as_array().expect("a list");
                assert!(!steps.is_empty() && steps.iter().all(Value::is_u64));
                found.push((key.parse::<usize>().expect("a batch"), steps[0].as_u64()));
            }
        }
        found.sort_unstable();
        assert_eq!(found, [(1, Some(3)), (64, Some(1)), (128, Some(0))]);
        let flags = sglang.flags.expect("flags");
        // It must be among the candidates, and one more token is verified.
        assert!(flags.contains("--speculative-num-steps 3 "), "{flags}");
        assert!(
            flags.contains("--speculative-num-draft-tokens 4 "),
            "{flags}"
        );

        let llama = export(&planned, Engine::LlamaCpp, "d.gguf")
            .expect("llama.cpp")
            .text;
        assert!(
            llama.contains("--spec-type draft-eagle3 ") && llama.contains("--spec-draft-n-max 3 ")
        );

        let own = export(&planned, Engine::Scylla, "").expect("own").text;
        let own: toml::Table = own.parse().expect("TOML");
        let spec: crate::experiment::BudgetSpec =
            own["budget"].clone().try_into().expect("a budget");
        spec.check().expect("a table");
        assert_eq!(spec.table.len(), 5);
    }

    #[test]
    fn what_an_engine_cannot_run_is_refused() {
        let scylla = plan("scylla", &[(1, 3)]);
        let error = export(&scylla, Engine::Vllm, "d").expect_err("no such draft");
        assert!(error.to_string().contains("`scylla`"), "{error}");
        let never = plan("eagle3", &[(1, 0), (2, 0)]);
        let error = export(&never, Engine::Sglang, "d").expect_err("nowhere");
        assert!(error.to_string().contains("no batch"), "{error}");
        let late = plan("eagle3", &[(1, 0), (8, 2)]);
        assert_eq!(export(&late, Engine::LlamaCpp, "d").expect("none").text, "");
    }
}
