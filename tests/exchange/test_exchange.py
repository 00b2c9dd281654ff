"""Gradients in few bits across `data`, on every kind of mesh: nothing is lost, only delayed."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.checkpoint.manager import CheckpointManager
from dsv3_jax.checkpoint.names import state_to_arrays
from dsv3_jax.config import CheckpointConfig, load_config
from dsv3_jax.errors import UserError
from dsv3_jax.exchange.exchange import Exchange
from dsv3_jax.exchange.residual import Residual
from dsv3_jax.model.parameters import DENSE_FFN, NORM
from dsv3_jax.optim.registry import optimizer_of
from dsv3_jax.parallel.layout import layout_for
from dsv3_jax.precision.switch import Probe
from dsv3_jax.state.train_state import abstract_state, new_state
from dsv3_jax.training.loop import train
from dsv3_jax.training.step import (
    ScheduledSteps,
    gradient_function,
    make_train_step,
    on_replicas,
    sum_of_replicas,
    training_recipe,
)
from tests.conftest import ROOT
from tests.parallel.cases import WITHOUT_MTP, batch_of, config_of, state_on

ACCUMULATED, AT_ONCE = ("precision.recipe=deepseek", "train.grad_accum_steps=2"), ("train.grad_accum_steps=1",)


def on(mesh: str, *more: str, bits: int = 2, mtp: bool = False):
    """(config, layout)."""
    config = config_of(
        [*([] if mtp else [WITHOUT_MTP]), *(f"parallel.{part}" for part in mesh.split()), f"parallel.compress={bits}", *more]
    )
    return config, layout_for(config)


def by_name(params) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf, np.float64) for path, leaf in leaves}


@pytest.mark.parametrize(
    ("mesh", "more", "bits"),
    [
        ("data=8", AT_ONCE, 2),
        pytest.param("data=4 fsdp=2", AT_ONCE, 1, marks=pytest.mark.slow),
        pytest.param("data=2 expert=2 tensor=2", AT_ONCE, 4, marks=pytest.mark.slow),
        pytest.param("data=2 pipe=2 expert=2", ACCUMULATED, 8, marks=pytest.mark.slow),
        # of which most arrays have no axis
        pytest.param("data=7", ("train.grad_accum_steps=2", "data.batch_size=14"), 2, marks=pytest.mark.slow),
    ],
)
def test_what_is_not_sent_is_in_the_residuals(mesh, more, bits):
    """For one batch: the sum that comes out, and the residuals, are the true sum; few bits alone are not.

    To rounding of float32 sums of a few numbers as large as the largest: 2e-6 of it."""
    config, layout = on(mesh, *more, bits=bits, mtp=mesh == "data=4 fsdp=2")
    recipe, exchange, state = training_recipe(config, layout), Exchange(layout, bits), state_on(config, layout)

    @jax.jit
    def both(state, batch):
        of_rows, variables = gradient_function(config, layout, state, batch, recipe)
        parts, _ = on_replicas(of_rows, layout.replicas)(variables, batch)
        grads, _ = nnx.split_state(parts, nnx.Param, Probe)
        second_moment = optimizer_of(config).second_moment(state.opt_state)
        return sum_of_replicas(grads), *exchange.reduce(grads, state.residuals, second_moment)

    true, sent, residuals = both(state, batch_of(config, 0))
    true, sent, replicas = by_name(true), by_name(sent), layout.replicas
    assert residuals.keys() == state.residuals.keys()
    assert true.keys() == sent.keys()
    few = [name for name in true if any(name.startswith(found) for found in residuals)]
    assert len(few) > 12
    for name, wanted in true.items():
        largest = max(np.abs(wanted).max(), 1e-12)
        left = np.zeros(())
        if name in few:
            found = next(residuals[n] for n in residuals if name.startswith(n))
            server = 0 if found.server is None else np.asarray(found.server, np.float64)
            left = replicas * (np.asarray(found.worker, np.float64).mean(0) + server)
            assert not wanted.any() or np.abs(sent[name] - wanted).max() > 1e-3 * largest
        np.testing.assert_allclose((sent[name] + left) / largest, wanted / largest, atol=2e-6, err_msg=name)
    uncompressed = {name for name in true if name not in few}
    assert all("embed_VD" not in name and "router" not in name for name in few), few
    assert sum(true[name].size for name in uncompressed) < 0.4 * sum(a.size for a in true.values())


@pytest.mark.slow
def test_states_of_all_replicas_stay_equal_and_learn():
    """Against uncompressed gradients, over the same batches: the loss falls nearly as far."""
    losses = {}
    for bits in (0, 2):
        config, layout = on("data=4 fsdp=2", "optim.lr=3e-3", bits=bits)
        state, step = new_state(config, layout), make_train_step(config, layout)
        for i in range(30):
            state, metrics = step(state, batch_of(config, i % 2))
            losses.setdefault(bits, []).append(float(metrics.objective.loss))
        assert step._cache_size() == 1
        for leaf in jax.tree.leaves(state.params):
            shards: dict = {}
            for shard in leaf.addressable_shards:
                shards.setdefault(str(shard.index), []).append(np.asarray(shard.data))
            assert all((a == group[0]).all() for group in shards.values() for a in group)
    fell = {bits: each[0] - each[-1] for bits, each in losses.items()}
    assert fell[0] > 1
    assert fell[2] > 0.8 * fell[0]


def with_random_residuals(state):
    random = np.random.default_rng(0)
    return replace(
        state,
        residuals=jax.tree.map(
            lambda a: jax.device_put(random.standard_normal(a.shape, np.float32), a.sharding), state.residuals
        ),
    )


def left_by_all(state) -> dict[str, np.ndarray]:
    """The sum of all replicas' residuals, by parameter."""
    servers = {name: 0 if e.server is None else np.asarray(e.server) for name, e in state.residuals.items()}
    return {name: np.asarray(e.worker).sum(0) + len(e.worker) * servers[name] for name, e in state.residuals.items()}


