#!/usr/bin/env bash
set -euo pipefail
usage() {
    cat <<'TEXT'
Usage: scripts/run_study.sh --study FILE.yaml --out DIR [--jobs N] [--only-collect] [--dry-run]

Which method is better at an equal price, over seeds? Trains and scores every pair x method x seed of a study and
compares them. Data and subwords are made once per pair; every cell is a run of scripts/run_pair.sh in
DIR/cells/PAIR/METHOD/seed-N that anyone could start alone. Ends with DIR/study.md, DIR/study.json and DIR/study.html:
means and deviations over seeds, tests within and over seeds, quality against counted FLOPs, the order of methods.

  --study FILE     the pairs, methods and seeds (examples: train_configs/studies)
  --jobs N         cells at the same time (default: 1); set OMP_NUM_THREADS to the cores of one of them
  --only-collect   run nothing; write the results of the cells that are finished
  --dry-run        print the commands, ready to be copied, and run nothing
  -h, --help       this text

Finished cells are kept, interrupted ones continue, and one that fails does not stop the others: the same command again
goes on with what is missing. SIGUSR1, SIGTERM and SIGINT save all trainings and end with 75.
Needs the environment of scripts/setup.sh, or fairseq's commands in PATH.
Exit: 0 done, 1 a cell failed (the results are those of the others), 2 bad arguments, 75 stopped by a signal, saved.
TEXT
}
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# Read by read_flags of lib.sh.
# shellcheck disable=SC2034
flags=(study out jobs) switches=(only-collect dry-run)
study='' jobs=1 only_collect=''
read_flags "$@"
[[ -n $study ]] || die '--study is missing; see --help' 2
[[ -n $out ]] || die '--out is missing; see --help' 2
need_whole_number --jobs "$jobs" 1
[[ -f $study ]] || die "--study: no such file: '$study'; those that come with the project: $root/train_configs/studies" 2
use_environment
command=(python -m eval.study --study "$study" --out "$out" --jobs "$jobs")
[[ -z $only_collect ]] || command+=(--only-collect)
[[ -z $dry_run ]] || command+=(--dry-run)
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "${command[@]}"
