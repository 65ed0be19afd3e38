//! One step: propose, forward, accept, commit.

use std::time::Instant;

use super::request::{check_width, not_exact};
use super::{Accepted, Cycle, Engine, Event, Live, LogitRows, Phases, Step};
use crate::plugin::{
    Committed, Drafting, Forward, Matrix, Outlook, Price, Request as Asked, SlotRows,
    Step as Forwarded, Verdict, Want,
};
use crate::tree::{Budget, Drawing, Tree};
use crate::{Error, Result};

/// What one request runs in a step.
struct Work {
    /// Whose, as an index of those in slots.
    live: usize,
    /// The rows: those of a prompt as a chain without meaning, or a tree.
    tree: Tree,
    /// Whether they are a prompt's, and whether it ends with them.
    prompt: Option<bool>,
    /// Levels that its budget allowed.
    levels: usize,
}

/// What came of it.
struct Run {
    work: Work,
    logits: Matrix,
    taps: Vec<Matrix>,
}

/// Times since the last look.
struct Clock(Instant);

impl Clock {
    fn start() -> Self {
        Self(Instant::now())
    }

    /// Milliseconds since the last look.
    fn lap(&mut self) -> f64 {
        let now = Instant::now();
        let lap = now.duration_since(std::mem::replace(&mut self.0, now));
        lap.as_secs_f64() * 1e3
    }
}

