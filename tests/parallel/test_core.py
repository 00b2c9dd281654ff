"""Attention and head by kernels, which XLA cannot partition, run on each device's part and change no number."""

import functools
from dataclasses import replace

import jax
import pytest

from dsv3_jax.parallel.layout import layout_for
from dsv3_jax.precision.recipes import RECIPES
from dsv3_jax.state.train_state import abstract_state
from dsv3_jax.training.step import gradients
from pallas_kernels import register
from pallas_kernels.causal_attention import splash
from pallas_kernels.linear_cross_entropy import tpu
from tests.parallel.cases import MESHES, WITHOUT_MTP, assert_same_gradients, batch_of, config_of, state_on

register("causal_attention", "interpreted", functools.partial(splash.causal_attention, interpret=True))
register("logit_statistics", "interpreted", functools.partial(tpu.logit_statistics, interpret=True))
KERNEL = replace(RECIPES["float32"], core="interpreted")


@pytest.mark.parametrize(
    ("mesh", "more"),
    [("fsdp=2 expert=2 tensor=2", [WITHOUT_MTP]), pytest.param("data=2 pipe=2 expert=2", [], marks=pytest.mark.slow)],
)
def test_kernels_on_a_mesh_equal_one_device(mesh, more):
    """The whole model's gradients, with replicas and pipeline stages as axes of a vmap around the kernels for TPU,
    interpreted, and a sharded vocabulary. float32; sums over devices, keys and vocabulary come in another order."""

    def found(overrides, recipe):
        config = config_of(["remat.policy=selective", *more, *overrides])
        layout = layout_for(config)
        run = jax.jit(lambda state, batch: gradients(config, layout, state, batch, recipe))
        return jax.device_get(run(state_on(config, layout), batch_of(config, 0)))

    (ours, metrics, _), (theirs, expected, _) = found(MESHES[mesh], KERNEL), found([], RECIPES["float32"])
    assert float(metrics.loss) == pytest.approx(float(expected.loss), rel=2e-6)
    assert_same_gradients(ours, theirs, rtol=1e-4)


def forward_kernels(jaxpr) -> int:
    """How many calls of splash attention's forward kernel a program has; those in a loop's body count once."""
    found = 0
    for equation in jaxpr.eqns:
        found += str(equation.params.get("name", "")).startswith("splash_mha_fwd")
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            found += forward_kernels(getattr(inner, "jaxpr", inner)) if hasattr(inner, "eqns") else 0
    return found


@pytest.mark.parametrize("mesh", [[], MESHES["fsdp=4 tensor=2"]])
def test_selective_keeps_what_the_kernel_made(mesh):
    """Its forward pass is not in the backward pass again, as it is where all is recomputed."""

    def forward_passes(policy: str) -> int:
        config = config_of([f"remat.policy={policy}", *mesh])
        layout = layout_for(config)
        run = functools.partial(gradients, config, layout, recipe=KERNEL)
        return forward_kernels(jax.make_jaxpr(run)(abstract_state(config, layout), batch_of(config, 0)))

    blocks = 3  # dense and MoE layers in a loop each, and an MTP module
    assert (forward_passes("selective"), forward_passes("full")) == (blocks, 2 * blocks)
