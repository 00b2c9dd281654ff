"""Training in every recipe: close to 16 bits, compiled once, on a mesh as on one device, decoded in 16 bits."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.model.layout import Layout
from dsv3_jax.parallel.layout import layout_for
from dsv3_jax.precision.recipes import RECIPES, Recipe
from dsv3_jax.state.train_state import abstract_state, new_state, serving_graph
from dsv3_jax.training.step import gradients, make_train_step
from tests.parallel.cases import MESHES, batch_of, config_of

SMALL = ["train.grad_accum_steps=1", "model.num_hidden_layers=2", "model.num_nextn_predict_layers=0"]
STEPS = 3  # on noise, which nothing can learn: from the fourth step on, two runs differ by what rounding has made of them
LOW = [name for name, recipe in RECIPES.items() if recipe != Recipe(recipe.dtype)]


def losses(recipe: str, steps: int) -> list[float]:
    config = config_of([f"precision.recipe={recipe}", *SMALL])
    state, step, found = new_state(config), make_train_step(config), []
    for i in range(steps):
        state, metrics = step(state, batch_of(config, i))
        found.append(float(metrics.objective.loss))
    assert step._cache_size() == 1
    return found


@pytest.fixture(scope="module")
def bf16():
    return losses("bf16", STEPS)


@pytest.mark.parametrize("recipe", [r if r == "deepseek" else pytest.param(r, marks=pytest.mark.slow) for r in LOW])
def test_a_recipe_trains_like_16_bits(recipe, bf16):
    found = losses(recipe, STEPS)
    np.testing.assert_allclose(found, bf16, rtol=0.01)
    assert found != bf16


def test_a_mesh_computes_what_one_device_does_in_8_bits(monkeypatch):
    """With float32 between the products: bfloat16 alone moves this model's gradients by 5%, and its routing with them.

    The loss has the same tiles; gradients of weights have others along tokens, and 8 bits round each by 2-3%.
    """
    monkeypatch.setitem(RECIPES, "deepseek", replace(RECIPES["deepseek"], dtype="float32"))

    options = ["precision.recipe=deepseek", *SMALL]
    made = new_state(config_of(options))

    def first_step(mesh: list[str]):
        config = config_of([*options, *mesh])
        layout = layout_for(config)
        state = jax.device_put(made, jax.tree.map(lambda a: a.sharding, abstract_state(config, layout)))
        return jax.device_get(jax.jit(lambda s, b: gradients(config, layout, s, b))(state, batch_of(config, 0)))

    (ours, metrics, _), (theirs, expected, _) = first_step(MESHES["fsdp=2 expert=4"]), first_step([])
    assert float(metrics.loss) == pytest.approx(float(expected.loss), rel=1e-4)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.linalg.norm(a - b) <= 0.1 * np.linalg.norm(b)


def test_which_products_are_in_8_bits_by_name():
    found = {name: [bool(getattr(r, products)) for products in ("attention", "ffn", "experts")] for name, r in RECIPES.items()}
    none, all_of_them = [False] * 3, [True] * 3
    assert found == {
        "float32": none, "bf16": none, "deepseek": all_of_them, "article": [False, True, True], "int8": all_of_them,
        "fp8_per_tensor": all_of_them,
    }  # fmt: skip
    assert {r.experts.forward for r in RECIPES.values() if r.experts} == {"e4m3", "int8"}
    assert [name for name, r in RECIPES.items() if r.moments == "bfloat16"] == ["deepseek"]


@pytest.mark.parametrize(
    ("overrides", "dtype"),
    [
        (["precision.recipe=bf16"], "float32"),
        (["precision.recipe=deepseek"], "bfloat16"),
        (["precision.recipe=deepseek", "precision.first_steps=3"], "bfloat16"),  # a schedule changes nothing in the state
        (["precision.recipe=deepseek", "optim.moment_dtype=float32"], "float32"),
    ],
)
def test_a_recipe_says_what_moments_are_stored_in(overrides, dtype):
    state = abstract_state(config_of(overrides))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim} == {dtype}
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state.params)} == {"float32"}


def test_decoding_is_in_16_bits():
    config = config_of(["precision.recipe=deepseek", *SMALL])
    state = new_state(config)
    model = nnx.merge(serving_graph(config, Layout()), state.params, state.router_bias)
    assert model.dtype == np.dtype("bfloat16")
    assert model.moe_blocks.ffn.gemms is None
    assert model.moe_blocks.attention.linear.gemms is None
