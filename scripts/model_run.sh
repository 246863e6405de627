#!/usr/bin/env bash
# Shared by run_pair.sh and run_lm.sh: a run that trains one model. Meant to be sourced, not run; it sources lib.sh.
# The script has the flags of `model_flags` and `model_switches` and the variables of the same names, and sets:
#   data_bin        folder of the binary data
#   task_words      array: settings of fairseq's task, as words of hydra
#   vocabulary      a dictionary of the data
#   training_facts  a function that prints NAME=VALUE lines: what the model depends on beside the settings of its YAML
#   calibrate_copy  a function BASE FLAG VALUE that writes a calibrated copy to BASE.pt, its report to BASE.json, and scores it

# What is set here is read by the scripts and by lib.sh.
# shellcheck disable=SC2034
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

model_flags=(out config seed subwords:tool vocab-size average max-tokens device workers data-bin launcher:launcher_words
    user-dir test-set 'set:overrides[]' 'calibrate:goals[]')
model_switches=(dry-run data-only restart no-analysis)
config='' seed=1 tool=sentencepiece vocab_size=8000 average=last:5 max_tokens=4096 device=auto workers=$(num_cores)
data_bin='' test_set='' data_only='' restart='' no_analysis='' overrides=() goals=() launcher_words='' launcher=()
user_dir=$root/xmoe_fairseq task_words=() vocabulary=''

check_model_arguments() {
    local name
    need_whole_number --seed "$seed" 0
    need_whole_number --vocab-size "$vocab_size" 1
    [[ $average =~ ^(last|best):[1-9][0-9]*$ ]] || die "--average wants last:N or best:N such as last:5, got '$average'" 2
    need_whole_number --max-tokens "$max_tokens" 2
    need_whole_number --workers "$workers" 1
    [[ $tool == sentencepiece || $tool == subword-nmt ]] ||
        die "--subwords is sentencepiece or subword-nmt, got '$tool'" 2
    [[ ${goals[*]-} == none ]] || for name in ${goals[@]+"${goals[@]}"}; do
        [[ $name =~ ^(loss|budget):[0-9]+(\.[0-9]+)?$ ]] ||
            die "--calibrate wants loss:BITS or budget:X such as loss:0.01, or none alone, got '$name'" 2
    done
    [[ $device == auto || $device == cpu || $device == cuda ]] || die "--device is cpu, cuda or auto, got '$device'" 2
    [[ $config == *.yaml ]] || die "--config wants a file that ends in .yaml, got '$config'" 2
    [[ -f $config ]] || die "--config: no such file: '$config'; those that come with the project: $root/train_configs" 2
    [[ -f $user_dir/__init__.py ]] || die "--user-dir wants a package, a folder with __init__.py, got '$user_dir'" 2
    for name in ${overrides[@]+"${overrides[@]}"}; do
        [[ $name =~ ^[a-z_]+(\.[a-z_0-9]+)+=.+ ]] ||
            die "--set wants GROUP.KEY=VALUE such as optimization.max_update=2000, got '$name'" 2
    done
    [[ $out$data_bin != *:* ]] || die "--out and --data-bin: fairseq takes ':' for a list of folders; rename" 2
}

find_device() {
    local has_cuda=''
    [[ $device != cpu ]] || return 0
    [[ $device == auto || -z $dry_run ]] || return 0 # printed for the machine that will run it
    if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then has_cuda=yes; fi
    [[ $device != cuda || -n $has_cuda ]] || die "--device cuda: torch sees no GPU; use --device cpu or auto" 2
    device=$([[ -n $has_cuda ]] && echo cuda || echo cpu)
}

