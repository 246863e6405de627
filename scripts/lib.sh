#!/usr/bin/env bash
# Shared by the scripts of this folder; meant to be sourced, not run.
# The sourcing script sets `set -euo pipefail`; one with stages also sets:
#   out      the folder of the run
#   stages   array of the stages' names in their order
#   results  array of files that tell of the whole run
#   results_stage  the first stage that writes one of them
#   settled  array of stages whose results are not made again with other settings; way_out says what else can be done

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
        case $variable in
        *'[]')
            variable=${variable%'[]'}
            eval "$variable+=(\"\$2\")"
            ;;
        *) printf -v "$variable" '%s' "$2" ;;
        esac
        shift 2
    done
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

# A file is hashed once: if its size, inode, device and times of change are those of a line in $out/.stages/checksums,
# the sha256 of that line is taken. The time of the inode's change cannot be set back, so a restored or rewritten file is
# read again; one that changed in the last two seconds is not noted, since the clock may not tell a next change.
file_state() { stat -L -c '%s %i %d %.9Y %.9Z' -- "$1" 2>/dev/null; } # empty where stat is not GNU's: no cache

checksum() { # checksum FILE
    local file=$1 cache=$out/.stages/checksums state sum changed
    [[ -f $file ]] || die "no such file: $file"
    state=$(file_state "$file") || state=''
    if [[ -n $state && -f $cache ]] && sum=$(LC_ALL=C grep -F -m 1 -- "$state"$'\t' "$cache"); then
        printf '%s\n' "${sum#*$'\t'}"
        return
    fi
    sum=$(sha256sum <"$file")
    sum=${sum%% *}
    changed=${state##* } changed=${changed%%.*}
    if [[ -n $state && $(file_state "$file") == "$state" ]] && (($(date +%s) - changed > 2)) && [[ -d ${cache%/*} ]]; then
        printf '%s\t%s\n' "$state" "$sum" >>"$cache"
    fi
    printf '%s\n' "$sum"
}

checksums() { # checksums FILE...: one sha256 a line, without the paths, so that a moved run is still known
    local file
    for file; do checksum "$file"; done
}

signature() { # signature [SETTING=VALUE]... [-- FILE...]: a line for each setting and for the content of each file
    local file sum
    while (($#)) && [[ $1 != -- ]]; do
        printf '%s\n' "$1"
        shift
    done
    shift || return 0
    for file; do
        sum=$(checksum "$file") || exit 1
        printf 'content of %s=%s\n' "$(basename "$file")" "$sum"
    done
}

# What parts two signatures, one a line: "NAME: OLD, now NEW", or "NAME" alone for the content of files.
signature_differences() { # signature_differences OLD NEW
    awk -F = -v old="$1" '
        function name_of(line) { sub(/=.*/, "", line); return line }
        function value_of(line) { sub(/^[^=]*=/, "", line); return line }
        BEGIN {
            n = split(old, lines, "\n")
            for (i = 1; i <= n; i++) { order[i] = name_of(lines[i]); was[order[i]] = value_of(lines[i]) }
        }
        { name = name_of($0); is[name] = value_of($0); if (!(name in was)) { order[++n] = name } }
        END {
            for (i = 1; i <= n; i++) {
                name = order[i]
                if (name in told || ((name in was) && (name in is) && was[name] == is[name])) continue
                told[name] = 1
                if (name ~ /^content of /) { print name; continue }
                print name ": " ((name in was) ? was[name] : "(none)") ", now " ((name in is) ? is[name] : "(none)")
            }
        }' <<<"$2"
}

lock() { # lock FILE: two runs in one folder would spoil each other's files
    command -v flock >/dev/null || return 0
    exec 9>"$1"
    # An interrupted run's training may take a moment to end; it holds the lock until then.
    flock -w 20 9 || die "another run is at work in $out; wait for it or choose another --out"
}

set_aside() { # set_aside PATH: renames it to the first free PATH.1, PATH.2, ...; nothing is deleted
    local number=1
    [[ -e $1 ]] || return 0
    while [[ -e $1.$number ]]; do number=$((number + 1)); done
    mv -T -- "$1" "$1.$number"
    log "moved aside: $1.$number"
}

forget_stages_after() { # forget_stages_after NAME: the later ones of the array `stages` must run again
    local name seen=''
    for name in "${stages[@]}"; do
        [[ -z $seen ]] || rm -f "$out/.stages/$name" "$out/.stages/$name.started"
        [[ $name != "$1" ]] || seen=yes
    done
}

refuse_change() { # refuse_change STAGE DIFFERENCES
    log "stage '$1' in $out was done with other settings:"
    printf '  %s\n' "${2//$'\n'/$'\n'  }" >&2
    die "trainings may build on it. Give another folder and keep both${way_out:+, or $way_out}; nothing was changed" 2
}

# A stage is kept when its settings and the content of its inputs are those of its last success; `settled` names the
# stages that stop instead when these differ, for what others build on. When a stage runs, all later ones run too, and
# the files in the array `results` go when a stage after the first one and up to `results_stage` starts: they tell of
# an older run.
# A function signal_NAME SIGNAL PID, if there is one, passes signals on to the stage's processes.
settled=() way_out=''
stage() { # stage NAME FUNCTION [SETTING=VALUE]... -- INPUT_FILE...
    local _name=$1 _function=$2 _now _stamp=$out/.stages/$1 _again='' _way
    shift 2
    if [[ -n $dry_run ]]; then
        printf '\n# %s\n' "$_name"
        "$_function"
        return
    fi
    current_stage=$_name
    _now=$(signature "$@")
    if [[ -f $_stamp && $(<"$_stamp") == "$_now" ]]; then
        log "$_name: kept"
        current_stage=''
        return
    fi
    if [[ -f $_stamp && " ${settled[*]-} " == *" $_name "* ]]; then
        current_stage=''
        refuse_change "$_name" "$(signature_differences "$(<"$_stamp")" "$_now")"
    fi
    [[ ! -f $_stamp.started || $(<"$_stamp.started") != "$_now" ]] || _again=re
    log "$_name: ${_again}start"
    rm -f "$_stamp"
    if [[ $_name != "${stages[0]}" && " ${stages[*]} " == *" $_name "*"$results_stage "* || $_name == "$results_stage" ]]; then
        rm -f ${results[@]+"${results[@]}"}
    fi
    mkdir -p "$out/.stages"
    printf '%s\n' "$_now" >"$_stamp.started"
    _way=group
    ! declare -F "signal_$_name" >/dev/null || _way=signal_$_name
    pass_signals "$_way" "$_function"
    forget_stages_after "$_name"
    mv -f "$_stamp.started" "$_stamp"
    current_stage=''
}

# Runs COMMAND in the background and waits for it, so that a signal reaches it at once: bash would first wait for the end
# of a command in the foreground. Stopped by USR1 (a time limit is near) the script ends with SAVED, since the same
# command continues; otherwise with the code of COMMAND. HOW tells whom the signal is for:
#   group     every process of COMMAND
#   leader    COMMAND itself, which passes it on
#   NAME      a function NAME SIGNAL PID, which decides
pass_signals() { # pass_signals HOW COMMAND...
    # COMMAND may be a function of the script, which must not see these names in place of its own.
    local _how=$1 _pid _code=0 _signal='' _received=''
    shift
    set -m # a process group of its own; bash would let other background commands ignore SIGINT, which fairseq uses
    "$@" </dev/null &
    set +m
    _pid=$!
    for _signal in USR1 TERM INT; do
        # shellcheck disable=SC2064 # the process is that of now
        trap "_received=$_signal; deliver $_how $_signal $_pid" "$_signal"
    done
    while wait "$_pid" && _code=0 || _code=$?; do
        kill -0 "$_pid" 2>/dev/null || break # a signal ends `wait` early
    done
    trap - USR1 TERM INT
    [[ $_received != USR1 ]] || return "$SAVED"
    [[ -z $_received || $_code != 0 ]] || return 143
    return "$_code"
}

deliver() { # deliver HOW SIGNAL PID
    case $1 in
    group) kill -"${2/USR1/TERM}" -- "-$3" 2>/dev/null || true ;;
    leader) kill -"$2" "$3" 2>/dev/null || true ;;
    *) "$1" "$2" "$3" ;;
    esac
}

