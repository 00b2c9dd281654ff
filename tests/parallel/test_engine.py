"""The engine on a mesh: one device's texts, and steps in which tokens travel and no weight does."""

import re

import jax
import numpy as np
import pytest

from dsv3_jax.errors import UserError
from dsv3_jax.plan.hlo import parse
from dsv3_jax.plan.weights import moved_weights
from dsv3_jax.serve.decoder import abstractly_apart
from dsv3_jax.serve.engine import Engine
from dsv3_jax.serve.request import SamplingParams
from tests.parallel.test_serving import model_on

MESH = "fsdp=2 expert=2 tensor=2"
COLLECTIVE = re.compile(r" (?:all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\(")


def engine(model, **options) -> Engine:
    return Engine(model, **({"slots": 8, "context": 64, "prompt_rows": 8, "drafts": True} | options))


@pytest.mark.parametrize("mesh", [MESH, pytest.param("expert=8", marks=pytest.mark.slow)])
def test_a_mesh_serves_what_one_device_does(mesh):
    """Greedy and sampled, with drafts, prompts of all lengths, and more requests than places."""
    random = np.random.default_rng(0)
    prompts = [random.integers(0, 72, length).tolist() for length in random.integers(1, 30, 20)]
    params = [SamplingParams(max_tokens=8, temperature=i % 2, seed=i, top_k=5 * (i % 3), logprobs=2) for i in range(20)]
    with engine(model_on("")) as alone:
        expected = alone.complete(prompts, params)
    model = model_on(mesh)
    with engine(model) as served:
        found = served.complete(prompts, params)
        assert [c.tokens for c in found] == [c.tokens for c in expected]
        assert served.core.scheduler.all_free
        programs, weights = served.core.device._run, served.core.device._weights
    for a, b in zip(found, expected, strict=True):  # float32, other orders of summation
        np.testing.assert_allclose([p.logprob for p in a.logprobs], [p.logprob for p in b.logprobs], atol=2e-5)
    steps = {key: program.as_text() or "" for key, program in programs.items() if not isinstance(key, str)}
    assert all(COLLECTIVE.search(text) for text in steps.values())
    assert not any(moved_weights(parse(text)) for text in steps.values())
    planned = jax.tree.leaves(abstractly_apart(model)[1])  # for `dsv3 plan --serve`
    assert all(p.sharding.is_equivalent_to(w.sharding, w.ndim) for p, w in zip(planned, weights, strict=True))


def test_what_a_mesh_cannot_share_is_refused():
    model = model_on(MESH)
    with pytest.raises(UserError, match="slots=12 is no multiple of the 8 devices"):
        engine(model, slots=12)
    with pytest.raises(UserError, match="exact=true is for one device, and the model is on 8"):
        engine(model, exact=True)
