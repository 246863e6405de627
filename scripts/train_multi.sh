#!/usr/bin/env bash
set -euo pipefail
usage() {
    cat <<'TEXT'
Usage: scripts/train_multi.sh --ranks N [--grace SECONDS] -- DATA_DIR FAIRSEQ_TRAIN_ARGUMENT...

Runs fairseq-train as N ranks on this machine: one GPU each (NCCL), or CPU processes (Gloo) if the arguments contain
--cpu. Ranks meet through a file and talk over the loopback interface: no port is open to the network. When a rank
ends with an error the others are ended too, and the same command continues from the last checkpoint of --save-dir.
SIGUSR1 and SIGTERM save the training and end it; a second SIGTERM ends it at once.

  --ranks N           processes, at least 1
  --grace SECONDS     time that the other ranks get to end with their own message after one failed (default 20)
  --dry-run           print the commands instead of running them
  -h, --help          this text

Example, experts spread over two CPU ranks:
  scripts/train_multi.sh --ranks 2 -- data-bin/uk-en --user-dir xmoe_fairseq --arch xmoe_transformer_tiny \
      --moe-expert-parallel --ddp-backend legacy_ddp --cpu --criterion label_smoothed_cross_entropy_with_load_balance \
      --optimizer adam --lr 0.001 --batch-size 32 --max-update 100 --save-dir runs/two-ranks
Exit: 0 all ranks ended well; 75 stopped by a signal, saved: the same command continues; otherwise the code of the rank
that failed first; 2 bad arguments.
TEXT
}
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

ranks='' grace=20
flags=(ranks grace)
switches=(dry-run)
read_flags "$@"
arguments=(${rest[@]+"${rest[@]}"})
[[ -n $ranks ]] || die "--ranks is missing: the number of processes; see --help" 2
need_whole_number --ranks "$ranks" 1
need_whole_number --grace "$grace" 0
((${#arguments[@]} > 0)) || die "fairseq-train's arguments are missing after --; see --help" 2
use_environment

backend=nccl
for argument in "${arguments[@]}"; do
    case $argument in
    --cpu) backend=gloo ;;
    --distributed-*) die "$argument is set by this script; leave it out" 2 ;;
    esac
done

export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo}
meeting=$(mktemp -d) pids=()

ended() { # ended PID: whether it has; bash reaps it, so its code can be asked for once
    ! kill -0 "$1" 2>/dev/null
}

stop_all() { # also when this script itself is interrupted
    local pid deadline=$((SECONDS + 5))
    for pid in ${pids[@]+"${pids[@]}"}; do kill -TERM -- "-$pid" 2>/dev/null || true; done
    for pid in ${pids[@]+"${pids[@]}"}; do
        while ! ended "$pid" && ((SECONDS < deadline)); do sleep 0.2; done
        kill -KILL -- "-$pid" 2>/dev/null || true
    done
    rm -rf "$meeting"
}
trap stop_all EXIT
trap 'exit 130' INT
# The ranks agree to save and to end; --grace does not limit them.
pass_on() {
    local pid
    trap 'exit 143' TERM
    log "a signal: the ranks save and end"
    for pid in ${pids[@]+"${pids[@]}"}; do kill -USR1 "$pid" 2>/dev/null || true; done
}
trap pass_on TERM USR1

start_rank() { # start_rank RANK
    local command=(fairseq-train "${arguments[@]}")
    if ((ranks > 1)); then
        command+=(--distributed-world-size "$ranks" --distributed-rank "$1" --distributed-backend "$backend")
        command+=(--distributed-init-method "file://$meeting/store" --distributed-no-spawn)
        [[ $backend == gloo ]] || command+=(--device-id "$1")
    fi
    if [[ -n $dry_run ]]; then
        run "${command[@]}"
    else
        set -m # a process group of its own; and bash would let background commands ignore SIGINT, which fairseq uses
        "${command[@]}" &
        set +m
        pids+=($!)
        log "rank $1 is process $!"
    fi
}

report_failure() { # report_failure RANK CODE: the others may still tell what they saw
    local pid deadline=$((SECONDS + grace))
    log "error: rank $1 ended with code $2; stopping the others"
    for pid in "${pids[@]}"; do
        while ! ended "$pid" && ((SECONDS < deadline)); do sleep 0.2; done
    done
    log "the same command continues from the last checkpoint of --save-dir"
    exit "$2"
}

for ((rank = 0; rank < ranks; rank++)); do start_rank "$rank"; done
running=("${!pids[@]}") saved=''
while ((${#running[@]} > 0)); do
    still=()
    for rank in "${running[@]}"; do
        if ended "${pids[rank]}"; then
            code=0
            wait "${pids[rank]}" || code=$?
            ((code == 0 || code == SAVED)) || report_failure "$rank" "$code"
            ((code == 0)) || saved=yes
        else
            still+=("$rank")
        fi
    done
    running=(${still[@]+"${still[@]}"})
    ((${#running[@]} == 0)) || sleep 0.2
done
if [[ -n $saved ]]; then
    log "stopped by a signal, saved; the same command continues"
    exit "$SAVED"
fi
