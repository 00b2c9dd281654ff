"""Compressed means: what is applied against what was asked for, bytes against the compiled program."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dsv3_jax.exchange.codec import Codec
from dsv3_jax.exchange.mean import compressed_mean, second_moment_units
from dsv3_jax.exchange.residual import Residual
from dsv3_jax.exchange.wire import has_shares, split_axis
from tests.conftest import load_script
from tests.exchange.test_codec import CODECS, named

LARGEST = float(np.finfo(np.float32).max)


def mesh_of(replicas: int, fsdp: int = 1) -> Mesh:
    return Mesh(np.array(jax.devices()[: replicas * fsdp]).reshape(replicas, fsdp), ("data", "fsdp"))


def per_replica(transformation, mesh: Mesh):
    """(init of parameters, update of [R, ...] gradients, state and maybe units), on each device by itself.

    State has an axis for devices."""
    own = P(("data", "fsdp"))

    def init(params):
        return jax.tree.map(lambda a: a[None], transformation.init(params))

    def update(updates, state, units):
        updates, state = jax.tree.map(lambda a: a[0], (updates, state))
        updates, state = optax.with_extra_args_support(transformation).update(updates, state, updates, units=units)
        return jax.tree.map(lambda a: a[None], (updates, state))

    def on(f, in_specs, out_specs):
        return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False))

    jitted = on(update, (own, own, P()), own)
    return on(init, P(), own), lambda updates, state, units=None: jitted(updates, state, units)


def trees(seed: int, replicas: int, shapes: list, scale: float, zero: bool) -> dict:
    rng = np.random.default_rng(seed)
    found = {f"w{i}": scale * rng.standard_normal((replicas, *s)).astype(np.float32) for i, s in enumerate(shapes)}
    if zero:
        found["w0"] *= 0
    return found


@settings(max_examples=15, deadline=None)
@given(
    replicas=st.sampled_from([1, 2, 3, 8]),
    shapes=st.lists(
        st.sampled_from([(), (7,), (24,), (3, 48), (5, 7), (24, 2, 9), (7, 480), (11, 13, 5)]), min_size=1, max_size=3
    ),
    codec=st.sampled_from(CODECS), scale=st.sampled_from([1e-33, 1e-3, 1.0, 1e30]), zero=st.booleans(), in_units=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_what_is_applied_is_what_was_asked_for_less_the_residuals(replicas, shapes, codec, scale, zero, in_units, seed):
    """Over six steps; and replicas hold the same bits. To float32's rounding of sums of numbers as large as any met here.
    Units are of four magnitudes within an array, and stay: errors in others that keep changing would leave float32.

    The replicas' server residuals, put together along the axis that was cut, are those of the means; where there is no such
    axis, the workers' residuals include them."""
    transformation = compressed_mean(codec.bits, block=codec.block, levels=codec.levels)
    init, update = per_replica(transformation, mesh_of(replicas))
    state = init({f"w{i}": jnp.zeros(s) for i, s in enumerate(shapes)})
    asked = {f"w{i}": np.zeros(s) for i, s in enumerate(shapes)}
    applied = {name: np.zeros_like(a) for name, a in asked.items()}
    largest = 0.0
    for step in range(6):
        gradients = trees(seed + step, replicas, shapes, scale, zero)
        units = {name: 10.0 ** np.random.default_rng(seed).uniform(-2, 2, a.shape) for name, a in asked.items()}
        means, state = update(gradients, state, jax.tree.map(np.float32, units) if in_units else None)
        for name, mean in means.items():
            mean = np.asarray(mean)
            assert (mean == mean[:1]).all()
            asked[name] += gradients[name].astype(np.float64).mean(0)
            applied[name] += mean[0]
            largest = max(largest, np.abs(mean).max(), *(np.abs(e).max() for e in jax.tree.leaves(state)))
    for name, shape in zip(asked, shapes, strict=True):
        residual, left, cut = state.residuals[name], 0.0, split_axis(shape, replicas)
        few = math.prod(shape) >= 8 * replicas
        assert few == (residual != optax.MaskedNode())
        if few:
            left = np.asarray(residual.worker, np.float64).mean(0)
            assert (residual.server is None) == (cut is None)
        if cut is not None:
            left += np.concatenate(list(np.asarray(residual.server, np.float64)), cut)
        np.testing.assert_allclose(applied[name] + left, asked[name], atol=40 * 2**-24 * largest + 1e-37)
        if zero and name == "w0":
            assert not applied[name].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("codec", CODECS, ids=named)
