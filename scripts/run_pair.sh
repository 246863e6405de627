#!/usr/bin/env bash
set -euo pipefail
usage() {
    cat <<'TEXT'
Usage: scripts/run_pair.sh --pair SRC-TGT --train PREFIX --valid PREFIX --test PREFIX --out DIR [options]

From raw parallel text (PREFIX.SRC and PREFIX.TGT, one segment a line, UTF-8) to a scored translation model:
validate, subwords, encode, binarise, lengths, train, average, generate, detokenise, score, calibrate, analyse,
evaluate, report. Ends with DIR/report.md, DIR/report.html (figures and a routing explorer), DIR/scores.json and the
translations in DIR/translations/test.TGT.

  --config FILE           a YAML of train_configs/ (default: train_configs/small/xmoe.yaml)
  --set KEY=VALUE         change one setting of the YAML, e.g. --set optimization.max_update=2000; repeatable
  --seed N                seed of the training (default: 1)
  --data-bin DIR          take binary data from data_prep/binarise.sh (its test split must be that of --test); leaves out
                          subwords, encode, binarise, --train and --valid; needs --subword-model
  --subword-model DIR     the subwords that the data of --data-bin were made with
  --test-set NAME         what the test set is, kept in scores.json, e.g. wmt22 (default: the last part of its PREFIX)
  --subwords TOOL         sentencepiece (default) or subword-nmt; BPE learned on both languages together
  --vocab-size N          subwords (default: 8000; for subword-nmt: merges)
  --average WHICH:N       checkpoints to average: last:N (default: last:5) or best:N by validation loss; all there are
                          if these are fewer, and the report says so
  --calibrate GOAL        calibrate a copy of the model and score it, too: loss:BITS takes the cheapest threshold that loses
                          at most BITS on the validation set, budget:X the best one whose MoE layers cost X times the
                          dense FFN's FLOPs; repeatable (default: loss:0.01); none leaves it out. Models without XMoE's
                          router stay as they are
  --beam N                beam of the translation (default: 5)
  --lenpen X              length penalty of the translation (default: 1.0)
  --model-overrides TEXT  passed to fairseq-generate, e.g. "{'moe_threshold': 0.7}"
  --max-len-a X, --max-len-b N   most subwords of a translation: X times those of the source, plus N (default: 0, 200)
  --max-source-length N   cut longer test lines to N subwords (default: what the model and --max-tokens take)
  --max-tokens N          tokens in one batch of the translation (default: 4096)
  --device NAME           cpu, cuda or auto (default: auto; training uses all GPUs that CUDA_VISIBLE_DEVICES shows)
  --launcher WORDS        what starts the training, e.g. "torchrun --nproc-per-node=4 --no-python" (default: nothing;
                          fairseq starts a process for each GPU by itself)
  --user-dir DIR          a package of your own that imports xmoe_fairseq and brings a router or an architecture (docs/methods.md)
  --workers N             processes of binarising (default: the number of cores)
  --no-analysis           leave out analysis.json and report.html
  --corpora FILE          corpora.tsv of data_prep/download_wmt23.sh: the report says which corpora were left out
  --data-only             stop before the training; needs no GPU
  --restart               rename DIR to DIR.1 (or .2, ...) and begin anew; nothing is deleted
  --dry-run               print the commands, ready to be copied, and run nothing
  -h, --help              this text

A stage is kept when its settings and the content of its inputs have not changed since it last succeeded. When one
runs, all later ones run too. After an interruption the same command continues, training from its last checkpoint; so
does one with more updates, another patience, save interval, batch, device, precision or number of GPUs or workers.
Other settings, text or subwords than those of the training stop with exit 2 and their names before anything is written.
SIGUSR1 and SIGTERM save the training and end it with exit code 75: the same command continues.
Needs the environment of scripts/setup.sh, or fairseq's commands in PATH.
Exit: 0 done, 1 a stage failed (the last line names it), 2 bad arguments or a training that they cannot continue,
75 stopped by a signal, everything saved.
TEXT
}
# shellcheck source=scripts/model_run.sh
. "$(dirname "${BASH_SOURCE[0]}")/model_run.sh"
# shellcheck source=scripts/pair_data.sh
. "$root/scripts/pair_data.sh"

