"""The precision controller: an outlier makes its layer leave 8 bits in time and come back, in one compiled step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.checkpoint.manager import CheckpointManager
from dsv3_jax.config import CheckpointConfig, load_config
from dsv3_jax.errors import UserError
from dsv3_jax.parallel.layout import layout_for
from dsv3_jax.precision import controller
from dsv3_jax.precision.controller import CAUSES
from dsv3_jax.precision.recipes import recipe_of
from dsv3_jax.precision.switch import OPERANDS, SLOTS, STATISTICS, statistics
from dsv3_jax.state.programs import without_jax_cache
from dsv3_jax.state.train_state import abstract_model, abstract_state, new_state
from dsv3_jax.training.step import make_train_step
from pallas_kernels.scaled import Gemms
from tests.parallel.cases import MESHES, batch_of, config_of

COOLDOWN = 3
CONTROLLED = [
    "precision.recipe=deepseek", "precision.controller=true", f"precision.cooldown_steps={COOLDOWN}",
    "model.num_hidden_layers=3", "train.grad_accum_steps=1", "model.num_nextn_predict_layers=0", "optim.lr=1e-5",
    "optim.lr_final=1e-5",
]  # fmt: skip


def scaled(state, path: tuple[str, ...], layer: int, at: tuple, factor: float):
    """The state with a few numbers of one layer's parameter `factor` times larger."""

    def change(p, variable):
        if tuple(p) != path:
            return variable
        w = variable.get_value()
        return variable.replace(w.at[(layer, *at)].multiply(factor))

    state.params = nnx.map_state(change, state.params)
    return state


def run(step, config, state, steps: range, between=None):
    """(state, {step: decisions}, losses); `between(i, state)` changes the state before step i."""
    template, found, losses = abstract_model(config, recipe_of(config.precision)).eight_bit, [], []
    for i in steps:
        state = between(i, state) if between else state
        state, metrics = step(state, batch_of(config, i))
        metrics = jax.device_get(metrics)
        found += controller.log_lines(i, template, metrics.decisions)
        losses.append(float(metrics.objective.loss))
        assert np.isfinite(losses[-1])
        assert np.isfinite(metrics.grad_norm)
    return state, found, losses


@pytest.fixture(scope="module")
def config():
    return config_of(CONTROLLED)


@pytest.fixture(scope="module")
def step(config):
    return make_train_step(config)


@pytest.fixture(scope="module")
def made(config):
    return new_state(config)


@pytest.fixture
def fresh(made):
    """A copy of it: steps give away the state that they are given."""
    return jax.tree.map(jnp.copy, made)


EITHER = ("underflow", "jump")
OUTLIERS = {
    # parameter, layer, which numbers, factor, and what may be named: switch, operand, causes
    "one weight": (("moe_blocks", "attention", "w_kv_a_DX"), 1, (3, 5), 1e7, "moe_blocks/attention", "weights", EITHER),
    "all weights": (("moe_blocks", "attention", "w_kv_a_DX"), 1, (...,), 1e4, "moe_blocks/attention", "weights", ("jump",)),
    "one channel": (("moe_blocks", "ffn_norm", "scale"), 0, (5,), 1e6, "moe_blocks/ffn", "activations", EITHER),
    "dense": (("dense_blocks", "ffn", "w_down_FD"), 0, (3, 5), 1e7, "dense_blocks/ffn", "weights", EITHER),
}  # fmt: skip


@pytest.mark.parametrize("name", OUTLIERS)
def test_a_layer_leaves_8_bits_before_anything_breaks_and_comes_back(config, step, fresh, name):
    path, layer, at, factor, switch, operand, causes = OUTLIERS[name]
    begin, end = 2, 4

    def between(i, state):
        return scaled(state, path, layer, at, factor if i == begin else 1 / factor) if i in (begin, end) else state

    state, found, _ = run(step, config, fresh, range(16), between)
    mine = [line for line in found if (line["switch"], line["layer"]) == (switch, layer)]
    assert [line["bits"] for line in mine] == [16, 8]
    left, returned = mine
    assert left["step"] == begin
    assert left["operand"] == operand
    assert left["cause"] in causes
    assert left["worst_over_limit"] > 1
    assert end + COOLDOWN - 1 <= returned["step"] <= end + COOLDOWN + 8  # the running mean forgets the outlier in a few steps
    assert all(bool(memory.eight_bit.all()) for memory in state.controller.values())
    assert step._cache_size() == 1
    # other layers of the same class stay, unless the outlier reached them as well: it never travels backwards as activations
    if operand == "weights":
        assert not [li for li in found if li["switch"] == switch and li["layer"] != layer and li.get("operand") == "weights"]


