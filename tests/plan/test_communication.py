"""Bytes of collectives against counts by hand: on programs that are compiled for 8 CPU devices, and on a torus on paper."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from dsv3_jax.cost.efficiency import Efficiency
from dsv3_jax.cost.links import Collective, Links, sent_bytes
from dsv3_jax.plan.communication import axes_of, groups_of
from dsv3_jax.plan.hlo import parse
from dsv3_jax.plan.roofline import CostModel
from dsv3_jax.plan.timeline import Player, Timeline

AXES = {"data": 2, "fsdp": 4}
CPU_PLACES = [(0, 0, (i,)) for i in range(8)]


def played(f, in_specs, out_specs, *shapes, axes=AXES) -> Timeline:
    """What a program over the mesh moves, by the reader."""
    devices = np.array(jax.devices()[:8]).reshape(tuple(axes.values()))
    mesh = Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    mapped = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False))
    p = parse(mapped.lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile().as_text())
    cost = CostModel(p, "h100", Efficiency(), 1.0)
    return Player(p, axes, Links("h100", CPU_PLACES, ()), cost, 1.0, 1.0, 1.0, lambda loop, body: None).play()


def moved(line: Timeline) -> dict[tuple[str, tuple[str, ...]], tuple[float, float]]:
    """(kind, axes) -> count, bytes."""
    return {(kind, axes): (m.count, m.bytes) for (kind, axes, _), m in line.moved.items()}


LOCAL = 24 * 32 * 4  # bytes of what a device holds in the programs below


@pytest.mark.parametrize(
    ("f", "kind", "axes", "sent"),
    [
        (lambda x: jax.lax.all_gather(x, "fsdp", tiled=True), "all-gather", ("fsdp",), 3 * LOCAL),
        (lambda x: jax.lax.all_gather(x, ("data", "fsdp"), tiled=True), "all-gather", ("data", "fsdp"), 7 * LOCAL),
        (lambda x: jax.lax.psum(x, "data"), "all-reduce", ("data",), 2 * 1 / 2 * LOCAL),
        (lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True), "reduce-scatter", ("fsdp",), 3 / 4 * LOCAL),
        (lambda x: jax.lax.all_to_all(x, "fsdp", 0, 1, tiled=True), "all-to-all", ("fsdp",), 3 / 4 * LOCAL),
        (lambda x: jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)]), "collective-permute", ("fsdp",), LOCAL),
    ],
)
def test_bytes_of_each_kind(f, kind, axes, sent):
    line = played(f, P(("data", "fsdp")), P(("data", "fsdp")), (8 * 24, 32))
    assert moved(line) == {(kind, axes): (1, sent)}


def test_loops_count():
    def f(x):
        def inner(y, _):
            return y + jax.lax.all_gather(y, "fsdp").sum(0), None

        def outer(y, _):
            y = jax.lax.scan(inner, y, length=5)[0]
            return y + jax.lax.ppermute(y, "data", [(0, 1), (1, 0)]), None

        return jax.lax.scan(outer, x, length=3)[0]

    line = played(f, P(("data", "fsdp")), P(("data", "fsdp")), (8 * 24, 32))
    assert moved(line) == {("all-gather", ("fsdp",)): (15, 15 * 3 * LOCAL), ("collective-permute", ("data",)): (3, 3 * LOCAL)}
    assert not line.refused


def test_a_loop_of_unknown_length_is_refused():
    def f(x, n):
        return jax.lax.fori_loop(0, n[0].astype(int), lambda i, y: y + jax.lax.all_gather(y, "fsdp").sum(0), x)

    line = played(f, (P(("data", "fsdp")), P()), P(("data", "fsdp")), (8 * 24, 32), (1,))
    assert len(line.refused) == 1


@pytest.mark.parametrize("axes", [{"data": 4, "fsdp": 2}, {"data": 2, "fsdp": 4}, {"data": 1, "fsdp": 8}])
def test_doubling_an_axis(axes):
    """A gather of the same whole array: (n-1)/n of it."""
    n = axes["fsdp"]
    line = played(lambda x: jax.lax.all_gather(x, "fsdp", tiled=True).sum(0), P("fsdp"), P(), (64, 32), axes=axes)
    assert moved(line) == {("all-gather", ("fsdp",)): (1, (n - 1) / n * 64 * 32 * 4)}


def test_zero3_gathers_weights_and_scatters_gradients():
    """A linear layer's step by XLA's own partitioner: the weight is gathered and its gradient summed, no more and no less."""
    mesh = Mesh(np.array(jax.devices()[:8]), ("fsdp",), axis_types=(AxisType.Auto,))
    rows, columns = (jax.NamedSharding(mesh, P("fsdp", None)) for _ in range(2))
    whole = jax.NamedSharding(mesh, P())

    def loss(w, x):
        return (jnp.tanh(x @ jax.lax.with_sharding_constraint(w, whole)) ** 2).sum()

    step = jax.jit(jax.grad(loss), in_shardings=(rows, columns), out_shardings=rows)
    p = parse(
        step.lower(jax.ShapeDtypeStruct((64, 48), "float32"), jax.ShapeDtypeStruct((128, 64), "float32")).compile().as_text()
    )
    cost = CostModel(p, "h100", Efficiency(), 1.0)
    found = moved(Player(p, {"fsdp": 8}, Links("h100", CPU_PLACES, ()), cost, 1.0, 1.0, 1.0, lambda *_: None).play())
    weight = 64 * 48 * 4
    assert found.pop(("all-gather", ("fsdp",))) == (1, 7 / 8 * weight)
    # CPU's compiler has no reduce-scatter here: it sums everywhere, which sends twice as much, and says so
    assert found in ({("reduce-scatter", ("fsdp",)): (1, 7 / 8 * weight)}, {("all-reduce", ("fsdp",)): (1, 2 * 7 / 8 * weight)})


def test_groups_however_they_are_written():
    mesh = {"data": 2, "fsdp": 2, "expert": 2}
    listed = groups_of("replica_groups={{0,2},{1,3},{4,6},{5,7}}, x", 8)
    assert listed == groups_of("replica_groups=[4,2]<=[2,2,2]T(0,2,1), x", 8)
    assert listed == groups_of("replica_groups=mesh['data'=2,'fsdp'=2,'expert'=2] {'fsdp'}, x", 8)
    assert axes_of(listed, mesh) == ("fsdp",)
    assert groups_of("replica_groups={}, x", 4) == ((0, 1, 2, 3),)
    assert axes_of(groups_of("source_target_pairs={{0,5},{1,4}}", 8), mesh) == ("data", "expert")
    with pytest.raises(ValueError, match="groups"):
        groups_of("dimensions={0}", 8)


def collective(kind: str, groups: list[list[int]], sent: float) -> Collective:
    return Collective("c", kind, tuple(map(tuple, groups)), (), sent, "")


TORUS = [(0, 0, tuple(p)) for p in np.ndindex(8, 8, 8)]  # v5p:8x8x8, 90 GB/s a link


def along(*dims: int) -> list[list[int]]:
    """Groups of the torus that extend along these dimensions."""
    ids = np.arange(512).reshape(8, 8, 8)
    rest = [d for d in range(3) if d not in dims]
    return ids.transpose(*rest, *dims).reshape(-1, 8 ** len(dims)).tolist()


@pytest.mark.parametrize(
    ("kind", "dims", "rate"),
    [
        ("all-gather", (0,), 2 * 90e9),  # both ways round a ring
        ("all-gather", (0, 2), 4 * 90e9),
        ("reduce-scatter", (0, 1, 2), 6 * 90e9),
        ("all-to-all", (1,), 90e9),  # 2 steps of a ring of 8 on average, over two links
        ("all-to-all", (0, 1), 90e9),
    ],
)
def test_rates_of_a_torus(kind, dims, rate):
    route = Links("v5p", TORUS, (8, 8, 8)).route(collective(kind, along(*dims), 1e9))
    assert route.bytes == {"ici": 1e9}
    assert route.seconds == pytest.approx(1e9 / rate, rel=0.01)


def test_a_ring_exchange_by_counting_links():
    """All-to-all on a ring: every byte's steps counted, the fullest link's bytes over its rate."""
    n, each = 8, 1e6  # bytes for every other device
    load = np.zeros((n, 2))
    for a in range(n):
        for b in range(n):
            right, left = (b - a) % n, (a - b) % n
            parts = (
                [(0, right, 0.5), (1, left, 0.5)] if right == left else [(0, right, 1.0)] if right < left else [(1, left, 1.0)]
            )
            for way, steps, share in parts:
                for s in range(steps):
                    load[(a + s) % n if way == 0 else (a - s) % n, way] += share * each
    route = Links("v5p", TORUS, (8, 8, 8)).route(collective("all-to-all", along(0), (n - 1) * each))
    assert route.seconds == pytest.approx(load.max() / 90e9, rel=0.15)  # the model spreads the (n-1)/n that leaves as if n


def test_cores_of_a_chip_share_its_links():
    places = [(0, 0, tuple(p)) for p in np.ndindex(4, 4, 4) for _ in range(2)]
    one_core_each = [list(range(core, 128, 2)) for core in (0, 1)]
    alone = Links("v5p", places[::2], (4, 4, 4)).route(collective("all-gather", [list(range(64))], 1e9))
    both = Links("tpu7x", places, (4, 4, 4)).route(collective("all-gather", one_core_each, 1e9))
    assert both.seconds == pytest.approx(2 * alone.seconds, rel=0.01)


GPUS = [(0, i // 8, (i,)) for i in range(64)]  # h100:8x8


def test_inside_and_across_hosts():
    links = Links("h100", GPUS, ())
    inside = links.route(collective("all-gather", np.arange(64).reshape(8, 8).tolist(), 7e9))
    assert inside.bytes == {"nvlink": 7e9}
    assert inside.seconds == pytest.approx(7e9 / 450e9, rel=0.01)
    across = links.route(collective("all-gather", np.arange(64).reshape(8, 8).T.tolist(), 7e9))
    assert across.bytes == {"network": 7e9}
    assert across.seconds == pytest.approx(7e9 / 50e9, rel=0.01)


@settings(max_examples=30, deadline=None)
@given(hosts=st.sampled_from([2, 3, 4, 8]), gpus=st.sampled_from([1, 2, 4, 8]), whole=st.floats(1e6, 1e12))
def test_bytes_are_conserved_over_two_levels(hosts, gpus, whole):
    """What enters a host over the network is what the others have; the rest comes from inside. Exchanges the same, by pairs."""
    n = hosts * gpus
    links = Links("h100", [(0, i // gpus, (i,)) for i in range(n)], ())
    gather = links.route(collective("all-gather", [list(range(n))], sent_bytes("all-gather", whole / n, n)))
    assert gather.bytes.get("network", 0) * gpus == pytest.approx(whole * (hosts - 1) / hosts)
    exchange = links.route(collective("all-to-all", [list(range(n))], sent_bytes("all-to-all", whole, n)))
    assert exchange.bytes["network"] == pytest.approx(whole * (n - gpus) / n)
    assert exchange.bytes.get("nvlink", 0) == pytest.approx(whole * (gpus - 1) / n)


def test_permutes_by_their_way():
    links = Links("v5p", TORUS, (8, 8, 8))
    ring = [[i * 64, (i + 1) % 8 * 64] for i in range(8)]  # along the first dimension, the last wraps round
    there = links.route(collective("collective-permute", ring, 9e9))
    back = links.route(collective("collective-permute", [[b, a] for a, b in ring], 9e9))
    assert there.seconds == pytest.approx(9e9 / 90e9, rel=0.01)
    assert set(there.directions).isdisjoint(back.directions)  # they don't wait for each other
    far = links.route(collective("collective-permute", [[i * 64, (i + 3) % 8 * 64] for i in range(8)], 9e9))
    assert far.seconds == pytest.approx(3 * there.seconds, rel=0.01)
    assert Links("h100", GPUS, ()).route(collective("collective-permute", [[0, 8], [8, 0]], 5e9)).bytes == {"network": 5e9}


def test_slices_talk_over_the_network():
    places = [(s, 0, tuple(p)) for s in range(2) for p in np.ndindex(4, 4, 4)]
    pairs = np.arange(128).reshape(2, 64).T.tolist()
    route = Links("v5p", places, (4, 4, 4)).route(collective("all-reduce", pairs, 1e9))
    assert route.bytes == {"network": 1e9}
    assert math.isclose(route.seconds, 1e9 / 6.25e9, rel_tol=0.01)
