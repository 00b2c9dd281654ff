"""A chip is one entry of precision/hardware.yaml: the platform, its recipe, plans and links all come from it."""

from types import SimpleNamespace

import jax
import pytest
import yaml

from dsv3_jax.cli import main
from dsv3_jax.config import load_config
from dsv3_jax.cost.efficiency import ASSUMED
from dsv3_jax.cost.estimate import Estimator
from dsv3_jax.cost.topologies import GIB, gpu_target, parse_topology, topology_of
from dsv3_jax.parallel.mesh import AXES
from dsv3_jax.precision.platforms import HARDWARE, platform_of
from tests.conftest import ROOT

CHIPS = """
v9x:
  device_kind: TPU v9x
  core: tpu
  tera_ops: {bf16: 1000, e4m3: 2000, e5m2: 2000}
  memory_gib: 128
  memory_tb_s: 5
  links:
    ici: {gb_s: 180, dimensions: 3, cores: 1, latency_us: 1.0}
    network: {gb_s: 12.5, latency_us: 20.0}
  topologies: ["v9x:2x2x2", "v9x:8x8x8"]
  sources: made up for a test, with twice the links of v5p
x100:
  device_kind: X100
  implementation: xla
  tera_ops: {float32: 100, bf16: 2000}
  memory_gib: 256
  memory_tb_s: 8
  links:
    nvlink: {gb_s: 900, latency_us: 5.0}
    network: {gb_s: 100, latency_us: 10.0}
  topologies: ["x100:1x8"]
  xla_gpu:
    {major: 11, cores: 200, memory: 274877906944, bandwidth: 8000000000000, l2_cache: 132120576, shared: 233472,
     shared_optin: 232448, clock_ghz: 2.0, name: X100}
  sources: made up for a test
"""


@pytest.fixture
def chips(monkeypatch):
    for kind, facts in yaml.safe_load(CHIPS).items():
        monkeypatch.setitem(HARDWARE, kind, facts)


def test_a_new_tpu_needs_only_its_entry(chips, capsys):
    device = SimpleNamespace(platform="tpu", device_kind="TPU v9x", coords=(0, 0, 0), slice_index=0, process_index=0)
    platform = platform_of(device)
    assert (platform.name, platform.core, platform.auto[0]) == ("v9x", "tpu", "deepseek")
    assert (platform.formats["e4m3"], platform.formats["int8"]) == ("native", "emulated")
    assert str(topology_of([device])) == "v9x:1x1x1"
    topology = parse_topology("v9x:8x8x8")
    assert (topology.is_tpu, topology.size, topology.room) == (True, 512, 128 * GIB)
    main(["plan", "--list"])
    assert "v9x:8x8x8" in capsys.readouterr().out

    config = load_config(ROOT / "configs" / "v3_671b.yaml", ["train.grad_accum_steps=1", "data.batch_size=512"])
    sizes: dict[str, int] = dict(zip(AXES, (1, 1, 512, 1, 1), strict=True))
    new, old = (Estimator(t, ASSUMED).estimate(config, sizes) for t in (topology, parse_topology("v5p:8x8x8")))
    assert new.memory == old.memory
    assert new.communication["experts' weights"] == pytest.approx(old.communication["experts' weights"] / 2, rel=0.01)


def test_a_new_gpu_needs_only_its_entry(chips):
    device = SimpleNamespace(platform="gpu", device_kind="NVIDIA X100 256GB", process_index=0, slice_index=None)
    platform = platform_of(device)
    assert (platform.name, platform.implementation, platform.auto[0]) == ("x100", "xla", "bf16")
    assert str(topology_of([device] * 8)) == "x100:1x8"
    assert not parse_topology("x100:1x8").is_tpu
    target = gpu_target("x100")
    assert "cuda_compute_capability { major: 11 }" in target
    assert 'device_description_str: "X100"' in target
    assert "device_memory_size: 274877906944" in target


def test_kinds_that_run_as_another_platform():
    """The H800 is an H100 with slower links."""
    assert parse_topology("h800:1x8").platform == "h100"
    assert parse_topology("v5p:2x2x1").platform == "v5p"
    assert gpu_target("h800") == gpu_target("h100")


def gpu(host: int, domain: int | None = None) -> SimpleNamespace:
    return SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3", process_index=host, slice_index=domain)


def test_topologies_follow_from_devices():
    assert str(topology_of([gpu(host) for host in range(4) for _ in range(8)])) == "h100:4x8"
    assert str(topology_of([gpu(i, i // 8) for i in range(16)])) == "h100:2x8"  # a process for each GPU
    chips = [(x, y, z) for x in range(2) for y in range(2) for z in range(4)]
    tpus = [
        SimpleNamespace(platform="tpu", device_kind="TPU v5p", coords=chip, slice_index=s, process_index=0)
        for s in range(2) for chip in chips
    ]  # fmt: skip
    assert str(topology_of(tpus)) == "2*v5p:2x2x4"
    assert topology_of(tpus[:5]) is None
    assert topology_of(jax.devices()) is None