# Takes the checked flags, whose paths are absolute by now, to what the stages use.
settle_model_arguments() {
    local goal
    read -ra launcher <<<"$launcher_words"
    ((${#goals[@]})) || goals=(loss:0.01)
    [[ ${goals[*]} != none ]] || goals=()
    checkpoints=$out/checkpoints training_log=$out/train.log averaged=$checkpoints/averaged.pt calibrated=$out/calibrated
    analysis=$out/analysis.json evaluation=$out/evaluation.json
    calibrations=()
    for goal in ${goals[@]+"${goals[@]}"}; do calibrations+=("$calibrated/${goal/:/-}.json"); done
    [[ -z $no_analysis ]] || analysis=''
    # A training that a signal stopped leaves this file beside its checkpoint; torchrun gives out other codes than its ranks.
    stopped_by_signal=$checkpoints/stopped-by-signal
    # The settings of the YAML and of --set, as arguments of eval.run.training_settings.
    configuration=(--config "$config" ${overrides[@]+"${overrides[@]/#/--set=}"})
    device_settings=()
    [[ $device != cpu ]] ||
        device_settings=(++common.cpu=true ++common.fp16=false ++common.bf16=false ++common.amp=false)
    # read by lib.sh
    results=("$out/report.md" "$out/scores.json" "$out/report.html")
    results_stage=report
}

# Stops with exit 2 and the names of the settings with which the training in $checkpoints cannot go on.
check_training() { # check_training [FLAG...]: flags of eval.run.training_settings check
    local facts code=0
    facts=$(training_facts)
    mapfile -t facts <<<"$facts"
    python -m eval.run.training_settings check --save-dir "$checkpoints" "${configuration[@]}" "${facts[@]/#/--fact=}" "$@" ||
        code=$?
    ((code != 2)) || die "the training cannot be continued with these settings. Give another --out and keep both, or add \
--restart, which renames $out and begins anew; nothing was changed" 2
    return "$code"
}

# Paths and --set, a line each, quoted for hydra.
training_words() {
    python -m eval.run.training_settings overrides --text "task.data=$data_bin" --text "checkpoint.save_dir=$checkpoints" \
        --text "common.user_dir=$user_dir" --text "hydra.run.dir=$out/hydra" ${overrides[@]+"${overrides[@]/#/--set=}"}
}

# Any rank will do: they agree to save and to end. torchrun itself would not survive USR1, and gives its ranks too
# little time after TERM. Ranks that still load their data do not listen yet, so the signal is repeated.
signal_train() { # signal_train SIGNAL PID
    local save_dir_word rank
    if [[ $1 == INT || ! -r /proc/self/cmdline ]]; then
        kill -"${1/USR1/TERM}" -- "-$2" 2>/dev/null || true
        return
    fi
    save_dir_word=$(training_words | sed -n 2p)
    while kill -0 "$2" 2>/dev/null; do
        for rank in $(training_ranks); do kill -USR1 "$rank" 2>/dev/null || true; done
        sleep 5
    done &
}

# The processes on this machine that train into $checkpoints, without the loading processes they forked; where
# fairseq-hydra-train itself started a process a GPU, those.
training_ranks() {
    local place pid words ranks=() parents=()
    for place in /proc/[0-9]*; do
        { mapfile -d '' -t words <"$place/cmdline"; } 2>/dev/null || continue
        if [[ ${words[1]-} == */fairseq-hydra-train && " ${words[*]} " == *" $save_dir_word "* ]]; then
            ranks+=("${place#/proc/}")
        fi
    done
    for pid in ${ranks[@]+"${ranks[@]}"}; do
        parents+=("$(awk '$1 == "PPid:" { print $2 }' "/proc/$pid/status" 2>/dev/null)")
    done
    for place in "${!ranks[@]}"; do
        pid=${ranks[place]}
        [[ " ${ranks[*]} " != *" ${parents[place]} "* ]] || continue
        pgrep -P "$pid" -f 'multiprocessing.*spawn_main' || printf '%s\n' "$pid"
    done
}

# Without update_epoch_batch_itr fairseq keeps the batches of the epoch in which its process started, and a training
# that continues in a later epoch sees others than one that was never interrupted.
train_model() {
    local words state code=0 command=(${launcher[@]+"${launcher[@]}"}
        fairseq-hydra-train --config-dir "$(dirname "$config")" --config-name "$(basename "$config" .yaml)")
    words=$(training_words)
    mapfile -t words <<<"$words"
    command+=("${words[@]:0:4}" ${task_words[@]+"${task_words[@]}"} ++common.seed="$seed" ++common.log_format=json ++dataset.update_epoch_batch_itr=true
        ++dataset.skip_invalid_size_inputs_valid_test=true ${device_settings[@]+"${device_settings[@]}"} "${words[@]:4}")
    if [[ -n $dry_run ]]; then
        printf '%q ' "${command[@]}"
        printf '2>&1 | python -m eval.run.training_log --log %q\n' "$training_log"
        return
    fi
    mkdir -p "$checkpoints"
    state=$(check_training --fact "vocabulary=$(checksum "$vocabulary")" --write --state)
    if [[ $state == done* ]]; then
        log "train: ${state#done } updates are done, max_update asks for no more"
        return
    fi
    [[ $state != fresh* ]] || set_aside "$training_log" # of a training that left no checkpoint
    git -C "$root" describe --always --dirty --abbrev=40 --exclude '*' >"$checkpoints/commit.txt" 2>/dev/null || true
    rm -f "$stopped_by_signal"
    trap '' USR1 # torchrun ends by it; the ranks listen all the same
    "${command[@]}" 2>&1 | python -m eval.run.training_log --log "$training_log" || code=$?
    trap - USR1
    if ((code)); then
        [[ ! -f $stopped_by_signal ]] || return "$SAVED"
        return "$code"
    fi
    [[ -f $checkpoints/checkpoint_last.pt ]] || die "the training left no checkpoint in $checkpoints; see $training_log"
}

average_checkpoints() {
    run python -m xmoe_fairseq.checkpoints.average "--${average%:*}-of" "$checkpoints" --num "${average#*:}" \
        --allow-fewer --out "$averaged"
}

open_folder() { # makes and locks $out
    mkdir -p "$out/.stages"
    lock "$out/.stages/lock"
}

# Stages delete and make anew the folders of their results, which must not be a user's own.
refuse_foreign_folder() {
    local name
    [[ ! -d $out/.stages && -z $restart ]] || return 0
    for name in subwords encoded data-bin test-bin translations calibrated; do
        [[ ! -e $out/$name ]] ||
            die "--out: $out is no folder of such a run and has a '$name', which a run would replace; give another --out" 2
    done
}

begin() {
    local is_new=''
    [[ -e $out ]] || is_new=yes
    refuse_foreign_folder
    trap report_failed_stage EXIT
    open_folder
    if [[ -n $restart && -z $is_new ]]; then
        set_aside "$out"
        open_folder
    fi
    [[ ! -d $checkpoints ]] || check_training
}

open_run() {
    cd "$root" || exit 1
    if [[ -n $dry_run ]]; then
        printf 'cd %q\n' "$root"
    else
        begin
    fi
}

tell_that_data_are_ready() {
    [[ -n $dry_run ]] || log "the data are ready; the same command without --data-only trains"
}

tell_results() {
    [[ -n $dry_run ]] || log "done: $out/report.md, ${analysis:+$out/report.html, }$out/scores.json"
}

# A cheaper copy of the model for each goal; a model without a threshold has none.
calibrate() {
    local goal flag
    run mkdir -p "$calibrated"
    for goal in "${goals[@]}"; do
        flag=--budget
        [[ $goal != loss:* ]] || flag=--max-loss
        calibrate_copy "$calibrated/${goal/:/-}" "$flag" "${goal#*:}"
    done
}

train_and_average() { # train_and_average DATA_FILE...
    local settings=''
    [[ -n $dry_run ]] || settings=$(python -m eval.run.training_settings signature "${configuration[@]}")
    mapfile -t settings <<<"$settings"
    stage train train_model "seed=$seed" "${settings[@]}" -- "$@"
    stage average average_checkpoints "which=$average" -- "$checkpoints/checkpoint_last.pt"
}
