#!/usr/bin/env bash
set -euo pipefail
usage() {
    cat <<'TEXT'
Usage: scripts/run_lm.sh --language CODE --train PREFIX --valid PREFIX --test PREFIX --out DIR [options]

From raw text (PREFIX.CODE, one segment a line, UTF-8) to an evaluated language model: validate, subwords, encode,
binarise, train, average, evaluate, calibrate, analyse, report. Ends with DIR/report.md, DIR/report.html
(figures) and DIR/scores.json. The lines are one stream of text, in their order; an end mark stands between them.

  --config FILE           a YAML of train_configs/ for a language model (default: train_configs/lm/small.yaml)
  --set KEY=VALUE         change one setting of the YAML, e.g. --set optimization.max_update=2000; repeatable
  --seed N                seed of the training (default: 1)
  --data-bin DIR          take the data of an earlier run (its DIR/data-bin) or of data_prep/wikitext103.sh (its DIR/bin);
                          leaves out validate, subwords, encode, binarise, --train, --valid, --test
  --test-set NAME         what the test set is, kept in scores.json (default: the last part of its PREFIX)
  --subwords TOOL         sentencepiece (default) or subword-nmt; BPE learned on the training text
  --vocab-size N          subwords (default: 8000; for subword-nmt: merges)
  --average WHICH:N       checkpoints to average: last:N (default: last:5) or best:N by validation loss; all there are
                          if these are fewer, and the report says so
  --sweep T               evaluate at this threshold too, on the validation and the test set; repeatable. Only XMoE's
                          router has a threshold; others are left as they are
  --calibrate GOAL        calibrate a copy of the model and evaluate it, too: loss:BITS takes the cheapest threshold that
                          loses at most BITS on the validation set, budget:X the best one whose MoE layers cost X times
                          the dense FFN's FLOPs; repeatable (default: loss:0.01); none leaves it out
  --max-tokens N          tokens in one batch of the evaluation (default: 4096)
  --device NAME           cpu, cuda or auto (default: auto; training uses all GPUs that CUDA_VISIBLE_DEVICES shows)
  --launcher WORDS        what starts the training, e.g. "torchrun --nproc-per-node=4 --no-python" (default: nothing;
                          fairseq starts a process for each GPU by itself)
  --user-dir DIR          a package of your own that imports xmoe_fairseq and brings a router or an architecture (docs/methods.md)
  --workers N             processes of binarising (default: the number of cores)
  --no-analysis           leave out analysis.json and report.html
  --data-only             stop before the training; needs no GPU
  --restart               rename DIR to DIR.1 (or .2, ...) and begin anew; nothing is deleted
  --dry-run               print the commands, ready to be copied, and run nothing
  -h, --help              this text

Stages are kept, continued and refused as in scripts/run_pair.sh: the same command continues an interrupted run, and
other settings, text or subwords than those of the training stop with exit 2 and their names.
SIGUSR1 and SIGTERM save the training and end it with exit code 75: the same command continues.
Needs the environment of scripts/setup.sh, or fairseq's commands in PATH.
Exit: 0 done, 1 a stage failed (the last line names it), 2 bad arguments or a training that they cannot continue,
75 stopped by a signal, everything saved.
TEXT
}
# shellcheck source=scripts/model_run.sh
. "$(dirname "${BASH_SOURCE[0]}")/model_run.sh"

language='' train='' valid='' test='' config=$root/train_configs/lm/small.yaml thresholds=()
flags=("${model_flags[@]}" language train valid test 'sweep:thresholds[]')
switches=("${model_switches[@]}")
read_flags "$@"

check_arguments() {
    local name needed=(language train valid test out)
    if [[ -n $data_bin ]]; then
        [[ -z $train$valid$test ]] || die '--data-bin brings all text; leave out --train, --valid and --test' 2
        [[ -z $data_only ]] || die '--data-bin brings the data; leave out --data-only' 2
        needed=(language out)
    fi
    for name in "${needed[@]}"; do
        [[ -n ${!name} ]] || die "--$name is missing; see --help" 2
    done
    [[ $language =~ ^[a-z]{2,3}$ ]] || die "--language wants a language code such as en, got '$language'" 2
    check_model_arguments
    for name in ${thresholds[@]+"${thresholds[@]}"}; do
        [[ $name =~ ^(0?\.[0-9]+|[01](\.0+)?)$ ]] || die "--sweep wants a threshold in [0, 1] such as 0.7, got '$name'" 2
    done
}

check_arguments
for name in train valid test out config data_bin user_dir; do
    [[ -z ${!name} ]] || printf -v "$name" '%s' "$(absolute "${!name}")"
done
use_environment
find_device
settle_model_arguments

