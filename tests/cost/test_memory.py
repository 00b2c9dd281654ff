"""Bytes of the state on a device: by hand, and the arithmetic against the state's own arrays."""

import math

import jax
import pytest

from dsv3_jax.config import load_config
from dsv3_jax.cost.memory import bytes_by_part, parameters_per_device, state_bytes_per_device
from dsv3_jax.model.counts import count_parameters
from dsv3_jax.parallel.layout import layout_for
from dsv3_jax.parallel.mesh import AXES
from dsv3_jax.state.train_state import abstract_state
from dsv3_jax.training.resolve import abstract_batch
from dsv3_jax.training.step import make_train_step
from tests.conftest import ROOT

TINY = ROOT / "configs" / "tiny.yaml"


def bytes_on(sizes: dict[str, int], *overrides: str) -> int:
    return state_bytes_per_device(load_config(TINY, list(overrides)), dict.fromkeys(AXES, 1) | sizes)


def test_bytes_of_the_state_by_hand():
    """Weights and two moments in float32; moments in half of that; the moving average; what compression keeps of errors."""
    model = load_config(TINY).model
    counts, biases = (
        count_parameters(model),
        (model.num_moe_layers + 1) * model.n_routed_experts,
    )  # of routers, with the MTP one
    parameters = counts.total + counts.mtp - biases
    beside = 4 * (biases + 3)  # and the step, and the optimizer's two counts of it

    def bytes_a_number(*overrides: str) -> float:
        return (bytes_on({}, *overrides) - beside) / parameters

    assert bytes_a_number() == 12
    assert bytes_a_number("precision.recipe=auto") == 12
    assert bytes_a_number("optim.moment_dtype=bfloat16") == 8
    assert bytes_a_number("precision.recipe=deepseek") == 8
    assert bytes_a_number("precision.recipe=deepseek", "optim.moment_dtype=float32") == 12
    assert bytes_a_number("optim.ema_decay=0.999") == 12 + 4
    assert bytes_a_number("optim.ema_decay=0.999", "optim.moment_dtype=bfloat16") == 8 + 4
    assert (
        parameters_per_device(load_config(TINY), dict.fromkeys(AXES, 1) | {"data": 4, "fsdp": 2}) == (parameters + biases) / 2
    )
    replicas = {"data": 4, "fsdp": 2}  # of nine tenths, a replica's own errors and its share of the mean's
    feedback = bytes_on(replicas, "parallel.compress=2") - bytes_on(replicas)
    assert 0.8 < feedback / (parameters / 2 * (4 + 4 / 4)) < 1


@pytest.mark.parametrize(
    ("mesh", "overrides"),
    [
        ({"data": 2, "fsdp": 2, "expert": 2}, []),
        ({"fsdp": 8}, ["optim.moment_dtype=bfloat16", "optim.ema_decay=0.999"]),
        ({"pipe": 2, "expert": 2, "tensor": 2}, ["precision.recipe=deepseek", "train.grad_accum_steps=2"]),
        ({"data": 2, "fsdp": 4}, ["parallel.compress=2", "optim.ema_decay=0.999"]),
        ({"fsdp": 4}, ["precision.recipe=deepseek", "precision.controller=true"]),
    ],
)
def test_one_count_of_the_state(mesh, overrides):
    """What ranks meshes is what the state's arrays have, to the byte, and what a program takes that is given the state."""
    config = load_config(TINY, [*(f"parallel.{axis}={n}" for axis, n in mesh.items()), *overrides])
    state = abstract_state(config, layout_for(config))
    parts = bytes_by_part(state)
    assert sum(parts.values()) == state_bytes_per_device(config, dict.fromkeys(AXES, 1) | mesh)
    assert (parts["moving average"] > 0) == (config.optim.ema_decay > 0)
    assert (parts["owed to the exchange"] > 0) == bool(config.parallel.compress)
    shardings = jax.tree.map(lambda a: a.sharding, state)
    program = jax.jit(lambda state: state.step + 1, in_shardings=(shardings,), keep_unused=True).lower(state).compile()
    memory = program.memory_analysis()
    assert memory is not None
    assert memory.argument_size_in_bytes == sum(parts.values())


@pytest.mark.slow
def test_a_training_step_takes_the_state_and_the_batch():
    options = ["optim.moment_dtype=bfloat16", "optim.ema_decay=0.99", "model.num_nextn_predict_layers=0"]
    config = load_config(TINY, [*options, "parallel.fsdp=2", "data.seq_len=64"])
    layout = layout_for(config)
    state, batch = abstract_state(config, layout), abstract_batch(config, layout)
    memory = make_train_step(config, layout).lower(state, batch).compile().memory_analysis()
    assert memory is not None
    of_batch = sum(math.prod(a.sharding.shard_shape(a.shape)) * 4 for a in batch)
    assert memory.argument_size_in_bytes == state_bytes_per_device(config, dict.fromkeys(AXES, 1) | {"fsdp": 2}) + of_batch
