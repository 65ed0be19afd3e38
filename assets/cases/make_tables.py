#!/usr/bin/env python3
"""Make tables.json: small tables of p and q on which `scylla prove` proves rules.

Usage: make_tables.py > tables.json

Each row is a softmax of seeded normal numbers; q's are p's with noise, so `noise` says how good the draft is. `zeros`
removes the less likely half of each row, and `equal` takes q = p.
"""

import itertools
import json
import math
import random

CASES = [
    # name, vocab, depth, siblings per level, noise, zeros
    ("good-draft-v3-d3", 3, 3, [2, 2, 1], 0.4, False),
    ("fair-draft-v4-d2", 4, 2, [2, 2], 1.0, False),
    ("poor-draft-v4-d2", 4, 2, [2, 2], 3.0, False),
    ("wide-v4-d2", 4, 2, [3, 1], 1.0, False),
    ("deep-v3-d3", 3, 3, [2, 1, 1], 1.0, False),
    ("zeros-v4-d2", 4, 2, [2, 2], 1.5, True),
    ("equal-v3-d2", 3, 2, [2, 2], 0.0, False),
]


def row(logits, zeros):
    weights = [math.exp(v) for v in logits]
    if zeros:
        least = sorted(weights)[len(weights) // 2 - 1]
        weights = [0.0 if w <= least else w for w in weights]
    total = sum(weights)
    return [w / total for w in weights]


def prefixes(vocab, levels):
    for n in range(levels):
        yield from itertools.product(range(vocab), repeat=n)


def case(rng, name, vocab, depth, siblings, noise, zeros):
    p, q = {}, {}
    for prefix in prefixes(vocab, depth + 1):
        logits = [1.5 * rng.gauss(0, 1) for _ in range(vocab)]
        key = ",".join(map(str, prefix))
        p[key] = row(logits, zeros)
        if len(prefix) < depth:
            q[key] = row([v + noise * rng.gauss(0, 1) for v in logits], zeros)
    # The fixed tree: at every node the most probable tokens under q, as many as siblings are drawn elsewhere.
    children, level = {}, [()]
    for width in siblings:
        deeper = []
        for prefix in level:
            key = ",".join(map(str, prefix))
            best = sorted(range(vocab), key=lambda t: (-q[key][t], t))[:width]
            children[key] = [t for t in best if q[key][t] > 0]
            deeper += [prefix + (t,) for t in children[key]]
        level = deeper
    return {
        "name": name, "vocab": vocab, "depth": depth, "p": p, "q": q,
        "rules": {
            "deterministic_tree": {"children": children},
            "rrs_without_replacement": {"siblings_per_level": siblings},
            "specinfer_multistep": {"siblings_per_level": siblings},
        },
    }


rng = random.Random(2025)
print(json.dumps({"cases": [case(rng, *c) for c in CASES]}))