pair='' train='' valid='' test='' config=$root/train_configs/small/xmoe.yaml beam=5 lenpen=1.0 model_overrides='{}' max_len_a=0
max_len_b=200 max_source_length='' subword_model='' corpora=''
flags=("${model_flags[@]}" pair train valid test beam lenpen model-overrides max-len-a max-len-b max-source-length subword-model
    corpora)
switches=("${model_switches[@]}")
read_flags "$@"

check_arguments() {
    local name needed=(pair train valid test out)
    if [[ -n $data_bin$subword_model ]]; then
        [[ -n $data_bin && -n $subword_model ]] || die '--data-bin and --subword-model go together' 2
        [[ -z $train$valid ]] || die '--data-bin brings the training data; leave out --train and --valid' 2
        [[ -z $data_only ]] || die '--data-bin brings the data; leave out --data-only' 2
        needed=(pair test out)
    fi
    for name in "${needed[@]}"; do
        [[ -n ${!name} ]] || die "--$name is missing; see --help" 2
    done
    need_pair "$pair"
    check_model_arguments
    need_whole_number --beam "$beam" 1
    need_whole_number --max-len-b "$max_len_b" 0
    [[ -z $max_source_length ]] || need_whole_number --max-source-length "$max_source_length" 1
    [[ $max_len_a =~ ^[0-9]+(\.[0-9]+)?$ ]] || die "--max-len-a wants a number of at least 0 such as 1.5, got '$max_len_a'" 2
    [[ $max_len_a$max_len_b =~ [1-9] ]] || die '--max-len-a and --max-len-b are both 0: no translation would be allowed a word' 2
    [[ $lenpen =~ ^-?[0-9]+(\.[0-9]+)?$ ]] || die "--lenpen wants a number such as 1.0, got '$lenpen'" 2
}

