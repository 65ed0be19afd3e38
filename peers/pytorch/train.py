"""One training step of a draft in PyTorch, as a user would write it, for `cargo bench --bench train` to be held against.

Reads JSON lines {"case": "eagle2-1" | "scylla-2" | "scylla-4" | "eagle3-3", "form": "f32" | "bf16", "compile": bool, "steps": n} and
answers each with {"draft": seconds a step, "target": seconds of a target's pass}, the smallest and the median of the steps timed.
Shapes are those of SmolLM2-135M, values are random; batches are 4 lines of 512 rows. Threads: OMP_NUM_THREADS."""

import json
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

H, FFN, A, K, E, V, VD, L = 576, 1536, 9, 3, 64, 49152, 8192, 30
B, S = 4, 512


def rope(x, positions):
    half = E // 2
    freq = 1e5 ** (-torch.arange(half, dtype=torch.float32) * 2 / E)
    angle = positions[:, None].float() * freq
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Layer(nn.Module):
    def __init__(self, normed=True, width=H):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, n, bias=False) for n in (A * E, K * E, K * E))
        self.o = nn.Linear(A * E, H, bias=False)
        self.gate, self.up = nn.Linear(H, FFN, bias=False), nn.Linear(H, FFN, bias=False)
        self.down = nn.Linear(FFN, H, bias=False)
        self.norm1 = nn.RMSNorm(width, 1e-5) if normed else nn.Identity()
        self.norm2 = nn.RMSNorm(H, 1e-5)

    def heads(self, x, n):
        return x.view(B, S, n, E).transpose(1, 2)

    def forward(self, x, beside=None, kept=None, step=0):
        taken = beside if beside is not None else self.norm1(x)
        positions = torch.arange(S) + step
        q = rope(self.heads(self.q(taken), A), positions)
        k = rope(self.heads(self.k(taken), K), positions)
        v = self.heads(self.v(taken), K)
        k, v = k.repeat_interleave(A // K, 1), v.repeat_interleave(A // K, 1)
        if kept:  # EAGLE-3's later steps: causal over step 0, and the row's own of the others
            (k0, v0), later = kept[0], kept[1:] + [(k, v)]
            scores = q @ k0.transpose(-1, -2) / E**0.5
            scores = scores + torch.full((S, S), float("-inf")).triu(1).to(scores.dtype)
            own = [(q * ki).sum(-1, keepdim=True) / E**0.5 for ki, _ in later]
            p = torch.cat([scores] + own, -1).softmax(-1)
            y = p[..., :S] @ v0
            for i, (_, vi) in enumerate(later):
                y = y + p[..., S + i : S + i + 1] * vi
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(B, S, A * E))
        n = self.norm2(x)
        x = x + self.down(F.silu(self.gate(n)) * self.up(n))
        return x, (k, v)


class Reduced(nn.Module):
    """EAGLE-1's network, or Scylla's of several layers and a norm."""

    def __init__(self, layers):
        super().__init__()
        self.fc = nn.Linear(2 * H, H, bias=False)
        self.layers = nn.ModuleList(Layer(normed=i > 0) for i in range(layers))
        self.norm = nn.RMSNorm(H, 1e-5) if layers > 1 else nn.Identity()

    def loss(self, embedded, states, head):
        x = self.fc(torch.cat([embedded, states[-1]], -1))
        for layer in self.layers:
            x, _ = layer(x)
        x = self.norm(x)
        goal = states[-1][:, 1:]
        x = x[:, :-1]
        near = F.smooth_l1_loss(x.float(), goal.float())
        with torch.no_grad():
            p = F.linear(goal, head).float().softmax(-1)
        ce = -(p * F.linear(x, head).float().log_softmax(-1)).sum(-1).mean()
        return near + 0.1 * ce


class Eagle3(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3 * H, H, bias=False)
        self.norm_e, self.norm_g, self.norm = (nn.RMSNorm(H, 1e-5) for _ in range(3))
        self.layer = Layer(normed=False, width=2 * H)
        self.head = nn.Linear(H, VD, bias=False)

    def loss(self, embedded, states, head):
        with torch.no_grad():
            logits = F.linear(states[-1], head).float()
            best = logits.argmax(-1)
            p = logits[..., :VD].softmax(-1)
            counts = best < VD
        g = self.fc(torch.cat(states[:3], -1))
        kept, total = [], 0.0
        for i in range(3):
            e = torch.roll(embedded, -i, 1)
            joined = torch.cat([self.norm_e(e), self.norm_g(g)], -1)
            g, kv = self.layer(g, joined, kept, i)
            kept.append(kv)
            q = self.head(self.norm(g)).float().log_softmax(-1)
            p_i, mask = torch.roll(p, -1 - i, 1), torch.roll(counts, -1 - i, 1).float()
            ce = -(p_i * q).sum(-1)
            total = total + 0.8**i * (ce * mask).sum() / mask.sum().clamp(min=1)
        return total


class Target(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(L))
        self.norm = nn.RMSNorm(H, 1e-5)

    def forward(self, x):
        states = []
        for i, layer in enumerate(self.layers):
            if i in (2, L // 2, L - 3):
                states.append(x)
            x, _ = layer(x)
        return states + [self.norm(x)]


class Job:
    def __init__(self, case, form, compiled):
        torch.manual_seed(0)
        name, n = case.rsplit("-", 1)
        self.draft = Eagle3() if name == "eagle3" else Reduced(int(n))
        self.dtype = torch.bfloat16 if form == "bf16" else torch.float32
        self.target = Target().to(self.dtype)
        self.head = (torch.randn(V, H) * 0.05).to(self.dtype)
        self.optimizer = torch.optim.AdamW(self.draft.parameters(), 1e-4, fused=True)
        self.loss, self.run = self.draft.loss, self.target
        if compiled:
            self.loss, self.run = torch.compile(self.loss), torch.compile(self.run)

    def states(self):
        with torch.no_grad():
            return self.run(torch.randn(B, S, H, dtype=self.dtype))

    def step(self, states):
        embedded = torch.randn(B, S, H, dtype=self.dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            loss = self.loss(embedded, states, self.head)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.draft.parameters(), 0.5)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss)


def main():
    jobs = {}
    print(json.dumps({"version": torch.__version__, "threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        key = (asked["case"], asked["form"], asked["compile"])
        try:
            if key not in jobs:
                jobs.clear()
                jobs[key] = Job(*key)
                jobs[key].step(jobs[key].states())
            job, times = jobs[key], {"target": [], "draft": []}
            for _ in range(asked["steps"]):
                begun = time.perf_counter()
                states = job.states()
                between = time.perf_counter()
                job.step(states)
                times["target"].append(between - begun)
                times["draft"].append(time.perf_counter() - between)
            answer = {name: sorted(t)[len(t) // 2] for name, t in times.items()}
        except Exception as e:  # a form that does not compile here is said, and left out
            answer = {"failed": f"{type(e).__name__}: {e}"[:300]}
        print(json.dumps(answer), flush=True)


main()
