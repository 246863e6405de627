#!/usr/bin/env bash
set -euo pipefail
usage() {
    cat <<'TEXT'
Usage: data_prep/download_wmt23.sh --pair SRC-TGT [--recipes FILE_OR_URL] [--out DIR] [--jobs N] [--dry-run]

Downloads the training text that the WMT23 translation task allowed for uk-en, de-en, ru-en, he-en or zh-en, with a
development and a test set, by mtdata in an environment of its own, into DIR/raw/{train,valid,test}.{SRC,en}.

  --recipes WHAT  mtdata's recipe file, a path or an address. The mtdata package holds no WMT recipes; this is
                  mtdata.recipes.wmt23-constrained.yml of the WMT23 site (default: its address there)
  --out DIR       default: data/PAIR
  --jobs N        downloads at a time (default: 4)
  --dry-run       print the commands, ready to be copied, and run nothing

  pair   recipe                                    valid               test (that of the paper)
  uk-en  wmt23-uken, else wmt22-uken if only that  FLORES-200 dev      FLORES-200 devtest
  he-en  wmt23-heen                                FLORES-200 dev      FLORES-200 devtest
  de-en  wmt23-deen                                newstest2021        WMT22 general test, reference A
  ru-en  wmt23-ruen                                newstest2021        WMT22 general test, reference A
  zh-en  wmt23-zhen                                newstest2021        WMT22 general test, reference A

Needs: Python 3.10 or later with venv, the internet, curl if --recipes is an address, and disk for three copies of the
text (the archives, which stay in ~/.mtdata or $MTDATA, mtdata's parts, the merged text). CCMT (zh) wants a
registration and is not in the recipes. A finished stage is kept: the same command again continues after an
interruption. XMOE_MTDATA_VENV names another place for the environment.
Exit: 0 done, 1 a stage failed (the last line names it), 2 bad arguments.
TEXT
}
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../scripts/lib.sh"

mtdata_version=0.5.1
pair='' recipes=https://www.statmt.org/wmt23/mtdata/mtdata.recipes.wmt23-constrained.yml out='' jobs=4
flags=(pair recipes out jobs)
switches=(dry-run)
read_flags "$@"
need_whole_number --jobs "$jobs" 1
flores=Flores-flores200
case $pair in # mtdata wants codes of three letters, and its FLORES ids name English first where that sorts first
    uk-en) code=ukr valid=${flores}_dev-1-eng-ukr test=${flores}_devtest-1-eng-ukr ;;
    he-en) code=heb valid=${flores}_dev-1-eng-heb test=${flores}_devtest-1-eng-heb ;;
    de-en) code=deu valid=Statmt-newstest_deen-2021-deu-eng test=Statmt-generaltest-2022_refA-deu-eng ;;
    ru-en) code=rus valid=Statmt-newstest_ruen-2021-rus-eng test=Statmt-generaltest-2022_refA-rus-eng ;;
    zh-en) code=zho valid=Statmt-newstest_zhen-2021-zho-eng test=Statmt-generaltest-2022_refA-zho-eng ;;
    *) die "--pair must be one of uk-en, de-en, ru-en, he-en, zh-en; got '$pair'" 2 ;;
esac
source_language=${pair%-*}
out=$(absolute "${out:-data/$pair}")
[[ $recipes == *://* ]] || recipes=$(absolute "$recipes")
venv=$(absolute "${XMOE_MTDATA_VENV:-$root/.venv-mtdata}")
raw=$out/raw recipe_folder=$out/recipes

note() { # note NAME FILE...: lines, bytes and sha256 of what a stage made
    run bash "$root/data_prep/checksums.sh" --out "$out/$1.tsv" "${@:2}"
}

make_environment() {
    run python3 -m venv "$venv"
    run "$venv/bin/pip" install --quiet "mtdata==$mtdata_version"
}

fetch_recipes() { # mtdata reads mtdata.recipes*.yml of the folder in MTDATA_RECIPES
    local file=$recipe_folder/mtdata.recipes.wmt.yml
    run mkdir -p "$recipe_folder"
    if [[ $recipes == *://* ]]; then
        run curl --fail --silent --show-error --location --output "$file.partial" "$recipes" ||
            die "cannot fetch $recipes; get mtdata.recipes.wmt23-constrained.yml by other means and give it: --recipes FILE"
    else
        [[ -s $recipes ]] || die "--recipes $recipes: no such file, or an empty one; it must be mtdata's YAML of recipes"
        run cp "$recipes" "$file.partial"
    fi
    run mv -f "$file.partial" "$file"
    note recipes "$file"
}

choose_recipe() { # prints the recipe's id
    local wanted=wmt23-${source_language}en known
    if [[ -n $dry_run ]]; then
        printf '%s\n' "$wanted"
        return
    fi
    known=$("$venv/bin/mtdata" list-recipe -id)
    if grep -qx "$wanted" <<<"$known"; then
        printf '%s\n' "$wanted"
    elif [[ $pair == uk-en ]] && grep -qx wmt22-uken <<<"$known"; then
        log "the recipes have no $wanted; taking wmt22-uken, the same task a year earlier"
        printf 'wmt22-uken\n'
    else
        die "--recipes $recipes: no recipe $wanted there; it has: $(grep -c . <<<"$known") ids, $(grep wmt <<<"$known" |
            tr '\n' ' ')"
    fi
}

get_train() {
    local recipe
    recipe=$(choose_recipe)
    run "$venv/bin/mtdata" get-recipe --recipe-id "$recipe" --merge --n-jobs "$jobs" --fail-on-error --out "$out/mtdata/train"
    run mkdir -p "$raw"
    run mv -f "$out/mtdata/train/train.$code" "$raw/train.$source_language"
    run mv -f "$out/mtdata/train/train.eng" "$raw/train.en"
    note train "$raw/train.$source_language" "$raw/train.en"
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
    printf '\n# next: clean the training text, keeping the held-out sets out of it\n'
    printf 'python -m data_prep.clean --pair %s --input %q --out %q --exclude %q %q --language-id py3langid\n' \
        "$pair" "$raw/train" "$cleaned" "$raw/valid" "$raw/test"
}

# Read by lib.sh.
# shellcheck disable=SC2034
stages=(environment recipes held_out train) results=()
trap report_failed_stage EXIT
export MTDATA_RECIPES=$recipe_folder
[[ -n $dry_run ]] || mkdir -p "$out"
if [[ -n $dry_run ]]; then printf 'cd %q\nexport MTDATA_RECIPES=%q\n' "$root" "$recipe_folder"; fi
stage environment make_environment "mtdata=$mtdata_version" "venv=$venv"
stage recipes fetch_recipes "recipes=$recipes"
stage held_out get_held_out "valid=$valid" "test=$test"
stage train get_train "pair=$pair"
next_steps
