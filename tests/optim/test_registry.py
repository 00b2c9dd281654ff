"""Which optimizer a configuration gets, and that a step asks nothing of it but the contract."""

from dataclasses import replace

import optax
import pytest

from dsv3_jax.config import load_config
from dsv3_jax.cost.memory import state_bytes_per_device
from dsv3_jax.errors import UserError
from dsv3_jax.optim import registry
from dsv3_jax.optim.optimizer import Optimizer
from dsv3_jax.optim.registry import optimizer_of
from tests.conftest import ROOT
from tests.optim.test_adamw import params

TINY = ROOT / "configs" / "tiny.yaml"


def test_an_unknown_optimizer_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"optim.name.*adamw"):
        load_config(TINY, ["optim.name=adam"])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["precision.recipe=deepseek"], "bfloat16"),
        (["precision.recipe=deepseek", "optim.moment_dtype=float32"], "float32"),
        (["precision.recipe=bf16"], "float32"),
    ],
)
def test_moments_are_stored_as_the_recipe_or_the_key_says(monkeypatch, overrides, expected):
    asked = []

    def sgd(config, moment_dtype):
        asked.append((config.lr, moment_dtype))
        return Optimizer(*optax.sgd(config.lr))

    monkeypatch.setitem(registry.OPTIMIZERS, "adamw", sgd)
    optimizer = optimizer_of(load_config(TINY, ["optim.lr=0.5", *overrides]))
    assert asked == [(0.5, expected)]
    assert optimizer.second_moment(optimizer.init(params())) is None


def test_the_second_moment_of_adamw_is_a_tree_like_the_parameters():
    optimizer = optimizer_of(load_config(TINY))
    moment = optimizer.second_moment(optimizer.init(params()))
    assert moment is not None
    assert {name: leaf.get_value().shape for name, leaf in moment.items()} == {"w": (2, 2), "stacked_norms": (2, 3)}


def test_an_optimizer_with_one_moment_is_counted_as_such(monkeypatch):
    config = load_config(TINY)
    sizes = {"data": 1, "pipe": 1, "fsdp": 2, "expert": 1, "tensor": 1}
    two = state_bytes_per_device(config, sizes)
    lion = optax.lion(1e-3)
    monkeypatch.setitem(registry.OPTIMIZERS, "adamw", lambda config, moment_dtype: Optimizer(lion.init, lion.update))
    one = state_bytes_per_device(replace(config, optim=replace(config.optim, lr=1e-3)), sizes)
    assert one == pytest.approx(two * 8 / 12, rel=1e-3)  # besides, the routers' biases
