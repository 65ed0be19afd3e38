//! Decoding as tests want it: prompts that are alike in all else.

use std::ops::ControlFlow;

use scylla_core::engine::{Draft, Engine, Options, Output, Parts, Request, decode};
use scylla_core::plugin::{DraftModel, TargetModel};
use scylla_verify::Auto;

/// Decodes prompts, `batch` side by side, each with a random stream of its own; all else is as in `like`. A request that is
/// refused has failed.
pub fn decode_prompts(
    target: &mut dyn TargetModel,
    draft: Option<&mut dyn DraftModel>,
    like: &Request,
    prompts: &[Vec<u32>],
    batch: usize,
) -> Vec<Output> {
    let parts = match draft {
        Some(draft) => Parts::drafted(target, Draft::new("under test", draft), Auto),
        None => Parts::plain(target, Auto),
    };
    let options = Options {
        batch,
        ..Options::default()
    };
    let mut engine = Engine::new(parts, options).expect("an engine");
    let request = |(sequence, prompt): (u64, &Vec<u32>)| Request {
        prompt: prompt.clone(),
        sequence,
        ..like.clone()
    };
    let requests = (0..).zip(prompts).map(request).collect();
    decode(&mut engine, requests, &mut |_| ControlFlow::Continue(()))
}

/// Outputs none of which failed.
///
/// # Panics
/// If one did, with its reason.
pub fn whole(outputs: Vec<Output>) -> Vec<Output> {
    for output in &outputs {
        assert_eq!(output.failed, None);
    }
    outputs
}

/// Why the first of them failed.
///
/// # Panics
/// If it did not.
pub fn refusal(outputs: &[Output]) -> String {
    outputs[0].failed.clone().expect("refused")
}
