"""Model files that both sides of a comparison read.

usage: python models.py NAME OUT.gguf [SOURCE.gguf]

smollm2-q8_0 is SOURCE with every matrix requantised to Q8_0. The others have random weights of a well-known shape and no
tokenizer: llama-1.1b-q8_0, llama-1.1b-q4_0, qwen2.5-0.5b-q8_0. Their speed does not depend on what the weights say.
"""

import os
import sys

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Form
from gguf import GGUFReader, GGUFValueType, GGUFWriter

SHAPES = {
    "llama-1.1b": dict(
        arch="llama", layers=22, hidden=2048, ffn=5632, heads=32, kv=4, vocab=32000, theta=1e4, eps=1e-5, bias=False
    ),
    "qwen2.5-0.5b": dict(
        arch="qwen2", layers=24, hidden=896, ffn=4864, heads=14, kv=2, vocab=151936, theta=1e6, eps=1e-6, bias=True
    ),
}
FORMS = {"q8_0": Form.Q8_0, "q4_0": Form.Q4_0}


def requantise(source, out):
    """Every matrix of a file as Q8_0, the rest as it is."""
    reader = GGUFReader(source)
    arch = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(out, arch)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind = field.types[0]
        sub = field.types[-1] if kind == GGUFValueType.ARRAY else None
        value = field.contents()
        if name == "general.file_type":
            value = int(gguf.LlamaFileType.MOSTLY_Q8_0)
        writer.add_key_value(name, value, kind, sub)
    for tensor in reader.tensors:
        data = tensor.data
        if len(tensor.shape) == 2 and tensor.tensor_type != Form.Q8_0:
            wide = gguf.dequantize(data, tensor.tensor_type)
            writer.add_tensor(tensor.name, gguf.quantize(wide, Form.Q8_0), raw_dtype=Form.Q8_0)
        else:
            writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    finish(writer)


def blocks(rng, rows, columns, form):
    """A random matrix in blocks of 32: a scale in half precision, then the values."""
    n = columns // 32
    width = {Form.Q8_0: 32, Form.Q4_0: 16}[form]
    out = np.empty((rows, n, 2 + width), np.uint8)
    # So that a row's values have the size that keeps states finite: about 1 / sqrt(columns).
    spread = {Form.Q8_0: 73.0, Form.Q4_0: 4.6}[form]
    scale = (rng.random((rows, n), np.float32) * 0.4 + 0.8) / (spread * np.sqrt(columns))
    out[..., :2] = scale.astype(np.float16)[..., None].view(np.uint8)
    out[..., 2:] = np.frombuffer(rng.bytes(rows * n * width), np.uint8).reshape(rows, n, width)
    return out.reshape(rows, n * (2 + width))


def random(name, out):
    shape, form = name.rsplit("-", 1)
    s, form = SHAPES[shape], FORMS[form]
    rng = np.random.default_rng(1)
    writer = GGUFWriter(out, s["arch"])
    writer.add_name(f"random {name}")
    writer.add_context_length(2048)
    writer.add_embedding_length(s["hidden"])
    writer.add_block_count(s["layers"])
    writer.add_feed_forward_length(s["ffn"])
    writer.add_head_count(s["heads"])
    writer.add_head_count_kv(s["kv"])
    writer.add_rope_freq_base(s["theta"])
    writer.add_layer_norm_rms_eps(s["eps"])
    writer.add_vocab_size(s["vocab"])
    size = s["hidden"] // s["heads"]
    if s["arch"] == "llama":
        writer.add_rope_dimension_count(size)
    writer.add_tokenizer_model("no_vocab")

    def matrix(name, rows, columns):
        writer.add_tensor(name, blocks(rng, rows, columns, form), raw_dtype=form)

    def vector(name, n, value):
        writer.add_tensor(name, np.full(n, value, np.float32))

    h, kv = s["hidden"], s["kv"] * size
    matrix("token_embd.weight", s["vocab"], h)
    for i in range(s["layers"]):
        b = f"blk.{i}"
        vector(f"{b}.attn_norm.weight", h, 1)
        for which, rows in [("q", h), ("k", kv), ("v", kv)]:
            matrix(f"{b}.attn_{which}.weight", rows, h)
            if s["bias"]:
                vector(f"{b}.attn_{which}.bias", rows, 0.01)
        matrix(f"{b}.attn_output.weight", h, h)
        vector(f"{b}.ffn_norm.weight", h, 1)
        matrix(f"{b}.ffn_gate.weight", s["ffn"], h)
        matrix(f"{b}.ffn_up.weight", s["ffn"], h)
        matrix(f"{b}.ffn_down.weight", h, s["ffn"])
    vector("output_norm.weight", h, 1)
    finish(writer)


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    name, out = sys.argv[1:3]
    partial = f"{out}.partial"
    if name == "smollm2-q8_0":
        requantise(sys.argv[3], partial)
    else:
        random(name, partial)
    os.replace(partial, out)


if __name__ == "__main__":
    main()