def test_what_is_not_finite_is_passed_on_to_all(codec, bad):
    init, update = per_replica(compressed_mean(codec.bits, block=codec.block, levels=codec.levels), mesh_of(4))
    gradients = trees(0, 4, [(200,)], 1.0, False)
    gradients["w0"][2, 150] = bad
    means, _ = update(gradients, init({"w0": jnp.zeros(200)}))
    assert not np.isfinite(np.asarray(means["w0"])[:, 150]).any()
    assert np.isfinite(np.asarray(means["w0"])[:, :64]).all()


@pytest.mark.parametrize("codec", CODECS, ids=named)
def test_the_largest_numbers_do_no_harm(codec):
    """Squares of such numbers would be infinite. Levels that are twice rounded are within 1.51^2 of numbers all alike."""
    init, update = per_replica(compressed_mean(codec.bits, block=codec.block, levels=codec.levels), mesh_of(2))
    gradients = {"w0": np.full((2, 64), LARGEST / 4, np.float32) * np.array([1, -1] * 32, np.float32)}
    means, _ = update(gradients, init({"w0": jnp.zeros(64)}))
    ratio = np.asarray(means["w0"]) / gradients["w0"]
    assert (ratio > 0.5).all()
    assert (ratio < 2.4).all()


def test_error_feedback_sends_in_the_end_what_rounding_keeps_back():
    """A constant gradient: its mean over many steps comes out; without feedback the same part is lost in each."""
    gradients = trees(3, 4, [(512,)], 1.0, False)
    expected, averages = gradients["w0"].mean(0), {}
    for feedback in (True, False):
        init, update = per_replica(compressed_mean(2, error_feedback=feedback), mesh_of(4))
        state, total = init({"w0": jnp.zeros(512)}), 0.0
        for _ in range(50):
            means, state = update(gradients, state)
            total = total + np.asarray(means["w0"][0])
        averages[feedback] = np.linalg.norm(total / 50 - expected) / np.linalg.norm(expected)
        assert bool(jax.tree.leaves(state)) == feedback
    assert averages[True] < 0.06  # the residual at the end, over 50 steps
    assert averages[False] > 0.3


def test_small_numbers_keep_their_size_in_units_of_their_second_moment():
    """Every second number is twenty times smaller: without units its two bits are noise of the large ones."""
    small = np.where(np.arange(512) % 2, 0.05, 1.0).astype(np.float32)
    gradients = {"w0": trees(5, 4, [(512,)], 1.0, False)["w0"] * small}
    true = gradients["w0"].mean(0)[1::2]
    init, update = per_replica(compressed_mean(2), mesh_of(4))
    error = {}
    for units in (None, {"w0": second_moment_units(jnp.asarray(small) ** 2)}):
        means, _ = update(gradients, init({"w0": jnp.zeros(512)}), units)
        error[units is None] = np.linalg.norm(np.asarray(means["w0"][0])[1::2] - true) / np.linalg.norm(true)
    assert error[False] < 0.8
    assert error[True] > 3


def test_blocks_are_fitted_and_shares_cut_by_hand():
    assert [Codec(2).fitted(n).block for n in (256, 300, 4096, 10)] == [256, 152, 256, 16]
    assert split_axis((8, 4), 2) == 0
    assert split_axis((6, 64), 4) == 1  # the first axis does not divide
    assert split_axis((4, 2), 2) is None  # a share would not fill a block of eight
    assert split_axis((4, 3, 32), 4) == 0
    assert [has_shares((3, 8), replicas) for replicas in (3, 4)] == [True, False]


def test_units_by_hand():
    """The root of v, and a hundredth of the array's root mean square gradient: a number that saw none is rounded in that."""
    np.testing.assert_allclose(
        second_moment_units(jnp.asarray([0.0, 2.0, 4.0, 2.0])), [0.0141421, 1.4283557, 2.0141421, 1.4283557], rtol=1e-5
    )


