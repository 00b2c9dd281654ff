"""Linear layers with 8-bit operands on a mesh equal those of one device where tiles are the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.layout import Layout
from dsv3_jax.parallel.layout import layout_for
from pallas_kernels.scaled import Gemms
from tests.parallel.cases import MESHES, config_of


def results(layout: Layout, x, w, dy, axes):
    @jax.jit
    def run(x, w, dy):
        y, vjp = jax.vjp(lambda x, w: layout.scaled_linear(x, w, Gemms(), axes), x, w)
        return y, *vjp(dy)

    return [np.asarray(a) for a in run(x, w, dy)]


def swiglu(gate_up):
    return jax.nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :]


@pytest.mark.parametrize("mesh", ["fsdp=8", "fsdp=4 tensor=2"])
def test_a_mesh_runs_the_same_swiglu(mesh):
    """Gate and up [B, L, 2, F] with the product after them; and near what 16 bits compute."""
    layout = layout_for(config_of(MESHES[mesh]))
    keys = jax.random.split(jax.random.key(0), 3)
    x, w = jax.random.normal(keys[0], (8, 128, 2, 512)), jax.random.normal(keys[1], (512, 256))
    dy = jax.random.normal(keys[2], (8, 128, 256))
    one_device = results(Layout(), x, w, dy, ("ffn", "embed"))
    for ours, theirs in zip(results(layout, x, w, dy, ("ffn", "embed")), one_device, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=3e-6 * np.abs(theirs).max())
    y, vjp = jax.vjp(lambda x, w: swiglu(x) @ w, x, w)
    for ours, theirs in zip(one_device, (y, *vjp(dy)), strict=True):
        assert np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 0.08  # three operands of 2.6% each


@pytest.mark.parametrize("mesh", ["fsdp=8", "fsdp=2 expert=2 tensor=2"])
@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((256, 2, 512), ("embed", None, "ffn")),
        ((512, 256), ("ffn", "embed")),
        ((256, 4, 128), ("latent", "heads", None)),
        ((256, 80), ("embed", None)),
    ],
)
def test_a_mesh_runs_the_same_products(mesh, shape, axes):
    """Sequences of 128 tokens, and weights of whole tiles on every device; sums over devices come in another order."""
    layout = layout_for(config_of(MESHES[mesh]))
    keys = jax.random.split(jax.random.key(0), 3)
    x, w = jax.random.normal(keys[0], (8, 128, shape[0])), jax.random.normal(keys[1], shape)
    dy = jax.random.normal(keys[2], (8, 128, *shape[1:]))
    for ours, theirs in zip(results(layout, x, w, dy, axes), results(Layout(), x, w, dy, axes), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=3e-6 * np.abs(theirs).max())


def test_weights_gradients_are_handed_out_not_copied():
    """The sum over the batch's devices is a reduce-scatter of the weight's stored axis."""
    layout = layout_for(config_of(MESHES["fsdp=8"]))

    def loss(w, x):
        return jnp.sum(layout.scaled_linear(x, w, Gemms(), ("embed", None)) ** 2)

    x, w = jnp.ones((8, 128, 256)), jnp.ones((256, 80))
    hlo = jax.jit(jax.grad(loss)).lower(w, x).compile().as_text()
    assert "reduce-scatter(" in hlo
    assert "f32[256,80]{1,0} all-reduce(" not in hlo
