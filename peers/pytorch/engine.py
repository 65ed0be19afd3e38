"""PyTorch through transformers, as a worker that answers one JSON request a line.

usage: python engine.py MODEL.gguf OPTIONS

OPTIONS is a JSON object: threads, dtype (bfloat16, float32). PyTorch widens the file's weights to it. Requests are those of
peers/worker.py.
"""

import json
import os
import sys
import time

import torch
from transformers import AutoModelForCausalLM, DynamicCache

sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from worker import serve


class Torch:
    def __init__(self, path, options):
        torch.set_num_threads(options["threads"])
        folder, name = os.path.split(path)
        dtype = getattr(torch, options.get("dtype", "bfloat16"))
        self.model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=dtype).eval()
        self.cache = DynamicCache()

    def run(self, tokens, last):
        out = self.model(torch.tensor([tokens]), past_key_values=self.cache, logits_to_keep=1 if last else 0)
        return out.logits[0]

    def prefill(self, tokens):
        self.cache = DynamicCache()
        begun = time.perf_counter()
        token = int(self.run(tokens, True)[-1].argmax())
        return (time.perf_counter() - begun) * 1e3, token

    def next(self, token):
        return int(self.run([token], True)[-1].argmax())

    def forward(self, rows, behind):
        more = self.cache.get_seq_length() - behind
        if more > 0:
            self.cache.crop(-more)
        begun = time.perf_counter()
        self.run([1000 + i for i in range(rows)], False)
        return (time.perf_counter() - begun) * 1e3


def main():
    with torch.inference_mode():
        worker = Torch(sys.argv[1], json.loads(sys.argv[2]))
        serve(worker, {"version": torch.__version__})


if __name__ == "__main__":
    main()
