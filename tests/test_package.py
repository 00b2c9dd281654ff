"""The package as a whole: import cost, layering, sizes that papers state, the command line's manners."""

import ast
import contextlib
import errno
import graphlib
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_jax import cli
from dsv3_jax.config import load_config
from dsv3_jax.errors import os_error_line
from dsv3_jax.model.counts import cache_numbers_per_token, count_parameters, training_flops_per_token
from tests.commands import dsv3, dsv3_process
from tests.conftest import ROOT

# From low to high: a room imports only its own modules, rooms before it and the modules that stand beside the rooms.
ROOMS = [
    "cluster", "data", "precision", "model", "optim", "parallel", "exchange", "state", "checkpoint", "runs", "cost", "serve",
    "training", "interop", "http_api", "compression", "plan", "elastic", "bench",
]  # fmt: skip
# modules of the package that every room may import
BELOW_ROOMS = {"checks", "errors", "config", "config_input", "files", "pages", "progress", "records", "streams", "yaml_reader"}
ABOVE_ROOMS = {"__init__", "__main__", "cli", "describe"}  # and those that no room may import


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(p): p for package in ("dsv3_jax", "pallas_kernels") for p in (ROOT / package).rglob("*.py")}


def imports(path: Path) -> set[str]:
    """The modules of this project that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in MODULES else node.module for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & MODULES.keys()


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def test_kernels_import_nothing_from_dsv3_jax():
    for name, path in MODULES.items():
        if name.startswith("pallas_kernels"):
            assert not {m for m in imports(path) if m.startswith("dsv3_jax")}, path


def test_every_room_has_its_place():
    assert {room_of(m) for m in MODULES if m.startswith("dsv3_jax")} == {*ROOMS} | BELOW_ROOMS | ABOVE_ROOMS


def test_no_import_runs_upwards():
    """Imports inside functions count as well."""
    height = dict.fromkeys(BELOW_ROOMS, -1) | {room: i for i, room in enumerate(ROOMS)} | dict.fromkeys(ABOVE_ROOMS, len(ROOMS))
    upward = [
        f"{name} -> {other}"
        for name, path in MODULES.items()
        for other in imports(path)
        if name.startswith("dsv3_jax") and other.startswith("dsv3_jax") and height[room_of(name)] < height[room_of(other)]
    ]
    assert upward == []


def test_no_modules_import_each_other_in_a_circle():
    sorter = graphlib.TopologicalSorter({name: imports(path) - {name} for name, path in MODULES.items()})
    sorter.prepare()  # raises CycleError, which names the circle


def test_import_is_light_and_touches_no_device():
    code = "import dsv3_jax, sys; assert 'jax' not in sys.modules; from dsv3_jax import Config; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_everything_initialises_no_backend():
    code = (
        "import dsv3_jax; [getattr(dsv3_jax, n) for n in dsv3_jax.__all__]; import dsv3_jax.training.finish; "
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
    for verb in ("train", "resume", "eval", "generate", "import", "export", "serve", "chat", "describe", "launch", "bench"):
        done = dsv3(verb, "--help", cwd=ROOT)
        assert done.returncode == 0
        assert f"Example: dsv3 {verb}" in done.stdout


def test_describe_prints_the_table():
    done = dsv3_process("describe", "configs/v3_671b.yaml", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for figure in ("671B", "36.6B", "11.6B", "70.3kB"):
        assert figure in done.stdout


BY_A_PROCESS = ("train", "configs/tiny.yaml", "model.hiden_size=3")


@pytest.mark.parametrize(
    "args",
    [
        BY_A_PROCESS,
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
        ("launch", "--processes", "1000000000", "train", "configs/tiny.yaml"),
        ("launch", "--processes", "2"),
        ("train", "configs/tiny.yaml", "parallel.tensor=3", "name=never"),
    ],
    ids=" ".join,
)
def test_bad_input_gets_one_line_and_exit_code_2(args):
    done = (dsv3_process if args == BY_A_PROCESS else dsv3)(*args, cwd=ROOT)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith("dsv3: error: ")
    assert not (ROOT / "runs" / "never").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_disk_that_fails_gets_one_line_and_exit_code_2(number, monkeypatch):
    def fail(*_) -> None:
        raise OSError(number, os.strerror(number), "runs/a/metrics.jsonl")

    monkeypatch.setattr(cli, "load_config", fail)
    done = dsv3("describe", "configs/tiny.yaml", cwd=ROOT)
    assert done.returncode == 2
    what = "no space left on the device" if number == errno.ENOSPC else os.strerror(number)
    assert done.stderr == f"dsv3: error: runs/a/metrics.jsonl: {what}; what was saved before is intact\n"


def test_a_failed_system_call_without_a_file_is_one_line_too():
    assert os_error_line(OSError(errno.EIO, "Input/output error")).startswith("reading or writing failed: Input/output error; ")
    assert os_error_line(OSError("no answer")).startswith("reading or writing failed: no answer; ")
    assert os_error_line(OSError(errno.EXDEV, "Invalid cross-device link", "a", None, "b")).startswith("a to b: Invalid")


@pytest.mark.parametrize("named", [(), ("data.cache_dir=~nobody-of-this-name/cache",)])
def test_without_a_home_directory_there_is_one_line(named, monkeypatch, tmp_path):
    def unknown(*_) -> None:
        raise KeyError

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    (tmp_path / "text.txt").write_text("some text")
    done = dsv3("train", str(ROOT / "configs" / "tiny.yaml"), f"data.path={tmp_path}/text.txt", *named, cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert ("there is no such home directory; set HOME" if named else "set XDG_CACHE_HOME to a directory") in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
def test_a_result_that_could_not_be_printed_is_no_success(capsys):
    """But a reader that has read enough is."""
    reading, writing = os.pipe()
    os.close(reading)
    with open("/dev/full", "w") as full, open(writing, "w") as nobody, contextlib.chdir(ROOT):
        with contextlib.redirect_stdout(nobody):
            cli.main(["describe", "configs/tiny.yaml"])
        with contextlib.redirect_stdout(full), pytest.raises(SystemExit) as ended:
            cli.main(["describe", "configs/tiny.yaml"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "dsv3: error: cannot write standard output: No space left on device\n"
