#!/usr/bin/env bash
# The data stages of run_pair.sh, from raw text to binary data, and what a training depends on in them. Meant to be
# sourced, not run: the variables are those of run_pair.sh and model_run.sh.
# shellcheck disable=SC2034,SC2154

validate() {
    run python -m data_prep.validate --pair "$pair" ${train:+"$train"} --held-out ${valid:+"$valid"} "$test" \
        --out "$out/overlap.json"
}

learn_subwords() {
    run rm -rf "$subwords"
    run mkdir -p "$subwords"
    run python -m data_prep.subwords learn --tool "$tool" --vocab-size "$vocab_size" --out "$subwords" \
        --inputs "$train.$source_language" "$train.$target_language"
}

# What the model and a batch of the translation take, without the end mark: longest_source, longest_target, and the
# numbers that data_prep.lengths wants.
find_limits() {
    local found source target
    found=$(python -m eval.run.training_settings limits "${configuration[@]}")
    read -r source target batch_tokens <<<"$found"
    position_flags=(--max-source-positions "$source" --max-target-positions "$target")
    ((batch_tokens == 0)) || position_flags+=(--batch-tokens "$batch_tokens")
    longest_source=$((source < max_tokens ? source - 1 : max_tokens - 1))
    longest_target=$((target < max_tokens ? target - 1 : max_tokens - 1))
    [[ -z $max_source_length ]] || longest_source=$((max_source_length < longest_source ? max_source_length : longest_source))
}

encode_split() { # encode_split SPLIT: both sides; a test line that the translation could not take is cut
    local language longest command
    run mkdir -p "$encoded"
    for language in "$source_language" "$target_language"; do
        longest=$longest_target
        [[ $language != "$source_language" ]] || longest=$longest_source
        command=(python -m data_prep.subwords encode --subwords "$subwords" --language "$language"
            --input "${!1}.$language" --out "$encoded/$1.$language")
        [[ $1 != test ]] || command+=(--max-length "$longest" --report "$encoded/test.$language.json")
        run "${command[@]}"
    done
}

encode() {
    local split
    for split in train valid test; do encode_split "$split"; done
}

check_lengths() {
    run python -m data_prep.lengths --data "$data_bin" --pair "$pair" "${position_flags[@]}" --out "$out/lengths.json"
}

# fairseq-preprocess takes a comma in --trainpref for a list, so it works in the folder of the encoded text.
binarise() {
    run rm -rf "$data_bin.partial"
    run env -C "$encoded" fairseq-preprocess --source-lang "$source_language" --target-lang "$target_language" \
        --trainpref train --validpref valid --testpref test \
        --joined-dictionary --srcdict "$subwords/dict.txt" --destdir "$data_bin.partial" --workers "$workers"
    run rm -rf "$data_bin"
    run mv "$data_bin.partial" "$data_bin"
}

prepare_test_data() {
    encode_split test
    run rm -rf "$test_bin.partial"
    run env -C "$encoded" fairseq-preprocess --source-lang "$source_language" --target-lang "$target_language" \
        --testpref test --srcdict "$data_bin/dict.$source_language.txt" --tgtdict "$data_bin/dict.$target_language.txt" \
        --destdir "$test_bin.partial" --workers 1
    run rm -rf "$test_bin"
    run mv "$test_bin.partial" "$test_bin"
}

# What the model depends on beside these settings; the content of text counts, not its place.
training_facts() {
    local split language sum
    printf '%s\n' "pair=$pair" "seed=$seed"
    if [[ -n $prepared ]]; then
        signature -- "${training_data[@]}"
        return
    fi
    printf '%s\n' "subwords=$tool" "vocab_size=$vocab_size"
    for split in train valid; do
        for language in "$source_language" "$target_language"; do
            sum=$(checksum "${!split}.$language") || exit 1
            printf 'content of --%s (%s)=%s\n' "$split" "$language" "$sum"
        done
    done
}
