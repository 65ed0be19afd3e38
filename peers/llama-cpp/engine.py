"""llama.cpp through its C interface, as a worker that answers one JSON request a line.

usage: python engine.py MODEL.gguf OPTIONS

OPTIONS is a JSON object: library (the path of a shared library that exports llama.h's functions, or "xllamacpp" for
the one in the installed package), threads, threads_batch, ubatch, flash (true, false), context, wait (OMP_WAIT_POLICY: active,
passive).

Requests are those of peers/worker.py.
"""

import ctypes as c
import json
import os
import sys
import time

import numpy as np

sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from worker import serve


class Struct(c.Structure):
    """Room for any struct of parameters: the library writes and reads the part it knows."""

    _fields_ = [("raw", c.c_int32 * 256)]


class Batch(c.Structure):
    _fields_ = [
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", c.POINTER(c.c_float)),
        ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)),
        ("seq_id", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),
    ]


# The beginning of llama_context_params, each with its default: what is set below is found by name, and a library whose
# defaults differ is one whose layout is not known.
LAYOUT = [
    ("n_ctx", 512),
    ("n_batch", 2048),
    ("n_ubatch", 512),
    ("n_seq_max", 1),
    ("n_rs_seq", 0),
    ("n_outputs_max", 0),
    ("n_outputs_max_per_seq", 1),
    ("n_threads", 4),
    ("n_threads_batch", 4),
    ("ctx_type", 0),
    ("rope_scaling_type", -1),
    ("pooling_type", -1),
    ("attention_type", -1),
    ("flash_attn_type", -1),
]


def library_path(library):
    if library != "xllamacpp":
        return library
    import importlib.util

    folder = os.path.dirname(importlib.util.find_spec("xllamacpp").origin)
    names = [n for n in os.listdir(folder) if n.startswith("xllamacpp.") and n.endswith(".so")]
    return os.path.join(folder, names[0])


class Llama:
    def __init__(self, model, options):
        lib = self.lib = c.CDLL(library_path(options["library"]))
        silent = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)
        self.log = silent(lambda *_: None)
        lib.llama_log_set(self.log, None)
        lib.llama_backend_init()
        for name in ["llama_model_default_params", "llama_context_default_params"]:
            getattr(lib, name).restype = Struct
        lib.llama_model_load_from_file.restype = c.c_void_p
        lib.llama_model_load_from_file.argtypes = [c.c_char_p, Struct]
        self.model = lib.llama_model_load_from_file(model.encode(), lib.llama_model_default_params())
        if not self.model:
            sys.exit(f"llama.cpp does not load {model}")
        params = lib.llama_context_default_params()
        found = list(params.raw[: len(LAYOUT)])
        if found != [default for _, default in LAYOUT]:
            sys.exit(f"an unknown layout of llama_context_params: {found}")
        wanted = {
            "n_ctx": options.get("context", 2048),
            "n_batch": options.get("context", 2048),
            "n_ubatch": options.get("ubatch", 512),
            "n_outputs_max_per_seq": 0,
            "n_threads": options["threads"],
            "n_threads_batch": options.get("threads_batch", options["threads"]),
            "flash_attn_type": int(options.get("flash", True)),
        }
        for i, (name, _) in enumerate(LAYOUT):
            if name in wanted:
                params.raw[i] = wanted[name]
        lib.llama_init_from_model.restype = c.c_void_p
        lib.llama_init_from_model.argtypes = [c.c_void_p, Struct]
        self.context = c.c_void_p(lib.llama_init_from_model(self.model, params))
        if not self.context:
            sys.exit(f"llama.cpp makes no context with {wanted}")
        # Proof that the values arrived where they were meant to.
        for name in ["n_ctx", "n_batch", "n_ubatch", "n_threads", "n_threads_batch"]:
            got = getattr(lib, f"llama_{name}")(self.context)
            if got != wanted[name]:
                sys.exit(f"llama.cpp took {name} {got} for {wanted[name]}")
        lib.llama_get_memory.restype = c.c_void_p
        self.memory = c.c_void_p(lib.llama_get_memory(self.context))
        lib.llama_memory_seq_rm.argtypes = [c.c_void_p, c.c_int32, c.c_int32, c.c_int32]
        lib.llama_memory_seq_rm.restype = c.c_bool
        lib.llama_decode.argtypes = [c.c_void_p, Batch]
        lib.llama_batch_init.restype = Batch
        self.room = wanted["n_batch"]
        self.batch = lib.llama_batch_init(self.room, 0, 1)
        lib.llama_get_logits_ith.restype = c.POINTER(c.c_float)
        lib.llama_get_logits_ith.argtypes = [c.c_void_p, c.c_int32]
        lib.llama_model_get_vocab.restype = c.c_void_p
        lib.llama_model_get_vocab.argtypes = [c.c_void_p]
        self.vocab = lib.llama_vocab_n_tokens(c.c_void_p(lib.llama_model_get_vocab(self.model)))
        self.length = 0

    def run(self, tokens, all_logits):
        n, b = len(tokens), self.batch
        if n > self.room:
            raise ValueError(f"{n} tokens do not fit a batch of {self.room}")
        b.n_tokens = n
        for i, token in enumerate(tokens):
            b.token[i] = token
            b.pos[i] = self.length + i
            b.n_seq_id[i] = 1
            b.seq_id[i][0] = 0
            b.logits[i] = all_logits or i == n - 1
        begun = time.perf_counter()
        code = self.lib.llama_decode(self.context, b)
        self.lib.llama_synchronize(self.context)
        ms = (time.perf_counter() - begun) * 1e3
        if code != 0:
            raise RuntimeError(f"llama_decode: {code}")
        self.length += n
        return ms

    def best(self):
        logits = self.lib.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax())

    def keep(self, length):
        self.lib.llama_memory_seq_rm(self.memory, 0, length, -1)
        self.length = length

    def prefill(self, tokens):
        self.keep(0)
        ms = self.run(tokens, False)
        begun = time.perf_counter()
        token = self.best()
        return ms + (time.perf_counter() - begun) * 1e3, token

    def next(self, token):
        self.run([token], False)
        return self.best()

    def forward(self, rows, behind):
        self.keep(behind)
        return self.run([1000 + i for i in range(rows)], True)


def main():
    model, options = sys.argv[1], json.loads(sys.argv[2])
    if "wait" in options:
        os.environ["OMP_WAIT_POLICY"] = options["wait"]  # read when the library is loaded
    llama = Llama(model, options)
    llama.lib.llama_print_system_info.restype = c.c_char_p
    serve(llama, {"system": llama.lib.llama_print_system_info().decode()})


if __name__ == "__main__":
    main()
