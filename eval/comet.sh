#!/usr/bin/env bash
set -euo pipefail
usage() { cat <<'TEXT'
Usage: bash eval/comet.sh --source FILE --hypotheses FILE --references FILE --out FILE
                          [--model NAME|CKPT] [--gpus N] [--batch-size N] [--venv DIR] [--dry-run]

Scores translations with COMET, an optional extra: it lives in a virtual environment of its own (--venv, default
.venv-comet), since it needs an older numpy and protobuf than this project. The first call installs it (torch and
transformers, some gigabytes) and downloads the model from the Hugging Face hub (wmt22-comet-da: 2.3 GB); on a
machine without that hub give --model the path of a downloaded checkpoint (.../checkpoints/model.ckpt).

  --model       hub name or checkpoint file (default Unbabel/wmt22-comet-da)
  --gpus        GPUs to use; 0 for the CPU (default 0)
  --batch-size  sentences a batch (default 16)
  --out         segment scores, as JSON; the mean goes to standard output
  --dry-run     print the lines that would run, and run none

Exit: 0 done, 1 failed, 2 bad arguments.
TEXT
}
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../scripts/lib.sh"

version=2.2.7
source='' hypotheses='' references='' out='' model=Unbabel/wmt22-comet-da gpus=0 batch_size=16 venv=.venv-comet
# Read by read_flags of lib.sh.
# shellcheck disable=SC2034
flags=(source hypotheses references out model gpus batch-size venv) switches=(dry-run) old_flags=(reference:references json:out)
read_flags "$@"
for name in source hypotheses references out; do
    [[ -n ${!name} ]] || die "--$name is missing; see --help" 2
done
need_whole_number --gpus "$gpus" 0
need_whole_number --batch-size "$batch_size" 1

step() { # step WHAT-FAILED COMMAND...
    run "${@:2}" || die "$1"
}
check_parallel() {
    local file lines expected=''
    for file in "$source" "$hypotheses" "$references"; do
        [[ -f $file ]] || die "no such file: $file"
        iconv -f UTF-8 -t UTF-8 "$file" >/dev/null 2>&1 || die "$file: invalid UTF-8"
        lines=$(grep -c '' "$file" || true)
        ((lines > 0)) || die "$file: has no lines"
        ((lines == ${expected:=$lines})) || die "line counts differ: $source has $expected, $file has $lines"
    done
    [[ -d $(dirname "$out") ]] || die "--out: no such folder: $(dirname "$out")"
}

[[ -n $dry_run ]] || check_parallel
if [[ ! -x $venv/bin/comet-score ]]; then
    step "cannot make the virtual environment $venv" python3 -m venv "$venv"
    # torchmetrics, which COMET pins, imports pkg_resources; later setuptools no longer have it
    step "cannot install unbabel-comet $version into $venv (is the package index reachable?)" \
        "$venv/bin/pip" install --quiet "unbabel-comet==$version" 'setuptools<81'
fi
partial=$out.partial
trap 'rm -f "$partial"' EXIT
step "comet-score failed; if it could not get $model, download that model elsewhere and give --model its model.ckpt" \
    "$venv/bin/comet-score" -s "$source" -t "$hypotheses" -r "$references" --model "$model" --gpus "$gpus" \
    --batch_size "$batch_size" --to_json "$partial" --quiet --only_system
step "cannot write $out" mv "$partial" "$out"
