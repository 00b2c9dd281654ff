"""Targets are profiles like any other, and each says why its parts have their formats."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from dsv3_jax.cli import main
from dsv3_jax.compression.profile import known_profiles, load_profile
from dsv3_jax.compression.targets import known_targets
from dsv3_jax.config import config_to_yaml, load_config
from pallas_kernels.integer_weight import IntegerFormat

CONFIG = "configs/v3_671b.yaml"


@pytest.fixture(autouse=True)
def at_root(pytestconfig, monkeypatch):
    monkeypatch.chdir(pytestconfig.rootpath)


def test_formats_are_those_that_kernels_are_there_for():
    """llama.cpp rearranges Q4_0 on all three CPUs, Q8_0 on ARM only, and nothing with zero points."""
    q4_0, q8_0 = IntegerFormat(4, 32), IntegerFormat(8, 32)
    found = {name: load_profile(name) for name in known_targets()}
    assert {name: (p.linears, p.experts) for name, p in found.items()} == {
        "arm-dotprod": (q4_0, q4_0),
        "arm-i8mm": (q8_0, q4_0),
        "x86-vnni": (q4_0, q4_0),
        "npu-int8": (IntegerFormat(8, 2**20), None),
    }
    assert IntegerFormat(8, 2**20).of(7168) == IntegerFormat(8, 7168)  # one scale an output
    assert load_profile("arm-i8mm", ("linears.bits=4",)).linears == q4_0
    assert load_profile("arm-i8mm").linears == q8_0  # overrides change no registry


@pytest.mark.parametrize("target", known_targets().values(), ids=lambda t: t.name)
def test_every_fact_has_its_reason_and_source(target):
    assert set(target.why) == {"linears", "experts"}
    assert target.sources
    assert all(1 < gb_s < 2000 for gb_s in target.memory.values())
    assert bool(target.leaves) == ("experts" not in target.profile)


def test_the_list_has_every_profile_within_80_columns(capsys):
    main(["compress", "--list"])
    lines = capsys.readouterr().out.splitlines()
    for name in known_profiles():
        assert any(line.split("│")[1:2] == [f" {name.ljust(len(line.split('│')[1]) - 2)} "] for line in lines if "│" in line)
    assert max(len(line) for line in lines if set(line) & set("│┃")) <= 80
    assert any(line.startswith("npu-int8: routed experts stay in 16 bits") for line in lines)


def test_a_plan_says_memory_hours_sizes_and_rates(capsys):
    main(["compress", CONFIG, "calibration.tokens=32768", "--plan", "--profile", "arm-i8mm", "--bandwidth", "100"])
    out = " ".join(capsys.readouterr().out.split())
    assert "calibration: 32,768 tokens, 1,024 an expert" in out
    assert "does not fit: h100 has 79.1 GiB a device" in out
    assert "│ this: arm-i8mm │ 388 │ 3.46 │ 6.8 │ 29.7 │ 2.47 │ 1.27 │ 3.37 │" in out  # 100 / 29.7
    assert "100 GB/s (--bandwidth)" in out
    assert "hours" in out


def test_profiles_that_do_not_fit_are_named_and_the_others_are_shown(tmp_path, capsys):
    tiny = load_config("configs/tiny.yaml")
    (tmp_path / "c.yaml").write_text(config_to_yaml(replace(tiny, model=replace(tiny.model, intermediate_size=200))))
    main(["compress", str(tmp_path / "c.yaml"), "--plan", "--profile", "w4", "linears.group=8"])
    out = capsys.readouterr().out
    assert "mixed: linears.group=128 does not divide the 200 inputs of model.layers.0.mlp.down_proj.weight" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "compress needs RUN and OUT_DIR"),
        ((CONFIG, "--plan", "--topology", "h100"), "topology=h100: use KIND:SHAPE"),
        ((CONFIG, "--plan", "--profile", "w5"), "profile 'w5' is unknown; use one of w4, mixed"),
        ((CONFIG, "--plan", "--bandwidth", "0"), "--bandwidth=0 must be a positive number of GB/s"),
        ((CONFIG, "--plan", "experts.bits=3"), "experts.bits=3; use one of 2, 4, 8"),
        (("nowhere", "--plan"), "nowhere"),
        ((CONFIG, "out"), "v3_671b.yaml"),
    ],
)
def test_bad_arguments_get_one_line(arguments, says, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["compress", *arguments])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert says in error
    assert error.count("\n") == 1


def test_the_arm_script_says_what_is_missing(tmp_path):
    environment = os.environ | {"PATH": str(tmp_path)}
    command = [sys.executable, "scripts/studies/arm_decode.py", str(tmp_path / "model.gguf")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.strip().splitlines() == [
        "arm_decode: needs aarch64-linux-gnu-g++, qemu-aarch64, cmake, ninja (Debian: g++-aarch64-linux-gnu qemu-user cmake "
        "ninja-build)"
    ]
