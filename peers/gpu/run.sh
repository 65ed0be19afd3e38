#!/usr/bin/env bash
# What is measured and checked on a machine with a GPU, out of an unpacked `cargo xtask gpu-pack`.
#
# usage: run.sh [--device cuda|cpu] [--steps tests,bench,generate,cycles,train,transformers] [--shapes smollm2,1.1b,8b]
#               [--train EXPERIMENT] [--train-seconds N] [--out DIR]
#
#   tests         parity with golden values, and greedy text with every draft, tree and rule equal to plain decoding
#   cycles        benchmark of forwards, draft, rule and cycles on the shapes (bin/device)
#   generate      the default model's greedy text, plain and with a draft, on the device
#   bench         `scylla bench` on prompts, drafts beside plain decoding
#   train         a few steps of each recipe, for their speed; then, where N is given, EXPERIMENT (eagle3) for N seconds
#   transformers  the same shapes and the same weights with HF transformers, where Python has it
#
# Each step writes one file of DIR (results); a step that fails is named, and the others run.
set -u
here=$(cd "$(dirname "$0")" && pwd)
device=$(sed -n 's/.*"device":"\([a-z]*\)".*/\1/p' "$here/pack.json")
steps=tests,cycles,generate,bench,train,transformers
shapes= out=$here/results train=eagle3 seconds=0 more=
while [ $# -gt 0 ]; do
    case $1 in
        --device) device=$2; shift ;;
        --steps) steps=$2; shift ;;
        --shapes) shapes=$2; shift ;;
        --train) train=$2; shift ;;
        --train-seconds) seconds=$2; shift ;;
        --train-set) more="$more --set $2"; shift ;;
        --out) out=$2; shift ;;
        *) echo "run.sh: unknown argument $1" >&2; exit 2 ;;
    esac
    shift
done
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
cd "$here" || exit 1
export SCYLLA_CACHE=$here/cache SCYLLA_OFFLINE=1 SCYLLA_DEVICE=$device RUST_BACKTRACE=0
[ -d "$here/golden" ] && export SCYLLA_GOLDEN=$here/golden
if [ "$device" = cuda ]; then
    : "${shapes:=smollm2,1.1b,8b}"
    forms=bf16
    # CUDA's libraries may be those of Python packages; kernels are compiled by the driver at first use, and kept.
    cuda=$(python3 -c 'import nvidia.cu13 as n; print(list(n.__path__)[0])' 2>/dev/null)
    [ -n "$cuda" ] && export LD_LIBRARY_PATH=$cuda/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    export CUDA_CACHE_PATH=$here/kernels CUDA_CACHE_MAXSIZE=4294967296
    name=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -1)
else
    : "${shapes:=smollm2}"
    forms=as-is
    name=
fi
cpu=$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1)
printf '{"pack": %s, "device": "%s", "gpu": "%s", "cpu": "%s", "cores": %s}\n' \
    "$(cat pack.json)" "$device" "$name" "$cpu" "$(nproc)" | tee "$out/machine.json"

failed=
step() { # NAME COMMAND...
    step=$1; shift
    case ",$steps," in *",$step,"*) ;; *) return ;; esac
    begun=$(date +%s)
    if "$@"; then state=passed; else state=failed; failed="$failed $step"; fi
    echo "== $step: $state in $(($(date +%s) - begun)) s"
}

tests() {
    ok=0
    : >"$out/tests.txt"
    for test in parity eagle lossless drafts families training; do
        [ -x "bin/$test" ] || continue # not packed
        # One after another, so that a device is not shared.
        bin/$test --test-threads=2 --show-output >>"$out/tests.txt" 2>&1 || ok=1
        grep -h '^test result' "$out/tests.txt" | tail -1 | sed "s/^/$test: /"
    done
    grep -E '^test .*(FAILED|ignored)|skipped:|panicked' "$out/tests.txt"
    return $ok
}

cycles() {
    SCYLLA_SHAPES=$shapes SCYLLA_FORMS=$forms SCYLLA_RESULTS=$out/cycles.json \
        SCYLLA_MODEL=$(ls "$here"/cache/models/*.gguf) bin/device --bench >"$out/cycles.txt" 2>&1
    ok=$?
    grep -E 'GB/s|read once|_ms|time:' "$out/cycles.txt" | tail -80
    return $ok
}

prompt=1,9690,198,2683,359,253,5356,5646,11173,3365,3511,308,34519,28,7018,411,407,19712,8182,2
generate() {
    : >"$out/generate.json"
    for more in "" "--draft ngram"; do
        # shellcheck disable=SC2086 # words of an option
        bin/scylla generate --device "$device" --weights bf16 --prompt-ids $prompt --ignore-eos \
            --max-new-tokens 64 --json $more >>"$out/generate.json" || return 1
    done
    cut -c1-400 "$out/generate.json"
}

bench() {
    bin/scylla bench --device "$device" --set run.max_new_tokens=64 --set run.repeats=3 --json >"$out/bench.json"
}

learn() { # NAME OUT SETTINGS...
    name=$1 to=$2
    shift 2
    # shellcheck disable=SC2086 # words of options
    bin/scylla train --config "train/$name.toml" --output "$to" --device "$device" --weights "$([ "$device" = cuda ] && echo bf16 || echo as-is)" \
        --set "stage.data.files=['$here/data']" "$@"
}

train() {
    [ -d data ] || { echo "train: no data were packed, left out"; return 0; }
    ok=0
    for name in eagle2 eagle3 scylla; do
        rm -rf "speed/$name"
        learn $name "speed/$name" --set stage.steps=25 --set stage.tokens=0 --set stage.schedule.shape=constant --set stage.schedule.warmup=0 \
            --set stage.schedule.cooldown=0 --set stage.data.tokens=400000 --set train.batch=8 --set evaluate.every=0 --set evaluate.count=1 \
            --set evaluate.max_new_tokens=8 >"$out/train-$name.txt" 2>&1 || { ok=1; tail -3 "$out/train-$name.txt"; }
        cp "speed/$name/metrics.jsonl" "$out/train-$name.jsonl"
        tail -1 "$out/train-$name.jsonl" | cut -c1-600
    done
    if [ "$seconds" -gt 0 ]; then
        # Ctrl-C leaves a checkpoint; the best draft until then is what is wanted.
        # shellcheck disable=SC2086
        ( learn "$train" trained $more 2>&1 & pid=$!
          ( sleep "$seconds"; kill -INT $(pgrep -f "scylla train --config train/$train.toml --output trained") ) 2>/dev/null &
          wait $pid ) | tee "$out/train.txt" | tail -30
        cp trained/metrics.jsonl trained/experiment.toml "$out/"
        [ -d trained/best ] && cp -r trained/best "$out/best"
    fi
    return $ok
}

transformers() {
    python3 -c 'import torch, transformers' 2>/dev/null || { echo "transformers: not there, left out"; return 0; }
    SCYLLA_MODEL=$(ls "$here"/cache/models/*.gguf) bin/device --write-hf "$here/hf" || return 1
    python3 transformers_gpu.py --device "$device" --shapes "$shapes" --model "$here/hf" --prompt-ids $prompt \
        --ids "$out/generate.json" >"$out/transformers.json" && cat "$out/transformers.json"
}

step tests tests
step cycles cycles
step generate generate
step bench bench
step train train
step transformers transformers
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
