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
log() { printf 'comet: %s\n' "$*" >&2; }
die() { log "error: $1"; exit "${2:-1}"; }

version=2.2.7
source='' hypotheses='' references='' out='' model=Unbabel/wmt22-comet-da gpus=0 batch_size=16 venv=.venv-comet dry=''
declare -A renamed
while (($#)); do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --dry-run) dry=yes; shift; continue ;;
    esac
    (($# > 1)) || die "$1 needs a value; see --help" 2
    case $1 in
        --source) source=$2 ;;
        --hypotheses) hypotheses=$2 ;;
        --references) references=$2 ;;
        --out) out=$2 ;;
        --reference | --json) # their names of the last release
            renamed=([--reference]=references [--json]=out)
            log "warning: $1 is now --${renamed[$1]}; the old name goes in the next release"
            printf -v "${renamed[$1]}" '%s' "$2" ;;
        --model) model=$2 ;;
        --gpus) gpus=$2 ;;
        --batch-size) batch_size=$2 ;;
        --venv) venv=$2 ;;
        *) die "unknown argument $1; see --help" 2 ;;
    esac
    shift 2
done
for name in source hypotheses references out; do
    [[ -n ${!name} ]] || die "--$name is missing; see --help" 2
done
[[ $gpus =~ ^[0-9]+$ ]] || die "--gpus wants a number, got '$gpus'" 2
[[ $batch_size =~ ^[1-9][0-9]*$ ]] || die "--batch-size wants a positive number, got '$batch_size'" 2

run() { # run WHAT-FAILED COMMAND...
    local what=$1
    shift
    if [[ -n $dry ]]; then printf '%q ' "$@"; printf '\n'; return; fi
    "$@" || die "$what"
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

[[ -n $dry ]] || check_parallel
if [[ ! -x $venv/bin/comet-score ]]; then
    run "cannot make the virtual environment $venv" python3 -m venv "$venv"
    # torchmetrics, which COMET pins, imports pkg_resources; later setuptools no longer have it
    run "cannot install unbabel-comet $version into $venv (is the package index reachable?)" \
        "$venv/bin/pip" install --quiet "unbabel-comet==$version" 'setuptools<81'
fi
partial=$out.partial
trap 'rm -f "$partial"' EXIT
run "comet-score failed; if it could not get $model, download that model elsewhere and give --model its model.ckpt" \
    "$venv/bin/comet-score" -s "$source" -t "$hypotheses" -r "$references" --model "$model" --gpus "$gpus" \
    --batch_size "$batch_size" --to_json "$partial" --quiet --only_system
run "cannot write $out" mv "$partial" "$out"
