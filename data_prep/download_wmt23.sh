#!/usr/bin/env bash
set -euo pipefail
usage() {
    cat <<'TEXT'
Usage: data_prep/download_wmt23.sh --pair SRC-TGT [--out DIR] [options]

Downloads the parallel training text that the WMT23 translation task allowed for uk-en, de-en, ru-en, he-en or zh-en,
with a development and a test set, by mtdata in an environment of its own, into DIR/raw/{train,valid,test}.{SRC,en}.
No monolingual corpus, and none that a machine translated. DIR/corpora.tsv tells what was taken and what was left out.

  --out DIR         default: data/PAIR
  --without NAME    leave out this corpus, for instance because its address is dead; repeatable
  --with-back-translation   also what WMT offers of machine-translated text (ru-en has some)
  --recipes WHAT    the training corpora of an mtdata recipe file instead of those of data_prep/wmt23.tsv: a path or an
                    address; the recipe is wmt23-SRCen, for uk also wmt22-uken
  --jobs N          downloads at a time (default: 4)
  --dry-run         list the corpora and print the commands, ready to be copied; run nothing

  pair   valid               test (that of the paper)
  uk-en  FLORES-200 dev      FLORES-200 devtest
  he-en  FLORES-200 dev      FLORES-200 devtest
  de-en  newstest2021        WMT22 general test, reference A
  ru-en  newstest2021        WMT22 general test, reference A
  zh-en  newstest2021        WMT22 general test, reference A

Needs: Python 3.10 or later with venv, the internet, curl if --recipes is an address, and disk for three copies of the
text (the archives, which stay in ~/.mtdata or $MTDATA, mtdata's parts, the merged text). CCMT (zh) wants a
registration and is not in the list. A finished stage is kept: the same command again continues after an interruption.
XMOE_MTDATA_VENV names another place for the environment.
Exit: 0 done, 1 a stage failed (the last line names it), 2 bad arguments or other settings than those of finished text.
TEXT
}
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../scripts/lib.sh"

mtdata_version=0.5.1
pair='' recipes='' out='' jobs=4 without=() with_back_translation=''
flags=(pair recipes out jobs 'without:without[]')
switches=(dry-run with-back-translation)
read_flags "$@"
need_whole_number --jobs "$jobs" 1

listed() { # listed PART: the corpora of the pair in data_prep/wmt23.tsv
    awk -F '\t' -v pair="$pair" -v part="$1" '$1 == pair && $2 == part { print $3 }' "$root/data_prep/wmt23.tsv"
}

case $pair in # mtdata wants codes of three letters
    uk-en) code=ukr ;;
    he-en) code=heb ;;
    de-en) code=deu ;;
    ru-en) code=rus ;;
    zh-en) code=zho ;;
    *) die "--pair must be one of uk-en, de-en, ru-en, he-en, zh-en; got '$pair'" 2 ;;
