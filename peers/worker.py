"""What the workers in Python share: greedy decoding, and answering one JSON request a line.

An engine has prefill(tokens), which empties the cache, runs a prompt and returns milliseconds and the most probable next
token; next(token), which appends a token and returns the most probable next one; and forward(rows, behind), which runs
rows behind the first so many cached tokens with the logits of each, and returns milliseconds. Where it can, it has
parallel(prompts, new), which empties the caches and answers the request of that name.

Requests: {"op": "forward", "rows": m, "behind": n} does so three times and tells the middle time;
{"op": "decode", "prompt": [..], "new": n, "eos": [..]} decodes greedily;
{"op": "parallel", "prompts": [[..], ..], "new": n} runs all prompts, each a sequence of its own, takes each one's most probable
next token, and decodes n - 1 more of each greedily with all sequences in one forward a step: ms of those steps, those of them spent
outside the forward (outside_ms), prefill_ms, and the ids of each sequence.
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
        case "parallel":
            return engine.parallel(request["prompts"], request["new"])
    raise ValueError(f"unknown request {request['op']}")


def serve(engine, greeting):
    print(json.dumps(greeting), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(engine, json.loads(line))), flush=True)
