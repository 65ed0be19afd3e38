"""llama.cpp's server, the way to its own speculation, as a worker that answers one JSON request a line.

usage: python server.py MODEL.gguf OPTIONS

OPTIONS is a JSON object: server (the path of llama-server, or "xllamacpp" for the one in the installed package), threads, flash (true,
false), context, speculation (null, or {"type": "ngram-simple", "size_n": 4, "size_m": 16, ..}; a draft model is
{"type": "draft-simple", "model": "draft.gguf", "n_max": 4}), wait (OMP_WAIT_POLICY).

Requests: {"op": "decode", "prompt": [..], "new": n, "eos": [..]} decodes greedily. Times are those the server reports; the
first token belongs to the prefill, as everywhere.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def in_process(model, options, port):
    import xllamacpp as x

    p = x.CommonParams()
    p.model.path = model
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = options["threads"]
    p.n_ctx, p.n_parallel, p.port = options.get("context", 2048), 1, port
    p.hostnames = ["127.0.0.1"]
    p.warmup = False
    p.verbosity = 0
    p.fit_params = False
    p.flash_attn_type = x.llama_flash_attn_type(int(options.get("flash", True)))
    spec = dict(options.get("speculation") or {})
    if spec:
        name = spec.pop("type")
        p.speculative.types = [getattr(x.common_speculative_type, "COMMON_SPECULATIVE_TYPE_" + name.upper().replace("-", "_"))]
        part = p.speculative.draft if name.startswith("draft") else getattr(p.speculative, name.replace("-", "_"))
        if "model" in spec:
            part.mparams.path = spec.pop("model")
            part.cpuparams.n_threads = part.cpuparams_batch.n_threads = options["threads"]
        for key, value in spec.items():
            setattr(part, key, value)
    return x.Server(p)


def process(model, options, port):
    t, flash = str(options["threads"]), "on" if options.get("flash", True) else "off"
    args = [options["server"], "-m", model, "-t", t, "-tb", t, "-c", str(options.get("context", 2048)), "-fa", flash]
    args += ["-np", "1", "--port", str(port), "--host", "127.0.0.1", "--no-warmup", "-lv", "0", "--fit", "off"]
    spec = dict(options.get("speculation") or {})
    if spec:
        name = spec.pop("type")
        args += ["--spec-type", name]
        if "model" in spec:
            args += ["-md", spec.pop("model"), "-td", t, "-tbd", t]
        prefix = "draft" if name.startswith("draft") else name
        for key, value in spec.items():
            args += [f"--spec-{prefix}-{key.replace('_', '-')}", str(value)]
    return subprocess.Popen(args, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def post(port, path, body):
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)


def wait_until_ready(port, server):
    for _ in range(600):
        if isinstance(server, subprocess.Popen) and server.poll() is not None:
            sys.exit(f"llama-server ended with {server.returncode}: {server.args}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    sys.exit("llama.cpp's server does not answer")


def decode(port, request):
    # One token at most is ever considered, so that sampling costs nothing.
    body = {"prompt": request["prompt"], "n_predict": request["new"], "temperature": 0.0, "top_k": 1}
    body |= {"samplers": ["top_k"], "cache_prompt": False, "return_tokens": True, "ignore_eos": not request["eos"]}
    found = post(port, "/completion", body)
    t = found["timings"]
    ids = found["tokens"]
    if found.get("stop_type") == "eos" and (not ids or ids[-1] not in request["eos"]):
        ids = ids + request["eos"][:1]  # the server keeps the last token to itself, but has computed it
    return {
        "ids": ids,
        "ms": t["predicted_ms"],
        "prefill_ms": t["prompt_ms"],
        "drafted": t.get("draft_n", 0),
        "accepted": t.get("draft_n_accepted", 0),
    }


def main():
    model, options = sys.argv[1], json.loads(sys.argv[2])
    if "wait" in options:
        os.environ["OMP_WAIT_POLICY"] = options["wait"]
    # The library writes its log where the answers go.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    port = free_port()
    server = (in_process if options["server"] == "xllamacpp" else process)(model, options, port)
    try:
        wait_until_ready(port, server)
        print("{}", file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(decode(port, json.loads(line))), file=answers, flush=True)
    finally:
        if isinstance(server, subprocess.Popen):
            server.kill()
    os._exit(0)  # the library's threads have nothing left to do


if __name__ == "__main__":
    main()
