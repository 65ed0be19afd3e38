#!/usr/bin/env python3
"""Chain and tree sampling, dense: softmax of every node, then the walk. What verification costs without lazy rows.

Usage: verify_numpy.py DIR    (DIR as SCYLLA_DUMP=DIR cargo bench -p scylla-bench --bench verify writes it)

One thread, numpy, float64 probabilities, as reference implementations do it: all rows of p (and of q) go through
the softmax at once, and residuals are whole rows. Prints the median time of a call in milliseconds.
"""

import json
import os
import sys
import time
from pathlib import Path

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"
import numpy as np


def softmax(logits):
    e = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def load(folder):
    tree = json.loads((folder / "tree.json").read_text())
    shape = (len(tree["tokens"]), tree["vocab"])
    p, q = (np.fromfile(folder / f, np.float32).reshape(shape) for f in ("logits.f32", "draft.f32"))
    children = [[i for i in range(1, shape[0]) if tree["parents"][i] == n] for n in range(shape[0])]
    return p, softmax(q), tree["tokens"], children


def walk(logits, q, tokens, children, rng, without_replacement):
    """Recursive rejection from the root; a chain is the case of one child a node."""
    p = softmax(logits)
    node, path = 0, []
    while True:
        row, draft = p[node], q[node]
        for child in children[node]:
            x = tokens[child]
            if rng.random() < row[x] / draft[x]:
                path.append(child)
                node = child
                break
            row = np.maximum(row - draft, 0)
            row = row / row.sum()
            if without_replacement:
                draft = draft.copy()
                draft[x] = 0
                draft = draft / draft.sum()
        else:
            return path, rng.choice(len(row), p=row)


def median_ms(call, repeats=15):
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - begun))
    return sorted(times)[repeats // 2]


def main(folder):
    rng = np.random.default_rng(5)
    for name, where, without in (("tree", folder, True), ("chain", folder / "chain", False)):
        p, q, tokens, children = load(where)
        # q is given, as the draft computed it when it drew; only p's softmax and the walk are timed.
        ms = median_ms(lambda: walk(p, q, tokens, children, rng, without))
        print(f"{name} sampling, {len(tokens)} nodes, numpy {np.__version__}: {ms:.2f} ms")


main(Path(sys.argv[1]))
