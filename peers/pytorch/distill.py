"""One step of distillation across tokenizers in PyTorch, as a user would write it, for `cargo bench --bench distill` to be held against.

Reads JSON lines {"loss": "released" | "published" | "uld", "form": "f32" | "bf16", "compile": bool, "vocab": rows of the student's embedding,
"teacher": [tokens, ..], "student": [tokens, ..]}, the lengths of the answers of one step on either side, and answers each with {"step": seconds,
"loss": seconds of the loss and its gradient alone}, of the second of two such steps. The teacher has SmolLM2-135M's shapes, the student those of
`assets/experiments/distill/multilevel-ot.toml`; values are random. Answers are padded to the longest, as batches are there. Threads: OMP_NUM_THREADS. The losses are written as their formulas stand (arXiv:2412.14528 and its released code,
arXiv:2402.12030)."""

import json
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

TEACHER = dict(hidden=576, ffn=1536, heads=9, kept=3, layers=30, vocab=49152)
STUDENT = dict(hidden=256, ffn=704, heads=4, kept=4, layers=4)
K = 50

# Lengths differ from step to step. What is compiled too often is an error, and not run as it stands without a word.
torch._dynamo.config.recompile_limit = 64
torch._dynamo.config.fail_on_recompile_limit_hit = True


def rope(x):
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] * 1e4 ** (-torch.arange(half) / half)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Layer(nn.Module):
    def __init__(self, hidden, ffn, heads, kept):
        super().__init__()
        self.each, self.groups = hidden // heads, heads // kept
        self.q, self.o = (nn.Linear(hidden, hidden, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(hidden, kept * self.each, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(hidden, ffn, bias=False) for _ in range(2))
        self.down = nn.Linear(ffn, hidden, bias=False)
        self.norm1, self.norm2 = nn.RMSNorm(hidden, 1e-5), nn.RMSNorm(hidden, 1e-5)

    def forward(self, x):
        split = lambda y: y.view(*y.shape[:2], -1, self.each).transpose(1, 2)
        n = self.norm1(x)
        q, k, v = rope(split(self.q(n))), rope(split(self.k(n))), split(self.v(n))
        k, v = k.repeat_interleave(self.groups, 1), v.repeat_interleave(self.groups, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        n = self.norm2(x)
        return x + self.down(F.silu(self.gate(n)) * self.up(n))


class Model(nn.Module):
    """A Llama whose head is its embedding."""

    def __init__(self, hidden, ffn, heads, kept, layers, vocab):
        super().__init__()
        self.embedding = nn.Embedding(vocab, hidden)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.layers = nn.ModuleList(Layer(hidden, ffn, heads, kept) for _ in range(layers))
        self.norm = nn.RMSNorm(hidden, 1e-5)

    def forward(self, ids):
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return F.linear(self.norm(x), self.embedding.weight)


def released(teacher, student, labels, mask):
    """As released: standardised logits, one ranking for the whole batch, means over tokens."""
    ce = F.cross_entropy(student.flatten(0, 1), labels.flatten(), ignore_index=-100)
    with torch.no_grad():
        t = torch.softmax(teacher / (teacher.std(-1, keepdim=True) + 1e-4), -1)
    s = torch.softmax(student / (student.std(-1, keepdim=True) + 1e-4), -1)
    order = lambda p: p.sum((0, 1)).argsort(descending=True)[:K]
    n = min(t.shape[1], s.shape[1])
    t, s, both = t[..., order(t)], s[..., order(s.detach())], mask[:, :n]
    had = ((t[:, :n] - s[:, :n]).abs().sum(-1) * both).sum(-1) / both.sum(-1)
    sl = -(torch.softmax(s[:, :n], -1) * torch.log_softmax(t[:, :n], -1)).sum(-1).mean()
    cost = torch.cdist(torch.softmax(t / 2, -1), torch.softmax(s / 2, -1), p=1)
    plan = torch.exp(-cost / 0.1)
    for _ in range(10):
        plan = plan / plan.sum(2, keepdim=True)
        plan = plan / plan.sum(1, keepdim=True)
    sd = (plan * cost).sum((1, 2))
    return ce + 1.5 * (had.mean() + 0.1 * sl + 0.1 * 0.001 * sd.sum())


def published(teacher, student, labels, mask):
    """As published: sums over a sequence's tokens, the mean over sequences, each ranked for itself."""
    ce = F.cross_entropy(student.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    total = ce
    for t, s, m in zip(teacher, student, mask):
        n = int(m.sum())
        t, s = t[:n], s[:n]
        with torch.no_grad():
            p = torch.softmax(t, -1)
            ranked = p.sum(0).topk(K).indices
            far = torch.softmax(t / 2, -1)[:, ranked]
            p = p[:, ranked]
        q = torch.softmax(s, -1)
        own = q.detach().sum(0).topk(K).indices
        q = q[:, own]
        had, sl = (p - q).abs().sum(), -(p * torch.log(q)).sum()
        cost = torch.cdist(far, torch.softmax(s / 2, -1)[:, own], p=1)
        plan = torch.exp(-cost / 0.1)
        for _ in range(20):
            plan = plan / plan.sum(1, keepdim=True)
            plan = plan / plan.sum(0, keepdim=True)
        total = total + 0.15 * (had + 0.1 * sl + 0.1 * (plan * cost).sum())
    return total / len(teacher)


def uld(teacher, student, labels, mask):
    ce = F.cross_entropy(student.flatten(0, 1), labels.flatten(), ignore_index=-100)
    with torch.no_grad():
        p = torch.softmax(teacher, -1).sort(-1, descending=True).values
    q = torch.softmax(student, -1).sort(-1, descending=True).values
    p = F.pad(p, (0, max(0, q.shape[-1] - p.shape[-1])))
    q = F.pad(q, (0, max(0, p.shape[-1] - q.shape[-1])))
    n = min(p.shape[1], q.shape[1])
    far = (p[:, :n] - q[:, :n]).abs().sum(-1) * mask[:, :n]
    return ce + 1.5 * (far.sum(-1) / mask[:, :n].sum(-1)).mean()


LOSSES = {"released": released, "published": published, "uld": uld}


class Job:
    def __init__(self, loss, form, compiled, vocab):
        torch.manual_seed(0)
        self.vocab = vocab
        self.dtype = torch.bfloat16 if form == "bf16" else torch.float32
        self.teacher = Model(**TEACHER).to(self.dtype)
        self.student = Model(vocab=vocab, **STUDENT)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), 1e-4, fused=True)
        self.loss, self.says, self.learns = LOSSES[loss], self.teacher, self.student
        if compiled:
            self.says, self.learns, self.loss = (torch.compile(f) for f in (self.says, self.learns, self.loss))

    def ids(self, lengths, vocab):
        return torch.randint(vocab, (len(lengths), max(lengths)))

    def step(self, teacher, student):
        """Seconds of a step, and those of its loss alone."""
        asked, learned = self.ids(teacher, TEACHER["vocab"]), self.ids(student, self.vocab)
        labels = learned.clone()
        for i, n in enumerate(student):
            labels[i, n:] = -100
        n = max(max(teacher), max(student))
        shorter = torch.tensor([min(a, b) for a, b in zip(teacher, student)])
        mask = (torch.arange(n)[None] < shorter[:, None]).float()
        begun = time.perf_counter()
        with torch.no_grad():
            said = self.says(asked).float()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            own = self.learns(learned)
        # The gradient of the loss apart, so that its time is known; what is computed is the same.
        logits = own.detach().float().requires_grad_()
        between = time.perf_counter()
        self.loss(said, logits, labels, mask).backward()
        loss = time.perf_counter() - between
        own.backward(logits.grad.to(own.dtype))
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - begun, loss


def main():
    jobs = {}
    print(json.dumps({"version": torch.__version__, "threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        key = (asked["loss"], asked["form"], asked["compile"], asked["vocab"])
        try:
            if key not in jobs:
                # One loss after another.
                jobs = {k: job for k, job in jobs.items() if k[0] == key[0]}
                jobs[key] = Job(*key)
            jobs[key].step(asked["teacher"], asked["student"])
            step, loss = jobs[key].step(asked["teacher"], asked["student"])
            answer = {"step": step, "loss": loss}
        except Exception as e:  # a form that does not compile here is said, and left out
            jobs.pop(key, None)
            answer = {"failed": f"{type(e).__name__}: {e}"[:300]}
        print(json.dumps(answer), flush=True)


main()
