"""The package as a whole: import cost, layering, sizes that papers state, the command line's manners."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_jax.config import load_config
from dsv3_jax.model.counts import cache_numbers_per_token, count_parameters, training_flops_per_token
from tests.conftest import ROOT

# Each room may import the ones before it, its own modules and the shared ones.
ROOMS = ["data", "precision", "model", "parallel", "optim", "train", "checkpoint", "interop", "serve"]
ALLOWED = {
    "data": set(),
    "precision": set(),
    "model": {"precision"},
    "parallel": {"model", "precision", "optim"},
    "optim": {"model"},
    "train": {"data", "precision", "model", "parallel", "optim", "checkpoint", "serve"},
    "checkpoint": {"train", "precision", "model", "parallel", "data", "optim"},
    "interop": {"data", "model", "precision", "parallel", "checkpoint"},
    "serve": {"model"},
}


def dsv3(*args: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [str(Path(sys.executable).with_name("dsv3")), *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_kernels_import_nothing_from_dsv3_jax():
    for path in (ROOT / "pallas_kernels").rglob("*.py"):
        assert not {m for m in imports(path) if m.startswith("dsv3_jax")}, path


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_they_may(room):
    for path in (ROOT / "dsv3_jax" / room).rglob("*.py"):
        rooms = {m.split(".")[1] for m in imports(path) if m.startswith("dsv3_jax.")}
        assert rooms & set(ROOMS) <= ALLOWED[room] | {room}, path


def test_import_is_light_and_touches_no_device():
    code = "import dsv3_jax, sys; assert 'jax' not in sys.modules; from dsv3_jax import Config; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_everything_initialises_no_backend():
    code = (
        "import dsv3_jax; [getattr(dsv3_jax, n) for n in dsv3_jax.__all__]; import dsv3_jax.train.report; "
        "from jax._src import xla_bridge; assert not xla_bridge._backends"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_released_model_agrees_with_published_figures():
    """arXiv 2412.19437 and the release's README_WEIGHTS: 671B, 37B, MTP 11.5B without what it shares, 70 KB a token."""
    config = load_config(ROOT / "configs" / "v3_671b.yaml").model
    counts = count_parameters(config)
    assert round(counts.total / 1e9) == 671
    assert round(counts.activated / 1e9) == 37
    assert counts.mtp / 1e9 == pytest.approx(11.5, rel=0.01)
    assert round(cache_numbers_per_token(config) * 2 / 1e3) == 70


def test_counts_equal_a_hand_count():
    c = load_config(ROOT / "configs" / "small.yaml").model
    attention = 384 * 192 + 192 * 6 * 96 + 384 * 160 + 128 * 6 * 128 + 6 * 64 * 384
    expert = 3 * 384 * 256
    counts = count_parameters(c)
    assert counts.main["attention"] == 6 * attention
    assert counts.main["routed experts"] == 5 * 16 * expert
    assert counts.main["router"] == 5 * (384 + 1) * 16
    assert counts.main["norms"] == 6 * (2 * 384 + 192 + 128) + 384
    used = 6 * attention + 3 * 384 * 1024 + 5 * (5 * expert + 385 * 16) + counts.main["norms"] + 384 * 8192
    assert counts.activated == used
    assert training_flops_per_token(c, 512) == 6 * (used + 6 * 6 * (96 + 64) * 513 / 2)


def test_help_has_examples():
    for verb in ("train", "resume", "eval", "generate", "import", "export", "describe", "launch"):
        done = dsv3(verb, "--help", cwd=ROOT)
        assert done.returncode == 0
        assert f"Example: dsv3 {verb}" in done.stdout


def test_describe_prints_the_table():
    done = dsv3("describe", "configs/v3_671b.yaml", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for figure in ("671B", "36.6B", "11.6B", "70.3kB"):
        assert figure in done.stdout


@pytest.mark.parametrize(
    "args",
    [
        ("train", "configs/tiny.yaml", "model.hiden_size=3"),
        ("train", "no_such.yaml"),
        ("train", "configs/tiny.yaml", "data.path=no_such_*.txt", "name=never"),
        ("resume", "no_such_run"),
        ("eval", "no_such_run"),
        ("eval", "configs"),
        ("generate", "no_such_run", "--prompt", "x"),
        ("describe", "configs/tiny.yaml", "nonsense"),
        ("import", "no_such_dir", "never"),
        ("import", "configs"),
        ("import", "--plan", "configs"),
        ("export", "no_such_run", "never"),
        ("launch", "--processes", "0", "train", "configs/tiny.yaml"),
        ("launch", "--processes", "2"),
        ("train", "configs/tiny.yaml", "parallel.tensor=3", "name=never"),
    ],
    ids=" ".join,
)
def test_bad_input_gets_one_line_and_exit_code_2(args):
    done = dsv3(*args, cwd=ROOT)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith("dsv3: error: ")
    assert not (ROOT / "runs" / "never").exists()
