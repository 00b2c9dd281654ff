"""`parallel.compress=auto`: on where the slow axis would hold steps up, off elsewhere, and why."""

from dataclasses import replace

import jax
import pytest

from dsv3_jax.config import Config, load_config
from dsv3_jax.cost.compression import estimate_exchanges, resolve_compression
from dsv3_jax.cost.efficiency import ASSUMED
from dsv3_jax.cost.estimate import Estimator, compressed_share
from dsv3_jax.cost.memory import parameters_per_device
from dsv3_jax.cost.topologies import parse_topology, topology_of
from dsv3_jax.parallel.mesh import AXES, axis_sizes
from tests.conftest import ROOT

ONE = dict.fromkeys(AXES, 1)


def decision(model: str, topology: str, *overrides: str) -> tuple[Config, str]:
    config = load_config(ROOT / "configs" / f"{model}.yaml", ["parallel.compress=auto", "train.grad_accum_steps=1", *overrides])
    there = parse_topology(topology)
    return resolve_compression(config, there, axis_sizes(config.parallel, there.size))


@pytest.mark.parametrize(
    ("model", "topology", "overrides", "bits"),
    [
        ("v3_671b", "2*v5p:8x8x8", ["data=2", "fsdp=8", "expert=64"], 2),  # between slices
        ("v3_16b", "h100:8x8", ["data=8", "fsdp=8"], 2),  # between hosts
        ("v3_16b", "v5p:4x4x4", ["data=4", "fsdp=16"], 0),  # inside a torus
        ("v3_16b", "h100:1x8", ["data=2", "fsdp=4"], 0),  # inside a host
    ],
)
def test_few_bits_where_links_are_slow_for_what_they_carry(model, topology, overrides, bits):
    config, why = decision(model, topology, "data.batch_size=1024", *(f"parallel.{o}" for o in overrides))
    assert config.parallel.compress == bits
    assert ("2 bits, " if bits else "off, ") in why
    assert topology in why


def test_a_larger_batch_makes_it_less_worth_while():
    small, large = (
        decision("v3_16b", "h100:8x8", "parallel.data=8", "parallel.fsdp=8", f"data.batch_size={n}") for n in (64, 4096)
    )
    assert (small[0].parallel.compress, large[0].parallel.compress) == (2, 0)


def test_nothing_is_decided_that_was_not_asked_for_or_is_not_known():
    asked, why = decision(
        "v3_16b", "h100:8x8", "parallel.data=8", "parallel.fsdp=8", "parallel.compress=4", "data.batch_size=64"
    )
    assert asked.parallel.compress == 4
    assert why == "98.7% of a device's gradients cross `data` in 4 bits, the rest in float32"
    whole, why = decision(
        "v3_16b", "h100:8x8", "parallel.data=8", "parallel.fsdp=8", "parallel.compress=0", "data.batch_size=64"
    )
    assert (whole.parallel.compress, why) == (0, "")
    one, why = decision("v3_16b", "h100:8x8", "parallel.fsdp=64", "data.batch_size=64")
    assert one.parallel.compress == 0
    assert "one replica" in why
    config = load_config(ROOT / "configs" / "tiny.yaml", ["parallel.compress=auto", "parallel.data=8"])
    config, why = resolve_compression(config, topology_of(jax.devices()), axis_sizes(config.parallel, 8))
    assert config.parallel.compress == 0
    assert "nothing is known" in why


def test_what_stays_in_float32_counts():
    """The embedding, norms and the router: 1.3% of the numbers, and a sixth of the time."""
    config = load_config(ROOT / "configs" / "v3_16b.yaml", ["data.batch_size=64", "parallel.compress=2"])
    sizes = {**ONE, "data": 8, "fsdp": 8}
    share, all_numbers = compressed_share(config, sizes), parameters_per_device(config, sizes)
    embedding = config.model.vocab_size * config.model.hidden_size / 8
    assert 1 - share == pytest.approx(embedding / all_numbers, rel=0.05)
    assert compressed_share(config, sizes | {"data": 7}) == pytest.approx(share, rel=1e-3)  # 7 divides no axis of most arrays
    estimator = Estimator(parse_topology("h100:8x8"), ASSUMED)
    whole = estimator.exchange_seconds(replace(config, parallel=replace(config.parallel, compress=0)), sizes)
    assert estimator.exchange_seconds(config, sizes) == pytest.approx((1 - share + share / 14.8) * whole, rel=0.05)


def exchanges(topology: str, *overrides: str) -> dict[str, tuple[float, bool]]:
    config = load_config(ROOT / "configs" / "v3_16b.yaml", ["data.batch_size=64", *(f"parallel.{o}" for o in overrides)])
    there = parse_topology(topology)
    found = estimate_exchanges(config, there, axis_sizes(config.parallel, there.size), ASSUMED)
    return {e.algorithm: (e.seconds, e.taken) for e in found}


def test_exchanges_across_hosts_and_the_one_taken():
    numbers = parameters_per_device(load_config(ROOT / "configs" / "v3_16b.yaml", []), {**ONE, "data": 8, "fsdp": 8})
    whole = exchanges("h100:8x8", "data=8", "fsdp=8")
    assert list(whole) == ["ring, float32", "tree, float32", "direct, 2 bits"]
    ring = 14 * (10e-6 + 4 * numbers / 8 / (50e9 * ASSUMED.link))  # 14 messages of an eighth, one after another
    assert whole["ring, float32"] == (pytest.approx(ring), True)
    few = exchanges("h100:8x8", "data=8", "fsdp=8", "compress=1")
    assert [name for name, (_, taken) in few.items() if taken] == ["direct, 1 bits"]
    assert few["direct, 1 bits"][0] < whole["direct, 2 bits"][0] < ring / 10


def test_replicas_that_share_hosts_may_be_summed_there_first():
    """Which pays for sums in float32, not for codes: NVLink's float32 takes longer than two bits on the network."""
    found = exchanges("h100:8x8", "data=64", "compress=2")
    inside = next(name for name in found if "parallel.data=8 parallel.fsdp=8" in name)
    assert found["direct, 2 bits"][0] < found[inside][0] < found["two levels, float32"][0] + found["direct, 2 bits"][0]
    assert found["two levels, float32"][0] < min(found[f"{name}, float32"][0] for name in ("ring", "tree"))
    assert exchanges("h100:8x8", "fsdp=64") == {}
    assert list(exchanges("v5p:4x4x4", "data=4", "fsdp=16")) == ["rings of the torus, float32", "direct, 2 bits"]