impl Engine<'_> {
    /// Runs one step: lets requests in, runs their trees and what is next of prompts in one forward, and tells what came of
    /// it. Nothing happens where there is nothing to do.
    ///
    /// An error of a target, draft or rule ends the requests it concerns, and the others go on: where a forward or a proposal
    /// fails for several, each is tried alone.
    pub fn step(&mut self) -> Vec<Event> {
        let mut clock = Clock::start();
        self.admit();
        if !self.live.is_empty() {
            let admission = clock.lap();
            self.cycle(clock, admission);
        }
        std::mem::take(&mut self.events)
    }

    fn cycle(&mut self, mut clock: Clock, admission: f64) {
        let mut step = Step {
            step: self.measured.steps,
            ..Step::default()
        };
        step.ms.commit = admission;
        self.measured.steps += 1;
        let mut works = self.prompts();
        let prompt_rows = works.iter().map(|w| w.tree.len()).sum();
        works.extend(self.propose(prompt_rows));
        step.proposing_ms = clock.lap();
        step.ms.propose = step.proposing_ms;
        for work in &works {
            let live = &self.live[work.live];
            let rows = work.tree.len();
            match work.prompt {
                Some(_) => {
                    step.prompts += 1;
                    step.prompt_rows += rows;
                }
                None => {
                    step.batch += 1;
                    step.rows += rows;
                    step.levels = step.levels.max(work.levels);
                    step.positions += rows * live.rows;
                }
            }
        }
        let (runs, whole) = self.forward(works);
        step.ms.forward = clock.lap();
        self.share(&runs, &step);
        let mut spent = Vec::with_capacity(runs.len());
        for Run { work, logits, taps } in runs {
            let (ms, done) = self.finish(&work, (&logits, &taps), &mut step, &mut clock);
            step.ms.add(&ms);
            let live = &mut self.live[work.live];
            match work.prompt {
                Some(_) => live.output.ms.prefill += ms.decode(),
                None => live.output.ms.add(&ms),
            }
            if let Err(e) = done {
                live.fail(e);
            }
            spent.push(logits);
        }
        if whole {
            // All share one memory, which the next forward may use.
            self.parts.target.recycle(Forward {
                logits: spent,
                taps: Vec::new(),
            });
        }
        self.sweep();
        step.ms.commit += clock.lap();
        self.measured.costs.add(&step);
        self.parts.policy.observe(&step);
        self.events.push(Event::Step(step));
    }

    /// The next rows of prompts, the earliest first.
    fn prompts(&self) -> Vec<Work> {
        let mut left = self.options.prompt_rows;
        let mut works = Vec::new();
        for (index, live) in self.live.iter().enumerate() {
            if live.decodes() || left == 0 {
                continue;
            }
            let rest = &live.request.prompt[live.rows..];
            let count = rest.len().min(left);
            left -= count;
            works.push(Work {
                live: index,
                tree: Tree::chain(rest[0], &rest[1..count]),
                prompt: Some(count == rest.len()),
                levels: 0,
            });
        }
        works
    }

    /// What each request that decodes may draft.
    fn budgets(&mut self, decoding: &[usize], prompt_rows: usize) -> Vec<Budget> {
        let context = self.shape.context;
        let most = |live: &Live| {
            let left = live.request.max_new_tokens - live.output.ids.len();
            let room = context - live.tokens.len();
            // A cycle adds the bonus too, so drafting the last token would be wasted.
            live.request.budget.within(left.min(room) - 1, room + 1)
        };
        let Some(draft) = &self.parts.draft else {
            return vec![Budget::OFF; decoding.len()];
        };
        let requests: Vec<Drafting<'_>> = decoding
            .iter()
            .map(|&index| {
                let live = &self.live[index];
                Drafting {
                    most: most(live),
                    positions: live.rows,
                    acceptance: &live.acceptance,
                }
            })
            .collect();
        let chosen = self.parts.policy.budgets(&Outlook {
            requests: &requests,
            prompt_rows,
            acceptance: &self.measured.acceptance,
            costs: &self.measured.costs,
        });
        let priced = self.parts.policy.price().is_some();
        let mut chosen = chosen.into_iter();
        let within = |(r, &live): (&Drafting<'_>, &usize)| {
            let sampling = &self.live[live].request.sampling;
            let weighs = priced && draft.model.weighs(sampling);
            let most = r.most;
            let budget = match chosen.next().unwrap_or(Budget::OFF) {
                budget if weighs && budget.levels() > 0 => most,
                budget => budget,
            };
            Budget {
                width: budget.width.clamp(1, most.width),
                ..budget.within(most.levels(), most.total)
            }
        };
        requests.iter().zip(decoding).map(within).collect()
    }

    /// A tree for each request that decodes; one whose draft fails ends.
    fn propose(&mut self, prompt_rows: usize) -> Vec<Work> {
        let decoding = |index: &usize| self.live[*index].decodes();
        let decoding: Vec<usize> = (0..self.live.len()).filter(decoding).collect();
        let budgets = self.budgets(&decoding, prompt_rows);
        let mut works: Vec<Work> = decoding
            .iter()
            .zip(&budgets)
            .map(|(&live, budget)| Work {
                live,
                tree: Tree::root(self.live[live].root()),
                prompt: None,
                levels: budget.levels(),
            })
            .collect();
        let asked: Vec<usize> = (0..works.len())
            .filter(|&i| budgets[i].levels() > 0)
            .collect();
        if !asked.is_empty() {
            let trees = match self.draft(&asked, &decoding, &budgets) {
                Err(_) if asked.len() > 1 => {
                    let alone = asked.iter().map(|i| self.draft(&[*i], &decoding, &budgets));
                    let alone: Vec<_> = alone.collect();
                    let one = |found: Result<Vec<Result<Tree>>>| match found {
                        Ok(mut trees) => trees.pop().unwrap_or_else(|| Err(no_tree(0, 1))),
                        Err(e) => Err(e),
                    };
                    alone.into_iter().map(one).collect()
                }
                Err(e) => vec![Err(e)],
                Ok(trees) => trees,
            };
            for (&i, tree) in asked.iter().zip(trees) {
                match tree {
                    Ok(tree) => works[i].tree = tree,
                    Err(e) => self.live[decoding[i]].fail(e),
                }
            }
        }
        works.retain(|work| self.live[work.live].ending.is_none());
        works
    }

    /// Asks the draft for the trees of some of those that decode; an inner error is that of one tree.
    fn draft(
        &mut self,
        asked: &[usize],
        decoding: &[usize],
        budgets: &[Budget],
    ) -> Result<Vec<Result<Tree>>> {
        let Some(draft) = &mut self.parts.draft else {
            return Ok(Vec::new());
        };
        let mut requests = Vec::with_capacity(asked.len());
        let mut next = asked.iter().peekable();
        for (index, live) in self.live.iter_mut().enumerate() {
            let Some(&&i) = next.peek() else { break };
            if decoding[i] != index {
                continue;
            }
            next.next();
            live.chance.at(live.tokens.len());
            requests.push(Asked {
                slot: live.slot,
                root: live.tokens[live.tokens.len() - 1],
                budget: budgets[i],
                sampling: &live.request.sampling,
                chance: &mut live.chance,
            });
        }
        match self.parts.policy.price() {
            Some(price) => draft.model.price(price),
            None => draft.model.price(&Price::default()),
        }
        let trees = draft.model.propose(&mut requests)?;
        drop(requests);
        if trees.len() != asked.len() {
            return Err(no_tree(trees.len(), asked.len()));
        }
        let checked = asked.iter().zip(trees).map(|(&i, tree)| {
            let live = &self.live[decoding[i]];
            tree.check(live.root(), self.shape.vocab, budgets[i])?;
            if live.request.lossy || tree.is_empty() {
                return Ok(tree);
            }
            let (rule, drawing) = (&*live.settled.rule, tree.drawing);
            if !live.settled.drawings.contains(&drawing) {
                let declared = live.settled.drawings.iter().map(Drawing::to_string);
                let declared: Vec<String> = declared.collect();
                let found = format!("{drawing} trees, declared as {},", declared.join(" or "));
                return Err(not_exact(rule, &draft.name, found));
            }
            let width = budgets[i].width;
            check_width(rule, &draft.name, drawing, width, &live.request.sampling)?;
            Ok(tree)
        });
        Ok(checked.collect())
    }

    /// Runs all rows through the target; whether that was one forward for all.
    fn forward(&mut self, works: Vec<Work>) -> (Vec<Run>, bool) {
        if works.is_empty() {
            return (Vec::new(), false);
        }
        let failed = match self.forward_all(&works) {
            Ok(found) => {
                let run = |(work, (logits, taps))| Run { work, logits, taps };
                return (works.into_iter().zip(found).map(run).collect(), true);
            }
            Err(e) => e,
        };
        works.iter().for_each(|work| self.drop_rows(work));
        if let [work] = &works[..] {
            self.live[work.live].fail(failed);
            return (Vec::new(), false);
        }
        let mut runs = Vec::new();
        for work in works {
            match self.forward_all(std::slice::from_ref(&work)) {
                Ok(mut found) => {
                    if let Some((logits, taps)) = found.pop() {
                        runs.push(Run { work, logits, taps });
                    }
                }
                Err(e) => {
                    self.drop_rows(&work);
                    self.live[work.live].fail(e);
                }
            }
        }
        (runs, false)
    }

    /// Drops what a forward that failed may have left in a slot.
    fn drop_rows(&mut self, work: &Work) {
        let slot = self.live[work.live].slot;
        // Where even that fails, the next forward does too, and ends the request.
        let _ = self.parts.target.commit(slot, &[]);
    }

    /// Logits and taps of each, from one forward.
    fn forward_all(&mut self, works: &[Work]) -> Result<Vec<(Matrix, Vec<Matrix>)>> {
        let parents: Vec<Vec<Option<usize>>> = works
            .iter()
            .map(|work| {
                let tree = &work.tree;
                let above = |i: usize| (i > 0).then(|| tree.parents[i]);
                match work.prompt {
                    Some(_) => Vec::new(), // a chain
                    None => (0..tree.len()).map(above).collect(),
                }
            })
            .collect();
        let slots = works.iter().zip(&parents).map(|(work, parents)| SlotRows {
            slot: self.live[work.live].slot,
            tokens: &work.tree.tokens,
            parents,
            want: match work.prompt {
                None => Want::All,
                Some(true) => Want::Last,
                Some(false) => Want::None,
            },
        });
        let found = self.parts.target.forward(&Forwarded {
            slots: slots.collect(),
            taps: &self.taps,
        })?;
        let (logits, taps) = (found.logits.len(), found.taps.len());
        if (logits, taps) != (works.len(), works.len()) {
            return Err(Error::Invalid(format!(
                "the target returned logits of {logits} slots and taps of {taps} for {}",
                works.len()
            )));
        }
        Ok(found.logits.into_iter().zip(found.taps).collect())
    }

    /// Gives requests their shares of what was done for all: of the forward by rows, of drafting in equal parts.
    fn share(&mut self, runs: &[Run], step: &Step) {
        let rows = (step.rows + step.prompt_rows).max(1) as f64;
        for Run { work, .. } in runs {
            let forward = step.ms.forward * work.tree.len() as f64 / rows;
            let ms = &mut self.live[work.live].output.ms;
            match work.prompt {
                Some(_) => ms.prefill += forward,
                None => {
                    ms.forward += forward;
                    ms.propose += step.proposing_ms / step.batch.max(1) as f64;
                }
            }
        }
    }

    /// Accepts, keeps rows and tokens, and tells the draft: all that follows a forward for one request.
    fn finish(
        &mut self,
        work: &Work,
        (logits, taps): (&Matrix, &[Matrix]),
        step: &mut Step,
        clock: &mut Clock,
    ) -> (Phases, Result<()>) {
        let mut ms = Phases::default();
        let done = match work.prompt {
            Some(ends) => self.finish_prompt(work, ends, (logits, taps), clock, &mut ms),
            None => self.finish_tree(work, (logits, taps), step, clock, &mut ms),
        };
        ms.commit += clock.lap();
        (ms, done)
    }

    fn finish_prompt(
        &mut self,
        work: &Work,
        ends: bool,
        (logits, taps): (&Matrix, &[Matrix]),
        clock: &mut Clock,
        ms: &mut Phases,
    ) -> Result<()> {
        let count = work.tree.len();
        let bonus = match ends {
            false => None,
            true => {
                let live = &mut self.live[work.live];
                live.chance.at(live.tokens.len());
                let tree = Tree::root(live.root());
                Some(verify(live, &tree, logits, self.shape.vocab)?.bonus)
            }
        };
        ms.accept += clock.lap();
        let path: Vec<usize> = (0..count).collect();
        let live = &mut self.live[work.live];
        self.parts.target.commit(live.slot, &path)?;
        live.rows += count;
        ms.commit += clock.lap();
        let mut tokens = live.request.prompt[live.told.min(live.rows)..live.rows].to_vec();
        tokens.extend(bonus);
        live.told = live.rows;
        self.observe(work.live, &tokens, &path, taps)?;
        ms.propose += clock.lap();
        if let Some(bonus) = bonus {
            let live = &mut self.live[work.live];
            live.keep(&[bonus], self.shape.context, &mut self.events);
        }
        Ok(())
    }

    fn finish_tree(
        &mut self,
        work: &Work,
        (logits, taps): (&Matrix, &[Matrix]),
        step: &mut Step,
        clock: &mut Clock,
        ms: &mut Phases,
    ) -> Result<()> {
        let tree = &work.tree;
        let live = &mut self.live[work.live];
        if work.levels == 0 {
            live.chance.at(live.tokens.len()); // else the draft's draws came first
        }
        let verdict = verify(live, tree, logits, self.shape.vocab)?;
        ms.accept += clock.lap();
        let mut path = vec![0];
        path.extend(&verdict.path);
        self.parts.target.commit(live.slot, &path)?;
        live.rows += path.len();
        let mut tokens: Vec<u32> = verdict.path.iter().map(|&n| tree.tokens[n]).collect();
        tokens.push(verdict.bonus);
        ms.commit += clock.lap();
        self.observe(work.live, &tokens, &path, taps)?;
        ms.propose += clock.lap();
        let live = &mut self.live[work.live];
        let accepted = verdict.path.len();
        if self.parts.draft.is_some() {
            live.acceptance.add(work.levels, tree, accepted);
            self.measured.acceptance.add(work.levels, tree, accepted);
        }
        step.requests.push(Accepted {
            request: live.id,
            nodes: tree.len(),
            accepted,
        });
        if live.request.trees {
            self.events.push(Event::Cycle {
                request: live.id,
                tree: tree.clone(),
                verdict: verdict.clone(),
            });
        }
        let kept = live.keep(&tokens, self.shape.context, &mut self.events);
        let accepted = accepted.min(kept);
        let (ranks, offered) = among_siblings(tree, &verdict.path[..accepted]);
        live.output.cycles.push(Cycle {
            step: step.step,
            nodes: tree.len(),
            depth: tree.depth(),
            accepted,
            committed: kept,
            ranks,
            offered,
            cut: kept < tokens.len() || live.ending.is_some(),
        });
        Ok(())
    }

    /// Tells the draft what became final.
    fn observe(
        &mut self,
        live: usize,
        tokens: &[u32],
        path: &[usize],
        taps: &[Matrix],
    ) -> Result<()> {
        let slot = self.live[live].slot;
        match &mut self.parts.draft {
            Some(draft) => draft.model.observe(&[Committed {
                slot,
                tokens,
                path,
                taps,
            }]),
            None => Ok(()),
        }
    }
}

/// What the rule says of a tree whose root is a request's last token.
fn verify(live: &mut Live, tree: &Tree, logits: &Matrix, vocab: usize) -> Result<Verdict> {
    let rows = LogitRows {
        logits,
        tree,
        history: &live.tokens[..live.tokens.len() - 1],
        sampling: &live.request.sampling,
        known: live.request.known_tokens.unwrap_or(vocab),
        best: Default::default(),
    };
    let verdict = live.settled.rule.verify(tree, &rows, &mut live.chance)?;
    verdict.check(tree, vocab)?;
    Ok(verdict)
}

/// Rank of each node of a path among its siblings, and how many children the root and each of them has.
fn among_siblings(tree: &Tree, path: &[usize]) -> (Vec<usize>, Vec<usize>) {
    let parent = |node: &usize| tree.parents[*node];
    let rank = |node: &usize| tree.children(parent(node)).take_while(|n| n < node).count();
    let visited = std::iter::once(0).chain(path.iter().copied());
    (
        path.iter().map(rank).collect(),
        visited.map(|node| tree.children(node).count()).collect(),
    )
}

fn no_tree(found: usize, asked: usize) -> Error {
    Error::Invalid(format!(
        "the draft proposed {found} trees for {asked} slots"
    ))
}
