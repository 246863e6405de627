#!/usr/bin/env bash
set -euo pipefail
usage() {
    cat <<'TEXT'
Usage: benchmarks/hf_peers.sh [ARGUMENT...]

Times the sparse blocks of Hugging Face transformers beside our MoE layer and a dense FFN of equal FLOPs. Makes a
virtual environment of its own for that, with torch, numpy and scipy at the project's pins and transformers at the pin
of benchmarks/requirements-hf.txt; a second call with the same pins starts at once. fairseq is not needed, and no model
is downloaded: the blocks have random weights.

ARGUMENT... goes to python -m benchmarks.hf_peers:
  --tokens N...     tokens of one call (default: 1024 4096)
  --modes MODE...   train, infer (default: both)
  --dtype TYPE      float32 (default), bfloat16 or float16
  --device DEVICE   cpu (default) or cuda
  --repeats N       timed turns of every candidate (default: 7)
  --out FILE        where the JSON goes (default: benchmarks/results/)
  -h, --help        this text

Environment:
  XMOE_HF_VENV      where the environment goes (default: .venv-hf at the project's root)
  XMOE_PYTHON       the interpreter to make it with, Python 3.10 to 3.12 (default: python3)
  pip's own variables work too. On Linux, PyPI's torch brings CUDA (some GB). For the CPU build:
  PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu bash benchmarks/hf_peers.sh

Exit: 0 done, 1 a step failed, 2 bad arguments.
TEXT
}
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../scripts/lib.sh"

for argument; do
    case $argument in -h | --help) usage && exit 0 ;; esac
done

venv=$(absolute "${XMOE_HF_VENV:-$root/.venv-hf}")
python=$venv/bin/python
stamp=$venv/.xmoe-hf
base=${XMOE_PYTHON:-python3}
pins=$(grep -E '^(torch|numpy|scipy)==' "$root/requirements.txt" && cat "$root/benchmarks/requirements-hf.txt")

make_environment() {
    "$base" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' ||
        die "$base is not Python 3.10 to 3.12; name one: XMOE_PYTHON=/path/to/python3.11 bash benchmarks/hf_peers.sh"
    log "make $venv (torch is the large part)"
    new_venv "$base" "$venv" XMOE_HF_VENV || die "could not make $venv"
    printf '%s\n' "$pins" >"$venv/requirements.txt"
    "$python" -m pip install --disable-pip-version-check --progress-bar off --quiet -r "$venv/requirements.txt" ||
        die "could not install the pins of $venv/requirements.txt (the reason is above); the same command tries again"
    printf '%s\n' "$pins" >"$stamp"
}

if ! [[ -x $python && -f $stamp && $(<"$stamp") == "$pins" ]]; then
    make_environment
fi
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m benchmarks.hf_peers "$@"
