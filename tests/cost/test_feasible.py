"""Which numbers of devices are feasible, and which mesh is taken: against trying every mesh."""

import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.checks import divisors
from dsv3_jax.config import load_config
from dsv3_jax.cost import feasible
from dsv3_jax.cost.feasible import feasible_worker_counts, fit_to_devices, largest_feasible_count, mesh_for_devices
from dsv3_jax.errors import UserError
from dsv3_jax.parallel.mesh import AXES, meshes
from dsv3_jax.parallel.rules import check
from tests.commands import dsv3
from tests.conftest import ROOT

TINY, HUGE = ROOT / "configs" / "tiny.yaml", ROOT / "configs" / "v3_671b.yaml"
sizes = st.sampled_from([1, 2, 3, 4, 6, 8])


def feasible_meshes(config, devices):
    for shape in meshes(devices):
        try:
            check(config, shape)
        except UserError:
            continue
        yield shape


@settings(deadline=None, max_examples=40)
@given(devices=st.integers(1, 24), rows=st.sampled_from([8, 12, 24, 30]), fsdp=sizes, expert=sizes, tensor=sizes)
def test_a_mesh_is_found_where_there_is_one(devices, rows, fsdp, expert, tensor):
    config = load_config(
        TINY, [f"data.batch_size={rows}", f"parallel.fsdp={fsdp}", f"parallel.expert={expert}", f"parallel.tensor={tensor}"]
    )
    found, possible = mesh_for_devices(config, devices), list(feasible_meshes(config, devices))
    assert (found is None) == (not possible)
    if found is None:
        return
    assert math.prod(found.values()) == devices
    assert found in possible
    asked = {axis: getattr(config.parallel, axis) for axis in AXES}
    if asked in possible:
        assert found == asked
    # the axis inside a layer changes only where it has to
    if any(shape["tensor"] == tensor for shape in possible):
        assert found["tensor"] == tensor


def test_the_released_model_keeps_its_experts_together():
    config = load_config(HUGE, ["data.batch_size=15360", "train.grad_accum_steps=1"])
    feasible = feasible_worker_counts(config, 8, range(60, 129))
    assert list(feasible) == [60, 64, 80, 96, 120, 128]
    assert feasible[128] == {"data": 1, "pipe": 1, "fsdp": 16, "expert": 64, "tensor": 1}
    assert feasible[96] == {"data": 3, "pipe": 1, "fsdp": 4, "expert": 64, "tensor": 1}
    assert largest_feasible_count(config, 8, 127) == 120
    # but on 120 hosts each device would have a 64th of the state, which no memory holds
    config = load_config(HUGE, ["data.batch_size=15360", "train.grad_accum_steps=1", "parallel.max_state_gib=40"])
    assert largest_feasible_count(config, 8, 127) == 96
    assert largest_feasible_count(config, 7, 2) == 0


def test_feasible_numbers_are_those_of_trying_every_mesh(monkeypatch):
    """And few meshes are tried: none of most numbers, and none beyond what rows and heads can be divided over."""
    config, tried = load_config(TINY, ["data.batch_size=24", "parallel.fsdp=2", "parallel.tensor=2"]), []
    by_all = {n: list(feasible_meshes(config, n)) for n in range(1, 33)}
    monkeypatch.setattr(feasible, "check", lambda *args: tried.append(args) or check(*args))
    found = feasible_worker_counts(config, 1, range(1, 33))
    assert list(found) == [n for n, shapes in by_all.items() if shapes]
    for n, sizes in found.items():
        assert sizes in by_all[n]
    tried.clear()
    huge = load_config(HUGE, ["data.batch_size=15360", "train.grad_accum_steps=1"])
    assert 128 in feasible_worker_counts(huge, 8, range(1, 2**12 + 1))
    assert len(tried) < 20_000  # of many millions of meshes over so many devices


def test_more_meshes_than_can_be_tried_are_refused():
    """A model and a batch that everything divides."""
    many = 735134400
    config = load_config(TINY, [f"model.hidden_size={many}", f"model.num_attention_heads={many}", f"data.batch_size={many}"])
    with pytest.raises(UserError, match="1 to 1024 workers of 720 devices have more than 100,000 meshes"):
        feasible_worker_counts(config, 720, range(1, 1025))


@pytest.mark.parametrize(("workers", "devices"), [("1:1000000000", "8"), ("1:4", "1000000000000000000"), ("1:4", "0")])
def test_hostile_numbers_of_workers_are_one_line(workers, devices):
    done = dsv3("plan", str(TINY), "--workers", workers, "--devices", devices, cwd=ROOT)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "at most 65,536" in done.stderr or "1 to 1,024" in done.stderr


def test_parts_of_an_exchange_divide_a_device_s_tokens():
    """4 rows of 256 tokens over 2 x 2 devices of the batch and 2 of the sequence: 128 tokens, which 3 parts don't divide."""
    axes = {"data": 1, "pipe": 1, "fsdp": 2, "expert": 2, "tensor": 2}
    config = load_config(TINY, ["data.batch_size=4", "train.grad_accum_steps=1", "data.seq_len=256", "parallel.expert_parts=3"])
    with pytest.raises(UserError, match=r"parallel.expert_parts=3 does not divide the 128 tokens .* use one of \[1, 2, 4, 8"):
        check(config, axes)
    check(config, axes | {"fsdp": 4, "expert": 1})  # nothing travels
    check(
        load_config(TINY, ["data.batch_size=4", "train.grad_accum_steps=1", "data.seq_len=256", "parallel.expert_parts=4"]),
        axes,
    )


def test_what_cannot_be_is_said_with_what_can():
    config = load_config(TINY, ["data.batch_size=8", "parallel.fsdp=8"])
    assert fit_to_devices(config, 4).parallel.fsdp == 4
    with pytest.raises(UserError, match=r"no mesh over 7 devices divides data.batch_size=8 .*: 2, 4, 8"):
        fit_to_devices(config, 7)


@given(st.integers(1, 5000))
def test_divisors(n):
    assert divisors(n) == [d for d in range(1, n + 1) if n % d == 0]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["data.batch_size=2147483647", "--workers", "2:4"], "no mesh over so many workers of 8 devices"),
        (["--workers", "2:400000000000"], "at most 65,536"),
        (["--workers", "2:4", "--devices", "0"], "--devices 0"),
    ],
)
def test_bad_numbers_of_workers_are_refused_before_jax_is_loaded(options, text):
    program = (
        "import sys; from dsv3_jax.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print('jax' in sys.modules)"
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", program, "plan", str(TINY), *options], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert (done.returncode, done.stdout.strip()) == (2, "False"), done.stderr
    assert text in done.stderr
