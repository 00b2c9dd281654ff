"""Notebooks run from top to bottom, as scripts; jupytext opens them."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_a_notebook_runs(path, tmp_path):
    text = path.read_text()
    assert text.startswith("# ---\n# jupyter:\n#   jupytext:")
    assert text.count("\n# %%") >= 5
    kept = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("JAX_") or name in kept}
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, cwd=tmp_path, check=False,
        env=environ | {"MPLBACKEND": "agg", "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "logits are the same: True" in done.stdout


def test_there_are_some():
    assert NOTEBOOKS