@pytest.mark.parametrize(
    ("mesh", "local"),
    [("data=4 fsdp=2", False), ("data=4 fsdp=2", True), pytest.param("data=7", False, marks=pytest.mark.slow)],
)
def test_residuals_survive_a_change_of_replicas(tmp_path, mesh, local):
    """Bit for bit on as many; to float32's rounding as a sum on others; nothing else is lost on any mesh.

    7 divides no axis of most arrays: then their workers take over the residuals of servers."""
    checkpoints = CheckpointConfig(local_dir=str(tmp_path / "local") if local else None)
    batch = "data.batch_size=112"
    config, layout = on(mesh, batch, mtp=True)
    saved = with_random_residuals(state_on(config, layout))
    manager = CheckpointManager(tmp_path / "run", checkpoints)
    manager.save(saved, {"config": {}})
    manager.wait()
    uncompressed = [("fsdp=8", 2), ("data=4", 0)]
    compared = []
    others = [("data=7", 2)] if local else [(m, 2) for m in ("data=4 tensor=2", "data=2 fsdp=4", "data=7")] + uncompressed
    for to, bits in [("data=4 fsdp=2", 2), *others]:
        template = abstract_state(*on(to, batch, bits=bits, mtp=True))
        restored, _ = CheckpointManager(tmp_path / "run", checkpoints).restore(template)
        assert [a.sharding for a in jax.tree.leaves(restored)] == [a.sharding for a in jax.tree.leaves(template)]
        for a, b in zip(jax.tree.leaves(restored.params), jax.tree.leaves(saved.params), strict=True):
            np.testing.assert_array_equal(a, b)
        before, after = left_by_all(saved), left_by_all(restored)
        assert bool(after) == ((to, bits) not in uncompressed)
        for name in after:
            np.testing.assert_allclose(after[name], before.get(name, 0), atol=1e-5)
            as_many = mesh.split()[0] == to.split()[0]
            if as_many and jax.tree.structure(restored.residuals[name]) == jax.tree.structure(saved.residuals.get(name)):
                compared += jax.tree.leaves(jax.tree.map(np.array_equal, restored.residuals[name], saved.residuals[name]))
    assert len(compared) > 20
    assert all(compared)


