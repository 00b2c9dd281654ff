#!/bin/sh
# Make .venv-aot: .venv with the compilers of TPU and NVIDIA GPUs beside it, for `dsv3 plan` and scripts/tools/compile_kernels.py.
# Of CUDA, only what compiling needs: no cuDNN, cuBLAS, NCCL (4 GB). It is kept apart because JAX looks
# for accelerators wherever these are installed.
set -eu
cd "$(dirname "$0")/../.."
scripts/tools/setup.sh

stamp=$(cat requirements-aot.lock .venv/stamp | cksum)
if [ "$(cat .venv-aot/stamp 2>/dev/null || true)" = "$stamp" ]; then exit 0; fi
rm -rf .venv-aot
.venv/bin/python -m venv .venv-aot
site=$(.venv-aot/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
{ .venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; pwd; } >"$site/dsv3_jax.pth"
.venv-aot/bin/pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements-aot.lock
echo "$stamp" >.venv-aot/stamp
