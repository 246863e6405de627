#!/usr/bin/env bash
set -euo pipefail
usage() {
    cat <<'TEXT'
Usage: data_prep/binarise.sh --pair SRC-TGT --train PREFIX --valid PREFIX --test PREFIX --subwords DIR --out DIR
                             [--max-positions N] [--workers N] [--dry-run]

Encodes clean text PREFIX.SRC and PREFIX.TGT with the subwords of `xmoe prepare subwords learn` and turns it
into fairseq's binary format: fairseq-train, fairseq-hydra-train and fairseq-generate read DIR. Both languages share
a dictionary if the subwords are joint, else each has its own. The encoded text stays in DIR/encoded, line counts and
checksums in DIR/encoded.tsv and DIR/binary.tsv.

  --max-positions N  cut longer lines of the test set, which would stop fairseq-generate (default: 1024, fairseq's models)
  --workers N        threads of encoding and processes of fairseq-preprocess (default: the number of cores)
  --dry-run          print the commands, ready to be copied, and run nothing
Needs the environment of scripts/setup.sh, or fairseq's commands in PATH. Exit: 0 done, 1 failed, 2 bad arguments.
TEXT
}
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../scripts/lib.sh"

pair='' train='' valid='' test='' subwords='' out='' max_positions=1024 workers=$(num_cores)
flags=(pair train valid test subwords out max-positions workers)
switches=(dry-run)
read_flags "$@"
need_pair "$pair"
for name in train valid test subwords out; do [[ -n ${!name} ]] || die "--$name is needed; see --help" 2; done
need_whole_number --workers "$workers" 1
need_whole_number --max-positions "$max_positions" 2
languages=("${pair%-*}" "${pair#*-}")
for name in train valid test subwords out; do printf -v "$name" '%s' "$(absolute "${!name}")"; done

check_inputs() {
    local split language
    [[ -f $subwords/subwords.json ]] || die "$subwords: no subwords there; learn them: xmoe prepare subwords learn"
    for split in train valid test; do
        for language in "${languages[@]}"; do
            [[ -s ${!split}.$language ]] || die "--$split: ${!split}.$language is missing or empty"
        done
    done
    run python -m data_prep.validate --pair "$pair" "$train" "$valid" "$test"
}

encode() {
    local split language command
    run mkdir -p "$out/encoded"
    for split in train valid test; do
        for language in "${languages[@]}"; do
            command=(python -m data_prep.subwords encode --subwords "$subwords" --language "$language" --workers "$workers"
                --input "${!split}.$language" --out "$out/encoded/$split.$language")
            # one position is for the end mark
            [[ $split != test ]] || command+=(--max-length $((max_positions - 1)))
            run "${command[@]}"
        done
    done
    run bash "$root/data_prep/checksums.sh" --out "$out/encoded.tsv" \
        "$out"/encoded/{train,valid,test}."${languages[0]}" "$out"/encoded/{train,valid,test}."${languages[1]}"
}

# fairseq-preprocess writes in place: an interruption must not leave a half-written file under its final name. It takes
# a comma in --trainpref for a list, so it works in the folder of the encoded text.
binarise() {
    local part=$out/binary.partial dictionaries
    if [[ -f $subwords/dict.txt ]]; then
        dictionaries=(--joined-dictionary --srcdict "$subwords/dict.txt")
    else
        dictionaries=(--srcdict "$subwords/dict.${languages[0]}.txt" --tgtdict "$subwords/dict.${languages[1]}.txt")
    fi
    run rm -rf "$part"
    run env -C "$out/encoded" fairseq-preprocess --source-lang "${languages[0]}" --target-lang "${languages[1]}" \
        --trainpref train --validpref valid --testpref test \
        "${dictionaries[@]}" --destdir "$part" --workers "$workers"
    # the last file that fairseq-preprocess writes: without it, it failed however it exited
    [[ -n $dry_run || -s $part/test.$pair.${languages[1]}.idx ]] || die "fairseq-preprocess left no complete data in $part"
    local files=("dict.${languages[0]}.txt" "dict.${languages[1]}.txt") split language
    for split in train valid test; do
        for language in "${languages[@]}"; do files+=("$split.$pair.$language.bin" "$split.$pair.$language.idx"); done
    done
    run mv -f "${files[@]/#/$part/}" "$out/"
    run rm -rf "$part"
    run bash "$root/data_prep/checksums.sh" --out "$out/binary.tsv" "${files[@]/#/$out/}"
}

use_environment
if [[ -n $dry_run ]]; then printf 'cd %q\n' "$root"; fi
cd "$root"
check_inputs
encode
binarise
log "ready: fairseq-train $out"