def test_nothing_changes_without_a_cause(config, step, fresh):
    """And the products in 8 bits are those of the recipe without a controller, to the bit."""
    _, found, losses = run(step, config, fresh, range(4))
    assert found == []
    free = config_of([*CONTROLLED, "precision.controller=false"])
    _, _, expected = run(make_train_step(free), free, new_state(free), range(4))
    assert losses == expected


def test_in_16_bits_the_step_is_that_of_bf16(config, step, fresh):
    fresh.controller = {
        name: m._replace(eight_bit=jnp.zeros_like(m.eight_bit), calm=m.calm - 100) for name, m in fresh.controller.items()
    }
    _, found, losses = run(step, config, fresh, range(3))
    assert found == []
    plain = config_of([*CONTROLLED, "precision.controller=false", "precision.recipe=bf16", "optim.moment_dtype=bfloat16"])
    _, _, expected = run(make_train_step(plain), plain, new_state(plain), range(3))
    np.testing.assert_allclose(losses, expected, rtol=1e-4)  # the same products, fused otherwise: bfloat16 rounds elsewhere


def test_a_run_from_a_checkpoint_decides_the_same(config, step, fresh, tmp_path):
    path, layer, at, factor, *_ = OUTLIERS["one weight"]

    def between(i, state):
        return scaled(state, path, layer, at, factor if i == 1 else 1 / factor) if i in (1, 4) else state

    manager = CheckpointManager(tmp_path / "checkpoints", CheckpointConfig(keep=1))
    state, before, _ = run(step, config, fresh, range(3), between)
    manager.save(state, {"config": {}})
    manager.wait()
    _, expected, _ = run(step, config, state, range(3, 14), between)
    restored, _ = manager.restore(abstract_state(config))
    _, found, _ = run(step, config, restored, range(3, 14), between)
    assert "moe_blocks/attention" in {line["switch"] for line in before}
    assert {line["bits"] for line in before} == {16}  # others leave too: their gradients jump
    assert found == expected
    assert {line["bits"] for line in found} == {8}


@pytest.mark.slow
def test_a_mesh_decides_as_one_device_does(config, step, fresh):
    """About the outlier; whose gradients jump with it, and when, is a matter of rounding."""
    path, layer, at, factor, *_ = OUTLIERS["one weight"]

    def outlier(i, state):
        return scaled(state, path, layer, at, factor) if i == 1 else state

    spread = config_of([*CONTROLLED, *MESHES["fsdp=2 expert=4"]])
    layout = layout_for(spread)
    with without_jax_cache():  # collectives inside a conditional: on CPU such a program that comes from the cache can hang
        _, found, _ = run(make_train_step(spread, layout), spread, new_state(spread, layout), range(2), outlier)
    _, expected, _ = run(step, config, fresh, range(2), outlier)
    (ours,), (theirs,) = ([line for line in lines if line.get("operand") == "weights"] for lines in (found, expected))
    assert ours["worst_over_limit"] == pytest.approx(theirs["worst_over_limit"], rel=1e-3)
    assert ours | {"worst_over_limit": 0} == theirs | {"worst_over_limit": 0}
    assert (ours["switch"], ours["layer"], ours["step"]) == ("moe_blocks/attention", 1, 1)


def recorded(**values: float) -> jnp.ndarray:
    """Statistics of one switch of two layers: calm, but for layer 1's gradients in slot 0."""
    calm = jnp.zeros((2, max(SLOTS.values()) + 1, len(OPERANDS), len(STATISTICS))).at[..., 0].set(4.0).at[..., 1].set(4.0)
    for name, value in values.items():
        calm = calm.at[1, 0, 2, STATISTICS.index(name)].set(4 * value)  # sums over 4 reports, as gradients are
    return calm


