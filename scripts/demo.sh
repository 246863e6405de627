#!/usr/bin/env bash
set -euo pipefail
usage() {
    cat <<'TEXT'
Usage: scripts/demo.sh [--pair SRC-en] [--method NAME | --compare] [options]

A whole translation project in minutes, on a CPU and without any download but the set-up's: makes a corpus of dates,
times, units, amounts, countries, languages and numbers in two languages, then runs scripts/run_pair.sh on it. Ends with
the scores, five translations beside source and reference, and the experts that tokens took in each layer.

  --pair SRC-en     SRC is uk (default), de, ru, he or zh
  --method NAME     a file of train_configs/demo/ (default: xmoe); --help lists them below
  --compare         every method at a short budget, and one table
  --max-update N    updates of the training, without averaging (default: the YAML's; with --compare 600)
  --seed N          seed of the corpus and of the training (default: 1)
  --out DIR         where everything goes (default: runs/demo/SRC-en at the project's root; with another seed than 1
                    runs/demo/SRC-en-seedN)
  --device NAME     cpu, cuda or auto (default: auto)
  --dry-run         print the commands and run nothing
  -h, --help        this text

Exit: 0 done, 1 a step failed, 2 bad arguments.
TEXT
    printf 'Methods: %s\n' "$(list_methods)"
}
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

list_methods() {
    local file names=''
    for file in "$root"/train_configs/demo/*.yaml; do names+=" $(basename "$file" .yaml)"; done
    printf '%s\n' "${names# }"
}

pair=uk-en method='' compare='' max_update='' seed=1 out='' device=auto
flags=(pair method max-update seed out device)
switches=(dry-run compare)
read_flags "$@"

need_pair "$pair"
[[ " uk-en de-en ru-en he-en zh-en " == *" $pair "* ]] ||
    die "--pair: the demo's corpus exists for uk-en, de-en, ru-en, he-en and zh-en, got '$pair'" 2
[[ -z $compare || -z $method ]] || die '--compare trains every method; leave out --method' 2
method=${method:-xmoe}
[[ -f $root/train_configs/demo/$method.yaml ]] || die "--method is one of: $(list_methods); got '$method'" 2
need_whole_number --seed "$seed" 0
[[ -z $max_update ]] || need_whole_number --max-update "$max_update" 1
[[ $seed == 1 ]] || out=${out:-$root/runs/demo/$pair-seed$seed}
out=$(absolute "${out:-$root/runs/demo/$pair}")

train_and_score() { # train_and_score METHOD [RUN_PAIR_ARGUMENT...]
    local name=$1
    shift
    bash "$root/scripts/run_pair.sh" --pair "$pair" --train "$out/raw/train" --valid "$out/raw/valid" \
        --test "$out/raw/test" --out "$out/$name" --config "$root/train_configs/demo/$name.yaml" \
        --vocab-size 1500 --seed "$seed" --device "$device" ${dry_run:+--dry-run} "$@"
}

start=$SECONDS
[[ -n $dry_run ]] || bash "$root/scripts/setup.sh"
after_setup=$SECONDS
use_environment
cd "$root"
run python -m data_prep.phrases --pair "$pair" --out "$out/raw" --seed "$seed"
[[ -z $compare ]] || max_update=${max_update:-600}
budget=()
# A short training may leave fewer checkpoints than the default of run_pair.sh averages.
[[ -z $max_update ]] || budget=(--set "optimization.max_update=$max_update" --average best:1)
if [[ -n $compare ]]; then
    read -ra methods <<<"$(list_methods)"
    for name in "${methods[@]}"; do train_and_score "$name" "${budget[@]}"; done
    run python -m eval.run_table "${methods[@]/#/$out/}"
    run python -m eval.report "${methods[@]/#/$out/}" --title "$pair: all methods" --out "$out/comparison.html"
else
    train_and_score "$method" ${budget[@]+"${budget[@]}"}
    run sed '/^## Run$/,$d' "$out/$method/report.md"
fi
log "done in $((SECONDS - start)) s, of which set-up $((after_setup - start)) s; see $out"
