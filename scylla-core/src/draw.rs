//! How the children of a node are drawn from a draft's distribution.
//!
//! Drawing is where exactness is lost: after a random draw a tree may stop growing, but a drawn node may never
//! be dropped or re-ranked by its value. So it lives here, used by drafts and proofs alike.

use std::sync::Arc;

use crate::plugin::Chance;
use crate::tree::{Drawing, Tree};
use crate::{Error, Result};

/// `n` independent draws from q; the same index may come twice.
pub fn independent(q: &[f64], n: usize, chance: &mut dyn Chance) -> Result<Vec<usize>> {
    (0..n).map(|_| chance.pick(q)).collect()
}

/// Up to `n` draws from q without replacement; fewer when its support is used up.
pub fn without_replacement(q: &[f64], n: usize, chance: &mut dyn Chance) -> Result<Vec<usize>> {
    let mut left = q.to_vec();
    let support = q.iter().filter(|&&q| q > 0.0).count();
    let mut drawn = Vec::with_capacity(n.min(support));
    for _ in 0..n.min(support) {
        let x = chance.pick(&left)?;
        left[x] = 0.0;
        drawn.push(x);
    }
    Ok(drawn)
}

/// Up to `n` children of a node, drawn from `q` over draft ids: the one way from a distribution to a tree's
/// children. Deterministic ones are the most probable.
pub fn children(
    drawing: Drawing,
    q: &[f64],
    n: usize,
    chance: &mut dyn Chance,
) -> Result<Vec<usize>> {
    match drawing {
        Drawing::Independent => independent(q, n, chance),
        Drawing::WithoutReplacement => without_replacement(q, n, chance),
        Drawing::Deterministic => Ok(top(q, n)),
    }
}

/// Adds up to `n` children of `node`, drawn from `q` over draft ids as the tree's `drawing` says, and keeps q beside
/// them where they were drawn at random. Returns the new nodes.
pub fn expand(
    tree: &mut Tree,
    node: usize,
    n: usize,
    q: Arc<[f64]>,
    chance: &mut dyn Chance,
) -> Result<Vec<usize>> {
    let mut added = Vec::with_capacity(n);
    for x in children(tree.drawing, &q, n, chance)? {
        let token = tree.target_id(x);
        let unmapped = || Error::Invalid(format!("draft id {x} has no target id"));
        added.push(tree.push(node, token.ok_or_else(unmapped)?));
    }
    if tree.drawing != Drawing::Deterministic {
        tree.q.resize(tree.len(), None);
        tree.q[node] = Some(q);
    }
    Ok(added)
}

/// A draft's distribution over its ids, given the tokens from the root down to a node.
pub type Conditional<'a> = dyn FnMut(&[u32]) -> Result<Arc<[f64]>> + 'a;

/// Grows a tree breadth first below its root, as its `drawing` says: `widths[d]` children for every node of depth d,
/// as long as it has fewer than `total` nodes. `q` is asked once for each expanded node, with the tokens from the root
/// down to it, and answers over draft ids.
pub fn grow(
    tree: &mut Tree,
    widths: &[usize],
    total: usize,
    q: &mut Conditional<'_>,
    chance: &mut dyn Chance,
) -> Result<()> {
    let mut frontier = vec![0];
    for &width in widths {
        let mut next = Vec::new();
        for node in frontier {
            let width = width.min(total.saturating_sub(tree.len()));
            if width == 0 {
                break;
            }
            let q = q(&tree.tokens_to(node))?;
            next.extend(expand(tree, node, width, q, chance)?);
        }
        frontier = next;
    }
    Ok(())
}

/// The `n` largest values, largest first; ties go to the lowest index. Not a random draw.
pub fn top<T: Copy + Into<f64>>(values: &[T], n: usize) -> Vec<usize> {
    let value = |i: &usize| -> f64 { values[*i].into() };
    let before = |a: &usize, b: &usize| value(b).total_cmp(&value(a)).then(a.cmp(b));
    let mut best: Vec<usize> = (0..values.len()).collect();
    let n = n.min(best.len());
    if n == 0 {
        return Vec::new();
    }
    if n < best.len() {
        best.select_nth_unstable_by(n - 1, before);
        best.truncate(n);
    }
    best.sort_unstable_by(before);
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chance::enumerate;

    #[test]
    fn draws_without_replacement_follow_the_renormalised_law() {
        let q = [0.5, 0.3, 0.2, 0.0];
        let mut law = std::collections::BTreeMap::new();
        enumerate(
            |c| without_replacement(&q, 2, c),
            |p, pair| *law.entry(pair).or_insert(0.0) += p,
        )
        .expect("enumerate");
        assert_eq!(law.len(), 6);
        for (pair, p) in law {
            let expected = q[pair[0]] * q[pair[1]] / (1.0 - q[pair[0]]);
            assert!((p - expected).abs() < 1e-15, "{pair:?}");
        }
    }

    #[test]
    fn drawing_stops_when_the_support_is_used_up() {
        let mut c = crate::chance::Seeded::new(0, 0);
        assert_eq!(
            without_replacement(&[0.0, 1.0], 3, &mut c).expect("draw"),
            [1]
        );
        assert_eq!(
            independent(&[0.0, 1.0], 3, &mut c).expect("draw"),
            [1, 1, 1]
        );
    }

    #[test]
    fn the_largest_come_first_and_ties_go_to_the_lowest() {
        assert_eq!(top(&[1.0, 3.0, 2.0, 3.0], 3), [1, 3, 2]);
        assert_eq!(top(&[1.0], 5), [0]);
        assert_eq!(top::<f32>(&[], 2), Vec::<usize>::new());
    }
}
