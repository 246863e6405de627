#!/usr/bin/env bash
set -euo pipefail
usage() {
    cat <<'TEXT'
Usage: data_prep/wikitext103.sh --out DIR [--train FILE --valid FILE --test FILE] [options]

Data of a language model: downloads WikiText-103 (raw), or takes text files of yours without any download, cuts it
into subwords and turns it into fairseq's binary format in DIR/bin. Text is read line by line; empty lines are left out.

  --train, --valid, --test FILE   your own UTF-8 text instead of WikiText-103; all three or none
  --subwords TOOL    gpt2: the 50,257 byte-level subwords of GPT-2, as in the paper (downloads three files of 2 MB);
                     subword-nmt: BPE learned on the training text, nothing to download
                     (default: gpt2 for WikiText-103, subword-nmt for your own text)
  --gpt2-files DIR   encoder.json, vocab.bpe and dict.txt of fairseq's GPT-2 BPE, instead of downloading them
  --merges N         BPE merges of subword-nmt (default: 8000)
  --workers N        processes of encoding and binarising (default: the number of cores)
  --dry-run          print the commands and run nothing
  -h, --help         this text

Next: fairseq-hydra-train --config-dir train_configs/lm --config-name small task.data=DIR/bin (see that file).
Perplexities of different subwords cannot be compared. Needs the environment of scripts/setup.sh; curl and unzip to
download. Text and subwords that are in DIR already are kept: for other text take another DIR.
Exit: 0 done, 1 failed, 2 bad arguments.
TEXT
}
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../scripts/lib.sh"

# The address in the papers is dead; this one is kept by an author of WikiText.
archive=https://wikitext.smerity.com/wikitext-103-raw-v1.zip
gpt2_address=https://dl.fbaipublicfiles.com/fairseq/gpt2_bpe
out='' train='' valid='' test='' subwords='' gpt2_files='' merges=8000 workers=$(num_cores)
flags=(out train valid test subwords gpt2-files merges workers)
switches=(dry-run)
read_flags "$@"
[[ -n $out ]] || die '--out is missing; see --help' 2
need_whole_number --merges "$merges" 1
need_whole_number --workers "$workers" 1
if [[ -n $train$valid$test ]]; then
    for split in train valid test; do
        [[ -s ${!split} ]] || die "--$split: no such file, or an empty one: '${!split}'; give all three or none" 2
        printf -v "$split" '%s' "$(absolute "${!split}")"
    done
fi
subwords=${subwords:-$([[ -n $train ]] && echo subword-nmt || echo gpt2)}
[[ $subwords == gpt2 || $subwords == subword-nmt ]] || die "--subwords is gpt2 or subword-nmt, got '$subwords'" 2
out=$(absolute "$out")
[[ -z $gpt2_files ]] || gpt2_files=$(absolute "$gpt2_files")
[[ ! -e $out/bin || -s $out/bin/dict.txt ]] ||
    die "--out: $out/bin has no dict.txt, so it is no data of this script, which would replace it; give another DIR" 2
gpt2=${gpt2_files:-$out/gpt2}
text=$out/text encoded=$out/encoded.$subwords
[[ $subwords == gpt2 ]] || encoded+=.$merges

fetch() { # fetch ADDRESS FILE
    [[ ! -s $2 ]] || return 0
    run curl --fail --silent --show-error --location --retry 3 --user-agent curl --output "$2.partial" "$1" ||
        die "cannot fetch $1; get it by other means and put it at $2"
    run mv -f "$2.partial" "$2"
}

take_text() {
    local split source
    run mkdir -p "$text"
    [[ -n $train ]] || fetch "$archive" "$out/wikitext-103-raw-v1.zip"
    for split in train valid test; do
        source=${!split}
        if [[ -z $train ]]; then
            source=$out/wikitext-103-raw/wiki.$split.raw
            [[ -s $source ]] || run unzip -o -q "$out/wikitext-103-raw-v1.zip" "wikitext-103-raw/wiki.$split.raw" -d "$out"
        fi
        [[ -s $text/$split ]] || run_to "$text/$split" env LC_ALL=C grep -v '^[[:space:]]*$' "$source"
    done
    check_text
}

check_text() {
    local split
    [[ -z $dry_run ]] || return 0
    for split in train valid test; do
        iconv -f UTF-8 -t UTF-8 "$text/$split" >/dev/null || die "$text/$split: not UTF-8; convert the source with iconv"
    done
}

encode() {
    local split name
    run mkdir -p "$encoded"
    if [[ $subwords == gpt2 ]]; then
        run mkdir -p "$gpt2"
        for name in encoder.json vocab.bpe dict.txt; do fetch "$gpt2_address/$name" "$gpt2/$name"; done
    else
        [[ -s $encoded/codes ]] || run_to "$encoded/codes" subword-nmt learn-bpe --symbols "$merges" --input "$text/train"
    fi
    for split in train valid test; do
        [[ ! -s $encoded/$split ]] || continue
        if [[ $subwords == gpt2 ]]; then
            run_to "$encoded/$split" python -m data_prep.gpt2 --files "$gpt2" --input "$text/$split" --workers "$workers"
        else
            run_to "$encoded/$split" subword-nmt apply-bpe --codes "$encoded/codes" --input "$text/$split"
        fi
    done
}

# fairseq-preprocess writes in place: an interruption must not leave a half-written file under its final name.
binarise() {
    local dictionary=()
    [[ $subwords != gpt2 ]] || dictionary=(--srcdict "$gpt2/dict.txt")
    run rm -rf "$out/bin.partial"
    run fairseq-preprocess --only-source --trainpref "$encoded/train" --validpref "$encoded/valid" \
        --testpref "$encoded/test" ${dictionary[@]+"${dictionary[@]}"} --destdir "$out/bin.partial" --workers "$workers"
    [[ -n $dry_run || -s $out/bin.partial/test.idx ]] || die "fairseq-preprocess left no complete data in $out/bin.partial"
    run rm -rf "$out/bin"
    run mv "$out/bin.partial" "$out/bin"
    run bash "$root/data_prep/checksums.sh" --out "$out/checksums.tsv" "$out"/text/{train,valid,test} \
        "$out"/bin/dict.txt "$out"/bin/{train,valid,test}.{bin,idx}
}

use_environment
cd "$root"
[[ -n $dry_run ]] || mkdir -p "$out"
take_text
encode
binarise
log "ready: $out/bin"
