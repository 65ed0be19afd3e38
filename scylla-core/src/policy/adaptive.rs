//! The budget that the run itself calls for: most expected tokens over the expected time of the next step.

use super::{Acceptance, Costs, StepTimes};
use crate::plugin::{BudgetPolicy, Drafting, Outlook, Price};
use crate::tree::Budget;

/// Goodput: levels are added to requests, the most promising first, as long as expected tokens over expected time grow.
///
/// A level promises the probability that one of its nodes is accepted, for the nodes it is expected to have, as recent
/// trees of the request had it, those of all requests where it has few of its own. Time is that of forwards as a line over
/// rows, of the draft at so many levels, and of the rest, as measured. What was never tried, or long ago, is taken to do
/// well, so that it is tried (again) now and then; where it does not pay, nothing is drafted.
#[derive(Debug, Clone)]
pub struct AdaptiveBudget {
    /// Expected tokens per time must exceed plain decoding's by this share, or nothing is drafted.
    pub margin: f64,
    /// Times of steps that are known beforehand: with them budgets depend on the requests and on what was accepted until then,
    /// and not on the clock. Without them those of the run count.
    pub times: Option<StepTimes>,
    /// What drafting took in expected tokens at the last budgets, where times are known ([`BudgetPolicy::price`]).
    pub price: Option<Price>,
}

impl Default for AdaptiveBudget {
    fn default() -> Self {
        Self {
            margin: 0.01,
            times: None,
            price: None,
        }
    }
}

/// Cycles of all requests that weigh as much as a request's own, and what is believed before the first: one node a level,
/// and the share of it that is accepted given the level above.
const OTHERS: f64 = 10.0;
const UNSEEN: f64 = 4.0;
const HOPE: f64 = 0.7;

/// Expected nodes of a level, and the probability that one of them is accepted.
fn promise(own: &Acceptance, all: &Acceptance, depth: usize) -> (f64, f64) {
    let hope = (1.0, HOPE.powi(depth as i32 + 1));
    own.at(depth, all.at(depth, hope, UNSEEN), OTHERS)
}

/// Expected milliseconds of steps of some sizes.
enum Times<'a> {
    Known(&'a StepTimes, usize),
    Measured {
        costs: &'a Costs,
        /// Of a forward of no rows, and of each row.
        forward: (f64, f64),
        others: f64,
    },
}

impl<'a> Times<'a> {
    /// For steps of so many requests and `low` to `high` rows; `None` before the first.
    fn measured(costs: &'a Costs, requests: usize, low: f64, high: f64) -> Option<Self> {
        Some(Self::Measured {
            costs,
            forward: costs.forward.fit(low, high)?,
            others: costs.others.at(requests).unwrap_or(0.0),
        })
    }

    /// Of a step of so many rows whose deepest budget has so many levels.
    fn of(&self, rows: f64, levels: usize) -> f64 {
        let ms = match self {
            Self::Known(times, requests) => times.of(*requests, rows, levels),
            Self::Measured {
                costs,
                forward,
                others,
            } => {
                let propose = costs.propose.at(levels).unwrap_or(0.0);
                forward.0 + forward.1 * rows + propose + others
            }
        };
        ms.max(1e-9)
    }
}

/// What a request allows, cut to so many levels; of a tree's nodes a share.
pub fn cut(most: Budget, levels: usize) -> Budget {
    match most.levels() {
        0 => Budget::OFF,
        all if levels >= all => most,
        all => {
            let nodes = ((most.total - 1) * levels).div_ceil(all);
            most.within(levels, nodes + 1)
        }
    }
}

impl AdaptiveBudget {
    /// Levels for each request, and the price of drafting.
    fn levels(&self, outlook: &Outlook<'_>) -> (Vec<usize>, Option<Price>) {
        let requests = outlook.requests;
        let base = (requests.len() + outlook.prompt_rows) as f64;
        let most: Vec<usize> = requests.iter().map(|r| r.most.levels()).collect();
        let mut levels = vec![0; requests.len()];
        let (mut rows, mut tokens) = (base, requests.len() as f64);
        let high = base + most.iter().sum::<usize>() as f64;
        let times = match &self.times {
            Some(times) => Some(Times::Known(times, requests.len())),
            None => Times::measured(outlook.costs, requests.len(), base, high),
        };
        let Some(times) = times else {
            return (most, None); // nothing is known: all that is allowed is tried
        };
        let mut fastest = tokens / times.of(rows, 0);
        let mut best = (fastest * (1.0 + self.margin), levels.clone());
        // The next level of each request, by what it promises for a row; no more than the level above it.
        let worth = |r: &Drafting<'_>, depth: usize| {
            let (nodes, accepted) = promise(r.acceptance, outlook.acceptance, depth);
            (accepted / nodes.max(1e-6), nodes, accepted)
        };
        let mut next: Vec<(f64, f64, f64)> = requests.iter().map(|r| worth(r, 0)).collect();
        let open = |levels: &[usize], i: &usize| levels[*i] < most[*i];
        while let Some(i) = (0..requests.len())
            .filter(|i| open(&levels, i))
            .max_by(|&a, &b| next[a].0.total_cmp(&next[b].0).then(b.cmp(&a)))
        {
            let (ratio, nodes, accepted) = next[i];
            rows += nodes;
            tokens += accepted;
            levels[i] += 1;
            let below = worth(&requests[i], levels[i]);
            next[i] = (below.0.min(ratio), below.1, below.2.min(accepted));
            let deepest = levels.iter().max().copied().unwrap_or(0);
            let speed = tokens / times.of(rows, deepest);
            if speed > best.0 {
                best = (speed, levels.clone());
                fastest = speed;
            }
        }
        // By the clock nothing is weighed: what is sampled would not be the same twice. As if all requests had as many nodes.
        let price = self.times.as_ref().map(|times| {
            let each = requests.len() as f64;
            let nodes = requests.iter().map(|r| r.most.total).max().unwrap_or(1);
            let forward = |n: usize| times.of(requests.len(), base + each * n as f64, 0);
            let rows = (1..nodes).map(|n| fastest * (forward(n) - forward(0)) / each);
            Price {
                rows: rows.collect(),
                level: fastest * times.level(requests.len()),
            }
        });
        (best.1, price)
    }
}

