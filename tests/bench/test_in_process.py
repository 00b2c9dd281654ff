"""A load on an engine in this process beside static batches."""

import numpy as np
import pytest

from dsv3_jax.bench.in_process import serve_in_batches, serve_load
from dsv3_jax.bench.workload import Request
from dsv3_jax.serve.engine import Engine
from tests.serve import cases

REQUESTS = [Request(0.02 * i, tuple(prompt), 2 + i % 3) for i, prompt in enumerate(cases.prompts(7, longest=20))]


def test_a_load_is_served_as_it_arrives():
    with Engine(cases.model(), slots=2, context=64, cache_tokens=256, drafts=False, exact=True) as engine:
        served = serve_load(engine, [*REQUESTS, Request(0.15, tuple(range(60)), 50)], "a")
        again = serve_load(engine, REQUESTS[:1], "b")
    *served_well, too_long = served.outcomes
    assert "64 is the longest here" in too_long.error
    for request, outcome in zip(REQUESTS, served_well, strict=True):
        assert (outcome.error, outcome.tokens, outcome.prompt_tokens) == ("", request.max_tokens, len(request.prompt))
        assert outcome.first_token_s > 0  # not before it arrived
        assert outcome.deliveries[-1][0] <= served.wall_s
    assert served.counts["output_tokens"] == sum(request.max_tokens for request in REQUESTS)
    assert served.wall_s > 0.14
    assert again.counts["output_tokens"] == REQUESTS[0].max_tokens  # of this load alone


def test_static_batches_by_hand(monkeypatch):
    """Prompts of 3, 1 and 2 tokens, outputs of 2, 5 and 4, in batches of 2: rectangles of 2 x (3 + 5) and 1 x (2 + 4)."""
    asked = []
    monkeypatch.setattr("dsv3_jax.bench.in_process.generate", lambda _, *rectangle: asked.append(rectangle) or np.zeros(1))
    requests = [Request(0.0, (1, 2, 3), 2), Request(0.0, (4,), 5), Request(0.0, (5, 6), 4)]
    found = serve_in_batches(cases.model(), requests, 2)
    assert [(prompts.tolist(), most) for prompts, most in asked] == [([[1, 2, 3], [0, 0, 4]], 5), ([[5, 6]], 4)] * 2
    assert found.tokens == 11
    assert found.decode_fill == pytest.approx(11 / (2 * 5 + 4))
    assert found.row_utilisation == pytest.approx((11 + 6) / (2 * 8 + 6))
