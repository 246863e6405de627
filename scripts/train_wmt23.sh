#!/usr/bin/env bash
set -euo pipefail
usage() {
    cat <<'TEXT'
Usage: scripts/train_wmt23.sh --pair SRC-en --method NAME [options]

One cell of the paper's Table 3, from nothing to a score: download, clean, learn subwords, binarise (once for all
methods of a pair), then train, average, translate the paper's test set and score it (scripts/run_pair.sh). Ends with
OUT/scores.json and OUT/report.md; lay the cells beside the paper's with xmoe table.

  --pair SRC-en         SRC is uk, de, ru, he or zh
  --method NAME         a file of train_configs/wmt23/; they are listed below
  --gpus N              GPUs that train together (default: 4); tokens per update stay those of 4 GPUs. 0: the CPU
  --seed N              seed of the training (default: 1)
  --data DIR            text and binary data of the pair (default: runs/wmt23/SRC-en/data at the project's root)
  --out DIR             the run (default: runs/wmt23/SRC-en/NAME/seedN)
  --raw DIR             take DIR/{train,valid,test}.{SRC,en} as they are instead of downloading
  --test-set NAME       what the test set of --raw is, kept in scores.json (default: test)
  --recipes WHAT, --without NAME, --with-back-translation
                        passed to data_prep/download_wmt23.sh
  --language-id NAME    py3langid (default) or none, for cleaning
  --max-pairs N         clean pairs to train on, drawn evenly at random (default: those of the paper's Table 4, 10 or 30
                        million; with --raw all); 0: all
  --sample-seed N       seed of this draw (default: 1)
  --vocab-size N        joint subwords (default: 32000)
  --configs DIR         other sizes, such as train_configs/small (default: train_configs/wmt23)
  --average WHICH:N     checkpoints to average: best:N (default: best:5) by validation loss, or last:N
  --set KEY=VALUE       change one setting of the YAML, e.g. --set optimization.max_update=2000; repeatable
  --max-len-b N         most subwords of a translation (default: 400; WMT22 has references of up to 244 words)
  --calibrate GOAL      prices of inference scored beside the model as trained; passed to scripts/run_pair.sh, repeatable
  --model-overrides TEXT  settings of the model for the translation, e.g. "{'moe_threshold': 0.7}"
  --launcher WORDS      what starts the training on several nodes (scripts/slurm/several_nodes.sbatch sets it; default
                        with several GPUs: torchrun on this machine, its ranks meeting on the loopback interface)
  --workers N           processes of cleaning and binarising (default: the number of cores)
  --data-only           prepare the data and stop; needs no GPU and no --method
  --prepared            stop if the data are not ready, instead of preparing them while GPUs wait
  --restart             rename OUT to OUT.1 (or .2, ...) and train anew; nothing is deleted
  --restart-data        likewise for the data
  --dry-run             print the commands, ready to be copied, and run nothing
  -h, --help            this text

A finished stage is kept; after an interruption the same command continues. Finished data of other settings are never
overwritten, since other cells may be trained on them, nor is a training: exit 2 names the settings that differ. Cells
of one pair may be started together: all but one wait for the data. SIGUSR1 and SIGTERM save the training and end it
with exit code 75. Needs scripts/setup.sh, and python3 with venv and the internet for the download.
Exit: 0 done, 1 a stage failed (the last line names it), 2 bad arguments or settings that cannot be taken over,
75 stopped by a signal, everything saved.
TEXT
    printf 'Methods: %s\n' "$(list_methods)"
}
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

pair='' method='' gpus=4 seed=1 data='' run_out='' raw='' test_set='' recipes='' language_id=py3langid
vocab_size=32000 configs=$root/train_configs/wmt23 launcher='' workers=$(num_cores) model_overrides='{}'
average=best:5 settings=() goals=() data_only='' prepared='' restart='' restart_data=''
max_len_b=400 max_pairs='' sample_seed=1 without=() with_back_translation=''
flags=(pair method gpus seed data out:run_out raw test-set recipes 'without:without[]' language-id max-pairs sample-seed
    vocab-size configs average 'set:settings[]' 'calibrate:goals[]' max-len-b model-overrides launcher workers)
switches=(dry-run data-only prepared restart restart-data with-back-translation)

