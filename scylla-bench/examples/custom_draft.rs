//! A draft of your own: it repeats the last token. Registered, it appears in every command:
//! `cargo run --release --example custom_draft -- bench --set draft.name=echo --set compare=[]`
use scylla_bench::{Registry, cli};
use scylla_core::Result;
use scylla_core::plugin::{Committed, DraftModel, Request, Slot};
use scylla_core::sampling::Sampling;
use scylla_core::tree::{Drawing, Tree};

struct Echo;

impl DraftModel for Echo {
    fn drawing(&self, _: &Sampling) -> Drawing {
        Drawing::Deterministic // point masses: no q needed, exact under any rule
    }
    fn open(&mut self, _: Slot) -> Result<()> {
        Ok(())
    }
    fn close(&mut self, _: Slot) {}
    fn observe(&mut self, _: &[Committed<'_>]) -> Result<()> {
        Ok(()) // a real draft learns the committed tokens and hidden states here
    }
    fn propose(&mut self, requests: &mut [Request<'_>]) -> Result<Vec<Tree>> {
        let chain = |r: &mut Request<'_>| {
            let length = r.budget.levels().min(r.budget.total - 1);
            Ok(Tree::chain(r.root, &vec![r.root; length]))
        };
        requests.iter_mut().map(chain).collect()
    }
}

fn main() {
    let mut registry = Registry::default();
    registry.draft("echo", |_target, _settings| Ok(Box::new(Echo)));
    std::process::exit(cli::run(&registry, std::env::args_os()));
}
