#!/usr/bin/env bash
# Stages that are kept while their inputs stay the same, checksums of files, and signals. lib.sh sources this file.
# A script with stages sets:
#   out      the folder of the run
#   stages   array of the stages' names in their order
#   results  array of files that tell of the whole run
#   results_stage  the first stage that writes one of them
#   settled  array of stages whose results are not made again with other settings; way_out says what else can be done

current_stage=''
out=${out:-} stages=() results=() results_stage=''

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
