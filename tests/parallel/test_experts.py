"""The exchange with experts, by itself: any routing, any hop, equals the plain definition; nothing is dropped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.config import ParallelConfig
from dsv3_jax.model.layout import Layout
from dsv3_jax.parallel.experts import hops
from dsv3_jax.parallel.layout import make_layout
from dsv3_jax.parallel.mesh import make_mesh

B, L, D, M, E, K = 8, 6, 10, 3, 16, 4
TRANSPORTS = {
    "flat": ParallelConfig(expert=8),
    "two nodes of four": ParallelConfig(expert=8, expert_transport="two_level", expert_ranks_per_node=4),
    "four nodes of two": ParallelConfig(expert=8, expert_transport="two_level", expert_ranks_per_node=2),
    "beside fsdp": ParallelConfig(fsdp=2, expert=4),
    "in three parts": ParallelConfig(expert=8, expert_parts=3),
    "two nodes of four, in two parts": ParallelConfig(
        expert=8, expert_transport="two_level", expert_ranks_per_node=4, expert_parts=2
    ),
}


def arrays(seed: int):
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = ((B, L, D), (E, D, 2, M), (E, M, D), (B, L, D))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


@functools.cache
def run(transport: str | None):
    """Jitted (x, w, w, expert, weight, dy) -> outputs, gradients, copies sent."""
    layout = Layout() if transport is None else make_layout(TRANSPORTS[transport], make_mesh(TRANSPORTS[transport]))

    def f(x, w_gate_up, w_down, expert, weight, dy):
        def y(x, w_gate_up, w_down, weight):
            return layout.experts(x, w_gate_up, w_down, expert, weight, None)

        out, vjp, traffic = jax.vjp(y, x, w_gate_up, w_down, weight, has_aux=True)
        return out, vjp(dy), traffic

    return jax.jit(f)


def routing(hot: int, seed: int) -> np.ndarray:
    """i32[B, L, K] distinct experts a token; the first `hot` tokens all choose the same ones."""
    random = np.random.default_rng(seed)
    expert = np.stack([random.permutation(E)[:K] for _ in range(B * L)])
    expert[:hot] = random.permutation(E)[:K]
    return expert.reshape(B, L, K).astype(np.int32)


@pytest.mark.parametrize("transport", TRANSPORTS)
@settings(max_examples=12, deadline=None)
@given(hot=st.sampled_from([0, 0, 20, B * L]), seed=st.integers(0, 10**6))
def test_equals_one_device(transport, hot, seed):
    x, w_gate_up, w_down, dy = arrays(seed % 7)
    expert = routing(hot, seed)
    weight = np.random.default_rng(seed).random((B, L, K), np.float32)
    ours, theirs = (run(t)(x, w_gate_up, w_down, expert, weight, dy) for t in (transport, None))
    for a, b in zip(jax.tree.leaves(ours[:2]), jax.tree.leaves(theirs[:2]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))  # float32 sums in another order


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_counts_of_copies(transport):
    """Against a count by hand: choices on other ranks; on other nodes, once a node where the transport sends once."""
    expert = routing(0, 5)
    x, w_gate_up, w_down, dy = arrays(0)
    traffic = run(transport)(x, w_gate_up, w_down, expert, np.ones((B, L, K), np.float32), dy)[2]
    config = TRANSPORTS[transport]
    ranks = config.expert
    per_node = config.expert_ranks_per_node or ranks
    to_ranks = to_nodes = 0
    for row in range(B):
        me = row // (B // (config.fsdp * ranks)) % ranks
        for token in expert[row]:
            rank = token // (E // ranks)
            if config.expert_transport == "two_level":
                nodes = {int(r) // per_node for r in rank} - {me // per_node}
                to_nodes += len(nodes)
                to_ranks += len(nodes) + sum(int(r) % per_node != me % per_node for r in rank)
            else:
                to_ranks += sum(int(r) != me for r in rank)
    assert (float(traffic.to_ranks), float(traffic.to_nodes)) == (to_ranks, to_nodes)


def test_node_limited_routing_bounds_what_crosses_nodes():
    """With 2 of 4 groups a token, and a group a node, no token is sent to more than 2 nodes."""
    random = np.random.default_rng(0)
    expert = np.stack([random.permutation(np.concatenate([np.arange(4) + 4 * g for g in random.permutation(4)[:2]]))[:K]
                       for _ in range(B * L)])  # fmt: skip
    x, w_gate_up, w_down, dy = arrays(0)
    expert = expert.reshape(B, L, K).astype(np.int32)
    traffic = run("four nodes of two")(x, w_gate_up, w_down, expert, np.ones((B, L, K), np.float32), dy)[2]
    assert float(traffic.to_nodes) <= 2 * B * L


def test_hops_for_the_released_model():
    """64 ranks of 8 a node, 4096 tokens a rank: groups of 64, or of 8 and 8, and buffers of twice the mean."""
    (flat,) = hops(64, 8, two_level=False, experts=256, tokens=4096, choices=8)
    assert (flat.size, flat.experts, flat.quota) == (64, 4, 1032)
    across, inside = hops(64, 8, two_level=True, experts=256, tokens=4096, choices=8)
    assert (across.size, across.experts, across.once) == (8, 32, True)
    assert (inside.size, inside.experts, inside.once) == (8, 4, False)
    assert across.groups[1] == tuple(range(1, 64, 8))
    assert inside.groups[1] == tuple(range(8, 16))
    assert hops(1, 1, two_level=True, experts=8, tokens=4, choices=2) == ()
