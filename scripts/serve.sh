#!/usr/bin/env bash
set -euo pipefail
usage() {
    cat <<'TEXT'
Usage: scripts/serve.sh --checkpoint FILE [options]

Starts a page on this machine to try a model: type a sentence, see the translation, the experts every token took, and
what the threshold t and the capacity cost. Opens at http://127.0.0.1:8000; Ctrl-C ends it.

  --checkpoint FILE   e.g. runs/demo/uk-en/xmoe/checkpoints/averaged.pt
  -h, --help          this text, and all options of xmoe serve

With a checkpoint of scripts/run_pair.sh, dictionaries and subwords are found beside it.
Exit: 0 ended by Ctrl-C, 1 the model cannot be loaded, 2 bad arguments.
TEXT
}
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

use_environment
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # the paths in the arguments are those of the caller's folder
case ${1-} in
-h | --help)
    usage
    exec python -m eval.serve --help
    ;;
'') die '--checkpoint is missing; see --help' 2 ;;
esac
exec python -W ignore -m eval.serve "$@"
