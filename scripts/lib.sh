#!/usr/bin/env bash
# Shared by the scripts of this folder: messages, flags, the environment, commands that can be printed instead of run.
# Meant to be sourced, not run. The sourcing script sets `set -euo pipefail`. stages.sh, which this sources, has the
# stages of a run and their signals.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
program=$(basename "$0" .sh)
dry_run=${dry_run:-}

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

# The one loop over a script's arguments. The script lists its flags, each NAME, NAME:VARIABLE or NAME:ARRAY[]:
#   flags     those with a value; VARIABLE is NAME with _ for - unless given, an ARRAY[] collects repeated ones
#   switches  those without one; VARIABLE becomes yes
#   old_flags names of the last release, OLD:NEW each, taken with a warning
# --NAME=VALUE is read as --NAME VALUE; -h and --help print usage. What follows -- goes to the array `rest`; so do
# words that are no flag if keep_unknown=yes, else they are errors.
flags=() switches=() old_flags=() rest=() keep_unknown=''
read_flags() { # read_flags ARGUMENT...
    local word variable
    while (($#)); do
        case $1 in
        -h | --help) usage && exit 0 ;;
        --)
            shift
            rest+=("$@")
            return
            ;;
        esac
        word=$1
        if [[ $word == --* ]] && variable=$(flag_variable "${word#--}" ${switches[@]+"${switches[@]}"}); then
            printf -v "$variable" yes
            shift
            continue
        fi
        if [[ $word == --*=* ]] &&
            flag_variable "$(flag_name "$word")" ${flags[@]+"${flags[@]}"} ${old_flags[@]+"${old_flags[@]}"} >/dev/null; then
            set -- "${word%%=*}" "${word#*=}" "${@:2}"
            word=$1
        fi
        if [[ $word == --* ]] && variable=$(flag_variable "${word#--}" ${old_flags[@]+"${old_flags[@]}"}); then
            log "warning: $word is now --$variable; the old name goes in the next release"
            word=--$variable
        fi
        if ! [[ $word == --* ]] || ! variable=$(flag_variable "${word#--}" ${flags[@]+"${flags[@]}"}); then
            [[ -n $keep_unknown ]] || die "unknown argument $word; see --help" 2
            rest+=("$word")
            shift
            continue
        fi
        need_value "$word" $#
        keep_value "$variable" "$2"
        shift 2
    done
}

keep_value() { # keep_value VARIABLE VALUE, or ARRAY[] VALUE, which appends
    if [[ $1 == *'[]' ]]; then
        eval "${1%'[]'}+=(\"\$2\")"
    else
        printf -v "$1" '%s' "$2"
    fi
}

flag_name() { # flag_name --NAME=VALUE
    local name=${1#--}
    printf '%s\n' "${name%%=*}"
}

flag_variable() { # flag_variable NAME ENTRY...: the variable of the entry NAME; fails if there is none
    local name=$1 entry variable
    shift
    for entry; do
        [[ ${entry%%:*} == "$name" ]] || continue
        variable=${entry#*:}
        [[ $entry == *:* ]] || variable=${name//-/_}
        printf '%s\n' "$variable"
        return
    done
    return 1
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

num_cores() { env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc; } # nproc alone obeys these two

absolute() { # absolute PATH: the path from the root of the file system; it need not exist
    case $1 in /*) printf '%s\n' "$1" ;; *) printf '%s/%s\n' "$PWD" "$1" ;; esac
}

new_venv() { # new_venv INTERPRETER DIR VARIABLE: an environment without packages; files that are not ours are refused
    local clear=()
    if compgen -G "$2/.xmoe*" >/dev/null; then
        clear=(--clear)
    elif [[ -d $2 && -n $(ls -A "$2") ]]; then
        die "$2 has files and was not made by this project; remove it, or name another place: $3=DIR"
    fi
    "$1" -m venv ${clear[@]+"${clear[@]}"} "$2" && : >"$2/.xmoe"
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

# shellcheck source=scripts/stages.sh
. "$root/scripts/stages.sh"
