"""The model of all-reduces against simulations of single messages, and what must hold of any such model."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import load_script

model = load_script("studies/simulate_allreduce")

LINK = model.Link(10e-6, 50e9)
CLUSTER = model.cluster_of("h100", 125, 1.0)


def ring_message_by_message(size: float, ranks: int, link) -> float:
    """When the last rank has the whole sum: each passes on a part as soon as it has it and its link is free."""
    ready = [0.0] * ranks
    for _ in range(2 * (ranks - 1)):
        sent = [t + link.alpha + size / ranks / link.beta for t in ready]
        ready = [max(ready[r], sent[r - 1]) for r in range(ranks)]
    return max(ready)


@given(size=st.floats(1e3, 1e10), ranks=st.integers(1, 60))
def test_a_ring_takes_what_its_messages_take(size, ranks):
    assert model.ring(size, ranks, LINK) == pytest.approx(ring_message_by_message(size, ranks, LINK))


def test_a_tree_of_eight_is_three_high():
    """Up and down it, and twice the bytes through each rank's link."""
    assert model.tree(1e6, 8, LINK) == pytest.approx(6 * LINK.alpha + 2e6 / LINK.beta)
    assert model.tree(0, 5, LINK) == pytest.approx(6 * LINK.alpha)  # as high as of eight


def test_few_bytes_go_by_tree_and_many_by_ring_or_tree():
    assert model.tree(1e3, 1, LINK) == model.ring(1e3, 1, LINK) == 0
    assert model.tree(1e3, 125, LINK) < model.ring(1e3, 125, LINK) / 10
    assert model.ring(1e12, 125, LINK) < model.tree(1e12, 125, LINK)


@pytest.mark.parametrize("name", ["one flat ring", "a ring for each adapter", "two levels", "two levels, 2 bits"])
def test_bytes_for_a_time_take_that_time(name):
    f = model.algorithms(2, 256)[name]
    assert f(model.bytes_for(0.05, f, CLUSTER), CLUSTER) == pytest.approx(0.05)
    assert model.bytes_for(1e-9, f, CLUSTER) == 0


def test_wire_bytes_count_scales():
    assert model.wire_share(2, 256) == pytest.approx((64 + 4) / 512)
    assert model.wire_share(2, 256) < 1 / 7
    assert model.wire_share(8, 256) > model.wire_share(4, 256) > model.wire_share(1, 256)


def test_steps_add_up():
    rows = list(model.steps(1e9, model.algorithms(2, 256), CLUSTER))
    assert rows[0]["ms"] - sum(r["saved_ms"] for r in rows) == pytest.approx(rows[-1]["ms"])
    slow = model.cluster_of("h100", 125, 3.0)
    assert model.exchange(1e9, 2, 256, slow) > model.exchange(1e9, 2, 256, CLUSTER)
