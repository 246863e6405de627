#!/usr/bin/env bash
set -euo pipefail
usage() {
    cat <<'TEXT'
Usage: benchmarks/gpu.sh [--part NAME]... [--out DIR] [options]

Runs the tests and measurements that need a GPU (docs/gpu.md), in parts of at most 9 minutes. Each part can be run alone
and again; a part replaces its own files. Without --part all run in this order, and one that fails does not stop the
others.

  tests      the layer's tests on a GPU: no waits, torch's decisions, graphs, repeatability, training, memory
  kernels    each kernel against its twin in torch
  layer      forward and backward, and forward, of one layer beside dense, torch's grouped GEMM, ScatterMoE, transformers
  decode     5 to 640 tokens
  train      words a second of fairseq-train, bfloat16, by kernels and by torch
  generate   sentences a second of fairseq-generate with models of random weights, beam 5
  compare    every method of the demo, trained, scored and put into one table

  --part NAME       one of these; may be given several times
  --out DIR         where tables (.txt) and JSON go (default: benchmarks/results)
  --python FILE     an interpreter with torch and triton (default: .venv/bin/python if there is one, else python3)
  --tokens N        only this many tokens in the part layer (default: 8192 and 16384)
  --updates N       updates of each training in the part train (default: 40)
  --dry-run         print the commands and run nothing
  -h, --help        this text

tests, kernels, layer and decode need torch, triton, NumPy, SciPy and pytest; the others fairseq as well, and compare the
environment of scripts/setup.sh. Exit: 0 all passed, 1 a part failed or ran out of time, 2 bad arguments.
TEXT
}
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../scripts/lib.sh"

all_parts=(tests kernels layer decode train generate compare)
parts=() out='' python='' tokens='' updates=40
flags=('part:parts[]' out python tokens updates)
switches=(dry-run)
read_flags "$@"
for part in ${parts[@]+"${parts[@]}"}; do
    [[ " ${all_parts[*]} " == *" $part "* ]] || die "--part is one of: ${all_parts[*]}; got '$part'" 2
done
((${#parts[@]})) || parts=("${all_parts[@]}")
out=$(absolute "${out:-$root/benchmarks/results}")
if [[ -z $python ]]; then
    python=python3
    [[ -x $root/.venv/bin/python ]] && python=$root/.venv/bin/python
fi
limit=540 # seconds of a part
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} XMOE_PYTHON=$python
unset TRITON_INTERPRET # kernels shall be compiled

# Settings of pytest from this checkout, but none of its plugins is needed.
pytest() {
    timed "$1" "$python" -m pytest -q -p no:cacheprovider -o addopts='-ra --import-mode=importlib' "${@:2}"
}

timed() { # timed NAME COMMAND...: within what is left of the part's time; the table goes to NAME.txt
    local name=$1 left=$((limit - (SECONDS - part_start))) code=0
    shift
    log "$name: $*"
    [[ -z $dry_run ]] || return 0
    ((left > 0)) || { log "error: $name: no time left" && return 1; }
    timeout --kill-after=10 "$left" "$@" 2>&1 | tee "$out/$name.txt.partial" || code=$?
    mv -f "$out/$name.txt.partial" "$out/$name.txt"
    ((code != 124)) || log "error: $name ran out of its $limit s; run it again alone, with fewer tokens or updates"
    return "$code"
}

workers() { # pytest-xdist compiles on several cores
    if "$python" -c 'import xdist' 2>/dev/null; then printf '%s\n' -n 4; fi
}

run_tests() { pytest gpu-tests tests/moe/test_gpu.py tests/moe/test_devices.py; }

run_kernels() {
    local -a spread
    mapfile -t spread < <(workers)
    pytest gpu-kernels ${spread[@]+"${spread[@]}"} tests/moe/kernels
}

run_layer() {
    local mode count
    for count in ${tokens:-8192 16384}; do
        for mode in train infer; do
            timed "gpu-layer-$mode-$count" "$python" -m benchmarks.gpu_layer --modes "$mode" --tokens "$count" \
                --out "$out/gpu-layer-$mode-$count.json"
        done
    done
}

run_decode() {
    timed gpu-decode "$python" -m benchmarks.gpu_layer --modes decode --out "$out/gpu-decode.json"
}

run_train() { # the dense model knows no moe_ flags, so the other way is timed by itself
    local -a shared=(--device cuda --optimizer adam --rounds 1 --updates "$updates" --max-tokens 8192)
    with_fairseq
    timed gpu-train "$python" -m benchmarks.train "${shared[@]}" --out "$out/gpu-train.json" --extra --amp --bf16
    timed gpu-train-by-torch "$python" -m benchmarks.train "${shared[@]}" --archs xmoe_transformer \
        --out "$out/gpu-train-by-torch.json" --extra --amp --bf16 --moe-compute grouped
}

run_generate() {
    with_fairseq
    timed gpu-generate "$python" -m benchmarks.generate --random "$root/runs/gpu-models" --device cuda --rounds 2 \
        --models 'dense float32' 'sparse float32' --sentences 512 --batch-sizes 1 64 --beams 5 \
        --out "$out/gpu-generate.json"
}

with_fairseq() {
    [[ -n $dry_run ]] || "$python" -c 'import fairseq' || die "this part needs fairseq, which $python does not have"
}

run_compare() {
    timed gpu-compare bash "$root/scripts/demo.sh" --compare --device cuda --out "$root/runs/gpu-compare"
}

cd "$root"
[[ -n $dry_run ]] || {
    mkdir -p "$out"
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
        die "$python sees no CUDA device; name another interpreter with --python"
    "$python" -c 'import torch, triton
print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)' | tee "$out/gpu-device.txt"
}
failed=()
for part in "${parts[@]}"; do
    part_start=$SECONDS
    set +e # in a condition, bash would run on after a failing command of the part
    (
        set -e
        "run_$part"
    )
    code=$?
    set -e
    if ((code)); then
        failed+=("$part")
        log "$part: failed (exit $code) after $((SECONDS - part_start)) s"
    else
        log "$part: passed in $((SECONDS - part_start)) s"
    fi
done
((${#failed[@]} == 0)) || die "failed: ${failed[*]}"