SAVED=75 # exit code: interrupted, the state is saved, the same command continues (EX_TEMPFAIL of sysexits.h)

# For a SLURM job: runs COMMAND, which gets the signal that precedes the time limit, and queues the job again if COMMAND
# ended by it. A job that never ends would be queued for ever, hence the limit.
run_and_requeue() { # run_and_requeue COMMAND...
    local word words=() code=0 times=${SLURM_RESTART_COUNT:-0} most=${XMOE_MAX_REQUEUES:-50}
    for word; do # what was begun anew once is continued from then on
        [[ $word == --restart* && $times != 0 ]] || words+=("$word")
    done
    pass_signals leader "${words[@]}" || code=$?
    if ((code == SAVED && times < most)); then
        log "saved; queued again ($((times + 1)) of at most $most times)"
        scontrol requeue "${SLURM_JOB_ID:?not a SLURM job}"
    fi
    exit "$code"
}

report_failed_stage() { # for: trap report_failed_stage EXIT
    local code=$?
    if ((code == SAVED)); then
        log "stopped by a signal${current_stage:+ in stage $current_stage}; the same command again continues from here"
    elif ((code)) && [[ -n $current_stage ]]; then
        log "error: stage '$current_stage' failed (exit $code); the same command again continues from here"
    fi
}
