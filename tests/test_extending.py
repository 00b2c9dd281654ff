"""docs/extending.md: additions apply to a copy of the tree, touch at most three files, and work, alone and together."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "extending.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
CHANGES = {title: re.findall(r"```diff\n(.*?)```", text, re.DOTALL)[0] for title, text in SECTIONS.items() if "```diff" in text}


@pytest.mark.parametrize("title", CHANGES)
def test_a_change_touches_the_files_it_names_and_no_more_than_three(title):
    files = re.findall(r"^\+\+\+ b/(\S+)", CHANGES[title], re.MULTILINE)
    named = re.search(r"^Touches: (.+)$", SECTIONS[title], re.MULTILINE)
    assert named
    assert re.findall(r"`([^`]+)`", named[1]) == files
    assert len(files) <= 3


def test_all_changes_apply_and_work_together(tmp_path):
    assert {
        "A router",
        "An optimizer",
        "A precision recipe",
        "A chip",
        "A pipeline schedule",
        "A data source",
        "A compression profile",
    } <= CHANGES.keys()
    for folder in ("dsv3_jax", "pallas_kernels", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for title, change in CHANGES.items():
        done = subprocess.run(["git", "apply", "-"], input=change, text=True, cwd=tmp_path, capture_output=True, check=False)
        assert done.returncode == 0, f"{title}: {done.stderr}"
    checks = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
    environ = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", checks], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