list_methods() {
    local file names=''
    for file in "$configs"/*.yaml; do names+=" $(basename "$file" .yaml)"; done
    printf '%s\n' "${names# }"
}

read_flags "$@"
configs=$(absolute "$configs")

table4_pairs() { awk -F '\t' -v pair="$pair" '$1 == pair && $2 == "pairs" { print $3 }' "$root/data_prep/wmt23.tsv"; }

check_arguments() {
    [[ -n $pair && -n $method$data_only ]] || die '--pair and --method are needed; see --help' 2
    case $pair in # the test sets of the paper's Table 4
    uk-en | he-en) test_set=${test_set:-${raw:+test}} test_set=${test_set:-flores200.devtest} ;;
    de-en | ru-en | zh-en) test_set=${test_set:-${raw:+test}} test_set=${test_set:-wmt22} ;;
    *) die "--pair must be one of uk-en, de-en, ru-en, he-en, zh-en; got '$pair'" 2 ;;
    esac
    [[ -n $data_only || -f $configs/$method.yaml ]] || die "--method is one of: $(list_methods); got '$method'" 2
    need_whole_number --gpus "$gpus" 0
    need_whole_number --seed "$seed" 0
    need_whole_number --vocab-size "$vocab_size" 1
    need_whole_number --workers "$workers" 1
    need_whole_number --sample-seed "$sample_seed" 0
    [[ -z $raw ]] || max_pairs=${max_pairs:-0}
    max_pairs=${max_pairs:-$(table4_pairs)}
    need_whole_number --max-pairs "$max_pairs" 0
    [[ $language_id == py3langid || $language_id == none ]] ||
        die "--language-id is py3langid or none, got '$language_id'" 2
    [[ -z $raw || -z $recipes$with_back_translation${without[*]-} ]] ||
        die '--raw replaces the download; leave out --recipes, --without and --with-back-translation' 2
}

# What would fail only after hours of downloading or cleaning.
check_machine() {
    local seen
    if [[ $language_id == py3langid ]] && ! python -c 'import py3langid' 2>/dev/null; then
        die 'py3langid is missing: run scripts/setup.sh, or give --language-id none'
    fi
    [[ -z $launcher && -z $data_only && $gpus != 0 ]] || return 0
    seen=$(python -c 'import torch; print(torch.cuda.device_count())')
    ((seen >= gpus)) || die "--gpus $gpus, but torch sees $seen; lower it (0 trains on the CPU)"
}

# The YAML counts batches per update for 4 GPUs; with others the tokens of an update must stay the same.
set_update_freq() {
    local batches processes=$((gpus > 0 ? gpus : 1))
    [[ -z $data_only ]] || return 0
    batches=$(sed -n 's/^  update_freq: \[\([0-9]*\)\].*/\1/p' "$configs/$method.yaml")
    [[ -n $batches ]] && ((processes != 4)) || return 0
    ((4 * batches % processes == 0)) ||
        die "--gpus $gpus: an update has $((4 * batches)) batches, which $gpus GPUs cannot share; give a divisor" 2
    settings=("optimization.update_freq=[$((4 * batches / processes))]" ${settings[@]+"${settings[@]}"})
}

clean_text() {
    run python -m data_prep.clean --pair "$pair" --input "$raw/train" --out "$data/clean/train" \
        --exclude "$raw/valid" "$raw/test" --language-id "$language_id" --workers "$workers"
}

sample_text() {
    run python -m data_prep.sample --pair "$pair" --input "$data/clean/train" --out "$data/sample/train" \
        --max-pairs "$max_pairs" --seed "$sample_seed"
}

learn_subwords() {
    run python -m data_prep.subwords learn --vocab-size "$vocab_size" --out "$data/subwords" \
        --inputs "$train_text.$source_language" "$train_text.en"
}

binarise() {
    run bash "$root/data_prep/binarise.sh" --pair "$pair" --train "$train_text" --valid "$raw/valid" \
        --test "$raw/test" --subwords "$data/subwords" --out "$data/bin" --workers "$workers"
}

download() {
    local corpus command=(bash "$root/data_prep/download_wmt23.sh" --pair "$pair" --out "$data")
    [[ -z $recipes ]] || command+=(--recipes "$recipes")
    [[ -z $with_back_translation ]] || command+=(--with-back-translation)
    for corpus in ${without[@]+"${without[@]}"}; do command+=(--without "$corpus"); done
    if [[ -n $dry_run ]]; then
        run "${command[@]}"
    else
        pass_signals leader "${command[@]}"
    fi
}