def test_the_rule_by_hand():
    memory = controller.Memory(jnp.ones(2, bool), jnp.zeros(2, jnp.int32), jnp.full((2, 3, 3), jnp.nan))
    decide = lambda memory, **values: controller._update(memory, recorded(**values), Gemms("e4m3", "e5m2"), cooldown=2)  # noqa: E731
    memory, decision = decide(memory)
    assert decision.change.tolist() == [0, 0]
    for values, cause in (
        ({"underflow": 0.011}, "underflow"), ({"error": 0.161}, "error"), ({"overflow": 1e-6}, "overflow"),
        ({"amax": 33.0}, "jump"), ({"amax": float("nan")}, "overflow"), ({"amax": float("inf")}, "overflow"),
    ):  # fmt: skip
        after, decision = decide(memory, **values)
        assert decision.change.tolist() == [0, -1]
        assert (CAUSES[decision.cause[1]], OPERANDS[decision.operand[1]]) == (cause, "gradients")
        assert after.eight_bit.tolist() == [True, False]
    for values in ({"underflow": 0.009}, {"error": 0.12}, {"amax": 31.0}):  # below the limit, dgrad's for gradients
        assert decide(memory, **values)[1].change.tolist() == [0, 0]

    left, _ = decide(memory, underflow=0.5)
    once, decision = decide(left)
    assert decision.change.tolist() == [0, 0]
    back, decision = decide(once)
    assert decision.change.tolist() == [0, 1]
    assert back.eight_bit.tolist() == [True, True]
    # hysteresis: between half of a limit and the limit, 8 bits stay and 16 bits stay; and the count begins again
    for _ in range(4):
        left, decision = decide(left, underflow=0.006)
        assert decision.change.tolist() == [0, 0]
    again, _ = decide(once, underflow=0.006)
    assert decide(again)[1].change.tolist() == [0, 0]


def test_the_running_mean_by_hand():
    """The average is of binary logarithms, the first as it is: 0, then 0.9 x 0 + 0.1 x 2, then 0.9 x 0.2 + 0.1 x 3."""
    memory = controller.Memory(jnp.ones(2, bool), jnp.zeros(2, jnp.int32), jnp.full((2, 3, 3), jnp.nan))
    found = []
    for amax in (1.0, 4.0, 8.0):
        memory, _ = controller._update(memory, recorded(amax=amax), Gemms("e4m3", "e5m2"), cooldown=2)
        found.append(float(memory.log_amax[1, 0, 2]))
    np.testing.assert_allclose(found, [0, 0.2, 0.48], rtol=1e-6)
    for amax, change in ((2.0**-6, 0), (2.0**6, -1)):  # smaller numbers are no jump, however much smaller
        _, decision = controller._update(memory, recorded(amax=amax), Gemms("e4m3", "e5m2"), cooldown=2)
        assert decision.change.tolist() == [0, change]


def test_statistics_are_what_numpy_counts():
    x = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)
    x[3, 7] = 1e7  # the tile's other 127 numbers are below what its scale can hold
    found = statistics(jnp.asarray(x), jnp.asarray(x), 1, "e4m3", Gemms())
    count, amax, overflow, underflow, error = np.asarray(found)
    assert (count, amax, overflow) == (1, np.float32(1e7), 0)
    smallest = 1e7 / 448 * 2.0**-10
    assert underflow == pytest.approx((np.abs(x[3, :128]) < smallest).sum() / x.size, abs=2e-5)
    assert underflow > 120 / x.size
    assert error < 1e-3  # a sum of squares sees only the outlier: why zeros are counted as well


def test_bad_settings_are_refused():
    for overrides, text in (
        (["precision.recipe=bf16", "precision.controller=true"], "nothing to control"),
        (["precision.recipe=deepseek", "precision.cooldown_steps=0"], "cooldown_steps=0 must be positive"),
    ):
        with pytest.raises(UserError, match=text):
            load_config("configs/tiny.yaml", overrides)
    with pytest.raises(UserError, match=r"parallel\.pipe=1"):
        layout_for(config_of([*CONTROLLED, "parallel.pipe=2", "model.num_hidden_layers=5", "train.grad_accum_steps=2"]))
