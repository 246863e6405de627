#!/usr/bin/env bash
set -euo pipefail
usage() {
    cat <<'TEXT'
Usage: scripts/test.sh [--unit] [PYTEST_ARGUMENT...]

Sets up the environment, then checks format, lint, types and shell scripts, then runs the unit tests and the
end-to-end tests. Stops at the first part that fails. Each part says how long it took.

  --unit                only the fast part: leaves out the tests marked e2e or slow
  PYTEST_ARGUMENT...    passed to pytest, e.g. tests/moe -k router
  -h, --help            this text

XMOE_TEST_PROCESSES sets the number of test processes (default: the number of cores, at most 4).
Exit: 0 all passed, otherwise the exit code of the part that failed.
TEXT
}
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

unit_only=''
flags=() switches=(unit:unit_only) keep_unknown=yes
read_flags "$@"
arguments=(${rest[@]+"${rest[@]}"})

part() { # part NAME COMMAND...
    local name=$1 start=$SECONDS code=0
    shift
    log "$name: start"
    "$@" || code=$?
    if ((code)); then
        log "error: $name failed (exit $code) after $((SECONDS - start)) s"
        exit "$code"
    fi
    log "$name: passed in $((SECONDS - start)) s"
}

shell_lint() {
    find . \( -name '*.sh' -o -name '*.sbatch' \) -not -path './.venv*' -not -path './runs/*' \
        -exec shellcheck -x .ci/run {} +
}

run_pytest() { # run_pytest MARKER_EXPRESSION [PYTEST_FLAG...]
    # One thread a process: the processes share the cores.
    local cores processes code=0
    cores=$(num_cores)
    processes=${XMOE_TEST_PROCESSES:-$((cores < 4 ? cores : 4))}
    OMP_NUM_THREADS=1 python -m pytest -n "$processes" -m "$@" ${arguments[@]+"${arguments[@]}"} || code=$?
    # pytest's 5 is "no tests": a failure, unless the user's own arguments chose among them.
    ((code == 5 && ${#arguments[@]} > 0)) || return "$code"
}

part set-up bash "$root/scripts/setup.sh" --dev
use_environment
cd "$root"
part format ruff format --check --quiet .
part lint ruff check --quiet .
part types mypy
part shell shell_lint
part 'unit tests' run_pytest 'not e2e and not slow'
[[ -n $unit_only ]] || {
    # Last, and bare, so that the output ends with pytest's own summary.
    log 'end-to-end tests: start'
    # Each module in one process, since its tests share trainings; the modules in the order of tests/conftest.py.
    run_pytest 'e2e or slow' --dist loadscope --no-loadscope-reorder
}
