"""Programs that are kept: the same numbers without compiling, and never another program's."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import load_config
from dsv3_jax.precision import platforms
from dsv3_jax.state import programs as compiled
from dsv3_jax.state.programs import ProgramStore, compiled_dir
from dsv3_jax.training.loop import train
from pallas_kernels import registry
from tests.conftest import ROOT

TINY = ROOT / "configs" / "tiny.yaml"


@pytest.fixture
def store(tmp_path):
    one = tuple(jax.devices()[:1])
    return lambda *overrides, mesh=None: ProgramStore(tmp_path / "programs", load_config(TINY, overrides), mesh or {}, one)


def files(tmp_path):
    return sorted((tmp_path / "programs").iterdir())


def a_step(x):
    return jnp.sin(x) @ x, x.sum()


def test_what_is_kept_computes_the_same_and_compiles_nothing(store, tmp_path):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 8), np.float32))
    expected = store()("step", jax.jit(a_step), x)(x)
    (file,) = files(tmp_path)
    assert file.stat().st_mode & 0o077 == 0 or (tmp_path / "programs").stat().st_mode & 0o077 == 0

    def never(_):
        raise AssertionError("traced again")

    found = store()("step", jax.jit(never), x)(x)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_damaged_files_are_made_anew(store, tmp_path):
    x = jnp.ones((8, 8))
    store()("step", jax.jit(a_step), x)
    (file,) = files(tmp_path)
    whole = file.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"no pickle"):
        file.write_bytes(damaged)
        found = store()("step", jax.jit(a_step), x)(x)
        jax.tree.map(np.testing.assert_array_equal, found, a_step(x))


def test_everything_that_a_program_follows_from_is_in_its_name(store, tmp_path, monkeypatch):
    x = jnp.ones((4, 4))

    def count(**how):
        store(*how.pop("overrides", ()), mesh=how.pop("mesh", None))(how.pop("name", "step"), jax.jit(a_step), x)
        return len(files(tmp_path))

    assert count() == 1
    assert count(overrides=["name=other", "train.steps=7", "checkpoint.keep=1"]) == 1
    assert count(overrides=["optim.lr=1e-2"]) == 2
    assert count(mesh={"fsdp": 2}) == 3
    assert count(name="init") == 4
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    assert count() == 5
    monkeypatch.setattr(compiled, "_source", lambda: "changed")
    assert count() == 6


@pytest.mark.parametrize("package", ["jax", "jaxlib", "flax", "optax"])
def test_programs_are_of_the_packages_that_traced_them(store, monkeypatch, package):
    before = store()._file("step")
    monkeypatch.setattr(importlib.import_module(package), "__version__", "0.0.1")
    assert store()._file("step") != before


def test_programs_are_of_the_kernels_and_the_platform_that_a_plug_in_brings(store, monkeypatch, tmp_path):
    """Kept for the source of its package, also where that changes between two processes, and for what its platform takes."""
    names = [store()._file("step")]
    monkeypatch.setattr(registry, "_IMPLEMENTATIONS", {k: dict(v) for k, v in registry._IMPLEMENTATIONS.items()})
    monkeypatch.syspath_prepend(tmp_path)
    for times in (2, 3):
        (tmp_path / "ascend").mkdir(exist_ok=True)
        (tmp_path / "ascend" / "__init__.py").touch()
        (tmp_path / "ascend" / "tiles.py").write_text(f"times = {times}")
        (tmp_path / "ascend" / "kernels.py").write_text("def attention(*args):\n    from ascend.tiles import times")
        for operation in registry.CORE:
            registry.register(operation, "ascend", importlib.import_module("ascend.kernels").attention)
        compiled._digest_of.cache_clear()  # once a process
        names.append(store()._file("step"))
    monkeypatch.setattr(platforms, "_registered", [])
    platforms.register(dataclasses.replace(platforms._CPU, core="ascend"))
    names.append(store()._file("step"))
    assert len(set(names)) == 4


def test_where_they_are_kept(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(compiled_dir()) == "/somewhere/dsv3_jax/compiled"
    monkeypatch.setenv("DSV3_COMPILED_DIR", "/shared")
    assert str(compiled_dir()) == "/shared"


@pytest.mark.slow
def test_an_elastic_run_equals_a_plain_one(micro_overrides, tmp_path, monkeypatch):
    """On one mesh, first compiled and then kept; and it finds the mesh for its devices by itself."""
    monkeypatch.setenv("DSV3_COMPILED_DIR", str(tmp_path / "programs"))
    overrides = [*micro_overrides, "data.batch_size=8", "train.steps=2", "train.eval_every=9"]
    plain = train(load_config(TINY, [*overrides, "name=plain", "parallel.fsdp=4", "parallel.expert=2"]), tmp_path)
    for name in ("first", "second"):
        config = load_config(TINY, [*overrides, f"name={name}", "parallel.fsdp=8", "parallel.expert=2"])
        result = train(config, tmp_path, elastic=True)
        assert result.layout.axis_sizes == plain.layout.axis_sizes
        jax.tree.map(np.testing.assert_array_equal, result.state, plain.state)
        assert (tmp_path / name / "config.yaml").read_text().count("fsdp: 8") == 1  # what was asked for
    assert len(files(tmp_path)) == 2  # the fresh state and the step