prepare_data() {
    local raw_files train_files
    if [[ -z $raw ]]; then
        raw=$data/raw
        [[ -n $prepared ]] || download
    fi
    raw_files=("$raw"/{train,valid,test}."$source_language" "$raw"/{train,valid,test}.en)
    stage clean clean_text "pair=$pair" "language_id=$language_id" -- "${raw_files[@]}"
    train_text=$data/clean/train
    if ((max_pairs > 0)); then
        stage sample sample_text "max_pairs=$max_pairs" "sample_seed=$sample_seed" -- \
            "$train_text.$source_language" "$train_text.en"
        train_text=$data/sample/train
    fi
    train_files=("$train_text.$source_language" "$train_text.en")
    stage subwords learn_subwords "vocab_size=$vocab_size" -- "${train_files[@]}"
    stage binarise binarise "pair=$pair" -- "${raw_files[@]}" "${train_files[@]}" "$data/subwords/dict.txt"
}

# On one machine the ranks need no network: they meet and talk on the loopback interface.
local_launcher() {
    printf '%s ' env NCCL_SOCKET_IFNAME=lo GLOO_SOCKET_IFNAME=lo torchrun --nnodes=1 "--nproc-per-node=$gpus" \
        --rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:0 --local-addr=127.0.0.1 --no-python
}

train_and_score() {
    local setting command=(bash "$root/scripts/run_pair.sh" --pair "$pair" --test "$raw/test" --out "$run_out"
        --seed "$seed" --data-bin "$data/bin" --subword-model "$data/subwords" --test-set "$test_set"
        --config "$configs/$method.yaml" --average "$average" --model-overrides "$model_overrides"
        --max-len-b "$max_len_b")
    [[ ! -f $data/corpora.tsv ]] || command+=(--corpora "$data/corpora.tsv")
    [[ -z $restart ]] || command+=(--restart)
    if ((gpus == 0)); then
        command+=(--device cpu)
    else
        command+=(--device cuda --set "distributed_training.distributed_world_size=$gpus")
    fi
    if ((gpus > 1)); then
        command+=(--launcher "${launcher:-$(local_launcher)}")
    fi
    for setting in ${settings[@]+"${settings[@]}"}; do command+=(--set "$setting"); done
    for setting in ${goals[@]+"${goals[@]}"}; do command+=(--calibrate "$setting"); done
    if [[ -n $dry_run ]]; then
        printf '\n# train and score: this command, which runs what follows it\n# '
        run "${command[@]}"
        "${command[@]}" --dry-run
        return
    fi
    pass_signals leader "${command[@]}"
    log "beside the paper: xmoe table --cell $method $pair $run_out/scores.json"
}

check_prepared() {
    [[ -z $data_only$restart_data ]] || die '--prepared takes the data as they are; leave out --data-only and --restart-data' 2
    [[ -n $dry_run || -f $data/.stages/binarise ]] ||
        die "--prepared: the data in $data are not ready; first run the same command with --data-only instead (no GPU needed)"
}

prepare_data_alone() { # the cells of a pair that start together wait for the first
    mkdir -p "$data/.stages"
    if command -v flock >/dev/null; then
        exec 8>"$data/.stages/wait"
        if ! flock -n 8; then
            [[ -z $restart_data ]] || die "--restart-data: another run prepares the data in $data"
            log "waiting for the data that another run prepares in $data"
            flock 8
        fi
    fi
    if [[ -n $restart_data ]]; then
        set_aside "$data"
        mkdir -p "$data/.stages"
        exec 8>"$data/.stages/wait"
        ! command -v flock >/dev/null || flock 8
    fi
    prepare_data
    exec 8>&-
}

check_arguments
source_language=${pair%-*}
data=$(absolute "${data:-$root/runs/wmt23/$pair/data}")
run_out=$(absolute "${run_out:-$root/runs/wmt23/$pair/$method/seed$seed}")
[[ -z $raw ]] || raw=$(absolute "$raw")
[[ -z $recipes || $recipes == *://* ]] || recipes=$(absolute "$recipes")
[[ -z $prepared ]] || check_prepared
use_environment
set_update_freq
# Read by stages.sh: the stages here are those of the data.
# shellcheck disable=SC2034
out=$data stages=(clean sample subwords binarise) settled=(clean sample subwords binarise) results=()
way_out="add --restart-data, which renames $data and begins anew"
cd "$root"
if [[ -n $dry_run ]]; then
    printf 'cd %q\n' "$root"
    prepare_data
else
    check_machine
    trap report_failed_stage EXIT
    prepare_data_alone
fi
if [[ -z $data_only ]]; then
    train_and_score
else
    log "the data are ready in $data; the same command with --method and without --data-only trains"
fi
