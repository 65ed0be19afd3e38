"""What the workers in Python share: greedy decoding, and answering one JSON request a line.

An engine has prefill(tokens), which empties the cache, runs a prompt and returns milliseconds and the most probable next
token; next(token), which appends a token and returns the most probable next one; and forward(rows, behind), which runs
rows behind the first so many cached tokens with the logits of each, and returns milliseconds.

Requests: {"op": "forward", "rows": m, "behind": n} does so three times and tells the middle time;
{"op": "decode", "prompt": [..], "new": n, "eos": [..]} decodes greedily.
"""

import json
import sys
import time


def answer(engine, request):
    match request["op"]:
        case "forward":
            times = [engine.forward(request["rows"], request["behind"]) for _ in range(3)]
            return {"ms": sorted(times)[1]}
        case "decode":
            prefill_ms, token = engine.prefill(request["prompt"])
            ids, eos = [token], set(request["eos"])
            begun = time.perf_counter()
            while len(ids) < request["new"] and ids[-1] not in eos:
                ids.append(engine.next(ids[-1]))
            return {"ids": ids, "ms": (time.perf_counter() - begun) * 1e3, "prefill_ms": prefill_ms}
    raise ValueError(f"unknown request {request['op']}")


def serve(engine, greeting):
    print(json.dumps(greeting), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(engine, json.loads(line))), flush=True)
