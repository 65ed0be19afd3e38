"""llama.cpp through its C interface, as a worker that answers one JSON request a line.

usage: python engine.py MODEL.gguf OPTIONS

OPTIONS is a JSON object: library (the path of a shared library that exports llama.h's functions, or "xllamacpp" for
the one in the installed package), threads, threads_batch, ubatch, flash (true, false), wait (OMP_WAIT_POLICY: active,
passive), sequences (that are decoded side by side, default 1), context (tokens of all sequences in all, shared out evenly), unified
(true: all sequences lie in one cache).

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
        ("token", c.c_void_p),
        ("embd", c.c_void_p),
        ("pos", c.c_void_p),
        ("n_seq_id", c.c_void_p),
        ("seq_id", c.c_void_p),
        ("logits", c.c_void_p),
    ]


class Rows:
    """A batch whose arrays are numpy's, so that many rows are filled at once."""

    def __init__(self, room):
        self.token, self.pos, self.sequence = (np.zeros(room, np.int32) for _ in range(3))
        self.logits = np.zeros(room, np.int8)
        # Each row has a list of sequences, one long.
        self.ones = np.ones(room, np.int32)
        self.lists = self.sequence.ctypes.data + self.sequence.itemsize * np.arange(room, dtype=np.uintp)
        arrays = [self.pos, self.ones, self.lists, self.logits]
        self.batch = Batch(0, self.token.ctypes.data, None, *(a.ctypes.data for a in arrays))

    def fill(self, token, pos, sequence, logits):
        n = self.batch.n_tokens = len(token)
        self.token[:n], self.pos[:n], self.sequence[:n], self.logits[:n] = token, pos, sequence, logits


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
# The booleans of llama_context_params. What is before them, and null unless set, is a pointer longer in some versions.
SWITCHES = [
    ("embeddings", False),
    ("offload_kqv", True),
    ("no_perf", True),
    ("op_offload", True),
    ("swa_full", True),
    ("kv_unified", False),
]
SWITCHES_AT = range(112, 152, 8)
# The library gives each sequence room in steps of so many tokens.
STEP = 256


