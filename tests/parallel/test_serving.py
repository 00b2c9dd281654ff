"""Decoding on a mesh: one device's tokens, caches that are spread out, weights that stay where they are."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dsv3_jax as dsv3
from dsv3_jax.parallel.layout import layout_for
from dsv3_jax.serve import generate as serving
from dsv3_jax.serve.cache import empty_cache
from dsv3_jax.serve.request import SamplingParams
from dsv3_jax.state.train_state import serving_graph
from tests.parallel.cases import MESHES, config_of, initial_state, state_on


def model_on(mesh: str):
    """The same weights on any mesh; no name of one is one device."""
    config = config_of(MESHES.get(mesh, []))
    layout = layout_for(config)
    state = state_on(config, layout) if mesh else initial_state()
    return nnx.merge(serving_graph(config, layout), state.params, state.router_bias)


@pytest.fixture(scope="module")
def alone():
    return model_on("")


@pytest.mark.parametrize("mesh", ["data=2 pipe=2 expert=2", "fsdp=2 expert=2 tensor=2"])  # every axis
def test_a_mesh_generates_what_one_device_does(alone, mesh):
    """Both ways of running experts (few tokens and many), batches that devices divide and that they don't."""
    model = model_on(mesh)
    for batch, length in ((1, 3), (8, 11)):
        prompt = np.random.default_rng(batch).integers(0, 72, (batch, length))
        ours, theirs = (np.asarray(dsv3.generate(m, prompt, 8)) for m in (model, alone))
        np.testing.assert_array_equal(ours, theirs)
    logits = [np.asarray(m(np.arange(15).reshape(3, 5))) for m in (model, alone)]
    np.testing.assert_allclose(*logits, atol=1e-5 * np.abs(logits[1]).max())  # float32, other orders of summation


def test_sampling_on_a_mesh_draws_what_one_device_does(alone):
    draws = [np.asarray(dsv3.generate(m, [[1, 2, 3]], 12, temperature=1.0, seed=5)) for m in (model_on("expert=8"), alone)]
    np.testing.assert_array_equal(*draws)


@pytest.mark.parametrize(
    ("mesh", "batch", "parts"),
    [("expert=8", 8, 8), ("expert=8", 3, 1), ("fsdp=2 expert=4", 4, 4), ("data=2 pipe=2 expert=2", 16, 8), ("tensor=4", 4, 1)],
)
def test_caches_are_spread_by_the_table(mesh, batch, parts):
    model = model_on(mesh)
    for array in empty_cache(model.config, model.layout, batch, 128, jnp.dtype("float32")):
        assert array.sharding.shard_shape(array.shape)[1] == batch // parts


@pytest.mark.parametrize("mesh", ["expert=8", "fsdp=4 tensor=2"])
def test_a_step_moves_tokens_and_no_weights(mesh):
    """In the decoding loop, no collective's result is larger than the widest activation; whatever weights move, move before."""
    model, batch = model_on(mesh), 1
    m = model.config
    graph, state = nnx.split(model)
    cache = empty_cache(m, model.layout, batch, 128, model.dtype)
    token_BS, logits_BV = np.zeros((batch, 128), np.int32), jax.ShapeDtypeStruct((batch, m.vocab_size), jnp.float32)
    rows, ends_E = serving._alike(SamplingParams(seed=0), 3, batch, m), np.full(8, -1, np.int32)
    arguments = cache, token_BS, logits_BV, np.int32(3), np.int32(9), rows, ends_E
    hlo = serving._decode.lower(graph, state, *arguments).compile().as_text()
    widest = max(2 * m.intermediate_size, m.num_attention_heads * (m.qk_nope_head_dim + m.v_head_dim), m.vocab_size)
    found = [
        math.prod(map(int, filter(None, shape.split(","))))
        for line in hlo[: hlo.index("\nENTRY ")].splitlines()
        if (match := re.search(r"= (.*?) (?:all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\(", line))
        for shape in re.findall(r"\[([\d,]*)\]", match[1])
    ]
    assert found
    assert max(found) <= batch * widest
