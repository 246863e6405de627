#!/usr/bin/env bash
# Shared by the scripts of this folder; meant to be sourced, not run.
# The sourcing script sets `set -euo pipefail`; one with stages also sets:
#   out      the folder of the run
#   stages   array of the stages' names in their order
#   results  array of files that tell of the whole run
#   results_stage  the first stage that writes one of them

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
program=$(basename "$0" .sh)
dry_run=${dry_run:-}
current_stage=''
out=${out:-} stages=() results=() results_stage=''

# Deprecation notes of fairscale, hydra and fairseq would bury what matters.
PYTHONWARNINGS=ignore::FutureWarning,ignore::DeprecationWarning,ignore::UserWarning:hydra.experimental.initialize
PYTHONWARNINGS+=,ignore::UserWarning:hydra.experimental.compose,ignore::UserWarning:hydra.compose
PYTHONWARNINGS+=,ignore::UserWarning:hydra.core.default_element
export PYTHONWARNINGS

log() { printf '%s %s: %s\n' "$(date -u +%FT%TZ)" "$program" "$*" >&2; }

die() { # die MESSAGE [EXIT_CODE]
    log "error: $1"
    exit "${2:-1}"
}

need_value() { # need_value FLAG REMAINING_ARGUMENTS
    (($2 > 1)) || die "$1 needs a value; see --help" 2
}

need_whole_number() { # need_whole_number FLAG VALUE LEAST
    if ! [[ $2 =~ ^[0-9]{1,9}$ ]] || ((10#$2 < $3)); then
        die "$1 wants a whole number of at least $3, got '$2'" 2
    fi
}

need_pair() { # need_pair VALUE
    [[ $1 =~ ^[a-z]{2,3}-[a-z]{2,3}$ ]] || die "--pair wants two language codes such as uk-en, got '$1'" 2
    [[ ${1%-*} != "${1#*-}" ]] || die "--pair wants two different languages, got '$1'" 2
}

absolute() { # absolute PATH: the path from the root of the file system; it need not exist
    case $1 in /*) printf '%s\n' "$1" ;; *) printf '%s/%s\n' "$PWD" "$1" ;; esac
}

venv_place() { absolute "${XMOE_VENV:-$root/.venv}"; }

# Puts the environment of scripts/setup.sh first in PATH; without one, fairseq's commands must be there already.
use_environment() {
    local venv
    venv=$(venv_place)
    if [[ -x $venv/bin/fairseq-generate ]]; then
        export PATH=$venv/bin:$PATH
        # shellcheck disable=SC2016 # the printed line expands PATH when it is run
        [[ -z $dry_run ]] || printf 'export PATH=%q:"$PATH"\n' "$venv/bin"
    elif ! command -v fairseq-generate >/dev/null; then
        die "fairseq-generate is neither in $venv nor in PATH; run: bash scripts/setup.sh"
    fi
}

run() { # run COMMAND...: runs it, or with --dry-run prints it ready to be copied
    if [[ -n $dry_run ]]; then
        printf '%q ' "$@"
        printf '\n'
    else
        "$@"
    fi
}

run_to() { # run_to FILE COMMAND...: as run, its output written to FILE, which appears only when complete
    local file=$1
    shift
    if [[ -n $dry_run ]]; then
        printf '%q ' "$@"
        printf '> %q\n' "$file"
    else
        "$@" >"$file.partial"
        mv -f "$file.partial" "$file"
    fi
}

# As run_to, with a progress bar over the lines and standard error in LOG, shown if the command fails.
run_to_with_bar() { # run_to_with_bar FILE LOG NUM_LINES COMMAND...
    local file=$1 log_file=$2 num_lines=$3
    shift 3
    if [[ -n $dry_run ]]; then
        run_to "$file" "$@"
    elif "$@" 2>"$log_file" | python -m tqdm --total "$num_lines" --unit line --mininterval 1 >"$file.partial"; then
        mv -f "$file.partial" "$file"
    else
        grep -v -e '^INFO' -e '^DEBUG' "$log_file" | tail -n 20 >&2
        die "$1 failed; its whole output: $log_file"
    fi
}

checksums() { # checksums FILE...: one sha256 a line, without the paths, so that a moved run is still known
    local file
    for file; do
        [[ -f $file ]] || die "no such file: $file"
        sha256sum <"$file"
    done
}

lock() { # lock FILE: two runs in one folder would spoil each other's files
    command -v flock >/dev/null || return 0
    exec 9>"$1"
    # An interrupted run's training may take a moment to end; it holds the lock until then.
    flock -w 20 9 || die "another run is at work in $out; wait for it or choose another --out"
}

forget_stages_after() { # forget_stages_after NAME: the later ones of the array `stages` must run again
    local name seen=''
    for name in "${stages[@]}"; do
        [[ -z $seen ]] || rm -f "$out/.stages/$name" "$out/.stages/$name.started"
        [[ $name != "$1" ]] || seen=yes
    done
}

# A stage is kept when its settings and the content of its inputs are those of its last success. When it runs, all
# later ones run too, and the files in the array `results` go when a stage after the first one and up to
# `results_stage` starts: they tell of an older run. An interrupted run of the very same work is continued (`$resumed` tells FUNCTION so); otherwise a
# function clean_NAME, if there is one, first removes what FUNCTION would continue.
stage() { # stage NAME FUNCTION SETTINGS INPUT_FILE...
    local name=$1 function=$2 settings=$3 signature stamp=$out/.stages/$1
    shift 3
    if [[ -n $dry_run ]]; then
        printf '\n# %s\n' "$name"
        "$function"
        return
    fi
    current_stage=$name
    signature=$settings$'\n'$(checksums "$@")
    if [[ -f $stamp && $(<"$stamp") == "$signature" ]]; then
        log "$name: kept"
        current_stage=''
        return
    fi
    resumed=''
    [[ ! -f $stamp.started || $(<"$stamp.started") != "$signature" ]] || resumed=yes
    log "$name: ${resumed:+re}start"
    rm -f "$stamp"
    if [[ $name != "${stages[0]}" && " ${stages[*]} " == *" $name "*"$results_stage "* || $name == "$results_stage" ]]; then
        rm -f ${results[@]+"${results[@]}"}
    fi
    mkdir -p "$out/.stages"
    if [[ -z $resumed ]]; then
        # First away with what older settings left: an interruption between the two must not pass it off as ours.
        rm -f "$stamp.started"
        if declare -F "clean_$name" >/dev/null; then "clean_$name"; fi
    fi
    printf '%s\n' "$signature" >"$stamp.started"
    "$function"
    forget_stages_after "$name"
    mv -f "$stamp.started" "$stamp"
    current_stage=''
}

report_failed_stage() { # for: trap report_failed_stage EXIT
    local code=$?
    if ((code)) && [[ -n $current_stage ]]; then
        log "error: stage '$current_stage' failed (exit $code); the same command again continues from here"
    fi
}
