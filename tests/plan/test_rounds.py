"""Loops over data, counted as balanced loads run them: FLOPs of this package's own functions against sums written out."""

import math

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.config import ParallelConfig
from dsv3_jax.cost.efficiency import Efficiency
from dsv3_jax.cost.links import Links
from dsv3_jax.parallel.layout import make_layout
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.plan.hlo import parse
from dsv3_jax.plan.roofline import CostModel
from dsv3_jax.plan.rounds import rounds_of
from dsv3_jax.plan.timeline import Player, Timeline
from pallas_kernels import causal_attention, grouped_swiglu


def played(
    f, *shapes: jax.ShapeDtypeStruct, rows: float = 0.0, mesh: dict[str, int] | None = None, exchanges: int = 1, parts: int = 1
) -> Timeline:
    p = parse(jax.jit(f).lower(*shapes).compile().as_text())
    mesh = mesh or {"data": 1}
    cost = CostModel(p, "h100", Efficiency(), 1.0)
    links = Links("h100", [(0, 0, (n,)) for n in range(math.prod(mesh.values()))], ())
    return Player(p, mesh, links, cost, 1.0, 1.0, 1.0, rounds_of(p, rows, exchanges, parts)).play()


def array(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize("backward", [False, True])
def test_attention_by_blocks(backward):
    """Blocks of keys before a block of queries, and its own: n (n + 1) / 2 pairs of blocks of 128."""
    batch, length, heads, key, value = 2, 640, 3, 48, 32

    def attend(q, k, v, segments, _dout):
        return causal_attention(q, k, v, segments, scale=1.0, implementation="xla")

    def gradients(q, k, v, segments, dout):
        return jax.vjp(lambda q, k, v: attend(q, k, v, segments, dout), q, k, v)[1](dout)

    qk, v = array(batch, length, heads, key), array(batch, length, heads, value)
    line = played(gradients if backward else attend, qk, qk, v, array(batch, length, dtype=jnp.int32), v)
    pairs = batch * heads * (5 * 6 // 2) * 128 * 128
    forward = 2 * pairs * (key + value)
    assert not line.refused
    assert line.work.flops.total() == (forward + 2 * pairs * (3 * key + 2 * value) if backward else forward)


@pytest.mark.parametrize(("tokens", "experts"), [(512, 4), (96, 4)])
def test_experts_by_blocks(tokens, experts):
    """Every row is multiplied with three matrices; of the loops over smaller blocks none runs when loads are balanced."""
    choices, width, hidden = 4, 80, 56
    weights = array(experts, width, 2, hidden), array(experts, hidden, width)
    which = array(tokens, choices, dtype=jnp.int32), array(tokens, choices)

    def f(x, w_gate_up, w_down, expert, weight):
        return grouped_swiglu(x, w_gate_up, w_down, expert, weight, implementation="xla")

    line = played(f, array(tokens, width), *weights, *which, rows=tokens * choices)
    assert not line.refused
    assert line.work.flops.total() == tokens * choices * 2 * 3 * width * hidden


@pytest.mark.parametrize("two_level", [False, True])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("exchanges", [1, 2])
def test_rounds_of_the_exchange(two_level, parts, exchanges):
    """A part's round sends rows, and what they want there, and brings results back: 3 collectives a hop (counts are not sent on
    CPU, which pads). Products are those of all rows in every round."""
    tokens, experts, choices, width, hidden = 384, 8, 2, 16, 8
    config = ParallelConfig(
        expert=8, expert_transport="two_level" if two_level else "flat", expert_ranks_per_node=4, expert_parts=parts
    )
    mesh = make_mesh(config)
    layout = make_layout(config, mesh)

    def f(x, w_gate_up, w_down, expert, weight):
        return layout.experts(x, w_gate_up, w_down, expert, weight, None)[0]

    shapes = (array(8, tokens, width), array(experts, width, 2, hidden), array(experts, hidden, width))
    which = array(8, tokens, choices, dtype=jnp.int32), array(8, tokens, choices)
    rows = tokens * choices / parts
    line = played(f, *shapes, *which, rows=rows, mesh=dict(mesh.shape), exchanges=exchanges, parts=parts)
    assert not line.refused
    hops = parts * exchanges * (1 + exchanges if two_level else 1)
    assert sum(m.count for (kind, _, _), m in line.moved.items() if kind == "all-to-all") == 3 * hops
    calls = parts * exchanges * (exchanges if two_level else 1)
    assert line.work.flops.total() == pytest.approx(calls * rows * 2 * 3 * width * hidden)


def test_other_loops_over_data_are_refused():
    line = played(lambda n, x: jax.lax.fori_loop(0, n, lambda i, y: y @ y, x), array(dtype=jnp.int32), array(8, 8))
    assert len(line.refused) == 1