prepared=$data_bin data_bin=${data_bin:-$out/data-bin}
test_set=${test_set:-$(basename "${test:-test}")}
subwords=$out/subwords encoded=$out/encoded
raw_files=(${train:+"$train.$language"} ${valid:+"$valid.$language"} ${test:+"$test.$language"})
training_data=("$data_bin/dict.txt" "$data_bin"/{train,valid}.{bin,idx})
# Read by model_run.sh.
# shellcheck disable=SC2034
vocabulary=$data_bin/dict.txt
# Read by lib.sh.
# shellcheck disable=SC2034
stages=(validate subwords encode binarise train average evaluate calibrate analyse report)

validate() {
    run python -m data_prep.validate --language "$language" "$train" --held-out "$valid" "$test" --out "$out/text.json"
}

learn_subwords() {
    run rm -rf "$subwords"
    run mkdir -p "$subwords"
    run python -m data_prep.subwords learn --tool "$tool" --vocab-size "$vocab_size" --out "$subwords" \
        --inputs "$train.$language"
}

encode() {
    local split
    run mkdir -p "$encoded"
    for split in train valid test; do
        run python -m data_prep.subwords encode --subwords "$subwords" --language "$language" --workers "$workers" \
            --input "${!split}.$language" --out "$encoded/$split"
    done
}

# fairseq-preprocess takes a comma in --trainpref for a list, so it works in the folder of the encoded text. The sizes
# of the text go with the data: perplexities per word and bits per byte need them.
binarise() {
    run rm -rf "$data_bin.partial"
    run env -C "$encoded" fairseq-preprocess --only-source --trainpref train --validpref valid --testpref test \
        --srcdict "$subwords/dict.txt" --destdir "$data_bin.partial" --workers "$workers"
    run cp "$out/text.json" "$data_bin.partial/text.json"
    run rm -rf "$data_bin"
    run mv "$data_bin.partial" "$data_bin"
}

# What the model depends on beside its settings; the content of text counts, not its place.
training_facts() {
    local split sum
    printf '%s\n' "language=$language" "seed=$seed"
    if [[ -n $prepared ]]; then
        signature -- "${training_data[@]}"
        return
    fi
    printf '%s\n' "subwords=$tool" "vocab_size=$vocab_size"
    for split in train valid; do
        sum=$(checksum "${!split}.$language") || exit 1
        printf 'content of --%s (%s)=%s\n' "$split" "$language" "$sum"
    done
}

evaluate() {
    run python -m eval.perplexity --checkpoint "$averaged" --data "$data_bin" --user-dir "$user_dir" --gen-subset valid test \
        ${thresholds[@]+--thresholds "${thresholds[@]}" --skip-others} --max-tokens "$max_tokens" --device "$device" \
        --out "$evaluation"
}

calibrate_copy() { # calibrate_copy BASE FLAG VALUE
    run rm -f "$1".{pt,json}
    run python -m eval.calibrate --data "$data_bin" --checkpoint "$averaged" --out "$1.pt" "$2" "$3" --check-subset test \
        --user-dir "$user_dir" --max-tokens "$max_tokens" --device "$device" --skip-others --report "$1.json"
}

analyse() {
    run python -m eval.analyse --checkpoint "$averaged" --data "$data_bin" --user-dir "$user_dir" \
        --training-log "$training_log" --max-tokens "$max_tokens" --device "$device" --out "$analysis"
}

report() {
    run python -m eval.lm_report --language "$language" --seed "$seed" --test-set "$test_set" --out "$out" \
        --config "$config" --training-log "$training_log" --checkpoint "$averaged" --evaluation "$evaluation" \
        --commit-file "$checkpoints/commit.txt" ${calibrations[@]+--calibrated "${calibrations[@]}"} --text "$data_bin/text.json"
    [[ -n $analysis ]] || return 0
    run python -m eval.report "$language=$out" --out "$out/report.html"
}

main() {
    open_run
    if [[ -z $prepared ]]; then
        stage validate validate "language=$language" -- "${raw_files[@]}"
        stage subwords learn_subwords "tool=$tool" "vocab_size=$vocab_size" -- "$train.$language"
        stage encode encode "language=$language" -- "${raw_files[@]}" "$subwords/dict.txt"
        stage binarise binarise -- "$encoded"/{train,valid,test} "$subwords/dict.txt"
    fi
    if [[ -n $data_only ]]; then
        tell_that_data_are_ready
        return
    fi
    train_and_average "${training_data[@]}"
    stage evaluate evaluate "thresholds=${thresholds[*]-}" "batch=$max_tokens" "device=$device" -- "$averaged" \
        "$data_bin"/{valid,test}.{bin,idx}
    if ((${#goals[@]})); then
        stage calibrate calibrate "goals=${goals[*]}" "batch=$max_tokens" "device=$device" -- "$averaged"
    fi
    if [[ -n $analysis ]]; then
        stage analyse analyse "device=$device" -- "$averaged"
    fi
    stage report report "language=$language" "seed=$seed" "test_set=$test_set" "goals=${goals[*]-}" \
        "analysis=${analysis:+yes}" -- "$evaluation" "$training_log" ${analysis:+"$analysis"}
    tell_results
}

main