def test_a_checkpoint_of_uncompressed_gradients_has_no_residuals(tmp_path):
    config, layout = on("data=4 fsdp=2", bits=0)
    manager = CheckpointManager(tmp_path / "run", CheckpointConfig())
    manager.save(state_on(config, layout), {"config": {}})
    manager.wait()
    config, layout = on("data=2")
    restored, _ = CheckpointManager(tmp_path / "run", CheckpointConfig()).restore(abstract_state(config, layout))
    assert restored.residuals
    assert not any(a.any() for a in jax.tree.leaves(restored.residuals))


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit_and_on_fewer_replicas(micro_overrides, tmp_path):
    """Two steps as they are, then few bits; cut off in the midst of these."""

    options = ["parallel.compress=2", "parallel.compress_after=2", "data.batch_size=8", "parallel.fsdp=2", "train.eval_every=9"]

    def run(name: str, *more: str) -> list[float]:
        config = load_config(ROOT / "configs" / "tiny.yaml", [*micro_overrides, *options, f"name={name}", *more])
        train(config, tmp_path)
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [row["loss"] for row in rows]

    whole = run("whole", "parallel.data=4")
    run("parts", "parallel.data=4", "train.steps=4")
    shutil.copytree(tmp_path / "parts", tmp_path / "fewer")
    config_file = tmp_path / "fewer" / "config.yaml"
    config_file.write_text(config_file.read_text().replace("name: parts", "name: fewer"))
    assert run("parts", "parallel.data=4") == whole
    fewer = run("fewer", "parallel.data=2")
    assert fewer[:4] == whole[:4]
    np.testing.assert_allclose(fewer[4:], whole[4:], rtol=2e-2)  # other roundings, of the same sums
    with pytest.raises(UserError, match=r"compress was 2, now 4"):
        run("fewer", "parallel.data=2", "parallel.compress=4", "train.steps=7")


@pytest.mark.parametrize("units", [False, True])
def test_a_reduction_by_itself(units):
    """One matrix and one vector over four replicas: in units of a second moment, and in units of 1 where there is none."""

    def state_of(shape: tuple[int, ...], seed: int) -> nnx.State:
        matrix, vector = (np.random.default_rng(seed).standard_normal((*shape, *s), np.float32) for s in ((16, 24), (16,)))
        return nnx.State({
            "w": nnx.Param(jnp.asarray(matrix), logical_axes=("embed", "ffn"), kind=DENSE_FFN),
            "norm": nnx.Param(jnp.asarray(vector), logical_axes=("norm",), kind=NORM),
        })  # fmt: skip

    _, layout = on("data=4 fsdp=2")
    exchange, parts, moment = Exchange(layout, 2), state_of((4,), 0), jax.tree.map(jnp.square, state_of((), 1))
    residuals = exchange.init(state_of((), 0))
    assert jax.tree.map(jnp.shape, residuals) == {"w": Residual((4, 16, 24), (16, 24))}
    sums, left = jax.jit(exchange.reduce)(parts, residuals, moment if units else None)
    true = {name: np.asarray(leaf.get_value()).sum(0) for name, leaf in parts.items()}
    np.testing.assert_allclose(sums["norm"].get_value(), true["norm"], atol=1e-5)
    assert not np.allclose(sums["w"].get_value(), true["w"], atol=1e-2)
    rest = np.asarray(left["w"].worker).sum(0) + 4 * np.asarray(left["w"].server)
    np.testing.assert_allclose(sums["w"].get_value() + rest, true["w"], atol=1e-4)


def test_residuals_keep_the_names_that_checkpoints_have_for_them():
    """Those of the first checkpoints, which other versions read."""
    config, layout = on("data=4 fsdp=2")
    arrays = state_to_arrays(abstract_state(config, layout))["optimizer"]
    names = {name for name in arrays if name.startswith("errors/")}
    assert {"errors/head_DV/worker", "errors/head_DV/server"} <= names
    assert len(names) == len(jax.tree.leaves(abstract_state(config, layout).residuals))


def test_each_kind_of_step_is_known_before_it_comes():
    """Which is what an elastic start compiles ahead for."""
    schedule = ["parallel.compress_after=5", "precision.recipe=deepseek", "precision.first_steps=3"]
    assert ScheduledSteps(*on("data=8", *schedule)).first_of_kinds() == [0, 3, 5]
    assert ScheduledSteps(*on("data=8", *schedule[1:], "parallel.compress_after=0")).first_of_kinds() == [0, 3]
    assert ScheduledSteps(*on("fsdp=8", *schedule)).first_of_kinds() == [0, 3]
    assert ScheduledSteps(*on("data=8", "parallel.compress_after=5")).first_of_kinds() == [0, 5]


def test_without_replicas_there_is_nothing_to_exchange():
    config, layout = on("fsdp=8")
    assert not abstract_state(config, layout).residuals
    config, layout = on("data=8", bits=0)
    assert not abstract_state(config, layout).residuals


def test_bits_that_there_are_not():
    with pytest.raises(UserError, match=r"parallel.compress=3"):
        on("data=8", bits=3)
