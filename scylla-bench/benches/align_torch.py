#!/usr/bin/env python3
"""Alignment losses with their gradients in PyTorch: what they cost when written as their formulas stand.

Usage: align_torch.py [ROUNDS]

One thread, f32, 512 tokens, vocabularies of 152,064 and 49,152, k = 50, the same kind of logits as
`cargo bench -p scylla-bench --bench align`. Prints medians in milliseconds.
"""

import os
import statistics
import sys
import time

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"
import torch

TOKENS, TEACHER, STUDENT, K = 512, 152_064, 49_152, 50


def logits(vocab, seed):
    generator = torch.Generator().manual_seed(seed)
    base = -1.2 * torch.log(torch.arange(1, vocab + 1, dtype=torch.float32))
    base = base[torch.randperm(vocab, generator=generator)]
    return base + 1.5 * torch.randn(TOKENS, vocab, generator=generator)


def multilevel_ot(teacher, student, labels, alpha=0.15, beta=0.1, gamma=0.1, epsilon=0.1, iterations=20):
    ce = torch.nn.functional.cross_entropy(student, labels, reduction="sum")
    t, s = torch.softmax(teacher, -1), torch.softmax(student, -1)
    ranked, own = t.sum(0).topk(K).indices, s.sum(0).topk(K).indices
    p, q = t[:, ranked], s[:, own]
    had = (p - q).abs().sum()
    sl = -(p * torch.log(q)).sum()
    cost = torch.cdist(torch.softmax(teacher / 2, -1)[:, ranked], torch.softmax(student / 2, -1)[:, own], p=1)
    plan = torch.exp(-cost / epsilon)
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return ce + alpha * (had + beta * sl + gamma * (plan * cost).sum())


def uld(teacher, student, labels, weight=1.5):
    ce = torch.nn.functional.cross_entropy(student, labels)
    p = torch.softmax(teacher, -1).sort(-1, descending=True).values
    q = torch.softmax(student, -1).sort(-1, descending=True).values
    q = torch.nn.functional.pad(q, (0, TEACHER - STUDENT))
    return ce + weight * (p - q).abs().sum(-1).mean()


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    torch.set_num_threads(1)
    teacher, student = logits(TEACHER, 1), logits(STUDENT, 2).requires_grad_()
    labels = torch.arange(TOKENS) * 7919 % STUDENT
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} thread")
    for loss in (multilevel_ot, uld):
        times = []
        for _ in range(rounds):
            student.grad = None
            begun = time.perf_counter()
            loss(teacher, student, labels).backward()
            times.append(time.perf_counter() - begun)
        print(f"  {loss.__name__:<30} {1e3 * statistics.median(times):8.1f}")


main()
