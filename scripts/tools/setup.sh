#!/bin/sh
# Make .venv with everything requirements.lock names, and this project in it. Does nothing if that is already so.
set -eu
cd "$(dirname "$0")/../.."

stamp=$(cat requirements.lock pyproject.toml | cksum)
if [ -x .venv/bin/python ] && [ "$(cat .venv/stamp 2>/dev/null || true)" = "$stamp" ]; then exit 0; fi

new_enough() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; }

find_python() {
    for candidate in ${PYTHON:-} python3.12 python3.13 python3.14 python3 python \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python; do
        if new_enough "$candidate"; then echo "$candidate"; return 0; fi
    done
    if command -v uv >/dev/null 2>&1; then uv python find '>=3.12' 2>/dev/null || { uv python install 3.12 >&2 && uv python find '>=3.12'; }; return; fi
    return 1
}

if ! python=$(find_python); then
    echo "setup: needs Python 3.12 or newer (with venv); found $(python3 --version 2>&1 || echo none)." >&2
    echo "setup: install one, or name it: make setup PYTHON=/path/to/python3.12" >&2
    exit 1
fi
echo "setup: $("$python" --version) -> .venv"
rm -rf .venv
"$python" -m venv .venv
.venv/bin/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
.venv/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
echo "$stamp" >.venv/stamp