impl BudgetPolicy for AdaptiveBudget {
    fn budgets(&mut self, outlook: &Outlook<'_>) -> Vec<Budget> {
        let levels;
        (levels, self.price) = self.levels(outlook);
        let requests = outlook.requests.iter();
        requests
            .zip(levels)
            .map(|(r, levels)| cut(r.most, levels))
            .collect()
    }

    fn price(&self) -> Option<&Price> {
        self.price.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::Tree;

    /// A forward of m rows costs `1 + slope (m - 1)` milliseconds.
    fn costs(slope: f64) -> Costs {
        let mut costs = Costs::default();
        for rows in 1..=64 {
            costs.forward.add(rows, 1.0 + slope * (rows - 1) as f64, 1);
        }
        costs
    }

    /// Cycles of chains of four, of which so many tokens were accepted.
    fn seen(accepted: usize) -> Acceptance {
        let mut seen = Acceptance::default();
        for _ in 0..100 {
            seen.add(4, &Tree::chain(0, &[1; 4]), accepted);
        }
        seen
    }

    fn chosen(costs: &Costs, all: &Acceptance, own: &[Acceptance]) -> Vec<usize> {
        let of = |acceptance| Drafting {
            most: Budget::chain(4),
            positions: 100,
            acceptance,
        };
        let requests: Vec<Drafting<'_>> = own.iter().map(of).collect();
        let outlook = Outlook {
            requests: &requests,
            prompt_rows: 0,
            acceptance: all,
            costs,
        };
        let budgets = AdaptiveBudget::default().budgets(&outlook);
        budgets.iter().map(Budget::levels).collect()
    }

    #[test]
    fn drafts_as_deep_as_is_accepted_while_rows_are_cheap_and_not_where_they_cost_more_than_a_token()
     {
        let all = seen(2);
        assert_eq!(chosen(&costs(0.2), &all, &[seen(2)]), [2]);
        assert_eq!(
            chosen(&costs(0.2), &all, &[seen(2), seen(0), seen(4)]),
            [2, 0, 4]
        );
        assert_eq!(chosen(&costs(1.5), &all, &[seen(2)]), [0]);
        assert_eq!(
            chosen(&Costs::default(), &all, &[seen(0)]),
            [4],
            "nothing measured yet"
        );
    }

    #[test]
    fn with_known_times_rows_and_levels_have_a_price_in_tokens() {
        let (all, own) = (seen(2), seen(2));
        let most = Budget::chain(4);
        let one = Drafting {
            most,
            positions: 100,
            acceptance: &own,
        };
        let costs = Costs::default();
        let outlook = Outlook {
            requests: &[one],
            prompt_rows: 0,
            acceptance: &all,
            costs: &costs,
        };
        let times = StepTimes {
            forward: vec![(1, 2.0), (2, 2.2), (5, 3.1)],
            propose: vec![(0, 0.0), (1, 0.4), (3, 0.8)],
            several: Vec::new(),
            others: 0.0,
        };
        let mut policy = AdaptiveBudget {
            times: Some(times),
            ..AdaptiveBudget::default()
        };
        assert_eq!(policy.budgets(&outlook)[0].levels(), 2);
        // Two levels of one node: about three tokens in 2.5 and 0.6 milliseconds.
        let price = policy.price().expect("times are known");
        let speed = price.level / 0.2;
        assert!((0.9..1.0).contains(&speed), "{speed} tokens a millisecond");
        let rows = [0.2, 0.5, 0.8, 1.1].map(|ms| ms * speed);
        assert_eq!(price.rows.len(), rows.len());
        for (found, expected) in price.rows.iter().zip(rows) {
            assert!((found - expected).abs() < 1e-9, "{found} for {expected}");
        }
        let mut clock = AdaptiveBudget::default();
        clock.budgets(&outlook);
        assert_eq!(clock.price(), None, "nothing is weighed by the clock");
    }

    #[test]
    fn what_was_found_to_fail_is_tried_again_when_that_is_long_ago() {
        let mut own = seen(0);
        let mut all = seen(0);
        assert_eq!(chosen(&costs(0.1), &all, &[own.clone()]), [0]);
        for _ in 0..400 {
            own.add(0, &Tree::root(0), 0);
            all.add(0, &Tree::root(0), 0);
        }
        assert!(chosen(&costs(0.1), &all, &[own])[0] > 0);
    }
}
