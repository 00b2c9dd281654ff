#!/bin/sh
# Make .venv-aot: .venv with TPU's compiler (libtpu) beside it, for scripts/aot_compile.py. It is kept apart because JAX looks
# for TPUs wherever libtpu is installed. For GPU targets: .venv-aot/bin/pip install 'jax[cuda13]' absl-py (4 GB).
set -eu
cd "$(dirname "$0")/.."
scripts/setup.sh

stamp=$(cat requirements-aot.lock .venv/stamp | cksum)
if [ "$(cat .venv-aot/stamp 2>/dev/null || true)" = "$stamp" ]; then exit 0; fi
rm -rf .venv-aot
.venv/bin/python -m venv .venv-aot
site=$(.venv-aot/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
{ .venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; pwd; } >"$site/dsv3_jax.pth"
.venv-aot/bin/pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements-aot.lock
echo "$stamp" >.venv-aot/stamp