def switches(params):
    """The booleans of llama_context_params, in their order."""
    views = [(c.c_uint8 * len(SWITCHES)).from_buffer(params, at) for at in SWITCHES_AT]
    found = [view for view in views if list(view) == [default for _, default in SWITCHES]]
    if len(found) != 1:
        sys.exit(f"an unknown layout of llama_context_params: {[list(view) for view in views]}")
    return found[0]


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
        unified, sequences = options.get("unified", False), options.get("sequences", 1)
        each = -(-options.get("context", 2048) // (sequences * STEP)) * STEP
        wanted = {
            "n_ctx": each * sequences,
            "n_batch": each * sequences,
            "n_ubatch": min(options.get("ubatch", 512), each * sequences),
            "n_seq_max": sequences,
            "n_outputs_max_per_seq": 0,
            "n_threads": options["threads"],
            "n_threads_batch": options.get("threads_batch", options["threads"]),
            "flash_attn_type": int(options.get("flash", True)),
        }
        for i, (name, _) in enumerate(LAYOUT):
            if name in wanted:
                params.raw[i] = wanted[name]
        switches(params)[[name for name, _ in SWITCHES].index("kv_unified")] = unified
        lib.llama_init_from_model.restype = c.c_void_p
        lib.llama_init_from_model.argtypes = [c.c_void_p, Struct]
        self.context = c.c_void_p(lib.llama_init_from_model(self.model, params))
        if not self.context:
            sys.exit(f"llama.cpp makes no context with {wanted}")
        # Proof that the values arrived where they were meant to.
        proof = ["n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_threads", "n_threads_batch"]
        proof = {name: wanted[name] for name in proof} | {"n_ctx_seq": each * sequences if unified else each}
        for name, value in proof.items():
            got = getattr(lib, f"llama_{name}")(self.context)
            if got != value:
                sys.exit(f"llama.cpp took {name} {got} for {value}")
        lib.llama_get_memory.restype = c.c_void_p
        self.memory = c.c_void_p(lib.llama_get_memory(self.context))
        lib.llama_memory_seq_rm.argtypes = [c.c_void_p, c.c_int32, c.c_int32, c.c_int32]
        lib.llama_memory_seq_rm.restype = c.c_bool
        lib.llama_memory_clear.argtypes = [c.c_void_p, c.c_bool]
        lib.llama_decode.argtypes = [c.c_void_p, Batch]
        self.room = wanted["n_batch"]
        self.rows = Rows(self.room)
        lib.llama_get_logits.restype = c.c_void_p
        lib.llama_get_logits_ith.restype = c.c_void_p
        lib.llama_get_logits_ith.argtypes = [c.c_void_p, c.c_int32]
        lib.llama_model_get_vocab.restype = c.c_void_p
        lib.llama_model_get_vocab.argtypes = [c.c_void_p]
        self.vocab = lib.llama_vocab_n_tokens(c.c_void_p(lib.llama_model_get_vocab(self.model)))
        self.seen, self.view = None, None
        self.each, self.sequences = each, sequences
        self.length = 0

    def decode(self):
        """Runs the rows, and returns milliseconds."""
        begun = time.perf_counter()
        code = self.lib.llama_decode(self.context, self.rows.batch)
        self.lib.llama_synchronize(self.context)
        ms = (time.perf_counter() - begun) * 1e3
        if code != 0:
            raise RuntimeError(f"llama_decode: {code}")
        return ms

    def run(self, tokens, all_logits):
        n = len(tokens)
        if n > self.room:
            raise ValueError(f"{n} tokens do not fit a batch of {self.room}")
        self.rows.fill(tokens, np.arange(self.length, self.length + n), 0, all_logits)
        self.rows.logits[n - 1] = True
        ms = self.decode()
        self.length += n
        return ms

    def outputs(self, n):
        """The logits of the rows that have some, of which there are n, in the batch's order."""
        seen = self.lib.llama_get_logits(self.context), n
        if seen != self.seen:
            logits = c.cast(seen[0], c.POINTER(c.c_float))
            self.seen, self.view = seen, np.ctypeslib.as_array(logits, (n, self.vocab))
        return self.view

    def check_order(self, rows):
        """Of the outputs of these rows of the batch."""
        logits = self.outputs(len(rows))
        for output, row in zip(logits, rows):
            if self.lib.llama_get_logits_ith(self.context, int(row)) != output.ctypes.data:
                raise RuntimeError("llama.cpp's outputs are not in the order of the batch")

    def best(self):
        return int(self.outputs(1)[0].argmax())

    def empty(self):
        self.lib.llama_memory_clear(self.memory, False)
        self.length = 0

    def keep(self, length):
        self.lib.llama_memory_seq_rm(self.memory, 0, length, -1)
        self.length = length

    def prefill(self, tokens):
        self.empty()
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

    def parallel(self, prompts, new):
        n, lengths = len(prompts), np.array([len(p) for p in prompts])
        if n > self.sequences or lengths.max() + new - 1 > self.each:
            raise ValueError(f"there is room for {self.sequences} sequences of {self.each} tokens each")
        ids, ends, sequences = np.empty((new, n), np.intp), lengths.cumsum(), np.arange(n)
        self.empty()
        begun = time.perf_counter()
        at = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
        self.rows.fill(np.concatenate(prompts), at, np.repeat(sequences, lengths), False)
        self.rows.logits[ends - 1] = True
        self.decode()
        self.outputs(n).argmax(1, out=ids[0])
        prefill_ms = (time.perf_counter() - begun) * 1e3
        self.check_order(ends - 1)
        begun, inside = time.perf_counter(), 0.0
        for last, best in zip(ids, ids[1:]):
            self.rows.fill(last, lengths, sequences, True)
            inside += self.decode()
            self.outputs(n).argmax(1, out=best)
            lengths += 1
        ms = (time.perf_counter() - begun) * 1e3
        if new > 1:
            self.check_order(sequences)
        return {"ms": ms, "prefill_ms": prefill_ms, "outside_ms": ms - inside, "ids": ids.T.tolist()}


def main():
    model, options = sys.argv[1], json.loads(sys.argv[2])
    if "wait" in options:
        os.environ["OMP_WAIT_POLICY"] = options["wait"]  # read when the library is loaded
    llama = Llama(model, options)
    llama.lib.llama_print_system_info.restype = c.c_char_p
    serve(llama, {"system": llama.lib.llama_print_system_info().decode()})


if __name__ == "__main__":
    main()
