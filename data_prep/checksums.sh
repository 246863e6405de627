#!/usr/bin/env bash
set -euo pipefail
usage() {
    cat <<'TEXT'
Usage: data_prep/checksums.sh --out MANIFEST FILE...
       data_prep/checksums.sh --check MANIFEST

Notes lines, bytes and sha256 of each FILE in MANIFEST (tab-separated, one file a line) and prints them, so that a
stage of data preparation leaves evidence of what it made; --check compares the files with an older note.
Exit: 0 done or all equal, 1 a file is missing, empty or differs, 2 bad arguments.
TEXT
}
die() {
    printf 'checksums: error: %s\n' "$1" >&2
    exit "${2:-1}"
}
describe() { # describe FILE: one line of a manifest
    [[ -f $1 ]] || die "$1: no such file; the stage that makes it has not run"
    [[ -s $1 ]] || die "$1: empty file; look at the output of the stage that made it"
    local lines bytes sum
    lines=$(wc -l <"$1") bytes=$(wc -c <"$1") sum=$(sha256sum <"$1")
    printf '%d\t%d\t%s\t%s\n' "$lines" "$bytes" "${sum%% *}" "$1"
}
check() { # check MANIFEST
    local lines bytes sum file differs=''
    [[ -s $1 ]] || die "$1: no such manifest, or an empty one"
    while IFS=$'\t' read -r lines bytes sum file; do
        [[ $(describe "$file") == "$lines"$'\t'"$bytes"$'\t'"$sum"$'\t'"$file" ]] && continue
        printf 'checksums: error: %s: is not the file noted in the manifest; run its stage again\n' "$file" >&2
        differs=yes
    done <"$1"
    [[ -z $differs ]] || exit 1
    printf '%s: all files as noted\n' "$1"
}
case ${1:-} in
    -h | --help) usage ;;
    --check)
        (($# == 2)) || die "--check wants one MANIFEST; see --help" 2
        check "$2"
        ;;
    --out)
        (($# > 2)) || die "--out wants MANIFEST and at least one FILE; see --help" 2
        manifest=$2
        shift 2
        trap 'rm -f "$manifest.partial"' EXIT
        : >"$manifest.partial"
        for file; do describe "$file" >>"$manifest.partial"; done
        mv -f "$manifest.partial" "$manifest"
        cat "$manifest"
        ;;
    *) die "wants --out or --check, got '${1:-}'; see --help" 2 ;;
esac
