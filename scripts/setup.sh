#!/usr/bin/env bash
set -euo pipefail
usage() {
    cat <<'TEXT'
Usage: scripts/setup.sh [--dev]

Makes the project's virtual environment from the pinned requirements.txt and installs this checkout in place, with the
command xmoe. A second call with the same pins takes a moment; after a failure the same command continues.

  --dev         also install what scripts/test.sh needs (requirements-dev.txt)
  -h, --help    this text

Environment:
  XMOE_VENV     where the environment goes (default: .venv at the project's root)
  XMOE_PYTHON   the interpreter to make it with (default: python3, python3.12, python3.11 or python3.10,
                the first that is Python 3.10 to 3.12)
  pip's own variables work too. On Linux, PyPI's torch brings CUDA (some GB). For the CPU build:
  PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu bash scripts/setup.sh

Needs a C++ compiler and Python's headers: fairseq is compiled (about 3 minutes).
Exit: 0 done, 1 a step failed (the last line names it), 2 bad arguments.
TEXT
}
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

dev=''
flags=() switches=(dev)
read_flags "$@"

venv=$(venv_place)
python=$venv/bin/python
requirements=$root/requirements.txt
version_of='import sys; print("%d.%d.%d" % sys.version_info[:3])'
is_supported='import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))'

step() { # step DESCRIPTION COMMAND...
    local description=$1
    shift
    log "$description"
    "$@" || die "set-up step failed: $description (the reason is above; the same command continues)"
}

pip_install() { "$python" -m pip install --disable-pip-version-check --progress-bar off --quiet "$@"; }

find_python() { # prints an interpreter of Python 3.10 to 3.12
    local candidate found=''
    for candidate in ${XMOE_PYTHON:-python3 python3.12 python3.11 python3.10}; do
        # A pyenv shim exists for versions that are not switched on, so each candidate is tried, not looked up.
        found+=" $candidate is $("$candidate" -c "$version_of" 2>/dev/null || echo absent);"
        if "$candidate" -c "$is_supported" 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    die "Python 3.10, 3.11 or 3.12 is needed, but$found install one and name it: XMOE_PYTHON=/path/to/python3.11 bash scripts/setup.sh"
}

make_venv() {
    local interpreter
    if [[ -x $python ]] && "$python" -c "$is_supported" 2>/dev/null && [[ -z ${XMOE_PYTHON:-} ||
        $("$python" -c "$version_of") == "$("$XMOE_PYTHON" -c "$version_of" 2>/dev/null)" ]]; then
        return
    fi
    interpreter=$(find_python)
    step "make $venv with $("$interpreter" -c "$version_of")" new_venv "$interpreter" "$venv" XMOE_VENV
}

stamp_text() { # stamp_text FILE...: what the environment was made from
    "$python" -c "$version_of"
    sha256sum <"${BASH_SOURCE[0]}"
    checksums "$@"
}

is_done() { # is_done STAMP FILE...
    local stamp=$1
    shift
    [[ -f $stamp && $(<"$stamp") == "$(stamp_text "$@")" ]]
}

# The order matters: fairseq's build imports torch, numpy and Cython, and its metadata asks for torchaudio,
# which translation never imports; hence no build isolation and no dependencies.
install_runtime() {
    local part=$venv/.requirements
    grep '# build:' "$requirements" >"$part"
    step 'install what building fairseq needs (torch is the large one)' pip_install -r "$part"
    grep -v '^fairseq-fixed' "$requirements" >"$part"
    step 'install the other requirements' pip_install -r "$part"
    grep '^fairseq-fixed' "$requirements" >"$part"
    step 'compile and install fairseq' pip_install --no-build-isolation --no-deps -r "$part"
    rm -f "$part"
    step 'import torch and fairseq' "$python" -c 'import fairseq, fairseq.data.data_utils_fast, torch'
    step 'check the installed versions' check_versions
}

check_versions() { # torchaudio is left out on purpose
    ! "$python" -m pip check --disable-pip-version-check | grep -v -e torchaudio -e '^No broken' >&2
}

package_stamp() {
    printf '%s\n' "$root"
    stamp_text "$root/pyproject.toml"
}

install_package() { # in place: the command xmoe and the module xmoe_fairseq are those of this checkout
    pip_install --no-build-isolation --no-deps --editable "$root"
}

make_venv
if ! is_done "$venv/.xmoe-runtime" "$requirements"; then
    rm -f "$venv/.xmoe-runtime"
    install_runtime
    stamp_text "$requirements" >"$venv/.xmoe-runtime"
fi
if ! [[ -f $venv/.xmoe-package && $(<"$venv/.xmoe-package") == "$(package_stamp)" ]]; then
    step 'install this checkout in place' install_package
    package_stamp >"$venv/.xmoe-package"
fi
# Optional, a few seconds: decoding on a CPU is faster with it, everything works without it.
"$python" "$root/xmoe_fairseq/moe/native/build.py" >/dev/null || log 'continuing without the library for few rows'
if [[ -n $dev ]] && ! is_done "$venv/.xmoe-dev" "$requirements" "$root/requirements-dev.txt"; then
    step 'install the development requirements' pip_install -r "$root/requirements-dev.txt"
    stamp_text "$requirements" "$root/requirements-dev.txt" >"$venv/.xmoe-dev"
fi
log "ready: $venv ($("$python" -c "$version_of"))"
