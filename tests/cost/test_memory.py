"""Bytes of the state on a device: by hand, and the arithmetic against the state's own arrays."""

import pytest

from dsv3_jax.config import load_config
from dsv3_jax.cost.memory import bytes_by_part, parameters_per_device, state_bytes_per_device
from dsv3_jax.model.counts import count_parameters
from dsv3_jax.parallel.layout import layout_for
from dsv3_jax.parallel.mesh import AXES
from dsv3_jax.state.train_state import abstract_state
from tests.conftest import ROOT

TINY = ROOT / "configs" / "tiny.yaml"


def test_bytes_of_the_state_by_hand():
    """Weights and two moments in float32; moments in half of that; the moving average; what compression keeps of errors."""
    sizes = {"data": 4, "pipe": 1, "fsdp": 2, "expert": 1, "tensor": 1}

    def bytes_a_number(*overrides: str) -> float:
        config = load_config(TINY, list(overrides))
        return state_bytes_per_device(config, sizes) / parameters_per_device(config, sizes)

    assert bytes_a_number() == 12
    assert bytes_a_number("optim.moment_dtype=bfloat16") == 8
    assert bytes_a_number("precision.recipe=deepseek") == 8
    assert bytes_a_number("precision.recipe=deepseek", "optim.moment_dtype=float32") == 12
    assert bytes_a_number("optim.ema_decay=0.999") == 12 + 4
    assert bytes_a_number("parallel.compress=2") == 12 + 4 + 4 / 4
    counts = count_parameters(load_config(TINY).model)
    assert parameters_per_device(load_config(TINY), sizes) == (counts.total + counts.mtp) / 2


@pytest.mark.parametrize(
    ("mesh", "overrides", "rel"),
    [
        ({"data": 2, "fsdp": 2, "expert": 2}, [], 0.005),
        ({"fsdp": 8}, ["optim.moment_dtype=bfloat16", "optim.ema_decay=0.999"], 0.005),
        ({"pipe": 2, "expert": 2, "tensor": 2}, ["precision.recipe=deepseek", "train.grad_accum_steps=2"], 0.04),
        ({"data": 2, "fsdp": 4}, ["parallel.compress=2", "optim.ema_decay=0.999"], 0.04),
    ],
)
def test_arithmetic_beside_the_state(mesh, overrides, rel):
    """They differ by arrays that an axis does not divide (norms; the embedding, over `pipe`) and by those never compressed."""
    config = load_config(TINY, [*(f"parallel.{axis}={n}" for axis, n in mesh.items()), *overrides])
    sizes: dict[str, int] = dict.fromkeys(AXES, 1) | mesh
    parts = bytes_by_part(abstract_state(config, layout_for(config)))
    counted = sum(parts.values()) - parts["other state"]
    assert counted == pytest.approx(state_bytes_per_device(config, sizes), rel=rel)
    assert (parts["moving average"] > 0) == (config.optim.ema_decay > 0)
    assert (parts["owed to the exchange"] > 0) == bool(config.parallel.compress)
