"""HF transformers beside scylla on one device: decoding and forwards of several rows on the same shapes, in bf16 (f32 on a CPU).

The default model has the same weights, and its greedy text is compared; the other shapes are random here too. Prints one
JSON object.
"""

import argparse
import json
import os
import statistics
import time

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

CONTEXT = 512
SHAPES = {
    "1.1b": dict(num_hidden_layers=22, hidden_size=2048, intermediate_size=5632, num_attention_heads=32, num_key_value_heads=4, vocab_size=32000),
    "8b": dict(num_hidden_layers=32, hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256),
}


def load(shape, args, dtype):
    if shape == "smollm2":
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device).eval()
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=2048, tie_word_embeddings=False, dtype=dtype)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    model = model.to_empty(device=args.device)
    with torch.no_grad():
        for value in model.parameters():
            value.uniform_(-0.025, 0.025)
    # Buffers are not filled by that: the rotary frequencies, made anew.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(args.device)
    return model.eval()


def wait(device):
    if device != "cpu":
        torch.cuda.synchronize()


def forward(model, cache, ids, device):
    """Milliseconds of rows behind the context, the argmax of each brought to the host; the rows are dropped again."""
    wait(device)
    begun = time.perf_counter()
    out = model(ids, past_key_values=cache, use_cache=True)
    out.logits[0].argmax(-1).tolist()
    took = (time.perf_counter() - begun) * 1e3
    cache.crop(-ids.shape[1])
    return took


def measure(model, args):
    device = args.device
    prompt = torch.arange(CONTEXT, device=device)[None] * 7 + 1000
    cache = DynamicCache()
    model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    found = {}
    for rows in (1, 2, 4, 8, 16, 32, 60):
        ids = torch.arange(rows, device=device)[None] * 7 + 1000
        times = []
        for _ in range(25):
            before = cache.get_seq_length()
            times.append(forward(model, cache, ids, device))
            if cache.get_seq_length() != CONTEXT:
                raise SystemExit(f"a cache of {cache.get_seq_length()} rows, before {before}")
        found[str(rows)] = statistics.median(times[5:])
    return found


def greedy(model, ids, count, device):
    """Greedy ids by a plain loop, as transformers' own generate does with less around it, and milliseconds a token."""
    cache = DynamicCache()
    tokens = torch.tensor([ids], device=device)
    out = []
    times = []
    for _ in range(count):
        wait(device)
        begun = time.perf_counter()
        logits = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        out.append(int(logits.argmax()))
        times.append((time.perf_counter() - begun) * 1e3)
        tokens = torch.tensor([[out[-1]]], device=device)
    return out, statistics.median(times[1:])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", default="smollm2")
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompt-ids", required=True)
    parser.add_argument("--ids", help="scylla's greedy text of the prompt, one JSON object a line")
    args = parser.parse_args()
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    found = {"torch": torch.__version__, "transformers": transformers.__version__, "dtype": str(dtype), "attention": "sdpa", "shapes": {}}
    with torch.inference_mode():
        for shape in args.shapes.split(","):
            model = load(shape, args, dtype)
            one = {"forward_ms": measure(model, args)}
            if shape == "smollm2":
                ids, per_token = greedy(model, [int(i) for i in args.prompt_ids.split(",")], 64, args.device)
                one["greedy_ms_per_token"] = per_token
                if args.ids and os.path.exists(args.ids):
                    texts = [json.loads(line)["ids"] for line in open(args.ids)]
                    same = [next((i for i, (a, b) in enumerate(zip(ids, t)) if a != b), 64) for t in texts]
                    one["greedy_tokens_equal_to_scylla"] = same
            found["shapes"][shape] = one
            del model
    print(json.dumps(found))


if __name__ == "__main__":
    main()
