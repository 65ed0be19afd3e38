"""PyTorch through transformers, as a worker that answers one JSON request a line.

usage: python engine.py MODEL.gguf OPTIONS

OPTIONS is a JSON object: threads, dtype (bfloat16, float32). PyTorch widens the file's weights to it. Requests:
{"op": "prefill", "tokens": [..]} empties the cache and runs the tokens; {"op": "forward", "rows": m, "behind": n} runs m rows behind the first n
of them with the logits of each, three times, and tells the middle one; {"op": "decode", "prompt": [..], "new": n, "eos": [..]} decodes greedily. Answers hold milliseconds.
"""

import json
import os
import sys
import time

import torch
from transformers import AutoModelForCausalLM, DynamicCache


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

    def answer(self, request):
        match request["op"]:
            case "prefill":
                ms, token = self.prefill(request["tokens"])
                return {"ms": ms, "token": token}
            case "forward":
                times = []
                for _ in range(3):
                    more = self.cache.get_seq_length() - request["behind"]
                    if more > 0:
                        self.cache.crop(-more)
                    begun = time.perf_counter()
                    self.run([1000 + i for i in range(request["rows"])], False)
                    times.append((time.perf_counter() - begun) * 1e3)
                return {"ms": sorted(times)[1]}
            case "decode":
                prefill_ms, token = self.prefill(request["prompt"])
                ids = [token]
                begun = time.perf_counter()
                while len(ids) < request["new"] and ids[-1] not in request["eos"]:
                    ids.append(int(self.run(ids[-1:], True)[-1].argmax()))
                return {"ids": ids, "ms": (time.perf_counter() - begun) * 1e3, "prefill_ms": prefill_ms}
        raise ValueError(f"unknown request {request['op']}")


def main():
    with torch.inference_mode():
        worker = Torch(sys.argv[1], json.loads(sys.argv[2]))
        print(json.dumps({"version": torch.__version__}), flush=True)
        for line in sys.stdin:
            print(json.dumps(worker.answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