def test_what_is_masked_crosses_in_full_precision():
    """Norms, here; by a tree and by a function of the parameters; residuals in bfloat16 where asked for."""
    gradients = {"norm": trees(0, 2, [(34,)], 1.0, False)["w0"], "w": trees(1, 2, [(34,)], 1.0, False)["w0"]}
    params = {"norm": jnp.zeros(34), "w": jnp.zeros(34)}
    for mask in ({"norm": False, "w": True}, lambda tree: {"norm": False, "w": True}):
        init, update = per_replica(compressed_mean(2, mask=mask, dtype=jnp.dtype("bfloat16")), mesh_of(2))
        state = init(params)
        assert state.residuals["norm"] == optax.MaskedNode()
        assert {a.dtype.name for a in jax.tree.leaves(state)} == {"bfloat16"}
        means, _ = update(gradients, state)
        np.testing.assert_allclose(means["norm"][0], gradients["norm"].mean(0), rtol=1e-6, atol=1e-7)
        assert not np.allclose(means["w"][0], gradients["w"].mean(0), rtol=1e-2)


@pytest.mark.parametrize("shape", [(24, 36), (5, 8, 7), (4096,)])
def test_the_study_of_learning_rounds_as_the_exchange_does(shape):
    """scripts/studies/compare_gradients.py simulates it on one device: three steps, in units of a second moment."""
    study = load_script("studies/compare_gradients")
    v = jnp.square(jax.random.normal(jax.random.key(9), shape))
    init, update = per_replica(compressed_mean(2), mesh_of(4))
    state, residual = init({"w0": jnp.zeros(shape)}), Residual(jnp.zeros((4, *shape)), jnp.zeros(shape))
    simulated = jax.jit(lambda x, e: study.averaged(study.VARIANTS["shipped"], Codec(2), x, e, v, 0))
    for step in range(3):
        gradients = trees(step, 4, [shape], 1.0, False)
        means, state = update(gradients, state, {"w0": second_moment_units(v)})
        expected, residual = simulated(gradients["w0"], residual)
        # a number at the edge between two levels may go either way by rounding; its error makes up for it later
        differ = np.abs(np.asarray(means["w0"][0]) - expected) > 1e-5
        assert differ.mean() < 2e-3


def test_it_goes_before_clipping_and_adam():
    chain = optax.chain(compressed_mean(2), optax.clip_by_global_norm(0.5), optax.adamw(1e-2))
    init, update = per_replica(chain, mesh_of(4, 2))
    params = {"w": jnp.zeros(100)}
    gradients = {"w": jnp.broadcast_to(jax.random.normal(jax.random.key(0), (1, 100)), (8, 100))}
    updates, state = update(gradients, init(params))
    updates, _ = update(gradients, state)
    assert (np.asarray(updates["w"]) == np.asarray(updates["w"])[:1]).all()
    assert np.isfinite(np.asarray(updates["w"])).all()
    assert (np.sign(updates["w"][0]) == -np.sign(gradients["w"][0])).mean() > 0.8  # of two steps in 2 bits


def bytes_of_collectives(hlo: str) -> int:
    """Results of all-to-all and all-gather: what a device receives, its own part included."""
    size = {"u8": 1, "f32": 4, "bf16": 2}
    total = 0
    for line in hlo.splitlines():
        if match := re.search(r"= \(?(.*?)\)? (all-to-all|all-gather|all-reduce)(?:-start)?\(", line):
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", match[1]):
                total += size[dtype] * int(np.prod([int(d) for d in dims.split(",") if d]))
    return total


@pytest.mark.parametrize(("bits", "most"), [(1, 1 / 13), (2, 1 / 7), (4, 0.26), (8, 0.51)])
def test_bytes_on_the_wire(bits, most):
    """A million numbers, scales and padding included, against an all-reduce of bfloat16 (each number sent twice)."""
    n, mesh = 1_000_008, mesh_of(8)
    init, update = per_replica(compressed_mean(bits), mesh)
    gradients = {"w": jnp.zeros((8, n))}
    state = init({"w": jnp.zeros(n)})
    text = jax.jit(update).lower(gradients, state).compile().as_text()
    assert bytes_of_collectives(text) <= most * 2 * 2 * n
    assert not re.search(r"(f32|bf16)\[[\d,]*\]\S* (all-to-all|all-gather|all-reduce)", text)


@pytest.mark.parametrize(
    ("arguments", "named_in"), [({"bits": 3}, "bits=3"), ({"block": 12}, "block=12"), ({"levels": "x"}, "levels='x'")]
)
def test_bad_arguments_are_named(arguments, named_in):
    with pytest.raises(ValueError, match=named_in):
        compressed_mean(**arguments)