check_arguments
source_language=${pair%-*} target_language=${pair#*-}
for name in train valid test out config data_bin subword_model corpora user_dir; do
    [[ -z ${!name} ]] || printf -v "$name" '%s' "$(absolute "${!name}")"
done
test_set=${test_set:-$(basename "$test")}
use_environment
find_device
settle_model_arguments

prepared=$data_bin
# With prepared data the test set alone is encoded and binarised here: cut to what this model takes.
test_bin=$out/test-bin
[[ -n $prepared ]] || test_bin=$out/data-bin
subwords=${subword_model:-$out/subwords} encoded=$out/encoded data_bin=${data_bin:-$out/data-bin}
translations=$out/translations
raw_prefixes=(${train:+"$train"} ${valid:+"$valid"} "$test")
raw_files=() encoded_files=() training_data=() test_data=() position_flags=() longest_source='' longest_target=''
for language in "$source_language" "$target_language"; do
    raw_files+=("${raw_prefixes[@]/%/.$language}")
    encoded_files+=("$encoded"/{train,valid,test}."$language")
    training_data+=("$data_bin/dict.$language.txt" "$data_bin"/{train,valid}."$pair.$language".{bin,idx})
    test_data+=("$test_bin/dict.$language.txt" "$test_bin/test.$pair.$language".{bin,idx})
done
# Read by model_run.sh, as is vocabulary.
# shellcheck disable=SC2034
task_words=(++task.source_lang="$source_language" ++task.target_lang="$target_language")
# shellcheck disable=SC2034
vocabulary=$data_bin/dict.$source_language.txt
device_flags=()
[[ $device != cpu ]] || device_flags=(--cpu)
# Read by lib.sh.
# shellcheck disable=SC2034
stages=(validate subwords encode binarise test_data lengths train average generate detokenise score calibrate analyse evaluate report)

# fairseq-generate takes one of as many parts of the test set as it sees GPUs, hence the world size of 1.
generate() {
    local num_lines=0
    run mkdir -p "$translations"
    [[ -n $dry_run ]] || num_lines=$((5 * $(wc -l <"$test.$source_language"))) # S, T, H, D and P of each sentence
    run_to_with_bar "$translations/generate.txt" "$translations/generate.log" "$num_lines" \
        fairseq-generate "$test_bin" --user-dir "$user_dir" --path "$averaged" \
        --source-lang "$source_language" --target-lang "$target_language" --gen-subset test \
        --beam "$beam" --lenpen "$lenpen" --max-len-a "$max_len_a" --max-len-b "$max_len_b" \
        --max-tokens "$max_tokens" --required-batch-size-multiple 1 \
        --distributed-world-size 1 --model-overrides "$model_overrides" ${device_flags[@]+"${device_flags[@]}"}
}

# fairseq-generate writes the longest sentences first; H-NUMBER tells each one's place in the test set.
in_order() { sed -n 's/^H-//p' "$1" | LC_ALL=C sort -n -k1,1 | cut -f 3-; }

detokenise() {
    local hypotheses=$translations/test.subwords.$target_language
    if [[ -n $dry_run ]]; then
        printf "sed -n 's/^H-//p' %q | sort -n -k1,1 | cut -f 3- > %q\n" "$translations/generate.txt" "$hypotheses"
    else
        run_to "$hypotheses" in_order "$translations/generate.txt"
        check_line_counts "$hypotheses" "$test.$target_language"
    fi
    run python -m data_prep.subwords decode --subwords "$subwords" --input "$hypotheses" \
        --out "$translations/test.$target_language"
}

check_line_counts() { # check_line_counts HYPOTHESES REFERENCES
    local num_hypotheses num_references
    num_hypotheses=$(wc -l <"$1") num_references=$(wc -l <"$2")
    ((num_hypotheses == num_references)) ||
        die "$1 has $num_hypotheses lines, but $2 has $num_references: a sentence was not translated"
}

score() {
    run python -m eval.score --hypotheses "$translations/test.$target_language" \
        --references "$test.$target_language" --target-lang "$target_language" \
        --test-set "$test_set" --out "$out/score.json"
}

# The copy's translations and their scores stand beside it.
calibrate_copy() { # calibrate_copy BASE FLAG VALUE
    run rm -f "$1".{pt,json,score.json} "$1.$target_language"
    run python -m eval.calibrate --data "$data_bin" --checkpoint "$averaged" --out "$1.pt" "$2" "$3" \
        --user-dir "$user_dir" --model-overrides "$model_overrides" --device "$device" --skip-others --report "$1.json"
    [[ -n $dry_run || -f $1.pt ]] || return 0
    run python -m eval.translate --checkpoint "$1.pt" --data "$data_bin" --user-dir "$user_dir" \
        --source-lang "$source_language" --target-lang "$target_language" --subwords "$subwords" \
        --input "$test.$source_language" --out "$1.$target_language" --beam "$beam" --lenpen "$lenpen" \
        --max-len-a "$max_len_a" --max-len-b "$max_len_b" --max-tokens "$max_tokens" --device "$device"
    run python -m eval.score --hypotheses "$1.$target_language" --references "$test.$target_language" \
        --target-lang "$target_language" --test-set "$test_set" --out "$1.score.json"
}

analyse() {
    run python -m eval.analyse --checkpoint "$averaged" --data "$test_bin" --user-dir "$user_dir" \
        --subwords "$subwords" --references "$test.$target_language" --training-log "$training_log" \
        --beam "$beam" --model-overrides "$model_overrides" --device "$device" \
        --out "$analysis"
}

# The loss of the averaged checkpoint, which translates; the training log has those of single checkpoints.
evaluate() {
    run python -m eval.perplexity --checkpoint "$averaged" --data "$data_bin" --user-dir "$user_dir" --gen-subset valid \
        --model-overrides "$model_overrides" --max-tokens "$max_tokens" --device "$device" --out "$evaluation"
}

report() {
    run python -m eval.run_report --pair "$pair" --seed "$seed" --out "$out" --config "$config" \
        --training-log "$training_log" --checkpoint "$averaged" --score "$out/score.json" \
        --generation-log "$translations/generate.log" "$translations/generate.txt" --source "$test.$source_language" \
        --commit-file "$checkpoints/commit.txt" ${calibrations[@]+--calibrated "${calibrations[@]}"} \
        --evaluation "$evaluation" ${analysis:+--analysis "$analysis"} --model-overrides "$model_overrides" \
        --data "$data_bin" --lengths "$out/lengths.json" --overlap "$out/overlap.json" \
        --cut "$encoded/test.$source_language.json" ${corpora:+--corpora "$corpora"} \
        --max-len-a "$max_len_a" --max-len-b "$max_len_b"
    [[ -n $analysis ]] || return 0
    run python -m eval.report "$pair=$out" --out "$out/report.html"
}

prepare() {
    find_limits
    stage validate validate "pair=$pair" -- "${raw_files[@]}"
    if [[ -z $prepared ]]; then
        stage subwords learn_subwords "tool=$tool" "vocab_size=$vocab_size" -- \
            "$train.$source_language" "$train.$target_language"
        stage encode encode "pair=$pair" "cut=$longest_source $longest_target" -- "${raw_files[@]}" "$subwords/dict.txt"
        stage binarise binarise "pair=$pair" -- "${encoded_files[@]}" "$subwords/dict.txt"
    else
        stage test_data prepare_test_data "pair=$pair" "cut=$longest_source $longest_target" -- "${raw_files[@]}" \
            "$data_bin"/dict.{"$source_language","$target_language"}.txt
    fi
    stage lengths check_lengths "limits=${position_flags[*]}" -- "${training_data[@]}"
}

main() {
    open_run
    prepare
    if [[ -n $data_only ]]; then
        tell_that_data_are_ready
        return
    fi
    train_and_average "${training_data[@]}"
    stage generate generate "beam=$beam" "lenpen=$lenpen" "batch=$max_tokens" "max_len=$max_len_a $max_len_b" \
        "device=$device" "model_overrides=$model_overrides" -- "$averaged" "${test_data[@]}"
    stage detokenise detokenise "pair=$pair" -- "$translations/generate.txt"
    stage score score "target_language=$target_language" "test_set=$test_set" -- \
        "$translations/test.$target_language" "$test.$target_language"
    if ((${#goals[@]})); then
        stage calibrate calibrate "goals=${goals[*]}" "beam=$beam" "lenpen=$lenpen" "batch=$max_tokens" \
            "max_len=$max_len_a $max_len_b" "device=$device" "model_overrides=$model_overrides" -- "$averaged" \
            "${training_data[@]}" "$test.$source_language" "$test.$target_language"
    fi
    if [[ -n $analysis ]]; then
        stage analyse analyse "beam=$beam" "device=$device" "model_overrides=$model_overrides" -- "$averaged" \
            "$test.$target_language" "${test_data[@]}"
    fi
    stage evaluate evaluate "batch=$max_tokens" "device=$device" "model_overrides=$model_overrides" -- "$averaged" \
        "${training_data[@]}"
    stage report report "pair=$pair" "seed=$seed" "goals=${goals[*]-}" "analysis=${analysis:+yes}" -- "$out/score.json" \
        "$evaluation" "$training_log" "$translations/generate.txt" ${analysis:+"$analysis"} ${corpora:+"$corpora"}
    tell_results
}

main