esac
source_language=${pair%-*} valid=$(listed valid) test=$(listed test)
out=$(absolute "${out:-data/$pair}")
[[ -z $recipes || $recipes == *://* ]] || recipes=$(absolute "$recipes")
venv=$(absolute "${XMOE_MTDATA_VENV:-$root/.venv-mtdata}")
raw=$out/raw recipe_folder=$out/recipes
corpora=() left_out=()

note() { # note NAME FILE...: lines, bytes and sha256 of what a stage made
    run bash "$root/data_prep/checksums.sh" --out "$out/$1.tsv" "${@:2}"
}

make_environment() {
    [[ -n $dry_run || $("$venv/bin/mtdata" --version 2>/dev/null) != "mtdata $mtdata_version "* ]] || return 0
    run python3 -m venv "$venv"
    run "$venv/bin/pip" install --quiet "mtdata==$mtdata_version"
}

fetch_recipes() { # mtdata reads mtdata.recipes*.yml of the folder in MTDATA_RECIPES
    local file=$recipe_folder/mtdata.recipes.wmt.yml
    run mkdir -p "$recipe_folder"
    if [[ $recipes == *://* ]]; then
        run curl --fail --silent --show-error --location --output "$file.partial" "$recipes" ||
            die "cannot fetch $recipes; get the file by other means and give it: --recipes FILE"
    else
        [[ -s $recipes ]] || die "--recipes $recipes: no such file, or an empty one; it must be mtdata's YAML of recipes"
        run cp "$recipes" "$file.partial"
    fi
    run mv -f "$file.partial" "$file"
    note recipes "$file"
}

# The training corpora of the pair's recipe, one a line; its monolingual ones are left.
recipe_corpora() {
    MTDATA_RECIPES=$recipe_folder "$venv/bin/mtdata" list-recipe --format json |
        "$venv/bin/python" -c '
import json, sys
recipes = {recipe["id"]: recipe for recipe in map(json.loads, sys.stdin)}
found = next((recipes[name] for name in sys.argv[1:] if name in recipes), None)
if found is None:
    sys.exit(f"no recipe {sys.argv[1]}; there are: " + " ".join(sorted(recipes)))
print("\n".join(found["train"]))' "wmt23-${source_language}en" ${1:+"$1"} || die "--recipes $recipes: see above"
}

# Fills `corpora` and `left_out`: what is trained on, and what is not and why.
choose_corpora() {
    local all corpus
    if [[ -n $recipes && -z $dry_run ]]; then
        all=$(recipe_corpora "$([[ $pair != uk-en ]] || echo wmt22-uken)")
    else
        all=$(listed train)$'\n'$(listed back-translation)
    fi
    mapfile -t all < <(grep . <<<"$all")
    for corpus in ${without[@]+"${without[@]}"}; do
        [[ " ${all[*]} " == *" $corpus "* ]] || die "--without $corpus: the pair has ${all[*]}" 2
    done
    for corpus in "${all[@]}"; do
        if [[ " ${without[*]-} " == *" $corpus "* ]]; then
            left_out+=("$corpus"$'\t'"left out by --without")
        elif [[ $corpus == *backtrans* && -z $with_back_translation ]]; then
            left_out+=("$corpus"$'\t'"machine-translated; --with-back-translation takes it")
        else
            corpora+=("$corpus")
        fi
    done
    ((${#corpora[@]} > 0)) || die "--without leaves nothing to train on" 2
}

# With --dry-run: each corpus, with address and size where mtdata's index is there and has them.
list_corpora() {
    local line index='' machine='none back-translated'
    [[ -z $with_back_translation ]] || machine='back-translation included'
    [[ ! -x $venv/bin/mtdata ]] ||
        index=$(printf '%s\n' "${corpora[@]}" "$valid" "$test" | "$venv/bin/python" "$root/data_prep/mtdata_index.py" 2>/dev/null) || index=''
    [[ -z $recipes ]] || printf '# --recipes is read when the command runs; without it these are the corpora\n'
    printf '# %s: %d corpora to train on, none of them monolingual, %s\n' "$pair" "${#corpora[@]}" "$machine"
    for line in "${corpora[@]/#/train  }" "valid  $valid" "test   $test"; do
        printf '#   %s\n' "$line$({ grep -F -m 1 -- "${line##* }"$'\t' <<<"$index" || true; } | sed 's/^[^\t]*\t/  /; s/\t/  /')"
    done
    for line in ${left_out[@]+"${left_out[@]}"}; do printf '#   not    %s\n' "${line/$'\t'/: }"; done
    if [[ -z $index ]]; then
        printf '# addresses are listed once mtdata is installed in %s\n' "$venv"
    fi
    printf '# sizes, asked of the servers: %q stats --quick NAME...\n' "$venv/bin/mtdata"
}

get_train() {
    local folder=$out/mtdata/train failed
    # Whatever cannot be fetched is told at once, not one dead address a day.
    [[ -n $dry_run ]] || rm -f "$folder/errors.tsv"
    run "$venv/bin/mtdata" get --langs "$code-eng" --train "${corpora[@]}" --merge --no-fail --n-jobs "$jobs" --out "$folder"
    if [[ -z $dry_run && -s $folder/errors.tsv ]]; then
        failed=$(cut -f 1 "$folder/errors.tsv" | sort -u)
        cat "$folder/errors.tsv" >&2
        die "not fetched (see above): ${failed//$'\n'/ }. The same command tries again; to go on without them add \
--without ${failed//$'\n'/ --without }"
    fi
    run mkdir -p "$raw"
    run mv -f "$folder/train.$code" "$raw/train.$source_language"
    run mv -f "$folder/train.eng" "$raw/train.en"
    note train "$raw/train.$source_language" "$raw/train.en"
    [[ -n $dry_run ]] || note_corpora "$folder"
}

note_corpora() { # note_corpora FOLDER: corpus, pairs of lines or why there are none
    local corpus part
    {
        for corpus in "${corpora[@]}"; do
            part=$(find "$1/train-parts" -name "$corpus.*" ! -name '*.meta.*' | sort | head -n 1)
            printf '%s\t%s\n' "$corpus" "$([[ -z $part ]] || wc -l <"$part")"
        done
        printf '%s\n' ${left_out[@]+"${left_out[@]}"}
    } >"$out/corpora.tsv.partial"
    mv -f "$out/corpora.tsv.partial" "$out/corpora.tsv"
}

get_held_out() {
    run "$venv/bin/mtdata" get --langs "$code-eng" --dev "$valid" --test "$test" --out "$out/mtdata/held-out"
    run mkdir -p "$raw"
    run cp -L "$out/mtdata/held-out/dev.$code" "$raw/valid.$source_language"
    run cp -L "$out/mtdata/held-out/dev.eng" "$raw/valid.en"
    run cp -L "$out/mtdata/held-out/test1.$code" "$raw/test.$source_language"
    run cp -L "$out/mtdata/held-out/test1.eng" "$raw/test.en"
    note held-out "$raw"/{valid,test}."$source_language" "$raw"/{valid,test}.en
}

next_steps() {
    local cleaned=$out/clean/train
    printf '\n# next: clean the training text, keeping the held-out sets out of it, and take as many pairs as the paper\n'
    printf 'xmoe prepare clean --pair %s --input %q --out %q --exclude %q %q --language-id py3langid\n' \
        "$pair" "$raw/train" "$cleaned" "$raw/valid" "$raw/test"
    printf 'xmoe prepare sample --pair %s --input %q --out %q --max-pairs %s\n' \
        "$pair" "$cleaned" "$out/sample/train" "$(listed pairs)"
}

# Read by stages.sh.
# shellcheck disable=SC2034
stages=(held_out train) settled=(held_out train) results=()
trap report_failed_stage EXIT
if [[ -n $dry_run ]]; then
    choose_corpora
    list_corpora
    printf 'cd %q\n' "$root"
    make_environment
    [[ -z $recipes ]] || fetch_recipes
else
    mkdir -p "$out/.stages"
    make_environment
    [[ -z $recipes ]] || fetch_recipes
    choose_corpora
fi
stage held_out get_held_out "valid=$valid" "test=$test"
stage train get_train "mtdata=$mtdata_version" "corpora=${corpora[*]}"
next_steps
